"""Replay an audit folder in PyTorch + diffusers and compare every number.

    python replay_audit.py AUDIT_DIR [--teacher DIR] [--tolerance 1e-4] [--weights-tolerance 0.01] [--drift]
        [--first-step] [--gradient-checkpointing]

Starts from `unet_init/`, or `lora_init.safetensors` over PEFT's adapters, and the teacher named in `meta.json`, feeds the recorded
inputs (latents, noise, index, w, embeddings, of SDXL size ids) through the step of `train_lcm_distill_sd_wds.py` or its sisters for SDXL and LoRA, in f32 or under autocast where `meta.json` names a mixed
precision, and keeps its own optimiser, average and
weights, so that an error in any step shows in the ones after it. Prints the worst relative error of each quantity
(max |a - b| / max |b|) in each step and over all steps, then how far the final weights are apart relative to how far
they moved. Exit 1 over a tolerance or when something is not finite; 2 when the folder is incomplete.

`--drift` replays once more with the inputs' last bits changed and prints the same figures for PyTorch against
itself. Where they are over a tolerance too, the run amplifies rounding (high learning rates, a small `huber_c`), and
a difference from PyTorch says nothing about the other implementation.

`--first-step` leaves out the update and all that follows, and so the optimiser's memory; `--gradient-checkpointing`
recomputes the student's activations: both for real model sizes.
"""

import argparse
import itertools
import json
import math
import sys
from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers import DDPMScheduler, UNet2DConditionModel
from diffusers.optimization import get_scheduler
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file

from adamw8bit import AdamW8bit
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


def norm(tensors):
    """The global norm of tensors, summed in f64."""
    return math.sqrt(sum(torch.linalg.vector_norm(t, dtype=torch.float64).item() ** 2 for t in tensors))


def load_unet(folder):
    unet, info = UNet2DConditionModel.from_pretrained(folder, output_loading_info=True)
    for kind, keys in info.items():
        if keys:
            raise SystemExit(f"{folder}: {kind}: {keys}")
    return unet.float()


def load_teacher(meta):
    teacher = UNet2DConditionModel.from_pretrained(meta["teacher"], subfolder="unet").float()
    if meta.get("teacher_dtype", "f32") != "f32":
        held = {"f16": torch.float16, "bf16": torch.bfloat16}[meta["teacher_dtype"]]
        teacher = teacher.to(held).float()  # on the CPU coffey holds weights in 16 bits and computes in f32
    return teacher.requires_grad_(False)


def load_lora_student(meta):
    """The teacher's network with PEFT's adapters, as the reference makes it."""
    lora = meta["lora"]
    config = LoraConfig(
        r=lora["rank"], lora_alpha=lora["alpha"], lora_dropout=lora["dropout"], target_modules=lora["targets"]
    )
    return get_peft_model(load_teacher(meta), config)


def lora_weights(student):
    """The adapters' matrices by their names in diffusers' layout."""
    def name(key):
        return key.replace("base_model.model.", "unet.").replace(".default.", ".")

    return {name(key): value for key, value in student.named_parameters() if value.requires_grad}


def saved_weights(path):
    return load_file(path) if path.suffix == ".safetensors" else load_unet(path).state_dict()


