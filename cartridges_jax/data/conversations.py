"""Self-study conversations on disk: one row of a Parquet shard each.

The columns are those of `schema`, so that the reference's published datasets load as they
are and the reference loads ours; `metadata` carries more in ours.

The teacher's log-probabilities are nearly all of a shard's bytes, and each of a job's hosts
trains on a part of the conversations only. They therefore stay in the file until they are
needed, and a shard has small row groups, which can be read one by one.
"""

from __future__ import annotations

import dataclasses
import functools
import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from cartridges_jax.data.bounded_cache import BoundedCache
from cartridges_jax.data.schema import Conversation, Message, TopLogprobs
from cartridges_jax.errors import PassingFailure, UserError, one_line
from cartridges_jax.files import write_atomically

# Fewer rows would make the list of groups, which is read whole, as large as the data that it saves reading.
_ROWS_PER_GROUP = 8
# A batch takes conversations from many shards; that many files stay open.
_OPEN_SHARDS = 256
# Of row groups that were read last, in bytes. Shards from elsewhere have many rows in a group.
_GROUP_BYTES = 64 * 2**20


@dataclasses.dataclass(frozen=True)
class StoredTopLogprobs:
    """`TopLogprobs` in a shard: read on demand, and not held.

    Attributes:
      path: of the shard.
      row: of the conversation in it.
      message: index of the message in the conversation.
      shape: (T, k).
    """

    path: Path
    row: int
    message: int
    shape: tuple[int, int]

    def read(self) -> TopLogprobs:
        """Returns the entries.

        Raises:
          UserError: the shard is gone or damaged.
          PassingFailure: its disk cannot be read now.
        """
        with _damage_named(self.path):
            status = self.path.stat()
            shard = _opened(self.path, (status.st_ino, status.st_mtime_ns))
            stored = shard.entries(self.row)[self.message]["top_logprobs"]
            return TopLogprobs(
                token_idx=np.asarray(stored["token_idx"].values, np.int32),
                token_id=np.asarray(stored["token_id"].values, np.int32),
                logprobs=np.asarray(stored["logprobs"].values, np.float32),
                shape=self.shape,
            )

    def dense(self) -> tuple[np.ndarray, np.ndarray]:
        """Returns what `TopLogprobs.dense` does; raises as `read`."""
        with _damage_named(self.path):
            return self.read().dense()


_TOP = pa.struct(
    [
        ("token_idx", pa.list_(pa.int32())),
        ("token_id", pa.list_(pa.int32())),
        ("logprobs", pa.list_(pa.float32())),
        ("shape", pa.list_(pa.int64())),
    ]
)
_MESSAGE = pa.struct(
    [
        ("role", pa.string()),
        ("content", pa.string()),
        ("token_ids", pa.list_(pa.int32())),
        ("top_logprobs", _TOP),
    ]
)


def _to_row(conversation: Conversation) -> dict[str, Any]:
    messages = []
    for message in conversation.messages:
        top = None if message.top_logprobs is None else message.top_logprobs.read()
        messages.append(
            {
                "role": message.role,
                "content": message.content,
                "token_ids": message.token_ids,
                "top_logprobs": None
                if top is None
                else {
                    "token_idx": top.token_idx,
                    "token_id": top.token_id,
                    "logprobs": top.logprobs,
                    "shape": list(top.shape),
                },
            }
        )
    return {
        "messages": messages,
        "system_prompt": conversation.system_prompt,
        "metadata": conversation.metadata,
        "type": conversation.type,
    }


def _from_row(row: dict[str, Any], path: Path, number: int) -> Conversation:
    messages = []
    for place, message in enumerate(row["messages"]):
        top = message.get("top_logprobs")
        messages.append(
            Message(
                role=message["role"],
                content=message["content"],
                token_ids=list(message["token_ids"] or []),
                top_logprobs=None if top is None else StoredTopLogprobs(path, number, place, tuple(top["shape"])),
            )
        )
    return Conversation(
        messages=messages,
        metadata=dict(row["metadata"] or {}),
        system_prompt=row.get("system_prompt") or "",
        type=row.get("type") or "",
    )


