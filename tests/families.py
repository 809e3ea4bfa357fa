"""Tiny random models of every family in transformers, saved to disk and read back by us.

A new family is a line in `FAMILIES`: the tests of test_families.py then run for it.
"""

from __future__ import annotations

import dataclasses
import functools
from pathlib import Path
from typing import Any

import gguf
import gguf_files
import numpy as np
from peers import torch, transformers

from cartridges_jax.formats.gguf import GGUFFile
from cartridges_jax.formats.safetensors_files import SafetensorsDirectory
from cartridges_jax.models import Model, ModelConfig
from cartridges_jax.models.families import read_gguf_metadata, read_hugging_face_config
from cartridges_jax.models.weights import load_params

_SHAPES = {
    "hidden_size": 64, "intermediate_size": 80, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2, "vocab_size": 160, "max_position_embeddings": 512, "rms_norm_eps": 3e-3,
}  # fmt: skip
_LLAMA31 = {
    "rope_type": "llama3", "rope_theta": 5000.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}  # fmt: skip
_YARN = {"rope_type": "yarn", "rope_theta": 5000.0, "factor": 4.0, "original_max_position_embeddings": 400}


@dataclasses.dataclass(frozen=True)
class TinyFamily:
    """A family's tiny model.

    Attributes:
      config: name of its config's class in transformers.
      fields: what differs from `_SHAPES`.
      gguf: its architecture in GGUF files; "" leaves that test out.
      perturbed: overrides of `fields`, each of which must move the logits.
    """

    config: str
    fields: dict[str, Any]
    gguf: str = ""
    perturbed: tuple[dict[str, Any], ...] = ()


def _rope(theta: float, **scaling: Any) -> dict[str, Any]:
    return {"rope_parameters": {"rope_type": "default", "rope_theta": theta, **scaling}}


_LONGROPE = {
    "rope_type": "longrope", "rope_theta": 5000.0, "short_factor": [1.0, 1.1, 1.3, 1.7, 2.0, 2.5],
    "long_factor": [1.0, 2.0, 3.0, 5.0, 8.0, 9.0], "partial_rotary_factor": 0.75,
}  # fmt: skip

_BOTH_ROPES = {"full_attention": {"rope_type": "linear", "rope_theta": 3000.0, "factor": 4.0},
               "sliding_attention": {"rope_type": "default", "rope_theta": 90.0}}  # fmt: skip

