"""Index maps that no list holds: which rows, heads and channels stand where, found by matching and
called by what they do."""

from collections.abc import Callable
from functools import cache
from types import SimpleNamespace

import numpy as np
import pytest

from qwen_jax.replay import Replay
from stages.open import open_trace
from tests.planted.matrix import Bench, make_bench
from tools.localize.mistakes import CATALOGUE, column_groups, orders, scales
from tools.localize.stage_case import StageReplay
from tools.numpy_engine.engine import OPERATIONS, Array, Context, Engine

LENGTH, LAYER = 24, 1
SOUND = 20.0  # bits that have to come back, of about 23
TILE = [2 * i + j for i in range(4) for j in (0, 1, 8, 9, 16, 17, 24, 25)]  # of 32 channels


@pytest.fixture(scope="module")
def bench(tmp_path_factory) -> Callable[[str], Bench]:
    directory = tmp_path_factory.mktemp("entries")
    return cache(lambda name: make_bench(name, "f32", directory, length=LENGTH))


def told(bench: Bench, path, wrong: dict[str, Callable[[Context], Array]], stage: str, omit=()):
    """What explains a stage of an engine with wrong operations: name -> what is said, best first of
    each name, of those that bring the bits back."""
    made = Engine(*bench.loaded, "f32")
    for each, operation in wrong.items():
        made.replace(each, LAYER, operation)
    trace = open_trace(made.run(bench.tokens, "all").dump(path / "trace", omit), bench.layout)
    replay = Replay(trace, bench.model, np.dtype("float32"), unoptimised=True)
    found: dict[str, str] = {}
    with replay.numerics():
        case = StageReplay(replay, trace.arch.stage[stage], LAYER)
        assert case.scored(case.exact) < SOUND - 2.5
        for entry in CATALOGUE:
            if stage in entry.stages and entry.dump_only in (None, False):
                for detail, value, _ in entry.edits(case):
                    if case.scored(value, None, entry.rotated) >= SOUND:
                        found.setdefault(entry.name, entry.says.replace("{}", detail))
    return found


def moved(stage: str, order: Callable[[Context], Array]) -> Callable[[Context], Array]:
    return lambda c: OPERATIONS[stage](c)[..., order(c)]


def bias(c: Context, order: Array) -> Array:
    added = np.concatenate([c.weight(f"self_attn.{n}_proj.bias") for n in "qkv"])
    return c["qkv_matmul"] + added[order]


def channels(c: Context) -> Array:
    return np.arange((c.shape.heads + 2 * c.shape.kv_heads) * c.shape.head)


def shards_of_kv(c: Context, count: int) -> Array:
    """k and v fused, and split among devices that each take half of theirs for k, half for v."""
    start, every = c.shape.heads * c.shape.head, channels(c)
    kv = every[start:].reshape(2, count, -1).swapaxes(0, 1).ravel()
    return np.concatenate([every[:start], kv])


def by_group(c: Context) -> Array:
    every, head, kv = channels(c), c.shape.head, c.shape.kv_heads
    q = every[: c.shape.heads * head].reshape(kv, -1)
    k, v = every[c.shape.heads * head :].reshape(2, kv, -1)
    return np.concatenate([q, k, v], 1).ravel()


def tiles(c: Context) -> Array:
    return channels(c).reshape(-1, 32)[:, TILE].ravel()


@pytest.mark.parametrize(
    ("order", "says"),
    [
        (lambda c: shards_of_kv(c, 2), "k_proj and v_proj interleaved by"),
        (by_group, "interleaved by key/value head"),
        (lambda c: by_group(c).argsort(), "read as if interleaved by key/value head"),
        (lambda c: np.roll(channels(c), 3), "q_proj and k_proj and v_proj rolled by 3"),
        (tiles, "4 parts in every 32 interleaved in blocks of 2"),
    ],
)
@pytest.mark.parametrize("name", ["small", "small-qwen3"])
def test_rows_of_the_fused_projection(bench, tmp_path, name, order, says) -> None:
    wrong = {"qkv_matmul": moved("qkv_matmul", order)}
    found = told(bench(name), tmp_path, wrong, "qkv_matmul")
    assert says in found["rows_permuted"]


