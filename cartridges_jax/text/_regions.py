"""Finding each message's content in what a chat template writes.

The template runs on contents that hold marker characters, a pair of its own for each message, which occur
nowhere else. Taking the markers out must give the plain rendering back; so whatever a template does to
contents is either understood or refused.

Templates trim contents, each in its own way (Llama 3 all white space on both sides, Qwen3 newlines before
the last answer), and markers around a content would hide its white space from that. So the template runs
twice: markers inside the white space show what trimming leaves, markers outside show what the template
itself writes between contents. The difference is white space that belongs to the contents.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Iterator, Sequence

from cartridges_jax.errors import UserError

# The ends of thinking: the usual one, and those by which a template's source takes the rest of a text.
_END_OF_THINKING = "</think>"
_TAKES_THE_REST = re.compile(
    r"""\.split\(\s*(?P<quote>['"])(?P<end>[^'"\\]+)(?P=quote)\s*\)\s*(?:\[\s*-1\s*\]|\|\s*last)"""
)

# A turn: its role, and what its content is made of: messages by number, and text of our own between them.
Turn = tuple[str, list["int | str"]]


class Markers:
    """A pair of characters per message that do not occur in given texts.

    They are from Unicode's private planes, where 131,070 wait.
    """

    def __init__(self, count: int, *texts: str):
        used = set().union(*texts)
        free = (c for c in map(chr, range(0xF0000, 0x10FFFE)) if c not in used)
        chars = list(itertools.islice(free, 2 * count))
        if len(chars) < 2 * count:
            raise UserError(f"{count} messages are more than there are markers for; split the conversation")
        self._opening, self._closing = chars[0::2], chars[1::2]
        self._number = {char: i for i, char in enumerate(self._opening)}
        every = "".join(chars)
        opening, closing = "".join(self._opening), "".join(self._closing)
        self._regions = re.compile(f"([{opening}])([^{every}]*)[{closing}]" if chars else r"(?!)")
        self._nothing = dict.fromkeys(map(ord, chars))

    def wrap(self, number: int, text: str) -> str:
        return self._opening[number] + text + self._closing[number]

    def opening(self, number: int) -> str:
        return self._opening[number]

    def removed(self, text: str) -> str:
        return text.translate(self._nothing)

    def split(self, text: str) -> tuple[list[int], list[str], list[str]]:
        """Numbers and contents of the regions in order, and the texts around them (one more)."""
        matches = list(self._regions.finditer(text))
        borders = [0, *(border for match in matches for border in match.span()), len(text)]
        gaps = [text[start:end] for start, end in zip(borders[0::2], borders[1::2])]
        return [self._number[match[1]] for match in matches], [match[2] for match in matches], gaps


def mark(
    run: Callable[[list[dict[str, str]]], str],
    turns: Sequence[Turn],
    contents: Sequence[str],
    markers: Markers,
    ends: Sequence[str] = (_END_OF_THINKING,),
) -> str | None:
    """The template's text with every content between its markers; None if the contents cannot be followed.

    Args:
      run: the template, from messages to text.
      turns: the messages to give it, in terms of `contents`.
      contents: the text of each message.
      ends: see `ends_of_thinking`.

    Raises:
      UserError: from `run`.
    """
    plain = run(_filled(turns, contents))
    for variant in _variants(turns, contents, ends):
        for leading in (True, False):
            parts = [_around(content, leading) for content in variant]
            marked = _marked(run, turns, parts, markers)
            if marked is not None and markers.removed(marked) == plain:
                return marked
    return None


def _marked(run, turns: Sequence[Turn], parts: Sequence[tuple[str, str, str]], markers: Markers) -> str | None:
    """`parts`: leading white space, the core and trailing white space, per content."""
    inside = [lead + markers.wrap(i, core) + trail for i, (lead, core, trail) in enumerate(parts)]
    outside = [markers.wrap(i, "".join(part)) for i, part in enumerate(parts)]
    numbers, cores, gaps = markers.split(run(_filled(turns, inside)))
    others, wholes, templates = markers.split(run(_filled(turns, outside)))
    if sorted(numbers) != list(range(len(parts))) or numbers != others:
        return None
    if any(cores[i] != parts[n][1] or wholes[i] != "".join(parts[n]) for i, n in enumerate(numbers)):
        return None
    trails = ["", *(parts[n][2] for n in numbers)]
    leads = [*(parts[n][0] for n in numbers), ""]
    kept = [_kept(*each) for each in zip(gaps, templates, trails, leads)]
    if None in kept:
        return None
    text = templates[0]
    for i, number in enumerate(numbers):
        lead, trail = kept[i][1], kept[i + 1][0]
        text += markers.wrap(number, lead + cores[i] + trail) + templates[i + 1]
    return text


def _kept(gap: str, template: str, trail: str, lead: str) -> tuple[str, str] | None:
    """What trimming left of `trail` and `lead`, when `gap` is what it left with `template` between them."""
    extra = len(gap) - len(template)
    choices = range(max(0, extra - len(lead)), min(extra, len(trail)) + 1)
    # Where several fit, all or nothing is likelier than a part.
    for size in sorted(choices, key=lambda a: (a not in (0, len(trail))) + (extra - a not in (0, len(lead)))):
        before, after = gap[:size], gap[size + len(template) :]
        if gap[size : size + len(template)] == template and trail.startswith(before) and lead.endswith(after):
            return before, after
    return None


def _around(content: str, leading: bool) -> tuple[str, str, str]:
    """Leading white space, the core, trailing white space; all leading or all trailing if there is no core."""
    core = content.strip()
    if not core:
        return (content, "", "") if leading else ("", "", content)
    start = content.index(core)
    return content[:start], core, content[start + len(core) :]


def ends_of_thinking(source: str) -> tuple[str, ...]:
    """The texts up to which a template may leave out an answer: `</think>`, and others that its source names."""
    return tuple(dict.fromkeys([_END_OF_THINKING, *(found["end"] for found in _TAKES_THE_REST.finditer(source))]))


def _variants(turns: Sequence[Turn], contents: Sequence[str], ends: Sequence[str]) -> Iterator[list[str]]:
    """The contents, then the rest of them where a template leaves out the thinking of answers.

    The rest is trimmed as templates do it: not at all (DeepSeek R1), of newlines before it (Qwen3), or at both ends.
    The thinking itself is not handed to the template then, so it cannot come out as the template's own text,
    where control tokens count: a template that writes it is refused.
    """
    yield list(contents)
    answers = {part for role, parts in turns if role == "assistant" for part in parts if isinstance(part, int)}
    seen = [list(contents)]
    for end, trimmed in itertools.product(ends, (str, _without_newlines, str.strip)):
        cut = {i for i in answers if end in contents[i]}
        shorter = [trimmed(text.split(end)[-1]) if i in cut else text for i, text in enumerate(contents)]
        # Cut at the start of the thinking, a text would still hold it.
        if shorter not in seen and not any(other in shorter[i] for i in cut for other in ends):
            seen.append(shorter)
            yield shorter


def _without_newlines(text: str) -> str:
    return text.lstrip("\n")


def _filled(turns: Sequence[Turn], contents: Sequence[str]) -> list[dict[str, str]]:
    return [
        {"role": role, "content": "".join(contents[part] if isinstance(part, int) else part for part in parts)}
        for role, parts in turns
    ]
