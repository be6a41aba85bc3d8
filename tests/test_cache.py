"""Key/value caches: the formats, and that a sequence computed in calls is what it is in one."""

from functools import partial
from pathlib import Path

import gguf
import jax
import ml_dtypes
import numpy as np
import pytest

from qwen_jax import cache, runtime, tracing
from qwen_jax.engine import JaxEngine
from qwen_jax.prompt import random_tokens
from qwen_jax.weights import open_model
from qwen_jax.weights.huggingface import HuggingFaceWeights
from stages.architecture import LINEAR, SCORES, SOFTMAX, WEIGHTED_SUM
from stages.architectures import ARCHITECTURES
from stages.errors import UserError
from stages.invariance import partings
from stages.manifest import Batch
from stages.numbers import OFFERED_CACHES
from tests.tiny import write_checkpoint
from tests.traces import check_stages, torch_trace

TOKENS = tuple(int(token) for token in np.random.default_rng(0).integers(0, 48, 37))


def read_back(name: str, x: np.ndarray, compiled: bool = True) -> np.ndarray:
    kept = cache.FORMATS[name]
    with runtime.numerics():
        return np.asarray((jax.jit(kept) if compiled else kept)(x))


def values(*shape: int) -> np.ndarray:
    """Of all sizes, with zeros and equal extremes among them."""
    x = np.random.default_rng(1).standard_normal(shape).astype(np.float32)
    x *= np.float32(10) ** np.arange(-4, len(x) - 4, dtype=np.float32)[:, None, None]
    x[2, 0] = 0
    x[3, 1, 5], x[3, 1, 9] = -x[3, 1].max() * 2, x[3, 1].max() * 2
    return x


@pytest.mark.parametrize("compiled", [True, False])
@pytest.mark.parametrize("name", ["bfloat16", "float16", "float8_e4m3fn", "float8_e5m2"])
def test_a_float_format_is_that_of_ml_dtypes(name: str, compiled: bool) -> None:
    dtype = np.dtype(getattr(ml_dtypes, name, name))
    most = np.float32(ml_dtypes.finfo(dtype).max)
    x = values(12, 4, 64)
    x = np.clip(x, -60000, 60000) if name == "float16" else x
    expected = np.clip(x, -most, most).astype(dtype).astype(np.float32)
    np.testing.assert_array_equal(read_back(name, x, compiled), expected)


@pytest.mark.parametrize("name", ["q8_0", "q4_0"])
def test_a_block_format_is_that_of_ggml(name: str) -> None:
    """What the ``gguf`` package encodes and decodes; it divides in another order, which moves a
    code by one where a value lies between two."""
    x = values(6, 4, 64)
    kind = gguf.GGMLQuantizationType[name.upper()]
    expected = gguf.dequantize(gguf.quantize(x.reshape(-1, 64), kind), kind).reshape(x.shape)
    found = read_back(name, x)
    np.testing.assert_array_equal(read_back(name, x, compiled=False), found)
    differing = found != expected
    assert differing.mean() < 1e-3
    assert np.abs(found - expected)[differing].max(initial=0) <= np.abs(x).max() / 7


def test_int8_has_a_scale_for_each_token_and_head() -> None:
    x = values(6, 4, 64)
    scale = np.abs(x).max(-1, keepdims=True) / np.float32(127)
    wide = x.astype(np.float64) / np.where(scale, scale, 1)
    found = read_back("int8", x)
    assert np.abs(found / np.where(scale, scale, 1) - wide).max() <= 0.5 + 1e-5
    assert len(np.unique(found[0, 0])) > 40


def test_formats_are_those_that_are_planned() -> None:
    assert set(cache.FORMATS) == set(OFFERED_CACHES)


