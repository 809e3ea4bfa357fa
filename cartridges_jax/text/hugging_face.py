"""Tokenizers from Hugging Face's `tokenizer.json`, with whatever normaliser, splitter and model it holds.

The `tokenizers` package runs the file, changed in two ways: special tokens are taken out, so that no text
produces one, and the post-processor (which adds BOS) is left out.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping
from typing import Any

from tokenizers import Tokenizer as FastTokenizer

from cartridges_jax.errors import UserError, one_line
from cartridges_jax.text._base import Place, Tokenizer, sha256_of

# What decides the ids; the rest of the file adds BOS, pads, cuts or decodes.
_DECISIVE = ("normalizer", "pre_tokenizer", "model")


class HuggingFaceTokenizer(Tokenizer):
    """A `tokenizer.json`."""

    def __init__(self, document: Mapping[str, Any], *, bos: str | None = None, eos: str | None = None):
        """
        Args:
          document: the file's JSON.
          bos, eos: texts of the tokens that start and end a text.

        Raises:
          UserError: parts are missing or the `tokenizers` package cannot use them.
        """
        try:
            added = {token["content"]: token["id"] for token in document.get("added_tokens") or ()}
            control = {t["content"]: t["id"] for t in document.get("added_tokens") or () if t["special"]}
            vocabulary = _vocabulary(document["model"])
            decisive = [_comparable(document.get(key)) for key in _DECISIVE]
            backend = _without_control(document, set(control))
        except (KeyError, TypeError, AttributeError) as error:
            raise UserError(
                f"tokenizer.json lacks a part or has it in another form ({error}); fetch it again"
            ) from error
        ids = {**vocabulary, **added}
        tokens = [""] * (max(ids.values(), default=-1) + 1)
        for token, token_id in ids.items():
            tokens[token_id] = token
        super().__init__(
            tokens,
            control,
            fingerprint=sha256_of([*decisive, sorted(_added_key(t) for t in document.get("added_tokens") or ())]),
            bos_id=ids.get(bos),
            eos_id=ids.get(eos),
            verbatim={token: token_id for token, token_id in added.items() if token not in control},
        )
        inside, scheme = _without_space_in_front(backend)
        self._in_front = _load(backend)
        self._inside = self._in_front if scheme == "never" else _load(inside)
        # The places where text is read as if a space preceded it.
        self._spaced: tuple[Place, ...] = {"never": (), "first": ("start",), "always": ("start", "control")}[scheme]

    def _encode_run(self, text: str, place: Place) -> tuple[list[int], list[tuple[int, int]]]:
        encoding = self._backend(place).encode(text, add_special_tokens=False)
        return encoding.ids, _without_gaps(encoding.offsets, len(text))

    def _decode_run(self, ids: list[int], place: Place) -> str:
        return self._backend(place).decode(ids, skip_special_tokens=False)

    def _backend(self, place: Place) -> FastTokenizer:
        return self._in_front if place in self._spaced else self._inside


def _without_gaps(offsets: list[tuple[int, int]], length: int) -> list[tuple[int, int]]:
    """The offsets, with characters that normalisation took into others given to the token before them."""
    starts = [0, *(start for start, _ in offsets[1:]), length]
    return [(starts[i], max(end, starts[i + 1])) for i, (_, end) in enumerate(offsets)]


def _vocabulary(model: Mapping[str, Any]) -> dict[str, int]:
    if isinstance(model["vocab"], Mapping):
        return dict(model["vocab"])
    return {piece: i for i, (piece, _) in enumerate(model["vocab"])}  # unigram


def _without_control(document: Mapping[str, Any], control: set[str]) -> dict[str, Any]:
    """The file without control tokens: its backend neither finds nor produces one, and adds nothing."""
    model = copy.copy(document["model"])
    added = [token for token in document.get("added_tokens") or () if token["content"] not in control]
    if isinstance(model["vocab"], Mapping):
        kept = control - {model.get("unk_token")}
        model["vocab"] = {token: i for token, i in model["vocab"].items() if token not in kept}
        # Else they would be renumbered, since the control tokens before them are gone.
        model["vocab"] |= {token["content"]: token["id"] for token in added}
        if "merges" in model:
            pairs = map(_pair, model["merges"])
            model["merges"] = [p for p in pairs if "".join(p) not in control and control.isdisjoint(p)]
    else:
        # A unigram model's ids are its order, so a piece is renamed, to what no text is cut into.
        model["vocab"] = [
            [f"\U0010fffe{i}\U0010ffff", -1e9] if piece in control else [piece, score]
            for i, (piece, score) in enumerate(model["vocab"])
        ]
    return {
        "version": "1.0",
        "added_tokens": added,
        "normalizer": document.get("normalizer"),
        "pre_tokenizer": document.get("pre_tokenizer"),
        "decoder": document.get("decoder"),
        "model": model,
    }


def _without_space_in_front(backend: dict[str, Any]) -> tuple[dict[str, Any], str]:
    """The backend for text inside a text, and the places where the other one applies: "never", "first" or "always"."""
    schemes = {"never"}

    def changed(part: Any) -> Any:
        if not isinstance(part, Mapping):
            return part
        part = dict(part)
        for key in ("normalizers", "pretokenizers", "decoders"):
            if key in part:
                part[key] = [new for new in map(changed, part[key]) if new is not None]
        match part.get("type"):
            case "Prepend":
                schemes.add("always")
                return None
            case "Metaspace" if part.get("prepend_scheme", "always") != "never" and part.get("add_prefix_space", True):
                schemes.add(part.get("prepend_scheme", "always"))
                part.pop("add_prefix_space", None)
                part["prepend_scheme"] = "never"
            case "ByteLevel" if part.get("add_prefix_space"):
                schemes.add("always")
                part["add_prefix_space"] = False
            case "Strip" if "start" in part:
                part["start"] = 0
        return part

    parts = {key: changed(backend[key]) for key in ("normalizer", "pre_tokenizer")}
    if schemes == {"never"}:
        return backend, "never"
    parts["decoder"] = changed(backend["decoder"])
    return {**backend, **parts}, "first" if "first" in schemes else "always"


def _load(document: dict[str, Any]) -> FastTokenizer:
    try:
        return FastTokenizer.from_str(json.dumps(document))
    except Exception as error:  # the Rust side raises bare Exceptions
        raise UserError(
            f"the tokenizers package cannot use this tokenizer.json ({one_line(error)}); "
            "fetch it again, or install a newer package"
        ) from error


def _pair(merge: Any) -> tuple[str, str]:
    """A merge as older files ("a b") and newer ones (["a", "b"]) write it."""
    left, right = merge.split(" ") if isinstance(merge, str) else merge
    return left, right


def _comparable(part: Any) -> Any:
    if isinstance(part, Mapping) and "merges" in part:
        return {**part, "merges": [list(_pair(merge)) for merge in part["merges"]]}
    return part


def _added_key(token: Mapping[str, Any]) -> list:
    return [
        token["id"],
        token["content"],
        *(bool(token.get(k)) for k in ("special", "lstrip", "rstrip", "single_word")),
    ]
