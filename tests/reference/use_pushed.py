"""Fetches a pushed student with the Hub's own client, and does what its card says.

    python use_pushed.py ENDPOINT REPOSITORY TEACHER_DIR WORK_DIR

The card's front matter has to be one that `huggingface_hub` reads, and its Python has to draw an image. The teacher,
which is a folder here, is the only thing that is filled in.
"""

import os
import re
import sys


def main():
    endpoint, repository, teacher, work = sys.argv[1:]
    os.environ.update(HF_ENDPOINT=endpoint, HF_HOME=os.path.join(work, "python"), HF_HUB_DISABLE_XET="1")
    os.environ.pop("HF_TOKEN", None)
    from huggingface_hub import ModelCard, snapshot_download

    folder = snapshot_download(repository)
    card = ModelCard.load(os.path.join(folder, "README.md"))
    assert card.data.library_name == "diffusers" and card.data.base_model is None, card.data
    for picture in re.findall(r"!\[.*\]\((.*)\)", card.text):
        assert os.path.isfile(os.path.join(folder, picture)), picture

    (code,) = re.findall(r"```python\n(.*?)```", card.text, re.DOTALL)
    code, replaced = re.subn(r"^teacher = .*$", f"teacher = {teacher!r}", code, flags=re.MULTILINE)
    assert replaced == 1, code
    os.chdir(work)
    names = {}
    exec(code, names)
    unet = names["pipeline"].unet
    assert unet.config.time_cond_proj_dim is not None
    assert names["pipeline"].scheduler.config.timestep_scaling == 10.0
    assert names["image"].size == (64, 64), names["image"].size
    low, high = names["image"].convert("L").getextrema()
    assert high > low, "an image of one colour"
    print(f"{repository}: {names['image'].size}, brightness {low} to {high}")


if __name__ == "__main__":
    main()
