"""The oracle in several calls, through transformers' caches: beside what transformers itself picks,
its prefill, and ours."""

from pathlib import Path

import jax
import ml_dtypes
import numpy as np
import pytest

torch = pytest.importorskip("torch")

from oracle import cache, trace  # noqa: E402
from oracle.recorder import TorchEngine, load, to_numpy  # noqa: E402
from qwen_jax import tracing  # noqa: E402
from qwen_jax.engine import JaxEngine  # noqa: E402
from qwen_jax.weights.huggingface import HuggingFaceWeights  # noqa: E402
from stages.architectures import ARCHITECTURES  # noqa: E402
from stages.errors import UserError  # noqa: E402
from stages.open import open_trace  # noqa: E402
from stages.trace import Trace  # noqa: E402
from tests.tiny import write_checkpoint  # noqa: E402
from tools.diff import diff  # noqa: E402

PROMPT = (5, 3, 9, 1, 0, 7, 2, 8, 4, 6, 11)
N = 8
WINDOW = {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 1}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    made: dict[tuple, HuggingFaceWeights] = {}

    def make(architecture: str = "qwen2", **more) -> HuggingFaceWeights:
        key = (architecture, *more)
        if key not in made:
            directory = tmp_path_factory.mktemp("model")
            # no end-of-text token: transformers would stop at it
            write_checkpoint(directory, model_type=architecture, eos_token_id=None, **more)
            made[key] = HuggingFaceWeights(directory)
        return made[key]

    return make


def decoded(model: HuggingFaceWeights, static: bool = False, dtype: str = "float32", **more):
    """A trace of the oracle, in memory, and the tokens that it picked."""
    engine = TorchEngine(model, dtype, "cpu", static)
    plan = tracing.make_plan(model, PROMPT, dtype=dtype, logits="all", **more)
    return tracing.to_memory(engine, plan)


def own_tokens(model: HuggingFaceWeights) -> list[int]:
    """What transformers' ``generate`` goes on with."""
    network = load(model, "float32", "eager")
    out = network.generate(torch.tensor([PROMPT]), do_sample=False, max_new_tokens=N)
    return out[0].tolist()


def largest_row(found: Trace, reference: Trace) -> float:
    """The largest relative L2 of any row of any stage that both have, those of the cache beside
    what went into it."""
    return float(diff(found, reference).by_row.max())


@pytest.mark.parametrize("static", [False, True])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("chunk", [None, 4])
def test_a_decode_is_transformers_own_and_its_prefill(checkpoint, architecture, chunk, static):
    model = checkpoint(architecture)
    found = decoded(model, static, generate=N, prefill_chunk=chunk)
    assert found.steps == ((11,) if chunk is None else (4, 4, 3)) + (1,) * (N - 1)
    own = own_tokens(model)
    assert [*found.tokens] == own[:-1]
    assert found.read("lm_head", None)[-1].argmax() == own[-1]
    whole = tracing.to_memory(
        TorchEngine(model, "float32", "cpu"),
        tracing.make_plan(model, found.tokens, logits="all"),
    )
    assert largest_row(found, whole) <= 1e-5
    for layer in range(2):
        assert np.array_equal(found.read("k_cache", layer), found.read("k_post_rope", layer))
        v = found.read("qkv_bias" if architecture == "qwen2" else "qkv_matmul", layer)[:, -16:]
        assert np.array_equal(found.read("v_cache", layer).reshape(v.shape), v)
        scores = found.read("attn_scores", layer)
        later = np.concatenate([np.full(n, end) for n, end in _ends(found.steps)])
        assert not any(scores[:, row, end:].any() for row, end in enumerate(later))


def _ends(steps):
    return zip(steps, np.cumsum(steps), strict=True)


def test_what_runs_is_the_stock_model(checkpoint):
    """Watched, and through our cache, the logits of every call are those of transformers' own."""
    model = checkpoint()
    found = decoded(model, generate=N)
    network, past, logits = load(model, "float32", "eager"), None, []
    with torch.inference_mode():
        for count, end in _ends(found.steps):
            ids = torch.tensor([found.tokens[end - count : end]])
            out = network(ids, use_cache=True, cache=past)
            past = out.cache
            logits.append(to_numpy(out.logits[0]))
    assert np.concatenate(logits).tobytes() == found.read("lm_head", None).tobytes()


