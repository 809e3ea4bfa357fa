"""The one attention function, and the choice of its implementation."""

from __future__ import annotations

from jaxtyping import Bool, Float, Int

from cartridges_jax.attention import tpu, xla
from cartridges_jax.attention.implementation import current_implementation
from cartridges_jax.attention.masks import packed_causal_mask, prefix_mask
from cartridges_jax.attention.types import Array, LayerPrefix, PackedRows


def attend(
    queries: Float[Array, "B T N H"],
    keys: Float[Array, "B K S H"],
    values: Float[Array, "B K S H"],
    mask: Bool[Array, "B T S"] | PackedRows,
    prefix: LayerPrefix | None = None,
    *,
    prefix_mask: Bool[Array, "B T P"] | None = None,
    scale: float | None = None,
    softcap: float = 0.0,
) -> Float[Array, "B T N H"]:
    """Softmax attention of T queries over P prefix slots and S own slots.

    Scores are normalised in float32. Masks select `attention.xla`, packed rows the kernels
    of `attention.tpu`; `packed_view` returns the form that suits the implementation in use.

    Args:
      queries: [B, T, N, H].
      keys: [B, K, S, H]; query head n reads key head n // (N / K).
      values: [B, K, S, H].
      mask: [B, T, S] bool, True where an own slot is seen; each query sees one. Or packed
        rows of T = S tokens.
      prefix: the layer's prefix, shared by the rows.
      prefix_mask: [B, T, P] bool, True where a prefix slot is seen; None is everywhere.
        Unused with packed rows, which contain it.
      scale: of the scores; H**-0.5 by default.
      softcap: c bounds the scores as c * tanh(score / c), before bias and masks (Gemma
        2, arXiv 2408.00118); 0 is off.

    Returns:
      [B, T, N, H] in the dtype of `queries`.
    """
    scale = queries.shape[-1] ** -0.5 if scale is None else scale
    queries = (queries * scale).astype(queries.dtype)
    if isinstance(mask, PackedRows):
        interpret = current_implementation() == "interpret"
        return tpu.attend_packed(queries, keys, values, mask, prefix, softcap=softcap, interpret=interpret)
    return xla.attend_masked(queries, keys, values, mask, prefix, prefix_mask, softcap)


def packed_view(
    segment_ids: Int[Array, "B T"],
    positions: Int[Array, "B T"],
    prefix_positions: Int[Array, " P"] | None,
    *,
    window: int,
    head_dim: int,
) -> tuple[Bool[Array, "B T T"] | PackedRows, Bool[Array, "B T P"] | None]:
    """The slots that tokens of packed rows see, in the form that suits the implementation in use.

    All layers of one kind share the result, so that masks are computed once and not in every layer.

    Args:
      segment_ids, positions, prefix_positions, window: as in `PackedRows`.
      head_dim: H; widths that the kernels do not take are left to XLA.

    Returns:
      `mask` and `prefix_mask` for `attend`.
    """
    if current_implementation() != "xla" and tpu.supports(head_dim):
        return PackedRows(segment_ids, positions, prefix_positions, window), None
    own = packed_causal_mask(segment_ids, positions, window)
    return own, prefix_mask(positions, prefix_positions, window) if window and prefix_positions is not None else None
