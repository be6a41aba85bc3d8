"""Case law: bugs of real engines, re-enacted; each is placed, and called what it was.

A case cites the public threads it is taken from, ``repo#number``. The engine is the NumPy one, on a
checkpoint with the statistics of a published model (the bias of k tens of times k itself, a few
channels of the residual stream hundreds of times the rest), in float32 where nothing else is said.
"""

from collections.abc import Callable
from dataclasses import dataclass, field, replace

import numpy as np
import pytest

from stages import headroom
from tests.planted import checkpoints, faults
from tests.planted.matrix import Bench, make_bench
from tests.planted.shares import memory_trace
from tools.localize import Localization
from tools.localize.cost.query import Question
from tools.localize.result import faults as reported
from tools.localize.result import sentence
from tools.numpy_engine import engine
from tools.numpy_engine.engine import OPERATIONS, Array, Context

LENGTH = 24


@dataclass(frozen=True)
class Case:
    """One cause.

    Attributes:
        threads: where it was reported.
        plant: names of planted faults, in all layers.
        stage, also: where it has to be placed.
        name: what it has to be called.
        says: what must be part of the sentence about it.
    """

    threads: str
    plant: tuple[str, ...]
    stage: str
    name: str
    also: tuple[str, ...] = ()
    says: str = ""
    model: str = "hard"


CASES: dict[str, Case] = {
    "RoPE interleaved on a half-split model": Case(
        "candle#3410",
        ("qk_post_rope.rope_interleaved",),
        "q_post_rope",
        "rope_interleaved",
        ("k_post_rope",),
    ),
    "bias of q, k and v dropped": Case(
        "ANEForge#253 candle-vllm#167 aprender#1604 Fast-LLM#398",
        ("qkv_bias.bias_missing",),
        "qkv_bias",
        "bias_missing",
    ),
    "bias silently cut to one shard": Case(
        "Automodel#1410", ("qkv_bias.bias_shard_only",), "qkv_bias", "bias_shard_only"
    ),
    "head tied on a model that does not tie it": Case(
        "pegainfer#544 candle#2295 candle#2445 mlx-examples#566",
        ("lm_head.head_tied",),
        "lm_head",
        "head_tied",
    ),
    "head never loaded: perplexity is the vocabulary": Case(
        "parallax#444 FastDeploy#2736 imp#1282",
        ("lm_head.head_zero_initialised",),
        "lm_head",
        "head_zero_initialised",
    ),
    "RoPE before the norm of q and k": Case(
        "torchtune#2866 torchtune#2867",
        ("qk_norm_rope.rope_before_norm",),
        "q_norm",
        "rope_before_norm",
        model="hard-qwen3",
    ),
    "RoPE twice": Case(
        "TensorRT-LLM#4040",
        ("qk_post_rope.rope_twice",),
        "q_post_rope",
        "rope_twice",
        ("k_post_rope",),
        model="hard-qwen3",
    ),
    "norm of q not written back": Case(
        "ktransformers#1959",
        ("q_post_rope.input_not_normed",),
        "q_post_rope",
        "input_not_normed",
        model="hard-qwen3",
    ),
    "eps hard-coded": Case(
        "aprender#1606 MinivLLM#82 FastDeploy#2804 tvm#15856",
        ("attn_norm.norm_eps", "ffn_norm.norm_eps", "final_norm.norm_eps"),
        "attn_norm",
        "norm_eps",
        ("ffn_norm", "final_norm"),
        "eps 1e-05",
    ),
    "a norm of 1 + weight, were it there": Case(
        "quant.cpp#23",
        ("attn_norm.norm_one_plus_weight",),
        "attn_norm",
        "norm_one_plus_weight",
    ),
    "positions of a padded row not shifted": Case(
        "unsloth#3699 unsloth#4100 nnsight#673",
        ("qk_post_rope.positions_not_shifted",),
        "q_post_rope",
        "positions_not_shifted",
        ("k_post_rope",),
        "+7",
    ),
    "softmax scale rounded to bfloat16": Case(
        "mlx#3119", ("attn_scores.scale_rounded",), "attn_scores", "scale_rounded"
    ),
    "norm without upcast": Case(
        "Automodel#1410", ("attn_norm.norm_not_upcast",), "attn_norm", "norm_not_upcast"
    ),
    "pairs of RoPE at the wrong offset": Case(
        "imp#30",
        ("qk_post_rope.rope_pair_offset",),
        "q_post_rope",
        "rope_pair_offset",
        ("k_post_rope",),
    ),
    "bias added after RoPE": Case(
        "amd/Triton-XDNA#129",
        ("qk_post_rope.bias_after_rope",),
        "q_post_rope",
        "bias_after_rope",
        ("k_post_rope",),
    ),
}


