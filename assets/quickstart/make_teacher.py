"""Train the quickstart's teacher: a small Stable-Diffusion-shaped pipeline on Noto emoji, on a CPU.

    python make_teacher.py EMOJI_PACKAGE_DIR OUT_DIR --minutes 120

Writes a diffusers pipeline folder (f16 safetensors): tokenizer, CLIP text encoder, VAE, UNet and scheduler.
The VAE comes first and is then frozen; UNet and text encoder train together against it. Called again on the
same folder it goes on from there: from OUT_DIR.state.pt if that is present (weights, average, optimiser,
time spent), else from the folder's weights. Seeded, but not the same to the bit: the learning rate follows the
clock (unless --steps is given), and `tokenizers` puts merges that are equally frequent in another order each time.

Needs requirements.txt and the unpacked npm package emoji-datasource-google@16.0.0.
"""

import argparse
import copy
import json
import shutil
import time
from pathlib import Path

import diffusers
import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, DDIMScheduler, DDPMScheduler, UNet2DConditionModel
from PIL import Image
from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, trainers
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from noto_emoji import emoji

BATCH = 24
EMPTY_CAPTIONS = 0.1  # so that the teacher can be guided
MIN_SNR_GAMMA = 5.0  # Hang et al. 2023: almost clean images would otherwise dominate the gradient
EMA_DECAY = 0.999
WARMUP_STEPS = 200
DECAY_FRACTION = 0.5  # the last part of the run, over which the learning rate falls to zero
SAMPLE_CAPTIONS = (
    "grinning face",
    "cat face",
    "red apple",
    "slice of pizza",
    "hamburger",
    "dog face",
    "sunflower",
    "pig face",
    "banana",
    "hot beverage",
    "octopus",
    "smiling face with sunglasses",
    "heavy black heart",
    "frog face",
    "strawberry",
    "birthday cake",
)


def load_images(package):
    """Images on white as [N,3,64,64] in [-1,1], and their captions."""
    pixels, captions = [], []
    for e in emoji(package):
        image = Image.open(e.png).convert("RGBA")
        page = Image.new("RGBA", image.size, "white")
        page.alpha_composite(image)
        pixels.append(np.asarray(page.convert("RGB").resize((64, 64), Image.BILINEAR)))
        captions.append(e.caption)
    return torch.from_numpy(np.stack(pixels)).permute(0, 3, 1, 2).float() / 127.5 - 1, captions


