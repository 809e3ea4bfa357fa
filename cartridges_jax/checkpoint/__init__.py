"""Cartridges and train state on disk: orbax arrays beside a checked JSON record.

Orbax does not notice every flipped byte in the arrays' data; it then restores garbage
without an error. So the record holds a SHA-256 of every array, and one of itself, and
loading compares them. Files have checksums too, checked before orbax opens them: on damage
that it does notice, it prints hundreds of lines.

One process reads and writes: process 0 for all (see `distill.checkpoints`), or each for itself.

    <cartridge>/cartridge.json        format version, model, documents, config, checksums
    <cartridge>/arrays/               keys, values, positions, (bias)
    <checkpoints>/<step>/state/       the train state's leaves by name
    <checkpoints>/<step>/record/      the caller's JSON and the arrays' checksums
    <checkpoints>/<step>/files.json   the files' checksums

Orbax is imported where it is used: it adds half a second to programs that only read text.
"""

from cartridges_jax.checkpoint.cartridges import (
    FORMAT_VERSION,
    MIGRATIONS,
    RECORD,
    Cartridge,
    load_cartridge,
    require_place_for,
    save_cartridge,
)
from cartridges_jax.checkpoint.metadata import (
    EXPLICIT_POSITIONS,
    PLAIN_POSITIONS,
    CartridgeMetadata,
    DocumentSource,
    check_compatible,
    portable_config,
)
from cartridges_jax.checkpoint.train_state import FILES, TrainCheckpoints

__all__ = [
    "EXPLICIT_POSITIONS",
    "FILES",
    "FORMAT_VERSION",
    "MIGRATIONS",
    "PLAIN_POSITIONS",
    "RECORD",
    "Cartridge",
    "CartridgeMetadata",
    "DocumentSource",
    "TrainCheckpoints",
    "check_compatible",
    "load_cartridge",
    "portable_config",
    "require_place_for",
    "save_cartridge",
]
