"""Large models at the paper's sizes on TPU slices and GPU nodes, by name: `experiments/pods.py:NAME`.

    python launch/aot.py --config=experiments/pods.py:llama31_8b_v5e16
    python launch/train.py --config=experiments/pods.py:llama31_8b_v5e16 --config.corpus=my.txt --workdir=DIR

A name is MODEL_CHIP, the chip with the number of devices. docs/aot.md has the memory and the times of each.
"""

from cartridges_jax.errors import UserError
from cartridges_jax.pipeline.pod import pod_config

_MODELS = {
    "llama32_3b": "meta-llama/Llama-3.2-3B-Instruct",
    "llama31_8b": "meta-llama/Llama-3.1-8B-Instruct",
    "llama31_70b": "meta-llama/Llama-3.1-70B-Instruct",
    "qwen3_4b": "Qwen/Qwen3-4B",
    "qwen3_32b": "Qwen/Qwen3-32B",
}
# Name: topology, mesh, micro-batches, and how the weights are stored if not in bfloat16.
PODS = {
    "llama32_3b_v5e8": ("v5e:2x4", "data:2,tensor:4", 8),
    "llama32_3b_v5p8": ("v5p:2x2x2", "data:8", 4),
    "llama32_3b_v6e8": ("v6e:2x4", "data:8", 4),
    "llama32_3b_h100x8": ("h100:8", "data:8", 4),
    "llama31_8b_v5e16": ("v5e:4x4", "data:4,tensor:4", 8),
    "llama31_8b_v5p16": ("v5p:2x2x4", "data:16", 2),
    "llama31_8b_v6e16": ("v6e:4x4", "data:8,tensor:2", 4),
    "llama31_8b_h100x8": ("h100:8", "data:8", 4),
    "llama31_8b_h100x16": ("h100:16", "data:16", 2),
    "llama31_70b_v5e32": ("v5e:4x8", "data:4,tensor:8", 8, "int8"),
    "llama31_70b_v5p16": ("v5p:2x2x4", "data:4,tensor:4", 8),
    "llama31_70b_v6e32": ("v6e:4x8", "data:4,tensor:8", 8),
    "llama31_70b_h100x8": ("h100:8", "tensor:8", 8),
    "qwen3_4b_v5e8": ("v5e:2x4", "data:2,tensor:4", 8),
    "qwen3_4b_v5p8": ("v5p:2x2x2", "data:8", 4),
    "qwen3_4b_v6e8": ("v6e:2x4", "data:8", 4),
    "qwen3_4b_h100x8": ("h100:8", "data:8", 4),
    "qwen3_32b_v5e16": ("v5e:4x4", "data:2,tensor:8", 16),
    "qwen3_32b_v5p16": ("v5p:2x2x4", "data:8,tensor:2", 4),
    "qwen3_32b_v6e16": ("v6e:4x4", "data:4,tensor:4", 8),
    "qwen3_32b_h100x8": ("h100:8", "data:2,tensor:4", 8),
}


def get_config(name: str = ""):
    """The run of one pod.

    Raises:
      UserError: an unknown name, or none.
    """
    if name not in PODS:
        asked = f"there is no pod {name!r}" if name else "a pod's name is missing"
        raise UserError(f"{asked}: write --config=experiments/pods.py:NAME with one of {', '.join(PODS)}")
    topology, mesh, micro_batches, *stored = PODS[name]
    model = _MODELS[name.rpartition("_")[0]]
    return pod_config(model, topology=topology, mesh=mesh, micro_batches=micro_batches, weights="".join(stored))
