"""The objectives on the quickstart's teacher: each trains the same number of steps, LCM as a LoRA too.

    python benches/objectives.py [--coffey target/release/coffey] [--steps 250] [--out benches/objectives.json]
        [--picture docs/objectives.png]

Run it from the repository's root with Pillow. Each run is `coffey train` with `configs/quickstart.toml` or `configs/quickstart-lora.toml` and
another `distill.objective`. The figures are those that a run prints at its end: the mean squared distance, in latents, of 64 samples in one and in
four steps from the teacher's samples in 50 steps, same noise, same captions. The picture has a row for each prompt; its columns are the teacher in
50 steps, then each student in four steps, cut out of the runs' `samples/comparison.png`. The numbers are the same on every run and
with any number of threads. On two cores it takes ten minutes.
"""

import argparse
import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path

from PIL import Image, ImageDraw

RUNS = {
    "LCM": ["configs/quickstart.toml"],
    "TCD": ["configs/quickstart.toml", "-s", "distill.objective=tcd"],
    "PCM": ["configs/quickstart.toml", "-s", "distill.objective=pcm"],
    "LCM-LoRA": ["configs/quickstart-lora.toml"],
}
FIGURES = re.compile(
    r"endpoint error: student in 1 step (\S+), in 4 steps (\S+) · teacher in 1 step (\S+), in 4 steps (\S+) "
)


def train(coffey, config, steps, output):
    command = [coffey, "train", "-c", *config, "-s", f"train.max_steps={steps}", "-s", f"train.output={output}"]
    done = subprocess.run(command, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True)
    found = FIGURES.search(done.stderr)
    if done.returncode or not found:
        sys.exit(f"{' '.join(command)}\n{done.stderr}")
    names = ("student_1_step", "student_4_steps", "teacher_1_step", "teacher_4_steps")
    return dict(zip(names, map(float, found.groups())))


# Side of an image in a comparison grid, and the distance to the next one.
SIDE, PITCH, TITLE = 128, 134, 20


def column(picture, index, rows=8, columns=4):
    """The images of a column of a comparison grid, which is behind labels and below titles."""
    left, top = picture.width - (columns - index) * PITCH, picture.height - rows * PITCH
    corners = [(left, top + row * PITCH) for row in range(rows)]
    return [picture.crop((x, y, x + SIDE, y + SIDE)) for x, y in corners]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--coffey", default="target/release/coffey")
    parser.add_argument("--steps", type=int, default=250)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--picture", type=Path)
    args = parser.parse_args()

    figures, columns = {}, []
    print("| | student in 1 step | in 4 steps |\n| --- | --- | --- |", flush=True)
    with tempfile.TemporaryDirectory() as work:
        for name, config in RUNS.items():
            output = Path(work) / name
            figures[name] = found = train(args.coffey, config, args.steps, output)
            print(f"| {name} | {found['student_1_step']} | {found['student_4_steps']} |", flush=True)
            grid = Image.open(output / "samples" / "comparison.png").convert("RGB")
            if not columns:
                columns.append(("teacher, 50 steps", column(grid, 0)))
            columns.append((name, column(grid, 2)))
    print(f"teacher: {found['teacher_1_step']} in 1 step, {found['teacher_4_steps']} in 4 steps")
    if args.out:
        args.out.write_text(json.dumps({"steps": args.steps, "runs": figures}, indent=1) + "\n")
    if args.picture:
        picture = Image.new("RGB", (PITCH * len(columns), TITLE + PITCH * len(columns[0][1])), "white")
        draw = ImageDraw.Draw(picture)
        for c, (title, images) in enumerate(columns):
            draw.text((c * PITCH + 4, 4), title, fill="black")
            for r, image in enumerate(images):
                picture.paste(image, (c * PITCH, TITLE + r * PITCH))
        picture.save(args.picture, optimize=True)


if __name__ == "__main__":
    main()
