"""Keeps training, held-out and evaluation questions apart (rule 1 of evaluation in the README).

Training conversations that ask an evaluation question, and held-out conversations that ask a training question, are
dropped and counted: the same question in the same or nearly the same words.

The rule. Both questions are reduced to their content words: case, punctuation, possessives and words that carry no
content (articles, auxiliaries, prepositions) go, and "which" is "what". The similarity of two questions is the mean of

- the F1 of their words as multisets, which ignores order, and
- difflib's ratio of their word sequences, which does not ("Did Rollo pay Charles?" / "Did Charles pay Rollo?").

At the threshold of 0.82 a question that adds one word to four is a near-duplicate (8/9), and one that exchanges one
word of five is not (4/5): an added word rarely changes what is asked, an exchanged one does. The price of a needless
drop is one training question; that of a miss is a number that cannot be trusted, so longer questions lean towards
dropping.
"""

from __future__ import annotations

import dataclasses
import math
import re
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from difflib import SequenceMatcher

import numpy as np

NEAR_DUPLICATE_THRESHOLD = 0.82

_EMPTY_WORDS = frozenset(
    "a an the this that these those there it its of in on at to for by with from as into "
    "is are was were be been being am do does did done has have had will would shall can could may might must".split()
)
_SAME_WORD = {"which": "what", "whom": "who"}
# Scripts without spaces (kana, CJK ideographs, Hangul) count character by character.
_SPACELESS = "\u3040-\u30ff\u3400-\u9fff\uac00-\ud7af"
_WORD = re.compile(rf"[{_SPACELESS}]|[^\W_{_SPACELESS}]+")
_POSSESSIVE = re.compile(r"['’]s\b")


def normalise(text: str) -> str:
    """The content words of `text` in order, case-folded and joined by spaces; all words where none has content."""
    folded = _POSSESSIVE.sub("", unicodedata.normalize("NFKC", text).casefold())
    words = [_SAME_WORD.get(match[0], match[0]) for match in _WORD.finditer(folded)]
    return " ".join([word for word in words if word not in _EMPTY_WORDS] or words)


def is_near_duplicate(a: str, b: str, threshold: float = NEAR_DUPLICATE_THRESHOLD) -> bool:
    """Returns True if two questions ask the same by the rule in the module's docstring; symmetric in `a` and `b`."""
    return _is_similar(_Bag(a), _Bag(b), threshold)


def split_contaminated(
    questions: Sequence[str], evaluation_questions: Sequence[str], threshold: float = NEAR_DUPLICATE_THRESHOLD
) -> tuple[list[int], list[int]]:
    """Returns the indices of the training questions to keep, and of those to drop, each in order.

    Args:
      questions: training questions (A's messages).
      evaluation_questions: the frozen questions that none of them may resemble.
      threshold: similarity in (0, 1] from which two questions count as one.
    """
    index = _Index(map(_Bag, evaluation_questions), threshold)
    clean, dropped = [], []
    for number, question in enumerate(questions):
        (dropped if index.similar(_Bag(question)) else clean).append(number)
    return clean, dropped


@dataclasses.dataclass(frozen=True)
class Split:
    """The conversations to train on and those to hold out.

    Attributes:
      training: indices of the conversations to train on, ascending.
      heldout: indices of the held-out ones, ascending.
      dropped: number of conversations in neither, by reason: "like_evaluation" (would train on
        an evaluation question), "like_training" (held out, but asks what training asks).
    """

    training: list[int]
    heldout: list[int]
    dropped: dict[str, int]


def split_conversations(
    user_messages: Sequence[Sequence[str]],
    evaluation_questions: Sequence[str],
    num_heldout: int,
    rng: np.random.Generator,
    threshold: float = NEAR_DUPLICATE_THRESHOLD,
) -> Split:
    """Splits conversations into training and held-out ones that share no question.

    `num_heldout` conversations are drawn. Of the others, one is dropped if any of its user
    messages resembles an evaluation question. A drawn one is dropped if each of its user
    messages resembles one of training's: it would measure what was learned by heart.

    Args:
      user_messages: A's messages, per conversation.
      evaluation_questions: the frozen questions.
      num_heldout: conversations to draw; `Split.heldout` has fewer if some are dropped.
      rng: draws them.
      threshold: similarity in (0, 1] from which two questions count as one.
    """
    drawn = sorted(int(number) for number in rng.permutation(len(user_messages))[:num_heldout])
    bags = {number: [_Bag(message) for message in user_messages[number]] for number in drawn}
    evaluation = _Index(map(_Bag, evaluation_questions), threshold)
    heldout = _Index((bag for number in drawn for bag in bags[number]), threshold)
    training, in_training = [], set()
    for number, messages in enumerate(user_messages):
        if number in bags:
            continue
        own = [_Bag(message) for message in messages]
        if any(evaluation.similar(bag) for bag in own):
            continue
        training.append(number)
        for bag in own:
            in_training.update(heldout.similar(bag))
    kept, first = [], 0
    for number in drawn:
        messages = range(first, first + len(bags[number]))
        first += len(messages)
        if not messages or not in_training.issuperset(messages):
            kept.append(number)
    counts = {
        "like_evaluation": len(user_messages) - len(drawn) - len(training),
        "like_training": len(drawn) - len(kept),
    }
    return Split(training, kept, counts)


class _Bag:
    """A question's content words, in order and as a multiset."""

    def __init__(self, text: str):
        self.words = normalise(text).split()
        counts = Counter(self.words)
        # The n-th occurrence of a word is an element of its own, so that set intersection is multiset intersection.
        self.elements = frozenset((word, n) for word, count in counts.items() for n in range(count))


class _Index:
    """Finds the questions of a list that resemble a given one, without comparing it with each.

    F1 bounds the similarity from above. At threshold t it takes o shared elements, 2o >= t(a + b), of questions of a
    and b elements; with b >= o that is o >= at / (2 - t). So among any a - o + 1 elements of the given question there
    is a shared one, and the rarest elements lead to few questions.
    """

    def __init__(self, bags: Iterable[_Bag], threshold: float):
        self._bags, self._threshold = list(bags), threshold
        self._holders: dict[tuple[str, int], list[int]] = defaultdict(list)
        for number, bag in enumerate(self._bags):
            for element in bag.elements:
                self._holders[element].append(number)

    def similar(self, bag: _Bag) -> list[int]:
        """Indices of the questions that ask the same, ascending."""
        # Rounding must not raise the bound.
        least = math.ceil(len(bag.elements) * self._threshold / (2 - self._threshold) - 1e-9)
        known = sorted(
            (self._holders[element] for element in bag.elements if element in self._holders), key=lambda held: len(held)
        )
        if not known or len(known) < least:
            return []
        candidates = sorted({number for holders in known[: len(known) - least + 1] for number in holders})
        return [number for number in candidates if _is_similar(bag, self._bags[number], self._threshold)]


def _is_similar(a: _Bag, b: _Bag, threshold: float) -> bool:
    total = len(a.words) + len(b.words)
    if a.words == b.words:
        return total > 0
    f1 = 2 * len(a.elements & b.elements) / total
    if f1 < threshold:  # F1 bounds the sequence ratio, and so the mean, from above
        return False
    # difflib is not symmetric in its arguments; the order is fixed so that the rule is.
    first, second = sorted((a.words, b.words))
    ratio = SequenceMatcher(None, first, second, autojunk=False).ratio()
    return (f1 + ratio) / 2 >= threshold
