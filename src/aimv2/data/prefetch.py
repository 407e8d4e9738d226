"""Prefetching in threads, results in order."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import islice
from typing import TypeVar

Item = TypeVar("Item")
Made = TypeVar("Made")
THREADS = 4


def prefetch_map(function: Callable[[Item], Made], items: Iterable[Item], threads: int = THREADS) -> Iterator[Made]:
    """Maps ``function`` in a thread pool, in order, with bounded look-ahead (Pillow releases the GIL while it decodes)."""
    waiting: deque[Future[Made]] = deque()
    with ThreadPoolExecutor(threads) as pool:
        for item in items:
            waiting.append(pool.submit(function, item))
            if len(waiting) > 4 * threads:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()


def batched(items: Iterator[Item], size: int) -> Iterator[list[Item]]:
    """Lists of at most ``size``."""
    while batch := list(islice(items, size)):
        yield batch
