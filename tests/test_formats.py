"""Number formats: emulated step by step, found by trying, and judged against."""

from collections.abc import Callable
from functools import partial

import ml_dtypes
import numpy as np
import pytest

from stages import numbers, roundings
from stages.verdict import EXACT_BITS
from tests.planted.matrix import Bench, make_bench
from tools.localize.formats import arithmetic, registry
from tools.localize.result import Localization, faults, sentence
from tools.numpy_engine import engine

Array = np.ndarray
RANDOM = np.random.default_rng(0)


# --- the roundings


def values(*shape: int) -> Array:
    return RANDOM.standard_normal(shape, np.float32) * 3


BLOCKS = [  # rounding, block, steps of a block
    (roundings.q8_0, 32, 255),
    (roundings.q8_k, 256, 255),
    (roundings.q4_0, 32, 16),
    (roundings.q5_0, 32, 32),
    (roundings.q4_1, 32, 16),
    (roundings.q5_1, 32, 32),
    (roundings.iq4_nl, 32, 16),
    (partial(roundings.symmetric, block=64), 64, 256),
    (roundings.affine_row, 512, 256),
]


@pytest.mark.parametrize(("rounding", "block", "steps"), BLOCKS)
def test_a_block_has_few_values_and_each_is_near(rounding, block, steps):
    x = values(5, 512)
    left = rounding(x).reshape(5, -1, block)
    assert max(len(np.unique(some)) for row in left for some in row) <= steps
    blocks = x.reshape(left.shape)
    span = blocks.max(-1, keepdims=True) - blocks.min(-1, keepdims=True)
    reach = np.maximum(span, 2 * np.abs(blocks).max(-1, keepdims=True)) / (steps - 1)
    # the signed extreme of q4_0 and q5_0 cuts off the other end; codes of iq4_nl are not even
    assert (np.abs(left - blocks) <= 1.3 * reach).all()


def test_a_tensor_has_one_scale_and_zero_is_zero():
    x = values(7, 33)
    x[2, 3] = 0
    left = roundings.affine_tensor(x)
    assert left[2, 3] == 0 and len(np.unique(left)) <= 256
    assert len(np.unique(roundings.affine_tensor(x, levels=127))) <= 128
    assert len(np.unique(roundings.symmetric_tensor(x))) <= 255


def test_a_row_of_zeros_stays_zero():
    for rounding, block, _ in BLOCKS:
        assert (rounding(np.zeros((2, block), np.float32)) == 0).all()
    assert (roundings.affine_tensor(np.zeros((2, 4), np.float32)) == 0).all()
    assert (roundings.scaled_e4m3(np.zeros((2, 4), np.float32)) == 0).all()


def test_a_nudge_moves_only_what_lies_on_an_edge():
    x = values(4, 256)
    moved = roundings.q8_0(x, nudge=registry.NUDGE) != roundings.q8_0(x, nudge=-registry.NUDGE)
    assert moved.mean() < 1e-2
    x[0, :32] = np.arange(32) * 2.0
    x[0, 31] = 127.0
    x[0, 5] = 10.5  # right between two codes
    up, down = (roundings.symmetric(x[:1, :32], nudge=n) for n in (registry.NUDGE, -registry.NUDGE))
    assert up[0, 5] - down[0, 5] == 1.0


def test_a_hadamard_matrix_is_its_own_inverse():
    x = values(3, 128)
    for size in (64, 128):
        turned = roundings.hadamard(x, size)
        np.testing.assert_allclose((turned**2).sum(-1), (x**2).sum(-1), rtol=1e-5)
        np.testing.assert_allclose(roundings.hadamard(turned, size), x, atol=1e-5)


def test_tf32_keeps_ten_bits():
    x = values(1000)
    assert (np.abs(roundings.tf32(x) - x) <= np.abs(x) * 2.0**-11).all()
    np.testing.assert_array_equal(roundings.tf32(x), engine.tf32(x))


@pytest.mark.parametrize("made", [f for f in registry._angle_formats() if not f.table])
def test_angles_agree_to_float32(made):
    positions = np.array([0, 1, 100])
    found = made.angles(positions, 64, 1e4)
    right = arithmetic.angles_in_f64(positions, 64, 1e4)
    np.testing.assert_allclose(found, right, rtol=40 * 2.0**-24)


def test_a_sum_in_f16_is_the_weighted_sum_to_f16():
    scores, v = values(2, 5, 6), roundings.f16(values(6, 2, 8))
    scores = np.where(np.tri(5, 6, 1, dtype=bool), scores, -np.inf).astype(np.float32)
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    right = np.einsum("nts,snh->tnh", weights / weights.sum(-1, keepdims=True), v)
    np.testing.assert_allclose(arithmetic.sum_in_f16(scores, v), right, atol=2e-2)


