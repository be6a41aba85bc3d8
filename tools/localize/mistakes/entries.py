"""Mistake of which entries: an axis of an input, a weight, a bias, a cache or a result is read in
another order, shifted, cut or repeated."""

from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from itertools import chain
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import Array

from qwen_jax import rope
from qwen_jax.config import Config
from stages.architecture import ADD, ROTATION, SCORES
from tools.localize.mistakes import cache_rows, orders
from tools.localize.mistakes.operands import (
    mixed,
    norm_weight,
    rope_table,
    unrotated,
    with_norm,
)
from tools.localize.mistakes.registry import (
    ALL,
    BIASES,
    HEADS_INSIDE,
    LINEARS,
    NORMS,
    ROPES,
    WITH_HEADS,
    Candidates,
    mistake,
    simple,
)
from tools.localize.stage_case import StageReplay


@mistake("embedding of the token {} positions on", "embedding", dump_only=None)
def embedding_shifted(case: StageReplay) -> Candidates:
    for step in (1, -1):
        yield f"{-step:+d}", jnp.roll(case.exact, step, 1)
        # the end of the prompt has no neighbour: some repeat the first or last token instead
        edge = jnp.roll(case.exact, step, 1)
        keep = 0 if step == 1 else -1
        yield f"{-step:+d}", edge.at[:, keep].set(case.exact[:, keep])
        yield f"{-step:+d}", edge.at[:, keep].set(0)


@mistake("norm weight in another order: {}", NORMS)
def norm_weight_permuted(case: StageReplay) -> Candidates:
    """The values that the norm was multiplied by are read off the dump and matched by size."""
    weight = norm_weight(case)
    plain, dump = (
        np.asarray(x).reshape(-1, len(weight))
        for x in (with_norm(case, jnp.ones_like(weight)), case.dump)
    )
    found = (dump * plain).sum(0) / np.maximum((plain * plain).sum(0), 1e-300)
    right = np.asarray(weight)
    for says, order in _ordered(found[None], right[None], {case.stage.parameters[0]: len(right)}):
        yield says, with_norm(case, jnp.asarray(right[order]))


# The order of LLaMA's own weights, and of GGUF files of LLaMA, and the way back from it.
ROTARY = {
    "in the order of interleaved RoPE, as GGUF converters store LLaMA's": (2, -1),
    "taken out of the order of interleaved RoPE, which they are not in": (-1, 2),
}


@mistake("rows of {}", f"qkv_matmul {BIASES} {ROPES}", dump_only=None, joined="layer")
def rows_rope_permuted(case: StageReplay) -> Candidates:
    n, k = case.config.num_attention_heads, case.config.num_key_value_heads
    parts = {"q and k": slice(0, n + k), "q": slice(0, n), "k": slice(n, n + k)}
    if case.stage.kind is ROTATION:
        parts = {case.stage.name[0]: slice(None)}
    for before in _kept(case):
        rest = case.exact - before
        heads = rest.reshape(*rest.shape[:2], -1, case.config.head_dim)
        for what, part in parts.items():
            for says, (rows, columns) in ROTARY.items():
                some = heads[:, :, part]
                grid = some.reshape(*some.shape[:-1], rows, columns)
                moved = heads.at[:, :, part].set(grid.swapaxes(-1, -2).reshape(some.shape))
                yield f"{what} {says}", before + moved.reshape(rest.shape)


@mistake("logits of {}", "lm_head", dump_only=None)
def logits_wrong_position(case: StageReplay) -> Candidates:
    norm = case.replay.load(case.stage.inputs[0], None)
    if case.rows == 1 and norm is not None:
        for place in (-2, 0):
            if norm.shape[1] > 1:
                name = "the first position" if place == 0 else "the position before the last"
                row = norm[:, place : place + 1 if place + 1 else None]
                yield name, case.run(jnp.asarray(row, jnp.float64))
    elif case.rows > 1:
        for step in (1, -1):
            rolled, edge = jnp.roll(case.exact, step, 1), 0 if step == 1 else -1
            yield f"the position {-step:+d}", rolled
            yield f"the position {-step:+d}", rolled.at[:, edge].set(case.exact[:, edge])


