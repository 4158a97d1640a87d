#!/usr/bin/env python3
"""PyTorch's results of every operation of src/ops that a step uses, at Stable Diffusion 1.5's shapes: operands, result and gradients.

    tests/cuda/pytorch_ops.py OUT [--tiny]      # --tiny: small shapes, as on a machine without a GPU

The unit test `operations_equal_pytorch` runs it and compares. OUT gets a NAME.safetensors for each case (`input.N`, `direction`, and in
f32 what f64 gives for the rounded operands: `out`, `grad.N`) and cases.json, with the error of PyTorch's own result in the case's
type: the largest difference from f64 over the largest number, for `out` and each `grad.N`. The gradients are those of Σ out·direction."""

import argparse
import json
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import save_file

parser = argparse.ArgumentParser()
parser.add_argument("out", type=Path)
parser.add_argument("--tiny", action="store_true")
args = parser.parse_args()
args.out.mkdir(parents=True, exist_ok=True)
tiny = args.tiny or not torch.cuda.is_available()
device = "cpu" if tiny else "cuda"
# f32 is f32.
torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False


def attention(heads, causal):
    def compute(q, k, v):
        q, k, v = (x.unflatten(2, (heads, -1)).transpose(1, 2) for x in (q, k, v))
        return F.scaled_dot_product_attention(q, k, v, is_causal=bool(causal)).transpose(1, 2).flatten(2)

    return compute


def geglu(x):
    value, gate = x.chunk(2, dim=-1)
    return value * F.gelu(gate)


def tokens_to_map(height, width):
    return lambda x, weight, bias: F.conv2d(x.transpose(1, 2).unflatten(2, (height, width)), weight, bias)


def cases():
    """Name, operation and its numbers as the test takes them, shapes of the operands, and the operation."""

    def attend(name, batch, queries, keys, heads, width, causal=0):
        operands = [[batch, n, heads * width] for n in (queries, keys, keys)]
        return f"attention {name}", ["attention", heads, causal], operands, attention(heads, causal)

    def conv(name, batch, inputs, outputs, size, kernel=3, stride=1, padding=1):
        operands = [[batch, inputs, size, size], [outputs, inputs, kernel, kernel], [outputs]]
        compute = lambda x, w, b: F.conv2d(x, w, b, stride=stride, padding=padding)  # noqa: E731
        return f"conv2d {name}", ["conv2d", stride, padding], operands, compute

    def group(name, shape, silu, groups=32):
        def compute(x, weight, bias):
            y = F.group_norm(x, groups, weight, bias, 1e-5)
            return F.silu(y) if silu else y

        return f"group_norm {name}", ["group_norm", groups, silu], [shape, [shape[1]], [shape[1]]], compute

    def linear(name, shape, outputs, bias=True):
        operands = [shape, [outputs, shape[-1]]] + [[outputs]] * bias
        return f"linear {name}", ["linear"], operands, F.linear

    b, side, c, text = (2, 6, 64, 20) if tiny else (1, 64, 320, 768)
    n = side * side
    yield attend("40", b, n, n, 2 if tiny else 8, 40)
    yield attend("40, text", b, n, 77, 2 if tiny else 8, 40)
    yield attend("64", b, n // 4, n // 4, 2 if tiny else 10, 64)
    yield attend("80", b, n // 4, n // 4, 2 if tiny else 8, 80)
    yield attend("160, text", b, n // 16, 77, 2 if tiny else 8, 160)
    yield attend("causal", b, 77, 77, 2 if tiny else 12, 64, causal=1)
    yield attend("of the VAE", 1, n, n, 1, 512)
    yield conv("3x3", b, c, c, side)
    yield conv("3x3, coarse", b, 4 * c, 4 * c, 8)
    yield conv("first", b, 4, c, side)
    yield conv("last", b, c, 4, side)
    yield conv("stride 2", b, c, c, side, stride=2)
    yield conv("stride 2 of the VAE", 1, c, c, side + 1, stride=2, padding=0)
    yield conv("1x1", b, 3 * c, 2 * c, side // 2, kernel=1, padding=0)
    yield group("with SiLU", [b, c, side, side], 1)
    yield group("coarse", [b, 4 * c, 8, 8], 0)
    yield "layer_norm", ["layer_norm"], [[b, n, c], [c], [c]], lambda x, w, bias: F.layer_norm(x, [c], w, bias, 1e-5)
    yield linear("wide", [b, n, c], 8 * c)
    yield linear("of the text", [b, 77, text], c, bias=False)
    yield linear("time", [b, 4 * c], 4 * c)
    yield "geglu", ["geglu"], [[b, n, 8 * c]], geglu
    yield "silu", ["silu"], [[b, 4 * c]], F.silu
    yield "gelu", ["gelu"], [[b, 77, 4 * text]], F.gelu
    yield "quick_gelu", ["quick_gelu"], [[b, 77, 4 * text]], lambda x: x * torch.sigmoid(1.702 * x)
    yield "upsample_nearest_2x", ["upsample_nearest_2x"], [[b, c, side // 2, side // 2]], lambda x: F.interpolate(x, scale_factor=2.0, mode="nearest")
    yield "add", ["add"], [[b, n, c]] * 2, torch.add
    yield "add_to_rows", ["add_to_rows"], [[b, n, c], [c]], torch.add
    yield "concatenate", ["concatenate"], [[b, 2 * c, side, side], [b, c, side, side]], lambda x, y: torch.cat((x, y), 1)
    square = [c, c, 1, 1]
    yield "map_to_tokens", ["map_to_tokens"], [[b, c, side, side], square, [c]], lambda x, w, bias: F.conv2d(x, w, bias).flatten(2).transpose(1, 2)
    yield "tokens_to_map", ["tokens_to_map", side, side], [[b, n, c], square, [c]], tokens_to_map(side, side)


def operand(shape, index):
    x = torch.randn(shape, device=device)
    # Weights keep the size of what they are applied to.
    return x / x[0].numel() ** 0.5 if index == 1 and len(shape) in (2, 4) else x


def run(compute, operands, direction):
    operands = [x.detach().requires_grad_() for x in operands]
    out = compute(*operands)
    if direction is None:
        direction = torch.randn_like(out)
    out.backward(direction.to(out.dtype))
    return [out.detach(), *(x.grad for x in operands)], direction


index = []
for number, (name, operation, shapes, compute) in enumerate(cases()):
    torch.manual_seed(number)
    operands = [operand(shape, i) for i, shape in enumerate(shapes)]
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        rounded = [x.to(dtype) for x in operands]
        own, direction = run(compute, rounded, None)
        exact, _ = run(compute, [x.double() for x in rounded], direction)
        errors = [((a.double() - b).abs().max() / b.abs().max().clamp_min(1e-30)).item() for a, b in zip(own, exact)]
        names = ["out", *(f"grad.{i}" for i in range(len(rounded)))]
        tensors = {f"input.{i}": x for i, x in enumerate(rounded)} | {"direction": direction}
        tensors |= {key: x.float() for key, x in zip(names, exact)}
        kind = str(dtype).removeprefix("torch.")
        file = f"{number}-{kind}.safetensors"
        save_file({key: x.contiguous().cpu() for key, x in tensors.items()}, args.out / file)
        index.append(dict(name=f"{name}, {kind}", operation=operation[0], numbers=operation[1:], file=file, errors=errors))
    if device == "cuda":
        torch.cuda.empty_cache()
(args.out / "cases.json").write_text(json.dumps(index, indent=1))