# --- found in an engine


@pytest.fixture(scope="module")
def bench(tmp_path_factory) -> Callable[..., Bench]:
    directory = tmp_path_factory.mktemp("formats")
    made: dict[tuple[str, str], Bench] = {}

    def find(mode: str, name: str = "small") -> Bench:
        if (mode, name) not in made:
            made[mode, name] = make_bench(name, mode, directory, length=24)
        return made[mode, name]

    return find


def engine_with(bench: Bench, **changes: Callable) -> engine.Engine:
    """An engine whose stages round otherwise, in all layers: stage -> change of its context."""
    found = engine.Engine(*bench.loaded, "f32")
    for stage, operation in changes.items():
        layers = range(bench.model.config.num_hidden_layers)
        for layer in [None] if stage in ("final_norm", "lm_head") else layers:
            found.replace(stage, layer, operation)
    return found


def reading(stage: str, name: str, rounding: Callable[[Array], Array]) -> Callable:
    """A stage computed on a rounded input."""

    def operation(context: engine.Context) -> Array:
        values = dict(context.values)
        values[name] = rounding(values[name])
        return engine.OPERATIONS[stage](engine.Context(context.engine, context.layer, values))

    return operation


LINEARS = {"qkv_matmul": "attn_norm", "attn_out": "attention", "ffn_gate": "ffn_norm",
           "ffn_up": "ffn_norm", "ffn_out": "ffn_swigl", "lm_head": "final_norm"}  # fmt: skip

ACTIVATIONS = {
    "q8_0": roundings.q8_0,
    "int8 in blocks of 32": partial(roundings.symmetric, block=32),
    "int8 per row": roundings.symmetric,
    "int8 per tensor": roundings.symmetric_tensor,
    "uint8 per row": roundings.affine_row,
    "uint8 per tensor": roundings.affine_tensor,
    "uint7 per tensor": partial(roundings.affine_tensor, levels=127),
    "float8_e4m3": roundings.e4m3,
    "float8_e4m3 per row": roundings.scaled_e4m3,
    "bfloat16": roundings.bf16,
    "float16": roundings.f16,
}


def judge(bench: Bench, made: engine.Engine, omit: tuple[str, ...] = ()) -> Localization:
    return bench.localize(made.run(bench.tokens, "all"), omit)


def quantised(bench: Bench, rounding: Callable[[Array], Array]) -> engine.Engine:
    changes = {stage: reading(stage, name, rounding) for stage, name in LINEARS.items()}
    return engine_with(bench, **changes)


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_activations(bench, name):
    """The format is named; a factor of 1.01, or a few lost rows of one weight, stand out."""
    small = bench("f32")
    found = judge(small, quantised(small, ACTIVATIONS[name]))
    assert found.verdict == "precision", sentence(found)
    assert {found.precision[stage]["format"] for stage in LINEARS} == {name}
    assert all(item.level > 20 for item in found.items), found

    broken = quantised(small, ACTIVATIONS[name])
    right = broken._operations[1, "ffn_out"]

    def lost(context: engine.Context) -> Array:
        value = right(context).copy()
        value[:, [3, 40, 41]] = 0
        return value

    broken.replace("ffn_out", 1, lost)
    (fault,) = faults(judge(small, broken))
    assert (fault.stage, fault.layer) == ("ffn_out", 1)
    assert fault.first.suspect.where["channels"] == "3,40-41"


@pytest.mark.parametrize("name", ["q8_0", "int8 per row", "uint8 per tensor"])
def test_a_fused_bias_hides_no_format(bench, name):
    small = bench("f32")
    found = judge(small, quantised(small, ACTIVATIONS[name]), ("qkv_matmul",))
    assert found.verdict == "precision", sentence(found)
    assert found.precision["qkv_bias"]["format"] == name


@pytest.mark.parametrize("stage", ["ffn_up", "lm_head"])
def test_a_factor_under_8_bits_is_named(bench, stage):
    """In all layers at once: no sibling shows it."""
    small = bench("f32")
    made = quantised(small, roundings.q8_0)
    for key in [key for key in made._operations if key[1] == stage]:
        right = made._operations[key]
        made.replace(stage, key[0], lambda c, right=right: right(c) * np.float32(1.01))
    (fault,) = faults(judge(small, made))
    assert fault.stage == stage and fault.first.diagnosis[0].name == "constant_factor"


