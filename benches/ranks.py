"""The cost of lanes, the gain of ranks, and the speed of their exchange: the quickstart's step, 16 samples in 4 micro-batches.

    python benches/ranks.py [--coffey target/release/coffey] [--steps 40] [--rounds 3] [--launcher "mpirun --bind-to none"] [--out FILE.json]

Run it from the repository's root on an idle machine with Open MPI. Each round runs every variant once: one process with one and with four lanes, then two and
four ranks with four lanes. All use all cores: a rank has its share of the threads. The figures are medians over the rounds of a run's mean time for a step (without its
first five), and the greatest peak memory of a process. The students of all variants with four lanes are compared byte by byte.

The exchange is measured by `coffey check` between two and four ranks of this machine. From its speed the script computes the exchange of a step between more machines: it is
no measurement. Every rank packs, sums and unpacks as many bytes as one of two ranks here; each byte of the gradients goes out and comes in (N - 1) / N times, twice; a message
takes LATENCY, and rank 0 sends and receives one to and from every rank four times a step.
"""

import argparse
import json
import os
import shlex
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

SETTINGS = {
    "train.batch_size": 4,
    "train.gradient_accumulation": 4,
    "report.endpoint_captions": 0,
    "report.grid": "false",
    "validation.every": 1000000,
    "checkpoint.every": 1000000,
}
# Name, lanes, ranks.
VARIANTS = [("1 rank, 1 lane", 1, 1), ("1 rank, 4 lanes", 4, 1), ("2 ranks", 4, 2), ("4 ranks", 4, 4)]
WARM_UP = 5
EXCHANGING = [2, 4]
# Computed: ranks, networks with the share of their speed that one stream of messages reaches, the parameters of a UNet of Stable Diffusion 1.5.
MACHINES = [2, 8, 64, 512]
NETWORKS = {"10 GbE": 10e9 / 8 * 0.9, "100 GbE": 100e9 / 8 * 0.9}
LATENCY = 50e-6
PARAMETERS = 859_520_964
CONTROL_MESSAGES = 4


def peak_memory(command):
    """Runs a command; the greatest peak resident memory of one of its processes, in bytes."""
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        import resource

        done = subprocess.run(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
        if done.returncode:
            print(done.stderr, file=sys.stderr)
        os.write(writer, str(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024).encode())
        os._exit(done.returncode != 0)
    os.close(writer)
    peak = int(os.read(reader, 100) or 0)
    if os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]):
        sys.exit(f"failed: {shlex.join(command)}")
    return peak


def measure(args, output, lanes, ranks):
    settings = SETTINGS | {"data.lanes": lanes, "train.max_steps": args.steps, "train.output": output}
    command = [args.coffey, "train", "-c", "configs/quickstart.toml"]
    for key, value in settings.items():
        command += ["-s", f"{key}={value}"]
    if ranks > 1:
        command = [*shlex.split(args.launcher), "-n", str(ranks), *command]
    peak = peak_memory(command)
    lines = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    seconds = (lines[-1]["seconds"] - lines[WARM_UP - 1]["seconds"]) / (args.steps - WARM_UP)
    student = (output / "unet" / "diffusion_pytorch_model.safetensors").read_bytes()
    return seconds, peak, student


def exchange_speed(args, ranks, output):
    """Bytes of gradients a second that the ranks sum and send back as weights."""
    settings = SETTINGS | {"train.output": output}
    command = [*shlex.split(args.launcher), "-n", str(ranks), args.coffey, "check", "--json", "-c", "configs/quickstart.toml"]
    for key, value in settings.items():
        command += ["-s", f"{key}={value}"]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        sys.exit(done.stderr)
    return json.loads(done.stdout)["ranks"]["exchange_bytes_per_second"]


def simulated(speed, ranks, bandwidth):
    """Seconds of the exchange of a step between machines with one rank each: on the machine, on the wire, and in messages of control."""
    size = 4 * PARAMETERS
    wire = 2 * size * (ranks - 1) / ranks / bandwidth
    return size / speed + wire + CONTROL_MESSAGES * (ranks - 1) * LATENCY


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--coffey", default="target/release/coffey")
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--launcher", default="mpirun --oversubscribe --bind-to none")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()

    found = {name: [] for name, _, _ in VARIANTS}
    students = set()
    with tempfile.TemporaryDirectory() as work:
        for round_number in range(args.rounds):
            for name, lanes, ranks in VARIANTS:
                seconds, peak, student = measure(args, Path(work) / f"{round_number} {name}", lanes, ranks)
                found[name].append((seconds, peak))
                if lanes == 4:
                    students.add(student)
        speeds = {ranks: [] for ranks in EXCHANGING}
        for round_number in range(args.rounds):
            for ranks in EXCHANGING:
                speeds[ranks].append(exchange_speed(args, ranks, Path(work) / "checked"))
    if len(students) != 1:
        sys.exit(f"{len(students)} different students with four lanes")
    print("| | a step, ms | of 1 rank | peak of a process, MB |\n| --- | --- | --- | --- |")
    table, base = {}, None
    for name, runs in found.items():
        seconds = statistics.median(run[0] for run in runs)
        peak = max(run[1] for run in runs)
        base = base or seconds
        table[name] = {"step_seconds": round(seconds, 4), "peak_bytes": peak}
        print(f"| {name} | {1e3 * seconds:.0f} | {seconds / base:.2f} | {peak / 1e6:.0f} |")
    speeds = {ranks: statistics.median(found) for ranks, found in speeds.items()}
    for ranks, speed in speeds.items():
        print(f"\nexchange between {ranks} ranks of this machine: {speed / 1e9:.2f} GB/s of gradients")
    print("\ncomputed for Stable Diffusion 1.5, seconds of a step's exchange:\n\n| ranks | " + " | ".join(NETWORKS) + " |\n| --- | --- | --- |")
    computed = {}
    for ranks in MACHINES:
        computed[ranks] = {name: round(simulated(speeds[2], ranks, bandwidth), 2) for name, bandwidth in NETWORKS.items()}
        print(f"| {ranks} | " + " | ".join(f"{seconds:.1f}" for seconds in computed[ranks].values()) + " |")
    if args.out:
        figures = {"steps": args.steps, "rounds": args.rounds, "cores": os.cpu_count(), "runs": table, "exchange_bytes_per_second": speeds, "computed_seconds": computed}
        args.out.write_text(json.dumps(figures, indent=1) + "\n")


if __name__ == "__main__":
    main()
