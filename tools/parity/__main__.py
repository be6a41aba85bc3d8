"""XLA-compiled against un-jitted, over a grid of ways to compile.

The reference is the un-jitted forward on the CPU, the candidate what XLA compiles for the device.
Finished points are kept in --out; the same command goes on where it was interrupted.
"""

import argparse
import itertools
import os
import sys
import time
from collections import Counter
from contextlib import closing
from pathlib import Path
from types import ModuleType

from rich.console import Console
from rich.text import Text

from qwen_jax import arguments, cli
from qwen_jax.prompt import Prompt, load_tokenizer, random_tokens
from qwen_jax.weights import open_model
from qwen_jax.weights.base import Weights
from stages.errors import NotComparable, UserError
from tools.parity import grid, report, sweep
from tools.parity.gpu import TARGETS
from tools.parity.gpu import report as gpu_report
from tools.parity.grid import Point
from tools.parity.sweep import ROWS, SCHEMA, TABLE, Row

Pairs = list[tuple[Point, Row]]


def parser() -> argparse.ArgumentParser:
    result = cli.Parser(
        prog="tools.parity",
        description=__doc__,
        epilog=f"{report.LEGEND}\n\n{gpu_report.LEGEND}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    arguments.add_model_arguments(result)
    add = result.add_argument
    shipped = ", ".join(grid.SHIPPED)
    add(
        "--sweep",
        default="quick",
        metavar="NAME|FILE.toml",
        help=f"{shipped}, or a grid of your own, written as tools/parity/quick.toml is; "
        "default: quick",
    )
    add("--device", default="cpu", choices=("cpu", "gpu"), help="of the candidate; default: cpu")
    add(
        "--aot",
        choices=TARGETS,
        help="compile the sweep's programs for that GPU, with none at hand, and check what the "
        "compiler made; needs the extra qwen-jax-stages[aot]",
    )
    add(
        "--out",
        type=Path,
        metavar="DIR",
        help="finished points and the table; default: parity-MODEL-SWEEP-DEVICE",
    )
    add("--overwrite", action="store_true", help="forget the finished points in --out")
    add(
        "--invariance",
        action="store_true",
        help="instead: is a sequence the same alone, in batches, in chunks and decoded?",
    )
    add("--jobs", type=_jobs, metavar="N", help="processes at once; default: cores, at most 4")
    cli.add_report(result)
    cli.add_json(result)
    return result


def _jobs(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r}: expected a positive whole number")
    return int(text)


def main(argv: list[str]) -> int:
    args = parser().parse_args(argv)
    if args.aot and args.device != "cpu":
        raise UserError("--aot compiles with no GPU at hand; leave --device out")
    if args.invariance and (args.aot or args.report):
        raise UserError("--invariance is a sweep of its own; leave --aot and --report out")
    points = grid.load(args.sweep)
    model = open_model(args.model)
    if args.invariance:
        return _invariance(args, model)
    if args.aot:
        points = grid.programs(points)
    sheet = gpu_report if args.aot else report
    tokens = read_tokens(arguments.prompt_of(args), model)
    job = {"device": args.device, "model": args.model, "tokens": list(tokens), "aot": args.aot}
    machine = sweep.machine(job)
    where = args.aot or args.device
    out = args.out or Path(f"parity-{model.name}-{Path(args.sweep).stem}-{where}")
    began = time.perf_counter()
    with sweep.locked(out):
        pairs, kept = _run(args, points, job, model, out, sweep.stamp(job, model, machine))
        sections = list(sheet.sections(pairs))
        (out / TABLE).write_text(report.markdown(sections), encoding="utf-8")
    data = {
        "schema": SCHEMA,
        "verdict": _verdict(pairs, sheet),
        "sweep": args.sweep,
        "model": model.name,
        "device": args.device,
        "compiled_for": args.aot,
        "machine": machine,
        "seconds": round(time.perf_counter() - began, 1),
        "points": [_entry(point, row, sheet.failure(point, row)) for point, row in pairs],
    }
    show = cli.report(args.json, data)
    if args.report and data["verdict"] != "not_comparable":
        from tools.report import write  # before a word is printed: the reader may stop early

        write.sweep(args.report, data, sections, sheet.LEGEND)
    report.show(show, sections)
    _summary(show, pairs, sheet, kept)
    if data["verdict"] == "not_comparable":
        raise NotComparable(f"nothing compared: none of the {len(pairs)} points could be run")
    style = "bold red" if data["verdict"] == "fail" else "bold green"
    says = f"; the table is in {out / TABLE}, what it means in --help"
    show.print(Text.assemble((data["verdict"], style), says))
    return 1 if data["verdict"] == "fail" else 0


def _run(
    args: argparse.Namespace, points: list[Point], job: Row, model: Weights, out: Path, stamp: Row
) -> tuple[Pairs, int]:
    """Every point with its row, and how many are from before; what is finished is kept in ``out``.

    Raises:
        UserError: the model's files changed meanwhile.
    """
    rows = sweep.finished(out, stamp, args.overwrite)
    kept = sum(point.key in rows for point in points)
    for point in points:
        if why := grid.impossible(point, model.config, "gpu" if args.aot else args.device):
            rows[point.key] = {"key": point.key, "verdict": "not run", "why": why}
    left = {point.key: point for point in points if point.key not in rows}
    jobs = args.jobs or (1 if args.device == "gpu" else min(4, os.cpu_count() or 1))
    try:
        with cli.progress() as bar, closing(sweep.run(list(left.values()), job, jobs)) as running:
            for number, row in enumerate(bar.track(running, len(left), description="points"), 1):
                rows[row["key"]] = row
                if not row.get("failed"):  # what went wrong is tried again next time
                    sweep.add(out, row)
                why = f": {row['why']}" if "why" in row else ""
                says = f"[{number}/{len(left)}] {left[row['key']].says}: {row['verdict']}{why}"
                line = f"{says} ({row.get('seconds', 0):.1f} s)"
                bar.console.print(line, markup=False, soft_wrap=True)
    except KeyboardInterrupt:
        done = (out / ROWS).read_text(encoding="utf-8").count("\n") - 1
        print(f"{done} finished points are in {out}; the same command goes on from there",
              file=sys.stderr)  # fmt: skip
        raise
    if left and stamp["model"] != [model.name, sweep.states(model)]:
        (out / ROWS).unlink()  # a point in between may be half of one model, half of another
        raise UserError("the model's files changed during the sweep; start it again")
    return [(point, rows[point.key]) for point in points], kept


def _verdict(pairs: Pairs, sheet: ModuleType) -> str:
    if any(sheet.failure(*pair) for pair in pairs):
        return "fail"
    return "pass" if any(row["verdict"] != "not run" for _, row in pairs) else "not_comparable"


def _invariance(args: argparse.Namespace, model: Weights) -> int:
    from qwen_jax import engine, runtime
    from tools.parity import invariance

    chosen = runtime.pick_device(args.device)
    made = engine.JaxEngine(model, "float32", "xla", chosen, keep=True)
    drawn = itertools.count()  # every sequence is another

    def stream(length: int) -> tuple[int, ...]:
        first = next(drawn)
        return random_tokens(first + length, model)[first:]

    with cli.progress() as bar:
        found = bar.track(invariance.sweep(made, model, stream, "float32"), description="comparing")
        outcomes = list(found)
    same = all(not each.partings for each in outcomes)
    data = invariance.InvarianceResult(
        schema=1,
        verdict="identical" if same else "differ",
        model=model.name,
        device=args.device,
        outcomes=outcomes,
    )
    invariance.show(cli.report(args.json, data), outcomes)
    return 0 if same else 1


def _entry(point: Point, row: Row, failure: str | None) -> Row:
    """A point and its row as ``--json`` has them."""
    row = {name: value for name, value in row.items() if name != "key"}
    return {"point": point.to_json(), "failure": failure} | row


def _summary(show: Console, pairs: Pairs, sheet: ModuleType, kept: int) -> None:
    counts = Counter(row["verdict"] for _, row in pairs)
    listed = ", ".join(f"{count} {name}" for name, count in counts.items())
    number = f"{len(pairs)} point{'s' * (len(pairs) > 1)}"
    show.print(f"{number}: {listed}" + (f"; {kept} from before" if kept else ""))
    by_reason: dict[str, list[Point]] = {}
    for point, row in pairs:
        if why := sheet.failure(point, row):
            by_reason.setdefault(why, []).append(point)
    for why, points in by_reason.items():
        more = f" and {len(points) - 1} more" if len(points) > 1 else ""
        show.print(Text.assemble(("fails", "bold red"), f" {points[0].says}{more}: {why}"))


def read_tokens(prompt: Prompt, model: Weights) -> tuple[int, ...]:
    """What the user gave; else the embedded prompt, or, for a model without a tokenizer, ids drawn
    once and for all."""
    if prompt.given or load_tokenizer(model) is not None:
        return prompt.read(model)
    return random_tokens(64, model)


if __name__ == "__main__":
    cli.run(main)
