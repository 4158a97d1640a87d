"""Whole LCM distillation steps: coffey against PyTorch + diffusers, on this machine's CPU, in one run.

    python benches/step_vs_pytorch.py [--case small] [--case sd15] [--coffey target/release/coffey] [--threads 2]
        [--rounds N] [--steps N] [--out FILE.json] [-s KEY=VALUE ...]

Run it from the repository's root, with the packages of `tests/reference/requirements.txt`. The cases:

    small       a UNet of 64 and 128 channels with random weights, 16 x 16 latents, batch 16
    sd15        a UNet of Stable Diffusion 1.5's shapes with random weights, 32 x 32 latents, batch 1
    sd15-thin   the same with one layer a block, for a machine with too little memory for PyTorch's side of sd15
    quickstart  the quickstart's own teacher, 16 x 16 latents, batch 16

For each case `tests/reference/make_pipeline.py` makes the teacher, with a very small VAE and text encoder, so that
coffey's encoding takes little time (except in quickstart). `coffey train` makes the steps once with an
audit, untimed: it records the student and the inputs for PyTorch. Then both sides alternate, each time in a new
process that makes the same steps from the same start, in f32:

    coffey   `coffey train` without an audit, validation or report; `samples_per_second` of its `metrics.jsonl`.
             The process is ended when the last step is in that file, so the figure excludes saving.
    PyTorch  the step of `tests/reference`, from recorded latents and embeddings, loaded before the timer
             starts: teacher twice and target without a graph, student forward and backward, clipping, fused AdamW,
             moving average.

A rate is the median of all steps after the first (sd15) or first two, a peak the largest resident set of the process
(`wait4`). With several rounds the table has the median of the rates and the largest peak; the file has
all of them. `-s` settings go to coffey; PyTorch follows `train.gradient_checkpointing` and `train.teacher_dtype`.
"""

import argparse
import json
import os
import platform
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

HERE = Path(__file__).resolve().parent
REFERENCE = HERE.parent / "tests" / "reference"
CONFIG = HERE.parent / "configs" / "quickstart.toml"
NEVER = 10**9  # steps
MAXRSS_UNIT = 1 if sys.platform == "darwin" else 1024

# Shape and options of make_pipeline.py, pixels a side, batch, steps, warm-up steps, rounds, and GiB of free memory:
# both sides have teacher, student, target, gradients and two moments in f32.
CASES = {
    "small": {"pipeline": ["small", "--encoders", "tiny"], "pixels": 64, "batch": 16}
    | {"steps": 12, "warm_up": 2, "rounds": 3, "gib": 2},
    "sd15": {"pipeline": ["sd15", "--encoders", "tiny", "--dtype", "f16"], "pixels": 256, "batch": 1}
    | {"steps": 4, "warm_up": 1, "rounds": 2, "gib": 21.5},
    "sd15-thin": {
        "pipeline": ["sd15", "--encoders", "tiny", "--dtype", "f16", "--set", "unet.layers_per_block=1"],
        "pixels": 256,
        "batch": 1,
    }
    | {"steps": 4, "warm_up": 1, "rounds": 2, "gib": 15},
    "quickstart": {"pipeline": None, "pixels": 64, "batch": 16, "steps": 12, "warm_up": 2, "rounds": 2, "gib": 2},
}


class Cast:
    """A teacher with 16-bit weights, as with `--cast_teacher_unet` and autocast."""

    def __init__(self, teacher, dtype):
        self.teacher, self.dtype = teacher.to(dtype), dtype

    def __call__(self, *args, **kwargs):
        import torch

        with torch.autocast("cpu", dtype=self.dtype):
            output = self.teacher(*args, **kwargs)
        output.sample = output.sample.float()
        return output


