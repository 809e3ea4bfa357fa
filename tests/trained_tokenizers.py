"""Tokenizers of every kind, trained in the test: their vocabularies, files and machines."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pytest
import sentencepiece
import tiny
from sentencepiece.sentencepiece_model_pb2 import ModelProto
from texts import SPLIT_TEXTS, TEXTS
from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers, trainers
from tokenizers import Tokenizer as FastTokenizer

from cartridges_jax.formats.gguf import GGUFFile

CONTROL = ["<s>", "</s>", "<|im_start|>", "<|im_end|>"]
FAST_KINDS = ["bytes", "llama2", "mistral", "gemma"]


def gguf_file(path: Path, num_tokens: int, tokenizer: dict) -> GGUFFile:
    """A tiny model with a tokenizer of the test's own.

    Args:
      tokenizer: what to write, by the name of GGUFWriter's method.
    """
    config = tiny.tiny_config(vocab_size=num_tokens)
    tensors = tiny.gguf_tensors(tiny.random_weights(config, 0), config)
    return GGUFFile(tiny.write_gguf(path, config, tensors, tokenizer))


@pytest.fixture(scope="module")
def vocabulary() -> tuple[list[str], list[str]]:
    """Byte-level tokens and merges that reach over words, digits and white space: the splitter decides."""
    machine = FastTokenizer(models.BPE())
    machine.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=900, initial_alphabet=alphabet, show_progress=False)
    machine.train_from_iterator(
        [text[:60] for text in SPLIT_TEXTS if "|" not in text] + SPLIT_TEXTS[-5:-1] * 50, trainer
    )
    model = json.loads(machine.to_str())["model"]
    # A word that no merges make; Llama 3 takes it all the same.
    return [*CONTROL, *model["vocab"], "Ġzebra"], [" ".join(merge) for merge in model["merges"]]


@pytest.fixture(scope="module")
def sentence_piece_model() -> bytes:
    """A trained model like Llama 2's: BPE, byte fallback, no normalisation, a space in front."""
    out = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter([t[:200] for t in SPLIT_TEXTS if t.strip() and "<|im" not in t] * 3), model_writer=out,
        vocab_size=600, hard_vocab_limit=False, model_type="bpe", byte_fallback=True, normalization_rule_name="identity",
        remove_extra_whitespaces=False, allow_whitespace_only_pieces=True, split_digits=True, minloglevel=2,
        control_symbols=["<|im_start|>", "<|im_end|>"], user_defined_symbols=["<b>", "\n\n", "\n"], num_threads=1,
    )  # fmt: skip
    return out.getvalue()


def sentence_piece_gguf(path: Path, model: bytes, *, space_in_front: bool) -> GGUFFile:
    proto = ModelProto.FromString(model)
    return gguf_file(
        path,
        len(proto.pieces),
        {
            "tokenizer_model": "llama",
            "token_list": [piece.piece for piece in proto.pieces],
            "token_scores": [piece.score for piece in proto.pieces],
            "token_types": [piece.type for piece in proto.pieces],
            "add_space_prefix": space_in_front,
            "bos_token_id": 1,
            "eos_token_id": 2,
            "unk_token_id": 0,
        },
    )


def fast_tokenizer(kind: str) -> FastTokenizer:
    """A tokenizer.json of a kind that models use; `<think>` is an added token that is not special."""
    if kind == "bytes":  # as Qwen's
        machine = FastTokenizer(models.BPE())
        machine.normalizer = normalizers.NFC()
        machine.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        machine.decoder = decoders.ByteLevel()
        alphabet = pre_tokenizers.ByteLevel.alphabet()
        trainer = trainers.BpeTrainer(vocab_size=600, initial_alphabet=alphabet, show_progress=False)
        machine.train_from_iterator(TEXTS, trainer)
        first, then = AddedToken("<|im_start|>", special=True), ["<s>", "</s>", "<|im_end|>"]
        machine.add_special_tokens([first])
    else:
        trained = FastTokenizer(models.BPE())
        trained.train_from_iterator([t[:100] for t in TEXTS], trainers.BpeTrainer(vocab_size=500, show_progress=False))
        model = json.loads(trained.to_str())["model"]
        learned = {token.replace(" ", "▁") for token in model["vocab"]} | {"▁"}
        # Control tokens inside the vocabulary, with merges that would make one, as hostile files might have.
        vocabulary = [
            "<unk>",
            *CONTROL,
            *(f"<0x{b:02X}>" for b in range(256)),
            *sorted(learned | {"<s", "s>", "<", "s", ">"}),
        ]
        vocabulary = list(dict.fromkeys(vocabulary))
        merges = [
            ("<", "s"),
            ("<s", ">"),
            *(tuple(part.replace(" ", "▁") for part in merge) for merge in model["merges"]),
        ]
        ids = {token: i for i, token in enumerate(vocabulary)}
        machine = FastTokenizer(
            models.BPE(vocab=ids, merges=merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True)
        )
        ends = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
        if kind == "llama2":
            machine.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
        elif kind == "mistral":
            machine.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
        else:
            machine.normalizer = normalizers.Replace(" ", "▁")
        machine.decoder = decoders.Sequence(ends if kind == "gemma" else [*ends, decoders.Strip(" ", 1, 0)])
        then = CONTROL
    machine.add_tokens([AddedToken("<think>", normalized=False)])
    machine.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in then])
    return machine


def toy_pieces(*extra: tuple[str, int]) -> dict:
    """What a SentencePieceTokenizer is made of: `a`, every byte, and (piece, type) of one's own from id 260."""
    rows = [("<unk>", 2), ("<s>", 3), ("</s>", 3), *((f"<0x{b:02X}>", 6) for b in range(256)), ("a", 1), *extra]
    pieces, types = zip(*rows)
    return {"pieces": pieces, "scores": [0.0] * len(rows), "types": types}
