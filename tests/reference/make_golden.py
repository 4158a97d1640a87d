"""Make the golden files of the unit tests: tiny models with random weights and what PyTorch makes of them.

    python make_golden.py OUT_DIR [--tokenizer DIR]

    OUT_DIR/unet-two-levels/    cross-attention at both levels, time_cond_proj_dim, heads as one number
    OUT_DIR/unet-three-levels/  the last level without attention, linear projections, heads as a list
    OUT_DIR/unet-odd-latents/   lists wherever a list may stand, scale and shift, asymmetric padding, latents of 7 x 10
    OUT_DIR/unet-no-middle/     three layers a block, heads that do not divide the channels, all of the time embedding
    OUT_DIR/unet-text-time/     as SDXL's: pooled text and size ids, 1, 2 and 3 transformer layers, linear projections
    OUT_DIR/unet-one-level/     text in both attentions, a scaled middle block, not square, batch 1
        config.json, diffusion_pytorch_model.safetensors
        forward.safetensors     sample, timestep, encoder_hidden_states, (timestep_cond, text_embeds, time_ids), output, output_grad, and
                                grad.NAME: the gradient of sum(output * output_grad) by the parameter NAME
    OUT_DIR/vae/                forward.safetensors: pixels, moments; latents, decoded
    OUT_DIR/vae-bare/           the same without the convolutions around the latents, without attention, with mish
    OUT_DIR/text_encoder/       forward.safetensors: input_ids, last_hidden_state (quick_gelu),
                                last_hidden_state.gelu (the same weights with hidden_act = "gelu")
    OUT_DIR/text_encoder_2/     the same with a projection: input_ids, hidden_states (the last but one), text_embeds
                                (eos_token_id 99), text_embeds.2 (eos_token_id 2), text_embeds.98 (another id)
    OUT_DIR/tokenizer.json      [[caption, [77 ids]], ...] with the vocabulary of --tokenizer
    OUT_DIR/special_tokens.json [{"tokenizer_config": ..., "special_tokens_map": ... or null,
                                "ids": [[caption, [77 ids]], ...]}, ...] with the same vocabulary
    OUT_DIR/full_size.json      {model: {"config": config.json of its UNet, "tensors", "parameters", "sha256"}}: the models of full size
                                of make_pipeline.py; the hash is over a line for each tensor in name order: its name, a space, its
                                shape joined by commas
    OUT_DIR/diffusion.json      schedules, solver, embeddings, scalings, samplers, learning rates

Weights are stored in f16 and rounded to f16 before they are used; all arithmetic is f32. Seeded: the same versions
make the same files, up to the last bits of a sum.
"""

import argparse
import hashlib
import json
import shutil
import tempfile
from pathlib import Path

import torch
from diffusers import AutoencoderKL, DDIMScheduler, DDPMScheduler, LCMScheduler, TCDScheduler, UNet2DConditionModel
from diffusers.optimization import get_scheduler
from safetensors.torch import save_file
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from make_pipeline import SHAPES
from lcm_reference import (
    DDIMSolver,
    get_predicted_noise,
    get_predicted_original_sample,
    guidance_scale_embedding,
    scalings_for_boundary_conditions,
)

GRADIENTS = (
    "conv_in.weight",
    "time_embedding.cond_proj.weight",
    "time_embedding.linear_1.weight",
    "add_embedding.linear_1.weight",
    "add_embedding.linear_2.bias",
    "down_blocks.0.attentions.0.norm.weight",
    "down_blocks.0.attentions.0.transformer_blocks.0.norm2.weight",
    "down_blocks.0.downsamplers.0.conv.bias",
    "mid_block.attentions.0.transformer_blocks.0.attn1.to_q.weight",
    "mid_block.attentions.0.transformer_blocks.0.attn2.to_k.weight",
    "mid_block.attentions.0.transformer_blocks.0.ff.net.0.proj.bias",
    "up_blocks.0.upsamplers.0.conv.bias",
    "up_blocks.LAST.resnets.LAST.norm1.weight",
    "conv_out.bias",
)

