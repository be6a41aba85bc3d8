"""``python -m tools.bench``: what our commands cost, side by side in one run.

Whole processes, start-up, load and compilation included, run in turn so that a busy machine hits
all of them alike; medians, and ratios to the compiled float32 trace.
"""

import argparse
import importlib.util
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from rich.table import Table

from qwen_jax import source
from stages import cli
from stages.errors import UserError


def parser() -> argparse.ArgumentParser:
    result = cli.Parser(prog="python -m tools.bench", description=__doc__)
    source.add_model_arguments(result)
    result.add_argument("--repeat", type=int, default=3, metavar="N", help="default: 3")
    cli.add_json(result)
    return result


def commands(args: argparse.Namespace) -> dict[str, list[str]]:
    """Name -> command line without the interpreter, in the order in which they must first run."""
    given = []
    for name in ("model", "prompt", "prompt_file", "tokens"):
        if getattr(args, name) is not None:
            given += [f"--{name.replace('_', '-')}", str(getattr(args, name))]
    found = {"trace": ["-m", "qwen_jax.trace", *given, "--out", "trace", "--overwrite"]}
    if importlib.util.find_spec("torch"):
        found["oracle"] = ["-m", "oracle.trace", *given, "--out", "oracle", "--overwrite"]
        found["diff"] = ["-m", "tools.diff", "trace", "oracle"]
    model = ["--model", args.model] if args.model else []
    return found | {"localize": ["-m", "tools.localize", "trace", *model]}


def measure(found: dict[str, list[str]], repeat: int) -> dict[str, list[float]]:
    """Name -> seconds of each whole process.

    Raises:
        UserError: one of the commands failed.
    """
    seconds: dict[str, list[float]] = {name: [] for name in found}
    with tempfile.TemporaryDirectory() as scratch, cli.progress() as bar:
        task = bar.add_task("runs", total=repeat * len(found))
        for _ in range(repeat):
            for name, arguments in found.items():
                began = time.perf_counter()
                done = subprocess.run(
                    [sys.executable, *arguments], cwd=scratch, capture_output=True, text=True
                )
                seconds[name].append(time.perf_counter() - began)
                if done.returncode:
                    raise UserError(f"{name} failed: {done.stderr.strip() or done.stdout[-200:]}")
                bar.advance(task)
    return seconds


def main(argv: list[str]) -> int:
    args = parser().parse_args(argv)
    if args.repeat < 1:
        raise UserError(f"--repeat {args.repeat}: at least one run is needed")
    for name in ("prompt_file", "model"):  # the runs happen in a scratch directory
        value = getattr(args, name)
        if value is not None and Path(value).exists():
            setattr(args, name, str(Path(value).resolve()))
    source.read_tokens(args, source.open_model(args.model))
    seconds = measure(commands(args), args.repeat)
    middle = {name: statistics.median(values) for name, values in seconds.items()}
    data: dict[str, Any] = {"schema": 1, "repeat": args.repeat, "cold": {}}
    table = Table(box=None, header_style="bold", pad_edge=False)
    for name in ("whole process", "median s", "range s", "x trace"):
        table.add_column(name, justify="left" if name == "whole process" else "right")
    for name, values in seconds.items():
        ratio = middle[name] / middle["trace"]
        data["cold"][name] = {"seconds": values, "median": middle[name], "ratio": ratio}
        spread = f"{min(values):.1f} - {max(values):.1f}"
        table.add_row(name, f"{middle[name]:.1f}", spread, f"{ratio:.1f}")
    cli.report(args.json, data).print(table)
    return 0


if __name__ == "__main__":
    cli.run(main)
