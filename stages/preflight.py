"""What must be the same before any number between two traces means anything."""

from dataclasses import dataclass
from typing import Any

import numpy as np

from stages.architecture import Key
from stages.compare import coarser
from stages.errors import NotComparable
from stages.files import numpy_dtype
from stages.trace import Trace


@dataclass(frozen=True)
class Preflight:
    """The outcome of a preflight that passed.

    Attributes:
        notes: one line for each thing that differs or could not be checked, and does no harm.
        common: stages on both sides, in computation order.
        only_a, only_b: stages on one side alone.
    """

    notes: list[str]
    common: list[Key]
    only_a: list[Key]
    only_b: list[Key]


def check(a: Trace, b: Trace) -> Preflight:
    """Compare what two traces were made from.

    Raises:
        NotComparable: other tokens, config or weights, or no stage in common.
    """
    notes: list[str] = []
    if a.tokens != b.tokens:
        raise NotComparable(f"not comparable: {_differ('tokens', a.tokens, b.tokens)}")
    if differing := _keys_that_differ(a.config, b.config):
        shown = ", ".join(f"{k} {a.config.get(k)!r} / {b.config.get(k)!r}" for k in differing[:3])
        raise NotComparable(f"not comparable: the configs differ: {shown}")
    _check_weights(a, b, notes)
    if a.positions != b.positions:
        raise NotComparable(f"not comparable: {_differ('positions', a.positions, b.positions)}")
    if a.dtype and b.dtype and a.dtype != b.dtype:
        notes.append(f"dtypes differ: {a.dtype} / {b.dtype}; judged as {coarser(a.dtype, b.dtype)}")
    for trace in (a, b):
        if trace.manifest is None:
            notes.append(
                f"{trace.name} has no manifest: its {'' if trace.dtype else 'dtype, '}weights and "
                "tokens are taken on trust"
            )
        if changed := trace.changed:
            more = f", and {len(changed) - 1} more rows" if len(changed) > 1 else ""
            notes.append(f"{trace.name}: {changed[0]}{more}; a row of a cache is written once")
    common = [key for key in a.entries if key in b.entries]
    if not common:
        raise NotComparable("not comparable: the traces have no stage in common")
    _check_embedding(a, b, notes)
    return Preflight(
        notes=notes,
        common=common,
        only_a=[key for key in a.entries if key not in b.entries],
        only_b=[key for key in b.entries if key not in a.entries],
    )


def _differ(what: str, a: tuple[int, ...], b: tuple[int, ...]) -> str:
    if len(a) != len(b):
        return f"{len(a)} {what} / {len(b)} {what}"
    at = next(i for i, (x, y) in enumerate(zip(a, b, strict=True)) if x != y)
    return f"the {what} differ, first in row {at}: {a[at]} / {b[at]}"


def _keys_that_differ(a: dict[str, Any], b: dict[str, Any]) -> list[str]:
    return sorted(key for key in a.keys() | b.keys() if a.get(key) != b.get(key))


def _check_weights(a: Trace, b: Trace, notes: list[str]) -> None:
    if a.manifest is None or b.manifest is None:
        return
    weights_a, weights_b = a.manifest.model.weights, b.manifest.model.weights
    shared = weights_a.keys() & weights_b.keys()
    if differing := sorted(name for name in shared if weights_a[name] != weights_b[name]):
        raise NotComparable(
            f"not comparable: {len(differing)} of {len(shared)} weight tensors differ, first "
            f"{differing[0]}; localize --against judges each side by its own weights"
        )
    if unshared := weights_a.keys() ^ weights_b.keys():
        notes.append(f"{len(unshared)} weight tensors were used on one side only")


def _check_embedding(a: Trace, b: Trace, notes: list[str]) -> None:
    """Tokens and weights show in the embedding before anything has been computed."""
    key = (b.arch.first.name, 0)
    if key not in a.entries or key not in b.entries:
        notes.append("no embedding on both sides: tokens and weights are unproved by it")
        return
    dtype = numpy_dtype(coarser(a.dtype, b.dtype))
    same = np.array_equal(a.read(*key).astype(dtype), b.read(*key).astype(dtype), equal_nan=True)
    if not same and (a.manifest is None or b.manifest is None):
        raise NotComparable(
            "not comparable: the embeddings differ, so tokens or weights do (or the lookup itself "
            "is wrong); nothing after it could be judged"
        )