CAPTIONS = [
    "",
    " ",
    "red apple",
    "Red Apple",
    "GRINNING FACE",
    "grinning face with smiling eyes",
    "a photo of a cat",
    "slice of pizza",
    "it's a dog",
    "IT'S A DOG",
    "they're here, we've won, I'm in, she'd go, you'll see, don't",
    "the cats' house",
    "it\u2019s a curly apostrophe",
    "rock 'n' roll",
    "version 2.0 of 1234567890",
    "4k, 8k & 16:9",
    "100% cotton $5.99 #1 @home",
    "double  space   and    more",
    "  leading and trailing  ",
    "tab\there",
    "line\nbreak\r\nwindows",
    "no-break\u00a0space and \u3000ideographic",
    "zero\u200bwidth and \ufeffbom",
    "control \x00\x07\x7f characters",
    "caf\u00e9",
    "cafe\u0301",
    "CAF\u00c9 \u00c5NGSTR\u00d6M \u00d1and\u00fa",
    "\u212b \ufb01ligature \u00bd \u00b2",
    "stra\u00dfe \u0130stanbul \u0131",
    "na\u00efve fa\u00e7ade",
    "\u0395\u03bb\u03bb\u03b7\u03bd\u03b9\u03ba\u03ac \u03a3\u039f\u03a6\u039f\u03a3",
    "\u043a\u0440\u0430\u0441\u043d\u043e\u0435 \u042f\u0411\u041b\u041e\u041a\u041e",
    "\u0627\u0644\u0639\u0631\u0628\u064a\u0629 \u0661\u0662\u0663",
    "\u05e2\u05d1\u05e8\u05d9\u05ea",
    "\u0939\u093f\u0928\u094d\u0926\u0940",
    "\ud55c\uad6d\uc5b4",
    "\u65e5\u672c\u8a9e\u306e\u30c6\u30ad\u30b9\u30c8",
    "red\u82f9\u679capple",
    "\u82f9\u679c\uff0c\u7ea2\u8272\u3002",
    "\uff26\uff35\uff2c\uff2c width",
    "\U0001f34e",
    "red apple \U0001f34e\U0001f600",
    "family \U0001f468\u200d\U0001f469\u200d\U0001f467",
    "thumbs up \U0001f44d\U0001f3fd",
    "flag \U0001f1e9\U0001f1ea",
    "heart \u2764\ufe0f",
    "fish &amp; chips",
    "&lt;b&gt;bold&lt;/b&gt; &quot;q&quot; &#39;s",
    "<b>html</b>",
    "mojibake caf\u00c3\u00a9",
    "snake_case and CamelCase",
    "e-mail: someone@example.org",
    "https://example.org/a?b=c&d=e#f",
    "!!!???...",
    "\u201cquoted\u201d \u2014 dash \u2026",
    "(parenthesised [text] {here})",
    "back\\slash and / and |",
    "<|startoftext|>red apple<|endoftext|>",
    "before <|endoftext|> after",
    "C3PO and R2-D2",
    "\u00bc cup of x\u00b2 + y\u2082",
    "a",
    "zyzzyva qwxzj",
    "apple " * 30,
    "face " * 74,
    "face " * 75,
    "face " * 76,
    "supercalifragilisticexpialidocious" * 8,
    " \t\n\r\x0b\x0c \u00a0\u2003\u3000 ",
    "\x00",
    "nul\x00inside and \x1b[31mescape\x1b[0m \x85 \x9f",
    "\u0651\u064b\u0651 leading marks",
    "z\u0351\u036b\u0343\u036a\u0302\u036ba\u0328\u0301lgo e\u0301\u0323 \u0041\u030a",
    "\u1100\u1161\u11a8 \uac01",
    "\u05e9\u05c1\u05b8\u05dc\u05d5\u05b9\u05dd \u202eright to left\u202c \u200f\u200e",
    "\u0645\u0631\u062d\u0628\u0627\u060c \u0639\u0627\u0644\u0645",
    "\U0001f3f4\U000e0067\U000e0062\U000e0073\U000e0063\U000e0074\U000e007f \U0001f9d1\U0001f3ff\u200d\U0001f680",
    "\U0001f468\u200d\u2764\ufe0f\u200d\U0001f48b\u200d\U0001f468" * 6,
    "1\ufe0f\u20e3 \u00a9\ufe0f",
    "\u4e2d\u6587\uff1a\u300c\u5f15\u53f7\u300d\u3002" * 30,
    "\U00020000\U0002a6d6 \U0001d54f",
    "\ufffd \ufffe \uffff \U0010ffff",
    "\u01c5 \u1e9e \u0130 \u03f4 \ua64a",
    "\u0e2a\u0e27\u0e31\u0e2a\u0e14\u0e35 \u0f0b\u0f56\u0f7c\u0f51",
    "<|endoftext|>" * 80,
    "<|END" + "OFTEXT|> <|endoftext |> <| endoftext|>",
    "a<|startoftext|>b <|endoftext|>! c!!",
    "'S 'LL ' s can''t",
    "\u0663\u0969\uff13 \u2163 \u00b3",
    "x" * 5000,
    "red apple " * 2000,
    "a\u0301" * 100,
]


