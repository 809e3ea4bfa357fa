"""A part of the package imports only parts below it (docs/architecture.md)."""

from __future__ import annotations

import ast
from pathlib import Path

import cartridges_jax

PACKAGE = Path(cartridges_jax.__file__).parent
# From the top down; parts on one line do not import each other.
ORDER = [
    {"__init__", "cli"},
    {"api"},
    {"chat"},
    {"pipeline"},
    {"benchmarks", "aot"},
    {"evaluation"},
    {"selfstudy"},
    {"distill"},
    {"prefixes"},
    {"data"},
    {"sampling"},
    {"checkpoint"},
    {"models"},
    {"attention"},
    {"corpus"},
    {"text"},
    {"formats"},
    {"parallel"},
    {"cartridge", "rope", "quantized", "typed_config"},
    {"errors", "files"},
]
LEVEL = {part: level for level, parts in enumerate(ORDER) for part in parts}


def part_of(module: tuple[str, ...]) -> str:
    """The part that a dotted path below the package belongs to; () is the package itself."""
    return module[0] if module else "__init__"


def imported_modules(source: str, package: tuple[str, ...], tops: frozenset[str]) -> set[tuple[str, ...]]:
    """Paths below `cartridges_jax` that a module imports, anywhere in it.

    Args:
      package: the importing module's package, below `cartridges_jax`.
      tops: names directly below `cartridges_jax` that are modules.
    """
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            paths = [alias.name.split(".") for alias in node.names]
            found |= {tuple(path[1:]) for path in paths if path[0] == "cartridges_jax"}
        elif isinstance(node, ast.ImportFrom):
            path = node.module.split(".") if node.module else []
            if node.level:
                kept = len(package) - (node.level - 1)
                path = ["cartridges_jax", *package[:kept], *path]
            if path[:1] != ["cartridges_jax"]:
                continue
            below = tuple(path[1:])
            # `from cartridges_jax import sampling` names a part, `… import __version__` the package.
            found |= {below or ((alias.name,) if alias.name in tops else ()) for alias in node.names}
    return found


def upward_imports(package: Path) -> list[str]:
    """One line for every import that goes up or sideways, or touches a part that is not in the order."""
    files = sorted(package.rglob("*.py"))
    modules = {file: file.relative_to(package).with_suffix("").parts for file in files}
    tops = frozenset(parts[0] for parts in modules.values()) - {"__init__"}
    complaints = []
    for file, parts in modules.items():
        inside = parts[:-1]
        own = part_of(parts)
        if own not in LEVEL:
            complaints.append(f"{'/'.join(parts)}.py: the part {own!r} has no place in the order")
            continue
        for imported in sorted(imported_modules(file.read_text(encoding="utf-8"), inside, tops)):
            other = part_of(imported)
            if other == own:
                continue
            if other not in LEVEL:
                complaints.append(f"{'/'.join(parts)}.py imports {other!r}, which has no place in the order")
            elif LEVEL[other] <= LEVEL[own]:
                complaints.append(f"{'/'.join(parts)}.py ({own}) imports {other}, which is not below it")
    return complaints


def test_every_part_imports_only_parts_below_it():
    assert upward_imports(PACKAGE) == []


def test_an_upward_import_is_seen_in_whatever_form_it_is_written(tmp_path):
    forms = {
        "absolute": "from cartridges_jax.distill.loss import TAILS",
        "plain": "import cartridges_jax.distill.loss",
        "of_a_part": "from cartridges_jax import distill",
        "relative": "from ..distill.loss import TAILS",
        "relative_part": "from .. import distill",
        "late": "def f():\n    from cartridges_jax.distill import loss",
    }
    (tmp_path / "distill").mkdir()
    (tmp_path / "distill" / "__init__.py").write_text("")
    (tmp_path / "models").mkdir()
    (tmp_path / "models" / "fine.py").write_text("import jax\nfrom cartridges_jax.errors import UserError\n")
    for name, text in forms.items():
        (tmp_path / "models" / f"{name}.py").write_text(text + "\n")
    complaints = upward_imports(tmp_path)
    assert len(complaints) == len(forms)
    for name in forms:
        assert f"models/{name}.py (models) imports distill, which is not below it" in complaints


def test_a_part_without_a_place_in_the_order_is_reported(tmp_path):
    (tmp_path / "novelty.py").write_text("")
    assert upward_imports(tmp_path) == ["novelty.py: the part 'novelty' has no place in the order"]
