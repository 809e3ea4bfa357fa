"""Self-study of one chunk, in conversations per second, against the same loop without sharing.

Our side is `selfstudy.synthesise`: A's examples and the chunk are read once, all rows share
them, and a row that ends is replaced by the next. The peer runs the same loop with
transformers' `generate`: every row has its own copy of the examples or the chunk in its
prompt, and a batch runs until its longest row ends. It reads the same prompts, generates
the same number of messages and answers with the same lengths, and computes the teacher's
top log-probabilities in the same steps.
"""

from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path
from typing import NamedTuple

from cartridges_jax.benchmarks import figures
from cartridges_jax.benchmarks.inputs import COMMON, OURS, STUDY, Common, config_dict, read_model
from cartridges_jax.benchmarks.machine import Ceilings, flops_per_second, multiplied_in
from cartridges_jax.benchmarks.peers import TRANSFORMERS, hugging_face
from cartridges_jax.benchmarks.results import Bar, Result, say_absent
from cartridges_jax.benchmarks.rounds import absent_peers, compared, durations, take_turns_with_ceilings
from cartridges_jax.corpus import Corpus, TokenizedCorpus, read_corpus, tokenize_corpus
from cartridges_jax.data.conversations import read_shard
from cartridges_jax.data.schema import Conversation
from cartridges_jax.errors import UserError
from cartridges_jax.models import Model, ModelConfig
from cartridges_jax.models.costs import layer_weights
from cartridges_jax.models.model import AUTO, chosen_weights
from cartridges_jax.selfstudy.plan import plan_batches
from cartridges_jax.selfstudy.seeds import FAMILIES
from cartridges_jax.selfstudy.settings import SynthesisSettings
from cartridges_jax.selfstudy.synthesis import synthesise
from cartridges_jax.selfstudy.writer import examples_text

NAME = "self_study"


@dataclasses.dataclass(frozen=True)
class SelfStudySettings:
    """The settings of the measurement.

    Attributes:
      chunk_tokens: length of the chunk, the document's beginning.
      weights: storage of our weights; "auto" chooses as a run does (`chosen_weights`).
      study: settings of the self-study, which wants `conversations` from batches of
        `requests_per_batch` messages. Batches beyond the first count too.
      peer_dtypes: dtypes of the peer.
      peer_rows: rows the peer decodes together.
    """

    common: Common
    chunk_tokens: int
    weights: str
    study: SynthesisSettings
    peer_dtypes: tuple[str, ...]
    peer_rows: int

    def check(self) -> None:
        """Raises UserError for a value that the benchmark cannot use."""
        self.study.check()
        if self.chunk_tokens < 1 or self.peer_rows < 1:
            raise UserError("chunk_tokens and peer_rows must be 1 or more")
        if not self.study.conversations:
            raise UserError("study.conversations=0: the benchmark needs a number")
        if self.study.writer != "completion":
            raise UserError("study.writer: the benchmark's peer writes by completion only")


def default_config():
    """The defaults that experiments override."""
    return config_dict(NAME, SelfStudySettings(
        common=COMMON,
        chunk_tokens=1024,
        weights=AUTO,
        study=dataclasses.replace(
            STUDY, conversations=32, requests_per_batch=64, chunk_min_tokens=1024, chunk_max_tokens=1024,
            teacher_context="chunk",
        ),
        peer_dtypes=("float32", "bfloat16"),
        peer_rows=32,
    ))  # fmt: skip


class Row(NamedTuple):
    """One row of the peer's batches.

    Attributes:
      prefix: beginning of the prompt that other rows have too.
      own: rest of the prompt.
      new_tokens: number of tokens to generate.
    """

    prefix: tuple[int, ...]
    own: list[int]
    new_tokens: int


def rows_of(
    model: Model,
    chunk: TokenizedCorpus,
    settings: SynthesisSettings,
    kept: list[Conversation],
    num_batches: int,
    seed: int,
) -> tuple[list[Row], list[Row]]:
    """The peer's rows for the same work, one prompt each: messages, and answers.

    Dropped messages are not on disk: all messages get the mean length of the others.
    """
    encode = model.tokenizer.encode
    plan = plan_batches(
        chunk, num_batches=num_batches, requests_per_batch=settings.requests_per_batch,
        chunk_min_tokens=settings.chunk_min_tokens, chunk_max_tokens=settings.chunk_max_tokens,
        families=settings.families, seed=seed,
    )  # fmt: skip
    lengths = [len(conversation.messages[0].token_ids) for conversation in kept]
    typical = round(sum(lengths) / len(lengths))
    messages, answers = [], []
    for request in (request for batch in plan for request in batch.requests):
        pattern = FAMILIES[request.family].pattern
        own = encode(f"Fact: {request.sentence}\n{pattern.label}:")
        messages.append(Row(tuple(encode(examples_text(pattern))), own, typical))
    prefix = tuple(model.chat.system_prefix(chunk.text).token_ids)
    for conversation in kept:
        user, assistant = conversation.messages
        turn = model.chat.render_continuation([{"role": "user", "content": user.content}])
        answers.append(Row(prefix, turn.token_ids, len(assistant.token_ids)))
    return messages, answers


