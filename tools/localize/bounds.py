"""What rounding can do at most to an element of a stage, and by what factor an error exceeds it.

With a unit roundoff u, n terms t and their exact sum y, a computed sum is off by

    at most  n u Σ|t|                    in any order (Higham 2002, section 4.2, to first order);
    at most  λ u √(Σ S_k²)               with probability 1 - 2 exp(-λ²/2), S_k the partial sums
                                         (Higham & Mary 2019; Hallman & Ipsen 2023, theorem 4.2).

A linear layer adds terms in an order that has nothing to do with their values, so that the mean of
S_k² over all orders stands for it: Σ S_k² ≈ n (y²/3 + Σt²/6). The keys of attention stand in the
order of time, and their weights and values change slowly: roundings add up in one direction, and
only the bound for any order holds. A mean of squares, a softmax and a rotation have the running
bounds of their few roundings; what an exponential or a rotation makes of its argument's rounding is
``local_error.allowance``.

An error below the bound needs no mistake. One above it needs one, whatever its neighbours do.
"""

from functools import partial

import jax.numpy as jnp
import numpy as np
from jax import Array

from qwen_jax.local_error import allowance
from stages import verdict
from stages.architecture import (
    ACTIVATION,
    ADD,
    CACHE,
    LINEAR,
    LOOKUP,
    NORM,
    ROTATION,
    SCORES,
    SOFTMAX,
    WEIGHTED_SUM,
)
from stages.verdict import LocalError
from tools.localize.stage_case import StageReplay

# Unit roundoff of each precision class. Integers have half a step of their largest value.
UNITS = {
    "exact": 2.0**-53, "f64": 2.0**-53, "f32": 2.0**-24, "tf32/f16": 2.0**-11, "bf16": 2.0**-8,
    "8-bit": 2.0**-8, "lower": 2.0**-4,
}  # fmt: skip
LAMBDA = 8.0  # exceeded by one element in 10^13
FEW = 8.0  # roundings of a norm, softmax or activation that do not grow with its length
BEHIND = {True: 2.0**8, False: LAMBDA}  # of a gap's rounding; with a softmax in the gap


def excess(case: StageReplay, item: LocalError, focus: Array | None, unit: float) -> float:
    """By what factor an error exceeds what arithmetic of unit roundoff ``unit`` can do, in the
    element where it does so most. Above 1 it is no rounding.

    ``focus`` [1, ...] bool: the elements in question; None is all.
    """
    if item.segment:  # the rounding of what was not dumped is known from computing it twice
        softmax = any(verdict.any_stage(name).kind is SOFTMAX for name, _ in item.segment)
        lacking = verdict.NOMINAL[case.replay.dtype.name] - item.level
        return float(2.0 ** min(lacking, 60.0) / BEHIND[softmax])
    error = np.abs(np.asarray(case.dump) - np.asarray(case.exact))
    error = error - np.sqrt(np.asarray(case.expected()))  # codes on the edge of a step
    most = np.asarray(_most(case, unit))
    keep = np.asarray(case.finite) & np.isfinite(error)
    if focus is not None:
        keep = keep & np.asarray(focus)
    with np.errstate(divide="ignore", invalid="ignore"):
        factor = np.where(keep & (error > 0), error / most, 0.0)
    return float(factor.max(initial=0.0))


def _most(case: StageReplay, unit: float) -> Array:
    """The largest error of each element that rounding explains, in the shape of the dump."""
    plain = case.in_format(None)
    y, size = jnp.abs(case.exact), jnp.sqrt(case.size)
    sums = min(unit, UNITS["f32"])  # what narrow operands give is added up in float32
    kind = case.stage.kind
    allowed = allowance(
        case.stage, case.config, case.pos, case.replay.angles[-case.rows :], case.inputs,
        case.exact, case.replay.dtype,
    )  # fmt: skip
    if kind is LINEAR:
        width = case.inputs[0].shape[-1]
        partial_sums = jnp.sqrt(width * (y**2 / 3 + size**2 / 6))
        return LAMBDA * (sums * partial_sums + _operands(case, unit)) + 2 * unit * y + allowed
    if kind in (SCORES, WEIGHTED_SUM):
        magnitudes = plain.run(*[jnp.abs(x) for x in case.inputs])
        if kind is SCORES:
            count = _likely(case.config.head_dim)
        else:
            count = np.asarray(case.pos.mask).sum(-1)[..., None]  # keys that a row sees
        operands = 2 * unit if unit > sums else 0.0
        return (count * sums + operands + 2 * unit) * magnitudes + allowed
    of_value = partial(_times, y, unit)
    if kind is NORM:
        return (_likely(case.inputs[0].shape[-1]) * sums + FEW * unit) * y + allowed
    if kind is SOFTMAX:
        added = _likely(case.pos.mask.shape[-1]) * sums
        return (added + FEW * unit) * y + allowed * (unit / UNITS["f32"])
    if kind is ROTATION:
        return FEW * unit * size + 4 * allowed
    if kind is ADD:
        return 2 * unit * size + allowed
    if kind in (LOOKUP, CACHE):
        return of_value(2.0 if unit > UNITS["f32"] else 0.0)
    factor = FEW if kind is ACTIVATION else 2.0
    return of_value(factor) + allowed


def _times(y: Array, unit: float, roundings: float) -> Array:
    return roundings * unit * y


def _likely(count: int) -> float:
    """n, or λ √n where that is less."""
    return float(min(count, LAMBDA * np.sqrt(count)))


def _operands(case: StageReplay, unit: float) -> Array:
    """The root of the summed squares of what narrow operands are off by: each by its own unit, and
    whole numbers by that of the largest of their row."""
    if unit <= UNITS["f32"]:
        return jnp.zeros(())
    if unit <= UNITS["tf32/f16"] or case.replay.dtype != np.float32:
        return unit * jnp.sqrt(2 * case.size)
    x = case.inputs[0]
    largest = jnp.broadcast_to(jnp.abs(x).max(-1, keepdims=True), x.shape)
    return unit * jnp.sqrt(case.squared([largest]))


def unit_of(item: LocalError, level: float) -> float:
    """The unit roundoff of the arithmetic that leaves so many bits at a stage."""
    return UNITS[verdict.class_of(level, item.stage, item.segment) or "lower"]
