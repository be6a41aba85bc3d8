"""Compiled programs on disk: kept, checked before JAX reads them, and never in the way."""

import fcntl
import json
import os
import shutil
import warnings
from contextlib import suppress
from pathlib import Path

import jax
import platformdirs
import pytest
from jax.experimental.compilation_cache import compilation_cache

from qwen_jax import compile_cache
from stages.open import open_trace

DIRECTORY, ENABLED = "jax_compilation_cache_dir", "jax_enable_compilation_cache"
LEAST = "jax_persistent_cache_min_compile_time_secs"


@pytest.fixture(autouse=True)
def base(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where programs are kept: nothing is there yet, and no one has set up JAX's cache."""
    monkeypatch.setattr(platformdirs, "user_cache_path", tmp_path.joinpath)
    defaults = {DIRECTORY: None, ENABLED: True, LEAST: 1.0}
    before = {name: getattr(jax.config, name) for name in defaults}
    for name, value in defaults.items():
        jax.config.update(name, value)
    compilation_cache.reset_cache()
    yield tmp_path / "qwen-jax-stages" / "programs"
    for name, value in before.items():
        jax.config.update(name, value)
    compilation_cache.reset_cache()


def used(*key: object, files: dict[str, bytes] | None = None) -> Path | None:
    """Use the cache, as a JAX that writes ``files``. Returns where it was told to write."""
    with compile_cache.use(*key):
        told = jax.config.jax_compilation_cache_dir
        for name, content in (files or {}).items():
            (Path(told) / name).write_bytes(content)
    assert jax.config.jax_compilation_cache_dir is None
    return told and Path(told)


def kept(path: Path) -> dict[str, bytes]:
    """What JAX finds there."""
    with compile_cache.use("a"):
        assert path == Path(jax.config.jax_compilation_cache_dir)
        return {file.name: file.read_bytes() for file in path.glob("*-cache")}


@pytest.fixture
def filled(base: Path) -> Path:
    """A directory with two programs."""
    path = used("a", files={"one-cache": b"first", "two-cache": b"second"})
    assert kept(path) == {"one-cache": b"first", "two-cache": b"second"}
    return path


def test_every_key_has_a_private_directory(base: Path) -> None:
    first, second = used("a", 1), used("a", 2)
    assert first == used("a", 1) != second
    assert first.parent == base
    assert {path.stat().st_mode & 0o777 for path in (first, base, base.parent)} == {0o700}


def compile_with_jax(*key: object) -> None:
    with compile_cache.use(*key):
        jax.jit(lambda x: x + 1.5)(1.0)


def test_jax_itself_goes_there_and_only_while_told_to(base: Path) -> None:
    compile_with_jax("a")
    path = used("a")
    first = kept(path)
    assert first and json.loads((path / compile_cache.INDEX).read_text()).keys() == first.keys()
    jax.jit(lambda x: x + 2.5)(1.0)
    assert kept(path) == first
    with compile_cache.use("b"):
        jax.jit(lambda x: x + 3.5)(1.0)
    assert kept(path) == first and list(used("b").glob("*-cache"))


@pytest.mark.parametrize("content", [b"First", b"firs", b"", b"first and more"])
def test_damage_goes_away(filled: Path, content: bytes) -> None:
    (filled / "one-cache").write_bytes(content)
    assert kept(filled) == {"two-cache": b"second"}
    assert used("a", files={"one-cache": b"anew"}) == filled
    assert kept(filled) == {"one-cache": b"anew", "two-cache": b"second"}


def test_programs_that_changed_places_go_away(filled: Path) -> None:
    (filled / "one-cache").rename(filled / "x")
    (filled / "two-cache").rename(filled / "one-cache")
    (filled / "x").rename(filled / "two-cache")
    assert kept(filled) == {}


def test_what_a_stopped_process_left_goes_away(filled: Path) -> None:
    with suppress(KeyboardInterrupt), compile_cache.use("a"):
        (filled / "three-cache").write_bytes(b"thi")
        raise KeyboardInterrupt
    assert kept(filled) == {"one-cache": b"first", "two-cache": b"second"}


def test_a_pipe_is_not_waited_for(filled: Path) -> None:
    os.mkfifo(filled / "three-cache")
    assert kept(filled) == {"one-cache": b"first", "two-cache": b"second"}


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"7", b"\xff", b'{"one-cache": 1}'])
def test_without_a_whole_index_nothing_is_trusted(filled: Path, content: bytes) -> None:
    (filled / compile_cache.INDEX).write_bytes(content)
    assert kept(filled) == {}


def test_a_program_damaged_meanwhile_is_not_confirmed(filled: Path) -> None:
    assert used("a", files={"one-cache": b"damage", "three-cache": b"third"}) == filled
    assert kept(filled) == {"two-cache": b"second", "three-cache": b"third"}