@pytest.fixture(scope="module")
def benches(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Bench]:
    directory = tmp_path_factory.mktemp("case-law")
    made: dict[tuple[str, str], Bench] = {}

    def bench(model: str = "hard", mode: str = "f32") -> Bench:
        if (model, mode) not in made:
            made[model, mode] = make_bench(model, mode, directory, length=LENGTH)
        return made[model, mode]

    return bench


def broken(bench: Bench, *planted: str) -> Localization:
    """What is said of an engine with these faults in all its layers."""
    wrong = engine.Engine(*bench.loaded, bench.mode)
    for name in planted:
        faults.FAULTS[name].apply(wrong)
    return bench.localize(wrong.run(bench.tokens, "all"))


def replaced(bench: Bench, stage: str, operation: engine.Operation) -> Localization:
    """What is said of an engine with one operation of its own in all layers."""
    wrong = engine.Engine(*bench.loaded, bench.mode)
    for layer in range(wrong.shape.layers):
        wrong.replace(stage, layer, operation)
    return bench.localize(wrong.run(bench.tokens, "all"))


@pytest.mark.parametrize("what", CASES)
def test_one_mistake_of_an_engine(benches: Callable[..., Bench], what: str) -> None:
    case = CASES[what]
    bench = benches(case.model)
    found = broken(bench, *case.plant)
    (fault,) = reported(found)
    assert (fault.stage, fault.layer in ("all", None)) == (case.stage, True), sentence(found)
    assert set(case.also) <= set(fault.also), sentence(found)
    assert fault.name == case.name, sentence(found)
    assert case.says in sentence(found)


def test_a_wrong_root_cause_is_refuted(benches: Callable[..., Bench]) -> None:
    """quant.cpp#23 and #24: "the norm is 1 + weight" was merged as the cause and reverted the same
    day; the engine's norms were right all along, and nothing here says otherwise."""
    for model in ("hard", "hard-qwen3"):
        bench = benches(model)
        assert bench.localize(bench.right).verdict == "clean"


def test_four_stacked_faults_are_told_apart(benches: Callable[..., Bench]) -> None:
    """aprender#2252: pairs of RoPE, biases, softmax and causal mask, all wrong at once."""
    planted = (
        "qkv_bias.bias_missing", "qk_post_rope.rope_interleaved", "attn_scores.scale_missing",
        "attn_softmax.mask_missing",
    )  # fmt: skip
    found = [(f.stage, f.layer, f.name) for f in reported(broken(benches(), *planted))]
    assert found == [
        ("qkv_bias", "all", "bias_missing"),
        ("q_post_rope", "all", "rope_interleaved"),
        ("attn_scores", "all", "scale_missing"),
        ("attn_softmax", "all", "mask_missing"),
    ]


def _fast_exp(x: Array) -> Array:
    """e^x by (1 + x / 256)^256, eight squarings: below -256 it is 0."""
    value = np.maximum(1 + x.astype(np.float64) / 256, 0)
    for _ in range(8):
        value = value * value
    return value