def token(content, **how):
    return {"content": content, "single_word": False, "lstrip": False, "rstrip": False, "normalized": True, **how}


SPECIAL_TOKENS = [  # tokenizer_config.json, special_tokens_map.json
    (  # as Stable Diffusion 1.5 has them
        {
            "bos_token": {"__type": "AddedToken", **token("<|startoftext|>")},
            "eos_token": {"__type": "AddedToken", **token("<|endoftext|>")},
            "unk_token": {"__type": "AddedToken", **token("<|endoftext|>")},
            "pad_token": "<|endoftext|>",
        },
        {
            "bos_token": token("<|startoftext|>"),
            "eos_token": token("<|endoftext|>"),
            "unk_token": token("<|endoftext|>"),
            "pad_token": "<|endoftext|>",
        },
    ),
    (  # as 2.1: padded with 0, and so is every exclamation mark
        {"pad_token": "<|endoftext|>"},
        {
            "bos_token": token("<|startoftext|>"),
            "eos_token": token("<|endoftext|>"),
            "unk_token": token("<|endoftext|>"),
            "pad_token": "!",
        },
    ),
    (
        {
            "pad_token": "!",
            "eos_token": "<|endoftext|>",
            "added_tokens_decoder": {
                "0": token("!", normalized=False, lstrip=True, rstrip=True, special=True),
                "1769": token("<|endoftext|>", special=True),
            },
        },
        {"pad_token": "<|endoftext|>"},
    ),
    ({"eos_token": "<|endoftext|>", "unk_token": {"__type": "AddedToken", **token("<|endoftext|>")}}, None),
    ({"pad_token": {"__type": "AddedToken", **token("<|endoftext|>", single_word=True)}}, None),
]
SPECIAL_CAPTIONS = [
    "",
    "red apple",
    "red! apple !! 8!9",
    "  spaces  !  around ! ",
    "x <|STARTOFTEXT|> y<|EndOfText|>z",
    "x <|startoftext|> y<|endoftext|>z <|endoftext|> w",
    "\u0130<|endoftext|>!",
    "apple " * 80,
]


def f16_values(model):
    """Fresh weights, rounded so that storing them in f16 loses nothing; biases and norms away from 0 and 1."""
    with torch.no_grad():
        for name, p in model.named_parameters():
            if p.ndim == 1:
                p.add_(0.2 * torch.randn_like(p))
            elif "to_q" in name or "to_k" in name:
                p.mul_(4)  # else every token would get about the same attention
            p.copy_(p.half().float())
    return model.eval()


def save(model, folder, tensors):
    """Weights in f16 and the tensors of one forward pass."""
    folder.mkdir()
    save_file({k: v.detach().contiguous().clone() for k, v in tensors.items()}, folder / "forward.safetensors")
    model.half().save_pretrained(folder)  # last: this would halve the gradients too


