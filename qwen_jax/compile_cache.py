"""Compiled programs kept on disk between commands: JAX's own cache, checked before JAX sees it.

JAX trusts what lies under a key, its files have no checksum, and none is written in one step: a
damaged or swapped one computes wrong numbers, or ends the process. So each directory belongs to
one process at a time, and what its index of hashes does not confirm is removed before JAX is told
of it.
"""

import fcntl
import json
import os
import shutil
import stat
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import platformdirs
import xxhash

CACHE_BYTES = 1 << 30  # when there is more, the least recently used directories go
INDEX = "index.json"  # file name -> XXH3-128
ENABLED_ELSEWHERE = ("jax_enable_compilation_cache", "jax_compilation_cache_dir")
SETTINGS: dict[str, Any] = {
    "jax_persistent_cache_min_compile_time_secs": 0.0,
    "jax_persistent_cache_enable_xla_caches": "none",  # files of XLA's own, that none would check
}


@contextmanager
def use(*key: object) -> Iterator[None]:
    """Around all that a command compiles: JAX keeps the programs below the user's cache directory.

    Whatever stands in the way, another process too, means that all is compiled anew; the user's own
    settings for JAX's cache win. ``key`` is what the programs depend on, roughly: it keeps each
    directory small, and JAX's own keys say which program is which.
    """
    import jax
    import jaxlib
    from jax.experimental.compilation_cache import compilation_cache

    versioned = repr((jax.__version__, jaxlib.__version__, *key))
    name = xxhash.xxh3_64_hexdigest(versioned.encode())
    path = platformdirs.user_cache_path("qwen-jax-stages") / "programs" / name
    enabled, elsewhere = (getattr(jax.config, each) for each in ENABLED_ELSEWHERE)
    wanted = enabled and not elsewhere
    taken = _take(path) if wanted else None
    if taken is None:
        yield
        return
    descriptor, known = taken
    settings = {"jax_compilation_cache_dir": str(path), **SETTINGS}
    before = {each: getattr(jax.config, each) for each in settings}
    try:
        with _complaints() as complaints:
            for each in settings.keys() - {variable.lower() for variable in os.environ}:
                jax.config.update(each, settings[each])
            yield
        _record(path, known, bool(complaints))  # not after an error: a file may be half there
    finally:
        for each, value in before.items():
            jax.config.update(each, value)
        compilation_cache.reset_cache()  # or JAX would go on in the directory
        os.close(descriptor)


def _take(path: Path) -> tuple[int, dict[str, str]] | None:
    """Keep others out of a directory, made where there is none: the descriptor to close, and what
    the index confirms. None where it is in use, or others may have written there."""
    with suppress(OSError):
        above = (path.parent.parent, path.parent)
        if path.is_absolute() and all(map(_ours, above)) and _ours(path, 0o077):
            descriptor = _lock(path)
            try:
                os.utime(path)  # used just now
                return descriptor, _checked(path)
            except OSError:
                os.close(descriptor)
    return None


def _ours(path: Path, others: int = 0o022) -> bool:
    """A directory, made where there is none, in which ``others`` is what no other user may do."""
    path.mkdir(mode=0o700, parents=True, exist_ok=True)
    state = path.lstat()
    ours = stat.S_ISDIR(state.st_mode) and state.st_uid == os.geteuid()
    return ours and not state.st_mode & others


def _lock(path: Path) -> int:
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if os.path.samestat(os.fstat(descriptor), path.lstat()):  # not pruned a moment ago
            return descriptor
        raise FileNotFoundError(path)
    except OSError:
        os.close(descriptor)
        raise


def _checked(path: Path) -> dict[str, str]:
    """The index, as far as it is true; JAX's other files are removed."""
    try:
        index = dict(json.loads((path / INDEX).read_bytes()))
    except (OSError, TypeError, ValueError):
        index = {}
    known = {}
    for file in path.glob("*-cache"):
        if file.name in index and file.is_file() and index[file.name] == _hash(file):
            known[file.name] = index[file.name]
        else:
            file.unlink()
    return known


def _hash(file: Path) -> str:
    return xxhash.xxh3_128_hexdigest(file.read_bytes())


@contextmanager
def _complaints() -> Iterator[list[str]]:
    """JAX's warnings of files that it cannot read or write, which no user can do anything about."""
    found: list[str] = []
    with warnings.catch_warnings():
        show = warnings.showwarning

        def keep(message: Warning | str, *more: Any, **named: Any) -> None:
            if "persistent compilation cache" in str(message):
                found.append(str(message))
            else:
                show(message, *more, **named)

        warnings.filterwarnings("always", "Error .* persistent compilation cache")
        warnings.showwarning = keep
        yield found


def _record(path: Path, known: dict[str, str], afresh: bool) -> None:
    """Confirm what JAX has written. ``afresh``: nothing, for JAX never replaces a bad file."""
    with suppress(OSError):
        if afresh:
            (path / INDEX).unlink(missing_ok=True)
            return
        new = {file.name: _hash(file) for file in path.glob("*-cache") if file.name not in known}
        if new:
            (path / "partial").write_text(json.dumps(known | new))
            (path / "partial").replace(path / INDEX)
            _prune(path.parent)


def _prune(base: Path) -> None:
    """Halve what has grown too large, the least recently used first."""
    found = sorted(filter(Path.is_dir, base.iterdir()), key=lambda path: path.stat().st_mtime)
    sizes = {path: sum(file.stat().st_size for file in path.iterdir()) for path in found}
    total = sum(sizes.values())
    most = CACHE_BYTES // 2 if total > CACHE_BYTES else total
    for path in found:
        with suppress(OSError):  # in use
            if total > most:
                descriptor = _lock(path)
                shutil.rmtree(path)
                os.close(descriptor)
                total -= sizes[path]
