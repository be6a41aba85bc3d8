"""The shape of an error that no entry of the catalogue explains, or that any stage can have.

Fits with few parameters: a constant factor, an additive constant, saturation, zeros, rounding to
a format; over the slices that are wrong, or over everything.
"""

from collections.abc import Iterator
from typing import NamedTuple

import jax.numpy as jnp
import ml_dtypes
import numpy as np
from jax import Array

from stages.verdict import ranges
from tools.localize.stage_case import StageReplay


class Fit(NamedTuple):
    """A candidate for the dump, its name, what it says, how many numbers in it were fitted to the
    dump, and whether it need not bring back everything: what was quantised after it comes out with
    its own rounding."""

    name: str
    says: str
    value: Array
    free: int = 0
    smooth: bool = False


def fits(case: StageReplay, masks: dict[str, np.ndarray], focus: Array | None) -> Iterator[Fit]:
    """Candidates for the dump; ``focus`` is where the error is, None for everywhere."""
    exact, dump = case.exact, case.dump
    here = jnp.ones(dump.shape, bool) if focus is None else focus
    finite = here & case.finite & jnp.isfinite(exact)
    d, y = jnp.where(finite, dump, 0.0), jnp.where(finite, exact, 0.0)
    first = len(case.replay.trace.tokens) - case.rows
    place = _place(masks, first)
    confined = [axis for axis, mask in masks.items() if mask.any() and not mask.all()]

    name = "dead_head" if "head" in confined or _dead_heads(case) is not None else "zeros"
    dead = _dead_heads(case)
    if dead is not None:
        heads = ranges(dead)
        yield Fit("dead_head", f"head {heads} is zero", _zero_heads(case, dead))
    yield Fit(name, f"zero{place}", jnp.where(here, 0.0, exact))

    for name, part in _weights(case):
        along = jnp.asarray(part)
        for fit in _linear_fits(
            case, jnp.where(along, d, 0.0), jnp.where(along, y, 0.0), finite & along, here & along
        ):
            if fit.name == "constant_factor":
                yield fit._replace(name="row_scaled", says=f"{name} multiplied by {fit.says}")

    one = "channel" in confined and "position" not in confined
    for fit in _linear_fits(case, d, y, finite, here):
        if fit.name == "constant_factor":
            renamed = "row_scaled" if one else fit.name
            says = f"{_subject(masks, first)} multiplied by {fit.says}"
            yield fit._replace(name=renamed, says=says)
        else:
            yield fit._replace(says=f"{fit.says} added{place}")
    high, low = float(d.max()), float(d.min())
    if float(y.max()) > high or float(y.min()) < low:
        limit = max(high, -low)
        for bottom, top in ((low, high), (-limit, limit), (-np.inf, high), (low, np.inf)):
            says = f"clamped to {bottom:.6g} .. {top:.6g}"
            yield Fit("saturation", says, jnp.clip(exact, bottom, top), 2)
    for dtype in (ml_dtypes.bfloat16, np.float16):
        name = np.dtype(dtype).name
        says = f"result rounded to {name}{place}"
        yield Fit(f"rounded_to_{name}", says, _rounded(exact, dtype))
        if case.stage.kind.sums_products:
            inputs = [_rounded(x, dtype) for x in case.inputs]
            value = case.run(*inputs)
            yield Fit(f"computed_in_{name}", f"computed on {name} inputs{place}", value)
            says = f"computed in {name}{place}"
            yield Fit(f"computed_in_{name}", says, _rounded(value, dtype))


def _weights(case: StageReplay) -> Iterator[tuple[str, np.ndarray]]:
    """Of several weights side by side, each and which channels [C] are its own."""
    first, width = 0, case.dump.shape[-1]
    for name, weight in case.weights.items() if len(case.weights) > 1 else ():
        yield name, (np.arange(width) >= first) & (np.arange(width) < first + len(weight))
        first += len(weight)


