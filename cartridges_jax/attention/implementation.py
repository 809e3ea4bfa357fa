"""The attention that a program is traced with: XLA's own operations or the TPU kernels.

A static choice, made while a program is traced:

    "auto"       "tpu" where the mesh in context (`jax.set_mesh`), or without one the
                 default backend, is of TPUs; else "xla"
    "xla"        `attention.xla`, on any backend
    "tpu"        `attention.tpu`; also for programs that are compiled ahead for absent TPUs
    "interpret"  the same kernels run by Pallas' interpreter, on any backend, for tests

A GPU runs the XLA operations. cuDNN's fused attention (`jax.nn.dot_product_attention`) takes
one sequence of keys per row, so the shared prefix would be copied into every row; it knows
packed segments and a bias per key only as a dense [B, N, T, S]; and the log-sum-exp that
it returns, with which two attentions could be merged, carries no gradient.
"""

from __future__ import annotations

import jax

from cartridges_jax.errors import UserError

IMPLEMENTATIONS = ("auto", "xla", "tpu", "interpret")
# Part of the key of `jax.jit`'s caches: a program traced under one choice never serves another.
_chosen = jax.make_user_context("auto")


def attention_implementation(name: str):
    """A context manager under which programs are traced with this attention.

    Raises:
      UserError: the name is none of `IMPLEMENTATIONS`.
    """
    if name not in IMPLEMENTATIONS:
        raise UserError(f"attention {name!r}: choose one of {', '.join(IMPLEMENTATIONS)}")
    return _chosen(name)


def current_implementation() -> str:
    """The choice in context with "auto" decided: "xla", "tpu" or "interpret"."""
    if _chosen.value != "auto":
        return _chosen.value
    device = jax.sharding.get_abstract_mesh().abstract_device
    platform = jax.default_backend() if device is None else device.platform
    return "tpu" if platform == "tpu" else "xla"
