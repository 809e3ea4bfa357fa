"""Self-study conversations on disk: one row of a Parquet shard each.

The columns are those of the reference's published datasets (HazyResearch/cartridges),
so that either side reads the other's; `metadata` carries more in ours.

The teacher's log-probabilities are nearly all of a shard's bytes, and of the many hosts of
a job each trains on a part of the conversations. So they stay in the file until they are
asked for, and a table has small row groups, which can be read one by one.
"""

from __future__ import annotations

import dataclasses
import functools
import os
import tempfile
import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from cartridges_jax.errors import PassingFailure, UserError, one_line


@dataclasses.dataclass(frozen=True)
class TopLogprobs:
    """The teacher's most likely tokens, sparse: n entries over a message's T tokens.

    Attributes:
      token_idx: [n] int32, which of the message's own tokens an entry belongs to.
      token_id: [n] int32, the vocabulary entry.
      logprobs: [n] float32, its log-probability (temperature 1, whole vocabulary).
      shape: (T, k).
    """

    token_idx: np.ndarray
    token_id: np.ndarray
    logprobs: np.ndarray
    shape: tuple[int, int]

    @staticmethod
    def from_dense(ids: np.ndarray, logprobs: np.ndarray) -> TopLogprobs:
        """From ids and log-probabilities, each [T, k]."""
        num_tokens, k = ids.shape
        return TopLogprobs(
            token_idx=np.repeat(np.arange(num_tokens, dtype=np.int32), k),
            token_id=ids.astype(np.int32).reshape(-1),
            logprobs=logprobs.astype(np.float32).reshape(-1),
            shape=(num_tokens, k),
        )

    def dense(self) -> tuple[np.ndarray, np.ndarray]:
        """ids [T, k] and log-probabilities [T, k]; -inf where a token has fewer entries."""
        num_tokens, k = self.shape
        ids = np.zeros((num_tokens, k), np.int32)
        logprobs = np.full((num_tokens, k), -np.inf, np.float32)
        order = np.argsort(self.token_idx, kind="stable")
        row = self.token_idx[order]
        column = np.arange(len(row)) - np.searchsorted(row, row)
        ids[row, column] = self.token_id[order]
        logprobs[row, column] = self.logprobs[order]
        return ids, logprobs


@dataclasses.dataclass(frozen=True)
class StoredTopLogprobs:
    """`TopLogprobs` that lie in a shard: read whenever they are asked for, and not kept.

    Attributes:
      path: of the shard.
      row: of the conversation in it.
      message: which of the conversation's.
      shape: (T, k).
    """

    path: Path
    row: int
    message: int
    shape: tuple[int, int]

    def read(self) -> TopLogprobs:
        """Raises UserError if the shard is gone or damaged."""
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
        """As `TopLogprobs.dense`; raises as `read`."""
        with _damage_named(self.path):
            return self.read().dense()


@dataclasses.dataclass(frozen=True)
class Message:
    """One turn. `token_ids` are the ids as generated (end-of-turn included) or rendered."""

    role: str
    content: str
    token_ids: list[int]
    top_logprobs: TopLogprobs | StoredTopLogprobs | None = None


@dataclasses.dataclass(frozen=True)
class Conversation:
    """One self-study conversation.

    Attributes:
      messages: user and assistant turns; without the system message.
      system_prompt: what the teacher had in front (may be empty: see chunk_span).
      metadata: id, document, chunk_span, teacher, stop_reason, seed, seed_prompt,
        seed_prompt_type, and what the writer adds.
      type: the kind of conversation, e.g. "self_study".
    """

    messages: list[Message]
    metadata: dict[str, Any]
    system_prompt: str = ""
    type: str = "self_study"


# Fewer would make the list of groups, which is read whole, as large as what it spares.
_ROWS_PER_GROUP = 8

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
        top = message.top_logprobs
        if isinstance(top, StoredTopLogprobs):
            top = top.read()
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
    """Writes one Parquet shard whole or not at all."""
    rows = [_to_row(conversation) for conversation in conversations]
    columns = {
        "messages": pa.array([row["messages"] for row in rows], pa.list_(_MESSAGE)),
        "system_prompt": pa.array([row["system_prompt"] for row in rows], pa.string()),
        # The metadata's own keys decide its type, as in the published datasets.
        "metadata": _metadata_column([row["metadata"] for row in rows]),
        "type": pa.array([row["type"] for row in rows], pa.string()),
    }
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "wb") as file:
            # In groups so small, statistics and dictionaries would be half of the file.
            pq.write_table(
                pa.table(columns),
                file,
                compression="zstd",
                row_group_size=_ROWS_PER_GROUP,
                write_statistics=False,
                use_dictionary=False,
            )
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def read_shard(path: Path) -> list[Conversation]:
    """Reads one shard, but for the log-probabilities: see `StoredTopLogprobs`.

    Raises:
      UserError: the file is truncated, damaged or not such a shard.
    """
    with _damage_named(path), pq.ParquetFile(path) as file:
        rows = file.read(columns=[name for name in _columns(file) if not _of_entries(name)]).to_pylist()
        return [_from_row(row, path, number) for number, row in enumerate(rows)]


def _columns(file: pq.ParquetFile) -> list[str]:
    """Paths of the columns, those within others too."""
    return [file.schema.column(number).path for number in range(len(file.schema))]


def _of_entries(column: str) -> bool:
    """Whether a column is one of `TopLogprobs`, but for its shape."""
    return ".top_logprobs." in column and ".top_logprobs.shape." not in column


class _OpenShard:
    """Reads the entries of single conversations."""

    def __init__(self, path: Path):
        self._file = pq.ParquetFile(path)
        self._columns = [name for name in _columns(self._file) if _of_entries(name)]
        sizes = [self._file.metadata.row_group(group).num_rows for group in range(self._file.num_row_groups)]
        self._ends = np.cumsum(sizes)
        self._group, self._rows = -1, None
        # Batches are made in a thread of their own.
        self._lock = threading.Lock()

    def entries(self, row: int) -> pa.Array:
        """A conversation's messages, each with its entries and nothing else."""
        group = int(np.searchsorted(self._ends, row, side="right"))
        with self._lock:
            if group != self._group:
                # Shards from elsewhere have many rows in a group.
                self._rows = self._file.read_row_group(group, columns=self._columns).column("messages")
                self._group = group
            first = int(self._ends[group - 1]) if group else 0
            return self._rows[row - first].values


# A batch takes conversations from many shards; as many files stay open.
@functools.lru_cache(maxsize=256)
def _opened(path: Path, version: tuple[int, int]) -> _OpenShard:
    return _OpenShard(path)


@contextmanager
def _damage_named(path: Path) -> Iterator[None]:
    try:
        yield
    except (pa.ArrowException, OSError, KeyError, TypeError, AttributeError, IndexError) as error:
        # What is wrong with the file has no number; that it is not there is known for good.
        if isinstance(error, OSError) and error.errno is not None and not isinstance(error, FileNotFoundError):
            raise PassingFailure(
                f"{path} cannot be read now ({one_line(error)}): look at its disk, then run again"
            ) from error
        raise UserError(
            f"{path} is not a readable conversation shard ({one_line(error)}): "
            "delete this file and run again, it alone is made anew"
        ) from error