def _fast_softmax(c: Context) -> Array:
    scores = np.where(engine.causal(len(c["tokens"])), c["attn_scores"], np.float32(-np.inf))
    weights = _fast_exp(scores - scores.max(-1, keepdims=True))
    return weights / weights.sum(-1, keepdims=True)


def test_an_approximate_exponential_in_the_kernel(benches: Callable[..., Bench]) -> None:
    """1bit-MONSTER#2325: found by script after four other hypotheses."""
    (fault,) = reported(replaced(benches(), "attn_softmax", _fast_softmax))
    assert (fault.stage, fault.layer, fault.name) == ("attn_softmax", "all", "exp_approximate")


def _stale_channels(c: Context) -> Array:
    """All but the first 64 channels of q are those of the position before: what the buffer held."""
    value = OPERATIONS["qkv_matmul"](c).copy()
    width = c.shape.heads * c.shape.head
    value[1:, 64:width] = value[:-1, 64:width].copy()
    return value


def test_stale_channels_of_q(benches: Callable[..., Bench]) -> None:
    """sparkinfer#518: 192 of 256 channels of q were never written."""
    bench = benches()
    (fault,) = reported(replaced(bench, "qkv_matmul", _stale_channels))
    assert (fault.stage, fault.layer) == ("qkv_matmul", "all")
    assert fault.to_json()["where"]["channels"] == "64-255"


def _swigl_overflows(c: Context) -> Array:
    """The product is cast to float16, where it is beyond the largest such number."""
    return engine.f16(OPERATIONS["ffn_swigl"](c) * np.float32(1e6))


def test_overflow_of_the_gated_product_in_f16(benches: Callable[..., Bench]) -> None:
    """llama.cpp#26044, llama.cpp#27016: NaN from 64 tokens on, as the product of gate and up does
    not fit float16; openvino#30440, openvino#33491, onnxruntime#26732, mlx-vlm#293 likewise."""
    report = replaced(benches(), "ffn_swigl", _swigl_overflows)
    (fault,) = reported(report)
    assert fault.stage == "ffn_swigl" and fault.first.suspect.why == "nan"


def _scores_overflow(c: Context) -> Array:
    """q·k is held in float16 before it is scaled, of a model with 256 times the scores."""
    root = np.float32(c.shape.head**0.5)
    return engine.f16(OPERATIONS["attn_scores"](c) * root * np.float32(256)) / (root * 256)


def test_overflow_before_the_scale(benches: Callable[..., Bench]) -> None:
    """llama.cpp#7805, exllamav2#493, QwenLM#761, QwenLM#826, QwenLM#868, QwenLM#910,
    transformers#33312: q·k does not fit float16 where the bias of k is large, and "!!!!" is all
    that comes out."""
    (fault,) = reported(replaced(benches(), "attn_scores", _scores_overflow))
    assert fault.stage == "attn_scores" and fault.first.suspect.why == "nan"
    assert fault.first.suspect.item.layer == 0  # with the large bias


def _sums_overflow(c: Context) -> Array:
    """Q8_1 keeps the sum of each block of 32 in float16, for weights that have a minimum."""
    x = c["ffn_swigl"].reshape(len(c["tokens"]), -1, 32)
    sums = engine.f16(x.sum(-1) * np.float32(1e6)).sum(-1, keepdims=True)
    return OPERATIONS["ffn_out"](c) + 0 * sums


def test_overflow_of_the_sums_of_blocks(benches: Callable[..., Bench]) -> None:
    """llama.cpp#21652, llama.cpp#22571: NaN from quantised weights alone, as Q8_1's sums do not fit
    float16."""
    (fault,) = reported(replaced(benches(), "ffn_out", _sums_overflow))
    assert fault.stage == "ffn_out" and fault.first.suspect.why == "nan"


def test_eight_bit_activations_are_no_fault(benches: Callable[..., Bench]) -> None:
    """aprender#2091, aprender#2210, aprender#2350, mlxcel#1045: a kernel on 8-bit activations, far
    off in a channel that is hundreds of times the others, and the exact one that wrote worse."""
    bench = benches("hard", "act8")
    report = bench.localize(bench.right)
    assert report.verdict == "precision" and "activations are quantised" in sentence(report)


