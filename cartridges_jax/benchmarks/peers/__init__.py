"""Other libraries that do the same work; one file each, imported only if it is installed."""

from __future__ import annotations

import dataclasses
import importlib.util

TRANSFORMERS, LLAMA_CPP, VLLM = "transformers+peft", "llama.cpp", "vllm"
_EXTRA = "pip install -e '.[peers]'"
_NEEDS = {
    TRANSFORMERS: (("torch", "transformers", "peft"), _EXTRA),
    LLAMA_CPP: (("xllamacpp",), _EXTRA),
}


@dataclasses.dataclass(frozen=True)
class Absent:
    """A peer that cannot be measured here.

    Attributes:
      name: the peer's name.
      how_to_install: the command or the place of the instructions.
    """

    name: str
    how_to_install: str


def absent(name: str) -> Absent | None:
    """The peer with the way to install it if this environment lacks one of its packages; None if it is complete."""
    packages, command = _NEEDS[name]
    missing = [package for package in packages if importlib.util.find_spec(package) is None]
    return Absent(name, command) if missing else None
