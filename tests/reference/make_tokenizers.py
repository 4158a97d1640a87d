"""Tokenizer folders in the forms that transformers and its users leave, and the ids that transformers gives with each.

    python make_tokenizers.py OUT_DIR [TOKENIZER_DIR]

OUT_DIR/NAME/             a tokenizer's folder with the vocabulary of TOKENIZER_DIR, by default the quickstart's
OUT_DIR/NAME.ids.json     [[caption, ids], ...]
"""

import json
import random
import shutil
import sys
from pathlib import Path

from transformers import AddedToken, CLIPTokenizer

TOKENIZER = Path(sys.argv[2]) if len(sys.argv) > 2 else Path(__file__).parents[2] / "assets" / "quickstart" / "teacher" / "tokenizer"
PLAIN = ["vocab.json", "merges.txt"]

CAPTIONS = [
    "", " ", "\t\r\n", "a red apple", "  a red   apple\n", "A RED Apple", "it's the dog's, they've we'll I'd 'S '", "1234 5 ½ ² Ⅷ ٣ 100,000.50",
    "café cafe\u0301 CAFÉ naïve Ångström \u212b \u2126 ﬁ ﬂ \u1e9b\u0323", "İstanbul ISTANBUL ß ẞ ΑΣ Σίσυφος ǅ",
    "一只红色的苹果 りんご リンゴ ﾘﾝｺﾞ 사과 사과 \u1112\u1161\u11ab", "🍎 👩‍👩‍👧 🇩🇪 👍🏽 ☺️ 😀😀😀", "\u0000 \u0007 \u001b[0m \u200b \ufeff \u00ad \u2028 \u2029 \u0085 \u00a0 \u3000 \x1c \x1f",
    "&lt;b&gt;a&amp;b&nbsp;c&#39;d &eacute; <b>bold</b>", "“curly” ‘quotes’ — – … Ｆｕｌｌ ｗｉｄｔｈ", "a" * 300, "ab" * 4000, "apple" * 500, "!" * 500, "word " * 300, "é" * 400,
    "<|endoftext|>", "<|startoftext|> a <|endoftext|> b", "a<|endoftext|>b", "<|ENDOFTEXT|> <| endoftext |> <|endoftext", "a <|endoftext|><|endoftext|>",
    "<cat-toy>", "a photo of <cat-toy> on a table", "a<cat-toy>b <Cat-Toy> < cat-toy > <cat-toy><cat-toy>", "two words, Two Words; twowords", "a <dog> and <s>",
    "\u0301 leading mark", "a" + "\u0316\u0301" * 40 + "b", "z\u0335\u0321a\u0336l\u0337g\u0338o", "مرحبا بالعالم שלום नमस्ते สวัสดี", "\U0001d4d0\U0001d4d1 \U00020000",
    "http://a.b/c?d=e&f=g#h user@example.com C:\\path\\x.txt", "snake_case camelCase kebab-case 3x4 #1 $5 50% a/b", "!! ! a!b", ">\u0338 <|endoftext|>\u0338",
]  # fmt: skip
PIECES = [
    "a", "red", "Apple", " ", "  ", "\n", "'s", "’s", "é", "e\u0301", "1", "23", "🍎", "苹", "ß", "İ", "<|endoftext|>", "<cat-toy>", "two words", "-", "...", "&amp;", "\u200d",
    "\u0323", "<", "|>", "!", "_", "한", "\u1112\u1161", "\u00a0", "\u0000", "of", "the", "FACE",
]  # fmt: skip


def captions():
    generator = random.Random(1)
    yield from CAPTIONS
    # Longer than what coffey tokenizes of a caption.
    for letters in ["ab", "abcdefghijklmnopqrstuvwxyz", "苹果的一只", "a b"]:
        yield "".join(generator.choices(letters, k=30_000))
    for _ in range(400):
        yield "".join(generator.choices(PIECES, k=generator.randrange(1, 60)))


def plain(folder, config=None, **files):
    """The form of transformers 4: `vocab.json` and `merges.txt`."""
    folder.mkdir()
    for name in PLAIN:
        shutil.copy(TOKENIZER / name, folder)
    config = {"model_max_length": 77, "tokenizer_class": "CLIPTokenizer", **(config or {})}
    files["tokenizer_config"] = {key: value for key, value in config.items() if value is not None}
    for name, content in files.items():
        (folder / f"{name}.json").write_text(json.dumps(content))


