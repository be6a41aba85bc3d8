"""Synthetic models: the published sizes, the same numbers however they are read, sane numerics."""

import argparse

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from qwen_jax.synthetic import MASSIVE_DAMP, SIZES, STEP, Synthetic, _fill, _quantiles

from qwen_jax import runtime, source
from qwen_jax.engine import JaxEngine
from qwen_jax.weights import EMBEDDING, HEAD, NORM
from stages.errors import UserError

K_BIAS = "model.layers.{}.self_attn.k_proj.bias"
DOWN = "model.layers.1.mlp.down_proj.weight"
SMALL = Synthetic("0.5b", 2)


def wide(array):
    return array.astype(np.float64)


def rms(array):
    return float(np.sqrt(np.mean(np.square(wide(array)))))


@pytest.mark.parametrize(
    ("size", "billions"),
    [("0.5b", 0.494), ("1.5b", 1.54), ("3b", 3.09), ("7b", 7.62), ("14b", 14.8), ("32b", 32.8),
     ("72b", 72.7)],
)  # fmt: skip
def test_the_published_sizes(size, billions):
    """The parameter counts of the model cards."""
    model = open_model(f"synthetic:{size}")
    count = sum(int(np.prod(shape)) for shape in model.shapes.values())
    assert count / 1e9 == pytest.approx(billions, rel=0.005)
    assert model.config.head_dim == (64 if size == "0.5b" else 128)
    assert (HEAD in model.shapes) == (billions > 5)
    assert model.directory is None


def test_the_first_layers_of_a_size():
    model = open_model("synthetic:7b:2")
    assert model.config.num_hidden_layers == 2 and model.name == "synthetic-7b-2"
    whole = open_model("synthetic:7B")
    for name in model.shapes:
        assert model.rows(name, 3, 5).tobytes() == whole.rows(name, 3, 5).tobytes()


@pytest.mark.parametrize(
    ("spec", "says"),
    [
        ("synthetic:9b", "no size '9b'; choose one of 0.5b, 1.5b, 3b, 7b, 14b, 32b, 72b"),
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
    other = Synthetic("1.5b", 2)
    assert other.rows(NORM, 0, 64).tobytes() != SMALL.rows(NORM, 0, 64).tobytes()


def test_the_numbers_never_change():
    """A literal: a trace made last year is compared with one made today."""
    model = open_model("synthetic:0.5b:1")
    for name in (NORM, K_BIAS.format(0)):
        model.read(name)
    assert [model.hashes[name]["xxh3"] for name in (NORM, K_BIAS.format(0))] == [
        "f210bd03d8c83abb",
        "a0f9962e9490c466",
    ]


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


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_activations_stay_sane(dtype):
    """No overflow, no collapse, a few channels far above the rest: through all 24 layers."""
    model = open_model("synthetic:0.5b")
    found = {}

    def emit(stage, layer, value):
        assert np.isfinite(value).all(), (stage, layer)
        found[stage, layer] = value

    wanted = ("post_ffn_residual", "ffn_swigl", "lm_head")
    engine = JaxEngine(model, dtype, "xla", runtime.configure("cpu"))
    tokens = source.random_tokens(8, model)
    engine.run(tokens, "last", lambda stage, layer: stage in wanted, emit)
    for layer in range(24):
        residual = wide(found["post_ffn_residual", layer])
        assert 1 < rms(residual) < 100, layer
        assert 0.1 < rms(found["ffn_swigl", layer]) < 10, layer
        by_channel = np.sqrt(np.mean(residual**2, axis=0))
        massive = sorted(np.argsort(by_channel)[-len(model.massive) :])
        assert massive == sorted(model.massive), layer
        assert 10 < by_channel[model.massive].mean() / np.median(by_channel) < 100, layer
    assert 1 < rms(found["lm_head", None]) < 10


# --- tokens


def tokens_of(*given):
    parser = argparse.ArgumentParser()
    source.add_model_arguments(parser)
    return source.read_tokens(parser.parse_args(given), SMALL)


def test_drawn_tokens():
    drawn = tokens_of("--tokens", "random:64")
    assert drawn == source.random_tokens(64, SMALL) == tokens_of("--tokens", "random:64")
    assert drawn[:4] == (129240, 96777, 77660, 40990)  # once and for all
    assert len(drawn) == 64 and all(type(t) is int and 0 <= t < 151936 for t in drawn)
    assert max(source.random_tokens(10000, SMALL)) > 0.99 * 151936


@pytest.mark.parametrize("text", ["random:0", "random:", "random", "random:-1", "random:1,2", ""])
def test_what_is_no_tokens(text):
    with pytest.raises(UserError, match="expected ids such as 1,2,3, or random:64"):
        tokens_of("--tokens", text)


def test_text_needs_a_tokenizer():
    assert source.load_tokenizer(SMALL) is None
    for given_ in ((), ("--prompt", "x")):
        with pytest.raises(UserError, match=r"^synthetic-0.5b-2 has no tokenizer.*random:64"):
            tokens_of(*given_)


def test_every_size_is_listed():
    assert list(SIZES) == ["0.5b", "1.5b", "3b", "7b", "14b", "32b", "72b"]


def test_the_oracle_needs_files(run_cli):
    result = run_cli("oracle.trace", "--model", "synthetic:0.5b", "--tokens", "1")
    assert (result.code, result.stdout) == (2, "")
    (line,) = result.stderr.splitlines()
    assert line.endswith("write one first: python -m tools.convert synthetic:0.5b DIR")
