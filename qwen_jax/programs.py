"""Compiled programs kept on disk between processes: JAX's persistent cache, with our own files.

JAX's own files have no checksum, are not written in one piece and share a lock. A damaged one can
end the process, is never replaced, and a stopped process holds up all others.
"""

import os
import sys
from contextlib import suppress
from pathlib import Path

import xxhash
from jax._src import compilation_cache
from jax._src.compilation_cache_interface import CacheInterface

CACHE_BYTES = 1 << 30  # when there is more, the least recently used go
MARK = 16  # bytes of XXH3-128 at the end of a file


def directory() -> Path | None:
    """Below the user's cache directory; None for a user that has none."""
    at_home = "Library/Caches" if sys.platform == "darwin" else ".cache"
    try:
        base = os.environ.get("XDG_CACHE_HOME") or Path.home() / at_home
    except RuntimeError:
        return None
    return Path(base) / "qwen-jax-stages" / "programs"


def use() -> str | None:
    """Have JAX keep programs here. Returns the directory, or None if it keeps none."""
    path = directory()
    if path is not None:
        compilation_cache.get_file_cache = lambda where: (Programs(path), where)
    return path and str(path)


class Programs(CacheInterface):
    """One file a program. What cannot be read is not there; what cannot be written is not kept."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._pruned = False

    def get(self, key: str) -> bytes | None:
        path = self._path / key
        try:
            content = path.read_bytes()
        except OSError:
            return None
        program, mark = content[:-MARK], content[-MARK:]
        with suppress(OSError):
            if mark == xxhash.xxh3_128_digest(program):
                os.utime(path)  # used just now
                return program
            path.unlink()
        return None

    def put(self, key: str, value: bytes) -> None:
        temporary = self._path / f"{key}.{os.getpid()}"
        with suppress(OSError):
            self._path.mkdir(parents=True, exist_ok=True)
            self._prune()
            try:
                temporary.write_bytes(value + xxhash.xxh3_128_digest(value))
                temporary.replace(self._path / key)
            finally:
                temporary.unlink(missing_ok=True)

    def _prune(self) -> None:
        """Once a process: halve what has grown too large."""
        if self._pruned:
            return
        self._pruned = True
        found = [(entry.stat(), entry.path) for entry in os.scandir(self._path)]
        total = sum(state.st_size for state, _ in found)
        if total > CACHE_BYTES:
            for state, path in sorted(found, key=lambda each: each[0].st_mtime):
                os.unlink(path)
                total -= state.st_size
                if total < CACHE_BYTES // 2:
                    break