@pytest.fixture(scope="module", params=ARCHITECTURES)
def tiny(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Grouped heads, one full layer, and one with a window shorter than the sequence."""
    return write_checkpoint(
        tmp_path_factory.mktemp("cache") / "tiny",
        model_type=request.param,
        use_sliding_window=True,
        sliding_window=9,
        max_window_layers=1,
        head_dim=32,
    )


def engine(directory: Path, dtype: str = "float32", backend: str = "xla") -> JaxEngine:
    weights = HuggingFaceWeights(directory)
    return JaxEngine(weights, dtype, backend, jax.devices("cpu")[0], keep=True)


def trace(made: JaxEngine, tokens: tuple[int, ...], **asked):
    return tracing.to_memory(made, tracing.make_plan(made.model, tokens, **asked))


@pytest.mark.parametrize("chunk", [None, 1, 16])
def test_a_decode_is_the_prefill_of_its_tokens(tiny: Path, chunk: int | None) -> None:
    """Of Hugging Face, which knows no cache here: every stage, in every row, within the bound of
    the differential tests."""
    made = engine(tiny)
    asked = {"dtype": "float32", "logits": "all", "generate": 6, "prefill_chunk": chunk}
    found = trace(made, TOKENS, **asked)
    assert len(found.tokens) == len(TOKENS) + 5 and sum(found.steps) == len(found.tokens)
    cached = {key for key in found.entries if key[0] in ("k_cache", "v_cache")}
    assert len(cached) == 4
    plain = {key: found.read(*key) for key in found.entries if key not in cached}
    check_stages(made.model.config, plain, torch_trace(tiny, found.tokens), 1e-5)
    for _, layer in cached:
        np.testing.assert_array_equal(found.read("k_cache", layer), plain["k_post_rope", layer])
        v = plain[found.arch.stage["v_cache"].inputs[0], layer][:, -64:].reshape(-1, 2, 32)
        np.testing.assert_array_equal(found.read("v_cache", layer), v)


CALLS = [
    ({"prefill_chunk": 16}, "xla"),
    ({"cache": "model"}, "xla"),
    ({"prefill_chunk": 40}, "eager"),
]


@pytest.mark.parametrize(("asked", "backend"), CALLS)
def test_in_how_many_calls_changes_no_byte(asked: dict, backend: str) -> None:
    """Of a prefill of the demo."""
    made = JaxEngine(open_model(None), "float32", backend, jax.devices("cpu")[0], keep=True)
    tokens = random_tokens(63, made.model)
    found = trace(made, tokens, logits="all", **asked)
    whole = trace(made, found.tokens, logits="all")
    assert partings(found, whole) == []
    seen = np.tri(len(found.tokens), dtype=bool)
    for key in whole.entries:
        mask = seen if key[0] == "attn_scores" else True
        both = (np.where(mask, each.read(*key), 0) for each in (found, whole))
        np.testing.assert_array_equal(*both, err_msg=str(key))


def test_where_a_decode_parts_from_the_prefill(tiny: Path) -> None:
    """At products, whose sums XLA adds up in another order where there are few rows or keys, and
    where the keys of a window are added up."""
    made = engine(tiny)
    found = trace(made, TOKENS, logits="all", generate=4)
    parted = partings(found, trace(made, found.tokens, logits="all"))
    kinds = {found.arch.stage[each.stage].kind for each in parted}
    assert kinds and kinds <= {LINEAR, SCORES, WEIGHTED_SUM, SOFTMAX}


def test_it_picks_what_transformers_generates(tiny: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    network = AutoModelForCausalLM.from_pretrained(tiny, dtype=torch.float32)
    given = torch.tensor([TOKENS])
    # Without a mask it takes tokens of the padding's id, 0, for padding.
    more = {"attention_mask": torch.ones_like(given), "eos_token_id": None, "pad_token_id": 0}
    expected = network.generate(given, max_new_tokens=12, do_sample=False, **more)
    found = trace(engine(tiny), TOKENS, generate=12)
    assert found.tokens == tuple(expected[0, :-1].tolist())


@pytest.mark.parametrize(
    ("format", "dtype"),
    [("float16", "float32"), ("q8_0", "bfloat16"), ("q4_0", "float32"), ("int8", "bfloat16")],
)
def test_attention_reads_what_the_cache_kept(tiny: Path, format: str, dtype: str) -> None:
    found = trace(engine(tiny, dtype), TOKENS, dtype=dtype, cache=format, prefill_chunk=16)
    for layer in (0, 1):
        k = found.read("k_post_rope", layer).astype(np.float32)
        kept = read_back(format, k).astype(found.read("k_cache", layer).dtype)
        np.testing.assert_array_equal(found.read("k_cache", layer), kept)
        assert not np.array_equal(kept, k)
        q = found.read("q_post_rope", layer).astype(np.float64)
        keys = np.repeat(kept.astype(np.float64), q.shape[1] // kept.shape[1], 1)
        scores = np.einsum("tnh,snh->nts", q, keys) * 32**-0.5
        error = np.abs(found.read("attn_scores", layer).astype(np.float64) - scores)
        low = np.tril(np.ones(scores.shape[1:], bool))
        if layer:  # and no more than the window
            low &= ~np.tril(np.ones_like(low), -9)
        bound = 1e-5 if dtype == "float32" else 2e-2
        assert (error * low).max() <= bound * np.abs(scores).max()


@pytest.mark.parametrize("backend", ["xla", "eager"])
def test_what_is_captured_changes_no_byte(tiny: Path, backend: str) -> None:
    made = engine(tiny, backend=backend)
    asked = {"generate": 4, "cache": "q8_0", "prefill_chunk": 20}
    everything = trace(made, TOKENS, **asked)
    for stages in ("lm_head", "k_cache,lm_head", "attn_scores,ffn_out,lm_head"):
        part = trace(made, TOKENS, stages=stages, **asked)
        assert part.tokens == everything.tokens
        for key in part.entries:
            assert part.read(*key).tobytes() == everything.read(*key).tobytes(), key


def test_no_program_is_compiled_as_the_cache_grows(
    tiny: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """As many programs for twelve calls as for three; another length of a chunk needs its own."""

    def compiled(**asked: int) -> int:
        caplog.clear()
        jax.clear_caches()
        with jax.log_compiles(), caplog.at_level("WARNING"):
            trace(engine(tiny), TOKENS[: 40 - asked["generate"]], **asked)
        return sum("Finished XLA compilation" in each.getMessage() for each in caplog.records)

    few = compiled(generate=3)
    assert few
    assert compiled(generate=12) == few
    assert compiled(generate=12, prefill_chunk=16) > few


def test_a_batch_is_its_sequences(tiny: Path, tmp_path: Path) -> None:
    """Padded, in chunks that begin in the padding of some, decoded: each sequence is the one
    computed alone, its files hold no row of padding, and its manifest says its place."""
    made = engine(tiny)
    prompts = TOKENS, TOKENS[:5], TOKENS[3:20]
    plan = partial(tracing.make_plan, made.model, generate=4)
    plans = tracing.make_batch([plan(prompt) for prompt in prompts], 16)
    assert [each.steps[:-3] for each in plans] == [(16, 16, 5), (5,), (12, 5)]
    written = tracing.batch_to_disk(made, plans, tmp_path / "batch")
    for row, (prompt, each) in enumerate(zip(prompts, written, strict=True)):
        alone, found = trace(made, prompt, generate=4), each.open()
        padding = len(TOKENS) - len(prompt)
        assert found.manifest.batch == Batch(row=row, size=3, padding=padding)
        assert found.tokens == alone.tokens
        config = made.model.config
        both = ({key: t.read(*key) for key in t.entries} for t in (found, alone))
        for key in alone.entries:
            assert found.read(*key).shape == alone.read(*key).shape
        plain = [{k: v for k, v in t.items() if "cache" not in k[0]} for t in both]
        check_stages(config, *plain, 1e-5)


def test_an_older_batch_leaves_nothing_behind(tiny: Path, tmp_path: Path) -> None:
    made, out = engine(tiny), tmp_path / "batch"
    plan = partial(tracing.make_plan, made.model, stages="lm_head")
    for count in (3, 2):
        plans = tracing.make_batch([plan(TOKENS[:n]) for n in range(3, 3 + count)])
        tracing.batch_to_disk(made, plans, out, overwrite=count == 2)
    assert sorted(path.name for path in out.iterdir()) == ["sequence-0", "sequence-1"]
    (out / "notes.txt").write_text("mine")
    with pytest.raises(UserError, match="which is no sequence of a batch"):
        tracing.check_batch_out(out, overwrite=True)


@pytest.mark.parametrize(
    ("asked", "says"),
    [
        ({"generate": 0}, "--generate 0: expected 1 or more"),
        ({"generate": 400}, "needs position 435, and tiny has positions 0 to 255"),
        ({"prefill_chunk": 38}, "--prefill-chunk 38: the prompt has 37 tokens"),
        ({"cache": "q2_K"}, "no cache format 'q2_K'; choose one of float32, "),
    ],
)
def test_bad_input(tiny: Path, asked: dict, says: str) -> None:
    with pytest.raises(UserError, match=says):
        tracing.make_plan(HuggingFaceWeights(tiny), TOKENS, **asked)


def test_a_format_that_does_not_divide_the_heads(tmp_path: Path) -> None:
    model = HuggingFaceWeights(write_checkpoint(tmp_path / "small", head_dim=8))
    with pytest.raises(UserError, match="do not divide this model's head size 8"):
        tracing.make_plan(model, TOKENS, cache="q4_0")