def test_uniform_rounding_is_no_fault(benches: Callable[..., Bench]) -> None:
    """vllm.cpp#269, vllm.cpp#3105, vllm#55944, colibri#100, pegainfer#833: greedy tokens differ
    across boards, at a near tie, by the noise of bfloat16 and nothing else."""
    for model in ("hard", "hard-qwen3"):
        bench = benches(model, "bf16")
        report = bench.localize(bench.right)
        assert report.verdict == "precision" and "bf16 in" in sentence(report)


def _rotated_with(theta: float) -> Callable[[int, Context], Array]:
    def operation(part: int, c: Context) -> Array:
        return engine.rotate(
            c.attended()[part], *engine.rope_table(c.positions, c.shape.head, theta)
        )

    return operation


def test_theta_of_the_config_is_ignored(benches: Callable[..., Bench]) -> None:
    """mlx-lm 0.32.2 does not read ``rope_parameters.rope_theta``, as transformers 5 writes it, and
    takes a default."""
    bench = benches()
    wrong = engine.Engine(*bench.loaded)
    turned = _rotated_with(1e5)
    for layer in range(wrong.shape.layers):
        wrong.replace("q_post_rope", layer, lambda c: turned(0, c))
        wrong.replace("k_post_rope", layer, lambda c: turned(1, c))
    report = bench.localize(wrong.run(bench.tokens, "all"))
    (fault,) = reported(report)
    assert (fault.name, fault.also) == ("rope_theta", ["k_post_rope"])
    assert "theta 100000" in sentence(report)


# --- files of weights, as converters and loaders make them wrong


def _layers_exchanged(weights: engine.Weights) -> None:
    for name in [name for name in weights if ".layers.1." in name]:
        other = name.replace(".layers.1.", ".layers.3.")
        weights[name], weights[other] = weights[other], weights[name]


def _gate_up_exchanged(weights: engine.Weights) -> None:
    for name in [name for name in weights if ".1.mlp.gate_proj" in name]:
        other = name.replace("gate", "up")
        weights[name], weights[other] = weights[other], weights[name]


def _permuted_for_interleaved_rope(weights: engine.Weights) -> None:
    for name in [name for name in weights if "q_proj" in name or "k_proj" in name]:
        found = weights[name]
        pairs = found.reshape(-1, 2, 16, *found.shape[1:])  # heads of 32
        weights[name] = pairs.swapaxes(1, 2).reshape(found.shape)


def _vocabulary_rolled(weights: engine.Weights) -> None:
    for name in ("lm_head.weight", "model.embed_tokens.weight"):
        weights[name] = np.roll(weights[name], 5, axis=0)


def _columns_by_place(weights: engine.Weights) -> None:
    name = "model.layers.1.self_attn.o_proj.weight"
    found = weights[name]
    weights[name] = found.reshape(len(found), 2, 4, 32).swapaxes(1, 2).reshape(found.shape)


def _two_of_another_type(weights: engine.Weights) -> None:
    for name in ("model.layers.1.self_attn.k_proj.weight", "model.layers.2.mlp.up_proj.weight"):
        weights[name] = engine.q8_0(weights[name])


def _written_in_the_other_order(weights: engine.Weights) -> None:
    name = "model.layers.1.mlp.down_proj.weight"
    weights[name] = weights[name].T.reshape(weights[name].shape)


def _norm_reversed(weights: engine.Weights) -> None:
    name = "model.layers.2.post_attention_layernorm.weight"
    weights[name] = weights[name][::-1].copy()


def _in_q3_k(weights: engine.Weights) -> None:
    pytest.importorskip("xllamacpp")
    from tests import ggml

    name = "model.layers.2.mlp.gate_proj.weight"
    weights[name] = ggml.dequantize(ggml.quantize(weights[name], "Q3_K"), "Q3_K")


