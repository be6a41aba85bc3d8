"""Mistake of a constant of RoPE: what each pair was turned by is read off the dump.

With a pair of channels as a complex number, the dump over the input is factor * e^(i angle): of
every position and pair. A theta, a factor or the positions are then solved for, not tried.
"""

import math
from collections.abc import Iterator
from dataclasses import replace

import jax.numpy as jnp
import numpy as np
from jax import Array

from qwen_jax import rope
from qwen_jax.models.ops import Positional
from stages.verdict import ranges
from tools.localize.mistakes.operands import rope_table, unrotated
from tools.localize.mistakes.registry import ROPES, Candidates, Edit, mistake, simple
from tools.localize.mistakes.solving import lowest, round_numbers
from tools.localize.stage_case import StageReplay

FARTHEST = 4096  # positions from its own that a row is looked for at
ROWS = 128  # the first ones, by which frequencies are told


def turns(case: StageReplay) -> np.ndarray:
    """[rows, H/2] complex: what the pairs of every position were multiplied by, the least squares
    over the heads; 0 where they say nothing."""
    if "_turns" not in case.__dict__:
        finite = np.asarray(case.finite)
        x, found = (np.where(finite, np.asarray(v), 0)[0] for v in (unrotated(case), case.dump))
        (a, b), (c, d) = (np.split(v, 2, -1) for v in (x, found))
        size = np.square(a).sum(1) + np.square(b).sum(1)
        turned = ((c + 1j * d) * (a - 1j * b)).sum(1)
        case.__dict__["_turns"] = turned / np.where(size > 0, size, np.inf)
    held: np.ndarray = case.__dict__["_turns"]
    return held


def _apart(case: StageReplay, frequency: np.ndarray) -> float:
    """How far the first rows are from having been turned by these frequencies [H/2]: 0 to 2."""
    turned = turns(case)[:ROWS]
    turned = turned / np.maximum(np.abs(turned), 1e-300)
    positions = case.positions[0, : len(turned), None]
    return 1 - float((turned * np.exp(-1j * positions * frequency)).real.mean())


def row_positions(case: StageReplay) -> np.ndarray:
    """[rows] int: the position whose angles each row was turned by."""
    turned = turns(case)
    turned = turned / np.maximum(np.abs(turned), 1e-300)
    own = case.positions[0]
    reach = min(case.config.max_position_embeddings, FARTHEST)
    frequency = rope.inverse_frequencies(case.config)[0].astype(np.float64)
    steps = np.arange(-reach, reach + 1)
    steps = steps[np.argsort(np.abs(steps), kind="stable")]  # of equals the nearest
    here = turned * np.exp(-1j * own[:, None] * frequency)
    fit = (np.exp(-1j * steps[:, None] * frequency) @ here.T).real
    return np.asarray(own + steps[fit.argmax(0)])


def _with(case: StageReplay, cos: np.ndarray, sin: np.ndarray) -> Positional:
    return case.pos.replace(cos=jnp.asarray(cos), sin=jnp.asarray(sin))


# --- theta, and other frequencies


def _with_theta(case: StageReplay, theta: float) -> Array:
    return case.run(pos=rope_table(case, case.positions, rope_theta=theta))


@mistake(
    "RoPE with theta {}",
    ROPES,
    room="constant",
    joined="number",
    near=True,
    priority=2,
    everywhere=True,
    number=(_with_theta, tuple(np.geomspace(1e3, 1e8, 24))),
)
def rope_theta(case: StageReplay) -> Candidates:
    own, size = case.config.rope_theta, case.config.head_dim
    for theta, free in _thetas(case):
        ntk = (theta / own) ** ((size - 2) / size)
        told = f"{theta:.6g}"
        if abs(ntk - round(ntk)) < 1e-3 * ntk and ntk > 1.5:
            theta, told, free = own * round(ntk) ** (size / (size - 2)), f"{told}, ", 0
            told += f"as NTK scaling by {round(ntk)} makes of {own:g}"
        if theta != own:
            yield Edit(told, _with_theta(case, theta), free)


