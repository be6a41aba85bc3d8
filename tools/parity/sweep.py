"""The points of a sweep, run in worker processes, and the file that keeps what is finished."""

import hashlib
import json
import os
from collections import deque
from collections.abc import Generator, Iterator
from contextlib import contextmanager
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any

from qwen_jax.weights.base import Weights
from stages.errors import UserError
from stages.lock import lock
from tools.parity import worker
from tools.parity.child import Child, ask
from tools.parity.grid import Point

SCHEMA = 1
ROWS, TABLE = "points.jsonl", "table.md"  # the first line of ROWS says of what sweep they are
ROOT = Path(__file__).resolve().parents[2]

Row = dict[str, Any]


@contextmanager
def locked(out: Path) -> Iterator[None]:
    """One sweep at a time in a directory.

    Raises:
        UserError: another is there, something else is, or it cannot be written to.
    """
    try:
        out.mkdir(parents=True, exist_ok=True)
        strangers = [p.name for p in out.iterdir() if p.name not in (ROWS, TABLE)]
        if strangers:
            raise UserError(
                f"--out {out}: holds {strangers[0]!r}, which no sweep wrote; choose an empty "
                "directory"
            )
        descriptor = lock(out, f"--out {out}: another sweep is writing there")
    except FileExistsError:
        raise UserError(f"--out {out}: is not a directory") from None
    except OSError as error:
        raise UserError(f"--out {out}: {error.strerror}") from None
    try:
        yield
    except OSError as error:  # a full disk, or one that may only be read
        raise UserError(f"--out {out}: {error.strerror or error}; finished points stay") from None
    finally:
        os.close(descriptor)


def stamp(job: Row, model: Weights, machine: Row) -> Row:
    """What finished points depend on. A change of any of it makes them another sweep's."""
    code = hashlib.sha256((ROOT / "tools" / "diff.py").read_bytes())
    for package in ("stages", "qwen_jax", "tools/parity"):
        for path in sorted((ROOT / package).rglob("*.py")):
            code.update(path.read_bytes())
    tokens = hashlib.sha256(json.dumps(job["tokens"]).encode()).hexdigest()[:16]
    return {
        "schema": SCHEMA,
        "model": [model.name, states(model)],
        "config": model.config.to_json(),
        "tokens": tokens,
        "machine": machine,
        "XLA_FLAGS": os.environ.get("XLA_FLAGS", ""),
        "code": code.hexdigest()[:16],
    }


def states(model: Weights) -> dict[str, list[int]]:
    """Size and time of change of each of the model's files."""
    return {str(f): [f.stat().st_size, f.stat().st_mtime_ns] for f in model.files}


def finished(out: Path, stamp: Row, overwrite: bool) -> dict[str, Row]:
    """Rows of an earlier run of the same sweep in ``out``, by key; its file is ready for more.

    Raises:
        UserError: what is there was made with another model, device, version or code.
    """
    path = out / ROWS
    before = path.read_text(encoding="utf-8") if path.exists() and not overwrite else ""
    # Without its end an interrupted line would spoil the next one.
    first, *lines = [line for line in before.splitlines(True) if "\n" in line] or [_line(stamp)]
    try:
        there = json.loads(first)
    except ValueError:
        there = {}
    if other := sorted(k for k in stamp.keys() | there.keys() if stamp.get(k) != there.get(k)):
        with_other = f"with another {', '.join(other)}" if there else "nobody knows how"
        raise UserError(
            f"--out {out}: its points were made {with_other}; choose another directory, or "
            "forget them with --overwrite"
        )
    path.write_text("".join([first, *lines]), encoding="utf-8")
    return {row["key"]: row for row in map(json.loads, lines)}


def add(out: Path, row: Row) -> None:
    """Keep a finished row."""
    with open(out / ROWS, "a", encoding="utf-8") as file:
        file.write(_line(row))


def _line(row: Row) -> str:
    return json.dumps(row) + "\n"


def machine(job: Row) -> Row:
    """What a worker finds: device, flags, versions.

    Raises:
        UserError: no such device here.
    """
    try:
        found = ask(worker.machine, job, environment=worker.environment("default", False))
    except EOFError as error:
        raise UserError(f"the process that looked for a device {error}") from None
    if "refused" in found:
        raise UserError(found["refused"])
    return {k: v for k, v in found.items() if k not in ("flags", "matmul_precision")}


def run(points: list[Point], job: Row, jobs: int) -> Generator[Row, None, None]:
    """The row of each point as it is finished. One that takes its process down does not end the
    rest; to close this ends all processes."""
    queues: dict[tuple[object, ...], list[Point]] = {}
    for point in points:  # what shares flags and a reference; trials have none
        shared = (*point.process, point.dtype, point.trial != "reference")
        queues.setdefault(shared, []).append(point)
    waiting = [
        deque(sorted(queue, key=lambda p: (p.dtype, p.length, p.batch)))
        for queue in sorted(queues.values(), key=len)  # the longest is taken first
    ]
    running: dict[Any, tuple[Child, deque[Point]]] = {}
    try:
        while waiting or running:
            while waiting and len(running) < jobs:
                left = waiting.pop()
                child = Child(
                    worker.rows, job, list(left), environment=worker.environment(*left[0].process)
                )
                running[child.connection] = child, left
            for connection in wait(list(running)):
                child, left = running[connection]
                try:
                    row = child.receive()
                    left.popleft()
                except EOFError as error:
                    del running[connection]
                    child.end()
                    if not left:
                        continue
                    row = worker.not_run(left.popleft(), f"its process {error}")
                    waiting += [left] if left else []
                yield row
    finally:
        for child, _ in running.values():
            child.end()