def batched(rows: list[Row], num_rows: int) -> list[list[Row]]:
    """Batches of rows with similar lengths, which need little padding."""
    ordered = sorted(rows, key=lambda row: len(row.prefix) + len(row.own))
    return [ordered[at : at + num_rows] for at in range(0, len(ordered), num_rows)]


def flops_with_sharing(config: ModelConfig, rows: list[Row]) -> int:
    """Operations of products with weights when every prefix is read once, without attention (a lower bound)."""
    generated = sum(row.new_tokens for row in rows)
    read = sum(map(len, {row.prefix for row in rows})) + sum(len(row.own) for row in rows)
    layers = 2 * config.num_layers * layer_weights(config) * (read + generated)
    return layers + 2 * config.d_model * config.vocab_size * generated


def run(settings: SelfStudySettings, workdir: Path) -> Result:
    """Measures both sides; writes the figure."""
    common, study = settings.common, settings.study
    weights = chosen_weights(settings.weights, "float32")
    model = read_model(common, weights=weights)
    document = read_corpus(common.document).documents[0]
    tokens = model.tokenizer.encode(document.text)[: settings.chunk_tokens]
    text = model.tokenizer.decode(tokens)
    chunk = tokenize_corpus(Corpus.from_text(text, document.name), model.tokenizer)
    shards = workdir / "shards"

    def ours() -> None:
        shutil.rmtree(shards, ignore_errors=True)
        shards.mkdir(parents=True)
        synthesise(model, chunk, shards, study, seed=common.seed)

    with Bar(1, f"{NAME} first run") as tick:
        ours()
        tick(OURS)
    paths = sorted(shards.glob("shard-*.parquet"))
    kept = [conversation for path in paths for conversation in read_shard(path)]
    messages, answers = rows_of(
        model, chunk, study, kept, 4 * -(-study.conversations // study.requests_per_batch), common.seed
    )
    messages = messages[: len(paths) * study.requests_per_batch]

    missing = absent_peers(common, TRANSFORMERS)
    say_absent(missing)
    calls = {OURS: ours}
    if common.peers and not missing:
        from cartridges_jax.benchmarks.peers import transformers_peft

        transformers_peft.use_threads(common.threads)
        directory = hugging_face.export(read_model(common), workdir / "hugging_face")
        batches = batched(messages, settings.peer_rows) + batched(answers, settings.peer_rows)
        for dtype in settings.peer_dtypes:
            loaded = transformers_peft.load(directory, dtype)

            def theirs(loaded=loaded) -> None:
                for batch in batches:
                    transformers_peft.generate_padded(
                        loaded, [[*row.prefix, *row.own] for row in batch], max(row.new_tokens for row in batch),
                        study.top_logprobs,
                    )  # fmt: skip

            calls[f"transformers {dtype}"] = theirs
    ceilings = Ceilings(model.config, 512, 128)
    times, machine = take_turns_with_ceilings(NAME, calls, ceilings, repeats=common.repeats)
    flops = flops_with_sharing(model.config, messages + answers)
    row = {
        "chunk_tokens": len(tokens),
        "conversations": len(kept),
        "messages": len(messages),
        "tokens_generated": sum(row.new_tokens for row in messages + answers),
        **compared(times, [name for name in calls if name != OURS], len(kept)),
        "weights": weights,
        "fraction_of_limit": flops / flops_per_second(machine, multiplied_in(model.params)) / times[OURS].median,
        **durations(times),
    }
    shutil.rmtree(shards, ignore_errors=True)
    result = Result(
        benchmark=NAME, unit="conversations/s", rows=[row], machine=machine, absent=missing,
        more={"repeats": common.repeats},
    )  # fmt: skip
    figures.self_study(result, workdir / f"{NAME}.png")
    return result