def pytorch_steps(args):
    """Makes the audited steps; returns the samples per second of each."""
    import torch
    from diffusers import UNet2DConditionModel
    from safetensors.torch import load_file

    sys.path.insert(0, str(REFERENCE))
    from lcm_reference import update_ema
    from replay_audit import Distillation, load_unet

    imports = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * MAXRSS_UNIT
    torch.set_num_threads(args.threads)
    audit, settings = args.pytorch, dict(word.split("=", 1) for word in args.set)
    meta = json.loads((audit / "meta.json").read_text())
    wanted = ("latents", "noise", "index", "w", "prompt_embeds", "uncond_prompt_embeds")
    given = []
    for step in range(1, args.steps + 1):
        recorded = load_file(audit / f"step-{step:06}.00.safetensors")
        given.append({name: recorded[name] for name in wanted})
    student, target = load_unet(audit / "unet_init"), load_unet(audit / "unet_init")
    teacher = UNet2DConditionModel.from_pretrained(meta["teacher"], subfolder="unet").float()
    teacher.requires_grad_(False)
    target.requires_grad_(False)
    student.train()
    if settings.get("train.gradient_checkpointing") == "true":
        student.enable_gradient_checkpointing()
    kind = settings.get("train.teacher_dtype", "f32")
    if kind != "f32":
        teacher = Cast(teacher, {"f16": torch.float16, "bf16": torch.bfloat16}[kind])
    if args.channels_last:
        for model in (student, target, teacher):
            model.to(memory_format=torch.channels_last)
    distillation = Distillation(meta, teacher, student, target)
    betas, rest = (meta["beta1"], meta["beta2"]), {"weight_decay": meta["weight_decay"], "eps": meta["epsilon"]}
    optimizer = torch.optim.AdamW(student.parameters(), lr=meta["learning_rate"], betas=betas, fused=True, **rest)
    rates, losses = [], []
    for inputs in given:
        started = time.perf_counter()
        loss = distillation.step(inputs)["loss"]
        loss.backward()
        torch.nn.utils.clip_grad_norm_(student.parameters(), meta["max_grad_norm"])
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        update_ema(target.parameters(), student.parameters(), meta["ema_decay"])
        losses.append(loss.item())
        rates.append(len(inputs["latents"]) / (time.perf_counter() - started))
    return {"samples_per_second": rates, "loss": losses, "version": torch.__version__, "imports_bytes": imports}


def timed(command, threads, log, done=lambda: False):
    """Runs a process to its end, or until `done`; returns its use of resources. Linux counts a parent's peak in its child's, so
    this process must stay small."""
    variables = dict.fromkeys(("RAYON_NUM_THREADS", "OMP_NUM_THREADS", "MKL_NUM_THREADS"), str(threads))
    with log.open("wb") as output:
        words, env = [str(part) for part in command], os.environ | variables
        process = subprocess.Popen(words, env=env, stdin=subprocess.DEVNULL, stdout=output, stderr=output)
        started, ended, stopped = time.perf_counter(), 0, False
        while not ended:
            ended, status, usage = os.wait4(process.pid, os.WNOHANG)
            if not ended and not stopped and done():
                process.kill()
                stopped = True
            time.sleep(0.02)
    process.returncode = os.waitstatus_to_exitcode(status)  # already reaped: Popen must not wait
    if process.returncode and not stopped:
        raise SystemExit(f"{' '.join(words)}\nended with {process.returncode}:\n{log.read_text()[-2000:]}")
    return {
        "peak_bytes": usage.ru_maxrss * MAXRSS_UNIT,
        "cpu_seconds": usage.ru_utime + usage.ru_stime,
        "wall_seconds": time.perf_counter() - started,
    }


def coffey_run(args, case, teacher, folder, audit=None):
    """Runs the first steps of `coffey train`."""
    settings = {
        "train.output": folder / "run",
        "train.max_steps": NEVER,
        "train.batch_size": case["batch"],
        "model.teacher": teacher,
        "image.resolution": case["pixels"],
        "optimizer.learning_rate": 1e-5,
        "checkpoint.every": NEVER,
        "validation.every": NEVER,
        "report.endpoint_captions": 0,
        "report.grid": "false",
    }
    if audit:
        settings |= {"audit.dir": audit, "audit.steps": NEVER}
    words = [f"{key}={value}" for key, value in settings.items()] + args.set
    command = [args.coffey, "train", "-c", CONFIG, *(part for word in words for part in ("-s", word))]
    metrics = folder / "run" / "metrics.jsonl"

    def lines():
        whole = metrics.read_text().rpartition("\n")[0] if metrics.exists() else ""
        return whole.splitlines()[: case["steps"]]

    used = timed(command, args.threads, folder / "log", lambda: len(lines()) == case["steps"])
    steps = [json.loads(line) for line in lines()]
    return {name: [step[name] for step in steps] for name in ("samples_per_second", "loss")} | used


def pytorch_run(args, case, folder, audit):
    """Runs the audited steps in PyTorch, in a process of its own."""
    result = folder / "result.json"
    options = ["--threads", args.threads, "--steps", case["steps"], *(part for word in args.set for part in ("-s", word))]
    if args.channels_last:
        options.append("--channels-last")
    command = [sys.executable, Path(__file__).resolve(), "--pytorch", audit, "--out", result, *options]
    used = timed(command, args.threads, folder / "log")
    return json.loads(result.read_text()) | used


def summary(runs, warm_up):
    """Median rate and largest peak of a side's rounds."""
    rates = [statistics.median(run["samples_per_second"][warm_up:]) for run in runs]
    return {"samples_per_second": statistics.median(rates), "peak_mib": max(run["peak_bytes"] for run in runs) / 2**20}


