"""What every command has in common: one-line errors, exit codes, tables, progress, JSON.

Exit codes: 0 agree or clean, 1 differ or fault, 2 wrong use or bad input, 3 not comparable.
"""

import argparse
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from stages.errors import UserError


class Parser(argparse.ArgumentParser):
    """argparse with the project's errors: one line, exit code 2."""

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message} (see {self.prog} --help)")


def run(main: Callable[[list[str]], int]) -> NoReturn:
    """Run a command's ``main`` and exit with its code; user errors are one line on stderr."""
    try:
        code = main(sys.argv[1:])
        sys.stdout.flush()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        code = error.exit_code
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        code = 130
    except BrokenPipeError:  # the reader of our output went away: `... | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = 0
    sys.exit(code)


def console(to_stderr: bool = False) -> Console:
    """Where people read. Wide enough for our tables when piped; colour only in a terminal."""
    stream = sys.stderr if to_stderr else sys.stdout
    width = None if stream.isatty() else 110
    return Console(file=stream, width=width, highlight=False, soft_wrap=True)


def progress() -> Progress:
    """A progress bar on stderr that a pipe or a log never sees."""
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        console=Console(file=sys.stderr),
        transient=True,
        disable=not sys.stderr.isatty(),
    )


def add_json(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--json", metavar="FILE", help="also write the result as JSON to FILE; - is stdout"
    )


def report(target: str | None, data: dict[str, Any]) -> Console:
    """Write ``data`` where ``--json`` says, and return the console for people: stdout, or stderr
    when the JSON itself goes to stdout."""
    if target == "-":
        print(json.dumps(data, indent=1))
    elif target:
        try:
            Path(target).write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8")
        except OSError as error:
            raise UserError(f"--json {target}: {error.strerror}") from None
    return console(to_stderr=target == "-")


def size(count: float) -> str:
    """Bytes for people: 1.5 MB."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} TB"
