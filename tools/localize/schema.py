"""The object of ``tools.localize --json``."""

from typing import Any, Literal

from msgspec import UNSET, UnsetType

from stages.entry import Axes, Entry, StageOfLayer
from stages.headroom import HeadroomRow
from stages.invariance import Equality
from tools.localize.cost.result import Nats
from tools.localize.coverage import Coverage


class Diagnosis(Entry, frozen=True):
    """A mistake that explains a fault, and the significant bits that it brings back."""

    name: str
    bits: float
    says: str


class Call(Entry, frozen=True):
    """A call of an engine, from 0, and the position of its first wrong row."""

    step: int
    position: int


class FaultEntry(Entry, frozen=True):
    """One cause of wrong values.

    Attributes:
        layer: a number; "all", or a range such as "1-3"; null for a whole-model stage.
        bits: significant bits that there are; null where values are NaN.
        expected_bits: those that there should be.
        where: ranges of heads, positions (rows of the sequence) and channels, or "all".
        steps, first: the calls of the engine that are wrong, such as "3-", and the first of them;
            where there were several and not all are.
        positions_by_layer: layer -> positions, where they are not the same in all.
        also: other stages with the same mistake.
        segment: the stages that were not dumped, and the one that was judged for all of them.
        exceeds_bound: by what factor the error exceeds what rounding can do at most; not where
            values are NaN or zero throughout, which no rounding makes.
        nonfinite: elements that are NaN or infinite though their inputs are finite.
        dump_only: later stages used the right value.
        shape: the error in a sentence, where no known mistake explains it.
    """

    layer: int | str | None
    stage: str
    bits: float | None
    expected_bits: float
    where: Axes
    diagnosis: list[Diagnosis]
    steps: str | UnsetType = UNSET
    first: Call | UnsetType = UNSET
    positions_by_layer: dict[str, str] | UnsetType = UNSET
    also: list[str] | UnsetType = UNSET
    segment: list[str] | UnsetType = UNSET
    exceeds_bound: float | UnsetType = UNSET
    nonfinite: int | UnsetType = UNSET
    dump_only: bool | UnsetType = UNSET
    shape: str | UnsetType = UNSET


class OddEntry(Entry, frozen=True):
    """A stage with fewer bits than its like, but no fewer than rounding can leave: no fault."""

    layer: int | None
    stage: str
    bits: float
    expected_bits: float
    where: Axes
    exceeds_bound: float


class LayoutEntry(Entry, frozen=True):
    """An order in which one layer holds the channels of each head of q and k, and that scores undo:
    no fault. ``stages`` are those that are in it."""

    layer: int
    says: str
    stages: tuple[str, ...]


class PrecisionEntry(Entry, frozen=True, rename={"klass": "class"}):
    """What a stage really ran at: a precision class, [lowest, highest] significant bits over its
    layers, and the number format that explains them."""

    klass: str
    bits: tuple[float, float]
    format: str | None = None


class Skipped(Entry, frozen=True):
    """What was not checked alone, and why; in some layers, or in all."""

    stage: str
    why: str
    layers: list[int | None] | UnsetType = UNSET
    checked_through: list[str] | UnsetType = UNSET


class SliceShare(Entry, frozen=True):
    """A head, position (row of the sequence) or channel, and its part of a share."""

    index: int
    share: float


class LargestShares(Entry, frozen=True):
    """The slices of each axis that have most of a share, the largest first."""

    heads: list[SliceShare] | UnsetType = UNSET
    positions: list[SliceShare] | UnsetType = UNSET
    channels: list[SliceShare] | UnsetType = UNSET


class ShareEntry(Entry, frozen=True):
    """What the error created at a stage does to the margin and to the log-probability, in nats.

    Attributes:
        patched: how much of the margin goes when this stage alone is made exact, and whether the
            share told it (linear).
        where: of the largest shares, the slices that have most of them.
        tensors: the share of each parameter, of a stage with several.
    """

    stage: str
    layer: int | None
    share: float
    logprob: float
    patched: float | UnsetType = UNSET
    linear: bool | UnsetType = UNSET
    where: LargestShares | UnsetType = UNSET
    tensors: dict[str, float] | UnsetType = UNSET


class HarmEntry(Entry, frozen=True):
    """What the error of a trace does to one token.

    Attributes:
        position: the row of the sequence after which the token comes.
        token, against: the chosen one, and its rival.
        margin: of the two logits in the dump, in nats.
        exact_margin: the margin that exact arithmetic has: computed in float64 if ``checked``, else
            as the shares predict it.
        sum_of_shares: how far the error moves the margin, as the shares tell it.
        flips: exact arithmetic puts the other of the two first.
        logprob, logprob_change: the log-probability of the token, and how far the error moves it.
        shares: of every stage, the largest first.
        lost_before: where the computation cannot be followed further back.
    """

    position: int
    token: int
    against: int
    margin: float
    exact_margin: float
    sum_of_shares: float
    flips: bool
    logprob: float
    logprob_change: float
    checked: bool
    shares: list[ShareEntry]
    lost_before: StageOfLayer | UnsetType = UNSET


class RoundingEntry(Entry, frozen=True):
    """What the error costs against the weights of another model, of which the engine's are a
    rounding: a linear stage's share has that of its weights in it."""

    model: str
    harm: HarmEntry


class Judgement(Entry, frozen=True):
    """A stage of two engines, and which of them is right there."""

    stage: str
    a: dict[str, Any]
    b: dict[str, Any]
    right: Literal["A", "B", "both", "neither"]


class ApartShare(StageOfLayer, frozen=True):
    """The shares that a stage of two engines has of their margins."""

    a: float
    b: float
    difference: float


class ApartEntry(Entry, frozen=True):
    """How far the margins of two engines are apart, A less B, in nats, and which stages make that,
    the largest first. With the same weights the sum of shares is the difference."""

    token: int
    against: int
    margins: tuple[float, float]
    difference: float
    sum_of_shares: float
    shares: list[ApartShare]


class LocalizeResult(Entry, frozen=True):
    """``tools.localize --json``."""

    schema: Literal[3]
    verdict: Literal["clean", "precision", "dump", "fault", "not_comparable"]
    faults: list[FaultEntry]
    precision: dict[str, PrecisionEntry]
    skipped: list[Skipped]
    trace: str | UnsetType = UNSET
    model: str | UnsetType = UNSET
    dtype: str | UnsetType = UNSET
    costs: bool | UnsetType = UNSET
    coverage: Coverage | UnsetType = UNSET
    layouts: list[LayoutEntry] | UnsetType = UNSET
    odd: list[OddEntry] | UnsetType = UNSET
    nats: list[Nats] | UnsetType = UNSET
    headroom: list[HeadroomRow] | UnsetType = UNSET
    harm: HarmEntry | UnsetType = UNSET
    rounding: RoundingEntry | UnsetType = UNSET
    why: str | UnsetType = UNSET
    against: dict[str, Any] | UnsetType = UNSET
    right: list[Judgement] | UnsetType = UNSET
    same_weights: bool | UnsetType | None = UNSET
    apart: ApartEntry | UnsetType = UNSET
    equality: Equality | UnsetType = UNSET
