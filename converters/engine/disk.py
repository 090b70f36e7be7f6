"""Files read and written past the system's page cache, where the system allows it.

A conversion reads and writes every byte once, so a cache gains nothing; and filling it costs more processor time than
reading or writing does: 0.2 to 0.9 s a GB on a virtual machine, against 0.04 without. What is read back comes from the
disk, too. Where O_DIRECT is not known or refused, everything works through the cache.
"""

from __future__ import annotations

import errno
import os
from pathlib import Path
from threading import Lock
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

PAGE_BYTES = 4096
"""What places in files and in memory are multiples of."""
DIRECT = getattr(os, "O_DIRECT", 0)
BINARY = getattr(os, "O_BINARY", 0)


def page_aligned(nbytes: int) -> NDArray[np.uint8]:
    """Uninitialised memory that begins with a page. NumPy asks for large pages where PyTorch does not."""
    import numpy as np

    block = np.empty(nbytes + PAGE_BYTES, np.uint8)
    start = -block.ctypes.data % PAGE_BYTES
    return block[start : start + nbytes]


class DirectFile:
    """An open file. Threads may read from it at the same time. OSError passes through."""

    def __init__(self, path: Path, flags: int = os.O_RDONLY) -> None:
        self.path = path
        try:
            self._descriptor = os.open(path, flags | BINARY | DIRECT, 0o666)
        except OSError as error:
            if not DIRECT or error.errno != errno.EINVAL:
                raise
            self._descriptor = os.open(path, flags | BINARY, 0o666)
        self._seeking = Lock()

    def __enter__(self) -> DirectFile:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        os.close(self._descriptor)

    def read_into(self, view: memoryview, offset: int) -> int:
        """Fill `view` from `offset` on; the number of bytes read, fewer than its length only at the file's end.

        Quick where both are multiples of a page.
        """
        done = 0
        while done < len(view):
            count = self._read_some(view[done:], offset + done)
            done += count
            if not count or count % PAGE_BYTES:  # what is no whole page is the file's end, or the view's
                break
        return done

    def seek(self, offset: int) -> None:
        """Where `write` goes on."""
        os.lseek(self._descriptor, offset, os.SEEK_SET)

    def write(self, data: memoryview) -> None:
        """Append `data`."""
        while len(data):
            data = data[self._write_some(data) :]

    def sync(self) -> None:
        os.fsync(self._descriptor)

    def forget(self) -> None:
        """Have reads ask the disk, where writing went through the cache."""
        if hasattr(os, "posix_fadvise"):
            os.posix_fadvise(self._descriptor, 0, 0, os.POSIX_FADV_DONTNEED)

    def _read_some(self, view: memoryview, offset: int) -> int:
        if not hasattr(os, "preadv"):  # Windows has no positional read
            with self._seeking:
                os.lseek(self._descriptor, offset, os.SEEK_SET)
                data = os.read(self._descriptor, len(view))
            view[: len(data)] = data
            return len(data)
        try:
            return os.preadv(self._descriptor, [view], offset)
        except OSError as error:
            self._through_the_cache(error)
            return os.preadv(self._descriptor, [view], offset)

    def _write_some(self, data: memoryview) -> int:
        try:
            return os.write(self._descriptor, data)
        except OSError as error:
            self._through_the_cache(error)
            return os.write(self._descriptor, data)

    def _through_the_cache(self, error: OSError) -> None:
        """Use the cache from now on where that is what was wrong: a file system, place or length that direct access
        does not suit. Any other error is raised again."""
        if error.errno != errno.EINVAL or not DIRECT:
            raise error
        import fcntl

        flags = fcntl.fcntl(self._descriptor, fcntl.F_GETFL)
        if not flags & DIRECT:
            raise error
        fcntl.fcntl(self._descriptor, fcntl.F_SETFL, flags & ~DIRECT)