def token(content, **how):
    return {"content": content, "single_word": False, "lstrip": False, "rstrip": False, "normalized": True, **how}


def change(path, alter):
    content = json.loads(path.read_text())
    alter(content)
    path.write_text(json.dumps(content))


def saved(folder, source=TOKENIZER, add=lambda tokenizer: None):
    """The form of transformers 5: `tokenizer.json`."""
    tokenizer = CLIPTokenizer.from_pretrained(source)
    add(tokenizer)
    tokenizer.save_pretrained(folder)
    assert sorted(p.name for p in folder.iterdir()) == ["tokenizer.json", "tokenizer_config.json"]


def tokenizers(out):
    count = len(json.loads((TOKENIZER / "vocab.json").read_text()))
    shutil.copytree(TOKENIZER, out / "plain")
    plain(out / "no-roles")
    plain(out / "max-len", {"model_max_length": None, "max_len": 20})
    rules = {"__type": "AddedToken", "normalized": True}
    roles = {"bos_token": token("<|startoftext|>", **rules), "eos_token": token("<|endoftext|>", **rules), "unk_token": token("<|endoftext|>", **rules)}
    plain(out / "roles-with-rules", {**roles, "pad_token": "<|endoftext|>"})
    plain(out / "pad", {"pad_token": "!"})
    plain(out / "other-roles", {"bos_token": "!", "eos_token": "a</w>", "mask_token": "<mask>", "additional_special_tokens": ["<dog>"]})
    plain(out / "split-special", {"split_special_tokens": True})
    plain(out / "inversion", added_tokens={"<cat-toy>": count, "two words": count + 1})
    plain(out / "inversion-special", {"additional_special_tokens": ["<cat-toy>"]}, added_tokens={"<dog>": count + 1, "<cat-toy>": count})
    mapped = {"eos_token": token("<|endoftext|>"), "additional_special_tokens": ["<cat-toy>"]}
    plain(out / "inversion-mapped", special_tokens_map=mapped, added_tokens={"<cat-toy>": count})
    decoder = {str(count): token("<cat-toy>", normalized=False, special=False), str(count + 1): token("two words", lstrip=True, rstrip=True, single_word=True, special=True)}
    plain(out / "decoder", {"added_tokens_decoder": decoder}, special_tokens_map={"pad_token": "!"}, added_tokens={"<dog>": count})
    saved(out / "saved")
    saved(out / "saved-roles", out / "roles-with-rules")
    saved(out / "saved-pad", out / "pad")
    saved(out / "saved-decoder", out / "decoder")
    saved(out / "saved-inversion", out / "inversion")
    saved(out / "saved-tokens", add=lambda t: t.add_tokens(["<cat-toy>", AddedToken("two words", rstrip=True)]))
    saved(out / "saved-extra", add=lambda t: t.add_special_tokens({"extra_special_tokens": ["<dog>", "<cat-toy>"]}))
    both = out / "both"
    saved(both, add=lambda t: t.add_tokens(["<cat-toy>"]))
    shutil.copy(TOKENIZER / "vocab.json", both)
    (both / "merges.txt").write_text("#version: 0.2\n")
    (both / "added_tokens.json").write_text(json.dumps({"<dog>": count + 1}))
    saved(out / "older")

    def older(content):
        content["model"]["merges"] = [" ".join(pair) for pair in content["model"]["merges"]]
        for key in ("byte_fallback", "ignore_merges"):
            del content["model"][key]
        words, level = content["pre_tokenizer"]["pretokenizers"]
        words["pattern"]["Regex"] = words["pattern"]["Regex"].replace(r"<\|startoftext\|>|<\|endoftext\|>|", "")
        del level["use_regex"]

    change(out / "older" / "tokenizer.json", older)


def main():
    out = Path(sys.argv[1])
    out.mkdir(parents=True, exist_ok=True)
    tokenizers(out)
    for folder in sorted(p for p in out.iterdir() if p.is_dir()):
        clip = CLIPTokenizer.from_pretrained(folder)
        arguments = {"padding": "max_length", "max_length": clip.model_max_length, "truncation": True}
        ids = [[caption, clip(caption, **arguments).input_ids] for caption in captions()]
        (out / f"{folder.name}.ids.json").write_text(json.dumps(ids))


if __name__ == "__main__":
    main()
