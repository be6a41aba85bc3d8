"""Comparing two arrays of one stage: accumulated error, NaN-safe, in bounded memory.

Every array is seen as a matrix whose rows are positions (or head x position) and whose columns
are channels (or heads x channels), and is read in blocks that fit into a core's cache.
"""

import math
import threading
from dataclasses import dataclass, field, fields
from typing import Any

import numpy as np

from stages.architecture import Stage
from stages.errors import UserError
from stages.files import numpy_dtype

BLOCK = 1 << 19  # elements: more leave the cache, fewer leave two threads waiting for each other
SMALLEST = 1e-33  # a sum of squares below is made in float64: float32 loses squares below 1e-45
COARSEST_FIRST = ("bfloat16", "float16", "float32", "float64")


@dataclass(frozen=True, kw_only=True)
class Difference:
    """How far ``a`` is from the reference ``b`` in one stage.

    Attributes:
        count: elements compared; masked ones are not.
        identical: every compared element has the same bits; where the two sides differ in dtype,
            the same bits in the coarser one.
        max_abs: largest |a - b| over finite elements, and ``at``: its index in the stage's axes.
        rms: root mean square of a - b.
        relative_l2: |a - b| / |b| over finite elements; inf where only b is zero.
        cosine: of the angle between a and b, to about 1e-6 of their relative difference; NaN where
            one of them is zero.
        ulp_max, ulp_0, ulp_1: distance in units in the last place of the coarser dtype: the
            largest, the fraction of elements at 0 and at most 1.
        nonfinite_a, nonfinite_b: elements that are NaN or infinite; ``unmatched``: those where
            the two sides are not both NaN or the same infinity.
        worst: axis letter -> (index, relative L2 of that slice) for positions, heads, channels.
        rows: [T] relative L2 of each position; inf where NaN and infinity do not coincide.
    """

    count: int
    identical: bool
    max_abs: float
    at: tuple[int, ...]
    rms: float
    relative_l2: float
    cosine: float
    ulp_max: int
    ulp_0: float
    ulp_1: float
    nonfinite_a: int
    nonfinite_b: int
    unmatched: int
    worst: dict[str, tuple[int, float]] = field(default_factory=dict)
    rows: np.ndarray = field(default_factory=lambda: np.zeros(0), repr=False, compare=False)

    def to_json(self) -> dict[str, Any]:
        """All but the rows."""
        return {each.name: getattr(self, each.name) for each in fields(self) if each.compare}

    def within(self, tolerance: float) -> bool:
        """Whether the relative L2 is at most ``tolerance`` and NaN and infinity coincide."""
        return self.unmatched == 0 and self.relative_l2 <= tolerance


def coarser(a: str | None, b: str | None) -> str:
    """The dtype with fewer bits; a foreign trace that does not say counts as float32."""
    return min(a or "float32", b or "float32", key=COARSEST_FIRST.index)


