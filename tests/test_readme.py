"""The README's Python example runs as it is written, on the tiny talker in place of the real model."""

from __future__ import annotations

import re
import textwrap
from pathlib import Path

import pytest
from tiny_runs import DOCUMENT, talker_gguf  # noqa: F401

ROOT = Path(__file__).parents[1]


def example() -> str:
    """The code block that starts with the package's import."""
    blocks = re.findall(r"(?m)(?:^    .*\n|^\n)+", (ROOT / "README.md").read_text("utf-8"))
    (block,) = [textwrap.dedent(block) for block in blocks if "import cartridges_jax as cj" in block]
    return block


def test_the_python_example_takes_a_text_to_answers(talker_gguf, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Path("my.txt").write_text(DOCUMENT)
    code = example().replace("smollm2-135m-instruct", str(talker_gguf))
    # Two epochs and short messages are enough for a model that says nothing.
    code = code.replace(
        "cj.self_study(model, corpus)", "cj.self_study(model, corpus, conversations=16, writer_temperature=1.0)"
    )
    code = code.replace("cj.train(model, corpus, study)", "cj.train(model, corpus, study, heldout=4, epochs=2.0)")
    assert code.count("conversations=16") == code.count("epochs=2.0") == 1
    exec(compile(code, "README.md", "exec"), {})
    out = capsys.readouterr().out
    assert "'kl_closed'" in out and "'whole_text'" in out
    assert (tmp_path / "my.cartridge" / "cartridge.json").is_file()


@pytest.mark.parametrize(
    "file", ["README.md", "CONTRIBUTING.md", "BUILD.md", *sorted(p.name for p in (ROOT / "docs").glob("*.md"))]
)
def test_files_that_a_page_links_to_exist(file):
    path = ROOT / file if (ROOT / file).is_file() else ROOT / "docs" / file
    for target in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", path.read_text("utf-8")):
        assert (path.parent / target).exists(), target
