"""A model file whose fused tensors are read as the separate ones they are made of."""

from __future__ import annotations

import numpy as np

from cartridges_jax.errors import UserError
from cartridges_jax.formats.tensors import Index, TensorFile, full_index
from cartridges_jax.models.config import ModelConfig
from cartridges_jax.models.families.family import Names


def without_fused(file: TensorFile, names: Names, config: ModelConfig) -> TensorFile:
    """The file itself where the family's table names no fused tensors.

    Raises:
      UserError: a fused tensor with another number of rows than its parts have together.
    """
    return _Unfused(file, names, config) if names.fused else file


class _Unfused:
    """The view of a file; reads pass the rows of a part on to the fused tensor."""

    def __init__(self, file: TensorFile, names: Names, config: ModelConfig):
        self._file = file
        # Name to the stored tensor's name and the part's rows in it; None is all of them.
        self._places: dict[str, tuple[str, tuple[int, int] | None]] = {}
        for name in file.tensor_names:
            fused = next((end for end in names.fused if name.endswith(f".{end}")), None)
            if fused is None:
                self._places[name] = name, None
                continue
            start = 0
            for part in names.fused[fused]:
                stop = start + part.rows(config)
                self._places[name.removesuffix(fused) + part.name] = name, (start, stop)
                start = stop
            if file.shape(name)[0] != start:
                raise UserError(
                    f"tensor {name} has shape {tuple(file.shape(name))}, the model's config asks for {start} rows"
                )

    @property
    def tensor_names(self) -> list[str]:
        return list(self._places)

    def shape(self, name: str) -> tuple[int, ...]:
        stored, rows = self._places[name]
        shape = self._file.shape(stored)
        return tuple(shape) if rows is None else (rows[1] - rows[0], *shape[1:])

    def read(self, name: str, index: Index | None = None) -> np.ndarray:
        stored, rows = self._places[name]
        if rows is None:
            return self._file.read(stored, index)
        first, *others = full_index(index, self.shape(name))
        return self._file.read(stored, (slice(rows[0] + first.start, rows[0] + first.stop), *others))

    def sha256(self) -> str:
        return self._file.sha256()
