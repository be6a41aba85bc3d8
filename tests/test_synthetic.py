"""Synthetic models: the published sizes, the same numbers however they are read, sane numerics."""

import ml_dtypes
import numpy as np
import pytest
import xxhash
from hypothesis import given, settings
from hypothesis import strategies as st

import qwen_jax
from qwen_jax import runtime
from qwen_jax.engine import JaxEngine
from qwen_jax.prompt import Prompt, load_tokenizer, random_tokens
from qwen_jax.weights import open_model
from qwen_jax.weights.synthetic import (
    MASSIVE_DAMP,
    STEP,
    SyntheticWeights,
    _fill,
    _quantiles,
    size_names,
)
from stages import headroom
from stages.architectures import QWEN2, QWEN3
from stages.errors import UserError

EMBEDDING = "model.embed_tokens.weight"
NORM = "model.norm.weight"
HEAD = "lm_head.weight"
K_BIAS = "model.layers.{}.self_attn.k_proj.bias"
DOWN = "model.layers.1.mlp.down_proj.weight"
SMALL = SyntheticWeights(QWEN2, "0.5b", 2)


def wide(array):
    return array.astype(np.float64)


def rms(array):
    return float(np.sqrt(np.mean(np.square(wide(array)))))


@pytest.mark.parametrize(
    ("size", "billions"),
    [("0.5b", 0.494), ("1.5b", 1.54), ("3b", 3.09), ("7b", 7.62), ("14b", 14.8), ("32b", 32.8),
     ("72b", 72.7), ("0.6b", 0.596), ("1.7b", 1.72), ("4b", 4.02), ("8b", 8.19),
     ("qwen3-14b", 14.8), ("qwen3-32b", 32.8)],
)  # fmt: skip
def test_the_published_sizes(size, billions):
    """The parameter counts of the model cards."""
    model = open_model(f"synthetic:{size}")
    count = sum(int(np.prod(shape)) for shape in model.shapes.values())
    assert count / 1e9 == pytest.approx(billions, rel=0.005)
    assert model.config.head_dim == (64 if size == "0.5b" else 128)
    assert (HEAD in model.shapes) == (billions > 5)
    assert model.directory is None


@pytest.mark.parametrize(
    ("spec", "arch", "name"),
    [
        ("qwen2-7b", QWEN2, "synthetic-7b"),
        ("14B", QWEN2, "synthetic-14b"),
        ("8b:3", QWEN3, "synthetic-qwen3-8b-3"),
        ("Qwen3-14b", QWEN3, "synthetic-qwen3-14b"),
    ],
)
def test_a_size_of_an_architecture(spec, arch, name):
    model = open_model(f"synthetic:{spec}")
    assert model.config.arch is arch and model.name == name


def test_the_first_layers_of_a_size():
    for size, name in (("7b", "synthetic-7b-2"), ("8b", "synthetic-qwen3-8b-2")):
        model = open_model(f"synthetic:{size}:2")
        assert model.config.num_hidden_layers == 2 and model.name == name
        whole = open_model(f"synthetic:{size.upper()}")
        for tensor in model.shapes:
            assert model.rows(tensor, 3, 5).tobytes() == whole.rows(tensor, 3, 5).tobytes()


@pytest.mark.parametrize(
    ("spec", "says"),
    [
        ("synthetic:9b", "no size '9b'; choose one of 0.5b, 1.5b, 3b, 7b, 14b, 32b, 72b, 0.6b"),
        ("synthetic:qwen4-7b", "no size 'qwen4-7b'"),
        ("synthetic:qwen3-7b", "no size 'qwen3-7b'; choose one of 0.5b, "),
        ("synthetic:", "no size ''"),
        ("synthetic:7b:99", "'99' layers; 7b can be cut to 1 up to 28"),
        ("synthetic:7b:0", "1 up to 28"),
        ("synthetic:7b:", "1 up to 28"),
        ("synthetic:7b:-1", "1 up to 28"),
        ("synthetic:7b:2:2", "1 up to 28"),
        ("synthetic:7b:\N{ARABIC-INDIC DIGIT TWO}", "1 up to 28"),
    ],
)
def test_what_is_no_size(spec, says):
    with pytest.raises(UserError) as error:
        open_model(spec)
    assert says in str(error.value) and spec in str(error.value)


@settings(deadline=None, max_examples=60)
@given(data=st.data())
def test_rows_are_the_same_however_they_are_cut(data):
    """Also where a row is no multiple of the four values that one random step gives."""
    count = data.draw(st.sampled_from([1, 7, 1000, STEP, STEP + 5, 3 * STEP]))
    table = _quantiles(0.0, 1.0)

    def made(start, stop):
        values = np.empty(stop - start, ml_dtypes.bfloat16)
        _fill(values, 1, start, table)
        return values.tobytes()

    start = data.draw(st.integers(0, count - 1))
    stop = data.draw(st.integers(start + 1, count))
    assert made(0, count)[2 * start : 2 * stop] == made(start, stop)


