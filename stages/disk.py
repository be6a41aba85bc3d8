"""Files that are opened as what they must be, and nothing else: no links, no pipes, no devices."""

import mmap
import os
import stat
from pathlib import Path

import numpy as np


def create(path: Path, exists: bool = False) -> int:
    """A descriptor of a file that is new, or that ``exists``; a link is never followed.

    Raises:
        OSError: there is something, or nothing, or no file.
    """
    new = 0 if exists else os.O_CREAT | os.O_EXCL
    return os.open(path, os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC | new, 0o666)


def write(file: int, data: bytes | np.ndarray, at: int) -> None:
    """Write all of ``data``, which is contiguous, ``at`` bytes into the file."""
    raw = data if isinstance(data, bytes) else data.reshape(-1).view(np.uint8)
    view = memoryview(raw)  # type: ignore[arg-type]
    while len(view):  # a write may be short, 2 GiB at most
        done = os.pwrite(file, view, at)
        view, at = view[done:], at + done


def mapped(path: Path) -> np.ndarray:
    """The bytes of a regular file. Mapped, not copied: three times as fast, and what is read once
    needs no memory.

    Raises:
        OSError: it cannot be read; a pipe or a device is not waited for.
    """
    file = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        found = os.fstat(file)
        if not stat.S_ISREG(found.st_mode):
            raise OSError(0, "is no regular file")
        if not found.st_size:
            return np.empty(0, np.uint8)
        return np.frombuffer(mmap.mmap(file, 0, access=mmap.ACCESS_READ), np.uint8)
    finally:
        os.close(file)