@pytest.mark.parametrize("static", [False, True])
@pytest.mark.parametrize("chunk", [None, 1, 3])
def test_sliding_windows(checkpoint, static, chunk):
    model = checkpoint("qwen2", **WINDOW)
    found = decoded(model, static, generate=N, prefill_chunk=chunk)
    assert [*found.tokens] == own_tokens(model)[:-1]
    whole = tracing.to_memory(
        TorchEngine(model, "float32", "cpu"),
        tracing.make_plan(model, found.tokens, logits="all"),
    )
    assert largest_row(found, whole) <= 1e-5


@pytest.mark.parametrize("static", [False, True])
@pytest.mark.parametrize("format", cache.FORMATS)
def test_what_is_read_back_went_through_the_format(checkpoint, format, static):
    """By NumPy's and ml_dtypes' casts; and stays what it is."""
    found = decoded(checkpoint(), static, generate=3, cache=format)
    dtype = np.dtype(getattr(ml_dtypes, format, None) or format)
    for layer in range(2):
        k, v = found.read("k_post_rope", layer), found.read("qkv_bias", layer)[:, -16:]
        for stage, x in (("k_cache", k), ("v_cache", v.reshape(-1, 2, 8))):
            kept = x.astype(dtype).astype(np.float32)
            assert np.array_equal(found.read(stage, layer), kept)


def test_float8_keeps_the_largest_value():
    x = torch.tensor([1e5, -1e5, 28.0, float("nan")])
    for name, most in (("float8_e4m3fn", 448.0), ("float8_e5m2", 57344.0)):
        y = cache.through(x, cache.FORMATS[name])
        assert y[:3].tolist() == [most, -most, 28.0] and y[3].isnan()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_beside_ours(checkpoint, dtype):
    """The JAX decode of the same arguments has the same files, tokens and, to rounding, values."""
    model = checkpoint()
    found = decoded(model, dtype=dtype, generate=3, prefill_chunk=4)
    plan = tracing.make_plan(model, PROMPT, dtype=dtype, logits="all", generate=3, prefill_chunk=4)
    ours = tracing.to_memory(JaxEngine(model, dtype, "xla", jax.devices("cpu")[0]), plan)
    assert found.entries == ours.entries and found.steps == ours.steps
    if dtype == "float32":
        assert found.tokens == ours.tokens and largest_row(found, ours) <= 1e-5
    else:
        assert diff(found, ours).agree


def test_batches_of_prompts(checkpoint):
    """Padded on the left, each sequence is what it is alone."""
    model = checkpoint()
    engine = TorchEngine(model, "float32", "cpu")
    for more in ({}, {"generate": 4}):
        alone = [
            tracing.make_plan(model, tokens, logits="all", **more)
            for tokens in (PROMPT, PROMPT[2:6], PROMPT[:1])
        ]
        values: list[dict] = [{}, {}, {}]

        def emit(i, stage, layer, value, rows, values=values):
            values[i].setdefault((stage, layer), []).append(value)

        picked = tracing.compute(engine, tracing.make_batch(alone), emit)
        for plan, found, tokens in zip(alone, values, picked, strict=True):
            one = tracing.to_memory(engine, plan)
            assert (*plan.tokens, *tokens[:-1]) == one.tokens
            for stage, layer in one.entries:
                row, parts = one.arch.stage[stage], found[stage, layer]
                if "S" not in row.axes[1:]:
                    joined, reference = np.concatenate(parts), one.read(stage, layer)
                    error = np.linalg.norm(joined - reference) / np.linalg.norm(reference)
                    assert error < 1e-5, (stage, layer, plan.tokens)


def command(model: HuggingFaceWeights, out: Path, *more: str) -> int:
    given = ["--model", str(model.directory), "--tokens", ",".join(map(str, PROMPT))]
    return trace.main([*given, "--out", str(out), *more])


def test_the_command(checkpoint, tmp_path, capsys):
    model = checkpoint()
    more = ("--generate", "3", "--prefill-chunk", "6", "--cache", "float16", "--static-cache")
    assert command(model, tmp_path / "a", *more) == 0
    found = open_trace(tmp_path / "a")
    made = found.manifest
    assert made and made.steps == (6, 5, 1, 1) and made.cache == "float16"
    assert made.producer["static_cache"] and found.rows_of("lm_head", None) == 3
    assert found.entries["k_cache", 1].shape == (13, 2, 8)
    for args, says in (
        (("--generate", "2", "--cache", "q8_0"), "--cache q8_0"),
        (("--static-cache",), "there is no cache"),
        (("--generate", "0"), "expected 1 or more"),
    ):
        with pytest.raises(UserError, match=says):
            command(model, tmp_path / "b", *args)
        assert not (tmp_path / "b").exists()
