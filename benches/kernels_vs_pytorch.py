"""The operations of a training step one by one: `coffey::ops` against PyTorch, on this machine's CPU, in one run.

    python benches/kernels_vs_pytorch.py [--threads 2] [--rounds 3] [--seconds 0.3] [--only WORD] [--out FILE.json]

Run it from the repository's root, with the packages of `tests/reference/requirements.txt`. The shapes are those of
`kernels.json`. Both sides alternate, each time in a new process that spends `--seconds` on each shape: a forward
pass that records a graph, then the backward pass to all operands, in f32. A figure is the median over the rounds of
the medians. Columns: milliseconds of both, coffey's speed divided by PyTorch's (above 1: coffey is faster) and, for
operations that are mostly multiplications, GFLOP/s of both (2 for a multiply-add; a backward pass counts as two forward).
"""

import argparse
import json
import math
import os
import platform
import statistics
import subprocess
import sys
import time
from pathlib import Path

HERE = Path(__file__).resolve().parent


def flops(case):
    """Floating-point operations of one forward pass; none for operations bound by memory."""
    c = case
    match c["kind"]:
        case "conv2d":
            pixels = math.ceil(c["side"] / c["stride"]) ** 2
            return 2 * c["batch"] * pixels * c["channels"] * c["out"] * c["kernel"] ** 2
        case "linear":
            return 2 * c["rows"] * c["width"] * c["out"]
        case "attention":
            return 4 * c["batch"] * c["heads"] * c["queries"] * c["keys"] * c["head_width"]
    return None


