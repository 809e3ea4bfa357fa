"""The tests' reference: one dense softmax over concatenated keys, in NumPy float64."""

from __future__ import annotations

import numpy as np


def dense_attention(
    queries, keys, values, mask, prefix=None, *, prefix_mask=None, scale=None, softcap=0.0
) -> np.ndarray:
    """Computes `attention.attend`, one query at a time in float64.

    Args:
      queries: [B, T, N, H]; keys, values: [B, K, S, H]; mask: [B, T, S] bool;
      prefix: (keys [K, P, H], values [K, P, H], bias [K, P] or None) or None;
      prefix_mask: [B, T, P] bool or None.

    Returns:
      [B, T, N, H] float64.
    """
    queries, keys, values = (np.asarray(x, np.float64) for x in (queries, keys, values))
    num_rows, num_tokens, num_heads, head_dim = queries.shape
    scale = head_dim**-0.5 if scale is None else scale
    queries_per_kv = num_heads // keys.shape[1]
    out = np.zeros(queries.shape)
    for b in range(num_rows):
        for n in range(num_heads):
            k = n // queries_per_kv
            for t in range(num_tokens):
                seen = np.asarray(mask)[b, t]
                all_keys, all_values = keys[b, k][seen], values[b, k][seen]
                bias = np.zeros(len(all_keys))
                if prefix is not None:
                    prefix_keys, prefix_values, prefix_bias = prefix
                    prefix_seen = slice(None) if prefix_mask is None else np.asarray(prefix_mask)[b, t]
                    slot_bias = np.zeros(prefix_keys.shape[1]) if prefix_bias is None else np.asarray(prefix_bias)[k]
                    all_keys = np.concatenate([np.asarray(prefix_keys, np.float64)[k][prefix_seen], all_keys])
                    all_values = np.concatenate([np.asarray(prefix_values, np.float64)[k][prefix_seen], all_values])
                    bias = np.concatenate([slot_bias[prefix_seen], bias])
                scores = all_keys @ queries[b, t, n] * scale
                if softcap:
                    scores = softcap * np.tanh(scores / softcap)
                scores = scores + bias
                weights = np.exp(scores - scores.max())
                out[b, t, n] = weights @ all_values / weights.sum()
    return out