@dataclass(frozen=True)
class File:
    """A wrong file of weights: how it was made wrong, and what is to be said of it."""

    change: Callable[[engine.Weights], None]
    stage: str
    layer: int | str | None
    name: str
    says: str
    also: tuple[str, ...] = field(default=())


LAYER = ("qkv_matmul", "qkv_bias", "attn_out", "ffn_norm", "ffn_gate", "ffn_up", "ffn_out")
FILES = [
    File(_layers_exchanged, "attn_norm", "1,3", "layers_exchanged",
         "weights of layers 1 and 3 exchanged", LAYER),
    File(_gate_up_exchanged, "ffn_gate", 1, "gate_up_swapped",
         "gate and up projections exchanged", ("ffn_up",)),
    File(_permuted_for_interleaved_rope, "qkv_matmul", "all", "rows_rope_permuted",
         "the biases too", ("qkv_bias",)),
    File(_vocabulary_rolled, "embedding", 0, "vocabulary_rolled", "moved by +5", ("lm_head",)),
    File(_columns_by_place, "attn_out", 1, "columns_permuted", "heads by their place in a group"),
    File(_written_in_the_other_order, "ffn_out", 1, "weight_transposed", "read transposed"),
    File(_norm_reversed, "ffn_norm", 2, "norm_weight_permuted", "layernorm reversed"),
    File(_in_q3_k, "ffn_gate", 2, "weight_requantised", "Q3_K"),
    File(_two_of_another_type, "qkv_matmul", "1-2", "weight_requantised", "Q8_0", ("ffn_up",)),
]  # fmt: skip


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.change.__name__.strip("_"))
def test_one_cause_in_a_file_is_one_fault(benches: Callable[..., Bench], file: File) -> None:
    bench = benches()
    wrong = engine.Engine(*bench.loaded, "f32", file.change)
    report = bench.localize(wrong.run(bench.tokens, "all"))
    (fault,) = reported(report)
    assert (fault.stage, fault.layer, fault.name) == (file.stage, file.layer, file.name)
    assert fault.also == list(file.also)
    assert file.says in sentence(report)


def test_heads_of_another_size(benches: Callable[..., Bench]) -> None:
    """A file that says twice as many heads of half the size: whatever has heads is wrong, and the
    scores are not of a shape that could be read."""
    bench = benches()
    shape, weights = bench.loaded
    halved = replace(
        shape, heads=2 * shape.heads, kv_heads=2 * shape.kv_heads, head=shape.head // 2
    )
    run = engine.Engine(halved, weights).run(bench.tokens, "all")
    report = bench.localize(run, ("attn_scores", "attn_softmax"))
    (fault,) = reported(report)
    assert (fault.stage, fault.layer, fault.name) == ("q_post_rope", "all", "head_size")
    assert fault.also == ["k_post_rope", "attention"] and "heads of 16" in sentence(report)


# --- what it matters: overflow by its cause, and error in nats


@pytest.fixture(scope="module")
def overflows(benches: Callable[..., Bench], tmp_path_factory: pytest.TempPathFactory) -> Bench:
    """In float16, the checkpoint whose sound values are too large for it."""
    source, at = benches().model.directory, tmp_path_factory.mktemp("overflows")
    assert source is not None
    made = checkpoints.copy_checkpoint(source, at / "made", checkpoints.overflowing)
    return Bench(made, benches().tokens, "f16")


def test_the_cause_of_nan_is_named_and_was_to_be_seen_before(overflows: Bench) -> None:
    """llama.cpp#26044, llama.cpp#27016, openvino#30440: the first value beyond 65504, with its
    channel; one float32 trace, taken before the port, has it."""
    report = overflows.localize(overflows.right)
    (fault,) = reported(report)
    assert (fault.stage, fault.layer) == ("ffn_swigl", 1)
    sound = engine.Engine(*overflows.loaded).run(overflows.tokens, "all")
    rows = headroom.measure(memory_trace(overflows, sound))
    first = next(row for row in rows if row.overflows and row.what == "value")
    assert (first.stage, first.layer) == ("ffn_swigl", 1) and first.channel in (3, 40, 41)
    assert f"in channel {first.channel} of ffn_swigl, and float16 ends at 65504" in sentence(report)


