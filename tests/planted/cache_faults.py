"""Mistakes that show only once keys and values come out of a cache: right in a prefill, wrong in
the decode after it.

    fault = CACHE_FAULTS["cache.slot_off_by_one"]
    engine = Engine.open("qwen_jax/demo")
    fault.apply(engine, layers=[2])
    run = engine.run(tokens, steps=[32, *[1] * 8])
    run.first  # {(2, "k_cache"): 32}: the first row that is not what it should be

``decoding`` makes one of any other mistake: what it is in calls of one token alone.
"""

from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np

from tests.planted.faults import FAULTS, Fault, attend, flat, scores, tiled
from tools.numpy_engine.engine import (
    OPERATIONS,
    Array,
    Context,
    Operation,
    float8,
    rms_norm,
    rope_table,
    rotate,
    softmax,
)

CACHE_FAULTS: dict[str, Fault] = {}


def _later(stage: str, wrong: Operation) -> Operation:
    """Wrong in calls of one token after the first call, else right."""
    return lambda c: (wrong if c.past and len(c.positions) == 1 else OPERATIONS[stage])(c)


def decoding(name: str) -> Fault:
    """A fault of ``faults.FAULTS`` where it is made in the decode alone."""
    fault = FAULTS[name]
    operations = {stage: _later(stage, wrong) for stage, wrong in fault.operations.items()}
    return replace(fault, name=f"decode.{name}", operations=operations)


def _add(
    what: str,
    operations: Mapping[str, Operation],
    says: str,
    diagnosis: str,
    only_decoding: bool = True,
    **more: Any,
) -> None:
    """Register a fault; ``more`` is as of ``Fault``."""
    if only_decoding:
        operations = {stage: _later(stage, wrong) for stage, wrong in operations.items()}
    name = f"cache.{what}"
    assert name not in CACHE_FAULTS
    CACHE_FAULTS[name] = Fault(
        name, tuple(operations), diagnosis, says, operations=operations, **more
    )


_everywhere = partial(_add, only_decoding=False)


# --- positions

Positions = Callable[[Context], Array]


def _at(positions: Positions, part: int, c: Context) -> Array:
    """q (part 0) or k (1) rotated for other positions, ``positions(c)``."""
    s, store = c.shape, c.engine.arithmetic.store
    cos, sin = rope_table(positions(c), s.head, s.theta, yarn=s.yarn)
    return rotate(c.attended()[part], store(cos), store(sin))


def _both(positions: Positions) -> dict[str, Operation]:
    return {
        stage: partial(_at, positions, part)
        for part, stage in enumerate(("q_post_rope", "k_post_rope"))
    }


_add(
    "position_restarts",
    _both(lambda c: c.positions - c.prompt),
    "the first decoded token is at position 0",
    "positions_not_shifted",
)
_add(
    "position_off_by_one",
    _both(lambda c: c.positions + 1),
    "decoded tokens are one position too far on",
    "rope_position_off_by_one",
    accept=("positions_not_shifted",),
)
_add(
    "position_frozen",
    _both(lambda c: c.prompt + 0 * c.positions),
    "all decoded tokens are at the position of the first",
    "rope_position_constant",
)
_add(
    "k_position_late",
    {"k_post_rope": partial(_at, lambda c: c.positions - 1, 1)},
    "k of decoded tokens is one position back",
    "rope_position_off_by_one",
    accept=("positions_not_shifted",),
)


def _first_head(part: int, c: Context) -> Array:
    x = c.attended()[part]
    turned = rotate(x, *c.tables())
    return np.where(np.arange(x.shape[1])[:, None] == 0, turned, x)


_add(
    "first_head_rotated",
    {"q_post_rope": partial(_first_head, 0), "k_post_rope": partial(_first_head, 1)},
    "only head 0 is rotated at T = 1",
    "rope_first_head_only",
)


def _factor_twice(part: int, c: Context) -> Array:
    s, store = c.shape, c.engine.arithmetic.store
    assert s.yarn is not None
    size = s.yarn.get("attention_factor") or 0.1 * np.log(s.yarn["factor"]) + 1
    yarn = {**s.yarn, "factor": s.yarn["factor"] ** 2, "attention_factor": size}
    cos, sin = rope_table(c.positions, s.head, s.theta, yarn=yarn)
    return rotate(c.attended()[part], store(cos), store(sin))


_add(
    "factor_twice",
    {"q_post_rope": partial(_factor_twice, 0), "k_post_rope": partial(_factor_twice, 1)},
    "the factor of scaled RoPE is applied twice",
    "rope_factor_twice",
    yarn=True,
)


def _magnitude(part: int, c: Context, squared: bool) -> Array:
    """Scaled RoPE whose magnitude is applied twice, or to which nothing is scaled."""
    s, store = c.shape, c.engine.arithmetic.store
    assert s.yarn is not None
    cos, sin = rope_table(c.positions, s.head, s.theta, yarn=s.yarn if squared else None)
    size = np.float32(0.1 * np.log(s.yarn["factor"]) + 1 if squared else 1)
    return rotate(c.attended()[part], store(cos), store(sin)) * size


