#!/usr/bin/env python3
"""A pipeline folder with the shapes of Stable Diffusion 1.5 and no knowledge: for counts, speed and memory.

    tests/cuda/sd15.py OUT [--random] [--f16]

Weights are zeros that take no space on the disk, or with --random (needs torch) those of a fresh network. Tokenizer, scheduler and
vocabulary are those of the quickstart's teacher."""

import argparse
import json
import math
import shutil
import struct
from pathlib import Path

TEACHER = Path(__file__).resolve().parents[2] / "assets/quickstart/teacher"
UNET_CHANNELS = [320, 640, 1280, 1280]
VAE_CHANNELS = [128, 256, 512, 512]
TIME, TEXT, CLIP_LAYERS = 1280, 768, 12


class Shapes(dict):
    """Names of tensors and their shapes."""

    def conv(self, name, inputs, outputs, kernel=3):
        self[f"{name}.weight"], self[f"{name}.bias"] = [outputs, inputs, kernel, kernel], [outputs]

    def linear(self, name, inputs, outputs, bias=True):
        self[f"{name}.weight"] = [outputs, inputs]
        if bias:
            self[f"{name}.bias"] = [outputs]

    def norm(self, name, channels):
        self[f"{name}.weight"], self[f"{name}.bias"] = [channels], [channels]

    def resnet(self, name, inputs, outputs, time=None):
        self.norm(f"{name}.norm1", inputs)
        self.conv(f"{name}.conv1", inputs, outputs)
        if time:
            self.linear(f"{name}.time_emb_proj", time, outputs)
        self.norm(f"{name}.norm2", outputs)
        self.conv(f"{name}.conv2", outputs, outputs)
        if inputs != outputs:
            self.conv(f"{name}.conv_shortcut", inputs, outputs, 1)

    def transformer(self, name, channels):
        self.norm(f"{name}.norm", channels)
        self.conv(f"{name}.proj_in", channels, channels, 1)
        block = f"{name}.transformer_blocks.0"
        for attention, context in (("attn1", channels), ("attn2", TEXT)):
            self.linear(f"{block}.{attention}.to_q", channels, channels, bias=False)
            self.linear(f"{block}.{attention}.to_k", context, channels, bias=False)
            self.linear(f"{block}.{attention}.to_v", context, channels, bias=False)
            self.linear(f"{block}.{attention}.to_out.0", channels, channels)
        for index in (1, 2, 3):
            self.norm(f"{block}.norm{index}", channels)
        self.linear(f"{block}.ff.net.0.proj", channels, 8 * channels)
        self.linear(f"{block}.ff.net.2", 4 * channels, channels)
        self.conv(f"{name}.proj_out", channels, channels, 1)


def unet():
    s = Shapes()
    channels = UNET_CHANNELS[0]
    s.conv("conv_in", 4, channels)
    s.linear("time_embedding.linear_1", channels, TIME)
    s.linear("time_embedding.linear_2", TIME, TIME)
    skips = [channels]
    last = len(UNET_CHANNELS) - 1
    for level, outputs in enumerate(UNET_CHANNELS):
        block = f"down_blocks.{level}"
        for index in range(2):
            s.resnet(f"{block}.resnets.{index}", channels, outputs, TIME)
            if level < last:
                s.transformer(f"{block}.attentions.{index}", outputs)
            channels = outputs
            skips.append(channels)
        if level < last:
            s.conv(f"{block}.downsamplers.0.conv", channels, channels)
            skips.append(channels)
    for index in range(2):
        s.resnet(f"mid_block.resnets.{index}", channels, channels, TIME)
    s.transformer("mid_block.attentions.0", channels)
    for level, outputs in enumerate(reversed(UNET_CHANNELS)):
        block = f"up_blocks.{level}"
        for index in range(3):
            s.resnet(f"{block}.resnets.{index}", channels + skips.pop(), outputs, TIME)
            if level > 0:
                s.transformer(f"{block}.attentions.{index}", outputs)
            channels = outputs
        if level < last:
            s.conv(f"{block}.upsamplers.0.conv", channels, channels)
    s.norm("conv_norm_out", channels)
    s.conv("conv_out", channels, 4)
    return s


