"""Training from latents against training from the images they were made of: the quickstart, on this machine's CPU.

    python benches/latents_vs_images.py [--coffey target/release/coffey] [--threads 2] [--rounds 3] [--out FILE.json]

Run it from the repository's root; Python needs no packages. `coffey precompute` writes the quickstart's latents once. Then `coffey train` alternates
between the images, latents with their embeddings, and latents with captions (encoded again). Each turn is
a short and a long run in new processes, without pictures and figures. The long run has one additional pass over the 459 samples;
rate and CPU time are those of this pass. The losses of the first steps must agree: a run from latents has the numbers of
the run from images, up to f16.
"""

import argparse
import json
import os
import platform
import statistics
import sys
import tempfile
from pathlib import Path

from step_vs_pytorch import CONFIG, timed

BATCH = 16
# Steps of the short run, and of the long run, which has one additional pass over 459 samples.
STEPS = [4, 33]
SIDES = {
    "images": {},
    "latents, embeddings": {"data.kind": "latents", "data.text_from": "embeds"},
    "latents, captions": {"data.kind": "latents", "data.text_from": "caption"},
}


def command(args, verb, config, settings):
    pairs = [word for key, value in settings.items() for word in ("-s", f"{key}={value}")]
    return [args.coffey, verb, "-c", config, *pairs]


def run(args, side, latents, steps, folder):
    settings = {
        "train.output": folder,
        "train.max_steps": steps,
        "train.batch_size": BATCH,
        "checkpoint.every": steps,
        "validation.every": 1000,
        "report.endpoint_captions": 0,
        "report.grid": "false",
    } | SIDES[side]
    if side != "images":
        settings["data.shards"] = f"{latents}/"
    return timed(command(args, "train", CONFIG, settings), args.threads, folder.with_suffix(".log"))


def losses(folder):
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line)["loss"] for line in lines]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--coffey", type=Path, default=Path("target/release/coffey"), help="the release binary")
    parser.add_argument("--rounds", type=int, default=3, help="runs of each side")
    parser.add_argument("--threads", type=int, default=2, help="compute threads")
    parser.add_argument("--scratch", type=Path, help="folder for runs and latents, instead of the system's temporary folder")
    parser.add_argument("--out", type=Path, help="JSON file for all figures")
    args = parser.parse_args()
    report = {"machine": {"cpus": os.cpu_count(), "arch": platform.machine(), "load_at_start": os.getloadavg()[0]}}
    sides = {side: [] for side in SIDES}
    with tempfile.TemporaryDirectory(dir=args.scratch) as scratch:
        scratch = Path(scratch)
        latents = scratch / "latents"
        settings = {"latents.output": latents, "latents.text": "both"}
        precompute = command(args, "precompute", CONFIG.with_name("precompute-quickstart.toml"), settings)
        report["precompute"] = timed(precompute, args.threads, scratch / "precompute.log")
        few, many = STEPS
        first = {}
        for turn in range(args.rounds):
            for index, (side, runs) in enumerate(sides.items()):
                print(f"round {turn + 1} of {args.rounds}: {side}", file=sys.stderr)
                folders = [scratch / f"run-{turn}-{index}-{steps}" for steps in STEPS]
                short, long = (run(args, side, latents, *at) for at in zip(STEPS, folders, strict=True))
                first[side] = losses(folders[0])
                samples = (many - few) * BATCH
                spent = {key: long[key] - short[key] for key in ("wall_seconds", "cpu_seconds")}
                runs.append(
                    {
                        "samples_per_second": samples / spent["wall_seconds"],
                        "cpu_ms_per_sample": 1000 * spent["cpu_seconds"] / samples,
                        "short": short,
                        "long": long,
                    }
                )
    for side, found in first.items():
        apart = max(abs(a - b) / abs(b) for a, b in zip(found, first["images"], strict=True))
        if apart > 1e-2:
            raise SystemExit(f"{side}: the losses of the first {few} steps differ by {apart:.2g} from those of the images")
    print(f"{'':24}{'samples/s':>12}{'CPU ms':>12}{'peak MiB':>12}")
    for side, runs in sides.items():
        middle = {key: statistics.median(run[key] for run in runs) for key in ("samples_per_second", "cpu_ms_per_sample")}
        peak = max(run["long"]["peak_bytes"] for run in runs) / 2**20
        report[side] = middle | {"peak_mib": peak, "runs": runs}
        print(f"{side:24}{middle['samples_per_second']:>12.1f}{middle['cpu_ms_per_sample']:>12.1f}{peak:>12.1f}")
    if args.out:
        args.out.write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
