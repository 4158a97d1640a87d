"""Linear and convolutional modules of the UNets of SD-1.5 and SDXL, and those that diffusers' LCM-LoRA scripts train.

usage: lora_modules.py OUT.json

The networks are made without storage from the configurations of their repositories, and PEFT chooses the modules.
"""

import json
import sys

import torch
from diffusers import UNet2DConditionModel
from peft import LoraConfig, get_peft_model

# lora_target_modules of train_lcm_distill_lora_sd_wds.py and train_lcm_distill_lora_sdxl_wds.py
TARGETS = """to_q to_k to_v to_out.0 proj_in proj_out ff.net.0.proj ff.net.2 conv1 conv2 conv_shortcut
downsamplers.0.conv upsamplers.0.conv time_emb_proj""".split()
CONFIGS = {
    "sd15": {"cross_attention_dim": 768, "attention_head_dim": 8},
    "sdxl": {
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 256,
        "attention_head_dim": [5, 10, 20],
        "block_out_channels": [320, 640, 1280],
        "cross_attention_dim": 2048,
        "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"],
        "projection_class_embeddings_input_dim": 2816,
        "transformer_layers_per_block": [1, 2, 10],
        "up_block_types": ["CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"],
        "use_linear_projection": True,
    },
}

if __name__ == "__main__":
    made = {}
    for name, config in CONFIGS.items():
        with torch.device("meta"):
            unet = UNet2DConditionModel(**config)
            shapes = {
                key.removesuffix(".weight"): list(tensor.shape)
                for key, tensor in unet.state_dict().items()
                if key.endswith(".weight") and tensor.dim() in (2, 4)
            }
            wrapped = get_peft_model(unet, LoraConfig(r=1, lora_alpha=1, target_modules=TARGETS))
        hit = {
            key.removeprefix("base_model.model.").split(".lora_A")[0]
            for key, _ in wrapped.named_parameters()
            if "lora_A" in key
        }
        made[name] = {
            "trained": {module: shape for module, shape in shapes.items() if module in hit},
            "others": {module: shape for module, shape in shapes.items() if module not in hit},
        }
        print(name, len(hit), "of", len(shapes))
    with open(sys.argv[1], "w") as file:
        json.dump(made, file, separators=(",", ":"))
        file.write("\n")
