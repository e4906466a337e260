"""Writing merged weights while the next one is computed."""

from __future__ import annotations

import os
import threading
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from torch import Tensor

from sparsevlm.export.shards import ShardWriter

_WAITING = 32_000_000
"""Bytes that may wait to be written; a larger weight waits alone."""

_SYNCED = 64_000_000
"""Bytes after which a file is sent on to the disk, so that little is left to wait for at the end."""


@contextmanager
def written_behind(writer: ShardWriter, directory: Path) -> Iterator[Callable[[str, Tensor], None]]:
    """Give a function that hands a tensor to a thread which writes it; all are written when the context ends.

    What the thread fails with is raised by the next call, or at the end.

    Args:
        writer: Places the tensors.
        directory: Where it writes to.
    """
    behind = _Behind(writer, directory)
    thread = threading.Thread(target=behind.run, name="merge-writer", daemon=True)
    thread.start()
    try:
        yield behind.put
        behind.end(finish=True)
    finally:
        behind.end(finish=False)
        thread.join()
    behind.check()


class _Behind:
    """A queue of tensors, bounded by their size, and the thread's work."""

    def __init__(self, writer: ShardWriter, directory: Path) -> None:
        self._writer, self._directory = writer, directory
        self._queue: deque[tuple[str, Tensor]] = deque()
        self._changed = threading.Condition()
        self._waiting = 0
        self._ended = False
        self._error: BaseException | None = None

    def put(self, key: str, tensor: Tensor) -> None:
        """Hand over a tensor; waits while too many are waiting."""
        with self._changed:
            self._changed.wait_for(
                lambda: self._error or not self._waiting or self._waiting + tensor.nbytes <= _WAITING
            )
            self.check()
            self._queue.append((key, tensor))
            self._waiting += tensor.nbytes
            self._changed.notify_all()

    def end(self, *, finish: bool) -> None:
        """Let the thread end, having written what waits, or leaving it."""
        with self._changed:
            if not finish and not self._ended:
                self._queue.clear()
            self._ended = True
            self._changed.notify_all()

    def check(self) -> None:
        """Raise what the thread failed with."""
        if self._error is not None:
            raise self._error

    def run(self) -> None:
        """Write until the end."""
        unsynced: dict[str, int] = {}
        try:
            while True:
                with self._changed:
                    self._changed.wait_for(lambda: self._queue or self._ended)
                    if not self._queue:
                        return
                    key, tensor = self._queue.popleft()
                self._writer.write(key, tensor)
                size, file = tensor.nbytes, self._writer.files[key]
                del tensor
                with self._changed:
                    self._waiting -= size
                    self._changed.notify_all()
                unsynced[file] = unsynced.get(file, 0) + size
                if unsynced[file] > _SYNCED:
                    _sync(self._directory / file)
                    unsynced[file] = 0
        except BaseException as error:  # raised where the caller is
            with self._changed:
                self._error = error
                self._changed.notify_all()


def _sync(path: Path) -> None:
    """Wait until what was written of a file is on the disk; the whole is waited for when it gets its name."""
    if not hasattr(os, "fdatasync"):
        return
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fdatasync(handle)
    finally:
        os.close(handle)
