"""Splits a text into sentences, by rule: plain prose, hard-wrapped or not, and Markdown.

Three passes. The first cuts the text into *blocks* that no sentence crosses: headings, list items, table rows, lines of
code, paragraphs. The second cuts a block at the sentence ends inside it. The third cuts what is still longer than
`MOST_BYTES` (tables without punctuation, logs, minified JSON, scripts without full stops) at line ends, else at
separators, else anywhere, so that every sentence fits a prompt. Spans are recorded throughout, and every character that
is not white space is in exactly one sentence (guarded by `test_every_visible_character_is_in_exactly_one_sentence`).
The time is proportional to the text's length (`test_splitting_takes_time_in_proportion_to_the_text`).
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterator
from dataclasses import dataclass

# The longest sentence, in bytes of UTF-8: a token is a byte at least, in any script, and four of them in English prose,
# where longer sentences are rare.
MOST_BYTES = 1000
# The characters around a full stop that decide whether it ends a sentence.
_CONTEXT = 80

# Abbreviations that precede what they belong to, so never end a sentence; these only before a digit.
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

# Marks that need a space after them (Latin, Arabic, Urdu, Devanagari, Armenian, Ethiopic), and those that need none.
_SPACED, _UNSPACED = ".!?…؟۔।॥։።", "。！？｡។။"
_END = re.compile(
    rf"""(?:
        (?:(?<![{_SPACED}]) [{_SPACED}]+ | (?<=[\u0370-\u03ff\u1f00-\u1fff]) [;\u037e])   # Greek asks with a semicolon
        ["'”’»)\]*_]* (?:\[\d+\] | :\d[\d–-]*)* (?=\s|$)   # closers: quotes, brackets, emphasis, footnotes
      | [{_UNSPACED}]+ [」』）】”’]*                                     # no space follows in Chinese and Japanese
    )""",
    re.VERBOSE,
)
_VISIBLE = re.compile(r"\S")
_LAST_WORD = re.compile(r"""[^\s"'“‘«(\[*_—–/-]+$""")
_NEXT_WORD = re.compile(r"""["'“‘«(\[*_¿¡]*([\w.]*\w)""")
_ACRONYM = re.compile(r"(?:[^\W\d_]\.)+[^\W\d_]")

_HEADING = re.compile(r" {0,3}#{1,6}[ \t]+")
_UNDERLINE = re.compile(r" {0,3}(?:=+|-+)[ \t]*$")
_FENCE = re.compile(r" {0,3}(?:```|~~~)")
_RULE = re.compile(r" {0,3}(?:(?:\*[ \t]*){3,}|(?:-[ \t]*){3,}|(?:_[ \t]*){3,})$")
_LIST_ITEM = re.compile(r"[ \t]*(?:[-*+•]|\d{1,9}[.)])[ \t]+(?=\S)")
_TABLE_ROW = re.compile(r"[ \t]*\|")
_LINE_END = re.compile(r"[\n\r\v\f\x1c-\x1e\x85\u2028\u2029]")
_SEPARATOR = re.compile(r"[\s,;|:)\]}>、，；：।]")


@dataclass(frozen=True)
class Sentence:
    """One sentence: `text` is the source's `[start:end]`, in characters; at most `MOST_BYTES` of UTF-8.

    `heading` marks a heading line, which is a sentence of its own; `heading_text` is the title of the heading above
    the sentence (a heading's own title), None before the first.
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
    """The sentences of `text`, in order; see the module's docstring for their properties."""
    sentences, title = [], None
    for block in _blocks(text):
        if block.kind == "heading":
            title = block.title
        ends = [*_sentence_ends(text, block), block.end] if block.kind == "paragraph" else [block.end]
        start = block.start
        for end in ends:
            for first, last in _pieces(text, start, end):
                sentences.append(Sentence(text[first:last], first, last, block.kind == "heading", title))
            start = end
    return sentences


def _pieces(text: str, start: int, end: int) -> Iterator[tuple[int, int]]:
    """The span without the white space around it, in as many pieces as `MOST_BYTES` asks for."""
    while True:
        while start < end and text[start].isspace():
            start += 1
        if start == end:
            return
        stop = _longest(text, start, end)
        cut = end if stop == end else _cut(text, start, stop)
        last = cut
        while text[last - 1].isspace():
            last -= 1
        yield start, last
        start = cut


def _longest(text: str, start: int, end: int) -> int:
    """The end of the longest span from `start` that is not too long."""
    stop = min(end, start + MOST_BYTES)
    if len(text[start:stop].encode("utf-8", "surrogatepass")) <= MOST_BYTES:
        return stop
    size = 0
    for place in range(start, stop):
        size += len(text[place].encode("utf-8", "surrogatepass"))
        if size > MOST_BYTES:
            return place
    return stop


def _cut(text: str, start: int, stop: int) -> int:
    """The best place at or before `stop` to cut a span that continues there."""
    # A line end or space right after the piece is as good as one at its end.
    if text[stop].isspace():
        return stop
    for border in (_LINE_END, _SEPARATOR):
        # From the last one backwards; the text between is at most a piece.
        for at in range(stop - 1, start, -1):
            if border.match(text[at]):
                return at + 1
    cut = stop
    while cut > start + 1 and stop - cut < 32 and _joined(text[cut - 1], text[cut]):
        cut -= 1
    return cut if cut > start + 1 and not _joined(text[cut - 1], text[cut]) else stop


def _joined(left: str, right: str) -> bool:
    """Whether a cut between the two characters would take an accent, a Thai vowel or a part off its letter."""
    return unicodedata.category(right)[0] == "M" or "\u200d" in (left, right) or "\ufe00" <= right <= "\ufe0f"


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
            block = _Block(start, end, start, "heading", _title(bare[heading.end() :]))
        elif open_block and _UNDERLINE.match(bare) and (above := _title_above(text, open_block.start, start)):
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


def _title(line: str) -> str:
    """A heading's text without the number signs that close it."""
    title = line.rstrip(" \t").rstrip("#").rstrip(" \t")
    return title[: _longest(title, 0, len(title))]


def _title_above(text: str, start: int, end: int) -> str | None:
    """The text that a line of dashes makes a heading; None where the line is a rule between paragraphs."""
    if end - start > MOST_BYTES:
        return None
    title = text[start:end].strip()
    return None if "\n" in title or _END.search(title) else title


def _continues(block: _Block, marker: str) -> bool:
    """Whether a line that starts like a list item continues a paragraph: "… in\\n1998. Then …" (as in CommonMark)."""
    in_list = block.text_start > block.start
    return not in_list and marker[0].isdigit() and marker[:-1] != "1"


def _sentence_ends(text: str, block: _Block) -> Iterator[int]:
    for match in _END.finditer(text, block.text_start, block.end):
        before = text[max(block.text_start, match.start() - _CONTEXT) : match.start()]
        rest = _VISIBLE.search(text, match.end(), block.end)
        after = text[rest.start() : min(block.end, rest.start() + _CONTEXT)] if rest else ""
        if _ends_sentence(before, match[0], after):
            yield match.end()


def _ends_sentence(before: str, mark: str, after: str) -> bool:
    """Whether the `mark` between `before` and `after`, parts of one block, ends a sentence."""
    if not after or mark[0] not in ".!?…":
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
