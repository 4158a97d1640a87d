"""Loads a run's TensorBoard events as TensorBoard does, and compares them with the run's other files.

    python read_events.py RUN_DIR

Each line of `metrics.jsonl` must be there once, under each tag, each grid of `samples/` byte for byte, and
`config.toml` as the newest text. What is doubled is looked for in the files themselves, before TensorBoard leaves out
what a resumed run replaces.
"""

import glob
import json
import os
import re
import sys
from collections import Counter

import numpy as np
from tensorboard.backend.event_processing import event_accumulator
from tensorboard.backend.event_processing.event_file_loader import LegacyEventFileLoader
from tensorboard.util import tensor_util

ALWAYS = ["grad_norm", "loss", "lr", "samples_per_second"]


def main():
    (run,) = sys.argv[1:]
    with open(os.path.join(run, "metrics.jsonl")) as file:
        lines = [json.loads(line) for line in file]
    assert lines, f"{run}: no steps"

    files = sorted(glob.glob(os.path.join(run, "events.out.tfevents.*")))
    seen = Counter()
    for path in files:
        for event in LegacyEventFileLoader(path).Load():
            for value in event.summary.value:
                seen[value.tag, event.step] += 1
                assert event.wall_time > 1.7e9, f"{path}: {event.wall_time}"
    doubled = [key for key, count in seen.items() if count > 1]
    assert not doubled, f"more than once: {doubled}"

    everything = {event_accumulator.SCALARS: 0, event_accumulator.IMAGES: 0, event_accumulator.TENSORS: 0}
    events = event_accumulator.EventAccumulator(run, size_guidance=everything)
    events.Reload()
    tags = events.Tags()

    wanted = {tag: [line for line in lines if tag in line] for tag in [*ALWAYS, "endpoint_error"]}
    wanted = {tag: of for tag, of in wanted.items() if of}
    assert sorted(tags["scalars"]) == sorted(wanted), tags["scalars"]
    for tag, of in wanted.items():
        scalars = events.Scalars(tag)
        assert [s.step for s in scalars] == [line["step"] for line in of], f"{tag}: {[s.step for s in scalars]}"
        for scalar, line in zip(scalars, of):
            assert np.float32(scalar.value) == np.float32(line[tag]), f"{tag}: {scalar}, {line}"

    grids = {}
    for path in glob.glob(os.path.join(run, "samples", "step-*.png")):
        step, name = re.fullmatch(r"step-(\d+)-(\w+)\.png", os.path.basename(path)).groups()
        with open(path, "rb") as file:
            grids[f"validation/{name}", int(step)] = file.read()
    assert {tag for tag, _ in grids} == set(tags["images"]), tags["images"]
    for tag in tags["images"]:
        images = events.Images(tag)
        assert [i.step for i in images] == sorted(step for other, step in grids if other == tag), tag
        for image in images:
            png = grids[tag, image.step]
            assert image.encoded_image_string == png, f"{tag} of step {image.step}"
            size = int.from_bytes(png[16:20], "big"), int.from_bytes(png[20:24], "big")
            assert (image.width, image.height) == size

    assert tags["tensors"] == ["configuration"], tags["tensors"]
    assert events.SummaryMetadata("configuration").plugin_data.plugin_name == "text"
    texts = events.Tensors("configuration")
    newest = tensor_util.make_ndarray(texts[-1].tensor_proto).item().decode()
    with open(os.path.join(run, "config.toml")) as file:
        assert [line[4:] for line in newest.splitlines()] == file.read().splitlines()
    print(f"{len(lines)} steps, {len(grids)} grids, {len(texts)} texts in {len(files)} files")


if __name__ == "__main__":
    main()
