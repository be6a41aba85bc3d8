"""XLA-compiled against un-jitted, over a grid of ways to compile.

The reference is the un-jitted forward on the CPU, the candidate what XLA compiles for the device.
Finished points are kept in --out; the same command goes on where it was interrupted.
"""

import argparse
import hashlib
import itertools
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.text import Text

from qwen_jax import arguments, cli
from qwen_jax.prompt import Prompt, load_tokenizer, random_tokens
from qwen_jax.weights import open_model
from qwen_jax.weights.base import Weights
from stages.errors import NotComparable, UserError
from stages.lock import lock
from tools.parity import grid, report
from tools.parity.gpu import TARGETS
from tools.parity.gpu import report as gpu_report
from tools.parity.grid import Point
from tools.parity.worker import environment, last_line

SCHEMA = 1
ROWS, STAMP, TABLE = "points.jsonl", "sweep.json", "table.md"
ROOT = Path(__file__).resolve().parents[2]

Row = dict[str, Any]


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
    device, sheet = (args.device, report) if not args.aot else ("gpu", gpu_report)
    if args.aot:
        points = grid.programs(points)
    model = open_model(args.model)
    if args.invariance:
        return _invariance(args, model)
    tokens = read_tokens(arguments.prompt_of(args), model)
    job = {"device": args.device, "model": args.model, "tokens": list(tokens)}
    job |= {"aot": args.aot}
    machine = ask_device(job)
    where = args.aot or args.device
    out = args.out or Path(f"parity-{model.name}-{Path(args.sweep).stem}-{where}")
    began = time.perf_counter()
    with _locked(out):
        stamp = _stamp(job, model, machine)
        rows = finished(out, stamp, args.overwrite)
        for point in points:
            if why := grid.impossible(point, model.config, device):
                rows[point.key] = {"key": point.key, "verdict": "not run", "why": why}
        left = [point for point in points if point.key not in rows]
        kept = sum(row["verdict"] != "not run" for row in rows.values())
        jobs = args.jobs or (1 if args.device == "gpu" else min(4, os.cpu_count() or 1))
        try:
            rows |= run(left, job, jobs, out / ROWS)
        except KeyboardInterrupt:
            done = (out / ROWS).read_text(encoding="utf-8").count("\n")
            print(f"{done} finished points are in {out}; the same command goes on from there",
                  file=sys.stderr)  # fmt: skip
            raise
        if left and stamp["model"] != _stamp(job, model, machine)["model"]:
            (out / STAMP).unlink()  # a point in between may be half of one model, half of another
            raise UserError("the model's files changed during the sweep; start it again")
        pairs = [(point, rows[point.key]) for point in points]
        sections = list(sheet.sections(pairs))
        (out / TABLE).write_text(report.markdown(sections), encoding="utf-8")
    failures = [(p, why) for p, row in pairs if (why := sheet.failure(p, row))]
    ran = sum(row["verdict"] != "not run" for _, row in pairs)
    data = {
        "schema": SCHEMA,
        "verdict": "fail" if failures else "pass" if ran else "not_comparable",
        "sweep": args.sweep,
        "model": model.name,
        "device": args.device,
        "compiled_for": args.aot,
        "machine": machine,
        "seconds": round(time.perf_counter() - began, 1),
        "points": [_entry(point, row, sheet.failure(point, row)) for point, row in pairs],
    }
    show = cli.report(args.json, data)
    if args.report and (ran or failures):  # before a word is printed: the reader may stop early
        from tools.report import write

        write.sweep(args.report, data, sections, sheet.LEGEND)
    report.show(show, sections)
    _summary(show, pairs, failures, kept)
    if not ran and not failures:
        raise NotComparable(f"nothing compared: none of the {len(pairs)} points could be run")
    verdict = ("fail", "bold red") if failures else ("pass", "bold green")
    show.print(Text.assemble(verdict, f"; the table is in {out / TABLE}, what it means in --help"))
    return 1 if failures else 0


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
    data = {
        "schema": SCHEMA,
        "verdict": "identical" if same else "differ",
        "model": model.name,
        "device": args.device,
        "outcomes": [each.to_json() for each in outcomes],
    }
    invariance.show(cli.report(args.json, data), outcomes)
    return 0 if same else 1


