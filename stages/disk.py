"""Files that are opened as what they must be, and nothing else: no links, no pipes, no devices."""

import json
import mmap
import os
import stat
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np

from stages.errors import UserError

MOST_JSON = 1 << 28  # bytes: that of the largest models has a hundredth


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


def check_regular(path: Path) -> None:
    """Raises UserError for a pipe or a device, which would be waited for."""
    if path.exists() and not (path.is_file() or path.is_dir()):
        raise UserError(f"{path}: is a pipe or a device; expected a regular file")


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file.

    Raises:
        UserError: no such file, not a JSON object, or a name that is there twice: the last of
            the two would count, without a word.
    """

    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) < len(pairs):
            name = Counter(name for name, _ in pairs).most_common(1)[0][0]
            raise UserError(f"{path} has {name!r} twice; keep the one that is meant")
        return found

    check_regular(path)
    try:
        if path.stat().st_size > MOST_JSON:
            raise UserError(f"{path}: {path.stat().st_size} bytes are no JSON of ours")
        text = path.read_text(encoding="utf-8")
        data = json.loads(text, object_pairs_hook=once, parse_constant=_no_number)
    except FileNotFoundError:
        raise UserError(f"no such file: {path}") from None
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path}: cannot be read as JSON: {error}") from None
    if not isinstance(data, dict):
        raise UserError(f"{path}: expected a JSON object, found {type(data).__name__}")
    return data


def _no_number(text: str) -> float:
    raise ValueError(f"{text} is no number of JSON")


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
