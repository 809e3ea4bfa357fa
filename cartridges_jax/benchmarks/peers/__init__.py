"""Other libraries doing the same work; one file each, imported only where it is installed."""

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
      name: the peer's.
      how_to_install: what to do about it.
    """

    name: str
    how_to_install: str


def absent(name: str) -> Absent | None:
    """Whether a peer of this process's environment lacks a package."""
    packages, command = _NEEDS[name]
    missing = [package for package in packages if importlib.util.find_spec(package) is None]
    return Absent(name, command) if missing else None
