"""The synthesis run: plan, let A write, let B answer, keep the shards (paper section 4.1).

One batch is one chunk: its conversations share one prefill. A batch is a Parquet shard,
written whole when it is done; a run that was stopped goes on with the next batch and
ends with the same shards as one that was not.

On many hosts, parts of the mesh that hold a model each make batches of their own side by
side, and write them: see `parallel.independent_parts`. What two of them were asked at the
same time is kept once.
"""

from __future__ import annotations

import dataclasses
import re
from collections import Counter
from collections.abc import Callable, Sequence, Set
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jax.sharding import Mesh

from cartridges_jax import sampling
from cartridges_jax.cartridge import KVPrefix
from cartridges_jax.corpus import TokenizedCorpus
from cartridges_jax.data.conversations import Conversation, Message, TopLogprobs, read_shard, write_shard
from cartridges_jax.data.decontaminate import normalise
from cartridges_jax.errors import UserError
from cartridges_jax.models import Model
from cartridges_jax.parallel import ALONE, Job, independent_parts
from cartridges_jax.selfstudy.plan import BatchPlan, plan_batches
from cartridges_jax.selfstudy.writer import Request, Writer
from cartridges_jax.text.chat import Rendered

CONTEXTS = ("chunk", "document")

# A chunk may yield fewer conversations than were asked for; so many times the batches
# that would do if all were kept are planned before the run gives up.
_SPARE = 4


@dataclasses.dataclass(frozen=True)
class SynthesisSettings:
    """How a document is studied.

    Attributes:
      conversations: how many are kept; the run ends with the batch that reaches it.
      requests_per_batch: messages A writes per chunk.
      chunk_min_tokens, chunk_max_tokens: uniform chunk length (paper: 512 to 4,096).
      teacher_context: what B has in front, the "chunk" (paper) or the whole "document".
      writer: how A is prompted, "completion" or "chat" (see `writer`).
      families: seed family to weight.
      writer_temperature, writer_top_k, writer_max_tokens: how A's messages are drawn.
      answer_temperature, answer_max_tokens: how B's answers are (paper: temperature 0).
      top_logprobs: k, log-probabilities kept per answered token (paper: 20).
      score_user_messages: keep the teacher's log-probabilities for A's tokens too, at
        the cost of a pass over them; train.targets="all" needs it.
    """

    conversations: int
    requests_per_batch: int
    chunk_min_tokens: int
    chunk_max_tokens: int
    teacher_context: str
    writer: str
    families: dict[str, float]
    writer_temperature: float
    writer_top_k: int
    writer_max_tokens: int
    answer_temperature: float
    answer_max_tokens: int
    top_logprobs: int
    score_user_messages: bool

    def check(self) -> None:
        """Raises UserError for a value that no run could use."""
        for name in ("conversations", "requests_per_batch", "writer_max_tokens", "answer_max_tokens", "top_logprobs"):
            if getattr(self, name) < 1:
                raise UserError(f"study.{name}={getattr(self, name)}: must be 1 or more")
        if not 1 <= self.chunk_min_tokens <= self.chunk_max_tokens:
            raise UserError(
                f"study.chunk_min_tokens={self.chunk_min_tokens} and chunk_max_tokens={self.chunk_max_tokens}: "
                "need 1 <= minimum <= maximum"
            )
        if self.teacher_context not in CONTEXTS:
            raise UserError(f"study.teacher_context {self.teacher_context!r}: choose one of {', '.join(CONTEXTS)}")
        for name in ("writer_temperature", "answer_temperature"):
            if not getattr(self, name) >= 0:
                raise UserError(f"study.{name}={getattr(self, name)}: must be 0 or more")
        if self.writer_top_k < 0:
            raise UserError(f"study.writer_top_k={self.writer_top_k}: must be 0 (all) or more")


# The defaults of a run: sized for a small model on a CPU.
FOR_SMALL_MODELS = SynthesisSettings(
    conversations=512,
    requests_per_batch=128,
    chunk_min_tokens=512,
    chunk_max_tokens=4096,
    teacher_context="document",
    writer="completion",
    families={
        "qa": 0.8, "question": 0.1, "summarization": 0.1, "structuring": 0.0, "use_case": 0.0, "creative": 0.0,
        "generic": 0.0,
    },
    writer_temperature=0.6,
    writer_top_k=40,
    writer_max_tokens=24,
    answer_temperature=0.0,
    answer_max_tokens=40,
    top_logprobs=20,
    score_user_messages=False,
)  # fmt: skip


def shard_path(directory: Path, batch: int) -> Path:
    """Where the conversations of one batch lie."""
    return directory / f"shard-{batch:05d}.parquet"