def vae():
    s = Shapes()
    last = len(VAE_CHANNELS) - 1

    def middle(part, channels):
        for index in range(2):
            s.resnet(f"{part}.mid_block.resnets.{index}", channels, channels)
        attention = f"{part}.mid_block.attentions.0"
        s.norm(f"{attention}.group_norm", channels)
        for name in ("to_q", "to_k", "to_v", "to_out.0"):
            s.linear(f"{attention}.{name}", channels, channels)

    channels = VAE_CHANNELS[0]
    s.conv("encoder.conv_in", 3, channels)
    for level, outputs in enumerate(VAE_CHANNELS):
        for index in range(2):
            s.resnet(f"encoder.down_blocks.{level}.resnets.{index}", channels, outputs)
            channels = outputs
        if level < last:
            s.conv(f"encoder.down_blocks.{level}.downsamplers.0.conv", channels, channels)
    middle("encoder", channels)
    s.norm("encoder.conv_norm_out", channels)
    s.conv("encoder.conv_out", channels, 8)
    s.conv("quant_conv", 8, 8, 1)
    s.conv("post_quant_conv", 4, 4, 1)
    s.conv("decoder.conv_in", 4, channels)
    middle("decoder", channels)
    for level, outputs in enumerate(reversed(VAE_CHANNELS)):
        for index in range(3):
            s.resnet(f"decoder.up_blocks.{level}.resnets.{index}", channels, outputs)
            channels = outputs
        if level < last:
            s.conv(f"decoder.up_blocks.{level}.upsamplers.0.conv", channels, channels)
    s.norm("decoder.conv_norm_out", channels)
    s.conv("decoder.conv_out", channels, 3)
    return s


def text_encoder(vocabulary):
    s = Shapes()
    s["text_model.embeddings.token_embedding.weight"] = [vocabulary, TEXT]
    s["text_model.embeddings.position_embedding.weight"] = [77, TEXT]
    for layer in range(CLIP_LAYERS):
        name = f"text_model.encoder.layers.{layer}"
        for part in ("q_proj", "k_proj", "v_proj", "out_proj"):
            s.linear(f"{name}.self_attn.{part}", TEXT, TEXT)
        s.norm(f"{name}.layer_norm1", TEXT)
        s.norm(f"{name}.layer_norm2", TEXT)
        s.linear(f"{name}.mlp.fc1", TEXT, 4 * TEXT)
        s.linear(f"{name}.mlp.fc2", 4 * TEXT, TEXT)
    s.norm("text_model.final_layer_norm", TEXT)
    return s


def write(path, shapes, dtype, random):
    width = {"F32": 4, "F16": 2}[dtype]
    header, end = {}, 0
    for name, shape in sorted(shapes.items()):
        start, end = end, end + math.prod(shape) * width
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with open(path, "wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        file.truncate(8 + len(text) + end)  # a hole in the file
        if random:
            import torch

            torch.manual_seed(1)
            for name, shape in sorted(shapes.items()):
                if name.endswith("bias"):
                    values = torch.zeros(shape)
                elif len(shape) == 1:
                    values = torch.ones(shape)
                else:
                    values = torch.randn(shape) / math.prod(shape[1:]) ** 0.5
                values = values.to(torch.float16 if dtype == "F16" else torch.float32)
                file.seek(8 + len(text) + header[name]["data_offsets"][0])
                file.write(values.numpy().tobytes())


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("out", type=Path)
    parser.add_argument("--random", action="store_true")
    parser.add_argument("--f16", action="store_true")
    args = parser.parse_args()
    vocabulary = json.loads((TEACHER / "text_encoder/config.json").read_text())["vocab_size"]
    parts = {
        "unet": (
            unet(),
            dict(
                attention_head_dim=8, block_out_channels=UNET_CHANNELS, cross_attention_dim=TEXT, layers_per_block=2, norm_num_groups=32,
                sample_size=64, down_block_types=["CrossAttnDownBlock2D"] * 3 + ["DownBlock2D"],
                up_block_types=["UpBlock2D"] + ["CrossAttnUpBlock2D"] * 3,
            ),
        ),
        "vae": (
            vae(),
            dict(
                block_out_channels=VAE_CHANNELS, layers_per_block=2, norm_num_groups=32, sample_size=512, scaling_factor=0.18215,
                down_block_types=["DownEncoderBlock2D"] * 4, up_block_types=["UpDecoderBlock2D"] * 4,
            ),
        ),
        "text_encoder": (
            text_encoder(vocabulary),
            dict(hidden_size=TEXT, intermediate_size=4 * TEXT, num_attention_heads=12, num_hidden_layers=CLIP_LAYERS, projection_dim=TEXT),
        ),
    }  # fmt: skip
    for part, (shapes, changes) in parts.items():
        folder = args.out / part
        folder.mkdir(parents=True, exist_ok=True)
        config = json.loads((TEACHER / part / "config.json").read_text()) | changes
        (folder / "config.json").write_text(json.dumps(config, indent=1))
        stem = "model" if part == "text_encoder" else "diffusion_pytorch_model"
        write(folder / f"{stem}.safetensors", shapes, "F16" if args.f16 else "F32", args.random)
    for part in ("tokenizer", "scheduler"):
        shutil.copytree(TEACHER / part, args.out / part, dirs_exist_ok=True)
    shutil.copy(TEACHER / "model_index.json", args.out)


if __name__ == "__main__":
    main()
