"""The notebooks in shrunk form: every cell but those that install or need a TPU, with smaller sizes."""

from __future__ import annotations

import copy
import json
import re
import sys
from pathlib import Path

import nbformat
import pytest
from aot_workloads import needs_libtpu, toy_flags
from nbclient import NotebookClient

ROOT = Path(__file__).parents[1]
NOTEBOOKS = sorted((ROOT / "experiments" / "colab").glob("*.ipynb"))


def cells(path, tag=None):
    book = nbformat.read(path, as_version=4)
    return [cell for cell in book.cells if tag is None or tag in cell.metadata.get("tags", ())]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_has_a_badge_one_install_cell_and_no_outputs(path):
    assert nbformat.validator.isvalid(json.loads(path.read_text()))
    assert f"/experiments/colab/{path.name})" in cells(path)[0].source and "colab-badge.svg" in cells(path)[0].source
    assert len(cells(path, "install")) == 1
    for cell in cells(path):
        if cell.cell_type == "code":
            assert cell.outputs == [] and cell.execution_count is None


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_badge_and_install_cell_lead_to_the_projects_home(path):
    home = re.search(r'url="https://github.com/([^"]+)"', (ROOT / "setup.py").read_text())[1]
    badge = f"https://colab.research.google.com/github/{home}/blob/main/experiments/colab/{path.name}"
    assert re.findall(r"\]\((https://colab[^)]+/github/[^)]+)\)", cells(path)[0].source) == [badge]
    (install,) = cells(path, "install")
    assert re.findall(r"git clone .*(https://\S+)", install.source) == [f"https://github.com/{home}"]
    # What goes wrong there is to be seen there.
    assert "%%capture" not in install.source and "\nimport cartridges_jax\n" in install.source


def test_no_placeholder_stands_for_the_projects_home():
    folders = [ROOT / name for name in ("cartridges_jax", "experiments", "launch")]
    files = [*ROOT.glob("*.*"), *(path for folder in folders for path in folder.rglob("*"))]
    for path in files:
        if path.suffix in (".ipynb", ".md", ".py", ".sbatch", ".sh", ".yaml"):
            assert "OWNER" not in path.read_text(), path


def run(path: Path, directory: Path, skipped: tuple[str, ...], changes: dict[str, str]) -> list:
    """Executes a notebook from an empty directory that has this checkout's programs; returns its code cells."""
    book = nbformat.read(path, as_version=4)
    book.cells = [cell for cell in book.cells if not set(skipped) & set(cell.metadata.get("tags", ()))]
    for old, new in changes.items():
        assert sum(old in cell.source for cell in book.cells) == 1, old
        for cell in book.cells:
            cell.source = cell.source.replace(old, new)
    for name in ("launch", "experiments"):
        (directory / name).symlink_to(ROOT / name)
    setup = f"import os\nos.environ['PATH'] = {str(Path(sys.executable).parent)!r} + os.pathsep + os.environ['PATH']\n"
    setup += f"os.environ['PYTHONPATH'] = {str(ROOT)!r}"
    book = copy.deepcopy(book)
    book.cells.insert(0, nbformat.v4.new_code_cell(setup))
    NotebookClient(book, timeout=600, kernel_name="python3", resources={"metadata": {"path": str(directory)}}).execute()
    return [cell for cell in book.cells[1:] if cell.cell_type == "code"]


def printed(cell) -> str:
    return "".join(output.get("text", "") for output in cell.outputs)


@pytest.mark.long
def test_the_quickstart_notebook_trains_looks_and_asks(tmp_path):
    settings = {
        "heldout": 4, "cartridge.num_slots": 64, "study.conversations": 16, "study.requests_per_batch": 32, "train.steps": 4,
        "study.writer_max_tokens": 16, "study.answer_max_tokens": 16, "train.rows_per_step": 2, "train.warmup_steps": 1,
        "train.eval_every": 4, "evaluation.max_questions": 2, "evaluation.max_answer_tokens": 16, "train.row_tokens": 96,
    }  # fmt: skip
    flags = " ".join(f"--config.{name}={value}" for name, value in settings.items())
    train, look, report, ask = run(
        ROOT / "experiments" / "colab" / "quickstart.ipynb",
        tmp_path,
        ("install",),
        {'SETTINGS = ""': f'SETTINGS = "{flags}"'},
    )
    assert (tmp_path / "runs" / "quickstart" / "report.json").is_file(), printed(train)
    assert "cartridge" in printed(look) and "KL" in printed(look)
    assert "<html" in report.outputs[0]["data"]["text/html"]
    (answer,) = eval(ask.outputs[0]["data"]["text/plain"])
    assert answer.strip()


@needs_libtpu
def test_the_tpu_notebook_compiles_ahead(tmp_path):
    flags = " ".join(toy_flags(tmp_path / "toy", "v5e:2x2", "data:2,tensor:2"))
    config = 'CONFIG = "experiments/pods.py:llama31_8b_v5e16"'
    (fit,) = run(
        ROOT / "experiments" / "colab" / "train_on_tpu.ipynb",
        tmp_path,
        ("install", "slow", "needs-tpu"),
        {config: f'{config[:-1]} {flags}"'},
    )
    lines = [json.loads(line) for line in printed(fit).splitlines() if line.startswith("{")]
    assert [line["program"] for line in lines] == ["train", "prefill", "decode"]
    assert all(line["fits"] for line in lines)
