"""The quickstart's images and captions: one list, so that the shards and the teacher can't disagree.

Reads the unpacked npm package `emoji-datasource-google` (16.0.0): `emoji.json` and the 64x64 PNGs.
"""

import json
from dataclasses import dataclass
from pathlib import Path

CATEGORIES = ("Smileys & Emotion", "Animals & Nature", "Food & Drink")


@dataclass(frozen=True)
class Emoji:
    """One captioned image, in the order of `emoji.json`."""

    png: Path
    caption: str
    category: str
    unicode: str


def emoji(package: Path) -> list[Emoji]:
    """Every emoji of the three categories that Noto draws."""
    found = []
    for entry in json.loads((package / "emoji.json").read_text(encoding="utf-8")):
        png = package / "img" / "google" / "64" / entry["image"]
        if entry["category"] in CATEGORIES and png.exists():
            caption = (entry["name"] or entry["short_name"].replace("_", " ")).lower()
            found.append(Emoji(png, caption, entry["category"], entry["unified"]))
    return found
