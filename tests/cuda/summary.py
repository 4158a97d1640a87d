#!/usr/bin/env python3
"""The answers of tests/cuda/on_gpu.sh as Markdown, out of its logs: tests/cuda/summary.py LOGS"""

import json
import re
import sys
from pathlib import Path

results = Path(sys.argv[1])


def text(name):
    path = results / name
    return path.read_text(errors="replace") if path.exists() else ""


def lines(name):
    return [json.loads(line) for line in text(name).splitlines() if line.startswith("{")]


def found(pattern, name, missing="not run to its end"):
    matches = re.findall(pattern, text(name), re.M)
    return matches[-1] if matches else missing


def table(head, rows):
    for row in (head, ["---"] * len(head), *rows):
        print("|", " | ".join(map(str, row)), "|")
    print()


def number(value, digits=3):
    return "" if value is None else f"{value:.{digits}g}"


def answers():
    replays, twice = lines("replays.jsonl"), lines("twice.jsonl")
    yield "operations, against the CPU's", found(r"^test result: (.*?);", "unit-tests.log")
    exact = found(r"^(\d+ cases are as exact as PyTorch)", "operations.log", "")
    worse = len(re.findall(r"^.*: (?:out|grad\.\d) \S+, PyTorch's", text("operations.log"), re.M))
    yield "operations, against PyTorch's", exact or (f"{worse} results less exact" if worse else "not run to its end")
    yield "steps, replayed by PyTorch", ", ".join(f"{r['what'].removeprefix('replay, ')} {'right' if r['right'] else 'WRONG'}" for r in replays) or "not run"
    for run in twice:
        how = f"the same in {run['steps'][0]} steps" if run["same"] else f"DIFFERENT from step {run['different_from']} ({run['steps']} steps)"
        yield run["what"], how


def training():
    steps = {row["what"]: row for row in lines("coffey.jsonl")}
    theirs = [row for row in lines("pytorch.jsonl") if row["what"] == "step"]
    for name, row in steps.items():
        if name == "traced":
            continue
        how = "no steps" if "failed" in row else number(row["seconds"])
        yield "coffey", f"{name}, from {row['source']}", how, number(row.get("peak_gib"))
    for row in theirs:
        name = row["dtype"].removeprefix("torch.").replace("bfloat16", "bf16").replace("float16", "fp16")
        name += "" if row["checkpointing"] else "-kept"
        yield "PyTorch", f"{name}, from latents" + (", channels last" if row["channels_last"] else ""), number(row["seconds"]), number(row["peak_gib"])


def images():
    for name in ("bf16", "f32"):
        # The last line of a run; where it was stopped, the last report of its progress.
        whole = found(r" in ([\d.]+) s: (\d+) samples", f"precompute-{name}.log", None)
        rate = number(int(whole[1]) / float(whole[0])) if whole else found(r"([\d.]+) samples/s", f"precompute-{name}.log")
        yield "coffey precompute", name, rate
    for row in lines("pytorch.jsonl"):
        if row["what"] == "VAE encode":
            yield "PyTorch, VAE alone", row["dtype"].removeprefix("torch.") + (", channels last" if row["channels_last"] else ""), number(row["images_per_second"])


def kernels():
    """The last whole step of the trace: milliseconds, calls, name."""
    steps = re.findall(r"^--- a step.*?\n(.*?)(?=^---|\Z)", text("trace.txt"), re.M | re.S)
    for line in (steps[-1] if steps else "").splitlines()[:15]:
        if match := re.match(r"\s*([\d.]+) ms\s+(\d+) x (\S.*?)\s*(?:[\d.]+ G)?$", line):
            yield match.groups()


table(["is it right?", ""], answers())
table(["a step, 512 x 512, batch 12", "setting", "seconds", "peak GiB on the card"], training())
table(["images a second, 512 x 512", "type", ""], images())
for kind in ("training", "encoding"):
    print(found(rf"^({kind} on .*)", "fp16.log" if kind == "training" else "precompute-bf16.log", ""))
print()
table(["ms of a traced step", "calls", "kernel"], kernels())
for row in lines("pytorch.jsonl"):
    if "failed" in row or row["what"] in ("versions", "matrix product, bf16", "copy"):
        print(json.dumps(row))
