"""Two generations of one prompt: the row at which their tokens part, and the traces until there."""

from itertools import takewhile

import numpy as np

from stages.entry import Entry
from stages.files import new_entry
from stages.manifest import FileEntry
from stages.trace import Trace


class Choice(Entry, frozen=True):
    """What one of two generations went on with.

    Attributes:
        step: the call that computed the row of this token.
        token: its id.
        likeliest: the id that the logits before it put first; None where they are not there.
        margin: how far the token is ahead of the other generation's, in logits (nats between the
            two); negative where it is behind.
    """

    step: int
    token: int
    likeliest: int | None
    margin: float | None


class Parted(Entry, frozen=True):
    """Where two generations part: ``row`` is the first with other tokens."""

    row: int
    a: Choice
    b: Choice


def shared_rows(a: Trace, b: Trace) -> int | None:
    """How many rows two traces have in common, if one or both go on otherwise, or longer, and what
    goes on is a generation: computed row by row. None where that is not so."""
    pairs = zip(a.tokens, b.tokens, strict=False)
    count = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], pairs))
    both = (a, b)
    if not count or all(len(trace.tokens) == count for trace in both):
        return None
    return count if all(_generated_from(trace, count) for trace in both) else None


def _generated_from(trace: Trace, row: int) -> bool:
    """Whether every row from ``row`` on was computed in a call of its own."""
    ends = np.cumsum(trace.steps)
    left = len(trace.tokens) - row
    return not left or (row in ends and bool((np.asarray(trace.steps)[ends > row] == 1).all()))


def parted(a: Trace, b: Trace, row: int) -> Parted | None:
    """The tokens with which two generations go on at ``row``; None where one ends there."""
    if row in (len(a.tokens), len(b.tokens)):
        return None
    return Parted(row, _choice(a, b.tokens[row], row), _choice(b, a.tokens[row], row))


def _choice(trace: Trace, other: int, row: int) -> Choice:
    token, step = trace.tokens[row], trace.step_of(row)
    head = trace.arch.head.name
    before = len(trace.tokens) - row + 1  # the row before it is that many from the end
    if (head, None) not in trace.entries or trace.rows_of(head, None) < before:
        return Choice(step, token, None, None)
    logits = trace.read_rows(head, None)[-before].astype(np.float64)
    return Choice(step, token, int(logits.argmax()), float(logits[token] - logits[other]))


class Prefix(Trace):
    """The first rows of a trace: what is after them is no part of their computation."""

    def __init__(self, whole: Trace, rows: int) -> None:
        self.whole, self.less = whole, len(whole.tokens) - rows
        held = {key: whole.rows_of(*key) - self.less for key in whole.entries}
        entries = {key: self._entry(*key, n, rows) for key, n in held.items() if n > 0}
        tokens, positions = whole.tokens[:rows], whole.positions[:rows]
        super().__init__(whole.path, whole.manifest, entries, whole.config, tokens, positions)
        self.dtype = whole.dtype
        counts = np.diff(np.minimum(np.cumsum((0, *whole.steps)), rows))
        self.steps = tuple(counts[counts > 0].tolist())

    def _entry(self, name: str, layer: int | None, held: int, rows: int) -> FileEntry:
        stage, entry = self.whole.arch.stage[name], self.whole.entries[name, layer]
        sizes = dict(zip(entry.axes, entry.shape, strict=True)) | {"S": rows, stage.row_axis: held}
        shape = tuple(sizes[axis] for axis in stage.axes)
        return new_entry(stage, layer, shape, rows, dtype=entry.dtype)

    def read(self, stage: str, layer: int | None) -> np.ndarray:
        """See ``Trace.read``."""
        value = self.whole.read_rows(stage, layer)
        return value[tuple(map(slice, self.entries[stage, layer].shape))]
