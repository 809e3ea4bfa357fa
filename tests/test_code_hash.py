"""A stage is repeated when its program changes, not when its text does."""

from __future__ import annotations

import ast
import json
import shutil
from importlib import metadata
from pathlib import Path

import pytest

import cartridges_jax
from cartridges_jax.pipeline.stages.context import _CODE
from cartridges_jax.pipeline.workdir import code_hash, library_versions

PACKAGE = Path(cartridges_jax.__file__).parent


@pytest.fixture(scope="module")
def copy(tmp_path_factory) -> Path:
    """A copy of the package's source."""
    return shutil.copytree(
        PACKAGE, tmp_path_factory.mktemp("copy") / "cartridges_jax", ignore=shutil.ignore_patterns("__pycache__")
    )


def hashes(root: Path) -> dict[str, str]:
    return {stage: code_hash(*parts, root=root) for stage, parts in _CODE.items()}


def rewritten(path: Path, old: str, new: str) -> None:
    source = path.read_text()
    assert old in source
    path.write_text(source.replace(old, new, 1))


def test_a_copy_has_the_hashes_of_the_package(copy):
    assert hashes(copy) == {stage: code_hash(*parts) for stage, parts in _CODE.items()}


def test_changed_docstrings_and_comments_rerun_no_stage(copy):
    before = hashes(copy)
    for path in (copy / "text" / "tokenizer.py", copy / "attention" / "xla.py", copy / "distill" / "loss.py"):
        tree = ast.parse(path.read_text())
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef | ast.ClassDef | ast.Module) and ast.get_docstring(node):
                node.body[0].value.value = "Another docstring."
        # Unparsed, so without comments and in another format.
        path.write_text(f"# A comment.\n{ast.unparse(tree)}\n")
    assert hashes(copy) == before


@pytest.mark.parametrize(
    ("file", "stages"),
    [
        ("text/tokenizer.py", {"study", "train", "evaluate"}),
        ("distill/loss.py", {"train", "evaluate"}),
        ("evaluation/metrics.py", {"evaluate"}),
        ("evaluation/report.py", set()),
    ],
)
def test_a_changed_line_of_code_reruns_the_stages_that_use_it(copy, file, stages):
    before = hashes(copy)
    with open(copy / file, "a") as opened:
        opened.write("\nADDED = 1\n")
    after = hashes(copy)
    assert {stage for stage in before if before[stage] != after[stage]} == stages


PROGRAM = '''"""A module."""
LIMIT = 10


def clipped(x, low=None, *, high=LIMIT):
    """Clips."""
    names = ["a", None]
    if x > high and names:
        return high
    return x
'''


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("10", "10.0"), ("x > high", "x >= high"), ("and", "or"), ("return high", "return x"), ('"a"', '"b"'),
        ("low=None", "low=0"), ("*, high", "high"), ("def clipped", "async def clipped"), ("    return x\n", ""),
        ("None]", "]"), ("return x\n", "return None\n"),
    ],
)  # fmt: skip
def test_every_kind_of_change_to_a_program_is_seen(tmp_path, old, new):
    path = tmp_path / "a.py"
    path.write_text(PROGRAM)
    before = code_hash("a.py", root=tmp_path)
    rewritten(path, old, new)
    assert code_hash("a.py", root=tmp_path) != before


def test_a_renamed_file_is_a_change(tmp_path):
    (tmp_path / "part").mkdir()
    (tmp_path / "part" / "a.py").write_text(PROGRAM)
    before = code_hash("part", root=tmp_path)
    (tmp_path / "part" / "a.py").rename(tmp_path / "part" / "b.py")
    assert code_hash("part", root=tmp_path) != before


def test_the_libraries_that_decide_numbers_are_inputs_of_a_stage():
    versions = library_versions()
    assert versions == {name: metadata.version(name) for name in ("jax", "jaxlib", "numpy", "optax")}
    assert json.loads(json.dumps(versions)) == versions
