"""Where two computations of the same sequence part: *the first operation with bit-equal inputs and
unequal outputs*. Alone and in a batch, in one call and in many, an engine that is invariant has
none; of one that is not, this is the operation whose arithmetic depends on what is computed beside
it (He et al. 2025, "Defeating nondeterminism in LLM inference").

It is decided row by row: a row may part at an operation though other rows came to it unequal.
"""

import numpy as np

from stages.architecture import TOKENS, Key
from stages.entry import Entry, StageOfLayer
from stages.mask import layer_mask
from stages.trace import Trace


class Parting(StageOfLayer, frozen=True):
    """An operation that made unequal values from bit-equal ones, and the rows of the sequence where
    it did."""

    rows: list[int]

    @property
    def key(self) -> Key:
        return self.stage, self.layer


class Equal(StageOfLayer, frozen=True):
    """How many elements of an operation are equal to the last bit, of those that both sides hold
    and no mask removes."""

    equal: int
    of: int


class Equality(Entry, frozen=True):
    """What two computations of one sequence have in common; ``parts_first`` is the first operation
    that makes unequal values of equal ones."""

    operations: list[Equal]
    parts_first: Parting | None


def equality(a: Trace, b: Trace) -> Equality | None:
    """Two traces of one sequence compared bit by bit; None where they are of other tokens,
    positions or models."""
    if (a.tokens, a.positions, a.config) != (b.tokens, b.positions, b.config):
        return None
    operations, found = _compared(a, b)
    return Equality(operations, found[0] if found else None)


def partings(a: Trace, b: Trace) -> list[Parting]:
    """Every operation with bit-equal inputs and unequal outputs in some row, in computation order,
    of two traces of the same tokens by the same weights.

    What is not in both traces is passed over: its reader is then judged by what it was computed
    from. Rows that only one side holds are not compared.
    """
    return _compared(a, b)[1]


def _compared(a: Trace, b: Trace) -> tuple[list[Equal], list[Parting]]:
    length, layers = len(a.tokens), a.config["num_hidden_layers"]
    arch = a.arch if len(a.arch.stages) >= len(b.arch.stages) else b.arch
    equal: dict[Key, np.ndarray] = {}
    counts, found = list[Equal](), list[Parting]()
    for stage, layer in arch.computation_order(layers):
        inputs = np.ones(length, bool)
        for name in stage.inputs:
            if name == TOKENS:
                continue
            read = equal[arch.stored_as(name, layer, layers)]
            inputs &= np.logical_and.accumulate(read) if name in stage.keys else read
        key = stage.name, layer
        if key not in a.entries or key not in b.entries:
            equal[key] = inputs
            continue
        same, count, of = _rows_equal(a, b, key)
        counts.append(Equal(*key, count, of))
        equal[key] = same  # of a value that came out the same it does not matter from what
        created = np.flatnonzero(inputs & ~same)
        if created.size:
            found.append(Parting(stage.name, layer, created.tolist()))
    return counts, found


def _rows_equal(a: Trace, b: Trace, key: Key) -> tuple[np.ndarray, int, int]:
    """[T] bool: of which rows the bits are equal, rows that are not held counted as equal; and how
    many elements are equal, of how many. What a mask removes is no element."""
    stage, length = (a if key[0] in a.arch.stage else b).arch.stage[key[0]], len(a.tokens)
    x, y = a.read_rows(*key), b.read_rows(*key)
    axis = stage.positions_at
    count = min(x.shape[axis], y.shape[axis])
    last = (slice(None),) * axis + (slice(-count, None),)
    unequal = _bits_differ(x[last], y[last])
    elements = unequal.size
    if stage.kind.masked and key[1] is not None:
        mask = layer_mask(a.config, key[1], a.positions)[-count:]
        unequal &= mask
        elements = int(np.broadcast_to(mask, unequal.shape).sum())
    others = tuple(each for each in range(unequal.ndim) if each != axis)
    found = np.ones(length, bool)
    found[length - count :] = ~unequal.any(axis=others)
    return found, elements - int(unequal.sum()), elements


def _bits_differ(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Elementwise. A 16-bit dtype that only one side has is widened: APRT does so."""
    if x.dtype != y.dtype:
        x, y = (each.astype(np.float32) if each.itemsize < 4 else each for each in (x, y))
    if x.dtype != y.dtype:
        return np.ones(x.shape, bool)
    bits = f"u{x.itemsize}"
    return np.ascontiguousarray(x).view(bits) != np.ascontiguousarray(y).view(bits)
