"""Replay an audit folder in PyTorch + diffusers and compare every number.

    python replay_audit.py AUDIT_DIR [--teacher DIR] [--tolerance 1e-4] [--weights-tolerance 0.01]

Starts from `unet_init/` and the teacher named in `meta.json`, feeds the recorded inputs (latents, noise, index, w,
embeddings) through the step of `train_lcm_distill_sd_wds.py` in f32, and keeps its own optimiser, average and
weights, so that an error in any step shows in the ones after it. Prints the worst relative error of each quantity
in each step (max |a - b| / max |b|), then how far the final weights are apart relative to how far they moved.
Exit 1 over a tolerance or when something is not finite; 2 when the folder is incomplete.
"""

import argparse
import json
import sys
from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers import DDPMScheduler, UNet2DConditionModel
from diffusers.optimization import get_scheduler
from safetensors.torch import load_file

from lcm_reference import (
    DDIMSolver,
    append_dims,
    get_predicted_noise,
    get_predicted_original_sample,
    guidance_scale_embedding,
    scalings_for_boundary_conditions,
    update_ema,
)

QUANTITIES = ("x_prev", "model_pred", "target", "loss", "grad_norm", "lr")


def relative(ours, reference):
    """max |a - b| / max |b|; exactly equal is 0 even where b is 0."""
    ours, reference = torch.as_tensor(ours).double(), torch.as_tensor(reference).double()
    if ours.numel() != reference.numel():
        raise SystemExit(f"shapes differ: recorded {list(ours.shape)}, replayed {list(reference.shape)}")
    distance = (ours.reshape(-1) - reference.reshape(-1)).abs().max().item()
    return distance / max(reference.abs().max().item(), 1e-30) if distance else 0.0


def load_unet(folder):
    unet, info = UNet2DConditionModel.from_pretrained(folder, output_loading_info=True)
    for kind, keys in info.items():
        if keys:
            raise SystemExit(f"{folder}: {kind}: {keys}")
    return unet.float()


class Distillation:
    """Teacher, student and target with the step of the reference, each number of it by its name there."""

    def __init__(self, meta, teacher, student, target):
        self.meta, self.teacher, self.student, self.target = meta, teacher, student, target
        self.noise_scheduler = DDPMScheduler.from_pretrained(meta["teacher"], subfolder="scheduler")
        config = self.noise_scheduler.config
        for key in ("prediction_type", "num_train_timesteps"):
            if config[key] != meta[key]:
                raise SystemExit(f"meta.json has {key} = {meta[key]}, the teacher's scheduler {config[key]}")
        self.alphas = torch.sqrt(self.noise_scheduler.alphas_cumprod)
        self.sigmas = torch.sqrt(1 - self.noise_scheduler.alphas_cumprod)
        self.solver = DDIMSolver(
            self.noise_scheduler.alphas_cumprod.numpy(),
            timesteps=meta["num_train_timesteps"],
            ddim_timesteps=meta["num_ddim_timesteps"],
        )

    def original_and_noise(self, output, t, sample):
        args = output, t, sample, self.meta["prediction_type"], self.alphas, self.sigmas
        return get_predicted_original_sample(*args), get_predicted_noise(*args)

    def boundary(self, t, ndim):
        scalings = scalings_for_boundary_conditions(t, self.meta["sigma_data"], self.meta["timestep_scaling"])
        return [append_dims(x, ndim) for x in scalings]

    def step(self, given):
        """x_prev, model_pred, target and loss for one micro-batch of recorded inputs."""
        meta = self.meta
        latents, noise, index, w = (given[k] for k in ("latents", "noise", "index", "w"))
        bsz, ndim = latents.shape[0], latents.ndim
        prompt = given["prompt_embeds"]
        uncond = given["uncond_prompt_embeds"].expand(bsz, -1, -1)

        start = self.solver.ddim_timesteps[index]
        end = start - meta["num_train_timesteps"] // meta["num_ddim_timesteps"]
        end = torch.where(end < 0, torch.zeros_like(end), end)
        c_skip_start, c_out_start = self.boundary(start, ndim)
        c_skip, c_out = self.boundary(end, ndim)
        noisy = self.noise_scheduler.add_noise(latents, noise, start)
        w_embedding = guidance_scale_embedding(w, embedding_dim=meta["time_cond_proj_dim"])
        w = w.reshape(bsz, 1, 1, 1)

        noise_pred = self.student(noisy, start, timestep_cond=w_embedding, encoder_hidden_states=prompt).sample
        pred_x_0, _ = self.original_and_noise(noise_pred, start, noisy)
        model_pred = c_skip_start * noisy + c_out_start * pred_x_0

        with torch.no_grad():
            cond_x0, cond_noise = self.original_and_noise(
                self.teacher(noisy, start, encoder_hidden_states=prompt).sample, start, noisy
            )
            uncond_x0, uncond_noise = self.original_and_noise(
                self.teacher(noisy, start, encoder_hidden_states=uncond).sample, start, noisy
            )
            pred_x0 = cond_x0 + w * (cond_x0 - uncond_x0)
            pred_noise = cond_noise + w * (cond_noise - uncond_noise)
            x_prev = self.solver.ddim_step(pred_x0, pred_noise, index)

            target_pred = self.target(
                x_prev.float(), end, timestep_cond=w_embedding, encoder_hidden_states=prompt
            ).sample
            target_x_0, _ = self.original_and_noise(target_pred, end, x_prev)
            target = c_skip * x_prev + c_out * target_x_0

        if meta["loss"] == "l2":
            loss = F.mse_loss(model_pred.float(), target.float(), reduction="mean")
        elif meta["loss"] == "huber":
            c = meta["huber_c"]
            loss = torch.mean(torch.sqrt((model_pred.float() - target.float()) ** 2 + c**2) - c)
        else:
            raise SystemExit(f"meta.json has loss = {meta['loss']!r}: neither l2 nor huber")
        return {"x_prev": x_prev, "model_pred": model_pred, "target": target, "loss": loss}


