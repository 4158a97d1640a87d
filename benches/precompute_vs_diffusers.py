"""Encoding captioned images to latents and text embeddings: coffey against PyTorch + diffusers, on this machine's CPU.

    python benches/precompute_vs_diffusers.py [--case small] [--case sd15] [--coffey target/release/coffey] [--threads 2]
        [--rounds N] [--out FILE.json]

Run it from the repository's root, with the packages of `tests/reference/requirements.txt`, webdataset and pillow. The
input is several copies of the quickstart's shards of captioned emoji. The cases:

    small   the quickstart's own VAE and text encoder, 64 px, batch 16
    sd15    a VAE and a text encoder of Stable Diffusion 1.5's shapes with random weights, 256 px, batch 4

Both sides read the shards from the disk, decode them with alpha on white, resize bilinearly, crop the centre, encode in f32 and
write tars of f16 npy, caption and json:

    coffey    `coffey precompute`
    PyTorch   webdataset, Pillow, AutoencoderKL, CLIPTextModel and `webdataset.TarWriter` under `torch.inference_mode`, images
              prepared by one DataLoader worker

Each run is a new process; in each round each side makes a short and a long run. The rate is the additional samples of the long run divided by
its additional seconds, so it excludes loading. The peak is the largest resident set of a single process of the long run
(`wait4`; a DataLoader worker's is not added to its parent's). The outputs of both sides are compared before any figure is reported.
"""

import argparse
import io
import json
import multiprocessing
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
from step_vs_pytorch import HERE, REFERENCE, timed

ASSETS = HERE.parent / "assets" / "quickstart"
# Samples of the short and of the long run, copies of the quickstart's four shards, runs of each side.
CASES = {
    "small": {"pixels": 64, "batch": 16, "samples": [400, 6400], "copies": 14, "rounds": 3},
    "sd15": {"pixels": 256, "batch": 4, "samples": [4, 24], "copies": 1, "rounds": 2},
}
# Relative to the largest value of an array: f16 keeps 11 bits, and the order of sums differs.
ALLOWED = 4e-3


def square(image, side):
    """Resizes the shorter side to `side` and crops the centre: f32 `[3, side, side]` in -1..1."""
    from PIL import Image

    if image.mode != "RGB":
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, (255, 255, 255, 255)), image).convert("RGB")
    width, height = image.size
    short = min(width, height)
    size = (int(side * width / short), int(side * height / short))
    if size != image.size:
        image = image.resize(size, Image.Resampling.BILINEAR)
    left, top = round((size[0] - side) / 2.0), round((size[1] - side) / 2.0)
    pixels = np.asarray(image.crop((left, top, left + side, top + side)), dtype=np.float32)
    return np.ascontiguousarray((pixels.transpose(2, 0, 1) / np.float32(255.0) - np.float32(0.5)) / np.float32(0.5))


def pytorch_precompute(args):
    """The PyTorch process: typical code of a diffusers user."""
    import torch
    import webdataset as wds
    from diffusers import AutoencoderKL
    from PIL import Image
    from transformers import CLIPTextModel, CLIPTokenizer

    side, samples = args.pixels, args.samples
    vae = AutoencoderKL.from_pretrained(args.teacher, subfolder="vae", torch_dtype=torch.float32).eval()
    text_encoder = CLIPTextModel.from_pretrained(args.teacher / "text_encoder", dtype=torch.float32).eval()
    tokenizer = CLIPTokenizer.from_pretrained(args.teacher / "tokenizer")

    def prepared(sample):
        encoded = next(sample[key] for key in ("jpg", "png", "jpeg", "webp") if key in sample)
        return sample["__key__"], square(Image.open(io.BytesIO(encoded)), side), sample["txt"].decode(), sample["json"]

    shards = sorted(str(shard) for shard in args.shards.glob("*.tar"))
    dataset = wds.WebDataset(shards, shardshuffle=False).map(prepared).slice(samples)
    batches = torch.utils.data.DataLoader(dataset.batched(args.batch, partial=True), batch_size=None, num_workers=1)
    args.latents.mkdir()
    with wds.TarWriter(str(args.latents / "00000.tar")) as out, torch.inference_mode():
        for keys, pixels, captions, notes in batches:
            moments = vae.encode(torch.as_tensor(np.stack(list(pixels)))).latent_dist.parameters
            ids = tokenizer(
                list(captions),
                padding="max_length",
                max_length=tokenizer.model_max_length,
                truncation=True,
                return_tensors="pt",
            ).input_ids
            embeds = text_encoder(ids)[0]
            for row, key in enumerate(keys):
                out.write(
                    {
                        "__key__": key,
                        "latent.npy": moments[row].half().numpy(),
                        "prompt_embeds.npy": embeds[row].half().numpy(),
                        "txt": captions[row],
                        "json": notes[row],
                    }
                )


def run(args, side, case, samples, teacher, shards, folder):
    """Runs a process; returns its use of resources."""
    latents = folder / f"latents-{samples}"
    if side == "coffey":
        settings = {
            "data.shards": str(shards) + "/",
            "data.max_samples": samples,
            "image.resolution": case["pixels"],
            "model.teacher": teacher,
            "encode.batch_size": case["batch"],
            "latents.output": latents,
        }
        command = [args.coffey, "precompute", "-c", HERE.parent / "configs" / "precompute-quickstart.toml"]
        for key, value in settings.items():
            command += ["-s", f"{key}={value}"]
    else:
        command = [sys.executable, Path(__file__), "--pytorch", "--teacher", teacher, "--shards", shards]
        command += ["--latents", latents, "--samples", samples, "--pixels", case["pixels"], "--batch", case["batch"]]
    return timed(command, args.threads, folder / f"log-{samples}"), latents


