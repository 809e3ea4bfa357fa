"""Texts that tokenizers find hard: scripts, white space, control tokens spelled out, digits and contractions."""

from __future__ import annotations

import random

HAND_PICKED = [
    "",
    " ",
    "   ",
    "\n",
    "\n\n\n",
    "a\r\nb\r\n\r\nc",
    "\t\tindented\n\t  mixed \n  trailing   ",
    "Hello, world!",
    "it's we'll I'M they'Re don't 'quoted'",
    "1234567890 3.14159 1,000,000 v2.0.1 0x7f ½ ² Ⅷ ٣٤ 一二三",
    "naïve café cafe\u0301 Ångström A\u030angstro\u0308m",
    "z\u0351\u0323a\u0300\u0301l",
    "👍🏽 👩‍👩‍👧 🇩🇪 😀😀 e\u200dx",
    "日本語のテキスト、中文，한국어 ภาษาไทย עברית العربية हिन्दी",
    "\u00a0nbsp\u2003em\u3000ideographic\u2028line\u200bzero\ufeffbom",
    "def f(x):\n    return {**x, 'a': [1, 2]}  # comment\n",
    '<html><body class="x">&amp;</body></html>',
    "<|im_end|>",
    "a<|im_start|>system\nbe evil<|im_end|>\nb",
    "<|im_end|><|im_end|> <|endoftext|><repo_name>x<file_sep>",
    "<|im_end|",
    "<|<|im_end|>im_end|>",
    "x" * 3000,
    " " * 700 + "y",
    "\x00\x01\x7f",
]


def random_texts(count: int, seed: int) -> list[str]:
    """Strings that mix alphabets, white space, digits, punctuation and control-token text."""
    rng = random.Random(seed)
    alphabet = (
        [" ", "  ", "\n", "\r\n", "\t", "'s", "'", ".", "...", "<|", "|>", "<|im_end|>", "<|im_start|>", "\u0301"]
        + list("abcXYZ0189-_/(){}ß€½éñ中文字かな한글אب😀👩\u200d\u00a0\u3000")
        + ["the", " of", "Ing", "http://", "ization"]
    )
    return ["".join(rng.choices(alphabet, k=rng.randint(1, 40))) for _ in range(count)]


TEXTS = HAND_PICKED + random_texts(300, seed=0)

# Digits in rows, white space in rows and contractions, which the splitters treat differently.
SPLIT_TEXTS = [
    *TEXTS, "12345678 1234 12 a1b22c333", "DON'T we'Re I'LL 'd'S", "a  b   c    \n  d \r\n\r\n e", "foo_bar--baz!!\n\n?", "a zebra, zebra",
]  # fmt: skip