@settings(deadline=None, max_examples=30)
@given(data=st.data())
def test_any_rows_of_a_model(data):
    """The rows with statistics of their own are found too."""
    name = data.draw(st.sampled_from([DOWN, NORM, K_BIAS.format(0)]))
    start = data.draw(st.integers(0, 895 if name != K_BIAS.format(0) else 127))
    near = [c for c in SMALL.massive if c > start] if name in (DOWN, NORM) else []
    start = data.draw(st.sampled_from([start, *near]))
    stop = data.draw(st.integers(start + 1, min(start + 40, SMALL.shapes[name][0])))
    block = dict(SMALL.blocks(name, step=640))[start // 640 * 640][start % 640 :][: stop - start]
    assert block.tobytes() == SMALL.rows(name, start, start + len(block)).tobytes()


def test_no_two_tensors_are_alike():
    rows = {SMALL.rows(name, 0, 64).tobytes()[:128] for name in SMALL.shapes}
    assert len(rows) == len(SMALL.shapes)
    others = [SyntheticWeights(QWEN2, "1.5b"), SyntheticWeights(QWEN2, "14b")]
    others += [SyntheticWeights(QWEN3, "14b"), SMALL]
    assert len({other.rows(NORM, 0, 64).tobytes() for other in others}) == 4


def test_the_numbers_never_change():
    """A literal: a trace made last year is compared with one made today."""
    model = open_model("synthetic:0.5b:1")
    for name in (NORM, K_BIAS.format(0)):
        model.read(name)
    assert [model.hashes[name].xxh3 for name in (NORM, K_BIAS.format(0))] == [
        "f210bd03d8c83abb",
        "a0f9962e9490c466",
    ]


# A row of every tensor of every layer, and those of Qwen2 from before Qwen3 was known.
ROWS = {
    "0.5b": "6312056bf325ffc1",
    "1.5b": "03c4f74029d253bb",
    "3b": "d34d5d64471c13ab",
    "7b": "73b33a3f7d128d90",
    "14b": "ad31a6e0bf1b1685",
    "32b": "88af11dffde96737",
    "72b": "8b0a22444c16ff90",
    "0.6b": "5366fccdf0f6af10",
    "1.7b": "6d917f772787ee03",
    "4b": "e1f350af9dc8b274",
    "8b": "429a9a138fe30fb9",
    "qwen3-14b": "dc602ed26e6e861a",
    "qwen3-32b": "f9b41dc35aadd424",
    "7b-overflow": "b727e198ab5988ea",
}


@pytest.mark.parametrize("size", ROWS)
def test_no_size_ever_changes(size):
    """Where a massive channel is one of a tensor's rows, the row of that channel."""
    model, made = open_model(f"synthetic:{size}"), xxhash.xxh3_64()
    for name, (count, *_) in model.shapes.items():
        row = int(model.massive[0]) % count
        made.update(name.encode() + model.rows(name, row, row + 1).tobytes())
    assert made.hexdigest() == ROWS[size]
    assert size_names() == list(ROWS)


def test_the_statistics():
    up = SMALL.rows("model.layers.0.mlp.up_proj.weight", 0, 1000)
    assert up.dtype == ml_dtypes.bfloat16
    assert rms(up) == pytest.approx(896**-0.5, rel=0.01) and abs(wide(up).mean()) < 1e-4
    kurtosis = np.mean(wide(up) ** 4) / rms(up) ** 4
    assert kurtosis == pytest.approx(3, rel=0.02)
    assert abs(np.corrcoef(wide(up))[0, 1:]).max() < 0.2  # rows have nothing to do with each other
    assert rms(SMALL.rows(EMBEDDING, 5000, 6000)) == pytest.approx(0.02, rel=0.01)
    massive = np.zeros(896, bool)
    massive[SMALL.massive] = True
    down = SMALL.read(DOWN)
    assert rms(down[massive]) == pytest.approx(32 * rms(down[~massive]), rel=0.05)
    norm = SMALL.read("model.layers.1.input_layernorm.weight")
    assert rms(norm[~massive]) == pytest.approx(2, rel=0.05)
    assert abs(wide(norm[massive])).max() < 4 * MASSIVE_DAMP


def test_the_k_biases_of_the_first_and_the_last_layer():
    """https://github.com/ggml-org/llama.cpp/issues/21385: norms 605 and 921, 22 elsewhere."""
    whole = open_model("synthetic:7b")
    norms = [float(np.linalg.norm(wide(whole.read(K_BIAS.format(n))))) for n in (0, 1, 26, 27)]
    assert norms == pytest.approx([605, 22, 22, 921], rel=0.1)


def test_the_norms_of_heads():
    """As those of layers, so that scores have a standard deviation of a few."""
    model = open_model("synthetic:0.6b:1")
    for part in "qk":
        norm = model.read(f"model.layers.0.self_attn.{part}_norm.weight")
        assert wide(norm).mean() == pytest.approx(2, rel=0.05)
        assert wide(norm).std() == pytest.approx(0.25, rel=0.3)


@pytest.mark.parametrize(
    ("size", "dtype"), [("0.5b", "float32"), ("0.5b", "float16"), ("0.6b", "float16")]
)
def test_activations_stay_sane(size, dtype):
    """No overflow, no collapse, a few channels far above the rest: through all layers."""
    model = open_model(f"synthetic:{size}")
    found = {}

    def emit(stage, layer, value):
        assert np.isfinite(value).all(), (stage, layer)
        found[stage, layer] = value

    wanted = ("post_ffn_residual", "ffn_swigl", "lm_head")
    engine = JaxEngine(model, dtype, "xla", runtime.pick_device("cpu"))
    tokens = random_tokens(8, model)
    engine.run(tokens, tuple(range(8)), "last", lambda stage, layer: stage in wanted, emit)
    for layer in range(model.config.num_hidden_layers):
        residual = wide(found["post_ffn_residual", layer])
        assert 1 < rms(residual) < 100, layer
        assert 0.1 < rms(found["ffn_swigl", layer]) < 10, layer
        by_channel = np.sqrt(np.mean(residual**2, axis=0))
        massive = sorted(np.argsort(by_channel)[-len(model.massive) :])
        assert massive == sorted(model.massive), layer
        assert 10 < by_channel[model.massive].mean() / np.median(by_channel) < 100, layer
    assert 1 < rms(found["lm_head", None]) < 10


def test_one_size_overflows_in_float16_where_the_7b_does():
    """q.k before the scale in the first layer and the SwiGLU of layer 2, forecast head by head and
    channel by channel; in float32 everything is finite and as large as before."""
    model, plain = (open_model(f"synthetic:7b{name}:3") for name in ("-overflow", ""))
    assert {
        t for t in model.shapes if model.rows(t, 0, 1).tobytes() != plain.rows(t, 0, 1).tobytes()
    } == {"model.layers.0.self_attn.q_proj.bias", "model.layers.2.mlp.down_proj.weight"}
    wanted = "attn_scores,ffn_silu,ffn_up,ffn_swigl,post_ffn_residual"
    given = {"tokens": random_tokens(8, model), "stages": wanted, "layers": "0-2"}
    wide_run = qwen_jax.trace_model(model, **given)
    found = {(r.layer, r.stage, r.what): r for r in headroom.measure(wide_run) if r.overflows}
    assert set(found) == {(0, "attn_scores", "before the scale"), (2, "ffn_swigl", "value")}
    assert 1 < rms(wide_run.read("post_ffn_residual", 2)) < 100

    first = open_model("synthetic:7b-overflow:1")
    half = qwen_jax.trace_model(first, **(given | {"layers": "0"}), dtype="float16")
    seen = np.tri(8, dtype=bool)
    heads = ~np.isfinite(np.where(seen, half.read("attn_scores", 0), 0)).all((1, 2))
    assert (heads == found[0, "attn_scores", "before the scale"].over["head"]).all()
    silu, up = (wide_run.read(s, 2).astype(np.float16) for s in ("ffn_silu", "ffn_up"))
    with np.errstate(over="ignore"):
        channels = ~np.isfinite(silu * up).all(0)
    assert (channels == found[2, "ffn_swigl", "value"].over["channel"]).all()
    assert set(np.flatnonzero(channels)) <= set(model.overflowing)


# --- tokens


def test_drawn_tokens():
    drawn = Prompt(tokens="random:64").read(SMALL)
    assert drawn == random_tokens(64, SMALL) == Prompt(tokens="random:64").read(SMALL)
    assert drawn[:4] == (129240, 96777, 77660, 40990)  # once and for all
    assert len(drawn) == 64 and all(type(t) is int and 0 <= t < 151936 for t in drawn)
    assert max(random_tokens(10000, SMALL)) > 0.99 * 151936


@pytest.mark.parametrize("text", ["random:0", "random:", "random", "random:-1", "random:1,2", ""])
def test_what_is_no_tokens(text):
    with pytest.raises(UserError, match="expected ids such as 1,2,3, or random:64"):
        Prompt(tokens=text).read(SMALL)


def test_text_needs_a_tokenizer():
    assert load_tokenizer(SMALL) is None
    for prompt in (Prompt(), Prompt(text="x")):
        with pytest.raises(UserError, match=r"^synthetic-0.5b-2 has no tokenizer.*random:64"):
            prompt.read(SMALL)


def test_the_oracle_needs_files(run_cli):
    result = run_cli("oracle.trace", "--model", "synthetic:0.5b", "--tokens", "1")
    assert (result.code, result.stdout) == (2, "")
    (line,) = result.stderr.splitlines()
    assert line.endswith("write one first: python -m tools.convert synthetic:0.5b DIR")