def compare(args, name, case, scratch):
    """Runs both sides of a case alternately; returns the report for `--out`."""
    sides, audit = {"coffey": [], "PyTorch": []}, scratch / "audit"

    def folder(name):
        (scratch / name).mkdir()
        return scratch / name

    teacher = HERE.parent / "assets" / "quickstart" / "teacher"
    if case["pipeline"]:
        teacher = scratch / "teacher"
        script = [sys.executable, REFERENCE / "make_pipeline.py", teacher, *case["pipeline"]]
        subprocess.run(list(map(str, script)), check=True)
    print(f"{name}: recording the inputs", file=sys.stderr)
    recorded = coffey_run(args, case, teacher, folder("recording"), audit)
    for turn in range(1, case["rounds"] + 1):
        for side, runs in sides.items():
            print(f"{name}: round {turn} of {case['rounds']}: {side}", file=sys.stderr)
            here = folder(f"{side}-{turn}")
            if side == "PyTorch":
                runs.append(pytorch_run(args, case, here, audit))
            else:
                runs.append(coffey_run(args, case, teacher, here))
            shutil.rmtree(here)
    # 16-bit teachers round differently on the two sides.
    allowed = 0.2 if any("teacher_dtype" in word for word in args.set) else 0.01
    for side, runs in sides.items():
        apart = max(abs(a / b - 1) for run in runs for a, b in zip(run["loss"], recorded["loss"], strict=True))
        if apart > allowed:
            raise SystemExit(f"{name}: {side}: the steps differ from the recorded ones: a loss differs by {apart:.1%}")
    ours, theirs = (summary(runs, case["warm_up"]) for runs in sides.values())
    theirs["imports_mib"] = max(run["imports_bytes"] for run in sides["PyTorch"]) / 2**20
    return {
        "case": {key: case[key] for key in ("pipeline", "pixels", "batch", "steps", "warm_up", "rounds")},
        "coffey": ours | {"runs": sides["coffey"]},
        "PyTorch": theirs | {"runs": sides["PyTorch"]},
        "coffey_over_pytorch": {key: ours[key] / theirs[key] for key in ours},
    }


def available_gib():
    """Available memory; infinite if unknown."""
    try:
        fields = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
        return int(fields["MemAvailable"].split()[0]) / 2**20
    except OSError:
        return float("inf")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--case", action="append", choices=CASES, help="can be repeated; unset: small and sd15")
    parser.add_argument("--coffey", type=Path, default=Path("target/release/coffey"), help="the release binary")
    parser.add_argument("-s", "--set", action="append", default=[], metavar="KEY=VALUE", help="passed to coffey")
    parser.add_argument("--steps", type=int, help="steps of each run, instead of the case's")
    parser.add_argument("--rounds", type=int, help="runs of each side, instead of the case's")
    parser.add_argument("--threads", type=int, default=2, help="compute threads of each side")
    parser.add_argument("--channels-last", action="store_true", help="PyTorch's models use this memory format")
    parser.add_argument("--scratch", type=Path, help="folder for the models (sd15: 10 GB)")
    parser.add_argument("--out", type=Path, help="JSON file for all figures")
    parser.add_argument("--pytorch", type=Path, metavar="AUDIT", help=argparse.SUPPRESS)  # the PyTorch process itself
    args = parser.parse_args()
    if args.pytorch:
        args.out.write_text(json.dumps(pytorch_steps(args)))
        return
    chosen = {}
    for name in args.case or ("small", "sd15"):
        given = {key: value for key in ("steps", "rounds") if (value := getattr(args, key)) is not None}
        chosen[name] = case = CASES[name] | given
        if case["steps"] <= case["warm_up"] or case["rounds"] < 1:
            parser.error(f"{name}: --steps must be more than {case['warm_up']}, --rounds at least 1")
        if (free := available_gib()) < case["gib"]:
            parser.error(f"{name} needs about {case['gib']} GiB of free memory, there are {free:.1f}")
    load = os.getloadavg()[0]
    if load > 0.5:
        print(f"warning: the machine is busy (load {load:.1f}): the figures are unreliable", file=sys.stderr)
    report = {
        "machine": {"cpus": os.cpu_count(), "arch": platform.machine(), "load_at_start": load},
        "arguments": {"threads": args.threads, "set": args.set, "channels_last": args.channels_last},
        "cases": {},
    }
    print(f"{'':12}{'':16}{'samples/s':>12}{'peak MiB':>12}")
    for name, case in chosen.items():
        with tempfile.TemporaryDirectory(dir=args.scratch) as scratch:
            made = report["cases"][name] = compare(args, name, case, Path(scratch))
        for side, digits in (("coffey", 1), ("PyTorch", 1), ("coffey_over_pytorch", 2)):
            row = made[side]
            label = side.replace("_over_pytorch", "/PyTorch")
            rate_digits = max(digits, 3 if row["samples_per_second"] < 1 else digits)
            print(f"{name:12}{label:16}{row['samples_per_second']:>12.{rate_digits}f}{row['peak_mib']:>12.{digits}f}")
        print(f"{'':12}{'':16}PyTorch's libraries are {made['PyTorch']['imports_mib']:.1f} MiB of its peak")
        sys.stdout.flush()
        if args.out:
            args.out.write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