def test_the_cause_of_nan_may_be_a_product_before_the_scale(overflows: Bench) -> None:
    """llama.cpp#7805, exllamav2#493, QwenLM#761, transformers#33312: where the bias of k is large,
    q.k is too large, and the score itself would not be."""
    report = replaced(overflows, "attn_scores", checkpoints.unscaled_scores)
    (fault,) = reported(report)
    assert (fault.stage, fault.layer) == ("attn_scores", 0)
    assert "before the scale, and float16 ends at 65504" in sentence(report)


def test_the_sums_of_blocks_that_overflow_are_forecast(overflows: Bench) -> None:
    """llama.cpp#21652, llama.cpp#22571: Q8_1's sums, by one float32 trace."""
    sound = engine.Engine(*overflows.loaded).run(overflows.tokens, "all")
    rows = headroom.measure(memory_trace(overflows, sound), headroom.FORMATS["q8_1"])
    told = {(row.layer, row.stage) for row in rows if row.overflows}
    read = {stage: v for stage, v in sound.stages.items() if stage[1] in ("ffn_swigl", "attn_norm")}
    sums = {key: engine.f16(v.reshape(len(v), -1, 32).sum(-1)) for key, v in read.items()}
    assert told == {key for key, value in sums.items() if not np.isfinite(value).all()} != set()


def test_scores_rounded_to_bf16_are_felt_where_the_bias_of_k_is_large(
    benches: Callable[..., Bench],
) -> None:
    """transformers#33317, transformers#33615: eager bfloat16 costs Qwen2-7B 12 % of perplexity. All
    layers have the same bits, and the last one's scores are off by a hundred times as much."""
    report = replaced(benches(), "attn_scores", lambda c: engine.bf16(OPERATIONS["attn_scores"](c)))
    assert report.verdict == "precision"
    bits = [item.shown_bits for item in report.items if item.name == "attn_scores"]
    assert max(bits) - min(bits) < 1
    nats = {row.layer: row.rms for row in report.nats}
    assert min(nats[0], nats[3]) > 10 * max(nats[1], nats[2])


def test_a_cache_of_few_bits_is_felt_in_the_last_layer(benches: Callable[..., Bench]) -> None:
    """sglang#13044: attention is wrong in the last layer of a qwen2 alone, where the bias of k is
    largest; vllm#10411, exllamav2#493: 4 and 8 bits for k, and nonsense."""
    bench = benches()
    run = engine.Engine(*bench.loaded).run(bench.tokens, "all", cache="q4_0")
    report = bench.localize(run)
    assert report.verdict == "precision" and "q4_0" in sentence(report)
    nats = {row.layer: row for row in report.nats}
    assert min(nats[0].rms, nats[3].rms) > 10 * max(nats[1].rms, nats[2].rms)
    assert report.costs and "feels it, whose scores are off by" in sentence(report)


def test_a_token_that_flips_at_a_near_tie(benches: Callable[..., Bench]) -> None:
    """vllm.cpp#3105, vllm#55944, colibri#100, pegainfer#833: it is said to be a near tie, and the
    stages that tip it are listed."""
    tokens = [0, *np.random.default_rng(9).integers(1, 512, LENGTH - 1).tolist()]
    source = benches().model.directory
    assert source is not None
    bench = Bench(source, tokens, "bf16")
    report = bench.localize(bench.right, harm=Question())
    assert report.verdict == "precision" and report.harm is not None
    harm = report.harm
    assert harm.flips and abs(harm.margin) < 0.5
    assert harm.sum == pytest.approx(harm.margin - harm.exact_margin, rel=0.05)
    assert "exact arithmetic puts the other one first" in str(report)
