"""The machine's ceilings: matrix products at the model's shapes, and memory reads.

The ceilings are candidates of `timing.interleaved` like every side, so that other
processes slow them as much as the sides that are compared with them.
"""

from __future__ import annotations

import importlib.metadata
import os
import platform
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from cartridges_jax.benchmarks.timing import Times
from cartridges_jax.models import ModelConfig
from cartridges_jax.models.costs import layer_matmul_shapes, layer_weights
from cartridges_jax.quantized import Narrow

MATMUL, MATMUL_BFLOAT16, BANDWIDTH = "ceiling: matmul", "ceiling: bfloat16 matmul", "ceiling: memory"
# Keys in `Ceilings.measured`.
CEILINGS = ("matmul_gflops", "matmul_bfloat16_gflops", "bandwidth_gb_s")
# Well beyond the last-level cache of a desktop or a cloud slice.
_BANDWIDTH_ROWS, _BANDWIDTH_COLUMNS = 1 << 16, 1 << 10


class Ceilings:
    """Probes of the machine, and the rates that their times give.

    Attributes:
      candidates: calls by name, for `timing.interleaved`.
    """

    def __init__(self, config: ModelConfig, num_tokens: int, num_head_rows: int):
        """
        Args:
          num_tokens: rows of the layers' products.
          num_head_rows: rows of the LM head's product.
        """
        self._flops = 2 * (
            config.num_layers * num_tokens * layer_weights(config) + num_head_rows * config.d_model * config.vocab_size
        )
        rng = np.random.default_rng(0)

        def normal(*shape):
            return jnp.asarray(rng.standard_normal(shape, np.float32) * shape[-1] ** -0.5)

        weights = [normal(*shape) for shape in layer_matmul_shapes(config)]
        x, rows, table = (
            normal(num_tokens, config.d_model),
            normal(num_head_rows, config.d_model),
            normal(config.vocab_size, config.d_model),
        )
        memory = jnp.ones((_BANDWIDTH_ROWS, _BANDWIDTH_COLUMNS), jnp.float32)
        self._bytes = memory.nbytes

        @jax.jit
        def products(x, weights, rows, table):
            """The products of one forward pass and little else; operands in the weights' dtype, sums in float32."""
            q, k, v, o, gate, up, down = weights

            def product(subscripts, a, b):
                return jnp.einsum(subscripts, a.astype(b.dtype), b, preferred_element_type=jnp.float32)

            def times(a, b):
                return product("ni,io->no", a, b)

            def layer(_, x):
                attention_output = times(times(x, q), o) + times(x, k).sum() + times(x, v).sum()
                return 0.1 * (attention_output + times(times(x, gate) * times(x, up), down))

            return jax.lax.fori_loop(0, config.num_layers, layer, x), product("nd,vd->nv", rows, table)

        narrow_weights, narrow_table = jax.tree.map(lambda a: a.astype(jnp.bfloat16), (weights, table))
        read = jax.jit(lambda memory: memory.sum(axis=1))
        self.candidates: dict[str, Callable[[], object]] = {
            MATMUL: lambda: jax.block_until_ready(products(x, weights, rows, table)),
            MATMUL_BFLOAT16: lambda: jax.block_until_ready(products(x, narrow_weights, rows, narrow_table)),
            BANDWIDTH: lambda: jax.block_until_ready(read(memory)),
        }

    def measured(self, times: Mapping[str, Times]) -> dict[str, Any]:
        """The field `machine` of results: the ceilings, the processor and the versions."""
        return {
            "matmul_gflops": times[MATMUL].per_second(self._flops) / 1e9,
            "matmul_bfloat16_gflops": times[MATMUL_BFLOAT16].per_second(self._flops) / 1e9,
            "bandwidth_gb_s": times[BANDWIDTH].per_second(self._bytes) / 1e9,
            **description(),
        }


def description() -> dict[str, Any]:
    """Processor, cores, load, and the versions of the compared libraries."""
    versions = {}
    for package in ("jax", "torch", "transformers", "peft", "xllamacpp"):
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            versions[package] = None
    return {
        "processor": _processor(),
        "cores": os.cpu_count(),
        "load_average": round(os.getloadavg()[0], 1),
        "python": platform.python_version(),
        "versions": versions,
    }


def _processor() -> str:
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            return next(line.split(":", 1)[1].strip() for line in file if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def multiplied_in(params: Any) -> str:
    """The dtype of the operands in products with a model's weights: "bfloat16" or "float32"."""
    narrow = any(isinstance(leaf, Narrow) for leaf in jax.tree.leaves(params, is_leaf=lambda x: isinstance(x, Narrow)))
    return "bfloat16" if narrow else "float32"


def flops_per_second(machine: dict[str, Any], multiplied_in: str) -> float:
    """The speed of matrix products on the machine, by the dtype of their operands."""
    return machine["matmul_gflops" if multiplied_in == "float32" else "matmul_bfloat16_gflops"] * 1e9


def step_seconds_at_least(
    flops: float, num_bytes_read: float, machine: dict[str, Any], *, multiplied_in: str = "float32"
) -> float:
    """The roofline: the longer of the time of the products and the time of the reads."""
    return max(flops / flops_per_second(machine, multiplied_in), num_bytes_read / (machine["bandwidth_gb_s"] * 1e9))
