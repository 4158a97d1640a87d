"""Load a UNet folder in real diffusers and compare one forward pass.

    python check_unet.py UNET_DIR FORWARD.safetensors [--tolerance 1e-4]

FORWARD holds the inputs `sample` [B,4,h,w], `timestep` [B] (i64 or f32), `encoder_hidden_states` [B,T,C] and, for
a student, `timestep_cond` [B,D], for SDXL `text_embeds` [B,P] and `time_ids` [B,6], and the `output` [B,4,h,w] to compare with. Fails (exit 1) when a tensor of the
folder is missing or unexpected, or when the output differs by more than the tolerance, relative to its largest value.
"""

import argparse
import sys
from pathlib import Path

import torch
from diffusers import UNet2DConditionModel
from safetensors.torch import load_file


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("unet", type=Path)
    parser.add_argument("forward", type=Path)
    parser.add_argument("--tolerance", type=float, default=1e-4)
    args = parser.parse_args()

    unet, info = UNet2DConditionModel.from_pretrained(args.unet, output_loading_info=True)
    faults = [f"{kind}: {', '.join(map(str, keys))}" for kind, keys in info.items() if keys]
    if faults:
        print(f"{args.unet} does not load cleanly\n" + "\n".join(faults))
        return 1

    given = load_file(args.forward)
    condition = given.get("timestep_cond")
    if (condition is None) != (unet.config.time_cond_proj_dim is None):
        there = "absent" if condition is None else "given"
        print(f"time_cond_proj_dim is {unet.config.time_cond_proj_dim}, but timestep_cond is {there} in {args.forward}")
        return 1
    with torch.no_grad():
        inputs = given["sample"], given["timestep"], given["encoder_hidden_states"]
        added = {name: given[name] for name in ("text_embeds", "time_ids") if name in given}
        output = unet.float().eval()(*inputs, timestep_cond=condition, added_cond_kwargs=added or None).sample
    error = ((output - given["output"]).abs().max() / output.abs().max()).item()
    good = error <= args.tolerance  # false for NaN
    verdict = "within" if good else "over"
    print(f"{len(unet.state_dict())} tensors, worst relative error {error:.2e} ({verdict} {args.tolerance:g})")
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
