"""Independent streams of random numbers, one for every purpose and batch of a run.

Sums and products of seeds make streams that coincide (`seed * n + number` of one run is that of another);
`SeedSequence` hashes the run's seed together with a key.
"""

from __future__ import annotations

import numpy as np

# The purposes; the first part of every key.
CHUNKS, REQUESTS, MESSAGES, ANSWERS = range(4)


def stream(seed: int, *key: int | str) -> np.random.SeedSequence:
    """The stream that a key names among those of a run's seed; strings count as their UTF-8 bytes."""
    numbers: list[int] = []
    for part in key:
        numbers += part.encode() if isinstance(part, str) else [part]
    return np.random.SeedSequence(seed, spawn_key=tuple(numbers))


def stream_seed(seed: int, *key: int | str) -> int:
    """A seed of 31 bits, for functions that take an integer, from the stream that the key names."""
    return int(stream(seed, *key).generate_state(1)[0] >> 1)
