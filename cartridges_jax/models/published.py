"""The config.json of some models, for work that needs a model's shape and not its weights.

The values are the publishers', from the `config.json` of the repository that the entry is named after on
https://huggingface.co; fields that change nothing about what is computed are left out.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from cartridges_jax.errors import UserError
from cartridges_jax.formats.gguf import GGUFFile
from cartridges_jax.formats.safetensors_files import CONFIG_FILE, read_json
from cartridges_jax.models.config import ModelConfig
from cartridges_jax.models.families import read_gguf_metadata, read_hugging_face_config


def _llama(**values: Any) -> dict[str, Any]:
    factor = values.pop("factor")
    return {
        "architectures": ["LlamaForCausalLM"], "attention_bias": False, "head_dim": 128, "hidden_act": "silu",
        "max_position_embeddings": 131072, "mlp_bias": False, "num_key_value_heads": 8, "rms_norm_eps": 1e-5,
        "rope_scaling": {
            "factor": factor, "high_freq_factor": 4.0, "low_freq_factor": 1.0,
            "original_max_position_embeddings": 8192, "rope_type": "llama3",
        },
        "rope_theta": 500000.0, "tie_word_embeddings": False, "vocab_size": 128256, **values,
    }  # fmt: skip


def _qwen3(**values: Any) -> dict[str, Any]:
    return {
        "architectures": ["Qwen3ForCausalLM"], "attention_bias": False, "head_dim": 128, "hidden_act": "silu",
        "max_position_embeddings": 40960, "num_key_value_heads": 8, "rms_norm_eps": 1e-6, "rope_scaling": None,
        "rope_theta": 1000000, "sliding_window": None, "tie_word_embeddings": False, "use_sliding_window": False,
        "vocab_size": 151936, **values,
    }  # fmt: skip


PUBLISHED: Mapping[str, Mapping[str, Any]] = {
    # HuggingFaceTB/SmolLM2-135M-Instruct, under its name here.
    "smollm2-135m-instruct": {
        "architectures": ["LlamaForCausalLM"], "attention_bias": False, "hidden_act": "silu", "hidden_size": 576,
        "intermediate_size": 1536, "max_position_embeddings": 8192, "mlp_bias": False, "num_attention_heads": 9,
        "num_hidden_layers": 30, "num_key_value_heads": 3, "rms_norm_eps": 1e-5, "rope_scaling": None,
        "rope_theta": 100000, "tie_word_embeddings": True, "vocab_size": 49152,
    },
    "meta-llama/Llama-3.2-3B-Instruct": _llama(
        hidden_size=3072, intermediate_size=8192, num_attention_heads=24, num_hidden_layers=28, factor=32.0,
        tie_word_embeddings=True,
    ),
    "meta-llama/Llama-3.1-8B-Instruct": _llama(
        hidden_size=4096, intermediate_size=14336, num_attention_heads=32, num_hidden_layers=32, factor=8.0
    ),
    "meta-llama/Llama-3.1-70B-Instruct": _llama(
        hidden_size=8192, intermediate_size=28672, num_attention_heads=64, num_hidden_layers=80, factor=8.0
    ),
    "Qwen/Qwen3-4B": _qwen3(
        hidden_size=2560, intermediate_size=9728, max_window_layers=36, num_attention_heads=32, num_hidden_layers=36,
        tie_word_embeddings=True,
    ),
    "Qwen/Qwen3-32B": _qwen3(
        hidden_size=5120, intermediate_size=25600, max_window_layers=64, num_attention_heads=64, num_hidden_layers=64
    ),
}  # fmt: skip


def config_without_weights(source: str) -> ModelConfig:
    """Returns a model's config from its description alone.

    Args:
      source: a name of `PUBLISHED`, a directory with a config.json, that file itself, or a GGUF file.

    Raises:
      UserError: none of these, or a file that describes no supported model.
    """
    if source in PUBLISHED:
        return read_hugging_face_config(PUBLISHED[source])[1]
    path = Path(source)
    if path.suffix == ".gguf" and path.is_file():
        file = GGUFFile(path)
        names = file.tensor_names
        rope_freqs = tuple(file.read("rope_freqs.weight").tolist()) if "rope_freqs.weight" in names else ()
        return read_gguf_metadata(file.metadata, tie_embeddings="output.weight" not in names, rope_freqs=rope_freqs)[1]
    if path.is_dir():
        path = path / CONFIG_FILE
    if path.suffix == ".json" and path.is_file():
        return read_hugging_face_config(read_json(path))[1]
    raise UserError(
        f"model {source!r}: to compile ahead, give a directory with its config.json, a GGUF file, or one of "
        f"{', '.join(PUBLISHED)}"
    )
