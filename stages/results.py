"""What the commands say with ``--json``: the format, as types. Published in docs/schema/.

Fields that are only there where they have something to say are ``UNSET`` otherwise.
"""

from typing import Any, Literal

from msgspec import UNSET, Struct, UnsetType, field

Axes = dict[Literal["heads", "positions", "channels"], str]


class StageOfLayer(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A stage, and the layer it is of; null for a whole-model stage."""

    stage: str
    layer: int | None


# --- localize


class Diagnosis(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A mistake that explains a fault, and the significant bits that it brings back."""

    name: str
    bits: float
    says: str


class Call(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A call of an engine, from 0, and the position of its first wrong row."""

    step: int
    position: int


class FaultEntry(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
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


class OddEntry(Struct, frozen=True, kw_only=True):
    """A stage with fewer bits than its like, but no fewer than rounding can leave: no fault."""

    layer: int | None
    stage: str
    bits: float
    expected_bits: float
    where: Axes
    exceeds_bound: float


class CoverageEntry(Struct, frozen=True, kw_only=True):
    """How many operations, stages of all layers, were judged by themselves, together with others
    that were not dumped, and not at all."""

    judged: int
    through_a_gap: int
    not_dumped: int


class PrecisionEntry(Struct, frozen=True, kw_only=True, rename={"klass": "class"}):
    """What a stage really ran at: a precision class, [lowest, highest] significant bits over its
    layers, and the number format that explains them."""

    klass: str
    bits: tuple[float, float]
    format: str | None = None


class Skipped(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What was not checked alone, and why; in some layers, or in all."""

    stage: str
    why: str
    layers: list[int | None] | UnsetType = UNSET
    checked_through: list[str] | UnsetType = UNSET


class NatsRow(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The absolute error of one layer's scores over the keys that a query sees, in nats, and where
    the largest one is; and the total variation of the softmax that it leads to, mean and largest
    over heads and positions."""

    layer: int
    rms: float
    max: float
    head: int
    position: int
    variation: float
    variation_max: float


class HeadroomRow(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What of a stage takes more than a quarter of a format's range: the largest "value", product
    "before the scale" of scores, "sum of squares" of a norm, or "sum of 32" of a Q8_1 block; and
    where it is (of scores the channel is the key's row, of a block its first).

    Attributes:
        part: the largest as a part of the format's largest number; float16: the same of 65504, in
            what localize says.
        where: what of it rounds to no number of the format.
    """

    layer: int | None
    stage: str
    of: Literal["value", "before the scale", "sum of squares", "sum of 32"]
    largest: float
    position: int
    channel: int | None
    head: int | None = None
    part: float | UnsetType = UNSET
    float16: float | UnsetType = UNSET
    where: Axes | UnsetType = UNSET


class HeadroomEntry(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Where an engine in a number format would overflow, as ``--headroom`` forecasts it.

    Attributes:
        most: the largest number of the format.
        overflows: something other than the sum of squares of a norm is beyond it.
        missing: stages that would have to be looked at and are not in the trace.
    """

    format: str
    most: float
    overflows: bool
    rows: list[HeadroomRow]
    missing: list[str]


class SliceShare(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A head, position (row of the sequence) or channel, and its part of a share."""

    index: int
    share: float


class ShareEntry(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
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
    where: dict[Literal["heads", "positions", "channels"], list[SliceShare]] | UnsetType = UNSET
    tensors: dict[str, float] | UnsetType = UNSET


class HarmEntry(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
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


class RoundingEntry(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What the error costs against the weights of another model, of which the engine's are a
    rounding: a linear stage's share has that of its weights in it."""

    model: str
    harm: HarmEntry


class Judgement(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A stage of two engines, and which of them is right there."""

    stage: str
    a: dict[str, Any]
    b: dict[str, Any]
    right: Literal["A", "B", "both", "neither"]


class ApartShare(StageOfLayer, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The shares that a stage of two engines has of their margins."""

    a: float
    b: float
    difference: float


class ApartEntry(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How far the margins of two engines are apart, A less B, in nats, and which stages make that,
    the largest first. With the same weights the sum of shares is the difference."""

    token: int
    against: int
    margins: tuple[float, float]
    difference: float
    sum_of_shares: float
    shares: list[ApartShare]


class LocalizeResult(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
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
    coverage: CoverageEntry | UnsetType = UNSET
    odd: list[OddEntry] | UnsetType = UNSET
    nats: list[NatsRow] | UnsetType = UNSET
    headroom: list[HeadroomRow] | UnsetType = UNSET
    harm: HarmEntry | UnsetType = UNSET
    rounding: RoundingEntry | UnsetType = UNSET
    why: str | UnsetType = UNSET
    against: dict[str, Any] | UnsetType = UNSET
    right: list[Judgement] | UnsetType = UNSET
    same_weights: bool | UnsetType | None = UNSET
    apart: ApartEntry | UnsetType = UNSET


# --- diff


class Worst(Struct, frozen=True, array_like=True):
    """A slice, and its relative L2."""

    index: int
    relative_l2: float | None


class DifferenceRow(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
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
    worst: dict[Literal["position", "head", "channel"], Worst]


class LogitsRow(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What the difference means for the next token; see ``stages.compare.LogitsDifference``."""

    positions: int
    argmax_equal: int
    top5_overlap: float
    kl_mean: float | None
    kl_max: float | None
    margin: float | None


class StepEntry(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A call: its first and last row, and the largest relative L2 of any row in any stage."""

    step: int
    rows: tuple[int, int]
    relative_l2: float | None
    row: int
    stage: str
    layer: int | None


class ChoiceEntry(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What a generation went on with; see ``stages.generations.Choice``."""

    step: int
    token: int
    likeliest: int | None
    margin: float | None


class PartedEntry(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The first row with other tokens of two generations."""

    row: int
    a: ChoiceEntry
    b: ChoiceEntry


class DiffResult(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
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
    parted: PartedEntry | UnsetType | None = UNSET


# --- trace


class StageRow(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What is stored of a stage, over all layers; ``bytes`` are those of the tensors."""

    stage: str
    axes: list[str]
    shape: list[int]
    files: int
    bytes: int


class NextToken(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One of the most likely tokens after the last position."""

    token: int
    text: str | None
    logit: float | None
    probability: float | None


class Generated(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A token that was picked, and its text where the model has a tokenizer."""

    token: int
    text: str | None


class TraceResult(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """``qwen_jax.trace --json`` and ``oracle.trace --json``, with and without ``--dry-run``.

    Attributes:
        refused: of a dry run, why the run itself would be; null if it would not.
    """

    schema: Literal[2]
    architecture: str
    model: str
    out: str
    dtype: str
    format: str
    tokens: list[int]
    positions: list[int]
    steps: list[int]
    cache: str | None
    layers: list[int]
    stages: list[StageRow]
    files: int
    bytes: int
    peak_memory_bytes: int
    file_bytes: int | UnsetType = UNSET
    top: list[NextToken] | UnsetType = UNSET
    generated: list[Generated] | UnsetType = UNSET
    refused: str | UnsetType | None = UNSET
    seconds: float | UnsetType = UNSET
    headroom: HeadroomEntry | UnsetType = UNSET


class BatchResult(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Of a trace command with ``--prompts``: one summary for each sequence of the batch."""

    schema: Literal[2]
    out: str
    sequences: list[TraceResult]


# --- collect


class StageOfLayers(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What was recorded of a stage: in which layers, [null] of a whole-model stage."""

    stage: str
    axes: list[str]
    shape: list[int]
    layers: list[int | None]


class CacheChange(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A row of the cache, K or V, that was another when call ``step`` read it."""

    layer: int
    cache: Literal["K", "V"]
    row: int
    step: int


class CollectResult(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """``tools.collect --json``.

    Attributes:
        producer: what the manifest says of the engine.
        steps: rows of each call.
        absent: stages that the engine does not show, and why.
        weights: what ``tools.localize --model`` should be; null where the engine has its own.
        next_token: the likeliest after the last position. Of ``files`` neither is known.
        passed_over: of ``files``, what the map has no use for.
    """

    schema: Literal[1]
    engine: str
    producer: dict[str, Any]
    architecture: str
    model: str
    out: str
    dtype: str
    cache: str | None
    tokens: list[int]
    positions: list[int]
    steps: list[int]
    stages: list[StageOfLayers]
    absent: dict[str, str]
    cache_changed: list[CacheChange]
    files: int
    bytes: int
    weights: str | UnsetType | None = UNSET
    next_token: int | UnsetType = UNSET
    passed_over: list[str] | UnsetType = UNSET


# --- convert


class ConvertResult(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """``tools.convert --json``; ``bytes`` are those of the tensors."""

    schema: Literal[1]
    source: str
    destination: str
    format: Literal["hf", "orbax"]
    tensors: int
    bytes: int
    seconds: float


# --- parity


class WorstDifference(StageOfLayer, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The largest relative L2 and where it is; null is not finite."""

    worst: float | None


class LocalBits(StageOfLayer, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The fewest significant bits that any stage has, and as measured, without allowances."""

    worst: float
    unadjusted: float


class ParityFault(StageOfLayer, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A stage with fewer bits than the point's arithmetic leaves: ``klass`` where ``expected`` was
    asked for."""

    bits: float
    klass: str = field(name="class")
    expected: str
    why: str


class ViolationRow(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Where a rule for compiled programs does not hold; see ``tools.parity.gpu.check``."""

    rule: Literal["products", "rounding", "outputs", "atomics", "calls"]
    program: str
    stage: str | None
    instruction: str
    products: str


class ProgramRow(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What was found in one program that was compiled for a GPU; see ``check.Checked``."""

    program: str
    products_by: Literal["Triton", "cuBLAS"]
    kernels: int
    instructions: int
    products: list[str]
    approximate: dict[str, int]
    contracted: int


class PointResult(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
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


class ParityResult(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
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


class PartingEntry(StageOfLayer, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """An operation that made unequal values from bit-equal ones, and the rows where it did."""

    rows: list[int]


class Outcome(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One way to compute so many tokens, and where it parts from alone, in one call."""

    length: int
    way: str
    partings: list[PartingEntry]


class InvarianceResult(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """``tools.parity --invariance --json``."""

    schema: Literal[1]
    verdict: Literal["identical", "differ"]
    model: str
    device: Literal["cpu", "gpu"]
    outcomes: list[Outcome]


# --- bench


class FigureRow(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One figure; see ``tools.bench.measure.Figure``. ``reached`` is null without a bar."""

    part: Literal["cold", "warm", "decode", "tools", "memory"]
    of: str
    what: str
    value: float
    unit: Literal["s", "x", "GB/s", "GiB"]
    low: float | None
    high: float | None
    bar: float | None
    most: bool
    floor: float | None
    reached: bool | None


class BenchResult(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """``tools.bench --json``; ``repeat`` is of how many runs a figure is the median."""

    schema: Literal[1]
    machine: dict[str, Any]
    repeat: int
    figures: list[FigureRow]


RESULTS: dict[str, type[Struct]] = {
    "localize": LocalizeResult,
    "diff": DiffResult,
    "trace": TraceResult,
    "batch": BatchResult,
    "collect": CollectResult,
    "convert": ConvertResult,
    "parity": ParityResult,
    "invariance": InvarianceResult,
    "bench": BenchResult,
}
