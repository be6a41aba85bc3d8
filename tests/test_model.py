"""The forward pass by itself: whole or layer by layer, in batches, in float64, at every size."""

from functools import partial
from pathlib import Path

import jax
import numpy as np
import pytest
import torch
from qwen_jax.weights.huggingface import HuggingFaceWeights
from qwen_jax.model import Env, Stages, forward, make_env
from stages.table import STAGE, computation_order, stage_shape
from transformers import Qwen2Config, Qwen2ForCausalLM
from transformers.masking_utils import create_causal_mask, create_sliding_window_causal_mask
from transformers.models.qwen2.modeling_qwen2 import Qwen2RotaryEmbedding

from oracle.recorder import to_numpy
from qwen_jax import params, rope
from qwen_jax.config import from_hf
from qwen_jax.engine import JaxEngine
from stages.trace import numpy_dtype
from tests.test_config import PUBLISHED
from tests.tiny import hf_config, write_checkpoint
from tests.traces import Trace, check_stages, jax_trace, relative_l2, ulps

TOKENS = tuple(int(token) for token in np.random.default_rng(0).integers(0, 48, 23))
# float32 sums in another order: the shape of a product decides how XLA blocks it
REORDERED = 1e-6


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Grouped heads, one layer of each kind of attention, YaRN, eps large enough to matter."""
    return write_checkpoint(
        tmp_path_factory.mktemp("model") / "tiny",
        num_hidden_layers=3,
        use_sliding_window=True,
        sliding_window=5,
        max_window_layers=2,
        rms_norm_eps=1e-2,
        rope_scaling={"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16},
    )


def environments(model: HuggingFaceWeights, length: int) -> dict[bool, Env]:
    positions = np.arange(length)[None]
    valid = np.ones((1, length), bool)
    return {s: make_env(model.config, positions, valid, s) for s in (False, True)}


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
    weights = jax.tree.map(jax.numpy.asarray, params.load(model))
    envs = environments(model, len(TOKENS))
    whole = flat(forward(model.config, weights, ids, envs, numpy_dtype(dtype)))
    layers = jax_trace(tiny, TOKENS, dtype, "eager")
    assert set(whole) == set(layers)
    for key, value in layers.items():
        assert value.tobytes() == whole[key].tobytes(), key


def test_forward_is_the_engine_compiled(tiny: Path) -> None:
    """One program of three layers against one layer run three times. Identical where this was
    written; XLA may fuse across layers, which reorders sums."""
    model = HuggingFaceWeights(tiny)
    program = jax.jit(partial(forward, model.config, dtype=np.float32))
    ids = np.array([TOKENS], np.int32)
    whole = flat(program(params.load(model), ids, environments(model, len(TOKENS))))
    check_stages(model.config, whole, jax_trace(tiny, TOKENS), REORDERED)


# --- batches


def test_batches_and_left_padding(tiny: Path) -> None:
    """Each sequence of a batch is what it is alone, padded on the left or not, at every stage; and
    the logits are those of Hugging Face for the same batch."""
    model = HuggingFaceWeights(tiny)
    sequences = [TOKENS, TOKENS[3:17], TOKENS[:1]]
    tokens, valid = np.zeros((3, len(TOKENS)), np.int32), np.zeros((3, len(TOKENS)), bool)
    for row, sequence in enumerate(sequences):
        tokens[row, -len(sequence) :], valid[row, -len(sequence) :] = sequence, True
    values: Trace = {}
    JaxEngine(model, "float32", "xla", jax.devices("cpu")[0]).run_batch(
        tokens,
        valid,
        "all",
        lambda stage, layer: True,
        lambda stage, layer, value: values.update({(stage, layer): value}),
    )
    for row, sequence in enumerate(sequences):
        pad = len(TOKENS) - len(sequence)

        def unpadded(stage: str, value: np.ndarray, pad: int = pad) -> np.ndarray:
            keep = (slice(pad, None) if axis in "TS" else slice(None) for axis in STAGE[stage].axes)
            return value[tuple(keep)]

        alone = {key: unpadded(key[0], value[row]) for key, value in values.items()}
        check_stages(model.config, alone, jax_trace(tiny, sequence), REORDERED)

    network = Qwen2ForCausalLM.from_pretrained(tiny, attn_implementation="eager").eval()
    positions = np.maximum(np.cumsum(valid, 1) - 1, 0)
    with torch.no_grad():
        theirs = network(
            torch.from_numpy(tokens).long(),
            attention_mask=torch.from_numpy(valid).long(),
            position_ids=torch.from_numpy(positions),
        ).logits.numpy()
    assert relative_l2(values["lm_head", None][valid], theirs[valid]) <= 1e-5


# --- against a forward that shares no code with it


def plain_forward(model: HuggingFaceWeights, tokens: tuple[int, ...]) -> Trace:
    """Qwen2 in NumPy and float64, one head and one query at a time, as in the papers.

    The RoPE tables are the model's own float32 ones: tests of their own hold those."""
    c, trace = model.config, {}
    weight = {name: model.read(name).astype(np.float64) for name in _tensors(model)}
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
        w = {n: weight[f"model.layers.{layer}.{n}"] for n in _layer_tensors()}
        s = {"attn_norm": norm(x, w["input_layernorm.weight"])}
        products = [s["attn_norm"] @ w[f"self_attn.{p}_proj.weight"].T for p in "qkv"]
        q, k, v = (y + w[f"self_attn.{p}_proj.bias"] for p, y in zip("qkv", products, strict=True))
        s["qkv_matmul"] = np.concatenate(products, 1)
        s["qkv_bias"] = np.concatenate([q, k, v], 1)
        q, k = (rotated(y.reshape(length, -1, h)) for y in (q, k))
        v = v.reshape(length, -1, h)
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