def degenerates(token_ids: Sequence[int], *, span: int = 4, times: int = 3) -> bool:
    """Whether an answer repeats itself: one run of `span` tokens occurs `times` times."""
    runs = Counter(tuple(token_ids[i : i + span]) for i in range(len(token_ids) - span + 1))
    return max(runs.values(), default=0) >= times


def is_about(message: str, sentence: str) -> bool:
    """Whether a message keeps to its sentence: it shares two content words, or half of its own.

    Small models drift off; a question about nothing in the text is answered with an
    invention that the cartridge would have to learn.
    """
    words = _content_words(message)
    shared = len(words & _content_words(sentence))
    return shared >= 2 or 0 < len(words) <= 2 * shared


def _content_words(text: str) -> set[str]:
    # Stems of five letters, so that "opens" and "open", "repaired" and "repairs" meet.
    return {word[:5] for word in re.findall(r"\w+", normalise(text))}


def synthesise(
    model: Model,
    corpus: TokenizedCorpus,
    directory: Path,
    settings: SynthesisSettings,
    *,
    seed: int,
    job: Job = ALONE,
    on_progress: Callable[[int, int], None] = lambda done, wanted: None,
    heartbeat: Callable[[], None] = lambda: None,
) -> list[Conversation]:
    """Runs self-study to its end, skipping the batches that are on disk.

    Args:
      directory: holds this run's shards and no other's.
      seed: determines plan and draws.
      job: whose processes share the work and all return the same; the model lies on a mesh of
        all their devices, and all see the directory.
      on_progress: called with (conversations kept, conversations wanted); first with
        those of earlier attempts.
      heartbeat: called every few seconds; what it raises ends the run, and the batch
        that was being made is made again the next time.

    Returns:
      At most `settings.conversations` conversations, in the order they were made.

    Raises:
      UserError: bad settings, a damaged shard, a document that the model's context does
        not hold, or a model that hardly ever writes a usable message.
    """
    settings.check()
    batches = plan_batches(
        corpus,
        num_batches=_SPARE * -(-settings.conversations // settings.requests_per_batch),
        requests_per_batch=settings.requests_per_batch,
        chunk_min_tokens=settings.chunk_min_tokens,
        chunk_max_tokens=settings.chunk_max_tokens,
        families=settings.families,
        seed=seed,
    )
    parts = [None] if model.mesh is None else independent_parts(model.mesh)
    mine = next(number for number, part in enumerate(parts) if part is None or job.process in _processes(part))
    if len(parts) > 1:
        model = model.on(parts[mine])
    writes = parts[mine] is None or job.process == min(_processes(parts[mine]))
    studio = _Studio(model, corpus, settings, seed, heartbeat)
    conversations: list[Conversation] = []
    asked: set[str] = set()
    for first in range(0, len(batches), len(parts)):
        if len(conversations) >= settings.conversations:
            break
        numbers = range(first, min(first + len(parts), len(batches)))
        missing = job.from_first(lambda: _missing(directory, numbers))  # noqa: B023
        # All of the group are asked with the same in mind, whichever of them an earlier attempt has made.
        before = asked if missing[:1] == [first] else frozenset(asked)
        for number in numbers:
            if len(conversations) >= settings.conversations:
                break
            if missing[:1] == [number]:
                if first + mine in missing:
                    on_progress(len(conversations), settings.conversations)
                    made = studio.converse(batches[first + mine], first + mine, before)
                    if writes:
                        write_shard(shard_path(directory, first + mine), made)
                job.wait_for_all()
            for conversation in read_shard(shard_path(directory, number)):
                message = normalise(conversation.messages[0].content)
                if message not in asked:
                    asked.add(message)
                    conversations.append(conversation)
    conversations = conversations[: settings.conversations]
    on_progress(len(conversations), settings.conversations)
    if 4 * len(conversations) < settings.conversations:
        raise UserError(
            f"self-study kept only {len(conversations)} of {settings.conversations} conversations: the model "
            "writes too few usable messages; try another study.writer or raise study.writer_temperature"
        )
    return conversations


def _missing(directory: Path, numbers: Sequence[int]) -> list[int]:
    """Of these batches, those without a shard."""
    # Listed: a network's disk may go on to say that a file which was looked up once is not there.
    present = {path.name for path in directory.glob("shard-*.parquet")}
    return [number for number in numbers if shard_path(directory, number).name not in present]


def _processes(part: Mesh) -> set[int]:
    return {device.process_index for device in part.devices.flat}


class _Turn(NamedTuple):
    """A message of A's.

    Attributes:
      rendered: as B reads it.
    """

    request: Request
    message: str
    rendered: Rendered

    @property
    def span(self) -> tuple[int, int]:
        """Of the message's tokens in the rendering."""
        return self.rendered.spans[0]


class _Studio:
    """Model, writer and teacher prefixes of one run."""

    def __init__(self, model: Model, corpus: TokenizedCorpus, settings: SynthesisSettings, seed: int, heartbeat):
        self._seed = seed
        self._heartbeat = heartbeat
        self._model = model
        self._corpus = corpus
        self._settings = settings
        self._document_prefix: KVPrefix | None = None
        self._writer = Writer(
            model,
            style=settings.writer,
            max_tokens=settings.writer_max_tokens,
            sampling_settings=sampling.Sampling(settings.writer_temperature, top_k=settings.writer_top_k),
            heartbeat=heartbeat,
        )

    def converse(self, batch: BatchPlan, number: int, asked: Set[str]) -> list[Conversation]:
        """One batch of conversations; `asked` are the messages of earlier batches."""
        settings = self._settings
        seed = self._seed * 100_003 + number
        chunk_prefix = None
        if settings.writer == "chat" or settings.teacher_context == "chunk":
            chunk_prefix = self._prefill(batch.text)
        turns = self._written(batch, chunk_prefix, asked, seed)
        teacher_prefix = chunk_prefix if settings.teacher_context == "chunk" else self._whole_document()
        answers = sampling.generate_tokens(
            self._model,
            [turn.rendered.token_ids for turn in turns],
            teacher_prefix,
            max_tokens=settings.answer_max_tokens,
            sampling=sampling.Sampling(settings.answer_temperature),
            seed=seed,
            top_logprobs=settings.top_logprobs,
            on_progress=lambda finished: self._heartbeat(),
        )
        return [
            self._conversation(
                turn,
                answer,
                teacher_prefix,
                {
                    "id": f"{number:05d}-{place:04d}",
                    "document": self._corpus.documents[batch.chunk.document].document.id,
                    "chunk_span": [batch.chunk.start, batch.chunk.end],
                    "teacher": self._model.name,
                    "teacher_context": settings.teacher_context,
                    "stop_reason": answer.stop_reason,
                    "seed": seed,
                    "seed_prompt": turn.request.sentence,
                    "seed_prompt_type": turn.request.family,
                    "sentence_index": turn.request.sentence_index,
                },
            )
            for place, (turn, answer) in enumerate(zip(turns, answers))
            if not degenerates(answer.token_ids)
        ]

    def _written(self, batch: BatchPlan, chunk_prefix: KVPrefix | None, asked: Set[str], seed: int) -> list[_Turn]:
        """What A asks: to the point, nothing twice, and no longer than it may be."""
        settings = self._settings
        written = self._writer.write(batch.requests, chunk_prefix, seed=seed)
        kept: dict[str, _Turn] = {}
        for request, message in zip(batch.requests, written):
            if message is None or not is_about(
                message, request.sentence if settings.writer == "completion" else batch.text
            ):
                continue
            key = normalise(message)
            if key not in asked and key not in kept:
                rendered = self._model.chat.render_continuation([{"role": "user", "content": message}])
                kept[key] = _Turn(request, message, rendered)
        # A forced opening may make a message longer than A's limit, by which training rows are sized.
        return [turn for turn in kept.values() if turn.span[1] - turn.span[0] <= settings.writer_max_tokens]

    def _conversation(
        self, turn: _Turn, answer: sampling.Generation, teacher_prefix: KVPrefix, metadata: dict[str, Any]
    ) -> Conversation:
        begin, end = turn.span
        user_top = None
        if self._settings.score_user_messages:
            user_top = self._score(turn.rendered.token_ids, begin, end, teacher_prefix)
        return Conversation(
            messages=[
                Message("user", turn.message, turn.rendered.token_ids[begin:end], user_top),
                Message(
                    "assistant",
                    self._model.tokenizer.decode(answer.token_ids),
                    answer.token_ids,
                    TopLogprobs.from_dense(answer.top_ids, answer.top_logprobs),
                ),
            ],
            metadata=metadata,
        )

    def _score(self, token_ids: list[int], begin: int, end: int, prefix: KVPrefix) -> TopLogprobs:
        """The teacher's most likely tokens in the places of token_ids[begin:end]."""
        logits = sampling.logits(self._model, token_ids[:end], prefix)[begin - 1 : end - 1]
        logprobs = logits - np.logaddexp.reduce(logits, axis=-1, keepdims=True)
        ids = np.argsort(-logprobs, axis=-1, kind="stable")[:, : self._settings.top_logprobs]
        return TopLogprobs.from_dense(ids, np.take_along_axis(logprobs, ids, axis=-1))

    def _prefill(self, text: str) -> KVPrefix:
        return sampling.prefill(self._model, self._model.chat.system_prefix(text).token_ids)

    def _whole_document(self) -> KVPrefix:
        if self._document_prefix is None:
            self._document_prefix = self._prefill(self._corpus.text)
        return self._document_prefix
