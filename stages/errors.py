"""What can go wrong by the hand of the user, and the exit code each kind has."""


class UserError(Exception):
    """Wrong use or bad input. The message is one line: expected, found, what to do. Exit code 2."""

    exit_code = 2


class NotComparable(UserError):
    """Two traces between which no number would mean anything. Exit code 3."""

    exit_code = 3