def pytorch_case(case):
    """Shapes of the operands, and the operation as in diffusers."""
    import torch.nn.functional as F

    c = case
    match c["kind"]:
        case "conv2d":
            kernel = c["kernel"]
            shapes = (c["batch"], c["channels"], c["side"], c["side"]), (c["out"], c["channels"], kernel, kernel)
            return (*shapes, (c["out"],)), lambda x, w, b: F.conv2d(x, w, b, c["stride"], kernel // 2)
        case "linear":
            return ((c["rows"], c["width"]), (c["out"], c["width"]), (c["out"],)), F.linear
        case "attention":
            batch, heads, width = c["batch"], c["heads"], c["head_width"]

            def attention(*qkv):
                q, k, v = (x.view(batch, -1, heads, width).transpose(1, 2) for x in qkv)
                return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(batch, -1, heads * width)

            return [(batch, n, heads * width) for n in (c["queries"], c["keys"], c["keys"])], attention
        case "group_norm_silu":
            x = c["batch"], c["channels"], c["side"], c["side"]
            return (x, x[1:2], x[1:2]), lambda x, w, b: F.silu(F.group_norm(x, c["groups"], w, b, 1e-5))
        case "layer_norm":
            width = (c["width"],)
            return ((c["rows"], c["width"]), width, width), lambda x, w, b: F.layer_norm(x, width, w, b, 1e-5)
        case "geglu":

            def geglu(x):
                hidden, gate = x.chunk(2, dim=-1)
                return hidden * F.gelu(gate)

            return [(c["rows"], 2 * c["width"])], geglu
    raise SystemExit(f"unknown kind in kernels.json: {c['kind']}")


def pytorch(args):
    """PyTorch's side: prints a JSON line for each case."""
    import torch

    torch.set_num_threads(args.threads)
    for case in cases(args):
        shapes, operation = pytorch_case(case)
        operands = [(0.1 * torch.randn(shape)).requires_grad_() for shape in shapes]
        ones = torch.ones_like(operation(*operands))
        forward, backward, begun = [], [], None
        while begun is None or time.perf_counter() - begun < args.seconds or len(forward) < 3:
            for operand in operands:
                operand.grad = None
            start = time.perf_counter()
            y = operation(*operands)
            middle = time.perf_counter()
            y.backward(ones)
            end = time.perf_counter()
            if begun:
                forward.append(middle - start)
                backward.append(end - middle)
            begun = begun or end  # the first pass warms up
        seconds = {"forward": statistics.median(forward), "backward": statistics.median(backward)}
        print(json.dumps({"name": case["name"], **seconds}), flush=True)


def cases(args):
    return [case for case in json.loads((HERE / "kernels.json").read_text()) if args.only in case["name"]]


def bench_binary():
    """Builds coffey's side and returns its path."""
    command = ["cargo", "build", "--release", "--locked", "--bench", "kernels", "--message-format=json"]
    built = subprocess.run(command, cwd=HERE.parent, stdout=subprocess.PIPE, check=True)
    messages = [json.loads(line) for line in built.stdout.splitlines()]
    return next(m["executable"] for m in messages if m.get("executable") and m["target"]["name"] == "kernels")


def lines(command, threads):
    variables = dict.fromkeys(("RAYON_NUM_THREADS", "OMP_NUM_THREADS", "MKL_NUM_THREADS"), str(threads))
    done = subprocess.run(list(map(str, command)), env=os.environ | variables, stdout=subprocess.PIPE, check=True)
    return {line["name"]: line for line in map(json.loads, done.stdout.splitlines())}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=2, help="compute threads of each side")
    parser.add_argument("--rounds", type=int, default=3, help="runs of each side")
    parser.add_argument("--seconds", type=float, default=0.3, help="time of each case in each run")
    parser.add_argument("--only", default="", help="only cases whose name contains this")
    parser.add_argument("--binary", type=Path, help="a built `kernels` bench, instead of building it")
    parser.add_argument("--out", type=Path, help="JSON file for all figures")
    parser.add_argument("--pytorch", action="store_true", help=argparse.SUPPRESS)  # the PyTorch process itself
    args = parser.parse_args()
    if args.pytorch:
        pytorch(args)
        return
    chosen = cases(args)
    if not chosen:
        parser.error(f"no case of kernels.json has {args.only!r} in its name")
    load = os.getloadavg()[0]
    if load > 0.5:
        print(f"warning: the machine is busy (load {load:.1f}): the figures are unreliable", file=sys.stderr)
    both = ["--seconds", args.seconds, f"--only={args.only}"]
    sides = {
        "coffey": [args.binary or bench_binary(), *both],
        "PyTorch": [sys.executable, Path(__file__), "--pytorch", "--threads", args.threads, *both],
    }
    rounds = {side: [] for side in sides}
    for turn in range(1, args.rounds + 1):
        for side, command in sides.items():
            print(f"round {turn} of {args.rounds}: {side}", file=sys.stderr)
            rounds[side].append(lines(command, args.threads))

    report = []
    print(f"{'':32}{'forward':^40}{'backward':^40}")
    print(f"{'':32}" + f"{'ms':>8}{'PyTorch':>8}{'speed':>7}{'GFLOP/s':>9}{'PyTorch':>8}" * 2)
    for case in chosen:
        row = {"name": case["name"]}
        text = f"{case['name']:32}"
        for direction, factor in (("forward", 1), ("backward", 2)):
            ours, theirs = (
                statistics.median(turn[case["name"]][direction] for turn in rounds[side]) for side in sides
            )
            work = flops(case)
            rates = [factor * work / seconds / 1e9 if work else None for seconds in (ours, theirs)]
            row[direction] = {
                "seconds": {"coffey": ours, "PyTorch": theirs},
                "speed": theirs / ours,
                "gflops": dict(zip(sides, rates)),
            }
            text += f"{1e3 * ours:>8.2f}{1e3 * theirs:>8.2f}{theirs / ours:>7.2f}"
            text += "".join(f"{rate:>{width}.0f}" if rate else " " * width for rate, width in zip(rates, (9, 8)))
        print(text)
        report.append(row)
    if args.out:
        machine = {"cpus": os.cpu_count(), "arch": platform.machine(), "load_at_start": load}
        settings = {"threads": args.threads, "rounds": args.rounds, "seconds": args.seconds}
        args.out.write_text(json.dumps({"machine": machine, **settings, "kernels": report}, indent=2) + "\n")


if __name__ == "__main__":
    main()
