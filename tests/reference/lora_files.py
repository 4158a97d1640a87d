"""LoRA files of diffusers, PEFT and its users, and what diffusers makes of files that coffey wrote.

usage: lora_files.py make OUT_DIR
       lora_files.py check CHECKS.json

`make` writes tiny UNets of the kinds sd (1x1 convolutions as projections) and sdxl (linear projections, text_time), LoRA files of each in
every layout, and the output of the UNet with each LoRA. `check` loads what coffey made of them and compares outputs.
"""

import json
import sys
from pathlib import Path

import torch
from diffusers import (
    EulerDiscreteScheduler,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from diffusers.training_utils import _collate_lora_metadata
from lora_modules import TARGETS
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict
from safetensors.torch import load_file, save_file

SHARED = {"layers_per_block": 2, "norm_num_groups": 8, "sample_size": 16}
CONFIGS = {
    "sd": {
        **SHARED,
        "attention_head_dim": 2,
        "block_out_channels": [16, 32],
        "cross_attention_dim": 24,
        "down_block_types": ["CrossAttnDownBlock2D", "DownBlock2D"],
        "up_block_types": ["UpBlock2D", "CrossAttnUpBlock2D"],
    },
    "sdxl": {
        **SHARED,
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 8,
        "attention_head_dim": [2, 4, 4],
        "block_out_channels": [16, 32, 32],
        "cross_attention_dim": 40,
        "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"],
        "projection_class_embeddings_input_dim": 20 + 6 * 8,
        "transformer_layers_per_block": [1, 2, 3],
        "up_block_types": ["CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"],
        "use_linear_projection": True,
    },
}
PIPELINES = {"sd": StableDiffusionPipeline, "sdxl": StableDiffusionXLPipeline}


def kind_of(base):
    return Path(base).name


def read_unet(folder):
    unet, info = UNet2DConditionModel.from_pretrained(folder, output_loading_info=True)
    assert not any(info.values()), info
    return unet.eval()


def pipeline(base):
    """The pipeline of a base model that has a UNet alone."""
    kind = kind_of(base)
    parts = dict.fromkeys(
        ["vae", "text_encoder", "tokenizer", "image_encoder", "feature_extractor"]
    )
    more = {
        "sd": {"safety_checker": None, "requires_safety_checker": False},
        "sdxl": {"text_encoder_2": None, "tokenizer_2": None},
    }[kind]
    unet = read_unet(Path(base) / "unet")
    return PIPELINES[kind](**parts, **more, unet=unet, scheduler=EulerDiscreteScheduler())


def forward(unet):
    """The output for fixed inputs."""
    config = CONFIGS["sdxl" if unet.config.addition_embed_type else "sd"]
    rng = torch.Generator().manual_seed(5)
    draw = lambda *shape: torch.randn(*shape, generator=rng)
    sample, context = draw(2, 4, 16, 16), draw(2, 7, config["cross_attention_dim"])
    added = None
    if "addition_embed_type" in config:
        ids = torch.tensor([[64.0, 48, 3, 5, 64, 64], [90, 80, 0, 0, 64, 64]])
        added = {"text_embeds": draw(2, 20), "time_ids": ids}
    with torch.no_grad():
        return unet(sample, torch.tensor([3, 700]), context, added_cond_kwargs=added).sample


def with_lora(base, path):
    pipe = pipeline(base)
    pipe.load_lora_weights(str(path))
    return pipe


def lora_config(alpha, **more):
    return LoraConfig(
        r=4, lora_alpha=alpha, target_modules=TARGETS, init_lora_weights=False, **more
    )


def original_names(kohya, layers):
    """Keys of kohya's layout with names of Stable Diffusion's original layout."""
    names = {}
    for key, value in kohya.items():
        name, end = key.split(".", 1)
        block, rest = name.removeprefix("lora_unet_").split("_blocks_" if "_blocks_" in name.split("transformer")[0] else "_block_", 1)
        parts = rest.split("_")
        if block == "mid":
            kind, layer, inner = parts[0], int(parts[1]), "_".join(parts[2:])
            new = f"middle_block_{2 * layer if kind == 'resnets' else 1}_{inner}"
        else:
            level, kind, layer, inner = int(parts[0]), parts[1], int(parts[2]), "_".join(parts[3:])
            if block == "down":
                index = 1 + level * (layers + 1) + layer
                new = {
                    "resnets": f"input_blocks_{index}_0_{inner}",
                    "attentions": f"input_blocks_{index}_1_{inner}",
                    "downsamplers": f"input_blocks_{(level + 1) * (layers + 1)}_0_op",
                }[kind]
            else:
                index = level * (layers + 1) + layer
                new = {
                    "resnets": f"output_blocks_{index}_0_{inner}",
                    "attentions": f"output_blocks_{index}_1_{inner}",
                    "upsamplers": f"output_blocks_{level * (layers + 1) + layers}_2_{inner}",
                }[kind]
        for own, original in [
            ("0_conv1", "0_in_layers_2"),
            ("0_conv2", "0_out_layers_3"),
            ("time_emb_proj", "emb_layers_1"),
            ("conv_shortcut", "skip_connection"),
        ]:
            new = new.removesuffix(own) + original if new.endswith(own) else new
        if new.startswith("middle_block_2_conv"):
            new = new.replace("conv1", "in_layers_2").replace("conv2", "out_layers_3")
        names[f"lora_unet_{new}.{end}"] = value
    return names


