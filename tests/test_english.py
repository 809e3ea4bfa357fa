"""The rules of English that a program can check: first lines of docstrings, and words with a plainer substitute.

`python tests/test_english.py` prints every complaint.
"""

from __future__ import annotations

import ast
import io
import re
import tokenize
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[1]
# Files that do not pass yet. A file that passes leaves the list; nothing joins it.
ALLOWED: frozenset[str] = frozenset()

# A first line is a noun phrase or a third-person verb.
_BAD_START = re.compile(
    r"(What|Where|Whether|Whoever|Whom?|Whose|Which|When|Why|How|Of|As|If|That|The same|Everything that|All that)\b"
)
_SECOND_SENTENCE = re.compile(r"[a-z\d)`\"][.!?] [A-Z]")
_THING = r"(?:prefix|prefixes|cartridges?|documents?|chunks?|texts?|context|slots|system message)"
# What is not written, and what is instead.
GLOSSARY = {
    r"nobody|no one": "no process, no request, …",
    r"everybody|everyone": "every host, all callers, …",
    r"whoever": "callers that",
    r"somebody|someone else": "another process, …",
    r"anew": "rebuilt, recomputed, regenerated, again",
    r"goes on|go on|going on|went on": "resumes, continues",
    r"got on|get on": "made progress",
    r"lies|lie": "is stored, is placed, is",
    r"in front": "before, as a prefix",
    rf"behind (?:(?:a|an|the|its|their|one|this|that|another|shared|whole|\d[\d,]*|P) )*{_THING}": "after a prefix",
    r"so many": "n, that many",
    r"dear|dearer|dearly": "expensive",
}
_GLOSSARY = [(re.compile(rf"\b(?:{words})\b", re.IGNORECASE), better) for words, better in GLOSSARY.items()]


def words_complaints(text: str) -> Iterator[str]:
    """One line for every word of the glossary's left column."""
    for pattern, better in _GLOSSARY:
        for found in pattern.finditer(" ".join(text.split())):
            yield f"{found[0]!r}: write {better}"


def first_line_complaints(docstring: str) -> Iterator[str]:
    """One line for everything that is wrong with a docstring's first line."""
    line = docstring.strip().split("\n")[0].strip()
    if _BAD_START.match(line):
        yield f"{line!r}: begin with a noun phrase or a third-person verb"
    if not line.endswith((".", "…", ":", "`")):
        yield f"{line!r}: a first line is one whole sentence"
    if _SECOND_SENTENCE.search(line):
        yield f"{line!r}: a first line is one sentence"


def _documented(tree: ast.Module) -> Iterator[tuple[str, ast.AST]]:
    """Every definition that may have a docstring, with its dotted name."""

    def visit(node: ast.AST, path: tuple[str, ...]) -> Iterator[tuple[str, ast.AST]]:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, (ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
                yield ".".join((*path, child.name)), child
                yield from visit(child, (*path, child.name))
            else:
                yield from visit(child, path)

    yield "", tree
    yield from visit(tree, ())


def python_complaints(source: str) -> list[str]:
    """Complaints about a Python file: docstrings, comments, and strings of more than one word."""
    tree, found = ast.parse(source), []
    for name, node in _documented(tree):
        docstring = ast.get_docstring(node)
        if docstring is None:
            continue
        if not any(part.startswith("_") and not part.startswith("__") for part in name.split(".")):
            found += [f"{name or 'module'}: {complaint}" for complaint in first_line_complaints(docstring)]
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and " " in node.value.strip():
            found += [f"line {node.lineno}: {complaint}" for complaint in words_complaints(node.value)]
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT:
            found += [f"line {token.start[0]}: {complaint}" for complaint in words_complaints(token.string)]
    return found


def complaints(path: Path) -> list[str]:
    """Complaints about a file."""
    text = path.read_text(encoding="utf-8")
    return python_complaints(text) if path.suffix == ".py" else list(words_complaints(text))


def checked_files() -> list[Path]:
    """The package, the programs, the configs, and the README."""
    folders = [ROOT / name for name in ("cartridges_jax", "launch", "experiments")]
    files = [path for folder in folders for path in folder.rglob("*")]
    kinds = (".py", ".ipynb", ".sh", ".sbatch", ".yaml", ".jinja")
    return sorted([*(path for path in files if path.suffix in kinds), ROOT / "README.md"])


def failing() -> dict[str, list[str]]:
    """Complaints by file."""
    found = {str(path.relative_to(ROOT)): complaints(path) for path in checked_files()}
    return {name: lines for name, lines in found.items() if lines}


def test_docstrings_comments_and_messages_are_plain_english():
    found = failing()
    lines = [f"{name}: {line}" for name, complaints in found.items() if name not in ALLOWED for line in complaints]
    assert not lines, "\n".join(lines)
    assert ALLOWED <= set(found), f"pass by now, so leave ALLOWED: {sorted(ALLOWED - set(found))}"


def test_what_is_not_plain_is_seen_wherever_it_is_written():
    bad = '''"""What a cache holds."""
def public():
    """Returns a row. Then another"""
    # Nobody needs it.
    raise ValueError(f"the run {1} goes on")
class _Private:
    """Where it is stored behind a shared prefix."""
'''
    found = "\n".join(python_complaints(bad))
    for word in (
        "'What a cache holds.'",
        "one sentence",
        "whole sentence",
        "'Nobody'",
        "'goes on'",
        "'behind a shared prefix'",
    ):
        assert word in found
    assert "'Where it" not in found  # the first lines of private names are their author's


def test_what_is_plain_is_let_through():
    good = '''"""Rows of a batch."""
def public():
    """Returns the shard of a batch that one mesh partition holds (see `rows`).

    More sentences. As many as are needed.
    """
    # Documents are earlier than what follows; a clearer name, endear, applies.
    return "dearth"
'''
    assert python_complaints(good) == []


if __name__ == "__main__":
    for name, lines in failing().items():
        print(name, len(lines), *lines, sep="\n  ")
