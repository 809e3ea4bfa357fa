"""The description of a decoder; every field changes the computation."""

from __future__ import annotations

import dataclasses
import hashlib
import json

from cartridges_jax.rope import Rope

ACTIVATIONS = ("silu", "gelu_tanh")
# Fields of `Rope` that joined it after cartridges had been written, and their defaults.
_LATER_ROPE_FIELDS = {"scale": 1.0, "width": 0}


@dataclasses.dataclass(frozen=True)
class LayerKind:
    """The properties in which layers of one model differ.

    Attributes:
      rope: the rotation of queries and keys by position; None is none (layers without
        positions, as in SmolLM3).
      window: a token sees itself and the `window - 1` positions before it; 0 is all.
    """

    rope: Rope | None
    window: int = 0


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """Shapes and constants of a decoder.

    Attributes:
      num_layers: L.
      d_model: D.
      num_heads: N.
      num_kv_heads: K, divides N.
      head_dim: H.
      d_ff: width of the gated feed-forward layer.
      vocab_size: V.
      context_length: longest position the model was trained for, in tokens.
      norm_eps: added to the mean square in RMSNorm.
      tie_embeddings: the LM head is the embedding.
      period: layer l is of kind `period[l % len(period)]` (Gemma 3: five local layers,
        then a global one).
      activation: of the gate, one of `ACTIVATIONS`.
      qkv_bias, o_bias: the attention's projections have biases.
      mlp_bias: the feed-forward layer's three projections have biases.
      qk_norm: queries and keys are normalised per head before they are rotated.
      qk_norm_joint: `qk_norm` is over all heads together (OLMo 2).
      pre_norms: the inputs of attention and feed-forward layer are normalised; OLMo 2
        has `post_norms` alone.
      post_norms: the outputs of attention and feed-forward layer are normalised before
        they are added (Gemma 2 and 3).
      embedding_scale: factor of the embeddings.
      attention_scale: factor of the scores; None is H**-0.5.
      residual_scale: factor of the outputs of attention and feed-forward layer before they
        are added (Granite).
      attention_softcap: bounds attention scores; 0 is off.
      logit_scale: factor of the logits, before they are bounded.
      logit_softcap: bounds the LM head's logits; 0 is off.
      windows_see_prefix: False lets layers with a window see the whole prefix, however
        far back it is. The default is the model's behaviour with a real text there.
    """

    num_layers: int
    d_model: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    d_ff: int
    vocab_size: int
    context_length: int
    norm_eps: float
    tie_embeddings: bool
    period: tuple[LayerKind, ...]
    activation: str = "silu"
    qkv_bias: bool = False
    o_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False
    qk_norm_joint: bool = False
    pre_norms: bool = True
    post_norms: bool = False
    embedding_scale: float = 1.0
    attention_scale: float | None = None
    residual_scale: float = 1.0
    attention_softcap: float = 0.0
    logit_scale: float = 1.0
    logit_softcap: float = 0.0
    windows_see_prefix: bool = True

    def kind(self, layer: int) -> LayerKind:
        return self.period[layer % len(self.period)]

    def fingerprint(self) -> str:
        """sha256 of the fields, which distinguishes one model's cartridges from another's.

        A field at its default does not count, so that one added later leaves the
        fingerprints of the models that do not use it, and their cartridges, valid.
        """
        values = dataclasses.asdict(self)
        for rope in filter(None, (kind["rope"] for kind in values["period"])):
            for name, default in _LATER_ROPE_FIELDS.items():
                if rope[name] == default:
                    del rope[name]
        fields = {
            field.name: values[field.name] for field in dataclasses.fields(self) if values[field.name] != field.default
        }
        return hashlib.sha256(json.dumps(fields, sort_keys=True).encode()).hexdigest()


def shortest_period(kinds: list[LayerKind]) -> tuple[LayerKind, ...]:
    """The shortest pattern that the layers' kinds repeat; its last repetition may be cut."""
    for length in range(1, len(kinds)):
        if all(kind == kinds[layer % length] for layer, kind in enumerate(kinds)):
            return tuple(kinds[:length])
    return tuple(kinds)
