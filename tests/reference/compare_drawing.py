"""Compares an image of `coffey sample` with diffusers' StableDiffusionPipeline, or of an SDXL pipeline with its
StableDiffusionXLPipeline, on the same initial latents.

usage: compare_drawing.py PIPELINE UNET NOISE.npy IMAGE.png SCHEDULER STEPS GUIDANCE PROMPT [NEGATIVE PROMPT] [--lora FILE]

SCHEDULER is lcm, ddim or tcd (deterministic, eta = 0). FILE is given to load_lora_weights. Fails where a pixel is more than two levels (of 255) away.
"""

import sys

import numpy as np
import torch
from diffusers import (
    DDIMScheduler,
    DiffusionPipeline,
    LCMScheduler,
    TCDScheduler,
    UNet2DConditionModel,
)
from PIL import Image

TOLERANCE = 2

arguments, lora = sys.argv[1:], None
if "--lora" in arguments:
    *arguments, _, lora = arguments
pipeline, unet, noise, image, scheduler, steps, guidance, prompt, *negative = arguments
pipe = DiffusionPipeline.from_pretrained(pipeline, unet=UNet2DConditionModel.from_pretrained(unet)).to(torch.float32)
pipe.safety_checker = None
if lora:
    pipe.load_lora_weights(lora)
config = {**pipe.scheduler.config, "clip_sample": False}
pipe.scheduler = {
    "lcm": lambda: LCMScheduler.from_config(config),
    "tcd": lambda: TCDScheduler.from_config(config),
    "ddim": lambda: DDIMScheduler.from_config(config, timestep_spacing="trailing"),
}[scheduler]()
pipe.set_progress_bar_config(disable=True)
latents = torch.from_numpy(np.load(noise))
height, width = (side * pipe.vae_scale_factor for side in latents.shape[2:])  # SDXL is told of them
with torch.no_grad():
    drawn = pipe(
        prompt,
        negative_prompt=negative[0] if negative else None,
        num_inference_steps=int(steps),
        guidance_scale=float(guidance),
        eta=0.0,
        latents=latents,
        height=height,
        width=width,
        output_type="np",
    ).images[0]
want = (drawn * 255).round()
got = np.asarray(Image.open(image).convert("RGB"), dtype=np.float64)
assert got.shape == want.shape, f"{got.shape}, diffusers has {want.shape}"
apart = np.abs(got - want).max()
assert apart <= TOLERANCE, f"{apart} levels apart"
print(f"{apart} levels apart")
