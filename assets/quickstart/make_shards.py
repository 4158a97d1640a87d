"""Make the quickstart's shards: Noto emoji as WebDataset tars in LAION's layout, served as the bucket `emoji`.

    python make_shards.py EMOJI_PACKAGE_DIR OUT_DIR

Each sample is KEY.png (the file as shipped, alpha kept), KEY.txt (the caption) and KEY.json. The images are
those the teacher was trained on, with the same captions. The same input gives the same bytes.

Needs Pillow (see requirements.txt) and the unpacked npm package emoji-datasource-google@16.0.0.
"""

import argparse
import hashlib
import io
import json
import random
import tarfile
from pathlib import Path

from PIL import Image

from noto_emoji import emoji

SHARDS = 4
SEED = 0


def members(key, entry):
    """The three files of one sample, as (suffix, bytes)."""
    png = entry.png.read_bytes()
    width, height = Image.open(io.BytesIO(png)).size
    about = {
        "caption": entry.caption,
        "key": key,
        "width": width,
        "height": height,
        "original_width": width,
        "original_height": height,
        "sha256": hashlib.sha256(png).hexdigest(),
        "unicode": entry.unicode,
        "category": entry.category,
    }
    yield "png", png
    yield "txt", entry.caption.encode()
    yield "json", json.dumps(about, ensure_ascii=False).encode()


def write_shard(path, number, entries):
    """One tar without the time, the user or anything else of the machine that wrote it."""
    with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as tar:
        for i, entry in enumerate(entries):
            key = f"{number:05}{i:04}"
            for suffix, data in members(key, entry):
                info = tarfile.TarInfo(f"{key}.{suffix}")
                info.size = len(data)
                info.mode = 0o644
                tar.addfile(info, io.BytesIO(data))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("package", type=Path, help="unpacked npm package emoji-datasource-google")
    parser.add_argument("out", type=Path, help="folder for the tars")
    args = parser.parse_args()
    entries = emoji(args.package)
    random.Random(SEED).shuffle(entries)
    args.out.mkdir(parents=True, exist_ok=True)
    for number in range(SHARDS):
        write_shard(args.out / f"{number:05}.tar", number, entries[number::SHARDS])


if __name__ == "__main__":
    main()
