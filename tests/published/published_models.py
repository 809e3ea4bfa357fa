"""Ten published models: facts from their config.json, generation_config.json and tokenizer_config.json.

Sizes are made small and ids of tokens are replaced by those of a tiny tokenizer of the same structure; everything else is
as published on https://huggingface.co, under the repository that an entry is named after.
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import chat_templates
from peers import torch, transformers
from tiny_texts import tiny_tokenizer
from tokenizers import AddedToken

_COMMON = {"torch_dtype": "bfloat16", "use_cache": True, "initializer_range": 0.02, "attention_dropout": 0.0}
# 0 in `spare_rows`: as many rows as tokens; negative: the last added tokens have none.
_LLAMA_TOKENS = {
    128000: "<|begin_of_text|>", 128001: "<|end_of_text|>", 128006: "<|start_header_id|>", 128007: "<|end_header_id|>",
    128008: "<|eom_id|>", 128009: "<|eot_id|>", 128010: "<|python_tag|>",
}  # fmt: skip
_QWEN_TOKENS = {151643: "<|endoftext|>", 151644: "<|im_start|>", 151645: "<|im_end|>"}
_DEEPSEEK_TOKENS = {
    151643: "<｜end▁of▁sentence｜>", 151644: "<｜User｜>", 151645: "<｜Assistant｜>", 151646: "<｜begin▁of▁sentence｜>",
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Published:
    """A model's files.

    Attributes:
      config, generation_config, tokenizer_config: as published; null is None.
      template: its chat template (tests/chat_templates.py), "" without one.
      kind: of its tokenizer, see `tiny_texts.tiny_tokenizer`.
      tokens: id to text of its control tokens.
      verbatim: added tokens that are not special.
      beyond: added tokens without a row in the embedding.
      spare_rows: rows of the embedding without a token.
      ends: texts of the tokens that end an answer.
    """

    config: dict[str, Any]
    generation_config: dict[str, Any]
    tokenizer_config: dict[str, Any]
    template: str
    tokens: dict[int, str]
    ends: tuple[str, ...]
    kind: str = "bytes"
    verbatim: tuple[str, ...] = ()
    beyond: tuple[str, ...] = ()
    spare_rows: int = 0


def _llama(sizes: dict[str, Any], factor: float, template: str) -> Published:
    return Published(
        config={
            **_COMMON, "architectures": ["LlamaForCausalLM"], "attention_bias": False, "bos_token_id": 128000,
            "eos_token_id": [128001, 128008, 128009], "hidden_act": "silu", "max_position_embeddings": 131072,
            "mlp_bias": False, "model_type": "llama", "pretraining_tp": 1, "rms_norm_eps": 1e-05,
            "rope_scaling": {
                "factor": factor, "high_freq_factor": 4.0, "low_freq_factor": 1.0,
                "original_max_position_embeddings": 8192, "rope_type": "llama3",
            },
            "rope_theta": 500000.0, "tie_word_embeddings": False, "transformers_version": "4.45.0.dev0", **sizes,
        },
        generation_config={
            "bos_token_id": 128000, "do_sample": True, "eos_token_id": [128001, 128008, 128009], "temperature": 0.6,
            "top_p": 0.9, "transformers_version": "4.45.0.dev0",
        },
        tokenizer_config={
            "bos_token": "<|begin_of_text|>", "clean_up_tokenization_spaces": True, "eos_token": "<|eot_id|>",
            "model_input_names": ["input_ids", "attention_mask"], "model_max_length": 131072,
            "tokenizer_class": "PreTrainedTokenizerFast",
        },
        template=template,
        tokens=_LLAMA_TOKENS,
        ends=("<|end_of_text|>", "<|eom_id|>", "<|eot_id|>"),
    )  # fmt: skip


def _qwen(config: dict[str, Any], generation_config: dict[str, Any], template: str, **other: Any) -> Published:
    return Published(
        config={
            **_COMMON, "bos_token_id": 151643, "hidden_act": "silu", "rms_norm_eps": 1e-06, "use_sliding_window": False,
            **config,
        },
        generation_config={"bos_token_id": 151643, **generation_config},
        tokenizer_config=other.pop("tokenizer_config", {
            "add_bos_token": False, "add_prefix_space": False, "additional_special_tokens": ["<|im_start|>", "<|im_end|>"],
            "bos_token": None, "clean_up_tokenization_spaces": False, "eos_token": "<|im_end|>", "errors": "replace",
            "model_max_length": 131072, "pad_token": "<|endoftext|>", "split_special_tokens": False,
            "tokenizer_class": "Qwen2Tokenizer", "unk_token": None,
        }),
        template=template,
        tokens=other.pop("tokens", _QWEN_TOKENS),
        ends=other.pop("ends", ("<|im_end|>", "<|endoftext|>")),
        spare_rows=3,
        **other,
    )  # fmt: skip


_QWEN3_TOKENS = ("<tool_call>", "</tool_call>", "<think>", "</think>")
_QWEN3_GENERATION = {"do_sample": True, "eos_token_id": [151645, 151643], "pad_token_id": 151643, "top_k": 20}
_GEMMA = {
    **_COMMON, "attention_bias": False, "bos_token_id": 2, "cache_implementation": "hybrid", "head_dim": 256,
    "hidden_activation": "gelu_pytorch_tanh", "pad_token_id": 0, "query_pre_attn_scalar": 256, "rms_norm_eps": 1e-06,
}  # fmt: skip
_GEMMA_TOKENIZER = {
    "add_bos_token": True, "add_eos_token": False, "bos_token": "<bos>", "clean_up_tokenization_spaces": False,
    "eos_token": "<eos>", "model_max_length": 1000000000000000019884624838656, "pad_token": "<pad>",
    "sp_model_kwargs": {}, "spaces_between_special_tokens": False, "tokenizer_class": "GemmaTokenizer",
    "unk_token": "<unk>", "use_default_system_prompt": False,
}  # fmt: skip

PUBLISHED = {
    "meta-llama/Llama-3.2-1B-Instruct": _llama(
        {
            "head_dim": 64, "hidden_size": 2048, "intermediate_size": 8192, "num_attention_heads": 32,
            "num_hidden_layers": 16, "num_key_value_heads": 8, "tie_word_embeddings": True, "vocab_size": 128256,
        },
        32.0,
        chat_templates.LLAMA32,
    ),
    "meta-llama/Llama-3.1-8B-Instruct": _llama(
        {
            "hidden_size": 4096, "intermediate_size": 14336, "num_attention_heads": 32, "num_hidden_layers": 32,
            "num_key_value_heads": 8, "vocab_size": 128256,
        },
        8.0,
        chat_templates.LLAMA31,
    ),
    "Qwen/Qwen2.5-0.5B": _qwen(
        {
            "architectures": ["Qwen2ForCausalLM"], "eos_token_id": 151643, "hidden_size": 896, "intermediate_size": 4864,
            "max_position_embeddings": 32768, "max_window_layers": 24, "model_type": "qwen2", "num_attention_heads": 14,
            "num_hidden_layers": 24, "num_key_value_heads": 2, "rope_theta": 1000000.0, "sliding_window": 32768,
            "tie_word_embeddings": True, "transformers_version": "4.40.1", "use_mrope": False, "vocab_size": 151936,
        },
        {"do_sample": False, "eos_token_id": 151643, "max_new_tokens": 2048, "transformers_version": "4.37.0"},
        chat_templates.QWEN25,
        tokenizer_config={
            "add_prefix_space": False, "additional_special_tokens": ["<|im_start|>", "<|im_end|>"], "bos_token": None,
            "eos_token": "<|endoftext|>", "model_max_length": 131072, "tokenizer_class": "Qwen2Tokenizer", "unk_token": None,
        },
        verbatim=("<tool_call>", "</tool_call>"),
    ),
    # With YaRN turned on as its README says.
    "Qwen/Qwen2.5-7B-Instruct": _qwen(
        {
            "architectures": ["Qwen2ForCausalLM"], "eos_token_id": 151645, "hidden_size": 3584,
            "intermediate_size": 18944, "max_position_embeddings": 32768, "max_window_layers": 28, "model_type": "qwen2",
            "num_attention_heads": 28, "num_hidden_layers": 28, "num_key_value_heads": 4, "rope_theta": 1000000.0,
            "rope_scaling": {"factor": 4.0, "original_max_position_embeddings": 32768, "type": "yarn"},
            "sliding_window": 131072, "tie_word_embeddings": False, "transformers_version": "4.43.1", "vocab_size": 152064,
        },
        {
            "pad_token_id": 151643, "do_sample": True, "eos_token_id": [151645, 151643], "repetition_penalty": 1.05,
            "temperature": 0.7, "top_p": 0.8, "top_k": 20,
        },
        chat_templates.QWEN25,
        verbatim=("<tool_call>", "</tool_call>"),
    ),
    "Qwen/Qwen3-0.6B": _qwen(
        {
            "architectures": ["Qwen3ForCausalLM"], "attention_bias": False, "eos_token_id": 151645, "head_dim": 128,
            "hidden_size": 1024, "intermediate_size": 3072, "max_position_embeddings": 40960, "max_window_layers": 28,
            "model_type": "qwen3", "num_attention_heads": 16, "num_hidden_layers": 28, "num_key_value_heads": 8,
            "rope_scaling": None, "rope_theta": 1000000, "sliding_window": None, "tie_word_embeddings": True,
            "transformers_version": "4.51.0", "vocab_size": 151936,
        },
        {**_QWEN3_GENERATION, "temperature": 0.6, "top_p": 0.95, "transformers_version": "4.51.0"},
        chat_templates.QWEN3,
        verbatim=_QWEN3_TOKENS,
    ),
    "Qwen/Qwen3-4B-Instruct-2507": _qwen(
        {
            "architectures": ["Qwen3ForCausalLM"], "attention_bias": False, "eos_token_id": 151645, "head_dim": 128,
            "hidden_size": 2560, "intermediate_size": 9728, "max_position_embeddings": 262144, "max_window_layers": 36,
            "model_type": "qwen3", "num_attention_heads": 32, "num_hidden_layers": 36, "num_key_value_heads": 8,
            "rope_scaling": None, "rope_theta": 5000000, "sliding_window": None, "tie_word_embeddings": True,
            "transformers_version": "4.51.0", "vocab_size": 151936,
        },
        {**_QWEN3_GENERATION, "temperature": 0.7, "top_p": 0.8, "transformers_version": "4.51.0"},
        chat_templates.SMOLLM2,  # the same turns; its own is ChatML without thinking
        verbatim=_QWEN3_TOKENS,
    ),
    "google/gemma-3-1b-it": Published(
        config={
            **_GEMMA, "architectures": ["Gemma3ForCausalLM"], "attn_logit_softcapping": None, "eos_token_id": [1, 106],
            "final_logit_softcapping": None, "hidden_size": 1152, "intermediate_size": 6912,
            "max_position_embeddings": 32768, "model_type": "gemma3_text", "num_attention_heads": 4,
            "num_hidden_layers": 26, "num_key_value_heads": 1, "rope_local_base_freq": 10000, "rope_scaling": None,
            "rope_theta": 1000000, "sliding_window": 512, "sliding_window_pattern": 6,
            "transformers_version": "4.50.0.dev0", "vocab_size": 262144,
        },
        generation_config={
            "cache_implementation": "hybrid", "do_sample": True, "eos_token_id": [1, 106], "top_k": 64, "top_p": 0.95,
            "transformers_version": "4.50.0.dev0",
        },
        tokenizer_config={
            **_GEMMA_TOKENIZER, "boi_token": "<start_of_image>", "eoi_token": "<end_of_image>",
            "image_token": "<image_soft_token>", "processor_class": "Gemma3Processor",
            "extra_special_tokens": {
                "boi_token": "<start_of_image>", "eoi_token": "<end_of_image>", "image_token": "<image_soft_token>",
            },
        },
        template=chat_templates.GEMMA3,
        tokens={
            0: "<pad>", 1: "<eos>", 2: "<bos>", 105: "<start_of_turn>", 106: "<end_of_turn>", 255999: "<start_of_image>",
            256000: "<end_of_image>",
        },
        ends=("<eos>", "<end_of_turn>"),
        kind="never",
        beyond=("<image_soft_token>",),
    ),
    "google/gemma-2-2b-it": Published(
        config={
            **_GEMMA, "architectures": ["Gemma2ForCausalLM"], "attn_logit_softcapping": 50.0, "eos_token_id": [1, 107],
            "final_logit_softcapping": 30.0, "hidden_act": "gelu_pytorch_tanh", "hidden_size": 2304,
            "intermediate_size": 9216, "max_position_embeddings": 8192, "model_type": "gemma2", "num_attention_heads": 8,
            "num_hidden_layers": 26, "num_key_value_heads": 4, "rope_theta": 10000.0, "sliding_window": 4096,
            "transformers_version": "4.42.4", "vocab_size": 256000,
        },
        generation_config={
            "_from_model_config": True, "bos_token_id": 2, "cache_implementation": "hybrid", "eos_token_id": [1, 107],
            "pad_token_id": 0, "transformers_version": "4.42.4",
        },
        tokenizer_config=_GEMMA_TOKENIZER,
        template=chat_templates.GEMMA2,
        tokens={0: "<pad>", 1: "<eos>", 2: "<bos>", 106: "<start_of_turn>", 107: "<end_of_turn>"},
        ends=("<eos>", "<end_of_turn>"),
        kind="never",
    ),
    "mistralai/Mistral-7B-Instruct-v0.3": Published(
        config={
            **_COMMON, "architectures": ["MistralForCausalLM"], "bos_token_id": 1, "eos_token_id": 2,
            "hidden_act": "silu", "hidden_size": 4096, "intermediate_size": 14336, "max_position_embeddings": 32768,
            "model_type": "mistral", "num_attention_heads": 32, "num_hidden_layers": 32, "num_key_value_heads": 8,
            "rms_norm_eps": 1e-05, "rope_theta": 1000000.0, "sliding_window": None, "tie_word_embeddings": False,
            "transformers_version": "4.42.0.dev0", "vocab_size": 32768,
        },
        generation_config={
            "_from_model_config": True, "bos_token_id": 1, "eos_token_id": 2, "transformers_version": "4.42.0.dev0",
        },
        tokenizer_config={
            "add_bos_token": True, "add_eos_token": False, "add_prefix_space": None, "additional_special_tokens": [],
            "bos_token": "<s>", "clean_up_tokenization_spaces": False, "eos_token": "</s>", "legacy": False,
            "model_max_length": 1000000000000000019884624838656, "pad_token": None, "sp_model_kwargs": {},
            "tokenizer_class": "LlamaTokenizer", "unk_token": "<unk>", "use_default_system_prompt": False,
        },
        template=chat_templates.MISTRAL_V3,
        tokens={1: "<s>", 2: "</s>", 3: "[INST]", 4: "[/INST]"},
        ends=("</s>",),
        kind="first",
    ),
    "deepseek-ai/DeepSeek-R1-Distill-Qwen-1.5B": _qwen(
        {
            "architectures": ["Qwen2ForCausalLM"], "eos_token_id": 151643, "hidden_size": 1536,
            "intermediate_size": 8960, "max_position_embeddings": 131072, "max_window_layers": 21, "model_type": "qwen2",
            "num_attention_heads": 12, "num_hidden_layers": 28, "num_key_value_heads": 2, "rope_theta": 10000,
            "sliding_window": 4096, "tie_word_embeddings": False, "transformers_version": "4.44.0", "use_mrope": False,
            "vocab_size": 151936,
        },
        {
            "_from_model_config": True, "bos_token_id": 151646, "eos_token_id": 151643, "do_sample": True,
            "temperature": 0.6, "top_p": 0.95, "transformers_version": "4.39.3",
        },
        chat_templates.DEEPSEEK_R1,
        tokenizer_config={
            "add_bos_token": True, "add_eos_token": False, "clean_up_tokenization_spaces": False, "legacy": True,
            "bos_token": {
                "__type": "AddedToken", "content": "<｜begin▁of▁sentence｜>", "lstrip": False, "normalized": True,
                "rstrip": False, "single_word": False,
            },
            "eos_token": {
                "__type": "AddedToken", "content": "<｜end▁of▁sentence｜>", "lstrip": False, "normalized": True,
                "rstrip": False, "single_word": False,
            },
            "model_max_length": 16384, "pad_token": None, "sp_model_kwargs": {}, "unk_token": None,
            "tokenizer_class": "LlamaTokenizerFast",
        },
        tokens=_DEEPSEEK_TOKENS,
        ends=("<｜end▁of▁sentence｜>",),
        verbatim=("<think>", "</think>"),
    ),
}  # fmt: skip


def write(name: str, directory: Path) -> None:
    """Writes a tiny model with the files of a published one.

    Channel 0 of its hidden states is positive and alone reaches the logits, so that the head's column 0 decides which
    token is drawn.
    """
    model = PUBLISHED[name]
    directory.mkdir(parents=True, exist_ok=True)
    tokenizer = tiny_tokenizer(model.kind, list(model.tokens.values()))
    tokenizer.add_tokens([AddedToken(text, normalized=False) for text in model.verbatim])
    num_rows = tokenizer.get_vocab_size() + model.spare_rows
    tokenizer.add_special_tokens([AddedToken(text, normalized=False, special=True) for text in model.beyond])
    ids = {published: tokenizer.token_to_id(text) for published, text in model.tokens.items()}
    config = _with_ids(_shrunk(model.config, num_rows), ids)
    torch.manual_seed(0)
    values = {key: value for key, value in config.items() if key not in ("architectures", "model_type")}
    twin = transformers.AutoModelForCausalLM.from_config(
        transformers.AutoConfig.for_model(config["model_type"], **json.loads(json.dumps(values)))
    ).float()
    with torch.no_grad():
        inner = twin.model
        for layer in inner.layers:
            layer.self_attn.o_proj.weight[0] = 0
            layer.mlp.down_proj.weight[0] = 0
        inner.embed_tokens.weight[:, 0] = 1
        twin.lm_head.weight[:, 0] = 1
        is_gemma = "gemma" in config["model_type"]
        inner.norm.weight[:] = -1 if is_gemma else 0
        inner.norm.weight[0] = 0 if is_gemma else 1
    twin.save_pretrained(directory)
    added = {
        str(token_id): {
            "content": token.content, "lstrip": token.lstrip, "normalized": token.normalized, "rstrip": token.rstrip,
            "single_word": token.single_word, "special": token.special,
        }
        for token_id, token in tokenizer.get_added_tokens_decoder().items()
    }  # fmt: skip
    tokenizer.save(str(directory / "tokenizer.json"))
    for file, content in {
        "config": config,
        "generation_config": _with_ids(model.generation_config, ids),
        "tokenizer_config": {
            **model.tokenizer_config, "added_tokens_decoder": added,
            **({"chat_template": model.template} if model.template else {}),
        },
    }.items():  # fmt: skip
        (directory / f"{file}.json").write_text(json.dumps(content))


def _shrunk(config: dict[str, Any], num_rows: int) -> dict[str, Any]:
    """Few small layers, with the published ratio of query heads to key heads."""
    kv_heads = min(2, config["num_key_value_heads"])
    heads = kv_heads * config["num_attention_heads"] // config["num_key_value_heads"]
    small = {
        "num_key_value_heads": kv_heads, "num_attention_heads": heads, "hidden_size": 8 * heads, "intermediate_size": 48,
        "num_hidden_layers": 7 if "sliding_window_pattern" in config else 2, "vocab_size": num_rows,
    }  # fmt: skip
    return {**config, **small, **({"head_dim": 16} if "head_dim" in config else {})}


def _with_ids(values: dict[str, Any], ids: dict[int, int]) -> dict[str, Any]:
    """The files' ids of tokens, renamed to the tiny tokenizer's."""
    return {
        key: ([ids[i] for i in value] if isinstance(value, list) else ids[value])
        if key.endswith("_token_id")
        else value
        for key, value in values.items()
    }
