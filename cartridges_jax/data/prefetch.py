"""Items for the next steps, computed in the background while this step runs."""

from __future__ import annotations

import collections
import itertools
from collections.abc import Callable, Generator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

Item = TypeVar("Item")


def prefetch(make: Callable[[int], Item], steps: range, depth: int = 2) -> Generator[Item, None, None]:
    """`make(step)` for every step in order, up to `depth` of them ahead of time.

    One thread calls `make`, so the order of the calls is that of the steps. Close the
    iterator when leaving it early (`contextlib.closing`): the items that are ready are
    dropped, which does not matter where `make` is a pure function.

    Raises:
      Whatever `make` raised, when its step is reached.
    """
    left = iter(steps)
    worker = ThreadPoolExecutor(max_workers=1, thread_name_prefix="prepare-ahead")
    try:
        waiting: collections.deque[Future[Item]] = collections.deque(
            worker.submit(make, step) for step in itertools.islice(left, depth)
        )
        while waiting:
            item = waiting.popleft().result()
            waiting.extend(worker.submit(make, step) for step in itertools.islice(left, 1))
            yield item
    finally:
        worker.shutdown(cancel_futures=True)