def save_grid(images, path, columns):
    """[N,3,H,W] in [-1,1] as one PNG."""
    n, _, h, w = images.shape
    page = np.full((-(-n // columns) * h, columns * w, 3), 255, np.uint8)
    for i, image in enumerate((images.clamp(-1, 1) * 127.5 + 127.5).round().byte().permute(0, 2, 3, 1).numpy()):
        y, x = divmod(i, columns)
        page[y * h : (y + 1) * h, x * w : (x + 1) * w] = image
    Image.fromarray(page).save(path)


def make_tokenizer(folder, captions):
    """A BPE vocabulary learned from the captions, in CLIP's file format: vocab.json and merges.txt."""
    learner = Tokenizer(models.BPE(end_of_word_suffix="</w>"))
    learner.normalizer = normalizers.Lowercase()
    word = Regex(r"[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+")
    learner.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Split(word, "removed", invert=True)])
    learner.train_from_iterator(
        captions, trainers.BpeTrainer(vocab_size=1500, end_of_word_suffix="</w>", show_progress=False)
    )
    merges = [" ".join(m) if not isinstance(m, str) else m for m in json.loads(learner.to_str())["model"]["merges"]]
    merges = [m for m in merges if m.isascii()]  # CLIP's alphabet is bytes: for ASCII both spell a word alike

    # CLIP's order: 256 byte characters, the same at a word's end, the merges, the two special tokens.
    byte_values = [*range(33, 127), *range(161, 173), *range(174, 256)]
    alphabet = [chr(b) for b in byte_values] + [chr(256 + i) for i in range(256 - len(byte_values))]
    special = ["<|startoftext|>", "<|endoftext|>"]
    vocabulary = alphabet + [c + "</w>" for c in alphabet] + ["".join(m.split()) for m in merges] + special
    vocabulary = {token: i for i, token in enumerate(dict.fromkeys(vocabulary))}

    start, end = special
    names = {"bos_token": start, "eos_token": end, "unk_token": end, "pad_token": end}
    config = {
        **names,
        "add_prefix_space": False,
        "do_lower_case": True,
        "errors": "replace",
        "model_max_length": 77,
        "tokenizer_class": "CLIPTokenizer",
    }
    folder.mkdir(parents=True)
    (folder / "vocab.json").write_text(json.dumps(vocabulary, ensure_ascii=False), encoding="utf-8")
    (folder / "merges.txt").write_text("#version: 0.2\n" + "\n".join(merges) + "\n", encoding="utf-8")
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n")
    (folder / "special_tokens_map.json").write_text(json.dumps(names, indent=2) + "\n")


def save_f16(model, folder):
    """Save a copy in f16, whole or not at all, and without the path it was loaded from."""
    aside = folder.with_name(folder.name + ".new")
    copy.deepcopy(model).half().save_pretrained(aside, safe_serialization=True)
    config = json.loads((aside / "config.json").read_text())
    config.pop("_name_or_path", None)
    (aside / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    shutil.rmtree(folder, ignore_errors=True)
    aside.rename(folder)


def make_vae(out, images, minutes):
    """Four times smaller latents of 4 channels, trained on mean absolute and squared error with a light KL term."""
    vae = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        block_out_channels=(16, 32, 64),
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=8,
        sample_size=64,
    ).to(memory_format=torch.channels_last)
    optimiser = torch.optim.AdamW(vae.parameters(), 2e-3, weight_decay=1e-4)
    start, step = time.time(), 0
    while (done := (time.time() - start) / (60 * minutes)) < 1:
        for group in optimiser.param_groups:
            group["lr"] = 2e-3 * min(1.0, step / 100) * max(0.02, 0.5 * (1 + np.cos(np.pi * done)))
        batch = images[torch.randint(0, len(images), (16,))]
        posterior = vae.encode(batch).latent_dist
        decoded = vae.decode(posterior.sample()).sample
        loss = F.l1_loss(decoded, batch) + 2 * F.mse_loss(decoded, batch)
        loss = loss + 5e-4 * posterior.kl().mean() / batch[0].numel()
        optimiser.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        optimiser.step()
        step += 1
        if step % 250 == 0:
            print(f"vae step {step} {time.time() - start:.0f} s loss {loss.item():.4f}", flush=True)
    with torch.no_grad():
        latents = torch.cat([vae.eval().encode(chunk).latent_dist.mean for chunk in images.split(64)])
    vae.register_to_config(scaling_factor=float(1 / latents.std()))
    save_f16(vae, out / "vae")


def new_models(vocabulary):
    """UNet and text encoder with fresh weights."""
    text_encoder = CLIPTextModel(
        CLIPTextConfig(
            vocab_size=vocabulary,
            hidden_size=64,
            intermediate_size=256,
            num_hidden_layers=2,
            num_attention_heads=4,
            hidden_act="quick_gelu",
            max_position_embeddings=77,
            projection_dim=64,
            bos_token_id=vocabulary - 2,
            eos_token_id=vocabulary - 1,
            pad_token_id=vocabulary - 1,
        )
    )
    unet = UNet2DConditionModel(
        sample_size=16,
        block_out_channels=(48, 96),
        layers_per_block=1,
        norm_num_groups=16,
        down_block_types=("CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=64,
        attention_head_dim=4,
    )
    return unet, text_encoder


@torch.no_grad()
def sample(pipeline, ids, empty, steps=50, guidance=6.0):
    """Guided DDIM samples, one for each row of token ids."""
    vae, unet, text_encoder, noise = pipeline
    ddim = DDIMScheduler.from_config(noise.config, timestep_spacing="trailing", set_alpha_to_one=False)
    ddim.set_timesteps(steps)
    context = torch.cat([text_encoder(ids)[0], text_encoder(empty.expand(len(ids), -1))[0]])
    latents = torch.randn(len(ids), 4, 16, 16, generator=torch.Generator().manual_seed(0))
    for t in ddim.timesteps:
        with_text, without = unet(torch.cat([latents, latents]), t, context).sample.chunk(2)
        latents = ddim.step(without + guidance * (with_text - without), t, latents).prev_sample
    return vae.decode(latents / vae.config.scaling_factor).sample


class Run:
    """UNet and text encoder in training, their running average, and what a stopped run needs to go on."""

    def __init__(self, out, unet, text_encoder):
        self.out, self.unet, self.text_encoder = out, unet, text_encoder
        self.state_file = out.with_name(out.name + ".state.pt")
        self.params = [*unet.parameters(), *text_encoder.parameters()]
        self.optimiser = torch.optim.AdamW(self.params, 0.0, betas=(0.9, 0.99), weight_decay=1e-4)
        self.ema = [p.detach().clone() for p in self.params]
        self.step, self.seconds = 0, 0.0
        if self.state_file.exists():
            state = torch.load(self.state_file)
            self.step, self.seconds = state["step"], state["seconds"]
            self.optimiser.load_state_dict(state["optimiser"])
            torch._foreach_copy_([p.data for p in self.params], state["params"])
            torch._foreach_copy_(self.ema, state["ema"])

    def update(self, loss, lr):
        """One optimiser step and one step of the average."""
        for group in self.optimiser.param_groups:
            group["lr"] = lr
        self.optimiser.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.params, 1.0)
        self.optimiser.step()
        self.step += 1
        decay = min(EMA_DECAY, (1 + self.step) / (10 + self.step))
        torch._foreach_lerp_(self.ema, [p.detach() for p in self.params], 1 - decay)

    def averaged(self):
        """Copies of UNet and text encoder that hold the average."""
        unet, text_encoder = copy.deepcopy(self.unet).eval(), copy.deepcopy(self.text_encoder).eval()
        copies = [*unet.parameters(), *text_encoder.parameters()]
        torch._foreach_copy_([p.data for p in copies], self.ema)
        return unet, text_encoder

    def save(self):
        """The average as the pipeline's weights; the run's state beside the folder."""
        unet, text_encoder = self.averaged()
        save_f16(unet, self.out / "unet")
        save_f16(text_encoder, self.out / "text_encoder")
        aside = self.state_file.with_suffix(".new")
        params = [p.detach() for p in self.params]
        state = {"step": self.step, "seconds": self.seconds, "params": params, "ema": self.ema}
        torch.save({**state, "optimiser": self.optimiser.state_dict()}, aside)
        aside.rename(self.state_file)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("package", type=Path, help="unpacked npm package emoji-datasource-google")
    parser.add_argument("out", type=Path, help="pipeline folder to write, or to go on from")
    parser.add_argument("--vae-minutes", type=float, default=12)
    parser.add_argument("--minutes", type=float, default=120, help="training time of UNet and text encoder, in all")
    parser.add_argument("--steps", type=int, help="end at this step instead, with the same learning rates anywhere")
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--save-minutes", type=float, default=10)
    parser.add_argument("--samples", type=Path, help="folder for a grid of 50-step samples at each save")
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    torch.manual_seed(0)
    torch.set_num_threads(args.threads)
    torch.set_flush_denormal(True)

    images, captions = load_images(args.package)
    if not (args.out / "tokenizer").exists():
        make_tokenizer(args.out / "tokenizer", captions)
    tokenizer = CLIPTokenizer.from_pretrained(args.out / "tokenizer")

    def token_ids(texts):
        return tokenizer(texts, padding="max_length", max_length=77, truncation=True, return_tensors="pt").input_ids

    if not (args.out / "vae").exists():
        make_vae(args.out, images, args.vae_minutes)
    vae = AutoencoderKL.from_pretrained(args.out / "vae").float().eval().requires_grad_(False)
    posteriors = [vae.encode(chunk).latent_dist for chunk in images.split(64)]
    mean, std = torch.cat([p.mean for p in posteriors]), torch.cat([p.std for p in posteriors])

    if (args.out / "unet").exists():
        unet = UNet2DConditionModel.from_pretrained(args.out / "unet").float()
        text_encoder = CLIPTextModel.from_pretrained(args.out / "text_encoder").float()
    else:
        unet, text_encoder = new_models(len(tokenizer))
    run = Run(args.out, unet.train(), text_encoder.train())
    noise = DDPMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        prediction_type="epsilon",
        clip_sample=False,
        steps_offset=1,
    )
    noise.save_pretrained(args.out / "scheduler")
    index = {
        "_class_name": "StableDiffusionPipeline",
        "_diffusers_version": diffusers.__version__,
        "feature_extractor": [None, None],
        "requires_safety_checker": False,
        "safety_checker": [None, None],
        "scheduler": ["diffusers", "DDPMScheduler"],
        "text_encoder": ["transformers", "CLIPTextModel"],
        "tokenizer": ["transformers", "CLIPTokenizer"],
        "unet": ["diffusers", "UNet2DConditionModel"],
        "vae": ["diffusers", "AutoencoderKL"],
    }
    (args.out / "model_index.json").write_text(json.dumps(index, indent=2) + "\n")

    snr = noise.alphas_cumprod / (1 - noise.alphas_cumprod)
    weight = snr.clamp(max=MIN_SNR_GAMMA) / snr
    ids, empty, shown = token_ids(captions), token_ids([""]), token_ids(list(SAMPLE_CAPTIONS))
    torch.manual_seed(run.step)  # a continued run draws new noise
    saved, order, losses = time.time(), torch.empty(0, dtype=torch.long), []
    begun = saved - run.seconds
    print(f"{len(captions)} images, from step {run.step}", flush=True)

    def progress():
        return run.step / args.steps if args.steps else run.seconds / (60 * args.minutes)

    while (done := progress()) < 1:
        if len(order) < BATCH:
            order = torch.cat([order, torch.randperm(len(images))])
        batch, order = order[:BATCH], order[BATCH:]
        latents = (mean[batch] + std[batch] * torch.randn_like(mean[batch])) * vae.config.scaling_factor
        t = torch.randint(0, 1000, (BATCH,))
        target = torch.randn_like(latents)
        context = text_encoder(torch.where(torch.rand(BATCH, 1) < EMPTY_CAPTIONS, empty, ids[batch]))[0]
        predicted = unet(noise.add_noise(latents, target, t), t, context).sample
        error = F.mse_loss(predicted, target, reduction="none").mean((1, 2, 3))
        run.update((weight[t] * error).mean(), args.lr * min(1.0, run.step / WARMUP_STEPS, (1 - done) / DECAY_FRACTION))
        losses.append(error.mean().item())
        run.seconds = time.time() - begun
        if run.step % 250 == 0:
            print(f"unet step {run.step} {run.seconds:.0f} s loss {np.mean(losses):.4f}", flush=True)
            losses.clear()
        if time.time() - saved > 60 * args.save_minutes or progress() >= 1:
            saved = time.time()
            run.save()
            if args.samples:
                grid = sample((vae, *run.averaged(), noise), shown, empty)
                save_grid(grid, args.samples / f"samples-{run.step:06}.png", 8)


if __name__ == "__main__":
    main()
