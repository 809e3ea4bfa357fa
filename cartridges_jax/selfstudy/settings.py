"""The settings of self-study: the defaults suit a small model on a CPU, `PAPER` has the paper's sizes."""

from __future__ import annotations

import dataclasses

from cartridges_jax.errors import UserError
from cartridges_jax.selfstudy import teacher
from cartridges_jax.selfstudy.filters import FILTERS

CONTEXTS = ("chunk", "document")
WRITERS = ("completion", "chat")


def _families(**weights: float) -> dict[str, float]:
    """All families of the package, those that are not named with weight 0."""
    names = ("qa", "question", "summarization", "structuring", "use_case", "creative", "generic")
    return {name: weights.get(name, 0.0) for name in names}


@dataclasses.dataclass(frozen=True)
class SynthesisSettings:
    """Settings of self-study.

    Attributes:
      conversations: the number wanted; the run ends with the batch that reaches it. 0 is "auto", which the pipeline
        resolves before a run: every sentence is asked about `asks_per_sentence` times.
      asks_per_sentence: the ratio of auto.
      requests_per_batch: messages A writes per chunk.
      chunk_min_tokens, chunk_max_tokens: uniform chunk length (paper: 512 to 4,096).
      teacher: who answers, a name in `TEACHERS`; some take an argument after a colon.
      teacher_context: the text before B's conversations, the "chunk" (paper) or the whole "document".
      writer: how A is prompted, "completion" or "chat" (see `writer`).
      families: seed family to weight.
      writer_temperature, writer_max_tokens: how A's messages are drawn, and the most tokens of one.
      writer_top_k: the completion writer draws among the k most likely tokens; 0 among all.
      answer_temperature, answer_max_tokens: how B's answers are drawn (paper: temperature 0).
      top_logprobs: k, log-probabilities stored per answered token (paper: 20).
      score_user_messages: stores the teacher's log-probabilities for A's tokens too, at the cost of a pass over them;
        train.targets="all" needs it.
      filters: names in `FILTERS` of what drops messages and answers, in order; () drops nothing (paper).
      min_words, max_words, question_max_words: limits of the filter "length".
      about_min_words: content words that a message must share, for the filter "about".
      repetition_span, repetition_times: tokens of a run and the count of its occurrences, for the filter "repetition".
    """

    conversations: int = 0
    asks_per_sentence: float = 6.0
    requests_per_batch: int = 128
    chunk_min_tokens: int = 512
    chunk_max_tokens: int = 4096
    teacher: str = "local"
    teacher_context: str = "document"
    writer: str = "completion"
    families: dict[str, float] = dataclasses.field(
        default_factory=lambda: _families(qa=0.8, question=0.1, summarization=0.1)
    )
    writer_temperature: float = 0.6
    writer_top_k: int = 40
    writer_max_tokens: int = 24
    answer_temperature: float = 0.0
    answer_max_tokens: int = 40
    top_logprobs: int = 20
    score_user_messages: bool = False
    filters: tuple[str, ...] = ("length", "question_mark", "echo", "about", "duplicate", "repetition")
    min_words: int = 3
    max_words: int = 40
    question_max_words: int = 18
    about_min_words: int = 2
    repetition_span: int = 4
    repetition_times: int = 3

    def check(self) -> None:
        """Raises UserError for a value that no run could use."""
        if self.conversations < 0:
            raise UserError(f"study.conversations={self.conversations}: must be 1 or more, or 0 for auto")
        if not self.asks_per_sentence > 0:
            raise UserError(f"study.asks_per_sentence={self.asks_per_sentence}: must be above 0")
        for name in (
            "requests_per_batch", "writer_max_tokens", "answer_max_tokens", "top_logprobs", "min_words",
            "about_min_words", "repetition_span",
        ):  # fmt: skip
            if getattr(self, name) < 1:
                raise UserError(f"study.{name}={getattr(self, name)}: must be 1 or more")
        if self.repetition_times < 2:
            raise UserError(f"study.repetition_times={self.repetition_times}: must be 2 or more")
        for name in ("max_words", "question_max_words"):
            if getattr(self, name) < self.min_words:
                raise UserError(f"study.{name}={getattr(self, name)}: must be study.min_words={self.min_words} or more")
        if not 1 <= self.chunk_min_tokens <= self.chunk_max_tokens:
            raise UserError(
                f"study.chunk_min_tokens={self.chunk_min_tokens} and chunk_max_tokens={self.chunk_max_tokens}: "
                "need 1 <= minimum <= maximum"
            )
        teacher.check_name(self.teacher)
        if self.teacher_context not in CONTEXTS:
            raise UserError(f"study.teacher_context {self.teacher_context!r}: choose one of {', '.join(CONTEXTS)}")
        if self.writer not in WRITERS:
            raise UserError(f"study.writer {self.writer!r}: choose one of {', '.join(WRITERS)}")
        for name in self.filters:
            if name not in FILTERS:
                raise UserError(f"study.filters has {name!r}: choose among {', '.join(FILTERS)}")
        for name in ("writer_temperature", "answer_temperature"):
            if not getattr(self, name) >= 0:
                raise UserError(f"study.{name}={getattr(self, name)}: must be 0 or more")
        if self.writer_top_k < 0:
            raise UserError(f"study.writer_top_k={self.writer_top_k}: must be 0 (all) or more")


# The sizes of arXiv 2506.06266, sections 4 and 5 and appendix, for models that follow instructions.
PAPER = SynthesisSettings(
    conversations=131072,
    requests_per_batch=512,
    teacher_context="chunk",
    writer="chat",
    families=_families(structuring=0.2, summarization=0.2, question=0.2, use_case=0.2, creative=0.2),
    writer_top_k=0,
    writer_max_tokens=128,
    answer_max_tokens=384,
    filters=(),
)
