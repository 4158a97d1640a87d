"""Compare the text embeddings of an SDXL pipeline with diffusers' `encode_prompt`.

    python check_text.py PIPELINE_DIR EMBEDDINGS.safetensors CAPTIONS.json

CAPTIONS.json is a list; EMBEDDINGS holds `hidden` [B,77,W] and `pooled` [B,P] of its captions, and `tokens` and
`tokens_2` [B,77], the ids of both tokenizers. Ids must be equal, embeddings within 1e-5 of their largest value.
"""

import json
import sys
from pathlib import Path

import torch
from diffusers import StableDiffusionXLPipeline
from safetensors.torch import load_file

pipeline, embeddings, captions = sys.argv[1:]
captions = json.loads(Path(captions).read_text())
ours = load_file(embeddings)
pipe = StableDiffusionXLPipeline.from_pretrained(pipeline, torch_dtype=torch.float32)
for name, tokenizer in (("tokens", pipe.tokenizer), ("tokens_2", pipe.tokenizer_2)):
    ids = tokenizer(captions, padding="max_length", max_length=77, truncation=True).input_ids
    for caption, got, want in zip(captions, ours[name].tolist(), ids, strict=True):
        assert got == want, f"{name} of {caption!r}: {got}, transformers has {want}"
# One caption at a time, as training scripts do it and pipelines do.
with torch.no_grad():
    each = [pipe.encode_prompt(caption, do_classifier_free_guidance=False) for caption in captions]
for name, index in (("hidden", 0), ("pooled", 2)):
    want = torch.cat([result[index] for result in each])
    assert ours[name].shape == want.shape, f"{name}: {list(ours[name].shape)}, diffusers has {list(want.shape)}"
    error = ((ours[name] - want).abs().max() / want.abs().max()).item()
    assert error <= 1e-5, f"{name}: {error:.2e} apart"
    print(f"{name}: {error:.2e} apart")
