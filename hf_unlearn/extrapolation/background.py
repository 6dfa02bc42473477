"""Work beside the main thread: results in order from several threads, and a file that is written meanwhile."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType
from typing import BinaryIO, TypeVar

import numpy as np


Item = TypeVar("Item")
Result = TypeVar("Result")

# Larger writes are several times slower on ext4 with large folios.
WRITE_BYTES = 64 << 10
SYNC_BYTES = 256 << 20


def map_in_threads(function: Callable[[Item], Result], items: Iterable[Item], threads: int) -> Iterator[Result]:
    """
    `map(function, items)` over several threads, in order. Besides the result that is taken, one item a thread is in work
    or done.

    Args:
        function (`Callable`): What to do with an item.
        items (iterable): The items.
        threads (`int`): Number of threads; with one, the caller's does the work.
    """
    if threads == 1:
        yield from map(function, items)
        return
    with ThreadPoolExecutor(threads) as pool:
        waiting: deque[Future[Result]] = deque()
        for item in items:
            waiting.append(pool.submit(function, item))
            if len(waiting) > threads:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()


class BackgroundWriter:
    """
    Writes to a file in one thread and brings it to the disk in another; a context that ends with all of it there.

    Args:
        file (`BinaryIO`): The file, open for writing.
    """

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self._writer, self._syncer = ThreadPoolExecutor(1), ThreadPoolExecutor(1)
        self._writing: Future[None] | None = None
        self._syncing: Future[None] | None = None
        self._unsynced = 0

    def write(self, content: bytes | np.ndarray) -> None:
        """Write `content` after all before it; returns once those before it are written."""
        self.wait()
        self._writing = self._writer.submit(self._write, memoryview(content))

    def _write(self, content: memoryview) -> None:
        for start in range(0, content.nbytes, WRITE_BYTES):
            self._file.write(content[start : start + WRITE_BYTES])
        self._unsynced += content.nbytes
        if self._unsynced >= SYNC_BYTES and (self._syncing is None or self._syncing.done()):
            self._sync()

    def _sync(self) -> None:
        if self._syncing is not None:
            self._syncing.result()
        self._unsynced = 0
        self._syncing = self._syncer.submit(os.fsync, self._file.fileno())

    def wait(self) -> None:
        """Return once everything is written, though not on the disk yet."""
        if self._writing is not None:
            writing, self._writing = self._writing, None
            writing.result()

    def __enter__(self) -> BackgroundWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with self._syncer, self._writer:
            if error is None:
                self.wait()
                self._file.flush()
                self._sync()
                self._syncing.result()
