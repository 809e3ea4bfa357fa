"""A cache that is bounded by the bytes of its values."""

from __future__ import annotations

import collections
import threading
from collections.abc import Callable, Hashable
from typing import Generic, TypeVar

Value = TypeVar("Value")


class BoundedCache(Generic[Value]):
    """The most recently used values, as far as they fit a number of bytes.

    Threads may share it.

    Attributes:
      nbytes: bytes of the values that are held now; at most the limit, or one value that
        alone exceeds it.
    """

    def __init__(self, limit: int, size: Callable[[Value], int]):
        """Starts empty.

        Args:
          limit: in bytes.
          size: returns the bytes of a value.
        """
        self._limit, self._size = limit, size
        self._values: collections.OrderedDict[Hashable, Value] = collections.OrderedDict()
        self._lock = threading.Lock()
        self.nbytes = 0

    def __len__(self) -> int:
        return len(self._values)

    def get(self, key: Hashable, make: Callable[[], Value]) -> Value:
        """Returns the value of a key, from `make` unless it is held.

        Two threads that ask for the same new key at once may both call `make`.
        """
        with self._lock:
            if key in self._values:
                self._values.move_to_end(key)
                return self._values[key]
        value = make()
        with self._lock:
            if key not in self._values:
                self._values[key] = value
                self.nbytes += self._size(value)
            while self.nbytes > self._limit and len(self._values) > 1:
                _, dropped = self._values.popitem(last=False)
                self.nbytes -= self._size(dropped)
        return value
