"""What the tests keep of compiled programs is whole, or not used."""

from pathlib import Path

import pytest

from tests import programs


@pytest.fixture
def cache(tmp_path: Path) -> programs.Programs:
    cache = programs.Programs(str(tmp_path), max_size=-1)
    cache.put("key", b"program")
    return cache


def test_a_program_is_read_as_it_was_written(cache: programs.Programs, tmp_path: Path) -> None:
    assert cache.get("key") == b"program"
    assert cache.get("other") is None
    assert [file.name for file in tmp_path.iterdir()] == ["key"]


@pytest.mark.parametrize("damage", [lambda b: b[:-1], lambda b: b[:-1] + b"x", lambda b: b""])
def test_a_damaged_program_is_none_and_made_anew(damage, cache, tmp_path) -> None:
    file = tmp_path / "key"
    file.write_bytes(damage(file.read_bytes()))
    assert cache.get("key") is None
    cache.put("key", b"program")
    assert cache.get("key") == b"program"


def test_too_many_programs_are_removed(cache, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(programs, "directory", lambda: tmp_path)
    programs.prune()
    assert cache.get("key") == b"program"
    monkeypatch.setattr(programs, "MOST", 5)
    programs.prune()
    assert not tmp_path.exists()
    programs.prune()  # and where there is nothing