@mistake("RoPE pairs interleaved{}", ROPES, everywhere=True)
def rope_interleaved(case: StageReplay) -> Candidates:
    x = unrotated(case)
    cos, sin = (t.astype(jnp.float64)[:, :, None, :] for t in (case.pos.cos, case.pos.sin))

    def turned(a: Array, b: Array) -> tuple[Array, Array]:
        return a * cos - b * sin, b * cos + a * sin

    pairs, halves = turned(x[..., 0::2], x[..., 1::2]), turned(*jnp.split(x, 2, -1))
    yield "", jnp.stack(pairs, -1).reshape(x.shape)
    yield ", the result written as halves", jnp.concatenate(pairs, -1)
    yield " in the result alone", jnp.stack(halves, -1).reshape(x.shape)


def _other_heads(config: Config) -> Iterator[Config]:
    """The same channels as fewer or more heads."""
    for factor in (0.5, 2.0, 0.25, 4.0):
        size = config.head_dim * factor
        q, k = (n / factor for n in (config.num_attention_heads, config.num_key_value_heads))
        if size >= 2 and size % 2 == 0 and k >= 1 and q % 1 == k % 1 == 0:
            yield replace(
                config,
                head_dim=int(size),
                num_attention_heads=int(q),
                num_key_value_heads=int(k),
            )


@mistake("heads of {} channels", f"{ROPES} attention", joined="detail", lenient=True)
def head_size(case: StageReplay) -> Candidates:
    for config in _other_heads(case.config):
        size = config.head_dim

        def heads(x: Array, size: int = size) -> Array:
            return x.reshape(*x.shape[:2], -1, size) if x.ndim == 4 else x

        if case.stage.kind is ROTATION:
            found = case.run(
                heads(case.inputs[0]),
                pos=rope_table(case, case.positions, head_dim=size),
                config=config,
            )
        else:
            scores, softmax = case.other("attn_scores"), case.other("attn_softmax")
            if not (scores.replayable and softmax.replayable):
                return
            if any(f and size % f.block for f in (scores.format, case.format)):
                continue  # a cache in blocks that do not divide such heads
            weights = softmax.run(scores.run(*map(heads, scores.inputs), config=config))
            weights = weights[:, :, -case.rows :]
            found = case.run(weights, heads(case.inputs[1]), config=config)
        yield str(size), found.reshape(case.exact.shape)


