"""One batch of conversations: A writes about a chunk, B answers, filters drop (paper section 4.1)."""

from __future__ import annotations

import dataclasses
from collections.abc import Set
from typing import NamedTuple

from cartridges_jax.corpus import TokenizedCorpus
from cartridges_jax.data.decontaminate import normalise
from cartridges_jax.data.schema import Conversation, Message, TopLogprobs
from cartridges_jax.errors import UserError
from cartridges_jax.selfstudy.filters import Candidate, reason_to_drop
from cartridges_jax.selfstudy.plan import BatchPlan
from cartridges_jax.selfstudy.settings import SynthesisSettings
from cartridges_jax.selfstudy.streams import ANSWERS, stream_seed
from cartridges_jax.selfstudy.tally import Tally
from cartridges_jax.selfstudy.teacher import Reply, Scores, Teacher
from cartridges_jax.selfstudy.writer import Request, Writer, WrittenMessage
from cartridges_jax.text.chat import ChatTemplate


class Prompt(NamedTuple):
    """A message of A's that B answers.

    Attributes:
      request: what A was asked for.
      candidate: the message, as filters see it.
      token_ids: the message's own tokens in the rendered conversation.
    """

    request: Request
    candidate: Candidate
    token_ids: list[int]

    @property
    def messages(self) -> list[dict[str, str]]:
        """The conversation that B reads."""
        return [{"role": "user", "content": self.candidate.message}]


class Studio:
    """Teacher and writer of one run."""

    def __init__(
        self, teacher: Teacher, chat: ChatTemplate, corpus: TokenizedCorpus, settings: SynthesisSettings, seed: int
    ):
        """
        Args:
          chat: of the student, which the conversations are for.

        Raises:
          UserError: a teacher that cannot do what the settings need.
        """
        if settings.score_user_messages and not isinstance(teacher, Scores):
            raise UserError(
                f"study.score_user_messages=True: the teacher {teacher.name!r} cannot score messages; set it to False, "
                "or use study.teacher=local"
            )
        self._teacher = teacher
        self._chat = chat
        self._corpus = corpus
        self._settings = settings
        self._seed = seed
        self._writer = Writer(teacher, settings)

    def converse(self, plan: BatchPlan, number: int, asked: Set[str]) -> tuple[list[Conversation], Tally]:
        """The conversations of one batch, and the counts of what was written and dropped.

        Args:
          number: the batch's, which determines the draws.
          asked: the normalised messages of earlier batches.
        """
        settings, tally = self._settings, Tally()
        written = self._writer.write(plan.requests, plan.text, seed=self._seed, batch=number)
        prompts = self._usable(plan, written, asked, tally)
        context = plan.text if settings.teacher_context == "chunk" else self._corpus.text
        replies = self._teacher.reply(
            context,
            [prompt.messages for prompt in prompts],
            max_tokens=settings.answer_max_tokens,
            temperature=settings.answer_temperature,
            top_logprobs=settings.top_logprobs,
            seed=stream_seed(self._seed, number, ANSWERS),
        )
        answered = []
        for place, (prompt, reply) in enumerate(zip(prompts, replies, strict=True)):
            reason = reason_to_drop(dataclasses.replace(prompt.candidate, answer=reply), settings)
            if reason:
                tally.drop(prompt.request.family, reason)
            else:
                answered.append((place, prompt, reply))
        scores: list[TopLogprobs | None] = [None] * len(answered)
        if settings.score_user_messages:
            assert isinstance(self._teacher, Scores)
            scores = list(
                self._teacher.score(
                    context, [prompt.messages for _, prompt, _ in answered], top_logprobs=settings.top_logprobs
                )
            )
        conversations = [
            self._conversation(plan, f"{number:05d}-{place:04d}", prompt, reply, score)
            for (place, prompt, reply), score in zip(answered, scores, strict=True)
        ]
        return conversations, tally

    def _usable(self, plan: BatchPlan, written: list[WrittenMessage], asked: Set[str], tally: Tally) -> list[Prompt]:
        """The messages that B answers: complete, within the limit, and kept by the filters."""
        settings = self._settings
        asked = set(asked)
        prompts = []
        for request, message in zip(plan.requests, written, strict=True):
            tally.written[request.family] += 1
            source = request.sentence if settings.writer == "completion" else plan.text
            candidate = Candidate(request.family, message.text, source, asked)
            token_ids: list[int] = []
            if message.is_cut:
                reason = "cut"
            elif not message.text:
                reason = "empty"
            else:
                reason = reason_to_drop(candidate, settings)
            if not reason:
                asked.add(normalise(message.text))
                rendered = self._chat.render_continuation([{"role": "user", "content": message.text}])
                begin, end = rendered.spans[0]
                token_ids = rendered.token_ids[begin:end]
                # A forced opening may make a message longer than A's limit, from which the size of training rows follows.
                if len(token_ids) > settings.writer_max_tokens:
                    reason = "too_long"
            if reason:
                tally.drop(request.family, reason)
            else:
                prompts.append(Prompt(request, candidate, token_ids))
        return prompts

    def _conversation(
        self, plan: BatchPlan, name: str, prompt: Prompt, reply: Reply, score: TopLogprobs | None
    ) -> Conversation:
        if reply.top_logprobs is None:
            raise UserError(
                f"study.teacher={self._settings.teacher}: the teacher {self._teacher.name!r} gave an answer without "
                "log-probabilities, which training needs; use another teacher, such as local"
            )
        request = prompt.request
        return Conversation(
            messages=[
                Message("user", prompt.candidate.message, prompt.token_ids, score),
                Message("assistant", reply.text, reply.token_ids, reply.top_logprobs),
            ],
            metadata={
                "id": name,
                "document": self._corpus.documents[plan.chunk.document].document.id,
                "chunk_span": [plan.chunk.start, plan.chunk.end],
                "teacher": self._teacher.name,
                "teacher_context": self._settings.teacher_context,
                "stop_reason": reply.stop_reason,
                "seed": self._seed,
                "seed_prompt": request.sentence,
                "seed_prompt_type": request.family,
                "sentence_index": request.sentence_index,
            },
        )
