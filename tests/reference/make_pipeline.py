"""Make a diffusers pipeline folder with random weights: real shapes without their download, odd shapes for tests.

    python make_pipeline.py OUT_DIR SHAPE [--dtype f32|f16|bf16] [--seed 1] [--encoders own|tiny] [--set KEY=VALUE ...]
    python make_pipeline.py --list

OUT_DIR becomes `unet`, `vae`, `text_encoder`, `tokenizer`, `scheduler` and `model_index.json`; of SDXL also
`text_encoder_2` and `tokenizer_2`, which pads with `!`. The tokenizers are the quickstart's, since a vocabulary can't be
random; text encoders have as many rows.

`--encoders tiny` keeps the UNet and the latents' size and makes the VAE and the text encoder as small as they can
be: for benchmarks in which encoding must cost nothing. `--set unet.layers_per_block=3` overrides one key of a
`config.json` (part `unet`, `vae`, `text_encoder`, `text_encoder_2` or `scheduler`; JSON, or a bare word as a string), or
of `model_index.json` (part `index`).

Modules are built without storage and filled one tensor at a time in the dtype they are saved in, with the spread of
PyTorch's own initialisation, norms a little off 1 and 0: SD-1.5 in f16 takes seconds and 3 GB of memory.
"""

import argparse
import json
import math
import shutil
import sys
from pathlib import Path

import torch
from diffusers import AutoencoderKL, DDPMScheduler, EulerDiscreteScheduler, UNet2DConditionModel
from safetensors.torch import save_file
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

TOKENIZER = Path(__file__).parents[2] / "assets" / "quickstart" / "teacher" / "tokenizer"
TOKENS = len(json.loads((TOKENIZER / "vocab.json").read_text()))
DTYPES = {"f32": torch.float32, "f16": torch.float16, "bf16": torch.bfloat16}

SCHEDULER = {
    "beta_schedule": "scaled_linear",
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "clip_sample": False,
    "steps_offset": 1,
    "timestep_spacing": "leading",
}


def levels(attention):
    """Block types of a UNet from its top level down, for the levels with attention."""
    down = ["CrossAttnDownBlock2D" if a else "DownBlock2D" for a in attention]
    up = ["CrossAttnUpBlock2D" if a else "UpBlock2D" for a in reversed(attention)]
    return {"down_block_types": down, "up_block_types": up}


def vae(channels, groups, layers, **more):
    count = len(channels)
    return {
        "block_out_channels": channels,
        "norm_num_groups": groups,
        "layers_per_block": layers,
        "latent_channels": 4,
        "down_block_types": ["DownEncoderBlock2D"] * count,
        "up_block_types": ["UpDecoderBlock2D"] * count,
        **more,
    }


def text(width, layers, heads, hidden, act="quick_gelu"):
    return {
        "hidden_size": width,
        "intermediate_size": hidden,
        "num_attention_heads": heads,
        "num_hidden_layers": layers,
        "hidden_act": act,
        "projection_dim": width,
        "max_position_embeddings": 77,
        "vocab_size": TOKENS,
        "bos_token_id": TOKENS - 2,
        "eos_token_id": TOKENS - 1,
        "pad_token_id": TOKENS - 1,
    }


SD_VAE = vae([128, 256, 512, 512], 32, 2, sample_size=512, scaling_factor=0.18215)
SD_UNET = {
    "block_out_channels": [320, 640, 1280, 1280],
    "layers_per_block": 2,
    "norm_num_groups": 32,
    "attention_head_dim": 8,
    "cross_attention_dim": 768,
    "sample_size": 64,
    **levels([True, True, True, False]),
}
ODD_UNET = {
    "block_out_channels": [32, 64],
    "layers_per_block": 2,
    "norm_num_groups": 16,
    "attention_head_dim": 4,
    "cross_attention_dim": 48,
    "sample_size": 16,
    **levels([True, True]),
}
THREE = {"block_out_channels": [32, 48, 64], **levels([True, True, True])}


