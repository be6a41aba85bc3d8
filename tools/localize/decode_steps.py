"""An engine that runs in calls, a prompt in chunks and then token by token: in which of them an
error is."""

from dataclasses import dataclass
from typing import Any

import numpy as np

from stages.trace import Trace
from stages.verdict import Suspect, bad_slices, ranges


@dataclass(frozen=True)
class When:
    """The calls of an engine in which an error is.

    Attributes:
        row: the first row of the first of them.
        step, position: the first call, from 0, and the position of its first wrong row.
        steps: all of them, such as "3-".
        says: for people.
    """

    row: int
    step: int
    position: int
    steps: str
    says: str

    def to_json(self) -> dict[str, Any]:
        """What an element of ``faults`` says of it."""
        return {"steps": self.steps, "first": {"step": self.step, "position": self.position}}


def wrong_rows(suspect: Suspect) -> list[int]:
    """The rows of the sequence in which a suspect's error is."""
    mask = suspect.masks.get("position", np.zeros(1, bool))
    if not mask.any() or mask.all():  # another axis stands out more
        mask = bad_slices(suspect.item, suspect.expected)["position"]
    return [suspect.item.skipped_rows + int(row) for row in np.flatnonzero(mask)]


def wrong_calls(trace: Trace, suspect: Suspect) -> np.ndarray:
    """In which calls of the engine a suspect's error is: [calls]; all, where none is known."""
    wrong = np.zeros(len(trace.steps), bool)
    wrong[[trace.step_of(row) for row in wrong_rows(suspect)]] = True
    return wrong if wrong.any() else ~wrong


def when(trace: Trace, suspect: Suspect) -> When | None:
    """In which calls a suspect's error is; None where there was one call, or it is in all."""
    rows, wrong = wrong_rows(suspect), wrong_calls(trace, suspect)
    if wrong.all():
        return None
    step, position = trace.step_of(rows[0]), trace.positions[rows[0]]
    return When(
        row=sum(trace.steps[:step]),
        step=step,
        position=position,
        steps=ranges(wrong),
        says=f"{_said(trace.steps, wrong)} (step {step}, position {position})",
    )


def decoded_from(steps: tuple[int, ...]) -> int:
    """The first of the calls of one token that end a run; of a run of nothing else, the second."""
    after = next((n for n, rows in enumerate(reversed(steps)) if rows > 1), len(steps) - 1)
    return len(steps) - after


def _said(steps: tuple[int, ...], wrong: np.ndarray) -> str:
    first, count = int(wrong.argmax()), int(wrong.sum())
    on = bool(wrong[first:].all())
    token = first - decoded_from(steps)
    if token < 0:
        if on and first:
            return f"from call {first} on"
        return f"in call{'s' * (count > 1)} {ranges(wrong)}"
    name = "the first decoded token" if token == 0 else f"decoded token {token + 1}"
    if count == 1:
        return f"in {name}"
    return f"from {name} on" if on else f"in {count} decoded tokens, the first of them {token + 1}"
