"""What every command has in common: one-line errors, exit codes, tables, progress, JSON.

Exit codes: 0 agree or clean, 1 differ or fault, 2 wrong use or bad input, 3 not comparable, 4 a bug
of ours.
"""

import argparse
import gc
import io
import json
import math
import os
import signal
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn, TextIO

import msgspec
from rich.console import (
    Console,
    ConsoleOptions,
    ConsoleRenderable,
    RenderableType,
    RenderHook,
    RenderResult,
)
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.segment import Segment
from rich.table import Table
from rich.text import Text

from stages.errors import UserError, called
from stages.version import NAME, version

BUG = 4  # exit code
MOST = 400  # characters of an error
WIDTH = 120  # of a console that is no terminal


class _Version(argparse.Action):
    """Print the project's version and end. Looked up only then."""

    def __call__(self, parser: argparse.ArgumentParser, *args: Any) -> NoReturn:
        print(f"{NAME} {version()}")
        parser.exit()


class Parser(argparse.ArgumentParser):
    """argparse with the project's errors: one line, exit code 2. ``prog`` is a module."""

    def __init__(self, prog: str, description: str | None, **more: Any) -> None:
        plain = description and description.replace("``", "")  # docstrings are written for Sphinx
        super().__init__(prog=called(prog), description=plain, **more)
        self.add_argument("--version", action=_Version, nargs=0, help="print the version and end")

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message} (see {self.prog} --help)")


def run(main: Callable[[list[str]], int]) -> NoReturn:
    """Run a command's ``main`` and exit with its code; user errors are one line on stderr."""
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:  # closed: `>&-`
            setattr(sys, name, open(os.devnull, "w"))  # noqa: SIM115 -- for as long as we live
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # a token's text, in an ASCII terminal
    try:
        code = main(sys.argv[1:])
        sys.stdout.flush()
    except (Exception, KeyboardInterrupt) as error:
        _tell(error)
        code = exit_code(error)
    leave(code)


def _tell(error: BaseException) -> None:
    """What a user is told of an error that ended a command."""
    if isinstance(error, UserError):
        _complain(f"error: {error}")
    elif isinstance(error, KeyboardInterrupt):
        _complain(": ".join(filter(None, ["interrupted", str(error)])))
    elif isinstance(error, BrokenPipeError):  # the reader of our output went away: `... | head`
        _discard(sys.stdout)
    elif isinstance(error, OSError):  # of our own output: a file's is a UserError
        _discard(sys.stdout)
        where = f"{error.filename}: " if error.filename else ""
        _complain(f"error: {where}{error.strerror or error}")
    elif os.environ.get("QWEN_STAGES_TRACEBACK"):
        traceback.print_exception(error)
    else:  # a bug of ours: a stack helps no user
        _complain(f"error: {_bug(error)}")


@contextmanager
def undisturbed() -> Iterator[None]:
    """Around the import of JAX, which makes 200,000 objects and no garbage: none is looked for, now
    or later. JAX is told of each search, and an interrupt that comes then is lost."""
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        gc.enable()


def exit_code(error: BaseException) -> int:
    """What a command ends with after this error: never 0 or 1, which are verdicts."""
    if isinstance(error, UserError):
        return error.exit_code
    if isinstance(error, KeyboardInterrupt):
        return 128 + signal.SIGINT
    if isinstance(error, BrokenPipeError):
        return 128 + signal.SIGPIPE
    return UserError.exit_code if isinstance(error, OSError) else BUG


def printable(text: str) -> str:
    """Text as it may go to a terminal. What a file says could move the cursor, change colours or
    turn the writing round."""
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() or c == "\n" else ascii(c)[1:-1] for c in text)


def _complain(text: str) -> None:
    """One line on stderr; of a very long one, where it begins and what it ends with."""
    line = printable(" ".join(text.splitlines()))  # a file's name may hold a line break
    if len(line) > MOST:
        line = f"{line[: MOST // 2]} ... {line[5 - MOST // 2 :]}"
    print(line, file=sys.stderr)


def _bug(error: BaseException) -> str:
    """One line on an error that nobody expected."""
    frame = traceback.extract_tb(error.__traceback__)[-1]
    what = " ".join(f"{type(error).__name__}: {error}".split())[:200]
    return (
        f"a bug in this program, not in what it was given: {what} ({Path(frame.filename).name}, "
        f"line {frame.lineno}); QWEN_STAGES_TRACEBACK=1 shows more, for a report"
    )


