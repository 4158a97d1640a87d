"""Reads latent shards as a user would, with webdataset and numpy, and compares them with diffusers.

    python read_latents.py LATENTS_DIR [--images SHARD.tar... --pipeline DIR [--limit N]]

Every shard of the folder is read with `webdataset`; shapes, types and counts must be those of the manifest. With
--images, moments and embeddings are also computed anew by diffusers and transformers from the same image shards
(composited on white, shorter side resized as Pillow does it, cropped where the json says) and must be equal up to
f16 rounding; without torch, diffusers and transformers that part is left out, and said to be.
"""

import argparse
import glob
import hashlib
import io
import json
import os
import sys

import numpy as np
import webdataset as wds

# f16 keeps 11 bits; the rest is for sums in another order, which the largest values of an array decide.
RELATIVE = 2.0**-10
OF_LARGEST = 1e-3


def read_manifest(folder):
    manifest = None
    for path in sorted(glob.glob(os.path.join(folder, "manifest*.json"))):
        with open(path) as file:
            part = json.load(file)
        if manifest is None:
            manifest = part
        else:
            manifest["shards"].update(part["shards"])
    assert manifest is not None, f"{folder}: no manifest"
    assert manifest["format_version"] == 1
    return manifest


def read_shard(path, manifest):
    """The samples of one shard, checked against the manifest."""
    latent_shape = tuple(manifest["latent"]["shape"])
    if manifest["image"]["crops"] > 1:
        latent_shape = (manifest["image"]["crops"], *latent_shape)
    text_shape = manifest["prompt_embeds_shape"]
    samples = []
    for sample in wds.WebDataset(path, shardshuffle=False, empty_check=False):
        latent = np.load(io.BytesIO(sample["latent.npy"]))
        assert latent.dtype == np.float16 and latent.shape == latent_shape, (latent.dtype, latent.shape)
        assert np.isfinite(latent).all()
        assert ("prompt_embeds.npy" in sample) == (text_shape is not None)
        embeds = None
        if text_shape is not None:
            embeds = np.load(io.BytesIO(sample["prompt_embeds.npy"]))
            assert embeds.dtype == np.float16 and embeds.shape == tuple(text_shape)
            assert np.isfinite(embeds).all()
        crop = json.loads(sample["json"])["coffey"]
        assert crop["target_width"] == manifest["image"]["resolution"]
        samples.append((sample["__key__"], latent, embeds, sample["txt"].decode(), crop))
    return samples


def windows(crop):
    """(left, top, flipped) of every crop."""
    places = [crop["crop_left"], crop["crop_top"], crop["flipped"]]
    return list(zip(*places, strict=True)) if isinstance(places[0], list) else [tuple(places)]


def prepare(image_bytes, crop):
    """An encoded image to the pixels of its crops, [N, 3, R, R] in [-1, 1], by Pillow alone."""
    from PIL import Image

    image = Image.open(io.BytesIO(image_bytes))
    if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, (255, 255, 255, 255))
        image = Image.alpha_composite(white, image)
    image = image.convert("RGB")
    assert image.size == (crop["original_width"], crop["original_height"])
    size = (crop["resized_width"], crop["resized_height"])
    if image.size != size:
        image = image.resize(size, Image.Resampling.BILINEAR)
    side = crop["target_width"]
    crops = []
    for left, top, flipped in windows(crop):
        pixels = np.asarray(image.crop((left, top, left + side, top + side)), dtype=np.float32)
        crops.append((pixels[:, ::-1] if flipped else pixels).transpose(2, 0, 1))
    return (np.stack(crops) / np.float32(255.0) - np.float32(0.5)) / np.float32(0.5)


def compare(what, key, ours, theirs):
    ours = ours.astype(np.float32)
    allowed = RELATIVE * np.abs(theirs) + OF_LARGEST * np.abs(theirs).max()
    worst = np.abs(ours - theirs).max()
    assert (np.abs(ours - theirs) <= allowed).all(), f"{key}: {what} differ by {worst}"
    return worst


def compare_with_diffusers(samples, images, pipeline, limit):
    import torch
    from diffusers import AutoencoderKL
    from transformers import CLIPTextModel, CLIPTokenizer

    vae = AutoencoderKL.from_pretrained(pipeline, subfolder="vae", torch_dtype=torch.float32)
    text_encoder = CLIPTextModel.from_pretrained(os.path.join(pipeline, "text_encoder"), dtype=torch.float32)
    tokenizer = CLIPTokenizer.from_pretrained(os.path.join(pipeline, "tokenizer"))
    by_key = {sample[0]: sample for sample in samples}
    compared, worst = 0, [0.0, 0.0]
    for source in wds.WebDataset(images, shardshuffle=False):
        if source["__key__"] not in by_key:
            continue
        key, latent, embeds, caption, crop = by_key[source["__key__"]]
        encoded = next(source[ext] for ext in ("jpg", "png", "jpeg", "webp") if ext in source)
        assert source["txt"].decode() == caption, key
        with torch.no_grad():
            pixels = torch.from_numpy(np.ascontiguousarray(prepare(encoded, crop)))
            moments = vae.encode(pixels).latent_dist.parameters.numpy().reshape(latent.shape)
            ids = tokenizer(
                caption, padding="max_length", max_length=tokenizer.model_max_length, truncation=True, return_tensors="pt"
            ).input_ids
            text = text_encoder(ids)[0][0].numpy()
        worst[0] = max(worst[0], compare("moments", key, latent, moments))
        if embeds is not None:
            worst[1] = max(worst[1], compare("prompt_embeds", key, embeds, text))
        compared += 1
        if compared == limit:
            break
    assert compared > 0, "no sample in common with the image shards"
    print(f"compared {compared} samples with diffusers: moments within {worst[0]:.2g}, prompt_embeds {worst[1]:.2g}")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("latents")
    parser.add_argument("--images", nargs="+")
    parser.add_argument("--pipeline")
    parser.add_argument("--limit", type=int, default=32)
    args = parser.parse_args()

    manifest = read_manifest(args.latents)
    samples = []
    for name, entry in manifest["shards"].items():
        path = os.path.join(args.latents, name)
        with open(path, "rb") as file:
            content = file.read()
        assert len(content) == entry["bytes"], name
        assert hashlib.sha256(content).hexdigest() == entry["sha256"], name
        shard = read_shard(path, manifest)
        assert len(shard) == entry["samples"], (name, len(shard), entry["samples"])
        samples += shard
    print(f"read {len(samples)} samples of {len(manifest['shards'])} shards with webdataset {wds.__version__}")
    if args.images is None:
        return
    try:
        import diffusers  # noqa: F401
        import torch  # noqa: F401
        import transformers  # noqa: F401
    except ImportError as error:
        print(f"not compared with diffusers: {error}", file=sys.stderr)
        return
    compare_with_diffusers(samples, args.images, args.pipeline, args.limit)


if __name__ == "__main__":
    main()