def _layer_tensors() -> list[str]:
    linear = [f"self_attn.{p}_proj.{kind}" for p in "qkv" for kind in ("weight", "bias")]
    linear += ["self_attn.o_proj.weight", *(f"mlp.{p}_proj.weight" for p in ("gate", "up", "down"))]
    return ["input_layernorm.weight", "post_attention_layernorm.weight", *linear]


def _tensors(model: HuggingFaceWeights) -> list[str]:
    layers = range(model.config.num_hidden_layers)
    inner = [f"model.layers.{layer}.{name}" for layer in layers for name in _layer_tensors()]
    return ["model.embed_tokens.weight", *inner, "model.norm.weight", "lm_head.weight"]


@pytest.mark.parametrize("backend", ["xla", "eager"])
def test_float64_against_plain_numpy(demo: HuggingFaceWeights, tiny: Path, backend: str) -> None:
    for model in (HuggingFaceWeights(tiny), demo):
        trace = jax_trace(model.directory, TOKENS, "float64", backend)
        check_stages(model.config, trace, plain_forward(model, TOKENS), 1e-12)


# --- every published size

COUNTS = {  # parameters, as published
    "Qwen2.5-0.5B": 494_032_768,
    "Qwen2.5-1.5B": 1_543_714_304,
    "Qwen2.5-3B": 3_085_938_688,
    "Qwen2.5-7B": 7_615_616_512,
    "Qwen2.5-14B": 14_770_033_664,
    "Qwen2.5-32B-Instruct": 32_763_876_352,
    "Qwen2.5-72B": 72_706_203_648,
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_sizes_fit_the_stage_table(name: str) -> None:
    """Every stage of the whole model by shape and dtype alone, without weights."""
    config, length = from_hf(PUBLISHED[name]), 5
    weights = params.abstract(config, "bfloat16")
    if name in COUNTS:
        leaves = jax.tree.leaves(weights)
        tied = leaves[-1].size if config.tie_word_embeddings else 0
        assert sum(leaf.size for leaf in leaves) - tied == COUNTS[name]
    env = make_env(config, np.arange(length)[None], np.ones((1, length), bool), False)
    program = partial(forward, config, dtype=numpy_dtype("bfloat16"))
    shaped = jax.eval_shape(
        program, weights, jax.ShapeDtypeStruct((1, length), np.int32), {False: env}
    )
    assert len(shaped.layers) == PUBLISHED[name]["num_hidden_layers"]
    for stage, layer in computation_order(config.num_hidden_layers):
        group = {"start": shaped.start, "end": shaped.end}.get(stage.scope)
        value = (shaped.layers[layer] if group is None else group)[stage.name]
        assert value.shape == (1, *stage_shape(stage, config.dims(length))), (stage.name, layer)
        assert value.dtype == numpy_dtype("bfloat16")


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
        ours = make_env(from_hf(raw), positions, valid, sliding).mask
        np.testing.assert_array_equal(ours[valid], (mask[:, 0] == 0).numpy()[valid])