_everywhere(
    "magnitude_twice",
    {f"{x}_post_rope": partial(_magnitude, n, squared=True) for n, x in enumerate("qk")},
    "the magnitude of scaled RoPE is applied twice",
    "rope_mscale_twice",
    yarn=True,
)
_everywhere(
    "scaling_ignored",
    {f"{x}_post_rope": partial(_magnitude, n, squared=False) for n, x in enumerate("qk")},
    "plain RoPE where it is scaled",
    "rope_yarn_missing",
    yarn=True,
)
_add(
    "factor_not_inverted",
    _both(lambda c: np.float32(4) * c.positions),
    "positions multiplied by a factor that should divide them",
    "rope_scaled",
)


# --- what is put away, and where


def _new(stage: str, c: Context) -> Array:
    """The rows [T, K, H] of this call that belong into the cache."""
    return c["k_post_rope"] if stage == "k_cache" else c.attended()[2]


_everywhere(
    "k_before_rope",
    {"k_cache": lambda c: c.put("k_cache", c.attended()[1])},
    "k is put away before RoPE",
    "cache_before_rope",
)
_everywhere(
    "v_before_bias",
    {"v_cache": lambda c: c.put("v_cache", c.heads(c["qkv_matmul"])[2])},
    "v is put away before its bias",
    "v_without_bias",
    bias=True,
)
_everywhere(
    "kv_exchanged",
    {
        "k_cache": lambda c: c.put("k_cache", _new("v_cache", c)),
        "v_cache": lambda c: c.put("v_cache", _new("k_cache", c)),
    },
    "k is put away as v, and v as k",
    "cache_kv_exchanged",
)


def _not_written(stage: str, c: Context) -> Array:
    """The second decoded token's row is left as it was."""
    rows = _new(stage, c)
    return c.put(stage, rows[: 0 if c.past == c.prompt + 1 else None])


def _kept_from_before(stage: str, c: Context) -> Array:
    """The third decoded token's row is the one before it once more."""
    if c.past != c.prompt + 2:
        return c.put(stage, _new(stage, c))
    c.memory[stage][c.past] = c.memory[stage][c.past - 1]
    return c.put(stage, _new(stage, c)[:0])


def _tail_lost(stage: str, c: Context) -> Array:
    """The last three rows of the prompt's last chunk are not written."""
    rows = _new(stage, c)
    return c.put(stage, rows[: -3 if c.past and c.keys == c.prompt else None])


def _next_slot(stage: str, c: Context) -> Array:
    return c.put(stage, _new(stage, c), c.past + 1)


def _of_another_sequence(stage: str, c: Context) -> Array:
    """The second decoded token's row is what other tokens would have there."""
    if c.past != c.prompt + 1:
        return c.put(stage, _new(stage, c))
    table = c.engine.weights["model.embed_tokens.weight"]
    x = rms_norm(table[5:6] + table[9:10], c.weight("input_layernorm.weight"), c.shape.eps)
    name = "self_attn.k_proj" if stage == "k_cache" else "self_attn.v_proj"
    row = x @ c.weight(f"{name}.weight").T
    if c.shape.architecture == "qwen2":
        row = row + c.weight(f"{name}.bias")
    row = row.reshape(1, c.shape.kv_heads, c.shape.head)
    return c.put(stage, rotate(row, *c.tables()) if stage == "k_cache" else row)


for _stage, _letter in (("k_cache", "k"), ("v_cache", "v")):
    _add(
        f"{_letter}_row_not_written",
        {_stage: partial(_not_written, _stage)},
        f"one row of {_letter} is not written",
        "cache_row_not_written",
    )
    _add(
        f"{_letter}_row_stale",
        {_stage: partial(_kept_from_before, _stage)},
        f"one row of {_letter} is the one before it",
        "cache_row_stale",
    )
    _everywhere(
        f"{_letter}_tail_not_written",
        {_stage: partial(_tail_lost, _stage)},
        f"the last rows of {_letter} of the last chunk are not written",
        "cache_row_not_written",
        accept=("tail_not_written",),
    )
    _add(
        f"{_letter}_slot_off_by_one",
        {_stage: partial(_next_slot, _stage)},
        f"rows of {_letter} go into the slot after theirs",
        "cache_slot_off_by_one",
    )
    _add(
        f"{_letter}_of_another_sequence",
        {_stage: partial(_of_another_sequence, _stage)},
        f"one row of {_letter} is another sequence's",
        "cache_row_foreign",
    )
_add(
    "v_not_appended",
    {"v_cache": lambda c: c.put("v_cache", c["k_post_rope"][:0])},
    "v of decoded tokens is never put away",
    "cache_row_not_written",
    accept=("tail_not_written",),
)
_everywhere(
    "k_heads_exchanged",
    {"k_cache": lambda c: c.put("k_cache", c["k_post_rope"][:, ::-1])},
    "heads of k are put away in the opposite order",
    "heads_permuted",
)