def _thetas(case: StageReplay) -> Iterator[tuple[float, int]]:
    if not case.dumped:
        return
    power = 2 * np.arange(case.config.head_dim // 2) / case.config.head_dim
    found = lowest(lambda theta: _apart(case, theta**-power), np.geomspace(500, 5e8, 512))
    if 500 < found < 5e8:
        yield from round_numbers(found, 3)


@mistake("RoPE frequencies theta^(-{}) instead of theta^(-2i/H)", ROPES, room="constant")
def rope_frequency_step(case: StageReplay) -> Candidates:
    for says, power in (("i/H", 0.5), ("4i/H", 2.0)):
        yield says, _with_theta(case, case.config.rope_theta**power)


@mistake("RoPE positions {}", ROPES, room="constant", priority=2)
def rope_scaled(case: StageReplay) -> Candidates:
    if not case.dumped:
        return
    right = rope.inverse_frequencies(case.config)[0].astype(np.float64)
    whole = np.arange(2.0, 65)
    tried = np.sort(np.concatenate([np.geomspace(1 / 64, 64, 1024), whole, 1 / whole]))
    ratio = lowest(lambda by: _apart(case, by * right), tried)
    if abs(ratio - 1) < 1e-3:
        return
    turned = (1 / ratio, "divided") if ratio < 1 else (ratio, "multiplied")
    for factor, free in round_numbers(turned[0], 2):
        by = 1 / factor if ratio < 1 else factor
        pos = _with(case, *case.cos_sin(case.config, case.positions * by))
        yield Edit(f"{turned[1]} by {factor:.6g}", case.run(pos=pos), free)


# --- the factor on cos and sin


@mistake("cos and sin of RoPE multiplied by {}", ROPES, room="constant", near=True, priority=2)
def rope_magnitude(case: StageReplay) -> Candidates:
    """YaRN's attention factor, its default for the one that the config states, or any other."""
    if not case.dumped:
        return
    _, own = rope.inverse_frequencies(case.config)
    y, found = (
        np.where(np.asarray(case.finite), np.asarray(v), 0) for v in (case.exact, case.dump)
    )
    factor = float((y * found).sum() / max(np.square(y).sum(), 1e-300)) * own
    if factor <= 0:
        return
    stretch = math.exp((factor - 1) / 0.1)  # of YaRN's 0.1 ln(s) + 1
    where = f", not {own:.6g}" if own != 1 else ""
    if case.config.yarn is not None:
        where = f", not the config's attention_factor {own:.6g}"
    if 1.5 < stretch < 1e4 and abs(stretch - round(stretch)) < 1e-3 * stretch:
        exact = 0.1 * math.log(round(stretch)) + 1
        told = f"{exact:.6g}, YaRN's attention_factor 0.1 ln {round(stretch)} + 1{where}"
        yield Edit(told, case.exact * (exact / own))
    for number, free in round_numbers(factor, 2):
        yield Edit(f"{number:.6g}{where}", case.exact * (number / own), free)


# --- positions


simple("rope_sign", "RoPE turns the other way", ROPES, room="constant", everywhere=True,
       candidate=lambda case: case.run(pos=case.pos.replace(sin=-case.pos.sin)))  # fmt: skip
simple("rope_twice", "rotated twice", ROPES, room="constant",
       candidate=lambda case: _at(case, 2 * case.positions[0], "").value)  # fmt: skip


def _positions(case: StageReplay) -> np.ndarray | None:
    """The position of each row, where the dump says so and it is not the row's own."""
    if not case.dumped:
        return None
    found = row_positions(case)
    return None if np.array_equal(found, case.positions[0]) else found


def _at(case: StageReplay, found: np.ndarray, told: str) -> Edit:
    return Edit(told, case.run(pos=rope_table(case, found[None])))


def _shift(case: StageReplay) -> int | None:
    """By how many positions all rows are off, if all by as many."""
    found = _positions(case)
    off = None if found is None else np.unique(found - case.positions[0])
    return int(off[0]) if off is not None and len(off) == 1 else None


@mistake("RoPE positions off by {}", ROPES, room="constant", everywhere=True)
def rope_position_off_by_one(case: StageReplay) -> Candidates:
    first = int(case.replay.positions[0, 0])  # some count from 0 wherever they begin
    shift = _shift(case)
    for step in (1, -1) if not case.dumped else (shift,) if shift in (1, -1, -first) else ():
        yield _at(case, case.positions[0] + step, f"{step:+d}")


@mistake(
    "RoPE positions off by {}, as if padding or a cached prefix were not counted",
    ROPES,
    room="constant",
)
def positions_not_shifted(case: StageReplay) -> Candidates:
    if shift := _shift(case):
        yield _at(case, case.positions[0] + shift, f"{shift:+d}")


@mistake("every position rotated as position {}", ROPES, room="constant")
def rope_position_constant(case: StageReplay) -> Candidates:
    found = _positions(case)
    # at position 0 nothing is rotated, which has a name
    if found is not None and len(found) > 1 and found[0] and len(np.unique(found)) == 1:
        yield _at(case, found, str(found[0]))


@mistake("RoPE positions of {}", ROPES, room="constant", priority=2)
def rope_positions_some(case: StageReplay) -> Candidates:
    """Some rows at other positions than their own."""
    found = _positions(case)
    if found is not None and _shift(case) is None and found.any():
        off = found - case.positions[0]
        steps = sorted({int(step) for step in off if step}, key=abs)
        first = len(case.replay.trace.tokens) - case.rows
        if len(steps) == 1:  # which rows may differ by layer: ``where`` has them
            told = f"some rows off by {steps[0]:+d}"
        elif len(steps) <= 4:
            told = "; ".join(f"rows {ranges(off == s, first)} off by {s:+d}" for s in steps)
        else:
            some = np.flatnonzero(off)[:4]
            told = "rows " + ", ".join(f"{first + t} as of {found[t]}" for t in some) + ", ..."
        yield _at(case, found, told)


# --- YaRN


@mistake("YaRN not applied{}", ROPES, room="constant", near=True, everywhere=True)
def rope_yarn_missing(case: StageReplay) -> Candidates:
    if case.config.yarn is not None:
        yield "", case.run(pos=rope_table(case, case.positions, yarn=None))
        plain = replace(case.config.yarn, attention_factor=1.0)
        yield " to the magnitude", case.run(pos=rope_table(case, case.positions, yarn=plain))


@mistake("YaRN's factor on cos and sin applied twice", ROPES, room="constant", near=True)
def rope_mscale_twice(case: StageReplay) -> Candidates:
    _, factor = rope.inverse_frequencies(case.config)
    if factor != 1:
        yield "", case.exact * factor


@mistake("YaRN's stretching of positions applied twice", ROPES, room="constant", near=True)
def rope_factor_twice(case: StageReplay) -> Candidates:
    if case.config.yarn is not None:
        _, magnitude = rope.inverse_frequencies(case.config)
        twice = replace(
            case.config.yarn, factor=case.config.yarn.factor**2, attention_factor=magnitude
        )
        yield "", case.run(pos=rope_table(case, case.positions, yarn=twice))
