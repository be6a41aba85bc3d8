"""Reading places in files that must not change meanwhile."""

import os
import threading
import weakref
from pathlib import Path

import numpy as np

from qwen_jax.weights.base import raw_bytes
from stages.errors import UserError


class Files:
    """Opened files of one model. They are read, not mapped: pages of a mapped file count as memory
    of the process for as long as it is mapped.

    Attributes:
        states: path -> what tells that it was changed.
    """

    def __init__(self, paths: set[Path]) -> None:
        self.states = {path: _state(path) for path in paths}
        self._opened: dict[Path, int] = {}  # descriptors: once, not for every row of the embedding
        self._opening = threading.Lock()
        weakref.finalize(self, _close, self._opened)

    def read(self, path: Path, start: int, out: np.ndarray, name: str) -> None:
        """Fill a C-contiguous array with the bytes from ``start`` on, which are of tensor ``name``.

        Raises:
            UserError: the file was changed, is cut short or cannot be read.
        """
        left = raw_bytes(out)
        try:
            with self._opening:
                if path not in self._opened:
                    self._opened[path] = os.open(path, os.O_RDONLY)
            if _state(path) != self.states[path]:
                raise UserError(f"{path}: was changed while it was being read")
            while left:
                count = os.preadv(self._opened[path], [left], start)
                if not count:
                    raise UserError(f"{path}: ends within {name}; it was cut short")
                left, start = left[count:], start + count
        except OSError as error:
            raise UserError(f"{path}: cannot be read: {error.strerror}") from None


def _state(path: Path) -> tuple[int, int]:
    found = os.stat(path)
    return found.st_size, found.st_mtime_ns


def _close(opened: dict[Path, int]) -> None:
    for file in opened.values():
        os.close(file)
