"""Runs real engines on small models, healthy and wrong ones, and says how they were judged.

    python -m tests.field                       everything that is installed: long
    python -m tests.field --jobs 3              in three processes
    python -m tests.field --quick               a tenth of it
    python -m tests.field --only llama          what has that in its name
    python -m tests.field --markdown docs/field.md

Rows are kept in --rows as they are made, and the same command goes on where it was stopped. Rows
that other code or other versions have made are refused: one table is of one state of things.
"""

import argparse
import hashlib
import importlib.util
import json
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path

from tests.conftest import ROOT
from tests.field import broken, healthy, large, models, runs, table
from tools.collect import engines

CODE = ("stages", "qwen_jax", "tools/collect", "tools/localize", "tests/field")  # what rows hang on


def parser() -> argparse.ArgumentParser:
    result = argparse.ArgumentParser(prog="tests.field", description=__doc__)
    add = result.add_argument
    add("--quick", action="store_true", help="every tenth run")
    add("--only", default="", metavar="NAME", help="runs with that in their name")
    add("--rows", type=Path, metavar="FILE", help="keep rows there, and do not run those again")
    add("--jobs", type=int, default=1, metavar="N", help="processes at once")
    add("--part", default="1/1", metavar="K/N", help="every N-th run from the K-th on, no tables")
    add("--markdown", type=Path, metavar="FILE", help="write the tables")
    return result


Job = tuple[str, str, Callable[[models.Models], runs.Row]]


def jobs() -> Iterator[Job]:
    """(name, engine, what runs it)."""
    for case in healthy.cases():
        yield f"healthy {case.name}", case.engine, lambda made, case=case: runs.run(case, made)
    for kind in runs.TYPES:
        for each in broken.WRONG:
            name = f"broken {each.name} {kind}"
            yield (
                name,
                "llama.cpp",
                lambda made, each=each, kind=kind: runs.run_broken(each, kind, made),
            )
    yield f"timing {large.MODEL}", "llama.cpp", large.run


def installed(engine: str) -> bool:
    return all(map(importlib.util.find_spec, engines.ENGINES[engine].packages))


@cache
def stamp() -> str:
    """Of the code and the versions that rows are made with."""
    found = hashlib.sha256(" ".join(table.versions()).encode())
    for path in sorted(path for folder in CODE for path in (ROOT / folder).rglob("*.py")):
        found.update(path.read_bytes())
    return found.hexdigest()[:16]


def kept(file: Path) -> list[runs.Row]:
    """The rows that are there already."""
    lines = [json.loads(line) for line in file.read_text("utf-8").splitlines()]
    if any(line.pop("stamp") != stamp() for line in lines):
        sys.exit(f"error: {file}: made by other code or versions; remove it")
    return [runs.Row(**line) for line in lines]


def main(argv: list[str]) -> int:
    args = parser().parse_args(argv)
    part, parts = map(int, args.part.split("/"))
    with tempfile.TemporaryDirectory() as folder:
        file = args.rows or Path(folder) / "rows.jsonl"
        file.touch()
        if args.jobs > 1:
            words = [sys.executable, "-m", "tests.field", *argv, "--jobs", "1", "--rows", str(file)]
            running = [
                subprocess.Popen([*words, "--part", f"{n}/{args.jobs}"])
                for n in range(1, args.jobs + 1)
            ]
            if any([each.wait() for each in running]):
                return 1
        else:
            chosen = [job for job in jobs() if args.only in job[0]][:: 10 if args.quick else 1]
            run(chosen[part - 1 :: parts], file, Path(folder))
        rows = kept(file)
    if parts > 1:
        return 0
    order = {name: place for place, (name, _, _) in enumerate(jobs())}
    rows.sort(key=lambda row: order.get(f"{row.kind} {row.name}", len(order)))
    for total in table.totals(rows):
        print(total)
    if args.markdown:
        args.markdown.write_text(table.page(rows), encoding="utf-8")
    return 0


def run(chosen: list[Job], file: Path, folder: Path) -> None:
    """What has no row in the file yet."""
    made, done = models.Models(folder), {f"{row.kind} {row.name}" for row in kept(file)}
    for name, engine, job in chosen:
        if name not in done and installed(engine):
            row = job(made)
            print(table.line(row), flush=True)
            with file.open("a", encoding="utf-8") as rows:
                rows.write(json.dumps(row.to_json() | {"stamp": stamp()}) + "\n")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
