"""A cache that is bounded by bytes and forgets first what was used longest ago."""

from __future__ import annotations

import os
import threading
import weakref
from collections import OrderedDict
from collections.abc import Callable
from typing import Any, Generic, TypeVar

K = TypeVar("K")
V = TypeVar("V")


class LRUCache(Generic[K, V]):
    """A mapping of bounded size, for use by several threads.

    A copy, a pickle and a forked process get an empty cache with a lock of its own.

    Args:
        max_bytes: The most that all entries may weigh; a heavier entry is not kept.
        size_of: The bytes of an entry, from its key and its value.
    """

    def __init__(self, max_bytes: int, size_of: Callable[[K, V], int]) -> None:
        if max_bytes < 0:
            raise ValueError(f"`max_bytes` must not be negative, got {max_bytes}.")
        self.max_bytes = max_bytes
        self.size_of = size_of
        self.clear()
        _CACHES.add(self)

    def clear(self) -> None:
        """Forget everything."""
        self._lock = threading.Lock()
        self._entries: OrderedDict[K, tuple[V, int]] = OrderedDict()
        self.nbytes = 0

    def get(self, key: K) -> V | None:
        """The value of a key, which is now the last to be forgotten; None if it is not there."""
        with self._lock:
            entry = self._entries.get(key)
            if entry is None:
                return None
            self._entries.move_to_end(key)
            return entry[0]

    def put(self, key: K, value: V) -> None:
        """Keep a value, and forget others where it takes their place."""
        size = self.size_of(key, value)
        with self._lock:
            self.nbytes -= self._entries.pop(key, (None, 0))[1]
            if size > self.max_bytes:
                return
            self._entries[key] = value, size
            self.nbytes += size
            while self.nbytes > self.max_bytes:
                self.nbytes -= self._entries.popitem(last=False)[1][1]

    def __len__(self) -> int:
        return len(self._entries)

    def __getstate__(self) -> dict[str, Any]:
        return {"max_bytes": self.max_bytes, "size_of": self.size_of}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(**state)  # type: ignore[misc]


_CACHES: weakref.WeakSet[LRUCache[Any, Any]] = weakref.WeakSet()


def _after_fork() -> None:
    """Another thread may have held a lock, or changed a cache, when the process was forked."""
    for cache in list(_CACHES):
        cache.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)
