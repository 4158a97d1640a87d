"""Reads the shards of `coffey pack` as a user would, with webdataset, and compares them with the folder.

    python read_packed.py FOLDER SHARDS

Every `x.png` of FOLDER with an `x.txt` beside it must be one sample, in the order of the paths without extension.
"""

import hashlib
import json
import pathlib
import sys

import webdataset as wds


def main():
    folder, shards = map(pathlib.Path, sys.argv[1:])
    images = sorted(folder.rglob("*.png"), key=lambda path: str(path.with_suffix("")))
    images = [path for path in images if path.with_suffix(".txt").exists()]
    urls = sorted(str(path) for path in shards.glob("*.tar"))
    samples = list(wds.WebDataset(urls, shardshuffle=False))
    assert len(images) == len(samples) > 0, (len(images), len(samples))
    for path, sample in zip(images, samples):
        content = path.read_bytes()
        fields = json.loads(sample["json"])
        assert sample["png"] == content, path
        assert sample["txt"] == path.with_suffix(".txt").read_bytes(), path
        assert fields["key"] == sample["__key__"] and len(sample["__key__"]) == 9, fields
        assert fields["caption"] == sample["txt"].decode(), fields
        assert fields["sha256"] == hashlib.sha256(content).hexdigest(), fields
        assert fields["url"] == str(path.relative_to(folder)), fields
        for key in ["width", "height", "original_width", "original_height"]:
            assert isinstance(fields[key], int), fields
        assert fields["status"] == "success" and fields["error_message"] is None, fields
    print(f"read {len(samples)} samples of {len(urls)} shards with webdataset {wds.__version__}")


main()
