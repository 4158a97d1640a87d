"""AdamW with moments in 8 bits, by bitsandbytes' formulas, and the golden file of its unit test.

    python adamw8bit.py OUT.safetensors

The file holds what seven steps make of a parameter:

`map.signed`, `map.unsigned` [256]: the dynamic maps of bitsandbytes' `create_dynamic_map`.
`param` [4500], `exp_avg`, `exp_avg_sq` [4500] u8, `exp_avg_absmax`, `exp_avg_sq_absmax` [18]: after the last step.

The formulas are those of bitsandbytes 0.50 (`create_dynamic_map`, `optimizer_update_8bit_blockwise_pytorch`), written
anew: over these steps both make the same bits. Gradients and the starting point come from a counter, so that a test can make them, too.
"""

import math
import sys

import torch
import torch.nn.functional as F
from safetensors.torch import save_file

N, BLOCK = 4500, 256


def dynamic_map(signed):
    """256 values in [-1, 1] or [0, 1]: seven decades, each twice as finely divided as the one below it."""
    values = [0.0, 1.0]
    for decade in range(7):
        items = 2**decade if signed else 2 ** (decade + 1)
        ends = torch.linspace(0.1, 1, items + 1, dtype=torch.float32)
        means = 10 ** (decade - 6) * ((ends[:-1] + ends[1:]) / 2)
        values += means.tolist() + ((-means).tolist() if signed else [])
    return torch.tensor(sorted(values), dtype=torch.float32)


def counted(step):
    """Numbers in [-0.5, 0.5) with 24 bits, whose size differs from block to block."""
    i = torch.arange(N, dtype=torch.int64)
    bits = ((i + 1) * 2654435761 + step * 40503 * 65536) % 2**32
    bits = bits ^ (bits >> 15)
    scale = 2.0 ** -(i // BLOCK % 12).float()
    return ((bits >> 8).float() / 2**24 - 0.5) * scale


def quantise(x, values):
    """Codes [n] and scales [blocks]."""
    n = x.numel()
    blocks = F.pad(x.flatten(), (0, -n % BLOCK)).reshape(-1, BLOCK)
    absmax = blocks.abs().amax(1)
    scaled = torch.where(absmax[:, None] > 0, blocks / absmax[:, None], 0)
    middle = (values[1:] + values[:-1]) / 2
    return torch.searchsorted(middle, scaled).to(torch.uint8).flatten()[:n], absmax


def dequantise(codes, absmax, values):
    return values[codes.long()] * absmax.repeat_interleave(BLOCK)[: codes.numel()]


class AdamW8bit(torch.optim.Optimizer):
    """Parameters below 4096 elements keep their moments in f32."""

    SIGNED, UNSIGNED = dynamic_map(True), dynamic_map(False)

    def __init__(self, params, lr, betas, weight_decay, eps):
        super().__init__(params, {"lr": lr, "betas": betas, "weight_decay": weight_decay, "eps": eps})

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            for param in group["params"]:
                self.update(param, group, self.state[param])

    def update(self, param, group, state):
        (beta1, beta2), lr, n = group["betas"], group["lr"], param.numel()
        step = state["step"] = state.get("step", 0) + 1
        small = n < 4096
        if step == 1:
            m, v = torch.zeros(n), torch.zeros(n)
        elif small:
            m, v = state["moments"]
        else:
            coded = zip(state["moments"], (self.SIGNED, self.UNSIGNED))
            m, v = (dequantise(*kept, values) for kept, values in coded)
        grad = param.grad.flatten()
        m.mul_(beta1).add_(grad, alpha=1 - beta1)
        v.mul_(beta2).addcmul_(grad, grad, value=1 - beta2)
        denominator = (v.sqrt() / math.sqrt(1 - beta2**step)).add_(group["eps"])
        param.mul_(1 - lr * group["weight_decay"])
        param.view(-1).addcdiv_(m, denominator, value=-lr / (1 - beta1**step))
        state["moments"] = (m, v) if small else [quantise(m, self.SIGNED), quantise(v, self.UNSIGNED)]


def main():
    param = torch.nn.Parameter(counted(0))
    optimizer = AdamW8bit([param], lr=1e-3, betas=(0.9, 0.999), weight_decay=0.01, eps=1e-8)
    for step in range(1, 8):
        param.grad = counted(step)
        optimizer.step()
    first, second = optimizer.state[param]["moments"]
    save_file(
        {
            "map.signed": AdamW8bit.SIGNED,
            "map.unsigned": AdamW8bit.UNSIGNED,
            "param": param.detach(),
            "exp_avg": first[0],
            "exp_avg_absmax": first[1],
            "exp_avg_sq": second[0],
            "exp_avg_sq_absmax": second[1],
        },
        sys.argv[1],
    )


if __name__ == "__main__":
    main()
