"""SentencePiece tokenizers (Gemma, Llama 2, Mistral), from a `tokenizer.model` or a GGUF file's metadata.

The `sentencepiece` package splits the text. Its model is rebuilt here with every border marked as a
control piece, which its encoder never produces; user-defined pieces (Gemma: runs of newlines, HTML tags)
it finds in any text. Matches llama.cpp token by token (tests/test_sentence_piece.py).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from sentencepiece import SentencePieceProcessor
from sentencepiece.sentencepiece_model_pb2 import ModelProto

from cartridges_jax.errors import UserError, one_line
from cartridges_jax.text._base import Place, Tokenizer, looks_like_control, sha256_of

# The piece types, which llama.cpp numbers in the same way.
_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED, _UNUSED, _BYTE = range(1, 7)
_KINDS = {1: "unigram", 2: "BPE", 3: "word", 4: "char"}
_SPACE = "▁"


class SentencePieceTokenizer(Tokenizer):
    """SentencePiece with byte fallback and without normalisation, so that offsets follow from the pieces."""

    def __init__(
        self,
        pieces: Sequence[str],
        scores: Sequence[float],
        types: Sequence[int],
        *,
        space_in_front: bool,
        model_type: int = 2,
        bos_id: int | None = None,
        eos_id: int | None = None,
        control_ids: Sequence[int] = (),
    ):
        """
        Args:
          pieces: the vocabulary, by id.
          scores: per piece; a BPE model merges the pair with the highest first.
          types: 1 normal, 2 unknown, 3 control, 4 user-defined, 5 unused, 6 byte.
          space_in_front: whether a text is read as if a space preceded it (after a control token too).
          model_type: 1 unigram, 2 BPE.
          control_ids: further pieces that no text may make.

        Raises:
          UserError: the parts do not fit, or there is no byte fallback.
        """
        if not len(pieces) == len(scores) == len(types):
            raise UserError(
                f"{len(pieces)} tokens, {len(scores)} scores and {len(types)} token types; the model file is damaged"
            )
        if sum(kind == _BYTE for kind in types) != 256:
            raise UserError("the SentencePiece vocabulary lacks pieces for single bytes; use another model")
        named = {i for i in (*control_ids, bos_id, eos_id) if i is not None and 0 <= i < len(pieces)}
        types = [_safe_type(i, piece, kind, named) for i, (piece, kind) in enumerate(zip(pieces, types))]
        if _UNKNOWN not in types:  # the package wants one; with byte fallback it is never used
            types[types.index(_CONTROL) if _CONTROL in types else 0] = _UNKNOWN
        super().__init__(
            pieces,
            {piece: i for i, (piece, kind) in enumerate(zip(pieces, types)) if kind in (_CONTROL, _UNKNOWN)},
            fingerprint=sha256_of([list(pieces), list(scores), types, space_in_front, model_type]),
            bos_id=bos_id,
            eos_id=eos_id,
        )
        self._is_byte = [kind == _BYTE for kind in types]
        proto = ModelProto()
        for piece, score, kind in zip(pieces, scores, types):
            # llama.cpp's converter writes user-defined runs of spaces (Gemma) as plain spaces.
            proto.pieces.add(
                piece=piece.replace(" ", _SPACE) if kind == _USER_DEFINED else piece, score=score, type=kind
            )
        proto.trainer_spec.model_type = model_type
        proto.trainer_spec.byte_fallback = True
        proto.normalizer_spec.name = "identity"
        proto.normalizer_spec.remove_extra_whitespaces = False
        self._inside = _processor(proto, False)
        self._in_front = _processor(proto, True) if space_in_front else self._inside
        self._space_in_front = space_in_front

    @classmethod
    def from_metadata(cls, metadata: Mapping) -> SentencePieceTokenizer:
        """The tokenizer of a GGUF file's metadata, which names it "llama".

        Raises:
          KeyError: a part is missing.
          UserError: as from the constructor.
        """
        names = ("bos", "eos", "eot", "eom", "unknown", "padding", "mask")
        named = {name: metadata.get(f"tokenizer.ggml.{name}_token_id") for name in names}
        return cls(
            metadata["tokenizer.ggml.tokens"],
            metadata["tokenizer.ggml.scores"],
            metadata["tokenizer.ggml.token_type"],
            space_in_front=metadata.get("tokenizer.ggml.add_space_prefix", True),
            bos_id=named["bos"],
            eos_id=named["eos"],
            control_ids=[token_id for token_id in named.values() if token_id is not None],
        )

    @classmethod
    def from_model_file(
        cls, data: bytes, *, added: Mapping[int, tuple[str, bool]], bos: str | None, eos: str | None
    ) -> SentencePieceTokenizer:
        """The tokenizer of a `tokenizer.model`.

        Args:
          data: the file's bytes.
          added: id to (text, special) of the tokens that tokenizer_config.json adds or changes.
          bos, eos: the texts of the tokens, where tokenizer_config.json names them.

        Raises:
          UserError: the file is damaged, or of a kind that is not supported.
        """
        proto = ModelProto()
        try:
            proto.ParseFromString(data)
        except Exception as error:  # protobuf's DecodeError, wherever it lives in this version
            raise UserError("not a SentencePiece model, or a damaged one; fetch it again") from error
        if not proto.pieces:
            raise UserError("the SentencePiece model has no pieces; fetch it again")
        normalizer, kind = proto.normalizer_spec, proto.trainer_spec.model_type
        if normalizer.precompiled_charsmap or normalizer.remove_extra_whitespaces or kind not in (1, 2):
            raise UserError(
                f"a SentencePiece model of type {_KINDS.get(kind, kind)} with the normaliser {normalizer.name!r}; only "
                "BPE and unigram models without normalisation are supported: use one with a tokenizer.json"
            )
        rows = [(piece.piece, piece.score, piece.type) for piece in proto.pieces]
        for token_id, (text, special) in sorted(added.items()):
            row = (text, 0.0, _CONTROL if special else _USER_DEFINED)
            if token_id < len(rows):
                if special:
                    rows[token_id] = row
            elif token_id == len(rows):
                rows.append(row)
            else:
                raise UserError(f"added token {text!r} has id {token_id}, but ids {len(rows)} and up are not named")
        pieces, scores, types = zip(*rows)
        return cls(
            pieces,
            scores,
            types,
            space_in_front=normalizer.add_dummy_prefix,
            model_type=kind,
            bos_id=_index(pieces, bos),
            eos_id=_index(pieces, eos),
        )

    def _encode_run(self, text: str, place: Place) -> tuple[list[int], list[tuple[int, int]]]:
        in_front = self._space_in_front and place != "text"
        ids = (self._in_front if in_front else self._inside).encode(text)
        # Without normalisation the pieces are the text, piece by piece, with a space's own sign.
        data = text.encode()
        char_of_byte = [i for i, char in enumerate(text) for _ in range(len(char.encode()))]
        offsets, position = [], -1 if in_front else 0
        for token_id in ids:
            size = 1 if self._is_byte[token_id] else len(self._tokens[token_id].replace(_SPACE, " ").encode())
            start, end = max(position, 0), position + size
            first = char_of_byte[start] if start < len(data) else len(text)
            offsets.append((first, char_of_byte[end - 1] + 1 if end > 0 else 0))
            position = end
        return ids, offsets

    def _decode_run(self, ids: list[int], place: Place) -> str:
        return (self._inside if place == "text" else self._in_front).decode(ids)


def _safe_type(token_id: int, piece: str, kind: int, named: set[int]) -> int:
    """A piece's type, with whatever marks a border made a control piece."""
    if kind in (_NORMAL, _USER_DEFINED) and (token_id in named or looks_like_control(piece)):
        return _CONTROL
    return kind


def _processor(proto: ModelProto, space_in_front: bool) -> SentencePieceProcessor:
    proto.normalizer_spec.add_dummy_prefix = space_in_front
    try:
        return SentencePieceProcessor(model_proto=proto.SerializeToString())
    except Exception as error:  # RuntimeError or ValueError, by version
        raise UserError(
            f"the SentencePiece vocabulary is not usable ({one_line(error)}); the model file is damaged"
        ) from error


def _index(pieces: Sequence[str], piece: str | None) -> int | None:
    return pieces.index(piece) if piece in pieces else None