def _entry(point: Point, row: Row, failure: str | None) -> Row:
    """A point and its row as ``--json`` has them."""
    row = {name: value for name, value in row.items() if name != "key"}
    return {"point": point.to_json(), "failure": failure} | row


def _summary(
    show: Console, pairs: list[tuple[Point, Row]], failures: list[tuple[Point, str]], kept: int
) -> None:
    counts = Counter(row["verdict"] for _, row in pairs)
    listed = ", ".join(f"{count} {name}" for name, count in counts.items())
    number = f"{len(pairs)} point{'s' * (len(pairs) > 1)}"
    show.print(f"{number}: {listed}" + (f"; {kept} from before" if kept else ""))
    by_reason: dict[str, list[Point]] = {}
    for point, why in failures:
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


# --- finished points


def finished(out: Path, stamp: Row, overwrite: bool) -> dict[str, Row]:
    """Rows of an earlier run of the same sweep in ``out``, by key.

    Raises:
        UserError: what is there was made with another model, device, version or code.
    """
    rows, path = out / ROWS, out / STAMP
    if rows.exists() and not overwrite:
        try:
            there = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            there = {}
        if other := sorted(k for k in stamp.keys() | there.keys() if stamp.get(k) != there.get(k)):
            with_other = f"with another {', '.join(other)}" if there else "nobody knows how"
            raise UserError(
                f"--out {out}: its points were made {with_other}; choose another directory, or "
                "forget them with --overwrite"
            )
        # Without its end an interrupted line would spoil the next one.
        whole = [line for line in rows.read_text(encoding="utf-8").splitlines(True) if "\n" in line]
        rows.write_text("".join(whole), encoding="utf-8")
        return {row["key"]: row for row in map(json.loads, whole)}
    # In this order: points must never lie beside another's stamp, or beside none.
    rows.unlink(missing_ok=True)
    path.write_text(json.dumps(stamp, indent=1) + "\n", encoding="utf-8")
    rows.touch()
    return {}


def _stamp(job: Row, model: Weights, machine: Row) -> Row:
    """What finished points depend on. A change of any of it makes them another sweep's."""
    states = {str(f): [f.stat().st_size, f.stat().st_mtime_ns] for f in model.files}
    code = hashlib.sha256((ROOT / "tools" / "diff.py").read_bytes())
    for package in ("stages", "qwen_jax", "tools/parity"):
        for path in sorted((ROOT / package).rglob("*.py")):
            code.update(path.read_bytes())
    tokens = hashlib.sha256(json.dumps(job["tokens"]).encode()).hexdigest()[:16]
    return {
        "schema": SCHEMA,
        "model": [model.name, states],
        "config": model.config.to_json(),
        "tokens": tokens,
        "machine": machine,
        "XLA_FLAGS": os.environ.get("XLA_FLAGS", ""),
        "code": code.hexdigest()[:16],
    }


@contextmanager
def _locked(out: Path) -> Iterator[None]:
    """One sweep at a time in a directory."""
    try:
        out.mkdir(parents=True, exist_ok=True)
        strangers = [p.name for p in out.iterdir() if p.name not in (ROWS, STAMP, TABLE)]
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


# --- workers


def ask_device(job: Row) -> Row:
    """What a worker finds: device, flags, versions.

    Raises:
        UserError: no such device here.
    """
    for line in Workers(job).lines(("default", False), []):
        if "refused" in line:
            raise UserError(line["refused"])
        if "machine" in line:
            return {
                k: v for k, v in line["machine"].items() if k not in ("flags", "matmul_precision")
            }
    raise UserError("the worker process ended before it had looked for a device")