def arrays(latents):
    """Moments and embeddings of every sample, in order."""
    import webdataset as wds

    found = []
    for shard in sorted(map(str, latents.glob("*.tar"))):
        for sample in wds.WebDataset(shard, shardshuffle=False, empty_check=False):
            values = [np.load(io.BytesIO(sample[key])).astype(np.float32) for key in ("latent.npy", "prompt_embeds.npy")]
            found.append((sample["__key__"], *values))
    return found


def check_equal(ours, theirs, name):
    ours, theirs = arrays(ours), arrays(theirs)
    if [sample[0] for sample in ours] != [sample[0] for sample in theirs]:
        raise SystemExit(f"{name}: the sides have different samples: {len(ours)} and {len(theirs)}")
    for (key, *one), (_, *other) in zip(ours, theirs, strict=True):
        for what, a, b in zip(("moments", "embeddings"), one, other, strict=True):
            if np.abs(a - b).max() > ALLOWED * np.abs(b).max():
                raise SystemExit(f"{name}: {key}: the {what} differ by {np.abs(a - b).max():.3g}")


def compare(args, name, case, scratch):
    shards = scratch / "shards"
    shards.mkdir()
    for copy in range(case["copies"]):
        for source in sorted((ASSETS / "emoji").glob("*.tar")):
            shutil.copy(source, shards / f"{copy}-{source.name}")
    teacher = ASSETS / "teacher"
    if name == "sd15":
        teacher = scratch / "teacher"
        script = [sys.executable, REFERENCE / "make_pipeline.py", teacher, "sd15", "--dtype", "f16"]
        subprocess.run(list(map(str, script)), check=True)
    sides = {"coffey": [], "PyTorch": []}
    few, many = case["samples"]
    for turn in range(1, case["rounds"] + 1):
        made = {}
        for side, runs in sides.items():
            print(f"{name}: round {turn} of {case['rounds']}: {side}", file=sys.stderr)
            folder = scratch / f"{side}-{turn}"
            folder.mkdir()
            short, _ = run(args, side, case, few, teacher, shards, folder)
            long, made[side] = run(args, side, case, many, teacher, shards, folder)
            rate = (many - few) / (long["wall_seconds"] - short["wall_seconds"])
            runs.append({"samples_per_second": rate, "short": short, "long": long})
        # In a process of its own: Linux counts the parent's memory in the peak of a child until it starts its program.
        check = multiprocessing.get_context("spawn").Process(target=check_equal, args=(made["coffey"], made["PyTorch"], name))
        check.start()
        check.join()
        if check.exitcode != 0:
            raise SystemExit(f"{name}: no figures: the sides' latents differ or can't be read")
    report = {"case": case}
    for side, runs in sides.items():
        report[side] = {
            "samples_per_second": statistics.median(run["samples_per_second"] for run in runs),
            "peak_mib": max(run["long"]["peak_bytes"] for run in runs) / 2**20,
            "runs": runs,
        }
    keys = ("samples_per_second", "peak_mib")
    return report | {"coffey_over_pytorch": {key: report["coffey"][key] / report["PyTorch"][key] for key in keys}}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--case", action="append", choices=CASES, help="can be repeated; unset: both")
    parser.add_argument("--coffey", type=Path, default=Path("target/release/coffey"), help="the release binary")
    parser.add_argument("--rounds", type=int, help="runs of each side, instead of the case's")
    parser.add_argument("--threads", type=int, default=2, help="compute threads of each side")
    parser.add_argument("--scratch", type=Path, help="folder for models and shards (sd15: 4 GB)")
    parser.add_argument("--out", type=Path, help="JSON file for all figures")
    # The PyTorch process itself.
    parser.add_argument("--pytorch", action="store_true", help=argparse.SUPPRESS)
    for option, kind in {"teacher": Path, "shards": Path, "latents": Path, "samples": int, "pixels": int, "batch": int}.items():
        parser.add_argument(f"--{option}", type=kind, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.pytorch:
        pytorch_precompute(args)
        return
    report = {"machine": {"cpus": os.cpu_count(), "arch": platform.machine(), "load_at_start": os.getloadavg()[0]}, "cases": {}}
    print(f"{'':12}{'':16}{'samples/s':>12}{'peak MiB':>12}")
    for name in args.case or CASES:
        case = CASES[name] | ({"rounds": args.rounds} if args.rounds else {})
        with tempfile.TemporaryDirectory(dir=args.scratch) as scratch:
            made = report["cases"][name] = compare(args, name, case, Path(scratch))
        for side in ("coffey", "PyTorch", "coffey_over_pytorch"):
            rate, peak = (made[side][key] for key in ("samples_per_second", "peak_mib"))
            print(f"{name:12}{side.replace('_over_pytorch', '/PyTorch'):16}{rate:>12.2f}{peak:>12.2f}", flush=True)
    if args.out:
        args.out.write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
