"""The tokenizer of a model: from its GGUF file or its Hugging Face directory."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from cartridges_jax.errors import UserError, one_line
from cartridges_jax.formats.gguf import GGUFFile
from cartridges_jax.text._base import Place, Tokenizer, looks_like_control
from cartridges_jax.text.byte_level import ByteLevelBPE
from cartridges_jax.text.hugging_face import HuggingFaceTokenizer
from cartridges_jax.text.sentence_piece import SentencePieceTokenizer

__all__ = ["Place", "Tokenizer", "read_json", "tokenizer_from_directory", "tokenizer_from_gguf"]

# The values of `tokenizer.ggml.model` that are known.
_GGUF_KINDS = {"gpt2": ByteLevelBPE, "llama": SentencePieceTokenizer}


def tokenizer_from_gguf(file: GGUFFile) -> Tokenizer:
    """The tokenizer described by a GGUF file's metadata.

    Raises:
      UserError: the file has no tokenizer of a known kind (byte-level BPE, SentencePiece), or a part of it
        is missing or damaged.
    """
    kind = file.metadata.get("tokenizer.ggml.model")
    if kind not in _GGUF_KINDS:
        raise UserError(
            f"{file.path}: tokenizer.ggml.model is {kind!r}; only 'gpt2' (byte-level BPE) and 'llama' (SentencePiece) "
            "are supported, choose a model with such a tokenizer"
        )
    try:
        _require_known_ids(file)
        return _GGUF_KINDS[kind].from_metadata(file.metadata)
    except KeyError as error:
        raise UserError(f"{file.path}: metadata {error} is missing; convert the model again") from error
    except UserError as error:
        raise UserError(f"{file.path}: {error}") from error


# The metadata that number tokens with a use here.
_GGUF_IDS = tuple(f"tokenizer.ggml.{name}_token_id" for name in ("bos", "eos", "eot", "eom"))


def _require_known_ids(file: GGUFFile) -> None:
    """Refuses ids of special tokens that the vocabulary does not have (0xFFFFFFFF: a converter's "none")."""
    size = len(file.metadata["tokenizer.ggml.tokens"])
    for key in _GGUF_IDS:
        token_id = file.metadata.get(key)
        if token_id is not None and not 0 <= token_id < size:
            raise UserError(
                f"{key} is {token_id}, outside the vocabulary of {size} tokens; convert the model again, or remove the "
                "key (gguf_new_metadata.py --remove-metadata)"
            )


def tokenizer_from_directory(path: str | Path, *, num_rows: int | None = None) -> Tokenizer:
    """The tokenizer of a Hugging Face directory: its `tokenizer.json`, else its `tokenizer.model`.

    BOS and EOS are those that tokenizer_config.json names; where there is no such file, those that
    config.json numbers. `added_tokens.json` counts beside a `tokenizer.model`.

    Args:
      num_rows: rows of the model's embedding. Added tokens beyond them are left out (Gemma 3's image token in its
        text-only models): no text makes one, and the model has no logit for it.

    Raises:
      UserError: neither file is there, or one is damaged or of a kind that is not supported.
    """
    path = Path(path)
    names = _special_names(path)
    if (file := path / "tokenizer.json").is_file():
        document = read_json(file)
        try:
            document = _without_rowless(document, num_rows)
            names = names or _names_by_number(path, document)
            return HuggingFaceTokenizer(document, **names)
        except UserError as error:
            raise UserError(f"{file}: {error}") from error
    if (file := path / "tokenizer.model").is_file():
        names = names or {"bos": "<s>", "eos": "</s>"}
        try:
            added = {
                token_id: token
                for token_id, token in _added_tokens(path).items()
                if num_rows is None or token_id < num_rows
            }
            return SentencePieceTokenizer.from_model_file(file.read_bytes(), added=added, **names)
        except UserError as error:
            raise UserError(f"{file}: {error}") from error
    raise UserError(f"{path}: has neither tokenizer.json nor tokenizer.model; add the model's tokenizer files")


def read_json(path: Path) -> dict[str, Any]:
    """A JSON file that holds an object.

    Raises:
      UserError: it is missing, damaged, or holds something else.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror or error}); check the path") from error
    except ValueError as error:
        raise UserError(f"{path}: not valid JSON ({one_line(error)}); fetch it again") from error
    if not isinstance(value, dict):
        raise UserError(f"{path}: holds a {type(value).__name__}, not a JSON object; fetch it again")
    return value


def _without_rowless(document: dict[str, Any], num_rows: int | None) -> dict[str, Any]:
    added = document.get("added_tokens")
    if num_rows is None or not isinstance(added, list):
        return document
    kept = [token for token in added if not (isinstance(token, dict) and _is_beyond(token.get("id"), num_rows))]
    return {**document, "added_tokens": kept}


def _is_beyond(token_id: Any, num_rows: int) -> bool:
    return isinstance(token_id, int) and token_id >= num_rows


def _added_tokens(path: Path) -> dict[int, tuple[str, bool]]:
    """Id to (text, special) of the tokens beside a `tokenizer.model`.

    They are listed in added_tokens.json by older versions of transformers, which does not say which are special, and
    in tokenizer_config.json by newer ones, which counts.

    Raises:
      UserError: a file has another form.
    """
    config = _read_if_there(path / "tokenizer_config.json")
    known = _read_if_there(path / "special_tokens_map.json")
    named = {_text(value) for key, value in {**known, **config}.items() if key.endswith("_token")}
    for listed in (known.get("additional_special_tokens"), config.get("additional_special_tokens")):
        named |= {_text(token) for token in listed} if isinstance(listed, list) else set()
    added: dict[int, tuple[str, bool]] = {}
    for text, token_id in _read_if_there(path / "added_tokens.json").items():
        if isinstance(token_id, bool) or not isinstance(token_id, int) or token_id < 0:
            raise UserError(f"added_tokens.json gives {text!r} the id {token_id!r}; fetch the file again")
        added[token_id] = text, text in named or looks_like_control(text)
    decoder = config.get("added_tokens_decoder") or {}
    if not isinstance(decoder, dict):
        raise UserError(f"tokenizer_config.json has added_tokens_decoder={decoder!r:.60}; fetch the file again")
    for token_id, token in decoder.items():
        try:
            added[int(token_id)] = token["content"], bool(token.get("special"))
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise UserError(
                f"tokenizer_config.json has the added token {token_id!r}: {token!r:.60}; fetch the file again"
            ) from error
    return added


def _read_if_there(path: Path) -> dict[str, Any]:
    return read_json(path) if path.is_file() else {}


def _special_names(path: Path) -> dict[str, str | None]:
    """The texts of BOS and EOS; {} if no file names them."""
    for name in ("tokenizer_config.json", "special_tokens_map.json"):
        config = _read_if_there(path / name)
        # Null says that there is none (Qwen2 has no BOS, though config.json numbers one).
        if "bos_token" in config or "eos_token" in config:
            return {key: _text(config.get(f"{key}_token")) for key in ("bos", "eos")}
    return {}


def _names_by_number(path: Path, document: dict[str, Any]) -> dict[str, str | None]:
    config = _read_if_there(path / "config.json")
    texts = {token.get("id"): token.get("content") for token in document.get("added_tokens") or ()}
    return {key: texts.get(_first(config.get(f"{key}_token_id"))) for key in ("bos", "eos")}


def _text(token: Any) -> str | None:
    """A token's text, which files write plainly or inside an object."""
    return token.get("content") if isinstance(token, dict) else token


def _first(value: Any) -> Any:
    return value[0] if isinstance(value, list) and value else value if not isinstance(value, list) else None
