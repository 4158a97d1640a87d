"""Whole LCM distillation steps: coffey against PyTorch + diffusers, on this machine's CPU, in one run.

    python benches/step_vs_pytorch.py [--coffey target/release/coffey] [--config configs/quickstart.toml]
        [--steps 12] [--rounds 2] [--threads 2] [--out FILE.json] [-s KEY=VALUE ...]

Run it from the repository's root, with the packages of `tests/reference/requirements.txt`.

First `coffey train` makes the steps once with an audit, untimed: the student and the inputs that PyTorch starts
from. Then the two take turns, each time in a fresh process, which makes the same steps from the same start:

    coffey   `coffey train` without an audit, validation or report; `samples_per_second` of its `metrics.jsonl`.
             That includes the wait for data, and the threads that fetch, decode and encode the images meanwhile.
    PyTorch  the step of `tests/reference`: teacher twice, target, student forward and backward, clipping, AdamW,
             average. The recorded latents and embeddings are loaded before the clock starts.

A rate is the median of all steps after the first two, a peak the largest resident set of the process (`wait4`).
Where there are several rounds the table has the median of the rates and the largest peak; the file has them all.
"""

import argparse
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import tempfile
import time
import tomllib
from pathlib import Path

WARM_UP = 2  # steps left out: first touches of memory, the libraries' own set-up
REFERENCE = Path(__file__).resolve().parent.parent / "tests" / "reference"
NEVER = 10**9  # as a number of steps
MAXRSS_UNIT = 1 if sys.platform == "darwin" else 1024


def pytorch_steps(audit, threads):
    """Makes the audited steps; samples per second of each."""
    import torch
    from diffusers import UNet2DConditionModel
    from diffusers.optimization import get_scheduler
    from safetensors.torch import load_file

    sys.path.insert(0, str(REFERENCE))
    from lcm_reference import update_ema
    from replay_audit import Distillation, load_unet

    imports = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * MAXRSS_UNIT
    torch.set_num_threads(threads)
    meta = json.loads((audit / "meta.json").read_text())
    student, target = load_unet(audit / "unet_init"), load_unet(audit / "unet_init")
    teacher = UNet2DConditionModel.from_pretrained(meta["teacher"], subfolder="unet").float()
    teacher.requires_grad_(False)
    target.requires_grad_(False)
    student.train()
    distillation = Distillation(meta, teacher, student, target)
    betas, rest = (meta["beta1"], meta["beta2"]), {"weight_decay": meta["weight_decay"], "eps": meta["epsilon"]}
    optimizer = torch.optim.AdamW(student.parameters(), lr=meta["learning_rate"], betas=betas, **rest)
    lengths = {"num_warmup_steps": meta["warmup_steps"], "num_training_steps": meta["max_steps"]}
    schedule = get_scheduler(meta["schedule"], optimizer, **lengths)
    micro_batches = meta["gradient_accumulation"]
    wanted = ("latents", "noise", "index", "w", "prompt_embeds", "uncond_prompt_embeds")
    rates, losses = [], []
    for step in range(1, meta["steps"] + 1):
        files = (load_file(audit / f"step-{step:06}.{micro:02}.safetensors") for micro in range(micro_batches))
        given = [{name: file[name] for name in wanted} for file in files]
        started, total = time.perf_counter(), 0.0
        for inputs in given:
            loss = distillation.step(inputs)["loss"] / micro_batches
            loss.backward()
            total += loss.item()
        torch.nn.utils.clip_grad_norm_(student.parameters(), meta["max_grad_norm"])
        optimizer.step()
        schedule.step()
        optimizer.zero_grad(set_to_none=True)
        update_ema(target.parameters(), student.parameters(), meta["ema_decay"])
        samples = sum(len(inputs["latents"]) for inputs in given)
        rates.append(samples / (time.perf_counter() - started))
        losses.append(total)
    return {"samples_per_second": rates, "loss": losses, "version": torch.__version__, "imports_bytes": imports}


def timed(command, threads, log):
    """Runs a process to its end; what it used. Linux counts a parent's peak in its child's: this one stays small."""
    variables = dict.fromkeys(("RAYON_NUM_THREADS", "OMP_NUM_THREADS", "MKL_NUM_THREADS"), str(threads))
    with log.open("wb") as output:
        words, env = [str(part) for part in command], os.environ | variables
        process = subprocess.Popen(words, env=env, stdin=subprocess.DEVNULL, stdout=output, stderr=output)
        started = time.perf_counter()
        _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)  # it is reaped: Popen need not wait
    if process.returncode:
        raise SystemExit(f"{' '.join(words)}\nended with {process.returncode}:\n{log.read_text()[-2000:]}")
    return {
        "peak_bytes": usage.ru_maxrss * MAXRSS_UNIT,
        "cpu_seconds": usage.ru_utime + usage.ru_stime,
        "wall_seconds": time.perf_counter() - started,
    }