def odd(unet=None, scheduler=None):
    """A tiny pipeline, 8 x 8 latents from 32 x 32 pixels, that differs in one thing."""
    return {
        "unet": ODD_UNET | (unet or {}),
        "vae": vae([8, 16, 16], 4, 1, sample_size=64, scaling_factor=0.7),
        "text_encoder": text(48, 2, 4, 96),
        "scheduler": SCHEDULER | (scheduler or {}),
    }


def xl(unet, text_encoder, text_encoder_2, vae_):
    """SDXL: two text encoders, size ids, and its own noise schedule's file."""
    second = text_encoder_2 | {"hidden_act": "gelu", "eos_token_id": 2}
    width = text_encoder["hidden_size"] + second["hidden_size"]
    ids = 6 * unet["addition_time_embed_dim"]
    added = {
        "addition_embed_type": "text_time",
        "projection_class_embeddings_input_dim": second["projection_dim"] + ids,
        "use_linear_projection": True,
        "cross_attention_dim": width,
    }
    return {
        "unet": unet | added,
        "vae": vae_,
        "text_encoder": text_encoder,
        "text_encoder_2": second,
        "scheduler": {k: v for k, v in SCHEDULER.items() if k != "clip_sample"},
        "index": {"force_zeros_for_empty_prompt": True},
    }


ODD_XL = {
    "block_out_channels": [16, 32, 48],
    "layers_per_block": 1,
    "norm_num_groups": 16,
    "attention_head_dim": [2, 4, 6],
    "transformer_layers_per_block": [1, 2, 3],
    "addition_time_embed_dim": 8,
    "sample_size": 16,
    **levels([False, True, True]),
}


def odd_xl(unet=None):
    """A tiny SDXL, 8 x 8 latents from 32 x 32 pixels."""
    first, second = text(24, 2, 4, 48), text(40, 3, 4, 80) | {"projection_dim": 20}
    return xl(ODD_XL | (unet or {}), first, second, vae([8, 16, 16], 4, 1, sample_size=64, scaling_factor=0.13025))


SHAPES = {
    "small": {
        "unet": ODD_UNET | {"block_out_channels": [64, 128], "norm_num_groups": 32, "attention_head_dim": 8}
        | {"cross_attention_dim": 64},
        "vae": vae([16, 32, 64], 8, 1, sample_size=64, scaling_factor=0.7),
        "text_encoder": text(64, 2, 4, 256),
        "scheduler": SCHEDULER,
    },
    "sd15": {
        "unet": SD_UNET,
        "vae": SD_VAE,
        "text_encoder": text(768, 12, 12, 3072),
        "scheduler": SCHEDULER,
    },
    "sd21": {
        "unet": SD_UNET
        | {"attention_head_dim": [5, 10, 20, 20], "cross_attention_dim": 1024, "use_linear_projection": True}
        | {"sample_size": 96},
        "vae": SD_VAE | {"sample_size": 768},
        "text_encoder": text(1024, 23, 16, 4096, act="gelu"),
        "scheduler": SCHEDULER | {"prediction_type": "v_prediction"},
    },
    "sdxl": xl(
        SD_UNET
        | {"block_out_channels": [320, 640, 1280], "attention_head_dim": [5, 10, 20], "sample_size": 128}
        | {"transformer_layers_per_block": [1, 2, 10], "addition_time_embed_dim": 256}
        | levels([False, True, True]),
        text(768, 12, 12, 3072),
        text(1280, 32, 20, 5120),
        SD_VAE | {"sample_size": 1024, "scaling_factor": 0.13025, "force_upcast": True},
    ),
    "xl": odd_xl(),
    "xl-attended-top": odd_xl(levels([True, True, True]) | {"transformer_layers_per_block": [3, 1, 2]}),
    "xl-guided": odd_xl({"time_cond_proj_dim": 32}),
    "two-levels": odd(),
    "one-level": odd({"block_out_channels": [32], **levels([True])}),
    "three-levels": odd(THREE),
    "four-levels": odd({"block_out_channels": [16, 32, 32, 48], **levels([True, True, True, False])}),
    "one-layer": odd({"layers_per_block": 1}),
    "three-layers": odd({"layers_per_block": 3}),
    "plain-top": odd(levels([False, True])),
    "plain-middle": odd(THREE | levels([True, False, True])),
    "plain-bottom": odd(levels([True, False])),
    "heads-list": odd(THREE | {"attention_head_dim": [2, 3, 8]}),
    "linear-projection": odd({"use_linear_projection": True}),
    "two-transformers": odd({"transformer_layers_per_block": 2}),
    "transformers-list": odd(THREE | {"transformer_layers_per_block": [1, 2, 3]}),
    "v-prediction": odd(scheduler={"prediction_type": "v_prediction"}),
    "sample": odd(scheduler={"prediction_type": "sample"}),
    "linear-betas": odd(scheduler={"beta_schedule": "linear", "beta_start": 0.0001, "beta_end": 0.02}),
    "cosine-betas": odd(scheduler={"beta_schedule": "squaredcos_cap_v2"}),
    "eps": odd({"norm_eps": 1e-6, "freq_shift": 1, "flip_sin_to_cos": False}),
    "guided": odd({"time_cond_proj_dim": 32}),
    "everything": odd(
        THREE
        | levels([False, True, True])
        | {"layers_per_block": 3, "use_linear_projection": True, "attention_head_dim": [2, 6, 4]}
        | {"transformer_layers_per_block": [1, 1, 2]},
        {"prediction_type": "v_prediction"},
    ),
}


