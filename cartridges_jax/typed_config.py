"""The values of a config file to typed dataclasses."""

from __future__ import annotations

import dataclasses
import typing
from typing import Any

import ml_collections

from cartridges_jax.errors import UserError


def config_values(config: ml_collections.ConfigDict) -> dict[str, Any]:
    """A config's plain nested values.

    Raises:
      UserError: the config is a flag's, and its file cannot be loaded.
    """
    try:
        return config.to_dict()
    except OSError as error:
        # A config flag reports a file that it could not load when its value is first read.
        raise UserError(f"the config file cannot be loaded: {str(error).splitlines()[-1].strip()}") from None


def build(cls: type, values: dict[str, Any], path: str, defaults: str) -> Any:
    """A dataclass with every field given, and each of its type.

    Args:
      values: field to value; fields that are dataclasses are dicts themselves.
      path: what the values are called in messages ("config").
      defaults: the function that gives a complete config, for messages.

    Raises:
      UserError: a field that is unknown, missing or of the wrong type.
    """
    types = typing.get_type_hints(cls)
    unknown = sorted(set(values) - set(types))
    if unknown:
        raise UserError(f"{path} has no field {unknown[0]!r}: its fields are {', '.join(types)}")
    missing = sorted(set(types) - set(values))
    if missing:
        raise UserError(f"{path} lacks the field {missing[0]!r}: start from {defaults}")
    built = {}
    for name, kind in types.items():
        value = values[name]
        if dataclasses.is_dataclass(kind):
            value = build(kind, value, f"{path}.{name}", defaults)
        else:
            value = _typed(kind, value, f"{path}.{name}")
        built[name] = value
    return cls(**built)


def _typed(kind: Any, value: Any, path: str) -> Any:
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    plain = typing.get_origin(kind) or kind
    if not isinstance(value, plain) or (plain is int and isinstance(value, bool)):
        raise UserError(f"{path}={value!r} is a {type(value).__name__}: give a {plain.__name__}")
    if plain is dict:
        return {key: _typed(float, item, f"{path}.{key}") for key, item in value.items()}
    if plain is tuple:
        return tuple(_typed(typing.get_args(kind)[0], item, path) for item in value)  # pyright: ignore[reportGeneralTypeIssues]
    return value
