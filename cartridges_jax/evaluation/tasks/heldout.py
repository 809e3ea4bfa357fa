"""Self-study conversations that were kept out of training."""

from __future__ import annotations

from cartridges_jax.data.schema import Conversation
from cartridges_jax.evaluation.tasks.task import Example, Metric, TaskInputs, register


@register("heldout")
class HeldOut:
    """The conditions' distributions on the teacher's answers, which gives `heldout_kl`.

    Where there are no human questions, the conversations' questions are also answered freely.
    """

    name = "heldout"
    metrics: tuple[Metric, ...] = ()
    missing = "no self-study conversations were held out"

    def __init__(self, inputs: TaskInputs):
        self.examples = tuple(
            _example(conversation, number, is_answered=not inputs.questions)
            for number, conversation in enumerate(inputs.heldout)
        )

    def score(self, example: Example, answer: str) -> dict[str, float]:
        return {}


def _example(conversation: Conversation, number: int, *, is_answered: bool) -> Example:
    *messages, last = conversation.messages
    return Example(
        str(conversation.metadata.get("id", number)),
        tuple({"role": message.role, "content": message.content} for message in messages),
        given_ids=tuple(last.token_ids),
        is_answered=is_answered,
    )