def tiny_encoders(shape):
    """The same latents and embeddings' width from almost nothing."""
    levels_, of = len(shape["vae"]["block_out_channels"]), shape["vae"]
    small = vae([4] * levels_, 2, 1, sample_size=of["sample_size"], scaling_factor=of["scaling_factor"])
    width = shape["unet"]["cross_attention_dim"]
    if "text_encoder_2" in shape:
        raise SystemExit("--encoders tiny: for models with one text encoder")
    return shape | {"vae": small, "text_encoder": text(width, 1, 1, width)}


def override(shape, settings):
    for setting in settings:
        key, _, value = setting.partition("=")
        part, _, key = key.partition(".")
        if part not in shape or not key:
            raise SystemExit(f"--set {setting}: say PART.KEY=VALUE with a part of {', '.join(shape)}")
        try:
            value = json.loads(value)
        except json.JSONDecodeError:
            pass  # a bare word
        shape[part] = shape[part] | {key: value}
    return shape


def fill(name, like, fan_in, dtype, rng):
    """One tensor: norms about 1 and 0, tables as CLIP's, everything else as PyTorch's Linear and Conv2d."""
    tensor = torch.empty(like.shape, dtype=dtype)
    if "norm" in name:
        return tensor.normal_(1.0 if name.endswith("weight") else 0.0, 0.1, generator=rng)
    if "embedding.weight" in name:
        return tensor.normal_(0.0, 0.02, generator=rng)
    bound = 1 / math.sqrt(fan_in)
    return tensor.uniform_(-bound, bound, generator=rng)


def save(folder, model, stem, dtype, rng):
    """Random weights in the names and shapes of a model without storage."""
    shapes = model.state_dict()
    tensors = {}
    for name, like in shapes.items():
        weight = shapes.get(name.removesuffix("bias") + "weight", like)
        tensors[name] = fill(name, like, max(weight[0].numel(), 1), dtype, rng)
    save_file(tensors, folder / f"{stem}.safetensors", metadata={"format": "pt"})
    return sum(t.numel() for t in tensors.values())


