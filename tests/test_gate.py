"""The gate: the quick sweep of the demo model passes, and the README shows what it prints."""

import re

from stages.architectures import ALL_NAMES
from tests.conftest import ROOT
from tests.test_readme import blocks, commands, normal

COMMAND = "python -m tools.parity --sweep quick"


def masked(line: str) -> str:
    """What was run, without what was found: where nothing is required, that is a matter of the
    machine. What is required is held by the exit code."""
    line = re.sub(rf"\b({'|'.join(ALL_NAMES)})\b", "STAGE", normal(line))
    return " ".join(line.split()[:5])


def test_the_quick_sweep_passes_and_the_readme_shows_it(run_cli) -> None:
    readme = blocks((ROOT / "README.md").read_text("utf-8"))
    parts = [
        part for block in readme if block.language == "console" for part in commands(block.code)
    ]
    (shown,) = [lines for command, lines in parts if command == COMMAND]
    done = run_cli(*COMMAND.split()[2:])
    assert done.code == 0, done.stdout + done.stderr
    assert [masked(line) for line in done.stdout.splitlines()] == [masked(line) for line in shown]
