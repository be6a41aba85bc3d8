"""Where nothing can be written every command says so in one line, and leaves what is there."""

import errno
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from qwen_jax import trace
from stages.errors import UserError
from tests.conftest import ROOT, user_environment, with_mount
from tests.tiny import write_checkpoint

# Each of them in one process, as ``python -m`` would run it.
CHILD = """
import importlib, io, json, sys
from contextlib import redirect_stderr, redirect_stdout
from qwen_jax import cli
cli.leave = sys.exit
found = []
for module, *argv in json.loads(sys.argv[1]):
    sys.argv = [module, *argv]
    with redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()) as said:
        try:
            cli.run(importlib.import_module(module).main)
        except SystemExit as end:
            found.append([end.code, said.getvalue()])
print(json.dumps(found))
"""


def commands(model: Path, whole: Path, place: Path) -> list[list[str]]:
    """One for each way of naming something to write; ``whole`` is a trace in ``place``."""
    given = [f"--model={model}", "--tokens=1,2,3"]
    new, old = str(place / "new"), str(whole)
    return [
        ["qwen_jax.trace", *given, "--out", new],
        ["qwen_jax.trace", *given, "--out", new, "--format=safetensors"],
        ["qwen_jax.trace", *given, "--out", old, "--overwrite"],
        ["oracle.trace", *given, "--out", new],
        ["tools.convert", str(model), new],
        ["tools.parity.__main__", *given, "--out", new],
        ["tools.diff", old, old, "--json", new],
        ["tools.diff", old, old, "--report", f"{new}.html"],
        ["tools.localize.__main__", old, f"--model={model}", "--repro", new],
        ["tools.report.__main__", old, f"--model={model}", "-o", f"{new}.html"],
    ]


def test_a_disk_that_may_only_be_read(tmp_path: Path) -> None:
    """A real one, in a mount namespace of its own: root, too, is refused there."""
    place = tmp_path / "place"
    model = write_checkpoint(tmp_path / "model")
    trace.main([f"--model={model}", "--tokens=1,2,3", "--out", str(place / "old")])
    before = {p: p.stat().st_mtime_ns for p in place.rglob("*")}
    mount = f"mount --bind {place} {place} && mount -o remount,bind,ro {place}"
    tried = commands(model, place / "old", place)
    done = subprocess.run(
        [*with_mount(mount, 'exec "$0" "$@"'), sys.executable, "-c", CHILD, json.dumps(tried)],
        env=user_environment(),
        cwd=ROOT,
        capture_output=True,
        encoding="utf-8",
        timeout=1800,
    )
    assert done.returncode == 0, done.stderr
    for command, (code, said) in zip(tried, json.loads(done.stdout), strict=True):
        assert code == 2 and said.count("\n") == 1 and str(place) in said, (command, said)
        assert "Read-only" in said or "cannot be written" in said, (command, said)
    assert {p: p.stat().st_mtime_ns for p in place.rglob("*")} == before


@pytest.mark.parametrize("call", ["mkdir", "open"])
def test_as_if_it_were_such_a_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str
) -> None:
    """Where nothing can be mounted: what the system would say."""
    plain: Callable[..., int | None] = getattr(os, call)

    def refuses(path: str | Path, flags: int = os.O_WRONLY, *more: int, **named: int) -> int | None:
        if str(path).startswith(str(tmp_path / "out")) and flags & (os.O_WRONLY | os.O_RDWR):
            raise OSError(errno.EROFS, os.strerror(errno.EROFS), path)
        return plain(path, flags, *more, **named)

    model = write_checkpoint(tmp_path / "model")
    monkeypatch.setattr(os, call, refuses)
    with pytest.raises(UserError) as caught:
        trace.main([f"--model={model}", "--tokens=1,2,3", "--out", str(tmp_path / "out")])
    assert f"{tmp_path / 'out'}: " in (said := str(caught.value))
    assert os.strerror(errno.EROFS) in said and "\n" not in said
