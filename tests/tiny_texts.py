"""Tiny tokenizers of every family, with the family's chat template, as directories hold them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import NamedTuple

import chat_templates
from peers import transformers
from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers, trainers
from tokenizers import Tokenizer as FastTokenizer

CHATML = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
HEADERS = ["<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"]
GRANITE = ["<|end_of_text|>", "<|start_of_role|>", "<|end_of_role|>"]
DEEPSEEK = ["<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>", "<｜User｜>", "<｜Assistant｜>"]
GEMMA = ["<bos>", "<eos>", "<start_of_turn>", "<end_of_turn>"]


class Family(NamedTuple):
    """How a family's tiny tokenizer is made; BOS and EOS are indices into `control`."""

    template: str
    control: list[str]
    kind: str = "bytes"
    bos: int | None = 0
    eos: int = 1
    thinking: bool = False
    folds: bool = False  # our fold stands for a system message that the template refuses


FAMILIES = {
    "llama2": Family(chat_templates.LLAMA2, ["<s>", "</s>"], "always"),
    "llama3": Family(chat_templates.LLAMA3, HEADERS, eos=4),
    "llama3.1": Family(chat_templates.LLAMA31, HEADERS, eos=4),
    "llama3.2": Family(chat_templates.LLAMA32, HEADERS, eos=4),
    "qwen2": Family(chat_templates.QWEN2, CHATML, bos=None, eos=2),
    "qwen2.5": Family(chat_templates.QWEN25, CHATML, bos=None, eos=2),
    "qwen3": Family(chat_templates.QWEN3, CHATML, bos=None, eos=2),
    "qwen3-thinking": Family(chat_templates.QWEN3, CHATML, bos=None, eos=2, thinking=True),
    "qwq": Family(chat_templates.QWQ, CHATML, bos=None, eos=2, thinking=True),
    "deepseek-r1": Family(chat_templates.DEEPSEEK_R1, DEEPSEEK, thinking=True),
    "mistral-v1": Family(chat_templates.MISTRAL_V1, ["<s>", "</s>"], "first", folds=True),
    "mistral-v2": Family(chat_templates.MISTRAL_V2, ["<s>", "</s>"], "first"),
    "mistral-v3": Family(chat_templates.MISTRAL_V3, ["<s>", "</s>", "[INST]", "[/INST]"], "first"),
    "gemma2": Family(chat_templates.GEMMA2, GEMMA, "never", folds=True),
    "gemma3": Family(chat_templates.GEMMA3, GEMMA, "never"),
    "smollm2": Family(chat_templates.SMOLLM2, CHATML, bos=1, eos=2),
    "smollm3": Family(chat_templates.SMOLLM3, CHATML, bos=None, eos=2),
    "smollm3-thinking": Family(chat_templates.SMOLLM3, CHATML, bos=None, eos=2, thinking=True),
    "granite3": Family(chat_templates.GRANITE3, GRANITE, eos=0),
}
NEWLINE_RUNS = ["\n\n", "\n\n\n"]

WORDS = [
    "Hello",
    "the ",
    "island",
    " naïve",
    "日本語",
    "🙂",
    "x = 1",
    "a\nb",
    "it's",
    "…",
    "  ",
    "\n\n",
    "\t",
    "<b>",
    "{{ 7 }}",
    "№ 5",
]


def tiny_tokenizer(kind: str, control: list[str]) -> FastTokenizer:
    """A few hundred tokens, trained on the tests' own words, none over a border of words.

    Args:
      kind: "bytes" (byte-level), else byte fallback with a space written in front "never", "first" in a text,
        or "always" (after a control token too).
    """
    texts = [
        *WORDS,
        "system user model assistant [INST] [/INST] <<SYS>> Cutting Knowledge Date helpful Instructions",
    ] * 3
    if kind == "bytes":
        tokenizer = FastTokenizer(models.BPE())
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = decoders.ByteLevel()
        alphabet = pre_tokenizers.ByteLevel.alphabet()
        tokenizer.train_from_iterator(
            texts, trainers.BpeTrainer(vocab_size=400, initial_alphabet=alphabet, show_progress=False)
        )
    else:
        trained = FastTokenizer(models.BPE())
        words = [
            pre_tokenizers.Metaspace(prepend_scheme="never"),
            pre_tokenizers.Split("\n", "isolated"),
            pre_tokenizers.Punctuation(),
        ]
        trained.pre_tokenizer = pre_tokenizers.Sequence(words)
        trained.train_from_iterator(texts, trainers.BpeTrainer(vocab_size=150, limit_alphabet=60, show_progress=False))
        model = json.loads(trained.to_str())["model"]
        learned = [token for token in model["vocab"] if token not in NEWLINE_RUNS]
        vocabulary = ["<unk>", *(f"<0x{byte:02X}>" for byte in range(256)), *learned]
        tokenizer = FastTokenizer(
            models.BPE(
                vocab={token: i for i, token in enumerate(vocabulary)},
                merges=[tuple(merge) for merge in model["merges"]],
                unk_token="<unk>",
                byte_fallback=True,
                fuse_unk=True,
            )  # fmt: skip
        )
        ends = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
        if kind == "first":
            tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
        else:
            in_front = [normalizers.Prepend("▁")] if kind == "always" else []
            tokenizer.normalizer = normalizers.Sequence([*in_front, normalizers.Replace(" ", "▁")])
        tokenizer.decoder = decoders.Sequence(ends if kind == "never" else [*ends, decoders.Strip(" ", 1, 0)])
        if kind == "never":
            tokenizer.add_tokens([AddedToken(run, normalized=False) for run in NEWLINE_RUNS])
    tokenizer.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in control])
    return tokenizer


def save_tokenizer(name: str, directory: Path) -> transformers.PreTrainedTokenizerFast:
    """Writes a family's tokenizer and template into a directory, and returns transformers' view of them."""
    family = FAMILIES[name]
    theirs = transformers.PreTrainedTokenizerFast(
        tokenizer_object=tiny_tokenizer(family.kind, family.control),
        bos_token=None if family.bos is None else family.control[family.bos],
        eos_token=family.control[family.eos],
        chat_template=family.template,
    )
    theirs.save_pretrained(directory)
    return theirs