def compare(
    a: np.ndarray,
    b: np.ndarray,
    stage: Stage,
    dtype: str = "float32",
    mask: np.ndarray | None = None,
    heads: int | None = None,
) -> Difference:
    """Compare one stage of two traces; ``b`` is the reference.

    Arguments:
        a, b: the same shape, in the axes of ``stage``.
        dtype: whose units in the last place to count, see ``coarser``.
        mask: [T, S] for ``attn_scores``; elements where it is False are left out.
        heads: how many heads lie on its axes, to name the worst.

    Raises:
        UserError: the shapes differ, or there is nothing to compare.
    """
    if a.shape != b.shape:
        raise UserError(f"shapes differ: {list(a.shape)} and {list(b.shape)}")
    if a.size == 0:
        raise UserError("nothing to compare: the stage is empty")
    rows_a, rows_b = stage.matrix(a), stage.matrix(b)
    width = rows_a.shape[1]
    total = _Running(len(rows_a), width)
    step = max(1, BLOCK // width)
    for start in range(0, len(rows_a), step):
        stop = min(start + step, len(rows_a))
        some_a, some_b = rows_a[start:stop], rows_b[start:stop]
        left_out = 0
        if mask is not None:
            keep = mask[np.arange(start, stop) % len(mask)]
            used = int(keep.any(0).nonzero()[0][-1]) + 1  # a position always sees itself
            keep = keep[:, :used]
            left_out = keep.size - int(np.count_nonzero(keep))
            some_a, some_b = _kept(some_a[:, :used], keep), _kept(some_b[:, :used], keep)
        total.add(start, some_a, some_b, left_out, dtype)
    return total.result(a.shape, stage, heads)


def _kept(values: np.ndarray, keep: np.ndarray) -> np.ndarray:
    """A copy with zeros where ``keep`` is False, whatever stands there, NaN too."""
    bits = np.dtype(f"i{values.itemsize}")
    return (values.view(bits) * keep).view(values.dtype)


_ROOM = threading.local()  # of some megabytes: a block is never larger than ``BLOCK`` or a row


class _Running:
    """What is added up over the blocks of one comparison."""

    def __init__(self, rows: int, columns: int) -> None:
        self.row_error, self.row_size = np.zeros(rows), np.zeros(rows)
        self.column_error, self.column_size = np.zeros(columns), np.zeros(columns)
        self.a_size = self.dot = self.max_abs = 0.0
        self.same_bits = True
        self.at = (0, 0)
        self.count = self.ulp_max = self.ulp_0 = self.ulp_1 = 0
        self.nonfinite_a = self.nonfinite_b = self.unmatched = 0
        self.row_unmatched = np.zeros(rows)

    def _scratch(self, name: str, shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
        """Memory of this thread that every block of every stage uses again: fresh memory costs more
        than the arithmetic."""
        count, room = math.prod(shape), _ROOM.__dict__
        if (held := room.get(name + dtype.char)) is None or held.size < count:
            held = room[name + dtype.char] = np.empty(count, dtype)
        return held[:count].reshape(shape)

    def add(self, start: int, a: np.ndarray, b: np.ndarray, left_out: int, dtype: str) -> None:
        """Add a block of rows; ``left_out`` elements of it are zero on both sides and no part of
        the comparison."""
        self.count += a.size - left_out
        distance = self._ulps(a, b, dtype)
        self.ulp_0 += distance.size - int(np.count_nonzero(distance)) - left_out
        self.ulp_1 += int(np.count_nonzero(distance <= 1)) - left_out
        self.ulp_max = max(self.ulp_max, int(distance.max()))
        work = np.float64 if a.dtype.itemsize > 4 or b.dtype.itemsize > 4 else np.float32
        a, b = a.astype(work, copy=False), b.astype(work, copy=False)
        error, row_error, row_size, a_size = self._squares(a, b)
        if not _safe(a, b, error, row_error, row_size, a_size):
            a, b = self._set_nonfinite_aside(start, a, b)
            error, row_error, row_size, a_size = self._squares(a, b)
        rows = slice(start, start + len(a))
        self.row_error[rows], self.row_size[rows] = row_error, row_size
        columns = slice(a.shape[1])  # the last ones may be masked
        self.column_error[columns] += np.einsum("ij,ij->j", error, error)
        self.column_size[columns] += np.einsum("ij,ij->j", b, b)
        self.a_size += a_size
        b_size, error_size = (float(rows.sum(dtype=np.float64)) for rows in (row_size, row_error))
        if b_size / 4 < a_size < 4 * b_size:
            self.dot += (a_size + b_size - error_size) / 2
        else:  # the difference says nothing of the angle where one side is much larger
            self.dot += float(np.vecdot(a, b).sum(dtype=np.float64))
        magnitude = np.abs(error, out=error)
        if float(magnitude.max()) > self.max_abs:
            flat = int(magnitude.argmax())
            self.max_abs = float(magnitude.flat[flat])
            row, column = divmod(flat, a.shape[1])
            self.at = (start + row, column)

    def _squares(
        self, a: np.ndarray, b: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray, float]:
        """a - b, its squares and b's summed by row, and a's summed."""
        with np.errstate(invalid="ignore", over="ignore"):
            error = np.subtract(a, b, out=self._scratch("error", a.shape, a.dtype))
            row_error, row_size = np.vecdot(error, error), np.vecdot(b, b)
            return error, row_error, row_size, float(np.vecdot(a, a).sum(dtype=np.float64))

    def _ulps(self, a: np.ndarray, b: np.ndarray, dtype: str) -> np.ndarray:
        """Distance in units in the last place of ``dtype``, as unsigned integers; -0 equals 0.

        The bits of floats of one sign count representable values in order, so there the distance
        is that of the bits; across zero it is the sum of the distances to zero.
        """
        kind = numpy_dtype(dtype)
        signed, unsigned = np.dtype(f"i{kind.itemsize}"), np.dtype(f"u{kind.itemsize}")
        with np.errstate(over="ignore", invalid="ignore"):
            x, y = (np.asarray(array, dtype=kind, order="C").view(signed) for array in (a, b))
        distance = np.subtract(x, y, out=self._scratch("distance", x.shape, signed))
        np.abs(distance, out=distance)
        distance = distance.view(unsigned)
        largest = int(distance.max())
        self.same_bits = self.same_bits and largest == 0
        # The bits of two numbers on either side of zero lie at least so far apart.
        most = unsigned.type(np.iinfo(signed).max)
        if largest > int(most) - int(np.array(np.inf, kind).view(signed)):
            across = np.bitwise_xor(x, y, out=self._scratch("across", x.shape, signed))
            where = np.flatnonzero(across < 0)
            to_zero = ((bits.reshape(-1)[where].view(unsigned) & most) for bits in (x, y))
            distance.reshape(-1)[where] = sum(to_zero, unsigned.type(0))
        return distance

    def _set_nonfinite_aside(
        self, start: int, a: np.ndarray, b: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        """Count NaN and infinity, put zeros in their places, and go on in float64."""
        bad_a, bad_b = ~np.isfinite(a), ~np.isfinite(b)
        same = (np.isnan(a) & np.isnan(b)) | (a == b)
        bad = bad_a | bad_b
        self.nonfinite_a += int(bad_a.sum())
        self.nonfinite_b += int(bad_b.sum())
        unmatched = (bad & ~same).sum(1)
        self.unmatched += int(unmatched.sum())
        self.row_unmatched[start : start + len(a)] = unmatched
        a, b = a.astype(np.float64), b.astype(np.float64)
        return np.where(bad, 0.0, a), np.where(bad, 0.0, b)

    def result(self, shape: tuple[int, ...], stage: Stage, heads: int | None) -> Difference:
        error, size = float(self.row_error.sum()), float(self.row_size.sum())
        norms = np.sqrt(self.a_size) * np.sqrt(size)
        # 1 - cosine from the difference itself: a dot product would lose it to rounding.
        gap = error - (np.sqrt(self.a_size) - np.sqrt(size)) ** 2
        if not size / 4 < self.a_size < 4 * size:
            gap = 2 * (norms - self.dot)
        flat = self.at[0] * self.column_error.size + self.at[1]
        slices = self._slices(stage, heads)
        unmatched = stage.fold(heads, self.row_unmatched, self.column_error)["position"]
        return Difference(
            count=self.count,
            identical=self.max_abs == 0 and self.unmatched == 0 and self.same_bits,
            max_abs=self.max_abs,
            at=tuple(int(i) for i in np.unravel_index(flat, shape)),
            rms=float(np.sqrt(error / self.count)) if self.count else 0.0,
            relative_l2=float(_ratio(error, size)),
            cosine=float(1 - max(gap, 0.0) / (2 * norms)) if norms else float("nan"),
            ulp_max=self.ulp_max,
            ulp_0=self.ulp_0 / self.count,
            ulp_1=self.ulp_1 / self.count,
            nonfinite_a=self.nonfinite_a,
            nonfinite_b=self.nonfinite_b,
            unmatched=self.unmatched,
            worst={} if error == 0 else {n: _largest_of(each) for n, each in slices.items()},
            rows=np.where(unmatched > 0, np.inf, slices["position"]),
        )

    def _slices(self, stage: Stage, heads: int | None) -> dict[str, np.ndarray]:
        """The relative L2 of each position, head and channel."""
        by_row = np.stack([self.row_error, self.row_size])
        by_column = np.stack([self.column_error, self.column_size])
        folded = stage.fold(heads, by_row, by_column)
        return {name: _ratio(error, size) for name, (error, size) in folded.items()}


def _largest_of(ratios: np.ndarray) -> tuple[int, float]:
    index = int(np.argmax(ratios))
    return index, float(ratios[index])


def _safe(
    a: np.ndarray,
    b: np.ndarray,
    error: np.ndarray,
    row_error: np.ndarray,
    row_size: np.ndarray,
    a_size: float,
) -> bool:
    """Whether sums of squares in the dtype at hand neither overflowed, by column either, nor lost
    what is there to underflow."""
    most = float(np.finfo(a.dtype).max) / len(a)
    for values, sums in ((error, row_error), (b, row_size)):
        if not sums.max() < most:  # NaN too
            return False
        small = sums < SMALLEST
        if small.any() and values[small].any():
            return False
    return a_size < most and (a_size > SMALLEST or not a.any())


def _ratio(error: np.ndarray | float, size: np.ndarray | float) -> np.ndarray:
    """sqrt(error / size); 0 where there is no error, inf where there is error and no size."""
    error, size = np.asarray(error), np.asarray(size)
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.where(error == 0, 0.0, np.sqrt(error / size))


@dataclass(frozen=True)
class LogitsDifference:
    """What the difference of two sets of logits means for the next token.

    Attributes:
        positions: how many positions were compared.
        argmax_equal: at how many of them the most likely token is the same.
        top5_overlap: mean fraction of the five most likely tokens in common.
        kl_mean, kl_max: Kullback-Leibler divergence KL(b || a), nats.
        margin: smallest gap between b's two largest logits where the arg-max differs, else the
            smallest anywhere.
    """

    positions: int
    argmax_equal: int
    top5_overlap: float
    kl_mean: float
    kl_max: float
    margin: float


def compare_logits(a: np.ndarray, b: np.ndarray) -> LogitsDifference:
    """Compare logits [T, V] or [V]; ``b`` is the reference. Rows with NaN count as different."""
    equal, overlap, divergence, margins = [], [], [], []
    for x, y in zip(np.atleast_2d(a), np.atleast_2d(b), strict=True):
        x, y = x.astype(np.float64), y.astype(np.float64)
        count = min(5, y.size)
        top_x, top_y = _largest(x, count), _largest(y, count)
        usable = bool(np.isfinite(x).all() and np.isfinite(y).all())
        equal.append(usable and top_x[0] == top_y[0])
        overlap.append(len(set(top_x) & set(top_y)) / count)
        log_x, log_y = _log_softmax(x), _log_softmax(y)
        divergence.append(float((np.exp(log_y) * (log_y - log_x)).sum()) if usable else np.nan)
        margins.append(float(y[top_y[0]] - y[top_y[1]]) if y.size > 1 else np.inf)
    differing = [m for m, same in zip(margins, equal, strict=True) if not same]
    return LogitsDifference(
        positions=len(equal),
        argmax_equal=sum(map(int, equal)),
        top5_overlap=float(np.mean(overlap)),
        kl_mean=float(np.mean(divergence)),
        kl_max=float(np.max(divergence)),
        margin=min(differing or margins),
    )


def _largest(x: np.ndarray, count: int) -> np.ndarray:
    """Indices of the largest values, largest first and of equals the first; NaN comes last."""
    falling = -x
    last = np.partition(falling, count - 1)[count - 1]
    near = np.flatnonzero(~(falling > last))  # with NaN in it all of them
    return near[np.argsort(falling[near], kind="stable")[:count]]


def _log_softmax(x: np.ndarray) -> np.ndarray:
    shifted = x - x.max()
    return shifted - np.log(np.exp(shifted).sum())
