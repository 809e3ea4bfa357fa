"""Peers that tests compare with: imported at their first use, where a test is skipped that needs an absent one.

Python 3.13 has no torch here (`make test-compat`), and most tests need none.
"""

from __future__ import annotations

from types import ModuleType
from typing import Any

import pytest

PEERS = ("torch", "transformers", "peft", "accelerate", "xllamacpp")


class Peer:
    """A module that is imported when an attribute is read."""

    def __init__(self, name: str):
        self._name = name

    def __getattr__(self, attribute: str) -> Any:
        return getattr(module(self._name), attribute)


def module(name: str) -> ModuleType:
    """The imported module; skips the test, or the file while it is collected, where it is not installed."""
    found = pytest.importorskip(name, reason=f"{name} is not installed: pip install -e '.[peers]'")
    if name == "torch":
        # The tests run in parallel processes.
        found.set_num_threads(1)
    return found


torch, transformers = Peer("torch"), Peer("transformers")


def save_file(tensors: dict[str, Any], path: Any, **options: Any) -> None:
    """safetensors' own writer of torch's tensors."""
    module("torch")
    from safetensors.torch import save_file

    save_file(tensors, path, **options)