FAMILIES = {
    "llama2": TinyFamily(
        "LlamaConfig",
        {"num_key_value_heads": 4, "tie_word_embeddings": False, **_rope(1000.0)},
        gguf="llama",
        perturbed=({"rms_norm_eps": 0.1}, {"hidden_act": "gelu_pytorch_tanh"}),
    ),
    "llama3": TinyFamily("LlamaConfig", {**_rope(50_000.0), "attention_bias": True}, perturbed=(_rope(100.0),)),
    "llama31": TinyFamily(
        "LlamaConfig",
        {"rope_parameters": _LLAMA31},
        gguf="llama",
        perturbed=tuple(
            {"rope_parameters": {**_LLAMA31, name: value}}
            for name, value in {
                "factor": 2.0, "low_freq_factor": 3.0, "high_freq_factor": 16.0, "rope_theta": 100.0,
                "original_max_position_embeddings": 100,
            }.items()
        ),
    ),
    "llama_yarn": TinyFamily(
        "LlamaConfig",
        {"rope_parameters": _YARN, "mlp_bias": True},
        gguf="",
        perturbed=(
            *({"rope_parameters": {**_YARN, name: value}} for name, value in {
                "factor": 2.0, "beta_fast": 4.0, "beta_slow": 0.2, "original_max_position_embeddings": 100,
                "attention_factor": 0.8, "truncate": False,
            }.items()),
            {"rope_parameters": {**_YARN, "mscale": 0.7, "mscale_all_dim": 1.3}}, {"mlp_bias": False},
        ),
    ),
    "llama_dynamic": TinyFamily(
        "LlamaConfig", {**_rope(5000.0, rope_type="dynamic", factor=4.0)}, perturbed=(_rope(100.0),)
    ),
    "llama32": TinyFamily(
        "LlamaConfig",
        {"rope_parameters": {**_LLAMA31, "factor": 32.0}, "tie_word_embeddings": True, "head_dim": 24},
    ),
    "mistral": TinyFamily(
        "MistralConfig",
        {**_rope(2000.0), "sliding_window": 8, "head_dim": 24},
        perturbed=({"sliding_window": 5}, {"sliding_window": None}),
    ),
    "qwen2": TinyFamily(
        "Qwen2Config",
        {**_rope(3000.0), "tie_word_embeddings": True},
        gguf="qwen2",
        perturbed=(_rope(100.0), {"use_sliding_window": True, "sliding_window": 6, "max_window_layers": 1}),
    ),
    "qwen2_yarn": TinyFamily(
        "Qwen2Config", {"rope_parameters": {**_YARN, "rope_theta": 3000.0}}, gguf="qwen2"
    ),
    "qwen2_windows": TinyFamily(
        "Qwen2Config",
        {**_rope(3000.0), "use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1},
        perturbed=({"max_window_layers": 2}, {"sliding_window": 4}),
    ),
    "qwen3": TinyFamily(
        "Qwen3Config", {**_rope(3000.0), "head_dim": 32}, gguf="qwen3", perturbed=({"rms_norm_eps": 0.1},)
    ),
    "gemma2": TinyFamily(
        "Gemma2Config",
        {
            **_rope(900.0), "num_hidden_layers": 5, "head_dim": 24, "sliding_window": 8, "query_pre_attn_scalar": 10,
            "attn_logit_softcapping": 3.0, "final_logit_softcapping": 4.0,
        },
        perturbed=(
            {"attn_logit_softcapping": None}, {"final_logit_softcapping": None}, {"query_pre_attn_scalar": 60},
            {"sliding_window": 4}, {"hidden_activation": "silu"},
        ),
    ),
    "gemma3": TinyFamily(
        "Gemma3TextConfig",
        # Two layers more than a period.
        {
            "num_hidden_layers": 8, "head_dim": 24, "sliding_window": 8, "query_pre_attn_scalar": 24,
            "rope_parameters": _BOTH_ROPES,
        },
        gguf="gemma3",
        perturbed=(
            {"query_pre_attn_scalar": 60}, {"sliding_window": 4},
            {"layer_types": ["sliding_attention", "full_attention"] * 4},
            {"rope_parameters": {**_BOTH_ROPES, "sliding_attention": {"rope_type": "default", "rope_theta": 500.0}}},
            {"rope_parameters": {**_BOTH_ROPES, "full_attention": {"rope_type": "default", "rope_theta": 3000.0}}},
        ),
    ),
    "smollm3": TinyFamily(
        "SmolLM3Config",
        {**_rope(4000.0), "num_hidden_layers": 6, "pad_token_id": 0},
        gguf="smollm3",
        perturbed=({"no_rope_layers": [1, 0, 1, 0, 1, 0]}, _rope(100.0)),
    ),
    "granite": TinyFamily(
        "GraniteConfig",
        {
            **_rope(3000.0), "tie_word_embeddings": True, "embedding_multiplier": 6.0, "attention_multiplier": 0.4,
            "residual_multiplier": 0.6, "logits_scaling": 1.5,
        },
        gguf="granite",
        perturbed=(
            {"embedding_multiplier": 2.0}, {"attention_multiplier": 0.1}, {"residual_multiplier": 0.3},
            {"logits_scaling": 0.7}, _rope(100.0), {"attention_bias": True},
        ),
    ),
    "olmo2": TinyFamily(
        "Olmo2Config", {**_rope(3000.0), "pad_token_id": 0}, gguf="olmo2",
        perturbed=({"rms_norm_eps": 0.1}, {"attention_bias": True}, _rope(100.0)),
    ),
    "phi3": TinyFamily(
        "Phi3Config", {**_rope(3000.0), "pad_token_id": 0, "sliding_window": 8}, gguf="phi3",
        perturbed=(
            {"sliding_window": None}, {"sliding_window": 5},
            {"rope_parameters": {"rope_type": "default", "rope_theta": 3000.0, "partial_rotary_factor": 0.5}},
        ),
    ),
    # Phi-4-mini's kind: a part of each head is rotated, with the short factors up to the original context.
    "phi3_longrope": TinyFamily(
        "Phi3Config",
        {
            "rope_parameters": _LONGROPE, "pad_token_id": 0, "max_position_embeddings": 2048,
            "original_max_position_embeddings": 512, "tie_word_embeddings": True,
        },
        perturbed=({"rope_parameters": {**_LONGROPE, "short_factor": [1.0] * 6}}, {"max_position_embeddings": 8192}),
    ),
}  # fmt: skip


def build_twin(family: TinyFamily, seed: int, **overrides: Any) -> transformers.PreTrainedModel:
    """The family's model in transformers, float32, with weights that make every field matter."""
    fields = {**_SHAPES, "bos_token_id": 1, "eos_token_id": 2, **family.fields, **overrides}
    config = getattr(transformers, family.config)(**fields, attn_implementation="eager")
    twin = transformers.AutoModelForCausalLM.from_config(config)
    rng = np.random.default_rng(seed)
    gemma = "Gemma" in type(config).__name__
    with torch.no_grad():
        for name, weight in twin.named_parameters():
            shape = tuple(weight.shape)
            if name.endswith("norm.weight"):
                value = rng.uniform(0.6, 1.4, shape) - gemma
            elif name.endswith("bias"):
                value = 0.5 * rng.standard_normal(shape)
            elif "embed_tokens" in name or "lm_head" in name:
                value = 0.2 * rng.standard_normal(shape)
            else:
                value = 1.5 * shape[1] ** -0.5 * rng.standard_normal(shape)
            weight.copy_(torch.from_numpy(value.astype(np.float32)))
    return twin.eval().requires_grad_(False)


def save(twin: transformers.PreTrainedModel, directory: Path, max_shard_size: str = "5GB") -> Path:
    twin.save_pretrained(directory, max_shard_size=max_shard_size)
    return Path(directory)


def load(directory: Path, **options: Any) -> Model:
    """The model of a directory, without a text side."""
    file = SafetensorsDirectory(directory)
    family, config = read_hugging_face_config(file.config)
    config = dataclasses.replace(config, **options)
    return _without_text(config, load_params(file, family.names, config, np.float32))


def load_gguf(path: Path) -> Model:
    """The same of a GGUF file."""
    file = GGUFFile(path)
    factors = tuple(file.read("rope_freqs.weight").tolist()) if "rope_freqs.weight" in file.tensor_names else ()
    tied = "output.weight" not in file.tensor_names
    family, config = read_gguf_metadata(file.metadata, tie_embeddings=tied, rope_freqs=factors)
    return _without_text(config, load_params(file, family.gguf_names, config, np.float32))


def _without_text(config: ModelConfig, params: Any) -> Model:
    return Model("twin", config, params, np.dtype(np.float32), tokenizer=None, chat=None)


def write_gguf(twin: transformers.PreTrainedModel, architecture: str, path: Path) -> Path:
    """The twin as llama.cpp's converter stores it; names come from the gguf package's own table."""
    config = twin.config
    names = gguf.get_tensor_name_map(
        next(key for key, name in gguf.MODEL_ARCH_NAMES.items() if name == architecture), config.num_hidden_layers
    )
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    rope = config.rope_parameters
    metadata = {
        "block_count": config.num_hidden_layers, "context_length": config.max_position_embeddings,
        "embedding_length": config.hidden_size, "feed_forward_length": config.intermediate_size,
        "head_count": config.num_attention_heads, "head_count_kv": config.num_key_value_heads,
        "key_length": head_dim, "value_length": head_dim, "rope_dimension_count": head_dim,
        "layer_norm_rms_eps": config.rms_norm_eps, "vocab_size": config.vocab_size,
    }  # fmt: skip
    if architecture == "granite":
        metadata |= {
            "embedding_scale": config.embedding_multiplier, "attention_scale": config.attention_multiplier,
            "residual_scale": config.residual_multiplier, "logit_scale": config.logits_scaling,
        }  # fmt: skip
    if architecture == "gemma3":
        metadata |= {
            "sliding_window": config.sliding_window,
            "rope_freq_base_swa": rope["sliding_attention"]["rope_theta"],
        }
        rope = rope["full_attention"]
        metadata |= {"rope_scaling_type": gguf.RopeScalingType.LINEAR, "rope_scaling_factor": rope["factor"]}
    metadata["rope_freq_base"] = rope["rope_theta"]
    if rope["rope_type"] == "yarn":
        metadata |= {
            "rope_scaling_type": gguf.RopeScalingType.YARN, "rope_scaling_factor": rope["factor"],
            "rope_scaling_orig_ctx_len": rope["original_max_position_embeddings"],
        }  # fmt: skip
    if getattr(config, "sliding_window", None) and architecture == "phi3":
        metadata["sliding_window"] = config.sliding_window
    tensors = {}
    if rope["rope_type"] == "llama3":
        base = rope["rope_theta"] ** -(np.arange(0, head_dim, 2) / head_dim)
        tensors["rope_freqs.weight"] = (base / twin.model.rotary_emb.inv_freq.numpy()).astype(np.float32)
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
    for name, weight in twin.named_parameters():
        if name == "lm_head.weight" and config.tie_word_embeddings:
            continue
        value = weight.numpy()
        projection = name.split(".")[-2]
        if architecture in ("llama", "smollm3", "granite") and projection in heads:
            value = gguf_files.permute(value, heads[projection])
        if architecture == "gemma3" and name.endswith("norm.weight"):
            value = value + 1
        tensors[names.get_name(name, try_suffixes=(".weight", ".bias"))] = value
    return gguf_files.write(path, architecture, metadata, tensors)


@functools.cache
def saved_family(name: str, root: Path) -> tuple[Model, transformers.PreTrainedModel]:
    """(ours, twin) of a family, once per process."""
    twin = build_twin(FAMILIES[name], seed=11)
    return load(save(twin, root / name)), twin