def make(out):
    for kind, config in CONFIGS.items():
        torch.manual_seed(3)
        base = out / kind
        UNet2DConditionModel(**config).save_pretrained(base / "unet")
        save = PIPELINES[kind].save_lora_weights

        def folder(name):
            (base / name).mkdir()
            return base / name

        def expect(name, unet):
            plain = forward(read_unet(base / "unet"))
            output = forward(unet)
            assert (output - plain).abs().max() > 0.05 * plain.abs().max(), name
            save_file({"output": output}, base / name / "expected.safetensors")

        def adapted(lora):
            unet = read_unet(base / "unet")
            unet.add_adapter(lora)
            return unet

        def wrapped(lora):
            return get_peft_model(read_unet(base / "unet"), lora)

        # diffusers without metadata: alpha is taken for the rank.
        unet = adapted(lora_config(4))
        save(folder("diffusers"), unet_lora_layers=get_peft_model_state_dict(unet))
        # diffusers with metadata
        unet = adapted(lora_config(7))
        layers = get_peft_model_state_dict(unet)
        save(folder("metadata"), unet_lora_layers=layers, **_collate_lora_metadata({"unet": unet}))
        # ranks and alphas that differ
        patterns = {
            "rank_pattern": {"to_q": 2, "mid_block.resnets.0.conv1": 3},
            "alpha_pattern": {"to_v": 2, "mid_block.resnets.0.conv1": 5},
        }
        unet = adapted(lora_config(6, **patterns))
        layers = get_peft_model_state_dict(unet)
        save(folder("patterns"), unet_lora_layers=layers, **_collate_lora_metadata({"unet": unet}))
        # the converter of the training scripts
        unet = wrapped(lora_config(6))
        kohya = {}
        for key, weight in get_peft_model_state_dict(unet).items():
            module, part = key.removeprefix("base_model.model.").split(".lora_")
            name = "lora_unet_" + module.replace(".", "_")
            end = {"A.weight": "lora_down.weight", "B.weight": "lora_up.weight"}[part]
            kohya[f"{name}.{end}"] = weight.half().contiguous()
            kohya[f"{name}.alpha"] = torch.tensor(unet.peft_config["default"].lora_alpha).half()
        save_file(kohya, folder("kohya") / "pytorch_lora_weights.safetensors", {"format": "pt"})
        # the same with the names that kohya-ss writes for SDXL
        if kind == "sdxl":
            names = original_names(kohya, config["layers_per_block"])
            assert len(names) == len(kohya)
            save_file(names, folder("original") / "pytorch_lora_weights.safetensors")
        # older diffusers: attention processors
        processors = {}
        for key, weight in get_peft_model_state_dict(unet).items():
            module, part = key.removeprefix("base_model.model.").split(".lora_")
            attention, _, name = module.rpartition(".to_")
            if attention and "attn" in attention:
                end = {"A.weight": "down", "B.weight": "up"}[part]
                name = name.removesuffix(".0")
                processors[f"unet.{attention}.processor.to_{name}_lora.{end}.weight"] = weight
        save_file(processors, folder("processors") / "pytorch_lora_weights.safetensors")
        for path in base.iterdir():
            if path.name != "unet":
                expect(path.name, with_lora(base, path).unet)

        # PEFT's own folder, and what the training scripts save: diffusers loads neither.
        unet = wrapped(lora_config(7))
        unet.save_pretrained(folder("peft"))
        expect("peft", unet)
        unet = wrapped(lora_config(4))
        layers = get_peft_model_state_dict(unet)
        save(folder("script"), unet_lora_layers=layers)
        assert all("base_model.model." in key for key in load_file(base / "script/pytorch_lora_weights.safetensors"))
        expect("script", unet)


def fused(base, path):
    """What a LoRA adds to each weight."""
    plain = pipeline(base).unet.state_dict()
    pipe = with_lora(base, path)
    pipe.fuse_lora()
    pipe.unload_lora_weights()
    return {
        key: (weight - plain[key]).flatten(1).double()
        for key, weight in pipe.unet.state_dict().items()
        if weight.dim() > 1
    }


def check_rank(case):
    """Compares a reduced LoRA with the best approximation by torch.linalg.svd."""
    whole, reduced = fused(case["base"], case["of"]), fused(case["base"], case["lora"])
    kept, all_, changed = 0.0, 0.0, 0
    for key, change in whole.items():
        u, s, vt = torch.linalg.svd(change, full_matrices=False)
        rank = case["rank"]
        best = u[:, :rank] @ torch.diag(s[:rank]) @ vt[:rank]
        changed += int(s[0] > 0)
        apart = (reduced[key] - best).norm() / max(change.norm(), 1e-30)
        assert apart < 1e-5, f"{key}: {apart}"
        kept, all_ = kept + float((s[:rank] ** 2).sum()), all_ + float((s**2).sum())
    share = 100 * (kept / all_) ** 0.5
    assert changed > 50 and abs(share - case["share"]) < 0.06, (changed, share, case["share"])
    print(f"rank {case['rank']}: {share:.2f} % kept")


def check(case):
    if "rank" in case:
        return check_rank(case)
    if "unet" in case:
        unet = read_unet(case["unet"])
        written = load_file(Path(case["unet"]) / "diffusion_pytorch_model.safetensors")
        assert {str(t.dtype) for t in written.values()} == {f"torch.{case['dtype']}"}
    elif "peft" in case:
        unet = PeftModel.from_pretrained(read_unet(Path(case["base"]) / "unet"), case["peft"])
    else:
        unet = with_lora(case["base"], case["lora"]).unet
    got, want = forward(unet), load_file(case["expected"])["output"]
    apart = float((got - want).abs().max() / want.abs().max())
    what = case.get("unet") or case.get("lora") or case.get("peft")
    print(f"{what}: {apart:.1e}")
    assert apart <= case["tolerance"], f"{what}: {apart} apart"


if __name__ == "__main__":
    command, path = sys.argv[1], Path(sys.argv[2])
    if command == "make":
        make(path)
    else:
        for case in json.loads(path.read_text()):
            check(case)