@pytest.mark.parametrize("order", [tiles, by_group, lambda c: shards_of_kv(c, 2)])
def test_a_bias_in_the_order_of_its_kernel(bench, tmp_path, order) -> None:
    """Alone; with its weight, whose rows have the order already; and of either where they are not
    told apart."""
    alone = {"qkv_bias": lambda c: bias(c, order(c))}
    weight = {"qkv_matmul": moved("qkv_matmul", order)}
    known = {told(bench("small"), tmp_path / n, wrong, "qkv_bias", omit)["rows_permuted"]
             .replace("bias", "").replace("proj", "")
             for n, (wrong, omit) in enumerate_named(
                 (alone, ()), (weight | alone, ()), (weight | alone, ["qkv_matmul"]),
                 (weight, ["qkv_matmul"]), (alone, ["qkv_matmul"]))}  # fmt: skip
    assert len(known) == 1


def enumerate_named(*pairs):
    return [(str(n), pair) for n, pair in enumerate(pairs)]


@pytest.mark.parametrize(("width", "head"), [(96, 16), (64, 0), (60, 12)])
def test_every_order_is_called_what_makes_it(width: int, head: int) -> None:
    for says, order in orders.patterns(width, head, every=True):
        called = orders.described(order, head)
        assert called and np.array_equal(called[1], order), says


def test_an_order_in_short() -> None:
    assert orders.listed(np.array([0, 1, 2, 3, 5, 4, 6, 7])) == "0-3,5,4,6,7"


@pytest.mark.parametrize("name", ["small", "small-qwen3"])
def test_pairs_that_are_turned_and_written_as_halves(bench, tmp_path, name) -> None:
    def wrong(c: Context) -> Array:
        q, (cos, sin) = c.attended()[0], (t[:, None] for t in c.tables())
        a, b = q[..., 0::2], q[..., 1::2]
        return np.concatenate([a * cos - b * sin, b * cos + a * sin], -1)

    found = told(bench(name), tmp_path, {"q_post_rope": wrong}, "q_post_rope")
    assert found["rope_interleaved"] == "RoPE pairs interleaved, the result written as halves"


RIGHT = np.random.default_rng(2).normal(size=(20, 2, 64)) * np.linspace(0.5, 3, 20)[:, None, None]


@pytest.mark.parametrize("slices", [s for s in scales.SLICES if s])
@pytest.mark.parametrize("grid", ["int4", "int8", "float8_e4m3"])
def test_codes_say_what_had_a_scale(slices: str, grid: str) -> None:
    says, codes = next(
        (says, codes) for says, codes in scales.codes(RIGHT) if says == f"{slices} ({grid})"
    )
    found = list(scales.lost(RIGHT, codes))
    assert len(found) == 1 and found[0][0].startswith(slices) and grid in found[0][0]
    assert (found[0][1] == codes).mean() > 0.99 and found[0][2] == 0


def test_codes_of_one_scale_and_no_codes() -> None:
    (found,) = scales.lost(RIGHT, np.rint(RIGHT * 9))
    assert found[0] == "0.1111 (int8)" and found[2] == 1
    assert not list(scales.lost(RIGHT, RIGHT))


@pytest.mark.parametrize("size", [8, 16])
@pytest.mark.parametrize("few", [False, True])
def test_groups_of_columns_off_by_a_zero_point(bench, tmp_path, size: int, few: bool) -> None:
    """With more positions than groups, and with fewer."""
    made = bench("small")
    weight = made.model.read("model.layers.1.mlp.gate_proj.weight").astype(np.float64)
    step = np.abs(weight).max() / 7
    grid = np.rint(weight / step) * step
    rng = np.random.default_rng(1)
    off = np.where(rng.random((len(grid), grid.shape[1] // size)) < 0.02, -15 * step, 0)
    x = rng.normal(size=(4 * off.shape[1] if not few else off.shape[1], grid.shape[1]))
    case = SimpleNamespace(
        inputs=[x[None]], exact=(x @ grid.T)[None], weights={"gate_proj": grid},
        dump=(x @ (grid + np.repeat(off, size, 1)).T)[None],
    )  # fmt: skip
    (found,) = column_groups.zero_points(case)
    assert found.detail == f"by -15 steps of its quantisation in groups of {size} columns"
    assert np.allclose(found.value, case.dump) and found.free == 0