def replay(audit, meta):
    """Yield (step, {quantity: worst relative error}) for each step, then ("weights", {folder: distance})."""
    student, target = load_unet(audit / "unet_init"), load_unet(audit / "unet_init")
    if student.config.time_cond_proj_dim != meta["time_cond_proj_dim"]:
        raise SystemExit(f"unet_init has time_cond_proj_dim = {student.config.time_cond_proj_dim}")
    teacher = UNet2DConditionModel.from_pretrained(meta["teacher"], subfolder="unet").float()
    teacher.requires_grad_(False)
    target.requires_grad_(False)
    student.train()
    distillation = Distillation(meta, teacher, student, target)
    optimizer = torch.optim.AdamW(
        student.parameters(),
        lr=meta["learning_rate"],
        betas=(meta["beta1"], meta["beta2"]),
        weight_decay=meta["weight_decay"],
        eps=meta["epsilon"],
    )
    lr_scheduler = get_scheduler(
        meta["schedule"],
        optimizer=optimizer,
        num_warmup_steps=meta["warmup_steps"],
        num_training_steps=meta["max_steps"],
    )
    micro_batches = meta["gradient_accumulation"]
    for step in range(1, meta["steps"] + 1):
        worst = {}

        def note(name, recorded, replayed):
            worst[name] = max(worst.get(name, 0.0), relative(recorded, replayed))

        for micro in range(micro_batches):
            recorded = load_file(audit / f"step-{step:06}.{micro:02}.safetensors")
            made = distillation.step(recorded)
            (made["loss"] / micro_batches).backward()
            for name, value in made.items():
                note(name, recorded[name], value.detach())
        grad_norm = torch.nn.utils.clip_grad_norm_(student.parameters(), meta["max_grad_norm"])
        note("grad_norm", recorded["grad_norm"], grad_norm)
        note("lr", recorded["lr"], lr_scheduler.get_last_lr()[0])  # the rate this step is made with
        optimizer.step()
        lr_scheduler.step()
        optimizer.zero_grad(set_to_none=True)
        update_ema(target.parameters(), student.parameters(), meta["ema_decay"])
        yield step, worst
    finals = {"unet_final": student, "unet_target_final": target}
    yield "weights", {folder: apart(audit, folder, replayed) for folder, replayed in finals.items()}


def apart(audit, folder, replayed):
    """Distance of the recorded final weights from the replayed ones, relative to the way these have come."""
    start, end = load_unet(audit / "unet_init").state_dict(), load_unet(audit / folder).state_dict()
    here = replayed.state_dict()
    distance = sum((end[k] - here[k]).double().square().sum() for k in here).sqrt().item()
    moved = sum((here[k] - start[k]).double().square().sum() for k in here).sqrt().item()
    return distance / moved if moved else float("inf")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("audit", type=Path)
    parser.add_argument("--teacher", help="the teacher's pipeline folder, instead of the one in meta.json")
    parser.add_argument("--tolerance", type=float, default=1e-4, help="for every quantity of a step")
    parser.add_argument("--weights-tolerance", type=float, default=0.01, help="for the final weights")
    args = parser.parse_args()

    try:
        meta = json.loads((args.audit / "meta.json").read_text())
        if args.teacher:
            meta["teacher"] = args.teacher
        good = True
        print("step    " + "".join(f"{name:>12}" for name in QUANTITIES))
        for step, worst in replay(args.audit, meta):
            if step == "weights":
                for name, error in worst.items():
                    good &= error <= args.weights_tolerance
                    print(f"{name}: {error:.2e} of the way apart (allowed {args.weights_tolerance:g})")
            else:
                good &= all(error <= args.tolerance for error in worst.values())
                print(f"{step:<8}" + "".join(f"{worst[name]:>12.2e}" for name in QUANTITIES), flush=True)
        print(f"{'same numbers' if good else 'DIFFERENT'} (allowed {args.tolerance:g})")
        return 0 if good else 1
    except (OSError, KeyError) as fault:
        print(f"{args.audit} is not a complete audit folder: {type(fault).__name__}: {fault}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
