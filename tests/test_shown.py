"""What is printed: names as they are, in any console, and one table for all of its places."""

import io

import pytest
import rich
from rich.console import Console
from rich.text import Text

import qwen_jax
from qwen_jax import cli
from qwen_jax.table import Table
from stages.trace import Trace
from tools.diff import diff, main

NAME = "a[bold]x[/]"


@pytest.fixture(scope="module")
def trace(tmp_path_factory: pytest.TempPathFactory) -> Trace:
    return qwen_jax.trace_model(tokens=(5, 6, 7), out=tmp_path_factory.mktemp("shown") / NAME)


def test_a_name_in_square_brackets_is_printed(
    trace: Trace, capsys: pytest.CaptureFixture[str]
) -> None:
    """rich takes such for markup, and ``[/]`` alone for a mistake in it."""
    found = diff(trace, trace)
    assert NAME in str(found)
    text = io.StringIO()
    Console(file=text, width=300).print(found)
    rich.print(found)
    main([str(trace.path), str(trace.path)])
    out = capsys.readouterr().out
    assert NAME in text.getvalue() and out.replace("\n", "").count(NAME) == 4


def test_colours_pass_through_a_users_console(trace: Trace) -> None:
    def show(console: Console) -> None:
        console.print(Text("red", "bold red"), NAME)

    plain, coloured = io.StringIO(), io.StringIO()
    Console(file=plain, width=80).print(cli.Printed(show))
    Console(file=coloured, width=80, force_terminal=True, color_system="standard").print(
        cli.Printed(show)
    )
    assert plain.getvalue() == f"red {NAME}\n"
    assert "\x1b[1;31mred\x1b[0m" in coloured.getvalue()


def test_a_progress_bar_has_the_name_of_a_trace() -> None:
    bar = cli.progress()
    bar.add_task(f"replaying {NAME}", total=1)
    column = bar.columns[0]
    assert str(column(bar.tasks[0])) == f"replaying {NAME}"  # type: ignore[operator]


def test_a_table_is_the_same_everywhere() -> None:
    table = Table("t", ("stage", "n"), [("a|b", "1"), (Text(NAME, "red"), "10")])
    assert table.markdown == f"| stage | n |\n| --- | --- |\n| a\\|b | 1 |\n| {NAME} | 10 |\n"
    show = Console(file=io.StringIO(), width=80, color_system=None)
    show.print(table.terminal)
    lines = [line.rstrip() for line in show.file.getvalue().splitlines()]  # type: ignore[attr-defined]
    assert lines == ["stage         n", "a|b           1", f"{NAME}  10"]
