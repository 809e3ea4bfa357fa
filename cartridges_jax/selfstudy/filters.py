"""Filters: rules that drop messages of A's and answers of B's (`study.filters`).

The rules make a small model's conversations usable. They are wrong for large models, which write long and structured
messages on purpose, so paper-size runs use none of them.
"""

from __future__ import annotations

import dataclasses
import re
from collections import Counter
from collections.abc import Callable, Sequence, Set
from typing import TYPE_CHECKING, NamedTuple

from cartridges_jax.data.decontaminate import normalise
from cartridges_jax.selfstudy.seeds import FAMILIES
from cartridges_jax.selfstudy.teacher import Reply

if TYPE_CHECKING:
    from cartridges_jax.selfstudy.settings import SynthesisSettings


@dataclasses.dataclass(frozen=True)
class Candidate:
    """A message of A's, with B's answer once there is one.

    Attributes:
      family: the seed family of the message.
      message: the message's text.
      source: the text that the message should be about: a sentence, or the chunk.
      asked: earlier messages, normalised.
      answer: B's answer; None for the filters of messages.
    """

    family: str
    message: str
    source: str
    asked: Set[str] = frozenset()
    answer: Reply | None = None


class Filter(NamedTuple):
    """A rule.

    Attributes:
      applies_to: "message" or "answer".
      keeps: whether a candidate is kept.
    """

    applies_to: str
    keeps: Callable[[Candidate, SynthesisSettings], bool]


def _has_usual_length(candidate: Candidate, settings: SynthesisSettings) -> bool:
    longest = settings.question_max_words if _is_question(candidate) else settings.max_words
    return settings.min_words <= len(candidate.message.split()) <= longest


def _ends_as_it_should(candidate: Candidate, settings: SynthesisSettings) -> bool:
    return not _is_question(candidate) or candidate.message.endswith("?")


def _is_no_example(candidate: Candidate, settings: SynthesisSettings) -> bool:
    return all(candidate.message != example for _, example in FAMILIES[candidate.family].pattern.examples)


def _keeps_to_its_source(candidate: Candidate, settings: SynthesisSettings) -> bool:
    return is_about(candidate.message, candidate.source, min_shared=settings.about_min_words)


def _is_new(candidate: Candidate, settings: SynthesisSettings) -> bool:
    return normalise(candidate.message) not in candidate.asked


def _repeats_nothing(candidate: Candidate, settings: SynthesisSettings) -> bool:
    assert candidate.answer is not None
    return not degenerates(
        candidate.answer.token_ids,
        candidate.answer.text,
        span=settings.repetition_span,
        times=settings.repetition_times,
    )


# A filter's name is the reason that its drops are counted under.
FILTERS: dict[str, Filter] = {
    "length": Filter("message", _has_usual_length),
    "question_mark": Filter("message", _ends_as_it_should),
    "echo": Filter("message", _is_no_example),
    "about": Filter("message", _keeps_to_its_source),
    "duplicate": Filter("message", _is_new),
    "repetition": Filter("answer", _repeats_nothing),
}


def reason_to_drop(candidate: Candidate, settings: SynthesisSettings) -> str | None:
    """The name of the first of `settings.filters` that drops a candidate; None keeps it.

    Without an answer the filters of messages apply, with one those of answers.
    """
    applies_to = "message" if candidate.answer is None else "answer"
    for name in settings.filters:
        rule = FILTERS[name]
        if rule.applies_to == applies_to and not rule.keeps(candidate, settings):
            return name
    return None


def _is_question(candidate: Candidate) -> bool:
    return FAMILIES[candidate.family].pattern.is_question


def is_about(message: str, source: str, *, min_shared: int = 2) -> bool:
    """True if a message keeps to a text: it shares `min_shared` content words, or half of its own.

    Small models drift off; a question about nothing in the text is answered with an
    invention that the cartridge would have to learn.
    """
    words = _content_words(message)
    shared = len(words & _content_words(source))
    return shared >= min_shared or 0 < len(words) <= 2 * shared


def _content_words(text: str) -> set[str]:
    # Stems of five letters, so that "opens" and "open", "repaired" and "repairs" meet.
    return {word[:5] for word in re.findall(r"\w+", normalise(text))}


def degenerates(token_ids: Sequence[int], text: str = "", *, span: int = 4, times: int = 3) -> bool:
    """True if an answer repeats itself: one run of `span` tokens occurs `times` times.

    The rows of lists, tables and JSON share short runs and are no repetition
    (`test_structured_answers_are_not_taken_for_repetition`): these must repeat a whole row, or loop within one.
    """
    rows = _structured_rows(text)
    if rows:
        return max(Counter(rows).values()) >= times or _loops(re.findall(r"\w+", text), span, times)
    runs = Counter(tuple(token_ids[i : i + span]) for i in range(len(token_ids) - span + 1))
    return max(runs.values(), default=0) >= times


_MARKER = re.compile(r"\s*(?:[-*+•|]|\d{1,3}[.)])\s*")
_OBJECT = re.compile(r"""[{\[]\s*[{"\[]""")


def _structured_rows(text: str) -> list[str]:
    """The items of a list, rows of a table or objects of JSON, each without its marker; [] for prose."""
    if _OBJECT.search(text):
        rows = re.split(r"[{}\[\]]", text)
    else:
        rows = [line for line in text.splitlines() if line.strip()]
        marked = [line for line in rows if _MARKER.match(line)]
        if len(marked) < 2 or 2 * len(marked) < len(rows):
            return []
    rows = [_MARKER.sub("", row, count=1).strip() for row in rows]
    return [row for row in rows if re.search(r"\w", row)]


def _loops(words: Sequence[str], span: int, times: int) -> bool:
    """Whether some stretch of words is `times` rounds of one block, of which the last has at least `span` words.

    The last round of a block of fewer words than `span` continues into further ones.
    """
    for period in range(1, len(words) // 2 + 1):
        same = 0
        for one, other in zip(words, words[period:]):
            same = same + 1 if one == other else 0
            if same >= period * (times - 2) + span:
                return True
    return False