class Distillation:
    """Teacher, student and target with the step of the reference, each number of it by its name there."""

    def __init__(self, meta, teacher, student, target):
        self.meta, self.teacher, self.student, self.target = meta, teacher, student, target
        self.noise_scheduler = DDPMScheduler.from_pretrained(meta["teacher"], subfolder="scheduler")
        config = self.noise_scheduler.config
        for key in ("prediction_type", "num_train_timesteps"):
            if config[key] != meta[key]:
                raise SystemExit(f"meta.json has {key} = {meta[key]}, the teacher's scheduler {config[key]}")
        # Autocast, as accelerate sets it up; on the CPU, too.
        half = {"no": None, "fp16": torch.float16, "bf16": torch.bfloat16}[meta.get("mixed_precision", "no")]
        self.autocast = torch.autocast("cpu", dtype=half or torch.bfloat16, enabled=half is not None)
        self.alphas = torch.sqrt(self.noise_scheduler.alphas_cumprod)
        self.sigmas = torch.sqrt(1 - self.noise_scheduler.alphas_cumprod)
        self.solver = DDIMSolver(
            self.noise_scheduler.alphas_cumprod.numpy(),
            timesteps=meta["num_train_timesteps"],
            ddim_timesteps=meta["num_ddim_timesteps"],
        )

    def predict(self, unet, x, t, prompt, added, w_embedding=None):
        with self.autocast:
            conditions = {"encoder_hidden_states": prompt, "added_cond_kwargs": added, "timestep_cond": w_embedding}
            output = unet(x, t, **conditions).sample
        return output.float()

    def added_conditions(self, given, bsz):
        """SDXL's pooled embeddings and size ids, as `train_lcm_distill_sdxl_wds.py` passes them; the ids are the same without caption."""
        if "time_ids" not in given:
            return None, None
        ids = given["time_ids"]
        uncond = given["uncond_pooled_prompt_embeds"].expand(bsz, -1)
        return {"text_embeds": given["pooled_prompt_embeds"], "time_ids": ids}, {"text_embeds": uncond, "time_ids": ids}

    def original_and_noise(self, output, t, sample):
        args = output, t, sample, self.meta["prediction_type"], self.alphas, self.sigmas
        return get_predicted_original_sample(*args), get_predicted_noise(*args)

    def boundary(self, t, ndim):
        scalings = scalings_for_boundary_conditions(t, self.meta["sigma_data"], self.meta["timestep_scaling"])
        return [append_dims(x, ndim) for x in scalings]

    def consistency(self, output, t, x, given):
        """The objective's prediction from a network's output at (x, t)."""
        pred_x_0, pred_noise = self.original_and_noise(output, t, x)
        objective = self.meta.get("objective", "lcm")
        if objective == "lcm":
            c_skip, c_out = self.boundary(t, x.ndim)
            return c_skip * x + c_out * pred_x_0
        # A DDIM step to the destination: equation 8 of the TCD paper, `ddim_step` of PCM's solver.
        destination = given[{"tcd": "tcd_s", "pcm": "pcm_edge"}[objective]]
        alpha = append_dims(self.noise_scheduler.alphas_cumprod[destination], x.ndim)
        return alpha.sqrt() * pred_x_0 + (1.0 - alpha).sqrt() * pred_noise

    def check_destination(self, given, index, end):
        """Refuses a destination that the objective's rule does not give."""
        if "tcd_s" in given:
            good = (given["tcd_s"] >= 0) & (given["tcd_s"] <= end)
            rule = "between 0 and the end of the teacher's step"
        elif "pcm_edge" in given:
            steps, phases = self.meta["num_ddim_timesteps"], self.meta["phases"]
            first = torch.tensor([max(j * steps // phases for j in range(phases) if j * steps // phases <= i) for i in index])
            before = self.solver.ddim_timesteps[(first - 1).clamp(min=0)]
            good = given["pcm_edge"] == torch.where(first > 0, before, 0)
            rule = "the timestep before the first of the phase"
        else:
            return
        if not good.all():
            raise SystemExit(f"a destination is not {rule}: {given}")

    def step(self, given):
        """x_prev, model_pred, target and loss for one micro-batch of recorded inputs."""
        meta = self.meta
        latents, noise, index, w = (given[k] for k in ("latents", "noise", "index", "w"))
        bsz, ndim = latents.shape[0], latents.ndim
        prompt = given["prompt_embeds"]
        uncond = given["uncond_prompt_embeds"].expand(bsz, -1, -1)
        added, uncond_added = self.added_conditions(given, bsz)

        start = self.solver.ddim_timesteps[index]
        end = start - meta["num_train_timesteps"] // meta["num_ddim_timesteps"]
        end = torch.where(end < 0, torch.zeros_like(end), end)
        self.check_destination(given, index, end)
        noisy = self.noise_scheduler.add_noise(latents, noise, start)
        width = meta["time_cond_proj_dim"]  # a LoRA's student is not told the guidance
        w_embedding = guidance_scale_embedding(w, embedding_dim=width) if width else None
        w = w.reshape(bsz, 1, 1, 1)

        noise_pred = self.predict(self.student, noisy, start, prompt, added, w_embedding)
        model_pred = self.consistency(noise_pred, start, noisy, given)

        with torch.no_grad():
            cond = self.predict(self.teacher, noisy, start, prompt, added)
            cond_x0, cond_noise = self.original_and_noise(cond, start, noisy)
            unconditional = self.predict(self.teacher, noisy, start, uncond, uncond_added)
            uncond_x0, uncond_noise = self.original_and_noise(unconditional, start, noisy)
            pred_x0 = cond_x0 + w * (cond_x0 - uncond_x0)
            pred_noise = cond_noise + w * (cond_noise - uncond_noise)
            x_prev = self.solver.ddim_step(pred_x0, pred_noise, index)

            target_pred = self.predict(self.target, x_prev.float(), end, prompt, added, w_embedding)
            target = self.consistency(target_pred, end, x_prev, given)
            if meta.get("objective") == "pcm":  # at the end of a phase the point itself, as in the reference
                target = torch.where(append_dims(end == given["pcm_edge"], ndim), x_prev, target)

        if meta["loss"] == "l2":
            loss = F.mse_loss(model_pred.float(), target.float(), reduction="mean")
        elif meta["loss"] == "huber":
            c = meta["huber_c"]
            loss = torch.mean(torch.sqrt((model_pred.float() - target.float()) ** 2 + c**2) - c)
        else:
            raise SystemExit(f"meta.json has loss = {meta['loss']!r}: neither l2 nor huber")
        return {"x_prev": x_prev, "model_pred": model_pred, "target": target, "loss": loss}


def replay(audit, meta, args, given=lambda recorded: recorded):
    """Makes the recorded steps again, from the inputs that `given` makes of the recorded ones.

    Yields (step, recorded, made) for each micro-batch, outputs by name; at last ("weights", None, {folder: weights}).
    """
    is_lora = meta.get("lora") is not None
    if is_lora:
        student = target = load_lora_student(meta)
        initial, weights = load_file(audit / "lora_init.safetensors"), lora_weights(student)
        if initial.keys() != weights.keys():
            raise SystemExit(f"lora_init.safetensors and PEFT differ in {sorted(initial.keys() ^ weights.keys())}")
        for name, weight in weights.items():
            weight.data.copy_(initial[name])
    else:
        student, target = load_unet(audit / "unet_init"), load_unet(audit / "unet_init")
        target.requires_grad_(False)
        if student.config.time_cond_proj_dim != meta["time_cond_proj_dim"]:
            raise SystemExit(f"unet_init has time_cond_proj_dim = {student.config.time_cond_proj_dim}")
    student.train()
    if args.gradient_checkpointing:
        student.enable_gradient_checkpointing()
    distillation = Distillation(meta, load_teacher(meta), student, target)
    trained = [parameter for parameter in student.parameters() if parameter.requires_grad]
    # A loss scale by which no gradient of the first steps vanishes or overflows.
    loss_scale = 65536 if meta.get("mixed_precision") == "fp16" else 1
    optimizer = {"adamw": torch.optim.AdamW, "adamw8bit": AdamW8bit}[meta.get("optimizer", "adamw")](
        trained,
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
        for micro in range(micro_batches):
            recorded = load_file(audit / f"step-{step:06}.{micro:02}.safetensors")
            made = distillation.step(given(recorded))
            (made["loss"] * loss_scale / micro_batches).backward()
            made = {name: value.detach() for name, value in made.items()}
            if micro + 1 == micro_batches:
                for parameter in trained:
                    parameter.grad /= loss_scale
                # Summed in f64: clip_grad_norm_ adds the squares of a tensor in f32, which at SD-1.5's sizes costs 1e-4.
                made["grad_norm"] = norm(parameter.grad for parameter in trained)
                torch.nn.utils.clip_grad_norm_(trained, meta["max_grad_norm"])
                made["lr"] = lr_scheduler.get_last_lr()[0]  # the rate this step is made with
            yield step, recorded, made
        if args.first_step:
            return
        optimizer.step()
        lr_scheduler.step()
        optimizer.zero_grad(set_to_none=True)
        if not is_lora:
            update_ema(target.parameters(), student.parameters(), meta["ema_decay"])
    if is_lora:
        yield "weights", None, {"lora_final.safetensors": lora_weights(student)}
    else:
        yield "weights", None, {"unet_final": student.state_dict(), "unet_target_final": target.state_dict()}


def nudged(recorded):
    """The inputs with other last bits."""
    rng = torch.Generator().manual_seed(1)

    def nudge(tensor):
        return tensor * (1 + 1e-7 * torch.randn(tensor.shape, generator=rng))

    return recorded | {name: nudge(recorded[name]) for name in ("latents", "noise", "prompt_embeds")}


def larger(a, b):
    """The maximum; NaN if one is."""
    return a if a != a or a > b else b


def table(steps):
    """Prints the worst error of each quantity in each step, from (step, recorded, made); returns the worst of all."""
    print("step    " + "".join(f"{name:>12}" for name in QUANTITIES))

    def row(label, worst):
        print(f"{label:<8}" + "".join(f"{worst[name]:>12.2e}" for name in QUANTITIES), flush=True)

    overall = dict.fromkeys(QUANTITIES, 0.0)
    for step, parts in itertools.groupby(steps, key=lambda part: part[0]):
        worst = dict.fromkeys(QUANTITIES, 0.0)
        for _, recorded, made in parts:
            for name, value in made.items():
                worst[name] = larger(relative(recorded[name], value), worst[name])
        row(step, worst)
        overall = {name: larger(worst[name], overall[name]) for name in QUANTITIES}
    row("worst", overall)
    return overall


def apart(ours, replayed, start):
    """Distance of two sets of weights, relative to the way the second has come from `start`."""

    def distance(a, b):
        return sum((a[k] - b[k]).double().square().sum() for k in b).sqrt().item()

    moved = distance(start, replayed)
    return distance(ours, replayed) / moved if moved else float("inf")


def compare(audit, meta, args):
    """Prints all figures; whether those of the recorded run are within the tolerances."""
    made, finals = [], {}

    def steps():
        for step, recorded, outputs in replay(audit, meta, args):
            if step == "weights":
                finals.update(outputs)
            else:
                made.append(outputs)
                yield step, recorded, outputs

    good = all(error <= args.tolerance for error in table(steps()).values())
    init = "unet_init" if meta.get("lora") is None else "lora_init.safetensors"
    start = saved_weights(audit / init) if finals else {}
    for folder, replayed in finals.items():
        error = apart(saved_weights(audit / folder), replayed, start)
        good &= error <= args.weights_tolerance
        print(f"{folder}: {error:.2e} of the way apart (allowed {args.weights_tolerance:g})")
    if args.drift:
        print("PyTorch against itself, inputs changed by 1e-7:")
        again, first = [], iter(made)
        for step, _, outputs in replay(audit, meta, args, nudged):
            if step == "weights":
                weights = {folder: apart(finals[folder], replayed, start) for folder, replayed in outputs.items()}
            else:
                again.append((step, next(first), outputs))
        table(again)
        for folder in finals:
            print(f"{folder}: {weights[folder]:.2e} of the way apart")
    return good


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("audit", type=Path)
    parser.add_argument("--teacher", help="the teacher's pipeline folder, instead of the one in meta.json")
    parser.add_argument("--tolerance", type=float, default=1e-4, help="for every quantity of a step")
    parser.add_argument("--weights-tolerance", type=float, default=0.01, help="for the final weights")
    parser.add_argument("--drift", action="store_true", help="what rounding alone does to this run")
    parser.add_argument("--first-step", action="store_true", help="only the first step's quantities")
    parser.add_argument("--gradient-checkpointing", action="store_true", help="of the student, to save memory")
    args = parser.parse_args()

    try:
        meta = json.loads((args.audit / "meta.json").read_text())
        if args.teacher:
            meta["teacher"] = args.teacher
        good = compare(args.audit, meta, args)
        print(f"{'same numbers' if good else 'DIFFERENT'} (allowed {args.tolerance:g})")
        return 0 if good else 1
    except (OSError, KeyError) as fault:
        print(f"{args.audit} is not a complete audit folder: {type(fault).__name__}: {fault}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
