"""Of which token ``localize`` says what error costs it."""

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Question:
    """What is asked of a trace.

    Attributes:
        row: of the sequence, the one after which the token comes; None is the last one, and
            negative ones count from the end.
        token: None is the one that the trace puts first.
        against: its rival; None is the one that exact arithmetic puts first, if that is known and
            another, else the best of the others.
        checked: compute what exact arithmetic has, and try the largest shares.
    """

    row: int | None = None
    token: int | None = None
    against: int | None = None
    checked: bool = True
