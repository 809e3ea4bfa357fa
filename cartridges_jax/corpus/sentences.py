"""Splits a text into sentences, by rule: plain prose, hard-wrapped or not, and Markdown.

Two passes. The first cuts the text into *blocks* that no sentence crosses: headings, list items, table rows, lines of
code, paragraphs. The second cuts a block at the sentence ends inside it. Spans are kept throughout, and every character
that is not white space lies in exactly one sentence (guarded by `test_every_visible_character_is_in_exactly_one_sentence`).
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass

# Abbreviations that are followed by what they belong to, so never end a sentence; these only before a digit.
_BEFORE_NAMES = frozenset(
    "mr mrs ms dr prof st mt ft rev hon fr gen col maj capt cmdr lt sgt gov sen rep pres vs cf e.g i.e viz".split()
)
_BEFORE_NUMBERS = frozenset(
    "no nos fig figs eq eqs sec art ch vol p pp ca c approx jan feb mar apr jun jul aug sep sept oct nov dec".split()
)
# Abbreviations and acronyms that may end a sentence: after them, only a word that opens sentences is taken for one.
_MAY_END = frozenset("inc ltd co corp bros jr sr ph.d ave blvd dept est al".split())
_OPENERS = frozenset(
    "a after all although an and another as at because before both but by during each even every first for from he her here "
    "his how however if in it its later many most no not on one only our several she since so some such that the their then "
    "there these they this those to today under until we what when where while who why with you your".split()
)

_END = re.compile(
    r"""(?:
        [.!?…؟।]+ ["'”’»)\]*_]* (?:\[\d+\] | :\d[\d–-]*)* (?=\s|$)   # closers: quotes, brackets, emphasis, footnotes
      | [。！？｡]+ [」』）】”’]*                                        # no space follows in Chinese and Japanese
    )""",
    re.VERBOSE,
)
_LAST_WORD = re.compile(r"""[^\s"'“‘«(\[*_—–/-]+$""")
_NEXT_WORD = re.compile(r"""["'“‘«(\[*_¿¡]*([\w.]*\w)""")
_ACRONYM = re.compile(r"(?:[^\W\d_]\.)+[^\W\d_]")

_HEADING = re.compile(r" {0,3}#{1,6}[ \t]+(.*?)[ \t]*#*[ \t]*$")
_UNDERLINE = re.compile(r" {0,3}(?:=+|-+)[ \t]*$")
_FENCE = re.compile(r" {0,3}(?:```|~~~)")
_RULE = re.compile(r" {0,3}(?:(?:\*[ \t]*){3,}|(?:-[ \t]*){3,}|(?:_[ \t]*){3,})$")
_LIST_ITEM = re.compile(r"[ \t]*(?:[-*+•]|\d{1,9}[.)])[ \t]+(?=\S)")
_TABLE_ROW = re.compile(r"[ \t]*\|")


@dataclass(frozen=True)
class Sentence:
    """One sentence: `text` is the source's `[start:end]`, in characters.

    `heading` marks a heading line, which is a sentence of its own; `heading_text` is the title of the heading that the
    sentence stands under (a heading's own title), None before the first.
    """

    text: str
    start: int
    end: int
    heading: bool = False
    heading_text: str | None = None

    @property
    def has_words(self) -> bool:
        """False for lines of markup alone: rules, the line under a table's head, code fences."""
        return any(character.isalnum() for character in self.text)


@dataclass
class _Block:
    start: int
    end: int
    text_start: int  # after a list marker, whose dot ends no sentence
    kind: str  # "paragraph" is the one that the next line may continue; "line" is never split
    title: str | None = None


def split_sentences(text: str) -> list[Sentence]:
    """Splits `text`; see the module's docstring for what the result promises."""
    sentences, title = [], None
    for block in _blocks(text):
        if block.kind == "heading":
            title = block.title
        ends = [*_sentence_ends(text, block), block.end] if block.kind == "paragraph" else [block.end]
        start = block.start
        for end in ends:
            if piece := text[start:end].strip():
                start = text.index(piece, start)
                sentences.append(Sentence(piece, start, start + len(piece), block.kind == "heading", title))
            start = end
    return sentences


def _blocks(text: str) -> Iterator[_Block]:
    open_block: _Block | None = None  # the paragraph or list item that a next line would continue
    in_code = False
    start = 0
    for line in text.splitlines(keepends=True):
        end = start + len(line)
        bare = line.rstrip()
        block = None
        if _FENCE.match(bare):
            in_code = not in_code
            block = _Block(start, end, start, "line")
        elif in_code or _TABLE_ROW.match(bare):
            block = _Block(start, end, start, "line")
        elif heading := _HEADING.match(bare):
            block = _Block(start, end, start, "heading", heading[1])
        elif open_block and _UNDERLINE.match(bare) and _can_be_title(above := text[open_block.start : start].strip()):
            block = _Block(open_block.start, end, start, "heading", above)
            open_block = None
        elif _RULE.match(bare):
            block = _Block(start, end, start, "line")
        elif (item := _LIST_ITEM.match(bare)) and not (open_block and _continues(open_block, item[0].strip())):
            block = _Block(start, end, start + item.end(), "paragraph")
        elif bare.strip() and open_block:
            open_block.end = end
        elif bare.strip():
            open_block = _Block(start, end, start, "paragraph")
        # A blank line, or the start of another block, closes the open one.
        if open_block and (block or not bare.strip()):
            yield open_block
            open_block = None
        if block and block.kind == "paragraph":
            open_block = block
        elif block:
            yield block
        start = end
    if open_block:
        yield open_block


def _can_be_title(text: str) -> bool:
    """Whether a line of dashes under `text` makes it a heading, rather than being a rule between paragraphs."""
    return "\n" not in text and not _END.search(text)


def _continues(block: _Block, marker: str) -> bool:
    """Whether a line that starts like a list item continues a paragraph: "… in\\n1998. Then …" (as in CommonMark)."""
    in_list = block.text_start > block.start
    return not in_list and marker[0].isdigit() and marker[:-1] != "1"


def _sentence_ends(text: str, block: _Block) -> Iterator[int]:
    for match in _END.finditer(text, block.text_start, block.end):
        if _ends_sentence(text[block.text_start : match.start()], match[0], text[match.end() : block.end].lstrip()):
            yield match.end()


def _ends_sentence(before: str, mark: str, after: str) -> bool:
    """Whether the `mark` between `before` and `after`, texts of one block, ends a sentence."""
    if not after or mark[0] in "。！？｡؟।":
        return True
    next_word = match[1] if (match := _NEXT_WORD.match(after)) else ""
    if next_word[:1].islower():
        return False  # "Who is it?" he asked. / e.g. this
    if mark[0] != "." or mark.startswith(".."):
        return True
    word = match[0] if (match := _LAST_WORD.search(before)) else ""
    lower = word.lower()
    if lower in _BEFORE_NAMES:
        return False
    if lower in _BEFORE_NUMBERS and next_word[:1].isdigit():
        return False
    if lower in ("a.m", "p.m", "etc"):
        return True
    is_initial = len(word) == 1 and word.isupper()
    if is_initial or lower in _MAY_END or _ACRONYM.fullmatch(word):
        return next_word.lower() in _OPENERS and next_word != "A"  # J. A. Smith
    return True
