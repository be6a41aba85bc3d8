"""``tools.localize --repro DIR``: the first fault as a script to attach to a bug report.

The stage's inputs and weights are cut to the smallest slice that still shows the fault (one head, a
few positions and channels), and a script in NumPy alone recomputes it. It exits 1 while the bug is
there. The idea is that of Polygraphy's ``debug reduce``.
"""

import subprocess
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from qwen_jax.replay import Replay
from qwen_jax.weights.base import Weights
from stages import verdict
from stages.architecture import (
    ACTIVATION,
    ADD,
    CACHE,
    LINEAR,
    LOOKUP,
    NORM,
    PRODUCT,
    QKV,
    ROTATION,
    SCORES,
    SOFTMAX,
    WEIGHTED_SUM,
    Kind,
)
from stages.errors import UserError
from stages.files import numpy_dtype
from stages.verdict import Suspect
from stages.version import NAME, version
from tools.localize.grouping import CHANGED, Fault
from tools.localize.result import Localization, faults, place
from tools.localize.stage_case import StageReplay

SCRIPT, DATA = "repro.py", "repro.npz"
Values = dict[str, np.ndarray]

# Positions and channels of one head that are tried, the fewest first; then all of it.
SIZES = ((2, 8), (4, 32), (16, 128), (1 << 30, 1 << 30))


