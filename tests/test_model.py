"""The forward pass by itself: whole or layer by layer, in batches, in float64, at every size; where
it rounds, and RoPE tables and masks."""

import re
import subprocess
import sys
from functools import partial
from pathlib import Path

import jax
import ml_dtypes
import numpy as np
import pytest
import torch
import transformers
from transformers import Qwen2Config
from transformers.masking_utils import create_causal_mask, create_sliding_window_causal_mask
from transformers.models.qwen2.modeling_qwen2 import Qwen2RotaryEmbedding

from oracle.recorder import to_numpy
from qwen_jax import rope, runtime
from qwen_jax.config import from_hf
from qwen_jax.engine import JaxEngine
from qwen_jax.forward import Stages, abstract, forward, load
from qwen_jax.models.ops import positional, positional_by_layer, rounded
from qwen_jax.padded import Padded
from qwen_jax.weights.huggingface import HuggingFaceWeights
from stages.architectures import ARCHITECTURES
from stages.files import numpy_dtype
from tests.conftest import ROOT, user_environment
from tests.test_config import PUBLISHED, PUBLISHED_3
from tests.tiny import hf_config, write_checkpoint
from tests.traces import Trace, check_stages, jax_trace, relative_l2, ulps

TOKENS = tuple(int(token) for token in np.random.default_rng(0).integers(0, 48, 23))
# float32 sums in another order: the shape of a product decides how XLA blocks it
REORDERED = 1e-6


