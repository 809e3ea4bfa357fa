"""The teacher that is the student's own model with the text in its context, as in the paper."""

from __future__ import annotations

import functools
from collections import OrderedDict
from collections.abc import Callable, Sequence

from cartridges_jax import sampling
from cartridges_jax.cartridge import KVPrefix
from cartridges_jax.data.schema import TopLogprobs
from cartridges_jax.errors import UserError
from cartridges_jax.models import Model
from cartridges_jax.parallel import independent_parts
from cartridges_jax.selfstudy.scoring import top_logprobs_of
from cartridges_jax.selfstudy.teacher import Messages, Reply, register

# A run alternates between a chunk and, if the teacher reads it, the whole corpus.
_CONTEXTS_HELD = 2


@register("local")
class LocalTeacher:
    """Answers with a local model, after a prefix that is prefilled once per context.

    Attributes:
      name: the model's.
    """

    def __init__(self, model: Model, argument: str = "", heartbeat: Callable[[], None] = lambda: None):
        """
        Raises:
          UserError: an argument.
        """
        if argument:
            raise UserError(f"study.teacher 'local:{argument}': the local teacher takes no argument, write 'local'")
        self.name = model.name
        self._model = model
        self._heartbeat = heartbeat
        self._contexts: OrderedDict[str, KVPrefix] = OrderedDict()
        self._heads: dict[str, KVPrefix] = {}

    def reply(
        self,
        context: str,
        conversations: Sequence[Messages],
        *,
        max_tokens: int,
        temperature: float,
        top_logprobs: int = 0,
        seed: int = 0,
    ) -> list[Reply]:
        """Replies to conversations (see `Teacher.reply`).

        Raises:
          UserError: a context and conversation that the model's context does not hold.
        """
        if not conversations:
            return []
        generations = sampling.generate_tokens(
            self._model,
            [self._model.chat.render_continuation(messages).token_ids for messages in conversations],
            self._prefix(context),
            max_tokens=max_tokens,
            sampling=sampling.Sampling(temperature),
            seed=seed,
            top_logprobs=top_logprobs,
            on_progress=lambda finished: self._heartbeat(),
        )
        return [self._reply(generation) for generation in generations]

    def complete(
        self,
        head: str,
        prompts: Sequence[str],
        *,
        max_tokens: int,
        temperature: float,
        top_k: int = 0,
        seed: int = 0,
    ) -> list[Reply]:
        """Completes texts (see `Completes.complete`); raises as `reply`."""
        if not prompts:
            return []
        encode = self._model.tokenizer.encode
        if head not in self._heads:
            self._heads[head] = sampling.prefill(self._model, encode(head))
        generations = sampling.generate_tokens(
            self._model,
            [encode(prompt) for prompt in prompts],
            self._heads[head],
            max_tokens=max_tokens,
            sampling=sampling.Sampling(temperature, top_k=top_k),
            stop_ids=self._line_ends,
            seed=seed,
            on_progress=lambda finished: self._heartbeat(),
        )
        replies = [self._reply(generation) for generation in generations]
        return [reply._replace(text=reply.text.split("\n", maxsplit=1)[0]) for reply in replies]

    def score(self, context: str, conversations: Sequence[Messages], *, top_logprobs: int) -> list[TopLogprobs]:
        """Scores texts (see `Scores.score`); raises as `reply`."""
        if not conversations:
            return []
        chat = self._model.chat
        rendered = [chat.render_continuation(messages) for messages in conversations]
        rows, spans = [r.token_ids for r in rendered], [r.spans[-1] for r in rendered]
        if min(begin for begin, _ in spans) == 0:
            # Some templates write nothing between the system message and the user's: the token before the first of
            # such a message is the prefix's last.
            head = chat.system_prefix(context).token_ids
            prefix = sampling.prefill(self._model, head[:-1])
            rows = [[head[-1], *row] for row in rows]
            spans = [(begin + 1, end + 1) for begin, end in spans]
        else:
            prefix = self._prefix(context)
        return top_logprobs_of(self._model, rows, spans, prefix, top_logprobs, heartbeat=self._heartbeat)

    def process_groups(self) -> list[tuple[int, ...]]:
        """The processes of each group (see `Spread.process_groups`): the processes of the mesh's parts that hold all of the model."""
        if self._model.mesh is None:
            return []
        parts = independent_parts(self._model.mesh)
        return [tuple(sorted({device.process_index for device in part.devices.flat})) for part in parts]

    def on_group(self, number: int) -> LocalTeacher:
        """The teacher on a group of processes (see `Spread.on_group`)."""
        if self._model.mesh is None:
            return self
        parts = independent_parts(self._model.mesh)
        model = self._model.on(parts[number]) if len(parts) > 1 else self._model
        return LocalTeacher(model, heartbeat=self._heartbeat)

    def _prefix(self, context: str) -> KVPrefix:
        """The context as a system message."""
        if context not in self._contexts:
            self._contexts[context] = sampling.prefill(self._model, self._model.chat.system_prefix(context).token_ids)
            if len(self._contexts) > _CONTEXTS_HELD:
                self._contexts.popitem(last=False)
        self._contexts.move_to_end(context)
        return self._contexts[context]

    def _reply(self, generation: sampling.Generation) -> Reply:
        top = None
        if generation.top_ids is not None and generation.top_logprobs is not None:
            top = TopLogprobs.from_dense(generation.top_ids, generation.top_logprobs)
        text = self._model.tokenizer.decode(generation.token_ids)
        return Reply(text, generation.token_ids, top, generation.stop_reason)

    @functools.cached_property
    def _line_ends(self) -> list[int]:
        """The tokens that end a line, and the model's own stop tokens."""
        tokenizer = self._model.tokenizer
        with_break = [i for i in range(tokenizer.vocab_size) if "\n" in tokenizer.decode([i])]
        return sorted({*with_break, *self._model.chat.stop_ids})
