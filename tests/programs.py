"""Compiled programs kept between sessions of the tests, and shared by the workers of one.

Most of what the tests compute is computed in a moment; compiling it is two thirds of their time.
JAX keys a program by all that it depends on but the processor, which names the directory here. It
writes its files in more than one step and without a checksum: here they appear whole, or not at
all, and one that is damaged is none.
"""

import os
import platform
import shutil
from pathlib import Path
from typing import Any

import jax
import platformdirs
import xxhash
from jax._src import compilation_cache, lru_cache

from qwen_jax import compile_cache

MOST = 1 << 30  # bytes; a session that finds more begins anew
SUM = 16  # bytes of the checksum that a file begins with


def directory() -> Path:
    """Where the programs of this kind of processor lie, below the user's cache directory."""
    processor = platform.machine() + platform.processor()
    information = Path("/proc/cpuinfo")
    if information.exists():
        lines = information.read_text("utf-8").splitlines()
        processor += next((line for line in lines if line.startswith(("flags", "Features"))), "")
    name = xxhash.xxh3_64_hexdigest(processor.encode())
    return platformdirs.user_cache_path("qwen-jax-stages") / "tests" / name


def prune() -> None:
    """Remove all programs where they have become too many; before any process uses them."""
    path = directory()
    if sum(file.stat().st_size for file in path.glob("*")) > MOST:
        shutil.rmtree(path)


class Programs(lru_cache.LRUCache):
    """JAX's cache in a directory, safe to share."""

    def _file(self, key: str) -> Path:
        return Path(self.path) / key

    def get(self, key: str) -> bytes | None:
        """The program of a key; None where there is none, or a damaged one."""
        try:
            content = self._file(key).read_bytes()
        except OSError:
            return None
        found, value = content[:SUM], content[SUM:]
        return value if found == xxhash.xxh3_128_digest(value) else None

    def put(self, key: str, value: bytes) -> None:
        """Keep a program; a damaged one is replaced."""
        partial = self._file(f"{key}.{os.getpid()}")
        partial.write_bytes(xxhash.xxh3_128_digest(value) + value)
        partial.replace(self._file(key))


def keep() -> None:
    """Have this process's JAX keep what it compiles there; elsewhere it works as before."""
    ours, theirs = str(directory()), compilation_cache.get_file_cache

    def get_file_cache(path: str) -> Any:
        return (Programs(path, max_size=-1), path) if path == ours else theirs(path)

    compilation_cache.get_file_cache = get_file_cache
    for name, value in {"jax_compilation_cache_dir": ours, **compile_cache.SETTINGS}.items():
        jax.config.update(name, value)
