"""transformers with PEFT's CARTRIDGE tuner (peft/tuners/cartridge): training and generation.

PEFT keeps the cartridge as one flat parameter [P, L * 2 * K * H] and hands it to the
model as `past_key_values`, expanded to every row of the batch (`PeftModel.get_prompt`).
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import peft
import torch
import transformers

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def use_threads(num_threads: int) -> None:
    """Sets the number of threads; 0 is one a core."""
    torch.set_num_threads(num_threads or os.cpu_count() or 1)


def load(directory: Path | str, dtype: str) -> transformers.PreTrainedModel:
    """The frozen model of a Hugging Face directory; attention is torch's fused one, its default."""
    transformers.utils.logging.disable_progress_bar()
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")
    model = transformers.LlamaForCausalLM.from_pretrained(directory, dtype=DTYPES[dtype])
    return model.eval().requires_grad_(False)


def with_cartridge(
    model: transformers.PreTrainedModel, keys: np.ndarray, values: np.ndarray, num_frozen: int, *, trained: bool
) -> peft.PeftModelForCausalLM:
    """The model with a cartridge, whose keys and values are [L, K, P, H]."""
    num_layers, num_heads, num_slots, width = keys.shape
    config = peft.CartridgeConfig(
        task_type="CAUSAL_LM", num_virtual_tokens=num_slots, num_frozen_tokens=num_frozen, inference_mode=not trained
    )
    wrapped = peft.get_peft_model(model, config)
    flat = np.stack([keys, values], axis=1).reshape(num_layers * 2, num_heads, num_slots, width)
    flat = np.ascontiguousarray(flat.transpose(2, 0, 1, 3)).reshape(num_slots, -1).astype(np.float32)
    wrapped.prompt_encoder[wrapped.active_adapter].load_prompt_embeddings(torch.from_numpy(flat))
    return wrapped


def divergence(logits: torch.Tensor, ids: torch.Tensor, logprobs: torch.Tensor) -> torch.Tensor:
    """KL on the teacher's top k and the rest as one class: `distill.loss` with tail="class".

    The rest is one minus the entries' sum, which needs no further pass over the vocabulary.

    Args:
      logits: [M, V].
      ids: [M, k] int64.
      logprobs: [M, k] float32, -inf where unused.

    Returns:
      [M] float32.
    """
    logits = logits.float()
    used = torch.isfinite(logprobs)
    teacher = torch.where(used, logprobs, 0.0)
    probability = torch.where(used, teacher.exp(), 0.0)
    student = logits.gather(1, ids) - torch.logsumexp(logits, dim=-1, keepdim=True)
    total = (probability * (teacher - student)).sum(-1)
    remaining = (1.0 - probability.sum(-1)).clamp_min(0.0)
    held = torch.where(used, student.exp(), 0.0).sum(-1)
    rest = torch.log((1.0 - held).clamp_min(1e-7))
    return total + torch.where(remaining > 1e-6, remaining * (remaining.clamp_min(1e-9).log() - rest), 0.0)


class Trainer:
    """Adam steps on the cartridge, each on one batch padded to its longest conversation.

    Attributes:
      model: the PEFT model.
      optimizer: Adam on the trainable parameters.
    """

    def __init__(self, model: peft.PeftModelForCausalLM, *, learning_rate: float, clip_norm: float):
        self.model = model
        self.parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
        self.optimizer = torch.optim.Adam(self.parameters, lr=learning_rate)
        self._clip_norm = clip_norm

    def loss(self, examples: Sequence) -> torch.Tensor:
        """Mean divergence over the targets of `examples` (see `data.packing.Example`)."""
        longest = max(len(example.tokens) for example in examples)
        tokens = torch.zeros(len(examples), longest, dtype=torch.long)
        mask = torch.zeros(len(examples), longest, dtype=torch.long)
        rows = []
        for number, example in enumerate(examples):
            tokens[number, : len(example.tokens)] = torch.from_numpy(example.tokens.astype(np.int64))
            mask[number, : len(example.tokens)] = 1
            rows.append(number * longest + example.rows.astype(np.int64))
        prompt = self.model.get_prompt(len(examples))
        slots_mask = torch.ones(len(examples), self.model.active_peft_config.num_virtual_tokens, dtype=torch.long)
        base = self.model.get_base_model()
        # The decoder below the head, because PEFT's forward computes logits of all tokens, and few are targets.
        hidden = base.model(
            input_ids=tokens,
            attention_mask=torch.cat([slots_mask, mask], dim=1),
            past_key_values=prompt,
            use_cache=True,
        ).last_hidden_state
        hidden = hidden.reshape(-1, hidden.shape[-1])[torch.from_numpy(np.concatenate(rows))]
        ids = torch.from_numpy(np.concatenate([example.ids for example in examples]).astype(np.int64))
        logprobs = torch.from_numpy(np.concatenate([example.logprobs for example in examples]))
        return divergence(base.lm_head(hidden), ids, logprobs).mean()

    def step(self, examples: Sequence) -> float:
        """One optimizer step; returns the loss."""
        self.optimizer.zero_grad(set_to_none=True)
        loss = self.loss(examples)
        loss.backward()
        if self._clip_norm:
            torch.nn.utils.clip_grad_norm_(self.parameters, self._clip_norm)
        self.optimizer.step()
        return float(loss.detach())


@torch.no_grad()
def generate(model: torch.nn.Module, prompts: Sequence[Sequence[int]], new_tokens: int) -> list[list[int]]:
    """Exactly `new_tokens` greedy tokens for each prompt; the prompts have one length, so that none is padded.

    Args:
      model: a model with or without a cartridge.
    """
    tokens = torch.tensor(np.asarray(prompts, np.int64))
    out = model.generate(
        input_ids=tokens,
        attention_mask=torch.ones_like(tokens),
        do_sample=False,
        max_new_tokens=new_tokens,
        min_new_tokens=new_tokens,
        eos_token_id=None,
        pad_token_id=0,
        use_cache=True,
    )
    return out[:, tokens.shape[1] :].tolist()


@torch.no_grad()
def generate_padded(
    model: torch.nn.Module, prompts: Sequence[Sequence[int]], new_tokens: int, top_logprobs: int
) -> tuple[list[list[int]], torch.Tensor]:
    """Greedy tokens of prompts of different lengths, padded on the left, and top log-probabilities.

    Returns:
      Tokens per prompt, and log-probabilities [new_tokens, B, k].
    """
    longest = max(map(len, prompts))
    tokens = torch.zeros(len(prompts), longest, dtype=torch.long)
    mask = torch.zeros_like(tokens)
    for row, prompt in enumerate(prompts):
        tokens[row, longest - len(prompt) :] = torch.tensor(prompt)
        mask[row, longest - len(prompt) :] = 1
    collected: list[torch.Tensor] = []

    def collect(_: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
        top = torch.topk(logits, top_logprobs, dim=-1).values
        collected.append(top - torch.logsumexp(logits, dim=-1, keepdim=True))
        return logits

    out = model.generate(
        input_ids=tokens, attention_mask=mask, do_sample=False, max_new_tokens=new_tokens, min_new_tokens=new_tokens,
        eos_token_id=None, pad_token_id=0, use_cache=True,
        logits_processor=transformers.LogitsProcessorList([collect]),
    )  # fmt: skip
    return out[:, longest:].tolist(), torch.stack(collected)