@dataclass
class Slice:
    """A stage with its operands as the engine reads them, cut to one head, rows and columns.

    Attributes:
        head: of those on the stage's axes; 0 where it has none.
        rows: of those that the stage is replayed for.
        columns: channels of the head; of scores and their softmax the key positions.
    """

    case: StageReplay
    head: int
    rows: np.ndarray
    columns: np.ndarray

    def grid(self, value: object) -> np.ndarray:
        """A value in the stage's axes as [heads or 1, rows, columns]."""
        array, heads = np.asarray(value), self.case.heads
        if heads:
            return np.asarray(self.case.stage.by_head(heads, array))
        return self.case.stage.matrix(array)[None]

    def cut(self, value: object) -> np.ndarray:
        """The slice of a value in the stage's axes."""
        return self.grid(value)[self.head][np.ix_(self.rows, self.columns)]

    @property
    def channels(self) -> np.ndarray:
        """The columns counted over all heads."""
        width = self.grid(self.case.dump).shape[-1]
        return self.columns + (0 if self.case.stage.heads_lead else self.head * width)

    def input(self, place: int = 0) -> np.ndarray:
        """An input as the engine reads it, without its batch axis."""
        inputs, format = self.case.inputs, self.case.format
        read = inputs if format is None else format.inputs(self.case.config, inputs)
        return np.asarray(read[place])[0]

    def weight(self, name: str, rows: np.ndarray | None = None) -> np.ndarray:
        """A weight, or some rows of it, in float64."""
        held = self.case.weights[name]
        wide = np.asarray(held if rows is None else held[rows]).astype(np.float64)
        format = self.case.format
        return wide if format is None else np.asarray(format.weight(jnp.asarray(wide)))

    def side_by_side(self) -> np.ndarray:
        """The rows of the stage's weights, or elements of its biases, that make the columns."""
        parts, first = [], 0
        for name, held in self.case.weights.items():
            here = self.channels - first
            parts.append(self.weight(name, here[(here >= 0) & (here < len(held))]))
            first += len(held)
        return np.concatenate(parts)

    def of_head(self, value: np.ndarray, name: str, part: str, head: int) -> np.ndarray:
        """[T, H]: one head of q, k or v, which may be all there is, or side by side."""
        if self.case.arch.axes_of(name)[-1] == QKV:
            config = self.case.config
            n, k = config.num_attention_heads, config.num_key_value_heads
            head += {"q": 0, "k": n, "v": n + k}[part]
            value = value.reshape(len(value), n + 2 * k, -1)
        return value[:, head]

    def one_head(self) -> np.ndarray:
        """[rows, H]: the first input's head of the same number."""
        part = "q" if "N" in self.case.stage.axes else "k"
        return self.of_head(self.input(), self.case.stage.inputs[0], part, self.head)[self.rows]

    def of_keys(self, part: str) -> np.ndarray:
        """[S, H]: the key's or the value's head that the slice's query head reads."""
        group = self.case.config.num_attention_heads // self.case.config.num_key_value_heads
        name = self.case.stage.inputs[1]
        return self.of_head(self.input(1), name, part, self.head // group)


def _lookup(s: Slice) -> Values:
    (name,) = s.case.weights
    return {"table": s.weight(name, s.input()[s.rows])[:, s.columns]}


def _norm(s: Slice) -> Values:
    (name,) = s.case.weights
    x = s.one_head() if s.case.heads else s.input()[s.rows]
    eps = np.array(s.case.config.rms_norm_eps)
    return {"x": x, "weight": s.weight(name), "eps": eps, "columns": s.columns}


def _linear(s: Slice) -> Values:
    return {"x": s.input()[s.rows], "weight": s.side_by_side()}


def _add(s: Slice) -> Values:
    a = s.input()[np.ix_(s.rows, s.channels)]
    biased = bool(s.case.weights)
    return {"a": a, "b": s.side_by_side() if biased else s.input(1)[np.ix_(s.rows, s.channels)]}


def _rotation(s: Slice) -> Values:
    format = s.case.format
    made = None if format is None else format.tables(s.case.config, s.case.positions)
    tables = (s.case.pos.cos, s.case.pos.sin) if made is None else made
    cos, sin = (np.asarray(t)[0][s.rows].astype(np.float64) for t in tables)
    return {"x": s.one_head(), "cos": cos, "sin": sin, "columns": s.columns}


def _scores(s: Slice) -> Values:
    q = s.of_head(s.input(), s.case.stage.inputs[0], "q", s.head)[s.rows]
    return {"q": q, "k": s.of_keys("k")[s.columns]}


def _softmax(s: Slice) -> Values:
    keep = np.asarray(s.case.pos.mask)[0][s.rows]
    scores = np.where(keep, s.input()[s.head][s.rows], -np.inf)
    return {"scores": scores, "columns": s.columns}


def _weighted_sum(s: Slice) -> Values:
    return {"p": s.input()[s.head][s.rows], "v": s.of_keys("v")[:, s.columns]}


def _cache(s: Slice) -> Values:
    x = s.of_head(s.input(), s.case.stage.inputs[0], "v", s.head)
    return {"x": x[np.ix_(s.rows, s.columns)]}


def _activation(s: Slice) -> Values:
    return {"x": s.input()[np.ix_(s.rows, s.columns)]}


def _product(s: Slice) -> Values:
    return {name: s.input(i)[np.ix_(s.rows, s.columns)] for i, name in enumerate("ab")}


@dataclass(frozen=True)
class Formula:
    """How the script computes a kind of stage.

    Attributes:
        code: of NumPy, from operands of these names; ``expected`` is the value.
        operands: the operands of a slice.
    """

    code: str
    operands: Callable[[Slice], Values]


FORMULAS: dict[Kind, Formula] = {
    LOOKUP: Formula("expected = table", _lookup),
    NORM: Formula(
        "root = np.sqrt((x * x).mean(-1, keepdims=True) + eps)\n"
        "expected = (x / root * weight)[:, columns]",
        _norm,
    ),
    LINEAR: Formula("expected = x @ weight.T", _linear),
    ADD: Formula("expected = a + b", _add),
    ROTATION: Formula(
        "first, second = np.split(x, 2, -1)\n"
        "turned = [first * cos - second * sin, second * cos + first * sin]\n"
        "expected = np.concatenate(turned, -1)[:, columns]",
        _rotation,
    ),
    SCORES: Formula("expected = q @ k.T / np.sqrt(q.shape[-1])", _scores),
    SOFTMAX: Formula(
        "e = np.exp(scores - scores.max(-1, keepdims=True))\n"
        "expected = (e / e.sum(-1, keepdims=True))[:, columns]",
        _softmax,
    ),
    WEIGHTED_SUM: Formula("expected = p @ v", _weighted_sum),
    CACHE: Formula("expected = x", _cache),
    ACTIVATION: Formula("expected = x / (1 + np.exp(-x))", _activation),
    PRODUCT: Formula("expected = a * b", _product),
}
# What no formula gives: the engine's own arithmetic, emulated.
GIVEN = Formula("", lambda s: {"expected": s.cut(s.case.exact)})


def write(
    report: Localization, weights: Weights, directory: Path, fault: Fault | None = None
) -> str:
    """Write the bundle of a fault, and say in one line what it shows.

    Arguments:
        report: of a trace with a fault.
        weights: the model that it was localized with.
        fault: of ``faults(report)``; None is the first.
        directory: is made; ``repro.py`` and ``repro.npz`` in it are replaced.

    Raises:
        UserError: nothing can be written there, or the fault does not show in the stage alone.
    """
    fault = fault or faults(report)[0]
    if fault.name == CHANGED:
        raise UserError(
            f"--repro {directory}: {place(fault)}: {fault.diagnosis[0].says}; that is between two "
            "calls and shows in no stage alone"
        )
    replay = Replay(report.trace, weights, numpy_dtype(report.dtype))
    with replay.numerics():
        suspect = fault.first.suspect
        item, formats = suspect.item, report.fitted.formats
        case = StageReplay(replay, item.stage, item.layer, formats=formats)
        found, needed = _smallest(case, min(suspect.expected, _usual(report, suspect), 24.0))
        values, code = _operands(found)
        data = values | {
            "found": found.cut(case.dump),
            "scale": np.sqrt(found.cut(case.size) + found.cut(case.exact) ** 2),
            "where": _places(found),
        }
    text = _script(report, fault, found, code, values, needed)
    script = directory / SCRIPT
    try:
        directory.mkdir(exist_ok=True)
        np.savez_compressed(directory / DATA, **data)
        script.write_text(text, encoding="utf-8")
    except OSError as error:
        raise UserError(f"--repro {directory}: {error.strerror}") from None
    done = subprocess.run([sys.executable, script], capture_output=True)
    if done.returncode != 1:
        script.unlink()
        raise UserError(f"--repro {directory}: the fault does not show in its stage alone")
    return f"{script}: {_slice_says(found)}; exits 1 while the bug is there"


def _usual(report: Localization, suspect: Suspect) -> float:
    """The bits that other layers of the stage have, or else stages of its kind, against what the
    script computes: where no format explains the fault, exact arithmetic. The engine without the
    bug will have no more."""
    if suspect.key in report.fitted.by_item:
        return suspect.expected
    faulty = {finding.suspect.key for finding in report.findings}
    sound = [item for item in report.items if item.key not in faulty]
    kin = [item for item in sound if item.stage.kind is suspect.item.stage.kind]
    siblings = [item for item in kin if item.name == suspect.item.name] or kin
    return min((item.shown_bits for item in siblings), default=suspect.expected)


def _smallest(case: StageReplay, expected: float) -> tuple[Slice, float]:
    """The smallest slice that shows the fault, and the bits that sound arithmetic would have."""
    whole = Slice(case, 0, np.arange(0), np.arange(0))
    dump, exact = whole.grid(case.dump), whole.grid(case.exact)
    keep = np.isfinite(exact)
    if case.stage.kind.masked:
        keep &= np.asarray(case.pos.mask)
    with np.errstate(all="ignore"):
        error = np.where(keep, np.square(dump - exact), 0.0)
    error = np.where(np.isfinite(error), error, 1e300)  # a NaN is the worst there is
    scale = np.where(keep, whole.grid(case.size) + np.square(exact), 0.0)

    def ratio(axes: tuple[int, ...], part: tuple[Any, ...] = ()) -> np.ndarray:
        e, s = error[part].sum(axes), scale[part].sum(axes)
        return e / np.where(s > 0, s, np.inf)

    head = int(ratio((1, 2)).argmax())
    for rows, columns in SIZES:
        some = np.sort(np.argsort(-ratio((1,), (head,)), kind="stable")[:rows])
        shared = np.flatnonzero(keep[head, some].all(0))
        order = np.argsort(-ratio((0,), (head, some))[shared], kind="stable")[:columns]
        found = Slice(case, head, some, np.sort(shared[order]))
        bits = _bits(found)
        # what one slice of sound arithmetic may lie below the others, as in ``stages.verdict``
        needed = expected - 2.0 - 3.0 / np.sqrt(max(len(some) * len(order), 1))
        if not bits >= needed:
            return found, needed
    return found, (bits + expected) / 2


def _bits(found: Slice) -> float:
    """The significant bits of a slice; NaN where it has NaN or infinity."""
    exact, size = found.cut(found.case.exact), found.cut(found.case.size)
    with np.errstate(all="ignore"):
        error = np.square(found.cut(found.case.dump) - exact).sum()
        scale = (size + np.square(exact)).sum()
    return float(verdict.bits(error, scale)) if np.isfinite(error) else float("nan")


def _operands(found: Slice) -> tuple[Values, str]:
    """What the script computes from and how: by the formula, if that gives what was replayed."""
    formula = FORMULAS.get(found.case.stage.kind, GIVEN)
    values, exact = formula.operands(found), found.cut(found.case.exact)
    if formula.code:
        names = {"np": np, **values}
        exec(formula.code, names)  # the very lines of the script
        size = np.sqrt(found.cut(found.case.size) + exact**2)
        if np.abs(names["expected"] - exact).max() <= 1e-9 * size.max():
            return values, formula.code
    return GIVEN.operands(found), GIVEN.code


def _places(found: Slice) -> np.ndarray:
    """[rows, columns] int: where the slice lies in the dumped file."""
    case = found.case
    entry = case.replay.trace.entries[case.key]
    numbers = np.arange(np.prod(entry.shape)).reshape(entry.shape)
    axis = case.stage.row_axes() - 1
    if numbers.ndim < len(case.stage.axes):
        numbers = np.expand_dims(numbers, axis)
    last = numbers[(slice(None),) * axis + (slice(-case.rows, None),)]
    return found.cut(last[None])


def _slice_says(found: Slice) -> str:
    case = found.case
    before = len(case.replay.trace.tokens) - case.rows
    width = found.grid(case.dump).shape
    parts = [f"head {found.head}"] if case.heads else []
    axis = "keys" if case.stage.heads_lead else "channels"
    for name, chosen, size, first in (
        ("positions", found.rows, width[1], before),
        (axis, found.columns, width[2], 0),
    ):
        mask = np.zeros(size, bool)
        mask[chosen] = True
        few = ",".join(str(first + i) for i in chosen)
        parts.append(f"{name} {few if len(chosen) <= 8 else verdict.ranges(mask, first)}")
    return ", ".join(parts)


def _script(
    report: Localization,
    fault: Fault,
    found: Slice,
    code: str,
    values: Mapping[str, np.ndarray],
    needed: float,
) -> str:
    case, trace = found.case, report.trace
    explained = fault.diagnosis[0].says if fault.diagnosis else fault.first.shape
    tensors = case.config.tensor_names(case.stage.scope, case.layer)
    read = [
        *(name for name in case.stage.inputs),
        *(tensors[name] for name in case.stage.parameters),
    ]
    missing = sorted({stage for stage, _ in fault.first.suspect.item.segment})
    from_before = f"\nNot dumped, and computed in float64: {', '.join(missing)}." if missing else ""
    format = "" if case.format is None else f"\nOperands as {case.format.says} leaves them."
    if not code:
        format += "\nWhat is expected was computed by the tool."
    names = ", ".join(values)
    held = ", ".join(f'data["{name}"]' for name in values)
    entry = trace.entries[case.key]
    file = entry.path if entry.path.endswith(".bin") else f"{case.stage.name}.npy"
    return f'''"""{place(fault)}: {_plain(explained)}

Found by {NAME} {version()} in {_plain(trace.name)} ({report.dtype}, {len(trace.tokens)} tokens).
{_slice_says(found)}, from {", ".join(read)}.{from_before}{format}

Exits 1 while the bug is there. After a change to the engine give it the stage dumped anew, as APRT
or .npy: python {SCRIPT} {_plain(file)}
"""

import sys
from pathlib import Path

import numpy as np

with np.load(Path(__file__).with_name("{DATA}")) as file:
    data = dict(file)
{names}{"," if len(values) == 1 else ""} = {held}{"," if len(values) == 1 else ""}
{code}
found = data["found"]
if len(sys.argv) > 1:
    new = sys.argv[1]
    try:
        whole = np.load(new) if new.endswith(".npy") else np.fromfile(new, "<f4", offset=12)
    except (OSError, ValueError) as problem:
        print(f"{{new}}: {{problem}}", file=sys.stderr)
        sys.exit(2)
    if whole.size != {int(np.prod(entry.shape))}:
        print(f"{{new}}: not {" x ".join(map(str, entry.shape))} values", file=sys.stderr)
        sys.exit(2)
    found = whole.ravel()[data["where"]].astype(np.float64)

# Significant bits: the error against the size of what rounding can act on.
error = np.sqrt(np.mean((found - expected) ** 2) / np.mean(data["scale"] ** 2))
bits = -np.log2(max(error, 2.0**-53))
np.set_printoptions(precision=6, suppress=True, linewidth=100, threshold=16)
print("expected", expected[0, :4], "\\nfound   ", found[0, :4])
print(f"{{bits:.1f}} significant bits, at least {needed:.1f} needed")
sys.exit(0 if bits >= {needed:.1f} else 1)
'''


def _plain(text: str) -> str:
    """Foreign text inside the script's docstring."""
    return "".join(c if c.isprintable() and c not in '"\\' else "?" for c in text)
