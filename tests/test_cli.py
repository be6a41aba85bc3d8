"""What every command has in common: exit codes, one line for an error, nothing foreign printed."""

import gc
import io
import sys
from contextlib import suppress
from pathlib import Path

import pytest
from msgspec.structs import replace
from rich.console import Console
from rich.table import Table

from qwen_jax import cli
from stages import manifest
from stages.errors import NotComparable, UserError

ROOT = Path(__file__).parent.parent


def ended(capsys, monkeypatch, error, argv=("x",)):
    """(exit code, what it wrote to stderr) of a command that ends so."""

    def main(argv):
        raise error

    monkeypatch.setattr(sys, "argv", list(argv))
    with pytest.raises(SystemExit) as end:
        cli.run(main)
    captured = capsys.readouterr()
    assert captured.out == ""
    return end.value.code, captured.err


def test_a_bug_of_ours_is_one_line_and_code_4(capsys, monkeypatch):
    monkeypatch.delenv("QWEN_STAGES_TRACEBACK", raising=False)
    code, told = ended(capsys, monkeypatch, KeyError("a\nb" * 1000))
    assert code == 4 and told.count("\n") == 1 and len(told) <= 401
    assert "a bug in this program" in told and "test_cli.py, line" in told
    assert told.endswith("QWEN_STAGES_TRACEBACK=1 shows more, for a report\n")


def test_the_traceback_is_there_for_who_asks(capsys, monkeypatch):
    monkeypatch.setenv("QWEN_STAGES_TRACEBACK", "1")
    code, told = ended(capsys, monkeypatch, KeyError("x"))
    assert code == 4 and told.startswith("Traceback") and told.endswith("KeyError: 'x'\n")


@pytest.mark.parametrize(
    ("error", "code"),
    [(UserError, 2), (NotComparable, 3), (KeyboardInterrupt, 130), (BrokenPipeError, 141),
     (OSError, 2), (KeyError, 4)],
)  # fmt: skip
def test_no_error_ends_as_a_verdict_does(error, code):
    assert cli.exit_code(error()) == code


def test_no_garbage_is_looked_for_while_jax_is_imported():
    assert gc.isenabled()
    with suppress(ImportError), cli.undisturbed():
        assert not gc.isenabled()
        raise ImportError
    assert gc.isenabled()
    gc.unfreeze()


@pytest.mark.parametrize("error", [UserError, KeyboardInterrupt, ValueError])
@pytest.mark.parametrize("text", ["\x1b[2J\x1b[31mred", "a\rb", "a\x08b", "\u202eabc", "a\x9b31m"])
def test_no_control_character_of_a_file_reaches_the_terminal(capsys, monkeypatch, error, text):
    code, told = ended(capsys, monkeypatch, error(text))
    assert told[:-1].isprintable() and told.endswith("\n")


def test_a_long_error_keeps_its_ends(capsys, monkeypatch):
    code, told = ended(capsys, monkeypatch, UserError("begin " + "x" * 5000 + " what to do"))
    assert code == 2 and len(told) == 401
    assert told.startswith("error: begin x") and told.endswith("x what to do\n")


def test_what_is_printed_is_printable_too(capsys):
    table = Table("a\x1b[1m")
    table.add_row("\x1b]0;title\x07")
    show = cli.console()
    show.print(table)
    show.print("plain \x1b[31m\u2028 line")
    printed = capsys.readouterr().out
    assert all(line.isprintable() for line in printed.split("\n"))
    assert "\\x1b[31m\\u2028 line" in printed and "\\x1b]0;title" in printed


@pytest.mark.parametrize("width", [60, 80, 120])
@pytest.mark.parametrize("columns", [1, 2, 9, 24])
def test_a_table_is_folded_and_never_cut(width, columns):
    table = Table(box=None, pad_edge=False)
    names = ["stage", *(f"column {number}" for number in range(columns))]
    for name in names:
        table.add_column(name)
    table.add_row("post_ffn_residual", *(f"{number}.000e-07" for number in range(columns)))
    show = Console(file=io.StringIO(), width=width)
    cli.fold(show, table)
    lines = show.file.getvalue().splitlines()
    assert max(map(len, lines)) <= width and "\u2026" not in show.file.getvalue()
    heads = [line for line in lines if line.startswith("stage")]
    rows = [line for line in lines if line.startswith("post_ffn_residual")]
    assert len(heads) == len(rows) and (width > 100 or columns < 9 or len(rows) > 1)
    assert "".join(row.removeprefix("post_ffn_residual") for row in rows).split() == [
        f"{number}.000e-07" for number in range(columns)
    ]


def test_a_hostile_manifest_is_told_as_it_is(tmp_path, run_cli):
    """Its producer is printed by diff."""
    run_cli("qwen_jax.trace", "--tokens=1,2", "--out", tmp_path / "a", "--stages=lm_head")
    found = manifest.read(tmp_path / "a")
    told = replace(found, producer={"name": "\x1b[31mred", "device": "\x07", "backend": "x"})
    manifest.write(tmp_path / "a", told)
    result = run_cli("tools.diff", tmp_path / "a", tmp_path / "a")
    assert result.code == 0 and "\x1b" not in result.stdout and "\\x1b[31mred" in result.stdout