def added_conditions(inputs):
    """SDXL's inputs, with ids whose sinusoids diffusers computes in f32 also where the network is f64."""
    if "time_ids" not in inputs:
        return None
    return {name: inputs[name] for name in ("text_embeds", "time_ids")}


def unet(folder, sample_shape, tokens, timesteps, **config):
    torch.manual_seed(1)
    model = f16_values(UNet2DConditionModel(in_channels=4, out_channels=4, **{"sample_size": 8, **config}))
    batch, width = len(timesteps), config["cross_attention_dim"]
    inputs = {
        "sample": torch.randn(batch, 4, *sample_shape),
        "timestep": torch.tensor(timesteps),
        "encoder_hidden_states": torch.randn(batch, tokens, width if isinstance(width, int) else width[0]),
    }
    if config.get("time_cond_proj_dim"):
        inputs["timestep_cond"] = guidance_scale_embedding(torch.linspace(2, 9, batch), config["time_cond_proj_dim"])
    if config.get("addition_embed_type"):
        pooled = config["projection_class_embeddings_input_dim"] - 6 * config["addition_time_embed_dim"]
        inputs["text_embeds"] = torch.randn(batch, pooled)
        inputs["time_ids"] = torch.randint(0, 4096, (batch, 6)).float()
    # In f64: where a gradient nearly cancels, PyTorch's own f32 is as far from it as ours may be.
    model.double()
    exact = {name: x.double() if x.is_floating_point() else x for name, x in inputs.items()}
    output = model(
        exact["sample"],
        exact["timestep"],
        exact["encoder_hidden_states"],
        timestep_cond=exact.get("timestep_cond"),
        added_cond_kwargs=added_conditions(exact),
    ).sample
    output_grad = torch.randn(output.shape)
    (output * output_grad).sum().backward()
    last = f"up_blocks.{len(model.up_blocks) - 1}.resnets.{len(model.up_blocks[-1].resnets) - 1}."
    parameters = dict(model.named_parameters())
    names = [name.replace("up_blocks.LAST.resnets.LAST.", last) for name in GRADIENTS]
    gradients = {f"grad.{name}": parameters[name].grad for name in names if name in parameters}
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in model.parameters())
    made = {"output": output, "output_grad": output_grad, **gradients}
    save(model, folder, {**inputs, **{name: x.float() for name, x in made.items()}})


@torch.no_grad()
def vae(folder, levels, **config):
    torch.manual_seed(2)
    model = f16_values(
        AutoencoderKL(
            down_block_types=("DownEncoderBlock2D",) * levels,
            up_block_types=("UpDecoderBlock2D",) * levels,
            latent_channels=4,
            norm_num_groups=4,
            sample_size=32,
            scaling_factor=0.7,
            **config,
        )
    )
    pixels, latents = torch.rand(2, 3, 16, 24) * 2 - 1, torch.randn(2, 4, 4, 6)
    moments = model.encode(pixels).latent_dist.parameters
    decoded = model.decode(latents).sample
    save(model, folder, {"pixels": pixels, "moments": moments, "latents": latents, "decoded": decoded})


@torch.no_grad()
def text_encoder(folder):
    torch.manual_seed(3)
    config = dict(
        vocab_size=100,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=77,
        projection_dim=32,
        bos_token_id=98,
        eos_token_id=99,
        pad_token_id=99,
    )
    model = CLIPTextModel(CLIPTextConfig(**config, hidden_act="quick_gelu"))
    for p in model.parameters():  # the published initialisation is too small to show a wrong layer
        if p.ndim == 2:
            p.data.normal_(std=0.3)
    f16_values(model)
    gelu = CLIPTextModel(CLIPTextConfig(**config, hidden_act="gelu")).eval()
    gelu.load_state_dict(model.state_dict())
    ids = torch.full((3, 77), 99)
    ids[:, 0] = 98
    ids[1, 1:9] = torch.randint(0, 98, (8,))
    ids[2, 1:76] = torch.randint(0, 98, (75,))
    states = {"last_hidden_state": model(ids)[0], "last_hidden_state.gelu": gelu(ids)[0]}
    save(model, folder, {"input_ids": ids, **states})


