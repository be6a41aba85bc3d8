"""How far one trace has come from another, as data; ``tools.diff`` measures it and prints it."""

from dataclasses import asdict, dataclass
from functools import cached_property
from itertools import pairwise
from typing import Any, Literal

import msgspec
import numpy as np
from msgspec import UNSET, Struct, UnsetType

from stages.architecture import Key, place_of
from stages.compare import Difference, LogitsDifference
from stages.entry import Entry, StageOfLayer
from stages.generations import Parted
from stages.preflight import Preflight
from stages.trace import Trace
from tools.shown import Shown

SCHEMA: Literal[2] = 2


@dataclass(frozen=True)
class StepDifference:
    """What one call computed: its first and last row, and the largest relative L2 of any of them
    in any stage, at ``row`` of ``stage``."""

    step: int
    rows: tuple[int, int]
    relative_l2: float
    row: int
    stage: str
    layer: int | None


class Worst(Struct, frozen=True, array_like=True):
    """A slice, and its relative L2."""

    index: int
    relative_l2: float | None


class WorstSlices(Entry, frozen=True):
    """The slice of each axis that is furthest apart."""

    position: Worst | UnsetType = UNSET
    head: Worst | UnsetType = UNSET
    channel: Worst | UnsetType = UNSET


class DifferenceRow(Entry, frozen=True):
    """One stage of two traces; see ``stages.compare.Difference``. What is not finite is null."""

    stage: str
    layer: int | None
    count: int
    identical: bool
    max_abs: float | None
    at: list[int]
    rms: float | None
    relative_l2: float | None
    cosine: float | None
    ulp_max: int
    ulp_0: float
    ulp_1: float
    nonfinite_a: int
    nonfinite_b: int
    unmatched: int
    worst: WorstSlices


class LogitsRow(Entry, frozen=True):
    """What the difference means for the next token; see ``stages.compare.LogitsDifference``."""

    positions: int
    argmax_equal: int
    top5_overlap: float
    kl_mean: float | None
    kl_max: float | None
    margin: float | None


class StepEntry(Entry, frozen=True):
    """A call: its first and last row, and the largest relative L2 of any row in any stage."""

    step: int
    rows: tuple[int, int]
    relative_l2: float | None
    row: int
    stage: str
    layer: int | None


class DiffResult(Entry, frozen=True):
    """``tools.diff --json``."""

    schema: Literal[2]
    verdict: Literal["agree", "differ", "not_comparable"]
    why: str | UnsetType = UNSET
    a: str | UnsetType = UNSET
    b: str | UnsetType = UNSET
    notes: list[str] | UnsetType = UNSET
    tolerance: float | UnsetType = UNSET
    smallest_tolerance: float | UnsetType | None = UNSET
    parting: StageOfLayer | UnsetType | None = UNSET
    only_a: list[StageOfLayer] | UnsetType = UNSET
    only_b: list[StageOfLayer] | UnsetType = UNSET
    rows: list[DifferenceRow] | UnsetType = UNSET
    logits: LogitsRow | UnsetType | None = UNSET
    steps: list[StepEntry] | UnsetType = UNSET
    parted: Parted | UnsetType | None = UNSET


@dataclass(frozen=True)
class TraceDifference(Shown):
    """How far trace ``a`` has come from ``b``, stage by stage. Prints as the command does.

    Attributes:
        ready: what was made sure of before anything was compared.
        rows: every stage that was compared, in computation order.
        logits: what the difference means for the next token; None where a side has no logits.
        tolerance: the relative L2 that still agrees.
        parted: where two generations part; the rows until there were compared.
        every_layer: print a row for every layer.
        given: the arguments of ``tools.localize`` besides the first trace.
    """

    a: Trace
    b: Trace
    ready: Preflight
    rows: dict[Key, Difference]
    logits: LogitsDifference | None
    tolerance: float
    parted: Parted | None = None
    every_layer: bool = False
    given: tuple[str, ...] = ()

    @property
    def parting(self) -> Key | None:
        """The first stage, in computation order, that is further apart than the tolerance."""
        return next((k for k, row in self.rows.items() if not row.within(self.tolerance)), None)

    @property
    def agree(self) -> bool:
        return self.parting is None and self.parted is None

    @property
    def stepped(self) -> Trace:
        """The trace by whose calls rows are counted: A's, where it has several, or B's."""
        return self.a if len(self.a.steps) > 1 else self.b

    @cached_property
    def by_row(self) -> np.ndarray:
        """[stages, T] relative L2; 0 for rows that were not compared."""
        length = len(self.a.tokens)
        before = [length - len(row.rows) for row in self.rows.values()]
        rows = zip(self.rows.values(), before, strict=True)
        return np.stack([np.pad(row.rows, (n, 0)) for row, n in rows])

    @property
    def by_step(self) -> list[StepDifference]:
        """The worst row of each call; empty where both sides computed all rows in one."""
        ends = np.cumsum(self.stepped.steps).tolist()
        if len(ends) == 1:
            return []
        keys, found = list(self.rows), []
        for step, (begin, end) in enumerate(pairwise([0, *ends])):
            stage, row = divmod(int(self.by_row[:, begin:end].argmax()), end - begin)
            worst = float(self.by_row[stage, begin + row])
            found.append(StepDifference(step, (begin, end - 1), worst, begin + row, *keys[stage]))
        return found

    @property
    def smallest_tolerance(self) -> float | None:
        """The smallest tolerance with which all would agree; None where none would do."""
        if any(row.unmatched for row in self.rows.values()):
            return None
        return max(row.relative_l2 for row in self.rows.values())

    def to_json(self) -> dict[str, Any]:
        """The object of ``--json``."""
        found = DiffResult(
            schema=SCHEMA,
            verdict="agree" if self.agree else "differ",
            a=str(self.a.path),
            b=str(self.b.path),
            notes=self.ready.notes,
            tolerance=self.tolerance,
            smallest_tolerance=self.smallest_tolerance,
            parting=self.parting and StageOfLayer(*self.parting),
            only_a=[StageOfLayer(*key) for key in self.ready.only_a],
            only_b=[StageOfLayer(*key) for key in self.ready.only_b],
            rows=[_row(*key, row) for key, row in self.rows.items()],
            logits=LogitsRow(**asdict(self.logits)) if self.logits else None,
            steps=[StepEntry(**asdict(step)) for step in self.by_step],
            parted=self.parted,
        )
        return msgspec.to_builtins(found)

    def __repr__(self) -> str:
        said = "agree" if self.parting is None else f"differ from {place_of(*self.parting)} on"
        return f"<TraceDifference of {self.a.path} and {self.b.path}: {said}>"


def _row(stage: str, layer: int | None, row: Difference) -> DifferenceRow:
    worst = WorstSlices(**{axis: Worst(*each) for axis, each in row.worst.items()})
    return DifferenceRow(stage, layer, **row.to_json() | {"at": list(row.at), "worst": worst})


def sentence(found: TraceDifference) -> str:
    """The verdict in one sentence."""
    parting = found.parting
    if parting is None:
        return f"agree: every stage within relative L2 {found.tolerance:g}"
    row = found.rows[parting]
    return (
        f"differ: the traces part at {place_of(*parting)}: relative L2 {row.relative_l2:.1e}, "
        f"tolerance {found.tolerance:g}"
    )