def smooth_function(case: StageReplay) -> Fit:
    """What a dump would be if its error were a smooth function of the input: at each element the
    mean of the errors of the next smaller and the next larger input."""
    name, says = "function_approximate", "a smooth function of the input, but not this one"
    x, y, d = (np.asarray(v).ravel() for v in (case.inputs[0], case.exact, case.dump))
    order = np.argsort(x, kind="stable")
    error = np.nan_to_num(d - y)[order]
    if len(error) < 3:
        return Fit(name, says, case.exact, smooth=True)
    between = np.concatenate([error[1:2], (error[:-2] + error[2:]) / 2, error[-2:-1]])
    found = np.empty_like(between)
    found[order] = between
    value = case.exact + jnp.asarray(found).reshape(case.exact.shape)
    return Fit(name, says, value, value.size // 2, smooth=True)


def uniform(case: StageReplay) -> Iterator[Fit]:
    """One factor, or one offset, for the whole stage."""
    here = jnp.ones(case.dump.shape, bool)
    finite = case.finite & jnp.isfinite(case.exact)
    d, y = jnp.where(finite, case.dump, 0.0), jnp.where(finite, case.exact, 0.0)
    yield from _linear_fits(case, d, y, finite, here)


def _linear_fits(
    case: StageReplay, d: Array, y: Array, finite: Array, here: Array
) -> Iterator[Fit]:
    """The factor and the offset that fit best ``here``; d and y are zero where not ``finite``."""
    if float((y * y).sum()) == 0 or not bool(d.any()):
        return
    factor = float((d * y).sum() / (y * y).sum())
    value = jnp.where(here, factor * case.exact, case.exact)
    yield Fit("constant_factor", f"{factor:.6g}", value, 1, smooth=True)
    offset = float((d - y).sum() / finite.sum())
    value = jnp.where(here, case.exact + offset, case.exact)
    yield Fit("additive_constant", f"{offset:.6g}", value, 1, smooth=True)


def _rounded(x: Array, dtype: type) -> Array:
    return jnp.asarray(np.asarray(x).astype(dtype).astype(np.float64))


def _dead_heads(case: StageReplay) -> np.ndarray | None:
    """Which heads of the dump are zero throughout while they should not be."""
    heads = case.heads
    if not heads:
        return None
    by_head = case.stage.by_head
    zero = np.asarray(by_head(heads, case.dump) == 0).all((1, 2))
    should = np.asarray(by_head(heads, case.exact) != 0).any((1, 2))
    dead = np.asarray(zero & should)
    return dead if dead.any() else None


def _zero_heads(case: StageReplay, dead: np.ndarray) -> Array:
    return jnp.where(case.stage.spread("head", dead, case.exact.shape), 0.0, case.exact)


def _place(masks: dict[str, np.ndarray], first: int) -> str:
    """Which slices, as far as not all; ``first`` is the first row of the sequence in them."""
    parts = [
        f"{axis} {ranges(mask, first if axis == 'position' else 0)}"
        for axis, mask in masks.items()
        if mask.any() and not mask.all()
    ]
    return f" in {', '.join(parts)}" if parts else ""


def _subject(masks: dict[str, np.ndarray], first: int) -> str:
    place = _place(masks, first).removeprefix(" in ")
    return place or "everything"


def describe(case: StageReplay, masks: dict[str, np.ndarray], focus: Array | None) -> str:
    """One line on an error that nothing explains: where it is, and how large."""
    first = len(case.replay.trace.tokens) - case.rows
    finite = case.finite & jnp.isfinite(case.exact)
    if focus is not None:
        finite &= focus
    d, y = (np.asarray(jnp.where(finite, x, 0.0)) for x in (case.dump, case.exact))
    size, error = np.sqrt((y**2).sum()), np.sqrt(((d - y) ** 2).sum())
    wrong = int((np.abs(d - y) > 1e-3 * np.abs(y).max()).sum())
    correlation = float((d * y).sum() / (np.sqrt((d**2).sum()) * size)) if size and d.any() else 0.0
    relative = error / size if size else np.inf
    place = _place(masks, first)
    return (
        f"no known mistake fits: relative error {relative:.2g}{place}, {wrong} elements "
        f"clearly off, correlation with the right value {correlation:.3f}"
    )
