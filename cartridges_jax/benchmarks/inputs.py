"""Settings and inputs that the benchmarks share: the document, conversations, prompts."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import ml_collections
import numpy as np

from cartridges_jax.corpus import QUICKSTART, Corpus, Document, tokenize_corpus
from cartridges_jax.data.conversations import read_shard
from cartridges_jax.data.schema import Conversation
from cartridges_jax.errors import UserError
from cartridges_jax.models import Model, load_model
from cartridges_jax.selfstudy.settings import SynthesisSettings
from cartridges_jax.selfstudy.synthesis import synthesise
from cartridges_jax.typed_config import build, config_values

# The name of our side in results.
OURS = "cartridges_jax"
# The defaults of a run, with shorter answers.
STUDY = SynthesisSettings(conversations=48, requests_per_batch=96, answer_max_tokens=32)


@dataclasses.dataclass(frozen=True)
class Common:
    """The settings of every benchmark.

    Attributes:
      model: registry name, GGUF file, directory or hub id of a plain Llama.
      document: a text file, or "quickstart" for the one that ships with the package.
      repeats: measured rounds; 5 or more for published figures.
      threads: threads of the peers; 0 is one a core. (XLA uses all cores.)
      peers: False measures cartridges_jax alone.
      seed: seed of every draw.
    """

    model: str
    document: str
    repeats: int
    threads: int
    peers: bool
    seed: int

    def check(self) -> None:
        """Raises UserError for a value that no benchmark can use."""
        if self.repeats < 1:
            raise UserError(f"repeats={self.repeats}: must be 1 or more")
        if self.threads < 0:
            raise UserError(f"threads={self.threads}: must be 0 (one a core) or more")


COMMON = Common(model="smollm2-135m-instruct", document=QUICKSTART, repeats=5, threads=0, peers=True, seed=0)


def config_dict(benchmark: str, settings: Any) -> ml_collections.ConfigDict:
    """The defaults of a benchmark as experiments override them."""
    return ml_collections.ConfigDict({"benchmark": benchmark, **dataclasses.asdict(settings)})


def settings_of(cls: type, config: ml_collections.ConfigDict) -> Any:
    """The typed, checked settings.

    Raises:
      UserError: a field that is unknown, missing or of the wrong type, or a bad value.
    """
    values = config_values(config)
    values.pop("benchmark")
    settings = build(cls, values, "config", "experiments/benchmarks/")
    settings.common.check()
    if hasattr(settings, "check"):
        settings.check()
    return settings


def read_model(common: Common, **options: str) -> Model:
    return load_model(common.model, **options)


def read_variants(common: Common, dtype: str, variants: Sequence[str]) -> dict[str, Model]:
    """Models by name: the model itself, and one for each way to store its weights (`load_model`'s `weights`)."""
    return {
        OURS: read_model(common, dtype=dtype),
        **{f"{OURS} {weights} weights": read_model(common, dtype=dtype, weights=weights) for weights in variants},
    }


def read_conversations(directory: str) -> list[Conversation]:
    """All conversations below a finished run's study directory.

    Raises:
      UserError: there are none.
    """
    found = [c for path in sorted(Path(directory).rglob("shard-*.parquet")) for c in read_shard(path)]
    if not found:
        raise UserError(
            f"conversations={directory}: no shard-*.parquet there; give the study directory of a finished run"
        )
    return found


def make_conversations(
    model: Model, document: Document, directory: Path, count: int, seed: int, **overrides: Any
) -> list[Conversation]:
    """Conversations of a short self-study with the whole document in context, cached in `directory`."""
    directory.mkdir(parents=True, exist_ok=True)
    settings = dataclasses.replace(STUDY, conversations=count, requests_per_batch=2 * count, **overrides)
    corpus = tokenize_corpus(Corpus((document,)), model.tokenizer)
    return synthesise(model, corpus, directory, settings, seed=seed).conversations


def prompts_of_length(model: Model, document: Document, count: int, num_tokens: int, seed: int) -> list[list[int]]:
    """`count` different prompts of exactly `num_tokens` tokens: stretches of the document as users' messages.

    They have one length, so that no peer pays for padding.
    """
    tokens = model.tokenizer.encode(document.text)
    frame = model.chat.render_continuation([{"role": "user", "content": "x"}])
    (begin, end) = frame.spans[0]
    room = num_tokens - (len(frame.token_ids) - (end - begin))
    if room < 1 or len(tokens) <= room:
        raise UserError(
            f"prompt_tokens={num_tokens}: the chat template takes {num_tokens - room} of them and the document has "
            f"{len(tokens)}; choose between {num_tokens - room + 1} and {len(tokens)}"
        )
    starts = np.random.default_rng(seed).integers(0, len(tokens) - room, count)
    return [
        [*frame.token_ids[:begin], *tokens[start : start + room], *frame.token_ids[end:]] for start in starts.tolist()
    ]