@pytest.fixture(scope="module", params=ARCHITECTURES)
def tiny(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Grouped heads, one layer of each kind of attention, YaRN, eps large enough to matter."""
    return write_checkpoint(
        tmp_path_factory.mktemp("model") / "tiny",
        model_type=request.param,
        num_hidden_layers=3,
        use_sliding_window=True,
        sliding_window=5,
        max_window_layers=2,
        rms_norm_eps=1e-2,
        rope_scaling={"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16},
    )


def flat(stages: Stages) -> Trace:
    """The pytree of ``forward`` as a trace of its first sequence."""
    values = {("embedding", 0): stages.start["embedding"]}
    for layer, named in enumerate(stages.layers):
        values |= {(name, layer): value for name, value in named.items()}
    values |= {(name, None): value for name, value in stages.end.items()}
    return {key: np.asarray(value)[0] for key, value in values.items()}


# --- one function for the whole model


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_forward_is_the_engine_unjitted(tiny: Path, dtype: str) -> None:
    model = HuggingFaceWeights(tiny)
    ids = jax.numpy.array([TOKENS], np.int32)
    pos = positional_by_layer(model.config, np.arange(len(TOKENS))[None])
    with runtime.numerics():
        weights, pos = jax.tree.map(jax.numpy.asarray, (load(model), pos))
        whole = flat(forward(model.config, weights, ids, pos, numpy_dtype(dtype)))
    layers = jax_trace(tiny, TOKENS, dtype, "eager")
    assert set(whole) == set(layers)
    for key, value in layers.items():
        assert value.tobytes() == whole[key].tobytes(), key


def test_forward_is_the_engine_compiled(tiny: Path) -> None:
    """One program of three layers against one layer run three times. Identical where this was
    written; XLA may fuse across layers, which reorders sums."""
    model = HuggingFaceWeights(tiny)
    program = jax.jit(
        partial(forward, model.config, dtype=np.float32),
        compiler_options=runtime.compiler_options(),
    )
    ids = np.array([TOKENS], np.int32)
    pos = positional_by_layer(model.config, np.arange(len(TOKENS))[None])
    with runtime.numerics():
        whole = flat(program(load(model), ids, pos))
    check_stages(model.config, whole, jax_trace(tiny, TOKENS), REORDERED)


# --- batches


def test_batches_and_left_padding(tiny: Path) -> None:
    """Each sequence of a batch is what it is alone, padded on the left or not, at every stage; and
    the logits are those of Hugging Face for the same batch."""
    model = HuggingFaceWeights(tiny)
    sequences = [TOKENS, TOKENS[3:17], TOKENS[:1]]
    batch = Padded.of(sequences)
    values: Trace = {}
    JaxEngine(model, "float32", "xla", jax.devices("cpu")[0]).run_batch(
        batch,
        "all",
        lambda stage, layer: True,
        lambda stage, layer, value: values.update({(stage, layer): value}),
    )
    for row, sequence in enumerate(sequences):
        pad = len(TOKENS) - len(sequence)

        def unpadded(stage: str, value: np.ndarray, pad: int = pad) -> np.ndarray:
            axes = model.config.arch.stage[stage].axes
            return value[tuple(slice(pad if axis in "TS" else 0, None) for axis in axes)]

        alone = {key: unpadded(key[0], value[row]) for key, value in values.items()}
        check_stages(model.config, alone, jax_trace(tiny, sequence), REORDERED)

    network = getattr(transformers, model.config.arch.hf_class)
    network = network.from_pretrained(tiny, attn_implementation="eager").eval()
    with torch.no_grad():
        theirs = network(
            torch.from_numpy(batch.tokens).long(),
            attention_mask=torch.from_numpy(batch.valid).long(),
            position_ids=torch.from_numpy(batch.positions).long(),
        ).logits.numpy()
    assert relative_l2(values["lm_head", None][batch.valid], theirs[batch.valid]) <= 1e-5


# --- against a forward that shares no code with it


def plain_forward(model: HuggingFaceWeights, tokens: tuple[int, ...]) -> Trace:
    """Both architectures in NumPy and float64, one head and one query at a time, as in the papers.

    The RoPE tables are the model's own float32 ones: tests of their own hold those."""
    c, trace = model.config, {}
    weight = {name: model.read(name).astype(np.float64) for name in model.shapes}
    weight.setdefault("lm_head.weight", weight["model.embed_tokens.weight"])
    length, h = len(tokens), c.head_dim
    cos, sin = (t.astype(np.float64) for t in rope.cos_sin(c, np.arange(length)))

    def norm(x: np.ndarray, scale: np.ndarray) -> np.ndarray:
        return x / np.sqrt((x**2).mean(-1, keepdims=True) + c.rms_norm_eps) * scale

    def rotated(heads: np.ndarray) -> np.ndarray:
        complex_pairs = heads[..., : h // 2] + 1j * heads[..., h // 2 :]
        turned = complex_pairs * (cos + 1j * sin)[:, None]
        return np.concatenate([turned.real, turned.imag], -1)

    x = trace["embedding", 0] = weight["model.embed_tokens.weight"][list(tokens)]
    for layer, sliding in enumerate(c.sliding_layers):
        of = f"model.layers.{layer}."
        w = {n.removeprefix(of): each for n, each in weight.items() if n.startswith(of)}
        s = {"attn_norm": norm(x, w["input_layernorm.weight"])}
        products = [s["attn_norm"] @ w[f"self_attn.{p}_proj.weight"].T for p in "qkv"]
        s["qkv_matmul"] = np.concatenate(products, 1)
        if c.architecture == "qwen2":
            biases = (w[f"self_attn.{p}_proj.bias"] for p in "qkv")
            products = [y + bias for y, bias in zip(products, biases, strict=True)]
            s["qkv_bias"] = np.concatenate(products, 1)
        q, k, v = (y.reshape(length, -1, h) for y in products)
        if c.architecture == "qwen3":
            q, k = (norm(y, w[f"self_attn.{p}_norm.weight"]) for p, y in (("q", q), ("k", k)))
            s["q_norm"], s["k_norm"] = q, k
        q, k = rotated(q), rotated(k)
        s["q_post_rope"], s["k_post_rope"] = q, k
        scores = np.zeros((c.num_attention_heads, length, length))
        probabilities, mixed = np.zeros_like(scores), np.zeros((length, q.shape[1], h))
        for head in range(c.num_attention_heads):
            shared = head // (c.num_attention_heads // c.num_key_value_heads)
            scores[head] = q[:, head] @ k[:, shared].T / np.sqrt(h)
            for t in range(length):
                first = max(0, t - c.sliding_window + 1) if sliding else 0
                e = np.exp(scores[head, t, first : t + 1] - scores[head, t, first : t + 1].max())
                probabilities[head, t, first : t + 1] = e / e.sum()
            mixed[:, head] = probabilities[head] @ v[:, shared]
        s["attn_scores"], s["attn_softmax"] = scores, probabilities
        s["attention"] = mixed.reshape(length, -1)
        s["attn_out"] = s["attention"] @ w["self_attn.o_proj.weight"].T
        x = s["post_attn_residual"] = x + s["attn_out"]
        s["ffn_norm"] = norm(x, w["post_attention_layernorm.weight"])
        s["ffn_gate"] = s["ffn_norm"] @ w["mlp.gate_proj.weight"].T
        s["ffn_up"] = s["ffn_norm"] @ w["mlp.up_proj.weight"].T
        s["ffn_silu"] = s["ffn_gate"] / (1 + np.exp(-s["ffn_gate"]))
        s["ffn_swigl"] = s["ffn_silu"] * s["ffn_up"]
        s["ffn_out"] = s["ffn_swigl"] @ w["mlp.down_proj.weight"].T
        x = s["post_ffn_residual"] = x + s["ffn_out"]
        trace |= {(name, layer): value for name, value in s.items()}
    trace["final_norm", None] = norm(x, weight["model.norm.weight"])
    trace["lm_head", None] = trace["final_norm", None] @ weight["lm_head.weight"].T
    return trace


@pytest.mark.parametrize("backend", ["xla", "eager"])
def test_float64_against_plain_numpy(tiny: Path, backend: str) -> None:
    model = HuggingFaceWeights(tiny)
    trace = jax_trace(tiny, TOKENS, "float64", backend)
    check_stages(model.config, trace, plain_forward(model, TOKENS), 1e-12)


@pytest.mark.parametrize("backend", ["xla", "eager"])
def test_float64_of_a_trained_model(demo: HuggingFaceWeights, backend: str) -> None:
    trace = jax_trace(demo.directory, TOKENS, "float64", backend)
    check_stages(demo.config, trace, plain_forward(demo, TOKENS), 1e-12)


# --- every published size

COUNTS = {  # parameters, as published
    "Qwen2.5-0.5B": 494_032_768,
    "Qwen2.5-1.5B": 1_543_714_304,
    "Qwen2.5-3B": 3_085_938_688,
    "Qwen2.5-7B": 7_615_616_512,
    "Qwen2.5-14B": 14_770_033_664,
    "Qwen2.5-32B-Instruct": 32_763_876_352,
    "Qwen2.5-72B": 72_706_203_648,
    "Qwen3-0.6B": 596_049_920,
    "Qwen3-1.7B": 1_720_574_976,
    "Qwen3-4B": 4_022_468_096,
    "Qwen3-8B": 8_190_735_360,
    "Qwen3-14B": 14_768_307_200,
    "Qwen3-32B": 32_762_123_264,
}


@pytest.mark.parametrize("name", [*PUBLISHED, *PUBLISHED_3])
def test_published_sizes_fit_the_stage_table(name: str) -> None:
    """Every stage of the whole model by shape and dtype alone, without weights."""
    raw = (PUBLISHED | PUBLISHED_3)[name]
    config, length = from_hf(raw), 5
    weights = abstract(config, "bfloat16")
    if name in COUNTS:
        leaves = jax.tree.leaves(weights)
        tied = weights.end["lm_head"].size if config.tie_word_embeddings else 0
        assert sum(leaf.size for leaf in leaves) - tied == COUNTS[name]
    pos = positional_by_layer(config, np.arange(length)[None])
    program = partial(forward, config, dtype=numpy_dtype("bfloat16"))
    shaped = jax.eval_shape(program, weights, jax.ShapeDtypeStruct((1, length), np.int32), pos)
    assert len(shaped.layers) == raw["num_hidden_layers"]
    for stage, layer in config.arch.computation_order(config.num_hidden_layers):
        group = {"start": shaped.start, "end": shaped.end}.get(stage.scope)
        value = (shaped.layers[layer] if group is None else group)[stage.name]
        assert value.shape == (1, *stage.shape(config.dims(length))), (stage.name, layer)
        assert value.dtype == numpy_dtype("bfloat16")


# --- rounding points


def near_the_grid(dtype: np.dtype) -> np.ndarray:
    """float32 numbers: every number of a 16-bit format, NaN and infinities too, every middle of two
    neighbours, the numbers next to all of those, and random ones of every size."""
    grid = np.arange(1 << 16, dtype=np.uint16).view(dtype).astype(np.float32)
    finite = np.sort(grid[np.isfinite(grid)].astype(np.float64))
    beyond = 2 * finite[-1] - finite[-2]  # what would come next
    finite = np.concatenate([[-beyond], finite, [beyond]])
    middles = ((finite[1:] + finite[:-1]) / 2).astype(np.float32)
    exact = np.concatenate([grid, middles]).view(np.uint32)
    random = np.random.default_rng(0)
    bits = random.integers(0, 1 << 32, 1 << 18, dtype=np.uint32)
    small = (random.standard_normal(1 << 18) * 2.0**-15).astype(np.float32).view(np.uint32)
    step = np.uint32(1)
    return np.concatenate([exact, exact + step, exact - step, bits, small]).view(np.float32)


@pytest.mark.parametrize("dtype", [np.dtype(np.float16), np.dtype(ml_dtypes.bfloat16)], ids=str)
@pytest.mark.filterwarnings("ignore:overflow", "ignore:invalid value")
def test_rounded_is_a_conversion_there_and_back(dtype: np.dtype) -> None:
    """The same bits (of a NaN: it is one), jitted or not, and of a product that is made there."""
    x = near_the_grid(dtype)
    round_it = partial(rounded, dtype=dtype)
    jitted = partial(jax.jit, compiler_options=runtime.compiler_options())

    def check(found: jax.Array, given: np.ndarray, counts: np.ndarray | bool = True) -> None:
        expected, found = given.astype(dtype).astype(np.float32), np.asarray(found)
        wrong = found.view(np.uint32) != expected.view(np.uint32)
        wrong &= ~(np.isnan(found) & np.isnan(expected)) & counts
        assert not wrong.any(), (given[wrong][:5], found[wrong][:5], expected[wrong][:5])

    check(round_it(jax.numpy.asarray(x)), x)
    check(jitted(round_it)(x), x)
    a, b = x[::4], np.random.default_rng(1).permutation(x)[::4]
    # Numbers below the normal ones of float32 may be read and written as zero.
    normal = np.min(np.abs([a, b, a * b]), axis=0) >= np.finfo(np.float32).smallest_normal
    check(jitted(lambda a, b: round_it(a * b))(a, b), a * b, normal)


def test_rounded_leaves_wider_numbers_alone() -> None:
    with runtime.numerics():
        for dtype in (np.float32, np.float64):
            x = jax.numpy.asarray(np.array([1 / 3, 1e-40, np.inf]), dtype)
            assert rounded(x, dtype) is x


# Compiles both architectures' layers in both 16-bit formats; and a rotation that rounds by
# converting there and back, of which it is known what may become of it.
COMPILE = """
import sys
from pathlib import Path
import jax, numpy as np
from qwen_jax import runtime
from qwen_jax.models import ops
from tests.traces import jax_trace
for directory in sys.argv[1:]:
    for dtype in ("float16", "bfloat16"):
        jax_trace(Path(directory), (1, 2, 3, 4, 5, 6, 7), dtype)
ops.rounded = lambda x, dtype: x.astype(dtype).astype(x.dtype)
def there_and_back(heads, cos, sin):
    return ops.rotate(heads, ops.Positional(cos, sin, None)).astype(heads.dtype)
heads, table = np.ones((1, 7, 2, 64), np.float16), np.ones((1, 7, 32), np.float32)
jax.jit(there_and_back, compiler_options=runtime.compiler_options())(heads, table, table)
"""
ASSIGNMENT = re.compile(r"^ *(%[\w.]+) = (?:tail call |call )?(\w+) (.*)$", re.M)
PASSES_ON = ("fneg", "shufflevector", "insertelement", "extractelement", "select", "phi", "freeze")


def contractible(ir: str) -> list[str]:
    """The additions in LLVM's language of which an operand is a product, both in a 16-bit format: a
    processor that computes in it may do the two with one rounding."""
    found = []
    for body in re.findall(r"^define .*?^}", ir, re.M | re.S):
        lines = [
            (
                name,
                op,
                bool(re.search(r"\b(half|bfloat)\b", rest)),
                set(re.findall(r"%[\w.]+", rest)),
            )
            for name, op, rest in ASSIGNMENT.findall(body)
        ]
        products = {name for name, op, narrow, _ in lines if op == "fmul" and narrow}
        while (
            more := {n for n, op, _, read in lines if op in PASSES_ON and read & products}
            - products
        ):
            products |= more
        found += [n for n, op, narrow, read in lines
                  if op in ("fadd", "fsub") and narrow and read & products]  # fmt: skip
    return found


def test_no_compiler_can_skip_a_rounding(tmp_path: Path) -> None:
    """A processor with AVX512-FP16 has float16 multiply-add, and XLA lets LLVM use it. So no 16-bit
    product that is rounded may be an operand of a 16-bit addition, on any machine."""
    models = [
        write_checkpoint(tmp_path / name, model_type=name, head_dim=64, num_hidden_layers=1)
        for name in ARCHITECTURES
    ]
    flags = f"--xla_dump_to={tmp_path / 'ir'}"
    done = subprocess.run(
        [sys.executable, "-c", COMPILE, *models],
        cwd=ROOT,
        env=user_environment()
        | {"XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu", "JAX_ENABLE_COMPILATION_CACHE": "0"},
        capture_output=True,
        encoding="utf-8",
    )
    assert done.returncode == 0, done.stderr
    files = {path.name: path.read_text() for path in (tmp_path / "ir").glob("*.ir-with-opt.ll")}
    layers = {name: ir for name, ir in files.items() if "jit_run_stages" in name}
    control = {name: ir for name, ir in files.items() if "jit_there_and_back" in name}
    assert any("half" in ir for ir in layers.values()), "not the code that was meant"
    assert any("bfloat" in ir for ir in layers.values())
    assert any(map(contractible, control.values())), "what must be found is not found"
    assert {name: found for name, ir in layers.items() if (found := contractible(ir))} == {}


# --- RoPE

PAIRS = [(1e6, 64), (1e6, 128), (1e4, 128), (1e4, 64)]  # theta, head size: all published ones
# Others: PyTorch computes whole blocks of 32 frequencies (16 with AVX2) by SLEEF.
PAIRS += [(theta, size) for theta in (5e5, 123456.789, 37.5) for size in (64, 128, 192, 256)]
YARNS = [
    {"factor": 4.0, "original_max_position_embeddings": 32768},
    {"factor": 4.0, "original_max_position_embeddings": 32768, "truncate": False},
    {"factor": 1.5, "original_max_position_embeddings": 100, "beta_fast": 8.0, "beta_slow": 0.5},
    {"factor": 32.0, "original_max_position_embeddings": 4096, "attention_factor": 0.8},
    {"factor": 0.5, "original_max_position_embeddings": 64},
]


def rotary(theta: float, size: int, yarn: dict | None) -> tuple[dict, Qwen2RotaryEmbedding]:
    """A configuration and the RoPE module of transformers for it."""
    scaling = None if yarn is None else {"rope_type": "yarn"} | yarn
    raw = hf_config(
        rope_theta=theta, head_dim=size, rope_scaling=scaling, max_position_embeddings=131072
    )
    return raw, Qwen2RotaryEmbedding(Qwen2Config(**raw))


@pytest.mark.parametrize("yarn", [None, *YARNS])
@pytest.mark.parametrize(("theta", "size"), PAIRS)
def test_inverse_frequencies_bit_for_bit(theta: float, size: int, yarn: dict | None) -> None:
    raw, module = rotary(theta, size, yarn)
    frequencies, factor = rope.inverse_frequencies(from_hf(raw))
    assert factor == module.attention_scaling
    np.testing.assert_array_equal(frequencies, module.inv_freq.numpy())


@pytest.mark.parametrize("size", [2, 6, 32, 80, 96])
def test_frequencies_outside_of_blocks_are_a_last_bit_off_at_most(size: int) -> None:
    """What is left over from whole blocks PyTorch gives to the C library, whose ``pow`` is as near
    to the true value as SLEEF's but not always the same number."""
    for theta in (1e4, 1e6, 37.5):
        raw, module = rotary(theta, size, None)
        frequencies, _ = rope.inverse_frequencies(from_hf(raw))
        assert ulps(frequencies, module.inv_freq.numpy()).max() <= 2


@pytest.mark.parametrize("yarn", [None, YARNS[0]])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_tables_up_to_the_longest_context(dtype: str, yarn: dict | None) -> None:
    """cos and sin of positions up to 131071, where the angle itself has lost half its digits. The
    angles are the same numbers, so only the last bit of cos and sin is left to differ (2 with
    YaRN's factor, which is multiplied in later); rounded to 16 bits next to nothing is."""
    raw, module = rotary(1e6, 128, yarn)
    positions = np.concatenate([np.arange(300), np.arange(131072 - 300, 131072)])
    like = torch.zeros((), dtype=getattr(torch, dtype))
    theirs = module(like, torch.from_numpy(positions)[None])
    for ours, reference in zip(rope.cos_sin(from_hf(raw), positions), theirs, strict=True):
        first, second = np.split(to_numpy(reference[0]), 2, axis=1)
        np.testing.assert_array_equal(first, second)
        distance = ulps(ours.astype(numpy_dtype(dtype)), first)
        assert distance.max() <= (1 if yarn is None or dtype != "float32" else 2)
        assert dtype == "float32" or (distance > 0).mean() < 2e-3


# --- masks


@pytest.mark.parametrize("length", [1, 2, 9, 30])
@pytest.mark.parametrize("window", [1, 2, 8, 29, 64])
def test_masks_are_those_of_transformers(length: int, window: int) -> None:
    """With two sequences, one of them padded on the left. A query at padding attends to nothing
    of interest to anybody, so those rows are left out."""
    raw = hf_config(use_sliding_window=True, sliding_window=window, max_window_layers=0)
    theirs = Qwen2Config(**raw, attn_implementation="eager")
    valid = np.ones((2, length), bool)
    valid[1, : length // 3] = False
    positions = np.maximum(np.cumsum(valid, 1) - 1, 0)
    for sliding, create in ((False, create_causal_mask), (True, create_sliding_window_causal_mask)):
        # By position: the cache, None, is called past_key_values before transformers 5.24.
        mask = create(
            theirs,
            torch.zeros(2, length, 4),
            torch.from_numpy(valid),
            None,
            torch.from_numpy(positions),
        )
        assert mask.shape == (2, 1, length, length)
        ours = positional(from_hf(raw), positions, valid, sliding).mask
        np.testing.assert_array_equal(ours[valid], (mask[:, 0] == 0).numpy()[valid])
