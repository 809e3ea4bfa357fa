"""A tiny random Llama with a tiny tokenizer, and its twin in transformers.

The weights are drawn under Hugging Face's names and reach each side by its own way: the twin through its
`state_dict`, ours through a GGUF file whose q/k rows are permuted as llama.cpp's converter permutes them. So
a comparison of the two also covers the reading of the file.
"""

from __future__ import annotations

import copy
import dataclasses
from pathlib import Path
from typing import Any, NamedTuple

import gguf_files
import jax
import jax.numpy as jnp
import numpy as np
from peers import torch, transformers

from cartridges_jax import cartridge
from cartridges_jax.models import Decoder, Model, ModelConfig, lm_logits, load_model
from cartridges_jax.models.config import LayerKind
from cartridges_jax.rope import Rope

CONTROL_TOKENS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
# As in the published SmolLM2-Instruct checkpoints.
CHAT_TEMPLATE = (
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}"
    "{{ '<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n' }}"
    "{% endif %}{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
# fmt: off
MERGES = [
    "h e", "Ġ t", "Ġt he", "i n", "Ġ a", "e r", "o n", "r e", "a t", "n d", "Ġa nd", "o r", "e n", "Ġ o", "Ġo f",
    "in g", "Ġ s", "Ġ w", "Ġ c", "i s", "Ġ in", "l l", "e d", "Ġt o", "o u", "Ġ b", "Ġ f", "s t", "a r",
]
# fmt: on


def byte_alphabet() -> list[str]:
    """GPT-2's printable character for every byte."""
    printable = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = iter(range(256, 512))
    return [chr(byte) if byte in printable else chr(next(others)) for byte in range(256)]


def vocabulary() -> list[str]:
    """Control tokens, bytes, then what the merges make; `tiny_config().vocab_size` entries."""
    return CONTROL_TOKENS + byte_alphabet() + [merge.replace(" ", "") for merge in MERGES]


def tiny_config(*, rope_base: float = 730.0, **overrides) -> ModelConfig:
    """L=3, D=64, N=4, K=2, H=16, with constants that no library has as its default."""
    config = ModelConfig(
        num_layers=3,
        d_model=64,
        num_heads=4,
        num_kv_heads=2,
        head_dim=16,
        d_ff=96,
        vocab_size=len(vocabulary()),
        context_length=512,
        norm_eps=3e-3,
        tie_embeddings=True,
        period=(LayerKind(Rope(rope_base)),),
    )
    return dataclasses.replace(config, **overrides)


def rope_base(config: ModelConfig) -> float:
    """Of a model whose layers are all alike."""
    (kind,) = config.period
    return kind.rope.base


def random_weights(config: ModelConfig, seed: int) -> dict[str, np.ndarray]:
    """Weights under Hugging Face's names, [out, in], of a model that does not repeat itself."""
    rng = np.random.default_rng(seed)
    D, F, H = config.d_model, config.d_ff, config.head_dim

    def matrix(num_out, num_in, scale=1.0):
        return (rng.standard_normal((num_out, num_in)) * scale * num_in**-0.5).astype(np.float32)

    def table():
        rows = rng.standard_normal((config.vocab_size, D)) * 0.35
        # Bytes outside ASCII seldom win, so that generated text is mostly valid UTF-8 …
        rare = [i for i, token in enumerate(vocabulary()) if len(token) == 1 and ord(token) > 126 and token != "Ġ"]
        rows[[i for i in rare if i < len(rows)]] *= 0.2
        rows[CONTROL_TOKENS.index("<|im_end|>")] *= 1.6  # so that some sampled turns end
        return rows.astype(np.float32)

    weights = {
        "model.embed_tokens.weight": table(),
        # … and random signs here keep a tied head from predicting the token just read.
        "model.norm.weight": (rng.choice([-1, 1], D) * rng.uniform(0.6, 1.4, D)).astype(np.float32),
    }
    if not config.tie_embeddings:
        weights["lm_head.weight"] = table()
    for layer in range(config.num_layers):
        weights |= {
            f"model.layers.{layer}.{name}.weight": value
            for name, value in {
                "input_layernorm": rng.uniform(0.6, 1.4, D).astype(np.float32),
                "post_attention_layernorm": rng.uniform(0.6, 1.4, D).astype(np.float32),
                "self_attn.q_proj": matrix(config.num_heads * H, D, 1.5),
                "self_attn.k_proj": matrix(config.num_kv_heads * H, D, 1.5),
                "self_attn.v_proj": matrix(config.num_kv_heads * H, D, 2.0),
                "self_attn.o_proj": matrix(D, config.num_heads * H),
                "mlp.gate_proj": matrix(F, D),
                "mlp.up_proj": matrix(F, D),
                "mlp.down_proj": matrix(D, F),
            }.items()
        }
    return weights


