"""Drops training questions that equal, or nearly equal, an evaluation question (rule 1 of evaluation in the README).

The rule. Both questions are reduced to their content words: case, punctuation, possessives and words that carry no
content (articles, auxiliaries, prepositions) go, and "which" is "what". The similarity of two questions is the mean of

- the F1 of their words as multisets, which ignores order, and
- difflib's ratio of their word sequences, which does not ("Did Rollo pay Charles?" / "Did Charles pay Rollo?").

At the threshold of 0.82 a question that adds one word to four is a near-duplicate (8/9), and one that exchanges one
word of five is not (4/5): an added word rarely changes what is asked, an exchanged one does. The price of a needless
drop is one training question; that of a miss is a number nobody can trust, so longer questions lean towards dropping.
"""

from __future__ import annotations

import re
import unicodedata
from collections import Counter
from collections.abc import Sequence
from difflib import SequenceMatcher

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
    words = [_SAME_WORD.get(word, word) for word in _WORD.findall(folded)]
    return " ".join([word for word in words if word not in _EMPTY_WORDS] or words)


def is_near_duplicate(a: str, b: str, threshold: float = NEAR_DUPLICATE_THRESHOLD) -> bool:
    """Whether two questions ask the same by the rule in the module's docstring; symmetric in `a` and `b`."""
    return _is_similar(_Bag(a), _Bag(b), threshold)


def split_contaminated(
    questions: Sequence[str], evaluation_questions: Sequence[str], threshold: float = NEAR_DUPLICATE_THRESHOLD
) -> tuple[list[int], list[int]]:
    """Returns the indices of the training questions to keep, and of those to drop, each in order.

    Args:
      questions: training questions (A's messages).
      evaluation_questions: the frozen questions that none of them may resemble.
      threshold: similarity in [0, 1] from which two questions are taken for one.
    """
    references = [_Bag(question) for question in evaluation_questions]
    clean, dropped = [], []
    for index, question in enumerate(questions):
        bag = _Bag(question)
        contaminated = any(_is_similar(bag, reference, threshold) for reference in references)
        (dropped if contaminated else clean).append(index)
    return clean, dropped


class _Bag:
    """A question's content words, in order and as a multiset."""

    def __init__(self, text: str):
        self.words = normalise(text).split()
        counts = Counter(self.words)
        # The n-th occurrence of a word is an element of its own, so that set intersection is multiset intersection.
        self.elements = frozenset((word, n) for word, count in counts.items() for n in range(count))


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