def run(points: list[Point], job: Row, jobs: int, path: Path) -> dict[str, Row]:
    """Run the points in worker processes, and append each row to ``path`` as it is finished."""
    queues: dict[tuple[object, ...], list[Point]] = {}
    for point in points:  # what shares flags and a reference; trials have none
        shared = (*point.process, point.dtype, point.trial != "reference")
        queues.setdefault(shared, []).append(point)
    longest_first = sorted(queues.values(), key=len, reverse=True)
    rows: dict[str, Row] = {}
    by_key = {point.key: point for point in points}
    lock = threading.Lock()
    with open(path, "a", encoding="utf-8") as file, cli.progress() as bar:
        task = bar.add_task("points", total=len(points))

        def done(row: Row) -> None:
            with lock:
                rows[row["key"]] = row
                if not row.get("failed"):  # what went wrong is tried again next time
                    file.write(json.dumps(row) + "\n")
                    file.flush()
                point, verdict = by_key[row["key"]], row["verdict"]
                why = f": {row['why']}" if "why" in row else ""
                count = f"[{len(rows)}/{len(points)}]"
                line = f"{count} {point.says}: {verdict}{why} ({row.get('seconds', 0):.1f} s)"
                bar.console.print(line, markup=False, soft_wrap=True)
                bar.advance(task)

        workers = Workers(job)
        with ThreadPoolExecutor(jobs) as pool:
            try:
                for future in [pool.submit(workers.drain, q, done) for q in longest_first]:
                    future.result()
            except BaseException:  # Ctrl-C: what is finished is in the file
                workers.stop()
                raise
    return rows


class Workers:
    """The worker processes of one sweep."""

    def __init__(self, job: Row) -> None:
        self.job = job
        self.stopped = False
        self._children: set[subprocess.Popen[str]] = set()

    def stop(self) -> None:
        """End all of them and start no more."""
        self.stopped = True
        for child in list(self._children):
            _end(child)

    def drain(self, points: list[Point], done: Callable[[Row], None]) -> None:
        """Run points of one flag set; one that takes its process down does not end the rest."""
        left = {p.key: p for p in sorted(points, key=lambda p: (p.dtype, p.length, p.batch))}
        while left and not self.stopped:
            current, end = None, {}
            for line in self.lines(points[0].process, list(left.values())):
                if "begin" in line:
                    current = line["begin"]
                elif "key" in line:
                    left.pop(line["key"])
                    done(line)
                elif "ended" in line:
                    end = line
            if left and not self.stopped:
                key = current if current in left else next(iter(left))
                left.pop(key)
                why = f"its process ended with {end['ended']}: {end['last']}"
                done({"key": key, "verdict": "not run", "why": why, "failed": True})

    def lines(self, process: tuple[str, bool], points: list[Point]) -> Iterator[Row]:
        """The lines that one worker prints, and last ``{"ended": exit code, "last": ...}``."""
        flags, excess = process
        points_json = [point.to_json() for point in points]
        job = self.job | {"flags": flags, "excess": excess, "points": points_json}
        child = subprocess.Popen(
            [sys.executable, "-m", "tools.parity.worker"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            encoding="utf-8",
            env=environment(flags, excess),
            start_new_session=True,  # Ctrl-C is for this process; it ends the others
        )
        self._children.add(child)
        assert child.stdin and child.stdout and child.stderr
        stdin, stdout, stderr = child.stdin, child.stdout, child.stderr
        said: list[str] = []

        def read() -> None:  # or a worker that says much would wait for a reader
            with stderr:
                said.append(stderr.read())

        reader = threading.Thread(target=read, daemon=True)
        reader.start()
        try:
            with suppress(BrokenPipeError), stdin:
                stdin.write(json.dumps(job))
            for line in stdout:
                yield json.loads(line)
            code = child.wait()
            reader.join()
            yield {"ended": code, "last": last_line("".join(said))}
        finally:
            _end(child)
            child.wait()
            reader.join()
            stdout.close()
            self._children.discard(child)


def _end(child: subprocess.Popen[str]) -> None:
    """End a worker, and the process that it may have started for a trial."""
    if child.poll() is None:
        with suppress(ProcessLookupError):
            os.killpg(child.pid, signal.SIGKILL)


if __name__ == "__main__":
    cli.run(main)