_GGUF_NAMES = {
    "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output", "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}  # fmt: skip


def gguf_tensors(weights: dict[str, np.ndarray], config: ModelConfig) -> dict[str, np.ndarray]:
    """The same weights as llama.cpp's converter names and permutes them."""
    tensors = {}
    for name, value in weights.items():
        if name == "model.embed_tokens.weight":
            tensors["token_embd.weight"] = value
        elif name == "model.norm.weight":
            tensors["output_norm.weight"] = value
        elif name == "lm_head.weight":
            tensors["output.weight"] = value
        else:
            _, _, layer, inner = name.removesuffix(".weight").split(".", 3)
            if inner.endswith("q_proj"):
                value = gguf_files.permute(value, config.num_heads)
            elif inner.endswith("k_proj"):
                value = gguf_files.permute(value, config.num_kv_heads)
            tensors[f"blk.{layer}.{_GGUF_NAMES[inner]}.weight"] = value
    return tensors


def tokenizer_metadata() -> dict[str, Any]:
    """The tokenizer and chat template, by the names of GGUFWriter's methods."""
    tokens = vocabulary()
    return {
        "tokenizer_model": "gpt2", "tokenizer_pre": "smollm", "token_list": tokens,
        "token_types": [3 if token in CONTROL_TOKENS else 1 for token in tokens], "token_merges": MERGES,
        "bos_token_id": tokens.index("<|im_start|>"), "eos_token_id": tokens.index("<|im_end|>"),
        "chat_template": CHAT_TEMPLATE,
    }  # fmt: skip


def write_gguf(
    path: Path, config: ModelConfig, tensors: dict[str, np.ndarray], tokenizer: dict[str, Any] | None = None
) -> Path:
    """A GGUF file as llama.cpp's converter writes it.

    Args:
      tensors: by llama.cpp's names.
      tokenizer: metadata in place of `tokenizer_metadata()`.
    """
    sizes = {
        "name": "tiny", "block_count": config.num_layers, "context_length": config.context_length,
        "embedding_length": config.d_model, "feed_forward_length": config.d_ff, "head_count": config.num_heads,
        "head_count_kv": config.num_kv_heads, "key_length": config.head_dim, "value_length": config.head_dim,
        "rope_dimension_count": config.head_dim, "rope_freq_base": rope_base(config),
        "layer_norm_rms_eps": config.norm_eps, "vocab_size": config.vocab_size,
    }  # fmt: skip
    return gguf_files.write(path, "llama", {**sizes, **(tokenizer or tokenizer_metadata())}, tensors)


def write_tiny_gguf(path: Path, *, seed: int = 0, **config) -> Path:
    """Writes a tiny model that `load_model(path)` reads.

    Args:
      seed: of the weights.
      config: fields of `ModelConfig` that differ from `tiny_config()`, e.g. context_length=2048.
    """
    config = tiny_config(**config)
    return write_gguf(Path(path), config, gguf_tensors(random_weights(config, seed), config))


def twin_of(weights: dict[str, np.ndarray], config: ModelConfig) -> transformers.LlamaForCausalLM:
    """The same model in transformers, float32."""
    twin = transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            num_hidden_layers=config.num_layers,
            hidden_size=config.d_model,
            num_attention_heads=config.num_heads,
            num_key_value_heads=config.num_kv_heads,
            head_dim=config.head_dim,
            intermediate_size=config.d_ff,
            vocab_size=config.vocab_size,
            max_position_embeddings=config.context_length,
            rope_parameters={"rope_type": "default", "rope_theta": rope_base(config)},
            rms_norm_eps=config.norm_eps,
            tie_word_embeddings=config.tie_embeddings,
            attn_implementation="eager",
        )
    )
    state = {name: torch.from_numpy(np.array(value)) for name, value in weights.items()}
    if config.tie_embeddings:
        state["lm_head.weight"] = state["model.embed_tokens.weight"]
    twin.load_state_dict(state)
    return twin.eval().requires_grad_(False)


