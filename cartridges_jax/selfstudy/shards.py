"""The files of a synthesis run: per batch a Parquet shard of conversations, and a JSON file of counts.

The counts are written first: a batch is done when its shard is there, and both are then complete.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path

from cartridges_jax.data.conversations import read_shard, write_shard
from cartridges_jax.data.schema import Conversation
from cartridges_jax.errors import UserError
from cartridges_jax.files import write_atomically
from cartridges_jax.selfstudy.tally import Tally


def shard_path(directory: Path, batch: int) -> Path:
    """The file of the conversations of one batch."""
    return directory / f"shard-{batch:05d}.parquet"


def counts_path(directory: Path, batch: int) -> Path:
    """The file of the counts of one batch."""
    return directory / f"shard-{batch:05d}.json"


def missing_batches(directory: Path, numbers: Iterable[int]) -> list[int]:
    """Those of the batches that are not complete on disk."""
    # Listed, because a network file system may continue to report that a file which was once looked up does not exist.
    present = {path.name for path in directory.glob("shard-*")}
    return [
        number
        for number in numbers
        if not {shard_path(directory, number).name, counts_path(directory, number).name} <= present
    ]


def write_batch(directory: Path, number: int, conversations: Sequence[Conversation], tally: Tally) -> None:
    """Writes one batch; a process that is killed meanwhile leaves it missing."""
    write_atomically(counts_path(directory, number), json.dumps(tally.as_dict()))
    write_shard(shard_path(directory, number), conversations)


def read_batch(directory: Path, number: int) -> tuple[list[Conversation], Tally]:
    """One batch.

    Raises:
      UserError: one of its files is damaged.
    """
    path, tally = counts_path(directory, number), Tally()
    try:
        tally.add(json.loads(path.read_text(encoding="utf-8")))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(
            f"{path} is not a readable file of counts ({error}): delete it and rerun; only its shard is regenerated"
        ) from None
    return read_shard(shard_path(directory, number)), tally