def tokenizer_2(folder):
    """SDXL's second tokenizer: the same vocabulary, padded with `!`, which is a special token with the id 0."""
    shutil.copytree(TOKENIZER, folder)
    start, end = "<|startoftext|>", "<|endoftext|>"
    how = {"lstrip": False, "normalized": False, "rstrip": False, "single_word": False, "special": True}
    tokens = {0: "!", TOKENS - 2: start, TOKENS - 1: end}
    roles = {"bos_token": start, "eos_token": end, "pad_token": "!", "unk_token": end}
    config = {
        "added_tokens_decoder": {str(id): {"content": token, **how} for id, token in tokens.items()},
        "model_max_length": 77,
        "tokenizer_class": "CLIPTokenizer",
        **roles,
    }
    for name, content in (("tokenizer_config", config), ("special_tokens_map", roles)):
        (folder / f"{name}.json").write_text(json.dumps(content, indent=2) + "\n")


def text_encoder(folder, config, kind, dtype, rng):
    config = CLIPTextConfig(**config, architectures=[kind.__name__])
    with torch.device("meta"):
        model = kind(config)
    config.save_pretrained(folder)
    return save(folder, model, "model", dtype, rng)


def make(out, shape, dtype, seed):
    shutil.rmtree(out, ignore_errors=True)
    is_xl = "text_encoder_2" in shape
    for part in ("unet", "vae", "text_encoder", *(["text_encoder_2"] if is_xl else [])):
        (out / part).mkdir(parents=True)
    shutil.copytree(TOKENIZER, out / "tokenizer")
    rng = torch.Generator().manual_seed(seed)
    counts = {}
    for part, kind in (("unet", UNet2DConditionModel), ("vae", AutoencoderKL)):
        with torch.device("meta"):
            model = kind(**shape[part])
        model.save_config(out / part)
        counts[part] = save(out / part, model, "diffusion_pytorch_model", dtype, rng)
    counts["text_encoder"] = text_encoder(out / "text_encoder", shape["text_encoder"], CLIPTextModel, dtype, rng)
    scheduler = EulerDiscreteScheduler if is_xl else DDPMScheduler
    scheduler(**shape["scheduler"]).save_pretrained(out / "scheduler")
    index = {
        "_class_name": "StableDiffusionPipeline",
        "feature_extractor": [None, None],
        "scheduler": ["diffusers", scheduler.__name__],
        "text_encoder": ["transformers", "CLIPTextModel"],
        "tokenizer": ["transformers", "CLIPTokenizer"],
        "unet": ["diffusers", "UNet2DConditionModel"],
        "vae": ["diffusers", "AutoencoderKL"],
    }
    if is_xl:
        kind = CLIPTextModelWithProjection
        counts["text_encoder_2"] = text_encoder(out / "text_encoder_2", shape["text_encoder_2"], kind, dtype, rng)
        tokenizer_2(out / "tokenizer_2")
        index |= {
            "_class_name": "StableDiffusionXLPipeline",
            "image_encoder": [None, None],
            "text_encoder_2": ["transformers", kind.__name__],
            "tokenizer_2": ["transformers", "CLIPTokenizer"],
            **shape["index"],
        }
    else:
        index |= {"requires_safety_checker": False, "safety_checker": [None, None]}
    (out / "model_index.json").write_text(json.dumps(index, indent=2) + "\n")
    return counts


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, nargs="?")
    parser.add_argument("shape", choices=SHAPES, nargs="?")
    parser.add_argument("--dtype", choices=DTYPES, default="f32", help="that the weights are saved in")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--encoders", choices=("own", "tiny"), default="own")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="of a config.json")
    parser.add_argument("--list", action="store_true", help="the shapes, and nothing else")
    args = parser.parse_args()
    if args.list:
        print("\n".join(SHAPES))
        return
    if args.shape is None:
        parser.error("say where to and which shape, or --list")
    shape = SHAPES[args.shape]
    if args.encoders == "tiny":
        shape = tiny_encoders(shape)
    counts = make(args.out, override(dict(shape), args.set), DTYPES[args.dtype], args.seed)
    print(", ".join(f"{part} {count / 1e6:.2f} M" for part, count in counts.items()), file=sys.stderr)


if __name__ == "__main__":
    main()