def _metadata_column(values: list[dict[str, Any]]) -> pa.Array:
    # Parquet has no struct without fields.
    if not any(values):
        return pa.nulls(len(values), pa.struct([("id", pa.string())]))
    return pa.array(values)


def write_shard(path: Path, conversations: Iterable[Conversation]) -> None:
    """Writes one Parquet shard, whole or not at all."""
    rows = [_to_row(conversation) for conversation in conversations]
    columns = {
        "messages": pa.array([row["messages"] for row in rows], pa.list_(_MESSAGE)),
        "system_prompt": pa.array([row["system_prompt"] for row in rows], pa.string()),
        # The metadata's own keys decide its type, as in the published datasets.
        "metadata": _metadata_column([row["metadata"] for row in rows]),
        "type": pa.array([row["type"] for row in rows], pa.string()),
    }
    write_atomically(
        path,
        # In groups this small, statistics and dictionaries would be half of the file.
        lambda file: pq.write_table(
            pa.table(columns),
            file,
            compression="zstd",
            row_group_size=_ROWS_PER_GROUP,
            write_statistics=False,
            use_dictionary=False,
        ),
    )


def read_shard(path: Path) -> list[Conversation]:
    """Reads the conversations of one shard; their log-probabilities stay in the file (`StoredTopLogprobs`).

    Raises:
      UserError: the file is truncated, damaged or not a conversation shard.
    """
    with _damage_named(path), pq.ParquetFile(path) as file:
        rows = file.read(columns=[name for name in _columns(file) if not _of_entries(name)]).to_pylist()
        return [_from_row(row, path, number) for number, row in enumerate(rows)]


def _columns(file: pq.ParquetFile) -> list[str]:
    """Paths of the leaf columns."""
    return [file.schema.column(number).path for number in range(len(file.schema))]


def _of_entries(column: str) -> bool:
    """Whether a column holds entries of `TopLogprobs`; its shape is read with the conversation."""
    return ".top_logprobs." in column and ".top_logprobs.shape." not in column


def _nbytes(rows: pa.ChunkedArray) -> int:
    return rows.nbytes


_groups: BoundedCache[pa.ChunkedArray] = BoundedCache(_GROUP_BYTES, _nbytes)


class _OpenShard:
    """Reads the entries of single conversations."""

    def __init__(self, path: Path, version: tuple[int, int]):
        self._key = (path, version)
        self._file = pq.ParquetFile(path)
        self._columns = [name for name in _columns(self._file) if _of_entries(name)]
        sizes = [self._file.metadata.row_group(group).num_rows for group in range(self._file.num_row_groups)]
        self._ends = np.cumsum(sizes)
        # Batches are built in a thread of their own.
        self._lock = threading.Lock()

    def entries(self, row: int) -> pa.Array:
        """A conversation's messages, each with its entries and nothing else."""
        group = int(np.searchsorted(self._ends, row, side="right"))
        rows = _groups.get((*self._key, group), lambda: self._read(group))
        first = int(self._ends[group - 1]) if group else 0
        return rows[row - first].values

    def _read(self, group: int) -> pa.ChunkedArray:
        with self._lock:
            return self._file.read_row_group(group, columns=self._columns).column("messages")


@functools.lru_cache(maxsize=_OPEN_SHARDS)
def _opened(path: Path, version: tuple[int, int]) -> _OpenShard:
    return _OpenShard(path, version)


@contextmanager
def _damage_named(path: Path) -> Iterator[None]:
    try:
        yield
    except (pa.ArrowException, OSError, KeyError, TypeError, AttributeError, IndexError) as error:
        # Damage has no error number, and a missing file stays missing; any other error number may pass.
        if isinstance(error, OSError) and error.errno is not None and not isinstance(error, FileNotFoundError):
            raise PassingFailure(
                f"{path} cannot be read now ({one_line(error)}): check its disk, then rerun"
            ) from error
        raise UserError(
            f"{path} is not a readable conversation shard ({one_line(error)}): "
            "delete this file and rerun; only this shard is regenerated"
        ) from error