class TinyPair(NamedTuple):
    """A model and its twin in transformers (float32; `double()` gives one that computes in float64)."""

    model: Model
    twin: transformers.LlamaForCausalLM

    def double(self) -> transformers.LlamaForCausalLM:
        twin = copy.deepcopy(self.twin).double()
        twin.set_attn_implementation("sdpa")  # the eager one takes its softmax in float32
        return twin


def make_pair(directory: Path, *, seed: int = 0, dtype: str = "float32", **config) -> TinyPair:
    """A model read from a GGUF file in `directory`, and its twin."""
    config = tiny_config(**config)
    weights = random_weights(config, seed)
    path = write_gguf(Path(directory) / "tiny.gguf", config, gguf_tensors(weights, config))
    return TinyPair(load_model(str(path), dtype=dtype), twin_of(weights, config))


# Running either side


def run(model: Model, tokens, *, positions=None, segment_ids=None, prefix=None, cache=None, taps=()):
    """One forward pass of ours: (logits [B, T, V], cache, taps).

    Args:
      tokens: [B, T]; positions continue after the cache, all tokens are one segment, unless given.
    """
    tokens = jnp.asarray(tokens, jnp.int32)
    if positions is not None:
        positions = jnp.asarray(positions, jnp.int32)
    if segment_ids is None:
        segment_ids = jnp.ones_like(tokens)
    segment_ids = jnp.asarray(segment_ids, jnp.int32)
    return _run(model.config, model.params, tokens, positions, segment_ids, prefix, cache, taps)


def _forward(config, params, tokens, positions, segment_ids, prefix, cache, taps):
    hidden, cache, tapped = Decoder(config).apply(
        {"params": params}, tokens, positions, segment_ids, prefix=prefix, cache=cache, taps=taps
    )
    return lm_logits(params, config, hidden), cache, tapped


_run = jax.jit(_forward, static_argnums=(0, 7))


def twin_run(
    twin: transformers.PreTrainedModel, tokens, *, keys=None, values=None, start=None, mask=None, whole_mask=None
) -> torch.Tensor:
    """One row through transformers: logits [T, V].

    Args:
      tokens: [T].
      keys, values: [L, K, P, H] (arrays or tensors) that stand in `past_key_values`.
      start: position of the first token; P by default.
      mask: [N, T, P + T] added to the scores of every layer, causal mask included.
      whole_mask: as the model itself takes it, in place of `mask`.
    """
    dtype = twin.dtype
    cache, num_slots = None, 0
    if keys is not None:
        cache, num_slots = transformers.DynamicCache(), keys.shape[2]
        for layer in range(len(keys)):
            cache.update(_tensor(keys[layer], dtype)[None], _tensor(values[layer], dtype)[None], layer)
    tokens = torch.tensor(np.asarray(tokens), dtype=torch.long)
    start = num_slots if start is None else start
    return twin(
        tokens[None],
        past_key_values=cache,
        position_ids=start + torch.arange(len(tokens))[None],
        attention_mask=whole_mask if mask is None else _tensor(mask, dtype)[None],
        use_cache=cache is not None,
    ).logits[0]


def _tensor(value, dtype) -> torch.Tensor:
    return value if isinstance(value, torch.Tensor) else torch.from_numpy(np.array(value)).to(dtype)


def random_prefix(rng: np.random.Generator, config: ModelConfig, num_slots: int, *, scale: float = 1.0):
    """A prefix of random float32 slots at positions 0..P-1."""
    shape = (config.num_layers, config.num_kv_heads, num_slots, config.head_dim)
    keys, values = (jnp.asarray(scale * rng.standard_normal(shape), jnp.float32) for _ in range(2))
    return cartridge.from_plain_tokens(keys, values)


def at_position(prefix: cartridge.KVPrefix, next_position: int) -> cartridge.KVPrefix:
    """The prefix with another position of the first token after it."""
    return prefix.replace(next_position=jnp.asarray(next_position, jnp.int32))


def random_tokens(rng: np.random.Generator, config: ModelConfig, *shape: int) -> np.ndarray:
    """Token ids of the whole vocabulary, control tokens included."""
    return rng.integers(0, config.vocab_size, shape).astype(np.int32)
