"""``python -m tools.bench``: what tracing costs, beside what one would do instead, in one run.

Cold is a whole process: start-up, load, compilation (or compiled programs found on disk) and files.
Warm is a second run in a process that has everything loaded. Contenders take turns; figures are
medians. Memory is the high-water mark of a fresh process.
"""

import argparse
import re
import shutil
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import Any

import msgspec

from qwen_jax import cli
from stages.errors import UserError
from tools.bench import floor, measure, report
from tools.bench.measure import BenchResult, Figure, FigureRow

DEFAULT_MODELS = ("demo", "synthetic:0.5b")
MEMORY = (("synthetic:7b", 64, 3 << 30), ("synthetic:72b:2", 8, 9 << 30))
PARTS = ("speed", "decode", "tools", "memory")


def parser() -> argparse.ArgumentParser:
    result = cli.Parser(prog="tools.bench", description=__doc__)
    add = result.add_argument
    models = " and ".join(DEFAULT_MODELS)
    add("--model", action="append", metavar="M", help=f"may be repeated; default: {models}")
    add("--lengths", default="64,512", metavar="64,512", help="prompt lengths in tokens")
    add("--repeat", type=int, default=5, metavar="N", help="runs of each; default: 5")
    add("--only", choices=PARTS, help="one part alone")
    add("--scratch", type=Path, metavar="DIR", help="where models and traces go; default: TMPDIR")
    add("--markdown", type=Path, metavar="FILE", help="also write the tables as Markdown")
    cli.add_json(result)
    return result


def main(argv: list[str]) -> int:
    args = parser().parse_args(argv)
    if args.repeat < 1:
        raise UserError(f"--repeat {args.repeat}: at least one run is needed")
    if not re.fullmatch("[1-9][0-9]{0,6}(,[1-9][0-9]{0,6})*", args.lengths):
        raise UserError(f"--lengths {args.lengths!r}: expected lengths such as 64,512")
    lengths = [int(each) for each in args.lengths.split(",")]
    if args.scratch and not args.scratch.is_dir():
        raise UserError(f"--scratch: no such directory: {args.scratch}")
    if args.markdown and not args.markdown.parent.is_dir():
        raise UserError(f"--markdown: no such directory: {args.markdown.parent}")
    measure.check_contenders()
    figures: list[Figure] = []
    before = measure.machine()
    with tempfile.TemporaryDirectory(dir=args.scratch) as folder, cli.progress() as bar:
        scratch = Path(folder)
        rates = floor.measure(scratch)
        before |= {"rates": asdict(rates)}
        task = bar.add_task("", total=None)

        def doing(what: str) -> None:
            bar.update(task, description=what)

        for model in (args.model or DEFAULT_MODELS) if args.only != "memory" else ():
            for length in lengths:
                work = measure.make_workload(model, length, scratch, rates, doing)
                if args.only in (None, "speed"):
                    figures += measure.cold(work, args.repeat, doing)
                    figures += measure.warm(work, args.repeat, doing)
                if args.only in (None, "decode") and length == lengths[0]:
                    figures += measure.decode(work, args.repeat, doing)
                if args.only in (None, "tools"):
                    figures += measure.tools(work, args.repeat, doing)
                shutil.rmtree(work.folder)
        if args.only in (None, "memory"):
            for model, length, most in MEMORY:
                figures += measure.memory(model, length, most, scratch, doing)
    show = cli.report(args.json, to_json(figures, before, args.repeat))
    for table in report.tables(figures):
        show.print(f"\n{table.title}")
        show.print(table.terminal)
    if args.markdown:
        args.markdown.write_text(report.markdown(figures, before, args.repeat), encoding="utf-8")
    return 0


def to_json(figures: list[Figure], machine: dict[str, Any], repeat: int) -> dict[str, Any]:
    """The object of ``--json``."""
    rows = [FigureRow(**asdict(each), reached=each.reached) for each in figures]
    result = BenchResult(schema=1, machine=machine, repeat=repeat, figures=rows)
    return msgspec.to_builtins(result)


if __name__ == "__main__":
    cli.run(main)