def _discard(stream: TextIO) -> None:
    """What could not be written goes nowhere, or Python would try again at its end, and say so."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def leave(code: int) -> NoReturn:
    """End the process."""
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except OSError:
            _discard(stream)
    gc.freeze()  # or Python searches all of JAX for garbage once more, a fifth of a short trace
    sys.exit(code)


class _Printable(RenderHook):
    """Everything that a console is given goes through ``printable``."""

    def process_renderables(self, renderables: list[ConsoleRenderable]) -> list[ConsoleRenderable]:
        return [_Foreign(each) for each in renderables]


class _Foreign:
    def __init__(self, inner: RenderableType) -> None:
        self.inner = inner

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        for text, style, control in console.render(self.inner, options):
            yield Segment(text if control else printable(text), style, control)


class _Console(Console):
    def on_broken_pipe(self) -> NoReturn:
        raise BrokenPipeError  # for ``run``


def console(to_stderr: bool = False) -> Console:
    """Where people read. Wide enough for our tables when piped; colour only in a terminal."""
    stream = sys.stderr if to_stderr else sys.stdout
    return _plain(stream, None if stream.isatty() else WIDTH)


def _plain(stream: TextIO, width: int | None, **more: Any) -> Console:
    """A console that takes nothing in a foreign name for markup, emoji or a control character."""
    made = _Console(
        file=stream, width=width, highlight=False, markup=False, emoji=False, soft_wrap=True, **more
    )
    made.push_render_hook(_Printable())
    return made


class Printed:
    """What a function prints, for any console of rich, and as text. It is printed by a console of
    ours first: a user's own takes ``[x]`` in the name of a file for markup, and leaves it out."""

    def __init__(self, show: Callable[[Console], None]) -> None:
        self.show = show

    def __str__(self) -> str:
        return self._text(WIDTH)

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        colour = {"force_terminal": True, "color_system": console.color_system}
        text = self._text(options.max_width, **colour if console.color_system else {})
        yield Text.from_ansi(text, no_wrap=True, overflow="ignore", end="")

    def _text(self, width: int, **more: Any) -> str:
        text = io.StringIO()
        self.show(_plain(text, width, **more))
        return text.getvalue()


def fold(show: Console, table: Table, keys: int = 1) -> None:
    """Print a table whole: where the terminal is too narrow, some columns below the others, each
    time beside the first ``keys``."""
    every = list(zip(*(list(column.cells) for column in table.columns), strict=True))

    def some(places: list[int]) -> Table:
        part = Table(box=None, header_style="bold", pad_edge=False, padding=table.padding)
        for place in places:
            column = table.columns[place]
            part.add_column(column.header, justify=column.justify, no_wrap=True)
        for row, cells in zip(table.rows, every, strict=True):
            part.add_row(*(cells[place] for place in places), style=row.style)
        return part

    def width(places: list[int]) -> int:
        return show.measure(some(places), options=show.options.update(width=10_000)).maximum

    # Columns stand side by side with the same gap between any two: each is measured once.
    alone = [width([place]) for place in range(len(table.columns))]
    gap = width([0, 1]) - alone[0] - alone[1] if len(alone) > 1 else 0
    shown = list(range(keys))
    for place in range(keys, len(alone)):
        wide = sum(alone[each] + gap for each in (*shown, place)) - gap
        if wide > show.width and len(shown) > keys:
            show.print(some(shown), "")
            shown = list(range(keys))
        shown.append(place)
    show.print(some(shown))


def progress(more: str = "") -> Progress:
    """A progress bar on stderr that a pipe or a log never sees; ``more`` is a column's format."""
    return Progress(
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn(more),
        TimeRemainingColumn(),
        console=console(to_stderr=True),
        transient=True,
        disable=not sys.stderr.isatty(),
    )


def add_report(parser: argparse.ArgumentParser) -> None:
    """--report, refused where FILE could not be written."""
    help = "also write a page to look at, as HTML, or a text to paste, as Markdown (FILE.md)"
    parser.add_argument("--report", type=page, metavar="FILE.html", help=help)


def add_json(parser: argparse.ArgumentParser) -> None:
    """--json, refused where FILE could not be written: before the work, not after it."""
    parser.add_argument(
        "--json",
        type=_json_target,
        metavar="FILE",
        help="also write the result as JSON to FILE; - is stdout",
    )


def _json_target(text: str) -> str:
    return text if text == "-" else str(writable(text))


def writable(text: str) -> Path:
    """A file to write to, for argparse: refused where it could not be written."""
    if Path(text).is_dir():
        raise argparse.ArgumentTypeError(f"{text!r} is a directory")
    return writable_directory(text)


def page(text: str) -> Path:
    """A page to write, for argparse: named as one, or a trace could be lost by a slip."""
    if not text.endswith((".html", ".htm", ".md")):
        raise argparse.ArgumentTypeError(f"{text!r}: expected a name that ends with .html or .md")
    return writable(text)


def writable_directory(text: str) -> Path:
    """A directory to write to, for argparse: it, or the one above it, is there."""
    path = Path(text)
    if not path.parent.is_dir():
        raise argparse.ArgumentTypeError(f"no such directory: {str(path.parent)!r}")
    if not os.access(path if path.exists() else path.parent, os.W_OK):
        raise argparse.ArgumentTypeError(f"{text!r} cannot be written")
    return path


def report(target: str | None, data: dict[str, Any] | msgspec.Struct) -> Console:
    """Write ``data`` where ``--json`` says, and return the console for people: stdout, or stderr
    when the JSON itself goes to stdout. What is not finite becomes null: JSON has no NaN."""
    text = json.dumps(_finite(msgspec.to_builtins(data)), indent=1, allow_nan=False)
    if target == "-":
        print(text)
    elif target:
        try:
            Path(target).write_text(text + "\n", encoding="utf-8")
        except OSError as error:
            raise UserError(f"--json {target}: {error.strerror}") from None
    return console(to_stderr=target == "-")


def _finite(data: Any) -> Any:
    if isinstance(data, dict):
        return {key: _finite(value) for key, value in data.items()}
    if isinstance(data, list | tuple):
        return [_finite(value) for value in data]
    return None if isinstance(data, float) and not math.isfinite(data) else data


def size(count: float) -> str:
    """Bytes for people: 1.5 MB."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} TB"
