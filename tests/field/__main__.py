"""Runs real engines on small models, healthy and wrong ones, and says how they were judged.

    python -m tests.field                       everything that is installed: long
    python -m tests.field --quick               a tenth of it
    python -m tests.field --only llama          what has that in its name
    python -m tests.field --markdown docs/field.md

Rows are kept in --rows as they are made, and what is kept there is not run again.
"""

import argparse
import importlib.util
import json
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

from tests.field import broken, healthy, large, models, runs, table
from tools.collect import engines


def parser() -> argparse.ArgumentParser:
    result = argparse.ArgumentParser(prog="tests.field", description=__doc__)
    add = result.add_argument
    add("--quick", action="store_true", help="every tenth run")
    add("--only", default="", metavar="NAME", help="runs with that in their name")
    add("--rows", type=Path, metavar="FILE", help="keep rows there, and do not run those again")
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


def kept(file: Path | None) -> list[runs.Row]:
    if file is None or not file.exists():
        return []
    return [runs.Row(**json.loads(line)) for line in file.read_text("utf-8").splitlines()]


def main(argv: list[str]) -> int:
    args = parser().parse_args(argv)
    chosen = [job for job in jobs() if args.only in job[0]][:: 10 if args.quick else 1]
    rows = kept(args.rows)
    earlier = len(rows)
    done = {f"{row.kind} {row.name}" for row in rows}
    with tempfile.TemporaryDirectory() as folder:
        made = models.Models(Path(folder))
        for name, engine, job in chosen:
            if name in done or not installed(engine):
                continue
            row = job(made)
            rows.append(row)
            print(table.line(row), flush=True)
            if args.rows:
                with args.rows.open("a", encoding="utf-8") as file:
                    file.write(json.dumps(row.to_json()) + "\n")
    order = {name: place for place, (name, _, _) in enumerate(jobs())}
    rows.sort(key=lambda row: order.get(f"{row.kind} {row.name}", len(order)))
    for total in table.totals(rows):
        print(total)
    if args.markdown:
        args.markdown.write_text(table.page(rows, earlier), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