@mistake("only {} rotated", ROPES, everywhere=True)
def rope_partial(case: StageReplay) -> Candidates:
    x, half = unrotated(case), case.config.head_dim // 2
    whole = case.run()
    first = replace(case.config, head_dim=half)
    if half % 2 == 0:
        for config in (first, case.config):
            cos, sin = rope.cos_sin(config, case.positions)
            cos, sin = (t[:, :, None, : half // 2].astype(np.float64) for t in (cos, sin))
            a, b = jnp.split(x[..., :half], 2, -1)
            turned = jnp.concatenate([a * cos - b * sin, b * cos + a * sin], -1)
            yield "the first half of the channels", jnp.concatenate([turned, x[..., half:]], -1)
    pairs = np.arange(case.config.head_dim) % half < half // 2
    yield "the first half of the pairs", jnp.where(pairs, whole, x)
    yield "the second half of the pairs", jnp.where(pairs, x, whole)
    first_channels = np.arange(case.config.head_dim) < half
    yield "the first half of the channels", jnp.where(first_channels, whole, x)
    yield "the second half of the channels", jnp.where(first_channels, x, whole)


@mistake("only the {} head rotated", ROPES)
def rope_first_head_only(case: StageReplay) -> Candidates:
    heads = np.arange(case.exact.shape[2])[:, None]
    yield "first", jnp.where(heads == 0, case.exact, unrotated(case))
    yield "last", jnp.where(heads == heads.max(), case.exact, unrotated(case))


@mistake("RoPE pairs channels {} apart, not H/2", ROPES)
def rope_pair_offset(case: StageReplay) -> Candidates:
    x = unrotated(case)
    cos, sin = (t.astype(jnp.float64)[:, :, None, :] for t in (case.pos.cos, case.pos.sin))
    for parts in (2, 4, 8):  # pairs lie within so many parts of a head
        size = case.config.head_dim // parts
        if size % 2:
            continue
        says = f"H/{2 * parts}"
        grid = x.reshape(*x.shape[:-1], parts, size)
        for tables in (_in_parts(cos, sin, parts), _first_part(cos, sin, size // 2)):
            c, s = tables
            a, b = jnp.split(grid, 2, -1)
            yield says, jnp.concatenate([a * c - b * s, b * c + a * s], -1).reshape(x.shape)


def _in_parts(cos: Array, sin: Array, parts: int) -> tuple[Array, Array]:
    """The frequencies go on from part to part."""
    shape = *cos.shape[:-1], parts, cos.shape[-1] // parts
    return cos.reshape(shape), sin.reshape(shape)


def _first_part(cos: Array, sin: Array, pairs: int) -> tuple[Array, Array]:
    """Every part has the first frequencies."""
    return cos[..., None, :pairs], sin[..., None, :pairs]


def _tiled(case: StageReplay, heads: Array) -> Array:
    """Key/value heads [B, S, K, H] as N of them, so that query head n reads n % K."""
    return jnp.tile(heads, (1, 1, case.config.num_attention_heads // heads.shape[2], 1))


@mistake(
    "key/value heads tiled (n % K) instead of repeated (n // G)",
    "attn_scores attention",
    joined="layer",
    everywhere=True,
)
def gqa_tiled(case: StageReplay) -> Candidates:
    if case.stage.name == "attn_scores":
        yield "", case.run(None, _tiled(case, case.inputs[1]))
    else:
        yield "", mixed(case, _tiled(case, cache_rows.kept(case)))


@mistake("v of the position {}", "attention")
def v_shifted(case: StageReplay) -> Candidates:
    v = cache_rows.kept(case)
    for step in (1, -1):
        rolled, edge = jnp.roll(v, step, 1), 0 if step == 1 else -1
        yield f"{-step:+d}", mixed(case, rolled)
        yield f"{-step:+d}", mixed(case, rolled.at[:, edge].set(v[:, edge]))
        yield f"{-step:+d}", mixed(case, rolled.at[:, edge].set(0))


@mistake("heads merged without transposing [N, T, H] to [T, N, H]", "attention")
def heads_not_transposed(case: StageReplay) -> Candidates:
    grid = case.exact.reshape(1, case.exact.shape[1], case.config.num_attention_heads, -1)
    yield "", grid.swapaxes(1, 2).reshape(case.exact.shape)


def _grid(case: StageReplay) -> Array:
    """The exact value as [T, heads, rest], [N, T, S] or [T, C], without the batch."""
    exact, heads = case.exact[0], case.heads
    if case.stage.heads_lead or exact.ndim != 2 or not heads:
        return exact
    return exact.reshape(exact.shape[0], heads, -1)


@mistake("dumped with its axes transposed", ALL, dump_only=None, priority=1)
def layout_transposed(case: StageReplay) -> Candidates:
    exact = case.exact[0]
    if exact.ndim == 2:
        yield "", exact.T.reshape(case.exact.shape)


@mistake(
    "dumped heads first, [heads, T, H]",
    HEADS_INSIDE,
    dump_only=True,
    priority=1,
)
def layout_heads_first(case: StageReplay) -> Candidates:
    grid = _grid(case)
    if grid.ndim == 3:
        yield "", grid.swapaxes(0, 1).reshape(case.exact.shape)


@mistake(
    "dumped with head and channel exchanged",
    HEADS_INSIDE,
    dump_only=None,
    priority=1,
)
def layout_channels_first(case: StageReplay) -> Candidates:
    grid = _grid(case)
    if grid.ndim == 3:
        yield "", grid.swapaxes(1, 2).reshape(case.exact.shape)


simple("layout_tokens_first", "dumped tokens first, [T, N, S]", "attn_scores attn_softmax",
       lambda case: case.exact[0].swapaxes(0, 1).reshape(case.exact.shape),
       dump_only=None, priority=1)  # fmt: skip


simple("layout_keys_first", "dumped keys first, [N, S, T]", "attn_scores attn_softmax",
       lambda case: case.exact.swapaxes(2, 3), dump_only=None, priority=1)  # fmt: skip


@mistake("positions in another order: {}", ALL, dump_only=None, priority=1)
def positions_permuted(case: StageReplay) -> Candidates:
    """Match every position of the dump to the position of the exact value it is nearest to."""
    if case.stage.axes[0] != "T" or case.dump.ndim < 3:
        return
    length = case.dump.shape[1]
    found, exact = (
        np.nan_to_num(np.asarray(x).reshape(length, -1), posinf=0.0, neginf=0.0)
        for x in (case.dump, case.exact)
    )
    distance = (found**2).sum(1)[:, None] + (exact**2).sum(1)[None] - 2 * found @ exact.T
    order = distance.argmin(1)
    moved = np.flatnonzero(order != np.arange(length))
    if moved.size and len(set(order)) >= length - 1:  # a shift may repeat or lose the last one
        says = ", ".join(f"{place} holds {order[place]}" for place in moved[:4])
        yield says + (", ..." if moved.size > 4 else ""), case.exact[:, order]


@mistake(
    "heads in the order {}",
    WITH_HEADS,
    dump_only=None,
    priority=1,
    joined="layer",
)
def heads_permuted(case: StageReplay) -> Candidates:
    """Match every head of the dump to the head of the exact value that it is nearest to; so of a
    bias alone."""
    heads = case.heads
    if not heads or heads < 2:
        return

    def by_head(x: Array) -> np.ndarray:
        kept = np.where(np.asarray(case.finite), np.asarray(x), 0)
        grid = case.stage.by_head(heads, kept).reshape(heads, -1)
        return np.nan_to_num(grid, posinf=0.0, neginf=0.0)

    for before in _kept(case):
        found, exact = by_head(case.dump - before), by_head(case.exact - before)
        distance = (found**2).sum(1)[:, None] + (exact**2).sum(1)[None] - 2 * found @ exact.T
        order = distance.argmin(1)
        if not np.array_equal(order, np.arange(heads)):
            moved = case.stage.by_head(heads, np.asarray(case.exact - before))[order]
            value = jnp.asarray(case.stage.from_heads(moved, case.exact.shape))
            sizes = {n: len(w) * heads // case.exact.shape[-1] for n, w in case.weights.items()}
            groups = case.config.num_key_value_heads
            known = _ordered(found.T, exact.T, sizes, 0, groups) if len(sizes) > 1 else ()
            of = "".join(f" ({says})" for says, _ in known)
            yield f"{orders.listed(order)}{of}", value + before


@mistake("the last {}", ALL, dump_only=None, priority=1)
def tail_not_written(case: StageReplay) -> Candidates:
    dump = np.asarray(case.dump)
    for axis, what in _tails(case):
        rows = np.moveaxis(dump, axis, 0).reshape(dump.shape[axis], -1)
        for count, says in (
            (_trailing((rows == 0).all(1)), "zero"),
            (_repeated(rows), "as before them"),
        ):
            if 0 < count < len(rows):
                kept = len(rows) - count
                exact = jnp.moveaxis(case.exact, axis, 0)
                end = 0 if says == "zero" else exact[kept - 1]
                yield f"{count} {what} {says}", jnp.moveaxis(exact.at[kept:].set(end), 0, axis)


def _tails(case: StageReplay) -> Iterator[tuple[int, str]]:
    """The axes whose end may be left unwritten: positions, and channels that are no heads."""
    if "T" in case.stage.axes:
        yield 1 + case.stage.axes.index("T"), "positions"
    if case.stage.linear:
        yield case.dump.ndim - 1, "channels"


def _trailing(marks: Any) -> int:
    """How many marks in a row stand at the end."""
    return len(marks) if marks.all() else int(marks[::-1].argmin())


def _repeated(rows: np.ndarray) -> int:
    """How many rows at the end are the same as the one before them."""
    return _trailing(np.concatenate([[False], (rows[1:] == rows[:-1]).all(1)]))


# --- rows of a key/value cache

for _name, _says, _pattern in cache_rows.PATTERNS:
    _where = "k_cache v_cache attn_scores attention"
    mistake(_says, _where, _name, room="entries")(partial(cache_rows.rows_as, _pattern))


@mistake("key/value heads of the cache in the order {}", "attn_scores attention")
def cache_heads_permuted(case: StageReplay) -> Candidates:
    """Each group of query heads reads the key/value head of the cache that fits best."""
    if "k_cache" in case.arch.stage or not case.has_calls:
        return
    right, heads = cache_rows.kept(case), case.config.num_key_value_heads
    read = (cache_rows.with_rows(case, right[:, :, [head] * heads]) for head in range(heads))
    tried = np.stack([np.asarray(value) for value in read])
    dump = np.where(np.asarray(case.finite), np.asarray(case.dump), np.nan)

    def groups(value: np.ndarray) -> np.ndarray:  # [K, ...]
        grid = case.stage.by_head(case.config.num_attention_heads, value)
        return np.asarray(grid).reshape(heads, -1)

    off = np.stack([np.nansum(np.square(groups(value - dump)), -1) for value in tried])
    order = off.argmin(0).tolist()
    if sorted(order) == [*range(heads)] and order != [*range(heads)]:
        yield ",".join(map(str, order)), cache_rows.with_rows(case, right[:, :, order])


@mistake("a window's ring buffer of {} rows read from its first slot on", "attn_scores attention")
def cache_ring_order(case: StageReplay) -> Candidates:
    """A window's rows as they lie in a ring buffer of its size, where row s has slot s mod size."""
    size = case.config.sliding_window
    if not case.sliding or size is None or not case.has_calls:
        return
    _, ends = case.bounds
    rows = np.arange(int(ends.max()))
    order = np.tile(rows, (case.rows, 1))
    for row, end in zip(order, ends[:, 0], strict=True):
        first = max(0, end - size)
        row[first:end] = sorted(rows[first:end], key=lambda s: s % size)
    if case.stage.kind is SCORES:
        yield str(size), jnp.take_along_axis(case.exact, order[None, None], -1)
    else:  # each weight goes with the v that lies there
        turned = np.argsort(order, -1)[None, None]
        yield str(size), case.run(jnp.take_along_axis(case.inputs[0], turned, -1))


# --- weights in another order


@mistake("rows of the vocabulary moved by {}", "embedding lm_head", priority=2, joined="file")
def vocabulary_rolled(case: StageReplay) -> Candidates:
    """The rows of the embedding or of the head, all of them so many further on."""
    size = case.config.vocab_size
    if case.stage.linear:
        dump, exact = (np.asarray(x).reshape(-1, size)[-8:] for x in (case.dump, case.exact))
        if np.isfinite(dump).all():
            match = np.fft.rfft(dump) * np.conj(np.fft.rfft(exact))
            step = int(np.fft.irfft(match.sum(0), size).argmax())
            if step:
                yield f"{orders.signed(step, size):+d}", jnp.roll(case.exact, step, -1)
        return
    table = case.model.read(case.arch.embedding.tensor)
    tokens = np.array(case.replay.trace.tokens)[-case.rows :]
    row = np.asarray(case.dump)[0, 0].astype(np.float32)
    wide = np.asarray(table, np.float32)
    place = int((np.square(wide).sum(1) - 2 * wide @ row).argmin())
    step = orders.signed(int(tokens[0]) - place, len(table))
    if step:
        found = wide[(tokens - step) % len(table)].astype(np.float64)
        yield f"{step:+d}", jnp.asarray(found)[None]


@mistake("columns in another order: {}", LINEARS, priority=2)
def columns_permuted(case: StageReplay) -> Candidates:
    """The columns of a linear stage's weights in another order: its inputs are taken for others."""
    width = case.inputs[0].shape[-1]
    config = case.config
    inside = case.stage.name == "attn_out"
    head, groups = (config.head_dim, config.num_key_value_heads) if inside else (0, 0)

    small = case.sampled(orders.TRIED)
    few = np.concatenate([np.asarray(w, np.float64) for w in small.weights.values()])
    x, dump = np.asarray(case.inputs[0])[0], np.asarray(small.dump)[0]
    base = np.square(dump - x @ few.T).sum(0)

    def changes() -> Iterator[tuple[str, orders.Change]]:
        rolled = ((f"rolled by {s}", np.roll(np.arange(width), s)) for s in (1, -1))
        known = chain(
            _input_order(case, head, groups), orders.patterns(width, head, groups), rolled
        )
        for says, order in known:
            off = np.square(dump - x @ few[:, order].T).sum(0)
            if (off < base / 4).mean() > 1 / 8:  # of one of several weights at least
                yield says, partial(np.take, indices=order, axis=1)

    yield from orders.tried(case, changes())


def _input_order(case: StageReplay, head: int, groups: int) -> Iterator[tuple[str, np.ndarray]]:
    """Solved for: what the weight would have had to be given is the input in another order. So of a
    weight with no fewer channels than inputs."""
    x = np.asarray(case.inputs[0])[0]
    small = case.sampled(2 * x.shape[-1])
    weight = np.concatenate([np.asarray(w, np.float64) for w in small.weights.values()])
    dump = np.asarray(small.dump)[0]
    if len(weight) < x.shape[-1] or not np.isfinite(dump).all():
        return
    given = np.linalg.lstsq(weight, dump.T, rcond=None)[0].T
    order = orders.match(given, x)
    if order is not None and len(set(order.tolist())) == len(order):
        columns = order.argsort()
        known = orders.described(columns, head, groups)
        yield known[0] if known else orders.moves(columns), columns


@mistake("rows of {}", f"{LINEARS} {BIASES}", dump_only=None, priority=2, joined="layer")
def rows_permuted(case: StageReplay) -> Candidates:
    """Each channel of the dump is the right one that it is nearest to; so of a bias alone."""
    config, inside = case.config, case.stage.name in f"qkv_matmul {BIASES}".split()
    head, groups = (config.head_dim, config.num_key_value_heads) if inside else (0, 0)
    sizes = {name: len(weight) for name, weight in case.weights.items()}
    for before in _kept(case):
        moved = case.exact - before
        found, right = (np.asarray(x).reshape(-1, x.shape[-1]) for x in (case.dump - before, moved))
        if len(right) > 1 and (right == right[0]).all():  # a bias
            found, right = found.mean(0, keepdims=True), right[:1]
        for says, order in _ordered(found, right, sizes, head, groups):
            yield says, before + moved[..., order]


def _kept(case: StageReplay) -> list[Array]:
    """The parts of a stage's value that keep their order while the rest is in another: none; where
    a bias is added, what it is added to, or the bias, if the sum is all that is known."""
    none = jnp.zeros(())
    if case.stage.kind is not ADD or not case.weights:
        return [none]
    dumped = case.value(case.stage.inputs[0]) is not None
    return [none, case.inputs[0], *([] if dumped else [case.exact - case.inputs[0]])]


def _ordered(
    found: np.ndarray, right: np.ndarray, sizes: dict[str, int], head: int = 0, groups: int = 0
) -> Iterator[tuple[str, np.ndarray]]:
    """The order that channels [rows, C] of weights side by side are in, and what it is called."""
    known = orders.matched(found, right, [*sizes.values()])
    if known is None:
        return
    order, parts = known
    moved = [p for p in parts if (order[p] != np.arange(p.start, p.stop)).any()]
    says: list[str] = []
    for part in [slice(moved[0].start, moved[-1].stop), *moved]:
        ends = np.cumsum([*sizes.values()])
        here = [name for name, end in zip(sizes, ends, strict=True)
                if part.start < end <= part.stop]  # fmt: skip
        own = order[part] - part.start
        fits = partial(_fits, found[:, part], right[:, part], own)
        called = orders.described(own, head, groups, [sizes[name] for name in here], fits)
        if called is not None:
            order[part] = part.start + called[1]
        elif len(moved) > 1 and not says and part.stop > moved[0].stop:
            continue  # not all of them alike: each alone
        says.append(f"{' and '.join(here)} {orders.moves(own) if called is None else called[0]}")
        if part.stop == moved[-1].stop:
            break
    yield ", ".join(says), order


def _fits(found: np.ndarray, right: np.ndarray, order: np.ndarray, other: np.ndarray) -> bool:
    """Whether another order of channels is as good as the one that they were found in."""
    left, its = (np.square(found - right[:, o]).sum() for o in (order, other))
    return bool(its <= 4 * left + orders.AS_RIGHT * np.square(right).sum())
