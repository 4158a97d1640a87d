#!/usr/bin/env python3
"""What PyTorch and diffusers reach on this GPU: seconds and peak memory of one LCM distillation step at Stable Diffusion 1.5's shapes with
random weights (teacher twice, target once, student forward and backward, gradient norm, AdamW, moving average), and images a second
through the VAE. Prints a JSON object a line.

    tests/cuda/pytorch_step.py [--batch 12] [--steps 8] [--tiny]      # --tiny: a rehearsal on the CPU"""

import argparse
import json
import time

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel

parser = argparse.ArgumentParser()
parser.add_argument("--batch", type=int, default=12)
parser.add_argument("--steps", type=int, default=8)
parser.add_argument("--tiny", action="store_true")
args = parser.parse_args()
cuda = torch.cuda.is_available()
device = "cuda" if cuda else "cpu"
channels = (32, 64) if args.tiny else (320, 640, 1280, 1280)
side = 8 if args.tiny else 64
# As the reference script with --allow_tf32; PyTorch allows TF32 in convolutions by default.
torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True


def wait():
    if cuda:
        torch.cuda.synchronize()


def report(**values):
    print(json.dumps(values), flush=True)


def timed(call, warm, repeat):
    """Seconds of each call after `warm` others."""
    seconds = []
    for index in range(warm + repeat):
        wait()
        start = time.perf_counter()
        call()
        wait()
        if index >= warm:
            seconds.append(time.perf_counter() - start)
    return seconds


def ceilings():
    a, b = (torch.randn(8192, 8192, device=device, dtype=torch.bfloat16) for _ in range(2))
    report(what="matrix product, bf16", tflops=2 * 8192**3 / min(timed(lambda: a @ b, 3, 20)) / 1e12)
    source = torch.empty(1 << 30, device=device, dtype=torch.uint8)
    to = torch.empty_like(source)
    report(what="copy", terabytes_per_second=2 * 2**30 / min(timed(lambda: to.copy_(source), 3, 20)) / 1e12)


def unet(guided):
    torch.manual_seed(0)
    rest = len(channels) - 1
    return UNet2DConditionModel(
        sample_size=side,
        block_out_channels=channels,
        cross_attention_dim=768,
        attention_head_dim=8,
        time_cond_proj_dim=256 if guided else None,
        down_block_types=("CrossAttnDownBlock2D",) * rest + ("DownBlock2D",),
        up_block_types=("UpBlock2D",) + ("CrossAttnUpBlock2D",) * rest,
    ).to(device)


def step(dtype, channels_last, checkpointing):
    student = unet(True)
    target = unet(True).requires_grad_(False)
    teacher = unet(False).requires_grad_(False).to(dtype)
    layout = torch.channels_last if channels_last else torch.contiguous_format
    for network in (student, target, teacher):
        network.to(memory_format=layout)
    if checkpointing:
        student.enable_gradient_checkpointing()
    student.train()
    optimizer = torch.optim.AdamW(student.parameters(), lr=1e-6, fused=cuda)
    scaler = torch.amp.GradScaler(device, enabled=cuda and dtype == torch.float16)
    batch = args.batch
    noisy = torch.randn(batch, 4, side, side, device=device).to(memory_format=layout)
    text, no_text = torch.randn(2, batch, 77, 768, device=device)
    guidance = torch.randn(batch, 256, device=device)
    timesteps = torch.randint(0, 1000, (batch,), device=device)

    def once():
        with torch.autocast(device, dtype=dtype):
            with torch.no_grad():
                conditional, unconditional = (teacher(noisy.to(dtype), timesteps, encoder_hidden_states=t.to(dtype)).sample for t in (text, no_text))
                previous = noisy + 0.1 * (conditional + 8 * (conditional - unconditional)).float()
                goal = target(previous, timesteps, timestep_cond=guidance, encoder_hidden_states=text).sample
            output = student(noisy, timesteps, timestep_cond=guidance, encoder_hidden_states=text).sample
            loss = (((output.float() - goal.float()) ** 2 + 1e-6).sqrt() - 1e-3).mean()
        scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        torch.nn.utils.clip_grad_norm_(student.parameters(), 1.0)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad(set_to_none=True)
        with torch.no_grad():
            torch._foreach_lerp_(list(target.parameters()), list(student.parameters()), 0.05)

    if cuda:
        torch.cuda.reset_peak_memory_stats()
    seconds = sorted(timed(once, 2, args.steps - 2))
    median = seconds[len(seconds) // 2]
    # As nvidia-smi shows it: PyTorch keeps what it has reserved.
    free, total = torch.cuda.mem_get_info() if cuda else (0, 0)
    peak = (total - free) / 2**30 if cuda else None
    report(
        what="step", dtype=str(dtype), channels_last=channels_last, checkpointing=checkpointing, seconds=median, samples_per_second=batch / median,
        allocated_gib=torch.cuda.max_memory_allocated() / 2**30 if cuda else None, peak_gib=peak,
    )  # fmt: skip


def encode(dtype, channels_last):
    widths = (32, 32) if args.tiny else (128, 256, 512, 512)
    vae = AutoencoderKL(
        block_out_channels=widths,
        down_block_types=("DownEncoderBlock2D",) * len(widths),
        up_block_types=("UpDecoderBlock2D",) * len(widths),
        layers_per_block=2,
        latent_channels=4,
    )
    layout = torch.channels_last if channels_last else torch.contiguous_format
    vae = vae.to(device, dtype, memory_format=layout).eval()
    images = torch.randn(args.batch, 3, 8 * side, 8 * side, device=device, dtype=dtype).to(memory_format=layout)
    with torch.no_grad():
        seconds = min(timed(lambda: vae.encode(images), 2, 5))
    report(what="VAE encode", dtype=str(dtype), channels_last=channels_last, images_per_second=args.batch / seconds)


def attempt(function, *settings):
    try:
        function(*settings)
    except torch.OutOfMemoryError as error:
        report(what=function.__name__, settings=str(settings), failed=str(error)[:100])
    if cuda:
        torch.cuda.empty_cache()


report(what="versions", torch=torch.__version__, cuda=torch.version.cuda, device=torch.cuda.get_device_name() if cuda else "cpu")
if cuda:
    ceilings()
half, brain = torch.float16, torch.bfloat16
for settings in ((half, False, True), (brain, False, True), (brain, True, True), (brain, True, False)):
    attempt(step, *settings)
for settings in ((torch.float32, False), (half, False), (half, True)):
    attempt(encode, *settings)