def coffey_run(args, folder, audit=None):
    """One `coffey train` from step 0."""
    settings = {
        "train.output": folder / "run",
        "train.max_steps": args.steps,
        "checkpoint.every": NEVER,
        "report.endpoint_captions": 0,
        "report.grid": "false",
    }
    if "validation" in tomllib.loads(args.config.read_text()):
        settings["validation.every"] = NEVER
    if audit:
        settings |= {"audit.dir": audit, "audit.steps": args.steps}
    words = [f"{key}={value}" for key, value in settings.items()] + args.set
    command = [args.coffey, "train", "-c", args.config, *(part for word in words for part in ("-s", word))]
    used = timed(command, args.threads, folder / "log")
    lines = [json.loads(line) for line in (folder / "run" / "metrics.jsonl").read_text().splitlines()]
    return {name: [line[name] for line in lines] for name in ("samples_per_second", "loss")} | used


def pytorch_run(args, folder, audit):
    """The audited steps in a process of their own."""
    result = folder / "result.json"
    command = [sys.executable, Path(__file__).resolve(), "--pytorch", audit, "--out", result]
    used = timed([*command, "--threads", args.threads], args.threads, folder / "log")
    return json.loads(result.read_text()) | used


def summary(runs):
    """Median rate and largest peak of a side's rounds."""
    rates = [statistics.median(run["samples_per_second"][WARM_UP:]) for run in runs]
    return statistics.median(rates), max(run["peak_bytes"] for run in runs) / 2**20


def compare(args):
    """Both sides, by turns; the report as it is written to `--out`."""
    sides, load = {"coffey": [], "PyTorch": []}, os.getloadavg()[0]
    if load > 0.5:
        print(f"the machine is busy (load {load:.1f}): these figures won't say much", file=sys.stderr)
    with tempfile.TemporaryDirectory() as scratch:
        scratch = Path(scratch)
        audit = scratch / "audit"

        def folder(name):
            (scratch / name).mkdir()
            return scratch / name

        print("recording the inputs", file=sys.stderr)
        recorded = coffey_run(args, folder("recording"), audit)
        for turn in range(1, args.rounds + 1):
            for name, runs in sides.items():
                print(f"round {turn} of {args.rounds}: {name}", file=sys.stderr)
                here = folder(f"{name}-{turn}")
                runs.append(pytorch_run(args, here, audit) if name == "PyTorch" else coffey_run(args, here))
    for name, runs in sides.items():
        apart = max(abs(a / b - 1) for run in runs for a, b in zip(run["loss"], recorded["loss"], strict=True))
        if apart > 0.01:
            raise SystemExit(f"{name} made other steps than were recorded: a loss is {apart:.1%} apart")
    (rate, peak), (rate_pytorch, peak_pytorch) = map(summary, sides.values())
    return {
        "machine": {"cpus": os.cpu_count(), "arch": platform.machine(), "load_at_start": load},
        "arguments": {k: str(v) for k, v in vars(args).items() if k in ("config", "steps", "rounds", "threads", "set")},
        "coffey": {"samples_per_second": rate, "peak_mib": peak, "runs": sides["coffey"]},
        "PyTorch": {"samples_per_second": rate_pytorch, "peak_mib": peak_pytorch, "runs": sides["PyTorch"]},
        "coffey_over_pytorch": {"samples_per_second": rate / rate_pytorch, "peak_mib": peak / peak_pytorch},
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--coffey", type=Path, default=Path("target/release/coffey"), help="the release binary")
    parser.add_argument("--config", type=Path, default=Path("configs/quickstart.toml"))
    parser.add_argument("-s", "--set", action="append", default=[], metavar="KEY=VALUE", help="handed on to coffey")
    parser.add_argument("--steps", type=int, default=12, help=f"steps of each run, more than {WARM_UP}")
    parser.add_argument("--rounds", type=int, default=2, help="turns of each side")
    parser.add_argument("--threads", type=int, default=2, help="threads of each side's arithmetic")
    parser.add_argument("--out", type=Path, help="JSON file for all figures")
    parser.add_argument("--pytorch", type=Path, metavar="AUDIT", help=argparse.SUPPRESS)  # the PyTorch process itself
    args = parser.parse_args()
    if args.pytorch:
        args.out.write_text(json.dumps(pytorch_steps(args.pytorch, args.threads)))
        return
    if args.steps <= WARM_UP or args.rounds < 1:
        parser.error(f"--steps must be more than {WARM_UP}, --rounds at least 1")
    report = compare(args)
    print(f"{'':16}{'samples/s':>12}{'peak MiB':>12}")
    for name in ("coffey", "PyTorch", "coffey_over_pytorch"):
        row = report[name]
        label, digits = ("coffey/PyTorch", 2) if "over" in name else (name, 1)
        print(f"{label:16}{row['samples_per_second']:>12.{digits}f}{row['peak_mib']:>12.{digits}f}")
    if args.out:
        args.out.write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