def _scale_lost(c: Context) -> Array:
    """Put away over a scale in float8, and read back without it."""
    scale = np.float32(0.4)
    return c.put("k_cache", float8(c["k_post_rope"] / scale, "float8_e4m3fn"))


_everywhere(
    "scale_lost",
    {"k_cache": _scale_lost},
    "the scale of a float8 cache is not applied when it is read",
    "cache_scale_lost",
)


# --- what is read, and by whom


def _overwritten(c: Context, held: Array) -> Array:
    """From the third decoded token on, its row stands in row 3 too."""
    if c.keys > c.prompt + 2:
        held = held.copy()
        held[3] = held[c.prompt + 2]
    return held


def _by_blocks(c: Context, held: Array) -> Array:
    """The first two blocks of four rows exchanged, as by a wrong table of pages."""
    order = np.arange(len(held))
    order[:8] = np.roll(order[:8], 4)
    return held[order]


def _ring(c: Context, held: Array) -> Array:
    """The rows of the window as they lie in a ring buffer, not as they follow each other."""
    size = c.shape.window or len(held)
    first = max(0, len(held) - size)
    order = np.arange(len(held))
    order[first:] = sorted(order[first:], key=lambda row: row % size)
    return held[order]


def _unwritten(c: Context, held: Array) -> Array:
    """Read before this token's own row is written."""
    held = held.copy()
    held[-1] = 0
    return held


_add(
    "k_row_overwritten",
    {"attn_scores": lambda c: scores(c, k=_overwritten(c, c.k))},
    "a later token's k is written over a row of the prompt",
    "cache_row_overwritten",
)
_add(
    "v_row_overwritten",
    {"attention": lambda c: flat(attend(c, _overwritten(c, c.v)))},
    "a later token's v is written over a row of the prompt",
    "cache_row_overwritten",
)
_add(
    "k_blocks_exchanged",
    {"attn_scores": lambda c: scores(c, k=_by_blocks(c, c.k))},
    "blocks of k are read in another order",
    "cache_rows_permuted",
)
_add(
    "k_ring_order",
    {"attn_scores": lambda c: scores(c, k=_ring(c, c.k))},
    "a ring buffer of a sliding window is read from its first slot on",
    "cache_ring_order",
    window=True,
)
_add(
    "k_read_before_write",
    {"attn_scores": lambda c: scores(c, k=_unwritten(c, c.k))},
    "a token's own k is not there yet when its scores are computed",
    "cache_read_before_write",
)
_add(
    "gqa_tiled",
    {
        "attn_scores": lambda c: scores(c, groups=tiled(c)),
        "attention": lambda c: flat(attend(c, groups=tiled(c))),
    },
    "query head n reads key/value head n % K of the cache",
    "gqa_tiled",
)


# --- the mask of a call that is not the first


def _with_past(wrong: Operation) -> Operation:
    return lambda c: (wrong if c.past else OPERATIONS["attn_softmax"])(c)


def _top_left(c: Context) -> Array:
    """Row i of the call sees keys 0 to i."""
    return softmax(c["attn_scores"], np.tri(len(c.positions), c.keys, dtype=bool))


def _own_call(c: Context) -> Array:
    return softmax(c["attn_scores"], c.allowed & (np.arange(c.keys) >= c.past))


def _unfilled(c: Context) -> Array:
    """Slots that nothing was written to have score 0 and are counted."""
    scores = np.where(c.allowed, c["attn_scores"], np.float32(-np.inf))
    high = np.maximum(scores.max(axis=-1, keepdims=True), 0)
    weights = np.exp(scores - high)
    empty = len(c.memory["k_cache"]) - c.keys
    return weights / (weights.sum(axis=-1, keepdims=True) + empty * np.exp(-high))


_everywhere(
    "mask_skipped",
    {"attn_softmax": _with_past(lambda c: softmax(c["attn_scores"], np.full(1, True)))},
    "no mask once there is a cache",
    "mask_missing",
)
_everywhere(
    "mask_top_left",
    {"attn_softmax": _with_past(_top_left)},
    "row i of a later call sees keys 0 to i",
    "mask_top_left",
)
_everywhere(
    "past_not_seen",
    {"attn_softmax": _with_past(_own_call)},
    "a later call sees its own keys alone",
    "mask_past_missing",
)
_everywhere(
    "unfilled_slots",
    {"attn_softmax": _unfilled},
    "slots of the cache that are still empty are not masked",
    "mask_unfilled_slots",
)


def _all_before(c: Context) -> Array:
    order = c.past + np.arange(len(c.positions))[:, None] - np.arange(c.keys)
    return softmax(c["attn_scores"], order >= 0)


_everywhere(
    "window_ignored",
    {"attn_softmax": _all_before},
    "every earlier key is seen, not those of the sliding window alone",
    "mask_window_missing",
    window=True,
)