@torch.no_grad()
def text_encoder_with_projection(folder):
    torch.manual_seed(4)
    config = dict(
        vocab_size=100,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=3,
        num_attention_heads=4,
        max_position_embeddings=77,
        projection_dim=24,
        bos_token_id=98,
        hidden_act="gelu",
    )
    model = CLIPTextModelWithProjection(CLIPTextConfig(**config, eos_token_id=99, pad_token_id=0))
    for p in model.parameters():
        if p.ndim == 2:
            p.data.normal_(std=0.3)
    f16_values(model)
    ids = torch.zeros((4, 77), dtype=torch.long)
    ids[:, 0] = 98
    for row, count in enumerate((0, 8, 40, 75)):
        ids[row, 1 : 1 + count] = torch.randint(1, 97, (count,))
        ids[row, 1 + count] = 99
    ids[2, 30] = 97
    ids[3, 77 - 1] = 99
    ids[1, 20:] = 99  # padded with the end's own id: the first counts
    made = {"hidden_states": model(ids, output_hidden_states=True).hidden_states[-2]}
    for key, end in (("text_embeds", 99), ("text_embeds.2", 2), ("text_embeds.98", 98)):
        other = CLIPTextModelWithProjection(CLIPTextConfig(**config, eos_token_id=end, pad_token_id=0)).eval()
        other.load_state_dict(model.state_dict())
        made[key] = other(ids).text_embeds
    save(model, folder, {"input_ids": ids, **made})


def token_ids(folder, captions):
    clip = CLIPTokenizer.from_pretrained(folder)
    assert clip.model_max_length == 77
    arguments = {"padding": "max_length", "max_length": 77, "truncation": True}
    return [[caption, clip(caption, **arguments).input_ids] for caption in captions]


def tokenizer(path, folder):
    lines = [json.dumps(pair) for pair in token_ids(folder, CAPTIONS)]
    path.write_text("[\n" + ",\n".join(lines) + "\n]\n", encoding="ascii")


def special_tokens(path, vocabulary):
    lines = []
    for config, special in SPECIAL_TOKENS:
        with tempfile.TemporaryDirectory() as folder:
            for name in ("vocab.json", "merges.txt"):
                shutil.copy(vocabulary / name, folder)
            config = {"tokenizer_class": "CLIPTokenizer", "model_max_length": 77, **config}
            (Path(folder) / "tokenizer_config.json").write_text(json.dumps(config))
            if special:
                (Path(folder) / "special_tokens_map.json").write_text(json.dumps(special))
            ids = token_ids(folder, SPECIAL_CAPTIONS)
        lines.append(json.dumps({"tokenizer_config": config, "special_tokens_map": special, "ids": ids}))
    path.write_text("[\n" + ",\n".join(lines) + "\n]\n", encoding="ascii")


