"""What can go wrong by the hand of the user, and the exit code each kind has."""

import sys
from pathlib import Path

SCRIPT = "qwen-stages"


def called(module: str) -> str:
    """How a command is called here: ``python -m tools.diff``, or ``qwen-stages diff``."""
    if Path(sys.argv[0]).stem != SCRIPT:
        return f"python -m {module}"
    package, _, name = module.partition(".")
    return f"{SCRIPT} {'oracle' if package == 'oracle' else name}"


class UserError(Exception):
    """Wrong use or bad input. The message is one line: expected, found, what to do. Exit code 2."""

    exit_code = 2


class NotComparable(UserError):
    """Two traces between which no number would mean anything. Exit code 3."""

    exit_code = 3
