"""Seed prompts: the instructions that A writes user messages from (paper section 4.1 and its appendix).

Five families cover different uses of a text; `generic` is the paper's ablation with one
prompt, `qa` asks for plain questions about single facts. No seed mentions a particular
corpus.

Models that follow instructions get one of a family's `instructions` as a user message. Small ones
echo such an instruction instead of following it; they continue a pattern of examples
(`pattern`), each a sentence and the message a user might send about it.
"""

from __future__ import annotations

import dataclasses


@dataclasses.dataclass(frozen=True)
class Pattern:
    """Examples for a model that completes text.

    Attributes:
      header: one line that introduces the list.
      label: the word before the examples' messages ("Question", "Request").
      examples: (sentence, message) pairs about invented things.
      openings: first words to start a message with; "" leaves it free.
      is_question: messages must end with a question mark.
    """

    header: str
    label: str
    examples: tuple[tuple[str, str], ...]
    openings: tuple[str, ...] = ("",)
    is_question: bool = False


@dataclasses.dataclass(frozen=True)
class Family:
    """A seed family: its chat instructions, and its pattern for completion."""

    instructions: tuple[str, ...]
    pattern: Pattern


_FACTS = (
    "The bakery on Mill Lane opens at six in the morning.",
    "Professor Adler found the comet in 1923 with a borrowed telescope.",
    "Guests leave their umbrellas in the blue barrel beside the door.",
    "A season ticket for the swimming pool costs 45 euros.",
)

FAMILIES: dict[str, Family] = {
    "structuring": Family(
        instructions=(
            "Write one request that asks for part of the text above to be put into a structured form such as "
            "JSON, YAML or a table. Say which facts the structure must hold. Write the request only.",
            "Write one message in which a user asks for facts of the text above as a list with named fields. "
            "Name the section or topic, so that the request stands by itself. Write the message only.",
        ),
        pattern=Pattern(
            header="Each fact is followed by a request to write it down in a structured form.",
            label="Request",
            examples=(
                (_FACTS[0], "Give me the name, the street and the opening time of the bakery as a list."),
                (_FACTS[1], "Write the discovery of the comet by Professor Adler as JSON with a name and a year."),
                (_FACTS[3], "Make a table row for the season ticket of the swimming pool and its price."),
            ),
        ),
    ),
    "summarization": Family(
        instructions=(
            "Write one request that asks for a summary of a particular part of the text above. Say which part "
            "by its topic. Write the request only.",
            "Write one message in which a user asks for the main points of one section of the text above. "
            "Write the message only.",
        ),
        pattern=Pattern(
            header="Each fact is followed by a request to sum up what is known about its topic.",
            label="Request",
            examples=(
                (_FACTS[0], "Sum up what you know about the bakery on Mill Lane."),
                (_FACTS[1], "Tell me in one sentence how Professor Adler found the comet."),
                (_FACTS[2], "Briefly explain the rule about umbrellas."),
            ),
        ),
    ),
    "question": Family(
        instructions=(
            "Write one question that tests whether a reader remembers a detail of the text above: a name, a "
            "number, a date or a reason. Make it answerable without seeing the text. Write the question only.",
            "Write one question about the text above that needs two of its facts to be answered. Write the "
            "question only.",
        ),
        pattern=Pattern(
            header="Each fact is followed by a question that a visitor might ask in their own words.",
            label="Question",
            examples=(
                (_FACTS[2], "I have a wet umbrella, where can I leave it?"),
                (_FACTS[0], "How early can I buy bread on Mill Lane?"),
                (_FACTS[3], "How much would I pay to swim the whole season?"),
            ),
            openings=("", "", "I", "Can", "How", "Is", "Do"),
            is_question=True,
        ),
    ),
    "use_case": Family(
        instructions=(
            "Think of a person who would use the text above for their work or their plans. Write the question "
            "that this person would ask, with their situation in it. Write the question only.",
            "Write one practical request of a person who relies on the text above to get something done. "
            "Write the request only.",
        ),
        pattern=Pattern(
            header="Each fact is followed by the question of a person who needs it for their plans.",
            label="Question",
            examples=(
                (_FACTS[0], "I must have breakfast rolls before work, when does the bakery on Mill Lane open?"),
                (_FACTS[3], "My family wants to swim all summer, what does a season ticket cost?"),
                (_FACTS[2], "We arrive in the rain, what should we do with our umbrellas?"),
            ),
            openings=("I", "We", "My", "If"),
            is_question=True,
        ),
    ),
    "creative": Family(
        instructions=(
            "Write one playful request that starts from the text above, such as a verse, a letter or a scene "
            "about its facts. Write the request only.",
            "Write one open question that invites thinking further from something in the text above. Write the "
            "question only.",
        ),
        pattern=Pattern(
            header="Each fact is followed by a playful request about it.",
            label="Request",
            examples=(
                (_FACTS[0], "Write a rhyme about the bakery that opens at six."),
                (_FACTS[1], "Write a postcard from Professor Adler about the comet."),
                (_FACTS[2], "Let the blue barrel tell us about the umbrellas."),
            ),
        ),
    ),
    "generic": Family(
        instructions=("Write one message that starts a conversation about the text above. Write the message only.",),
        pattern=Pattern(
            header="Each fact is followed by a message that starts a conversation about it.",
            label="Message",
            examples=(
                (_FACTS[0], "Tell me about the bakery on Mill Lane."),
                (_FACTS[1], "I would like to talk about the comet that Professor Adler found."),
                (_FACTS[2], "What is the blue barrel for?"),
            ),
        ),
    ),
    "qa": Family(
        instructions=(
            "Write one short question about a single fact of the text above. It must be understandable without "
            "the text. Write the question only.",
        ),
        pattern=Pattern(
            header="Each fact is followed by a question that it answers.",
            label="Question",
            examples=(
                (_FACTS[0], "When does the bakery on Mill Lane open?"),
                (_FACTS[1], "Who found the comet in 1923?"),
                (_FACTS[2], "Where do guests leave their umbrellas?"),
                (_FACTS[3], "How much does a season ticket for the swimming pool cost?"),
            ),
            openings=("", "What", "", "How", "Which", "", "Who", "Where", "When", "How many"),
            is_question=True,
        ),
    ),
}
