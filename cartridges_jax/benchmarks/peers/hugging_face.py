"""Export of our model to a Hugging Face directory, from which every peer reads the same weights."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

from cartridges_jax.errors import UserError
from cartridges_jax.models import Model
from cartridges_jax.rope import Rope

_NAMES = {
    "attn_norm": "input_layernorm", "mlp_norm": "post_attention_layernorm", "q_proj": "self_attn.q_proj",
    "k_proj": "self_attn.k_proj", "v_proj": "self_attn.v_proj", "o_proj": "self_attn.o_proj",
    "gate_proj": "mlp.gate_proj", "up_proj": "mlp.up_proj", "down_proj": "mlp.down_proj",
}  # fmt: skip


def export(model: Model, directory: Path) -> Path:
    """Writes config.json and model.safetensors (float32) of a plain Llama, once.

    Args:
      model: with float matrices.

    Raises:
      UserError: a model that is not a plain Llama.
    """
    config = model.config
    (kind, *others) = config.period
    layers = model.params.get("layers", {}).get("0", {})
    plain = (
        not others and kind.rope is not None and kind.rope == Rope(kind.rope.base) and not kind.window
        and config.activation == "silu" and set(layers) == set(_NAMES)
        and (config.embedding_scale, config.attention_scale) == (1.0, None)
        and not config.attention_softcap and not config.logit_softcap
    )  # fmt: skip
    if not plain:
        raise UserError(
            f"the benchmarks' peers run plain Llama models, and {model.name} is not one: choose smollm2-135m-instruct"
        )
    done = directory / f"complete-{model.source_sha256[:16]}"
    if done.exists():
        return directory
    directory.mkdir(parents=True, exist_ok=True)
    tensors = {
        "model.embed_tokens.weight": np.asarray(model.params["embedding"], np.float32),
        "model.norm.weight": np.asarray(model.params["final_norm"], np.float32),
    }
    if not config.tie_embeddings:
        tensors["lm_head.weight"] = np.asarray(model.params["lm_head"], np.float32)
    for name, stacked in layers.items():
        for layer, value in enumerate(np.asarray(stacked, np.float32)):
            tensors[f"model.layers.{layer}.{_NAMES[name]}.weight"] = np.ascontiguousarray(value.T)
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    (directory / "config.json").write_text(
        json.dumps(
            {
                "architectures": ["LlamaForCausalLM"],
                "model_type": "llama",
                "num_hidden_layers": config.num_layers,
                "hidden_size": config.d_model,
                "num_attention_heads": config.num_heads,
                "num_key_value_heads": config.num_kv_heads,
                "head_dim": config.head_dim,
                "intermediate_size": config.d_ff,
                "vocab_size": config.vocab_size,
                "max_position_embeddings": config.context_length,
                "rope_parameters": {"rope_type": "default", "rope_theta": kind.rope.base},
                "rope_theta": kind.rope.base,
                "rms_norm_eps": config.norm_eps,
                "tie_word_embeddings": config.tie_embeddings,
                "hidden_act": "silu",
                "torch_dtype": "float32",
                "bos_token_id": None,
                "eos_token_id": None,
            },
            indent=2,
        )
    )
    done.touch()
    return directory