SMOOTH = [("embedding", ()), ("post_ffn_residual", ()), ("lm_head", ()),
          ("qkv_bias", ("qkv_matmul",)), ("attention", ("attn_scores", "attn_softmax")),
          ("ffn_swigl", ("ffn_silu",))]  # fmt: skip


@pytest.mark.parametrize(("stage", "omit"), SMOOTH)
def test_a_factor_is_no_precision(bench, stage, omit):
    small = bench("f32")
    made = engine.Engine(*small.loaded, "f32")
    layers = {"embedding": [0], "lm_head": [None]}
    for layer in layers.get(stage, range(small.model.config.num_hidden_layers)):
        made.replace(stage, layer, lambda c: engine.OPERATIONS[stage](c) * np.float32(1.001))
    (fault,) = faults(judge(small, made, omit))
    assert fault.stage == stage and fault.first.diagnosis[0].name == "constant_factor"


def _tanh_form(context: engine.Context) -> Array:
    half = context["ffn_gate"] / 2
    tanh = np.clip(half * (27 + half * half) / (27 + 9 * half * half), -1, 1)
    return (half * (1 + tanh)).astype(np.float32)


def _by_table(context: engine.Context) -> Array:
    grid = np.linspace(-20, 20, 2001)
    return np.interp(context["ffn_gate"], grid, grid / (1 + np.exp(-grid))).astype(np.float32)


@pytest.mark.parametrize(
    ("operation", "name"), [(_tanh_form, "silu_tanh_form"), (_by_table, "function_approximate")]
)
def test_an_approximate_activation_is_named(bench, operation, name):
    small = bench("f32")
    (fault,) = faults(judge(small, engine_with(small, ffn_silu=operation)))
    assert (fault.stage, fault.layer) == ("ffn_silu", "all")
    assert fault.first.diagnosis[0].name == name


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16])
def test_an_activation_in_half_is_precision(bench, dtype):
    """As a lookup table of 16-bit values makes it: input and result on the grid."""
    small = bench("f32")

    def table(context: engine.Context) -> Array:
        gate = roundings.to_dtype(context["ffn_gate"], dtype)
        return roundings.to_dtype(gate / (1 + np.exp(-gate)), dtype)

    found = judge(small, engine_with(small, ffn_silu=table))
    assert found.verdict == "precision", sentence(found)
    assert found.precision["ffn_silu"]["format"] == np.dtype(dtype).name


@pytest.mark.parametrize("angles", [arithmetic.angles_by_recurrence, arithmetic.angles_in_f64])
def test_tables_of_another_make_are_right(bench, angles):
    small = bench("f32")
    head, theta = small.model.config.head_dim, small.model.config.rope_theta

    def rotated(context: engine.Context, first: int, last: int) -> Array:
        angle = angles(np.asarray(context["positions"]), head, theta).astype(np.float64)
        heads = context["qkv_bias"].reshape(len(angle), -1, head)[:, first:last]
        a, b = np.split(heads.astype(np.float64), 2, -1)
        cos, sin = (f(angle).astype(np.float32)[:, None] for f in (np.cos, np.sin))
        return np.concatenate([a * cos - b * sin, b * cos + a * sin], -1).astype(np.float32)

    n, k = small.model.config.num_attention_heads, small.model.config.num_key_value_heads
    changes = {"q_post_rope": partial(rotated, first=0, last=n),
               "k_post_rope": partial(rotated, first=n, last=n + k)}  # fmt: skip
    made = engine_with(small, **changes)
    found = small.localize(made.run(small.tokens, "all"))
    assert found.verdict == "clean", sentence(found)


def test_one_layer_that_is_missing_and_wrong(bench):
    """Its output cannot be judged alone; what follows is, for all of it."""
    small = bench("f32")
    for mode in ("f32", "act8"):
        made = engine.Engine(*small.loaded, mode)
        made.replace("ffn_up", 1, lambda c: engine.OPERATIONS["ffn_up"](c) * np.float32(1.5))
        run = made.run(small.tokens, "all")
        run.stages = {key: value for key, value in run.stages.items() if key[0] != 1}
        found = small.localize(run)
        assert found.verdict == "fault", sentence(found)


def test_a_lost_channel_is_a_fault_whatever_the_bits(bench):
    """bf16 all over: 9 bits, of which one channel in a hundred is not missed."""
    small = bench("bf16")
    made = engine.Engine(*small.loaded, "bf16")
    for layer in range(small.model.config.num_hidden_layers):

        def lost(context: engine.Context) -> Array:
            value = engine.OPERATIONS["attn_out"](context).copy()
            value[:, 17] = 0
            return value

        made.replace("attn_out", layer, lost)
    (fault,) = faults(judge(small, made))
    assert (fault.stage, fault.layer) == ("attn_out", "all")
    assert fault.first.suspect.why == "zero" and fault.first.diagnosis[0].name == "zeros"