def test_what_jax_cannot_read_is_written_anew(filled: Path) -> None:
    """A file that was never whole, of a full disk: JAX warns, and leaves it there for good."""
    compile_with_jax("a")
    names = kept(filled).keys() - {"one-cache", "two-cache"}
    bad = used("bad", files=dict.fromkeys(names, b"no program"))
    filled.rename(filled.with_name("moved"))
    bad.rename(filled)
    assert kept(filled) == dict.fromkeys(names, b"no program")
    compile_with_jax("a")  # shows no warning: here that would be an error
    assert kept(filled) == {}
    compile_with_jax("a")
    assert kept(filled).keys() == names
    with pytest.warns(UserWarning, match="another"), compile_cache.use("a"):
        warnings.warn("another", stacklevel=1)


def test_a_write_that_fails_is_not_confirmed(base: Path, monkeypatch) -> None:
    with compile_cache.use("a"):
        path = Path(jax.config.jax_compilation_cache_dir)
        shutil.rmtree(path)
        path.touch()  # for root too, no file can be written there
        compile_with_jax("within the first, which stays")
    assert used("a") is None


def test_a_directory_in_use_is_left_alone(filled: Path) -> None:
    (filled / "three-cache").write_bytes(b"thi")  # another process is writing it
    descriptor = os.open(filled, os.O_RDONLY)
    fcntl.flock(descriptor, fcntl.LOCK_EX)
    assert used("a") is None and (filled / "three-cache").exists()
    os.close(descriptor)
    assert kept(filled) == {"one-cache": b"first", "two-cache": b"second"}


def test_one_that_others_could_have_written_is_not_used(filled: Path, monkeypatch) -> None:
    for path, mode in ((filled, 0o770), (filled.parent, 0o722), (filled.parent.parent, 0o777)):
        path.chmod(mode)
        assert used("a") is None
        path.chmod(0o700)
        moved = path.rename(path.with_name("elsewhere"))
        path.symlink_to(moved)
        assert used("a") is None
        path.unlink()
        moved.rename(path)
    assert used("a") == filled
    monkeypatch.setattr(os, "geteuid", lambda: os.getuid() + 1)
    assert used("a") is None


def test_where_nothing_can_be_kept_nothing_is(tmp_path: Path, monkeypatch) -> None:
    (tmp_path / "qwen-jax-stages").touch()
    assert used("a") is None
    monkeypatch.setattr(platformdirs, "user_cache_path", Path("~/.cache").joinpath)  # no home
    monkeypatch.chdir(tmp_path)
    assert used("a") is None and not Path("~").exists()


def test_the_users_own_settings_win(base: Path, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setenv("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "1")
    with compile_cache.use("a"):
        assert jax.config.jax_persistent_cache_min_compile_time_secs == 1
    monkeypatch.delenv("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS")
    with compile_cache.use("a"):
        assert jax.config.jax_persistent_cache_min_compile_time_secs == 0
    jax.config.update(DIRECTORY, str(tmp_path / "theirs"))
    with compile_cache.use("b"):
        assert jax.config.jax_compilation_cache_dir == str(tmp_path / "theirs")
    jax.config.update(DIRECTORY, None)
    jax.config.update(ENABLED, False)
    assert used("b") is None and len(list(base.iterdir())) == 1


def test_the_least_recently_used_go(base: Path, monkeypatch) -> None:
    paths = [used(number, files={"x-cache": bytes(1000)}) for number in range(8)]
    for number, path in enumerate(paths):
        os.utime(path, (number, number))
    assert used(0) == paths[0]  # used again
    busy = os.open(paths[1], os.O_RDONLY)
    fcntl.flock(busy, fcntl.LOCK_SH)
    monkeypatch.setattr(compile_cache, "CACHE_BYTES", 8 * 1000)
    new = used("new", files={"x-cache": bytes(1000)})
    os.close(busy)
    assert set(base.iterdir()) == {paths[0], paths[1], new}


def test_a_trace_uses_them_and_survives_their_damage(tmp_path: Path, run_cli) -> None:
    env = {"XDG_CACHE_HOME": str(tmp_path / "cache")}
    found = []
    for name in ("first", "second", "damaged", "repaired", "swapped", "without"):
        files = sorted((tmp_path / "cache").rglob("jit_*-cache"))
        before = {path: path.stat().st_ino for path in files}
        for number, path in enumerate(files):  # a second name, or the number would be given anew
            (tmp_path / f"{name}-{number}").hardlink_to(path)
        assert files or name == "first"
        if name == "damaged":
            for path in files:
                path.write_bytes(path.read_bytes()[:-100])
        if name == "swapped":
            for path, content in zip(files, [p.read_bytes() for p in files[::-1]], strict=True):
                path.write_bytes(content)
        more = ["--no-compile-cache"] if name == "without" else []
        result = run_cli("qwen_jax.trace", "--stages=lm_head", f"--out={name}", *more, env=env)
        assert (result.code, result.stderr) == (0, ""), name
        same = all(path.exists() and path.stat().st_ino == before[path] for path in before)
        assert same == (name not in ("damaged", "swapped")), name  # compiled and written anew
        found.append(open_trace(tmp_path / name).entries["lm_head", None].xxh3)
    assert len(set(found)) == 1
