"""The object of ``tools.parity --json``."""

from typing import Any, Literal

from msgspec import UNSET, UnsetType, field

from stages.entry import Entry, StageOfLayer


class WorstDifference(StageOfLayer, frozen=True):
    """The largest relative L2 and where it is; null is not finite."""

    worst: float | None


class LocalBits(StageOfLayer, frozen=True):
    """The fewest significant bits that any stage has, and as measured, without allowances."""

    worst: float
    unadjusted: float


class ParityFault(StageOfLayer, frozen=True):
    """A stage with fewer bits than the point's arithmetic leaves: ``klass`` where ``expected`` was
    asked for."""

    bits: float
    klass: str = field(name="class")
    expected: str
    why: str


class ViolationRow(Entry, frozen=True):
    """Where a rule for compiled programs does not hold; see ``tools.parity.gpu.check``."""

    rule: Literal["products", "rounding", "outputs", "atomics", "calls"]
    program: str
    stage: str | None
    instruction: str
    products: str


class ProgramRow(Entry, frozen=True):
    """What was found in one program that was compiled for a GPU; see ``check.Checked``."""

    program: str
    products_by: Literal["Triton", "cuBLAS"]
    kernels: int
    instructions: int
    products: list[str]
    approximate: dict[str, int]
    contracted: int


class PointResult(Entry, frozen=True):
    """One point of a sweep.

    Attributes:
        point: its axes, as in the sweep's file.
        failure: why it fails the sweep; null if it does not.
        why: it was not run; ``failed``: because something went wrong.
        captured: of the trial "stages", the stage whose capture changed something.
        threads: of the trial "threads", how many each side had.
        violations, programs: of ``--aot``.
    """

    point: dict[str, str | int | float | bool | None]
    failure: str | None
    verdict: Literal["identical", "precision", "fault", "not run", "checked", "violation"]
    why: str | UnsetType = UNSET
    failed: bool | UnsetType = UNSET
    seconds: float | UnsetType = UNSET
    identical: bool | UnsetType = UNSET
    stages: int | UnsetType = UNSET
    stages_differing: int | UnsetType = UNSET
    first_difference: StageOfLayer | UnsetType | None = UNSET
    relative_l2: WorstDifference | UnsetType = UNSET
    argmax_equal: int | UnsetType = UNSET
    positions: int | UnsetType = UNSET
    kl_max: float | UnsetType | None = UNSET
    local_bits: LocalBits | UnsetType = UNSET
    classes: dict[str, str] | UnsetType = UNSET
    faults: list[ParityFault] | UnsetType = UNSET
    captured: str | UnsetType = UNSET
    threads: tuple[int, int] | UnsetType = UNSET
    violations: list[ViolationRow] | UnsetType = UNSET
    programs: list[ProgramRow] | UnsetType = UNSET


class ParityResult(Entry, frozen=True):
    """``tools.parity --json``; ``compiled_for`` is the GPU of ``--aot``."""

    schema: Literal[1]
    verdict: Literal["pass", "fail", "not_comparable"]
    sweep: str
    model: str
    device: Literal["cpu", "gpu"]
    compiled_for: str | None
    machine: dict[str, Any]
    seconds: float
    points: list[PointResult]
