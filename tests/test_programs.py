"""Compiled programs on disk: kept, checked, replaced when damaged, and never in the way."""

import os
from pathlib import Path

import pytest

from qwen_jax import programs
from qwen_jax.programs import Programs
from stages.trace import open_trace

VALUE = bytes(range(256)) * 40


def test_what_is_put_comes_back(tmp_path: Path) -> None:
    Programs(tmp_path / "a/b").put("key", VALUE)
    assert Programs(tmp_path / "a/b").get("key") == VALUE
    assert Programs(tmp_path / "a/b").get("other") is None
    assert [path.name for path in (tmp_path / "a/b").iterdir()] == ["key"]


@pytest.mark.parametrize("damage", ["flip", "cut", "empty", "more"])
def test_damage_is_a_miss_and_goes_away(tmp_path: Path, damage: str) -> None:
    kept, path = Programs(tmp_path), tmp_path / "key"
    kept.put("key", VALUE)
    whole = path.read_bytes()
    flipped = bytes([whole[0] ^ 1]) + whole[1:]
    path.write_bytes(
        {"flip": flipped, "cut": whole[:-1], "empty": b"", "more": whole + b"x"}[damage]
    )
    assert kept.get("key") is None and not path.exists()
    kept.put("key", VALUE)
    assert kept.get("key") == VALUE


def test_where_nothing_can_be_kept_nothing_is(tmp_path: Path, monkeypatch) -> None:
    (tmp_path / "file").touch()
    Programs(tmp_path / "file/x").put("key", VALUE)
    assert Programs(tmp_path / "file/x").get("key") is None
    monkeypatch.setenv("XDG_CACHE_HOME", "")
    monkeypatch.setattr(Path, "home", lambda: (_ for _ in ()).throw(RuntimeError("no home")))
    assert programs.directory() is None


def test_the_least_recently_used_go(tmp_path: Path, monkeypatch) -> None:
    kept = Programs(tmp_path)
    for number in range(8):
        kept.put(f"{number}", VALUE)
        os.utime(tmp_path / f"{number}", (number, number))
    kept.get("0")
    monkeypatch.setattr(programs, "CACHE_BYTES", 6 * len(VALUE))
    Programs(tmp_path).put("new", VALUE)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["0", "7", "new"]


def test_a_trace_uses_them_and_survives_their_damage(tmp_path: Path, run_cli) -> None:
    env = {"XDG_CACHE_HOME": str(tmp_path / "cache")}
    found = []
    for name in ("first", "second", "damaged", "repaired", "without"):
        files = list((tmp_path / "cache").rglob("jit_*"))
        before = {path: path.stat().st_ino for path in files}
        for number, path in enumerate(files):  # a second name, or the number would be given anew
            (tmp_path / f"{name}-{number}").hardlink_to(path)
        assert files or name == "first"
        if name == "damaged":
            for path in files:
                path.write_bytes(path.read_bytes()[:-100])
        more = ["--no-compile-cache"] if name == "without" else []
        result = run_cli("qwen_jax.trace", "--stages=lm_head", f"--out={name}", *more, env=env)
        assert (result.code, result.stderr) == (0, ""), name
        same = all(path.exists() and path.stat().st_ino == before[path] for path in before)
        assert same == (name != "damaged"), name  # a program that was of no use is written again
        found.append(open_trace(tmp_path / name).entries["lm_head", None].xxh3)
    assert len(set(found)) == 1