def test_bits_are_those_against_exact_arithmetic(bench):
    small = bench("f32")
    found = judge(small, quantised(small, roundings.symmetric))
    low, high = found.precision["ffn_up"]["bits"]
    assert 5 < low <= high < 9 and found.precision["ffn_up"]["class"] == "8-bit"
    assert all(i.shown_bits <= EXACT_BITS for i in found.items)


def test_attention_to_one_key_is_v_as_the_cache_holds_it(bench, tmp_path):
    """It lies on the cache's grid, to which no result was rounded."""
    single = make_bench("small", "f16_kv", tmp_path, length=1)
    found = single.localize(single.right)
    assert [f.name for f in found.fitted.names("attention")] == ["kv float16"]
    assert found.verdict == "precision", sentence(found)


def test_one_of_three_weights_in_a_type_whose_products_round_their_inputs(bench):
    small = bench("f32")

    def operation(context: engine.Context) -> Array:
        value = engine.OPERATIONS["qkv_matmul"](context).copy()
        v = context.weight("self_attn.v_proj.weight")
        value[:, -len(v) :] = roundings.q8_0(context["attn_norm"]) @ roundings.q4_0(v).T
        return value

    made = engine.Engine(*small.loaded, "f32")
    made.replace("qkv_matmul", 1, operation)
    (fault,) = faults(judge(small, made))
    assert (fault.stage, fault.layer, fault.name) == ("qkv_matmul", 1, "weight_requantised")
    assert fault.first.diagnosis[0].says.endswith("Q4_0, of v_proj")


@pytest.mark.parametrize("round_to, most", [(roundings.e4m3, 448.0), (roundings.e5m2, 57344.0)])
def test_a_cast_to_8_bit_floats_saturates(round_to, most: float) -> None:
    """What is beyond the end is the end, where ml_dtypes' own cast has NaN or infinity."""
    x = np.array([1e6, -1e6, 1.06, most], np.float32)
    assert round_to(x).tolist() == [most, -most, 1.0, most]


def in_another_type(bench: Bench, name: str, which: Callable[[str], bool]) -> engine.Engine:
    """An engine that multiplies by rounded weights, judged against the original ones."""
    config, weights = bench.loaded
    keep = numbers.named(name).round
    return engine.Engine(
        config, {k: keep(np.asarray(w)) if which(k) else w for k, w in weights.items()}, "f32"
    )


@pytest.mark.parametrize("name", ["nf4", "fp4", "mxfp4", "nvfp4"])
def test_weights_in_another_type_throughout_are_the_engines_arithmetic(bench, name):
    small = bench("f32", "hard")
    found = judge(small, in_another_type(small, name, lambda key: key.endswith("_proj.weight")))
    assert found.verdict == "precision", sentence(found)
    layers = {stage for stage in LINEARS if stage != "lm_head"}
    assert {found.precision[stage]["format"] for stage in layers} == {f"weights {name}"}


def test_one_weight_in_another_type_is_a_fault(bench):
    small = bench("f32", "hard")
    found = judge(small, in_another_type(small, "nf4", lambda key: "1.mlp.down_proj" in key))
    (fault,) = faults(found)
    assert (fault.stage, fault.layer, fault.name) == ("ffn_out", 1, "weight_requantised")
    assert fault.first.diagnosis[0].says.endswith("nf4")


def test_int8_beside_float16(bench):
    small = bench("f32")
    found = judge(small, quantised(small, roundings.llm_int8))
    assert found.verdict == "precision", sentence(found)
    formats = {found.precision[stage]["format"] for stage in LINEARS}
    assert formats == {"int8 per row beside float16"}


def test_a_cache_in_float16_is_not_called_summed_in_float16(bench):
    """Sums over it are in float32, and every row shows it."""
    small = bench("f32")

    def attended(context: engine.Context) -> Array:
        values = dict(context.values)
        qkv = np.array(values["qkv_bias"])
        v = small.model.config.num_key_value_heads * small.model.config.head_dim
        qkv[:, -v:] = roundings.f16(qkv[:, -v:])
        values["qkv_bias"] = qkv
        return engine.OPERATIONS["attention"](engine.Context(context.engine, context.layer, values))

    made = engine_with(
        small,
        attention=attended,
        attn_scores=reading("attn_scores", "k_post_rope", roundings.f16),
    )
    found = judge(small, made, ("attn_scores", "attn_softmax"))
    assert {f.name for f in found.fitted.names("attention")} == {"kv float16"}
    assert found.verdict == "precision", sentence(found)