def diffusion():
    """Everything of the noise schedule and the samplers, as numbers. `t` are timesteps, rows are samples."""
    noise = DDPMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False, steps_offset=1
    )
    alphas_cumprod = noise.alphas_cumprod
    made = {"alphas_cumprod": {str(t): alphas_cumprod[t].item() for t in (0, 1, 19, 499, 979, 998, 999)}}
    for name, config in (
        ("linear", dict(beta_schedule="linear", beta_start=0.0001, beta_end=0.02)),
        ("squaredcos_cap_v2", dict(beta_schedule="squaredcos_cap_v2")),
        ("laplace", dict(beta_schedule="laplace")),
        ("sigmoid", dict(beta_schedule="sigmoid", beta_start=0.0002, beta_end=0.03)),
        ("trained_betas", dict(trained_betas=[i * i * 2e-8 for i in range(1, 1001)])),
        ("rescaled_zero_snr", dict(noise.config, rescale_betas_zero_snr=True)),
        ("rescaled_linear", dict(beta_schedule="linear", beta_start=0.0001, rescale_betas_zero_snr=True)),
    ):
        other = DDPMScheduler(**{k: v for k, v in config.items() if not k.startswith("_")}).alphas_cumprod
        made[f"alphas_cumprod.{name}"] = {str(t): other[t].item() for t in (0, 1, 499, 998, 999)}

    torch.manual_seed(4)
    t = torch.tensor([0, 19, 499, 999])
    sample, output, fresh = torch.randn(4, 8), torch.randn(4, 8), torch.randn(4, 8)
    alphas, sigmas = alphas_cumprod.sqrt(), (1 - alphas_cumprod).sqrt()
    made["add_noise"] = {
        "t": t.tolist(),
        "latents": sample.tolist(),
        "noise": fresh.tolist(),
        "noisy": noise.add_noise(sample, fresh, t).tolist(),
    }
    made["predicted"] = {"t": t.tolist(), "sample": sample.tolist(), "output": output.tolist()}
    for kind in ("epsilon", "sample", "v_prediction"):
        args = output, t, sample, kind, alphas, sigmas
        made["predicted"][kind] = {
            "original": get_predicted_original_sample(*args).tolist(),
            "noise": get_predicted_noise(*args).tolist(),
        }

    made["ddim_solver"] = {}
    for steps in (50, 13):  # 13 does not divide 1000
        solver = DDIMSolver(alphas_cumprod.numpy(), timesteps=1000, ddim_timesteps=steps)
        index = torch.tensor([0, 1, steps // 2, steps - 1])
        made["ddim_solver"][str(steps)] = {
            "timesteps": solver.ddim_timesteps.tolist(),
            "alphas_cumprod_prev": solver.ddim_alpha_cumprods_prev.tolist(),
            "index": index.tolist(),
            "pred_x0": sample.tolist(),
            "pred_noise": output.tolist(),
            "x_prev": solver.ddim_step(sample, output, index).tolist(),
        }

    w = torch.tensor([2.0, 7.5])
    made["guidance_scale_embedding"] = {
        "w": w.tolist(),
        **{str(dim): guidance_scale_embedding(w, dim).tolist() for dim in (8, 9, 64)},
    }
    t = torch.tensor([0, 1, 19, 259, 499, 999])
    c_skip, c_out = scalings_for_boundary_conditions(t, timestep_scaling=10.0)
    made["boundary_scalings"] = {"t": t.tolist(), "c_skip": c_skip.tolist(), "c_out": c_out.tolist()}

    made["lcm"] = {"timesteps": {}}
    for steps in (1, 2, 3, 4, 8, 50):
        lcm = LCMScheduler.from_config(noise.config)
        lcm.set_timesteps(steps, original_inference_steps=50)
        made["lcm"]["timesteps"][str(steps)] = lcm.timesteps.tolist()
    start, outputs = torch.randn(8), torch.randn(4, 8)
    for kind in ("epsilon", "v_prediction"):
        lcm = LCMScheduler.from_config(noise.config, prediction_type=kind)
        lcm.set_timesteps(4, original_inference_steps=50)
        now, rows = start, []
        drawn, recorded = torch.Generator().manual_seed(5), torch.Generator().manual_seed(5)
        for step, at in enumerate(lcm.timesteps):
            now, denoised = lcm.step(outputs[step], at, now, generator=drawn, return_dict=False)
            row = {"t": at.item(), "output": outputs[step].tolist(), "denoised": denoised.tolist()}
            if step < 3:  # the last step adds none
                row["noise"] = torch.randn(8, generator=recorded).tolist()
            rows.append({**row, "prev": now.tolist()})
        made["lcm"][kind] = {"start": start.tolist(), "steps": rows}

    made["tcd"] = {}
    tcd_outputs = torch.randn(4, 8, generator=torch.Generator().manual_seed(7))
    for kind in ("epsilon", "v_prediction"):
        for gamma in (0.0, 0.3, 1.0):
            tcd = TCDScheduler.from_config(noise.config, prediction_type=kind, original_inference_steps=50)
            tcd.set_timesteps(4)
            now, rows = start, []
            drawn, recorded = torch.Generator().manual_seed(6), torch.Generator().manual_seed(6)
            for step, at in enumerate(tcd.timesteps):
                now = tcd.step(tcd_outputs[step], at, now, eta=gamma, generator=drawn).prev_sample
                row = {"t": at.item(), "output": tcd_outputs[step].tolist()}
                if step < 3 and gamma > 0:
                    row["noise"] = torch.randn(8, generator=recorded).tolist()
                rows.append({**row, "prev": now.tolist()})
            made["tcd"][f"{kind}.{gamma}"] = {"start": start.tolist(), "steps": rows}

    made["ddim_trailing"] = {"timesteps": {}}
    for steps in (1, 2, 4, 8, 50):
        ddim = DDIMScheduler.from_config(noise.config, timestep_spacing="trailing")
        ddim.set_timesteps(steps)
        made["ddim_trailing"]["timesteps"][str(steps)] = ddim.timesteps.tolist()
    for kind in ("epsilon", "v_prediction"):
        for to_one in (True, False):  # whether the last step goes to alpha = 1 or to the schedule's first alpha
            ddim = DDIMScheduler.from_config(
                noise.config, timestep_spacing="trailing", prediction_type=kind, set_alpha_to_one=to_one
            )
            ddim.set_timesteps(4)
            now, rows = start, []
            for step, at in enumerate(ddim.timesteps):
                now = ddim.step(outputs[step], at, now).prev_sample
                rows.append({"t": at.item(), "output": outputs[step].tolist(), "prev": now.tolist()})
            made["ddim_trailing"][f"{kind}.{'alpha_one' if to_one else 'first_alpha'}"] = {
                "start": start.tolist(),
                "steps": rows,
            }

    made["learning_rates"] = {"learning_rate": 1e-3, "warmup_steps": 3, "max_steps": 12}
    kinds = ("constant", "constant_with_warmup", "linear", "cosine", "cosine_with_restarts", "polynomial")
    for kind in kinds:
        optimizer = torch.optim.AdamW([torch.zeros(1, requires_grad=True)], lr=1e-3)
        schedule = get_scheduler(kind, optimizer, num_warmup_steps=3, num_training_steps=12)
        rates = []
        for _ in range(14):
            rates.append(schedule.get_last_lr()[0])
            optimizer.step()
            schedule.step()
        made["learning_rates"][kind] = rates  # the rate step 1, 2, ... is made with
    return made


def full_size(names=("sd15", "sd21", "sdxl")):
    """The tensors of UNets of full size, built without storage."""
    made = {}
    for name in names:
        with torch.device("meta"):
            model = UNet2DConditionModel(**SHAPES[name]["unet"])
        shapes = {key: tensor.shape for key, tensor in sorted(model.state_dict().items())}
        lines = [f"{key} {','.join(map(str, shape))}\n" for key, shape in shapes.items()]
        made[name] = {
            "config": json.loads(model.to_json_string()),
            "tensors": len(shapes),
            "parameters": sum(shape.numel() for shape in shapes.values()),
            "sha256": hashlib.sha256("".join(lines).encode()).hexdigest(),
        }
    return made


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    default = Path(__file__).parents[2] / "assets" / "quickstart" / "teacher" / "tokenizer"
    parser.add_argument("--tokenizer", type=Path, default=default)
    args = parser.parse_args()
    shutil.rmtree(args.out, ignore_errors=True)
    args.out.mkdir(parents=True)

    unet(
        args.out / "unet-two-levels",
        sample_shape=(8, 8),
        tokens=77,
        timesteps=[999, 259],
        block_out_channels=(16, 32),
        layers_per_block=1,
        norm_num_groups=8,
        cross_attention_dim=32,
        attention_head_dim=4,
        down_block_types=("CrossAttnDownBlock2D",) * 2,
        up_block_types=("CrossAttnUpBlock2D",) * 2,
        time_cond_proj_dim=32,
    )
    unet(
        args.out / "unet-three-levels",
        sample_shape=(8, 12),
        tokens=77,
        timesteps=[0, 499],
        block_out_channels=(8, 16, 16),
        layers_per_block=2,
        norm_num_groups=8,
        cross_attention_dim=24,
        attention_head_dim=[2, 4, 4],
        use_linear_projection=True,
        down_block_types=("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
    )
    unet(
        args.out / "unet-text-time",
        sample_shape=(8, 12),
        tokens=77,
        timesteps=[999, 259],
        block_out_channels=(8, 16, 24),
        layers_per_block=1,
        norm_num_groups=8,
        cross_attention_dim=20,
        attention_head_dim=[2, 2, 4],
        transformer_layers_per_block=[1, 2, 3],
        use_linear_projection=True,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        addition_embed_type="text_time",
        addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=12 + 6 * 8,
        time_cond_proj_dim=16,
    )
    unet(
        args.out / "unet-odd-latents",
        sample_shape=(7, 10),
        tokens=5,
        timesteps=[20, 700],
        block_out_channels=(8, 4, 8),
        layers_per_block=[1, 3, 2],
        norm_num_groups=4,
        norm_eps=1e-4,
        cross_attention_dim=[6, 6, 7],
        attention_head_dim=[4, 2, 1],
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
        mid_block_type="UNetMidBlock2D",
        mid_block_scale_factor=1.5,
        transformer_layers_per_block=[1, [2, 1, 1], 1],
        reverse_transformer_layers_per_block=[1, [1, 1, 2, 1], [1, 2]],
        only_cross_attention=[False, True, False],
        use_linear_projection=True,
        act_fn="gelu",
        resnet_time_scale_shift="scale_shift",
        downsample_padding=0,
        conv_in_kernel=5,
        conv_out_kernel=1,
        time_embedding_dim=20,
        resnet_skip_time_act=True,
    )
    unet(
        args.out / "unet-no-middle",
        sample_shape=(5, 9),
        tokens=4,
        timesteps=[999, 3],
        block_out_channels=(8, 12),
        layers_per_block=3,
        norm_num_groups=4,
        cross_attention_dim=6,
        attention_head_dim=[3, 5],
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        mid_block_type=None,
        act_fn="mish",
        center_input_sample=True,
        flip_sin_to_cos=False,
        freq_shift=1,
        time_embedding_act_fn="gelu",
        timestep_post_act="SiLU",
        time_cond_proj_dim=10,
        resnet_out_scale_factor=2.0,
        upcast_attention=True,
    )
    unet(
        args.out / "unet-one-level",
        sample_shape=(6, 3),
        tokens=3,
        timesteps=[501],
        sample_size=(6, 3),
        block_out_channels=(9,),
        layers_per_block=1,
        norm_num_groups=3,
        cross_attention_dim=5,
        attention_head_dim=3,
        down_block_types=("CrossAttnDownBlock2D",),
        up_block_types=("CrossAttnUpBlock2D",),
        mid_block_scale_factor=2,
        only_cross_attention=True,
        transformer_layers_per_block=2,
        act_fn="relu",
    )
    vae(args.out / "vae", levels=3, block_out_channels=(8, 16, 16), layers_per_block=1)
    bare = {"use_quant_conv": False, "use_post_quant_conv": False, "mid_block_add_attention": False, "act_fn": "mish"}
    vae(args.out / "vae-bare", levels=2, block_out_channels=(8, 4), layers_per_block=2, **bare)
    text_encoder(args.out / "text_encoder")
    text_encoder_with_projection(args.out / "text_encoder_2")
    tokenizer(args.out / "tokenizer.json", args.tokenizer)
    special_tokens(args.out / "special_tokens.json", args.tokenizer)
    (args.out / "full_size.json").write_text(json.dumps(full_size(), indent=1) + "\n")
    (args.out / "diffusion.json").write_text(json.dumps(diffusion(), indent=1) + "\n")


if __name__ == "__main__":
    main()
