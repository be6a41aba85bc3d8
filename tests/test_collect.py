"""Other engines, run and recorded: calls joined to a sequence, and every stage near JAX's."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import qwen_jax
from qwen_jax.prompt import Prompt
from qwen_jax.weights import open_model
from stages import numbers
from stages.architectures import ARCHITECTURES
from stages.errors import UserError
from stages.open import open_trace
from stages.places import Place, place
from stages.trace import Trace
from tests import test_readme, tiny
from tests.conftest import ROOT
from tests.described import as_described
from tests.traces import visible
from tools.collect import Recorder, engines, ggml, options
from tools.collect import collect as run
from tools.collect.__main__ import main
from tools.collect.session import Calls

RANDOM = np.random.default_rng(0)
# llama.cpp wants D = N*H of a Qwen2, and so does mlx-lm.
SIZES = {"hidden_size": 64, "num_attention_heads": 4, "head_dim": 16, "intermediate_size": 96}
TOKENS = (3, 1, 4, 1, 5, 9, 2, 6, 5, 35, 8, 9)
TEXT = ",".join(map(str, TOKENS))


def value(*shape: int) -> np.ndarray:
    return RANDOM.standard_normal(shape, np.float32)


@pytest.fixture(scope="module", params=["qwen2", "qwen3"])
def model(tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> Path:
    """A Hugging Face directory."""
    directory = tmp_path_factory.mktemp("model") / request.param
    return tiny.write_checkpoint(directory, model_type=request.param, **SIZES)


@pytest.fixture(scope="module")
def qwen2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.write_checkpoint(tmp_path_factory.mktemp("model") / "qwen2", **SIZES)


@pytest.fixture(scope="module")
def gguf(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Architecture -> a float32 GGUF."""
    need("llama.cpp")
    folder = tmp_path_factory.mktemp("gguf")
    return {name: write_gguf(folder / f"{name}.gguf", name) for name in ARCHITECTURES}


def write_gguf(path: Path, architecture: str, kind: str = "F32", **sizes: Any) -> Path:
    from tests import ggml

    raw = tiny.hf_config(**{**SIZES, **sizes, "model_type": architecture})
    into = ggml.writer(path, raw)
    into.add_tokenizer_model("none")  # llama.cpp insists on being told
    ggml.add_tensors(into, raw, tiny.random_tensors(raw), kind)
    ggml.finish(into)
    return path


def need(engine: str) -> None:
    """Skip a test of an engine that is not installed."""
    for package in engines.ENGINES[engine].packages:
        pytest.importorskip(package)


def collect(engine: str, model: Path, out: Path, *more: str) -> Trace:
    need(engine)
    assert main([engine, str(model), "--tokens", TEXT, "--out", str(out), *more]) == 0
    return open_trace(out)


def far_from_jax(trace: Trace, model: Path, first_position: int = 0) -> dict[str, float]:
    """Stage -> the largest relative error (rms) of a layer against JAX, which computes the same
    tokens in one call; of the rows that there are, without masked entries."""
    weights = open_model(model)
    ours = qwen_jax.trace_model(weights, trace.tokens, first_position=first_position)
    found: dict[str, float] = {}
    for stage, layer in trace.entries:
        row = trace.arch.stage[stage]
        rows = trace.rows_of(stage, layer)
        theirs = trace.read_rows(stage, layer).astype(np.float64)
        right = ours.read_rows(stage, layer).astype(np.float64)
        along = row.axes.index("T")
        right = np.take(right, range(right.shape[along] - rows, right.shape[along]), along)
        if rows == len(trace.tokens):
            theirs, right = (visible(weights.config, stage, layer, x) for x in (theirs, right))
        error = np.sqrt(((theirs - right) ** 2).mean() / (right**2).mean())
        found[stage] = max(found.get(stage, 0), float(error))
    return found


def absent(trace: Trace) -> set[str]:
    assert trace.manifest
    return set(trace.manifest.producer.get("absent", ()))


# --- where a stage is found


@pytest.mark.parametrize(
    "path, side, expected",
    [
        ("model.embed_tokens", "out", Place("embedding", 0)),
        ("model.layers.3.input_layernorm", "out", Place("attn_norm", 3)),
        ("model.layers.3.self_attn.k_proj", "out", Place("qkv_bias", 3, "k_proj")),
        ("model.layers.3.self_attn.o_proj", "in", Place("attention", 3)),
        ("model.layers.3.self_attn.o_proj", "out", Place("attn_out", 3)),
        ("model.layers.3.post_attention_layernorm", "in", Place("post_attn_residual", 3)),
        ("model.layers.12.mlp.down_proj", "in", Place("ffn_swigl", 12)),
        ("model.layers.12.mlp.act_fn", "out", Place("ffn_silu", 12)),
        ("layers.12", "out", Place("post_ffn_residual", 12)),
        ("model.norm", "out", Place("final_norm", None)),
        ("lm_head", "out", Place("lm_head", None)),
        ("model.layers.3.input_layernorm", "in", None),
        ("model.norm", "in", None),
        ("model.rotary_emb", "out", None),
        ("model.layers.3.self_attn.q_norm", "out", None),
    ],
)
def test_a_module_is_a_stage(path: str, side: str, expected: Place | None) -> None:
    assert place(ARCHITECTURES["qwen2"], path, side) == expected


def test_modules_of_a_qwen3() -> None:
    arch = ARCHITECTURES["qwen3"]
    assert place(arch, "model.layers.3.self_attn.q_norm", "out") == Place("q_norm", 3)
    assert place(arch, "model.layers.3.self_attn.q_proj", "out") == Place("qkv_matmul", 3, "q_proj")


# --- the recorder. D 64, N 4, K 2, H 16, F 96, V 48, two layers


def test_the_rows_of_all_calls_are_one_sequence(qwen2: Path, tmp_path: Path) -> None:
    recorder = Recorder(qwen2)
    whole, scores = value(5, 64), value(4, 5, 5)
    for start, end in ((0, 3), (3, 4), (4, 5)):
        recorder.begin(range(start, end))
        recorder.tap("model.layers.1.input_layernorm", "out", whole[None, start:end])
        recorder.named(
            1, "attn_scores", np.pad(scores[None, :, start:end, :end], [(0, 0)] * 3 + [(0, 7)])
        )
    found = recorder.finish(tmp_path / "d", (1, 2, 3, 4, 5), {"name": "toy"})
    trace = open_trace(tmp_path / "d")
    assert (trace.read("attn_norm", 1) == whole).all()
    seen = np.tri(5, dtype=bool)
    assert (trace.read("attn_scores", 1)[:, seen] == scores[:, seen]).all()
    made = found.manifest
    assert made.steps == (3, 1, 1) and made.positions == (0, 1, 2, 3, 4)
    assert made.architecture == "qwen2" and made.producer["name"] == "toy"
    assert set(made.model.weights) == set(open_model(qwen2).shapes)
    assert found.absent["attn_norm"].startswith("layers 0: ")
    assert "lm_head" in found.absent and made.producer["absent"] == found.absent


def test_of_rows_with_gaps_the_last_run_is_kept(qwen2: Path, tmp_path: Path) -> None:
    recorder, logits = Recorder(qwen2), value(4, 48)
    for row, (start, end) in enumerate(((0, 3), (3, 6), (6, 7), (7, 8))):
        recorder.begin(range(start, end))
        recorder.named(None, "lm_head", logits[row])
    found = recorder.finish(tmp_path / "d", range(8), {})
    assert found.manifest.files[0].rows == 3
    assert (open_trace(tmp_path / "d").read("lm_head", None) == logits[1:]).all()


def test_the_last_row_alone_is_a_trace_of_last_logits(qwen2: Path, tmp_path: Path) -> None:
    recorder = Recorder(qwen2)
    recorder.begin(range(8))
    recorder.named(None, "lm_head", value(1, 48))
    made = recorder.finish(tmp_path / "d", range(8), {}).manifest
    assert made.logits == "last" and made.files[0].shape == (48,)


@pytest.mark.parametrize("biased, stage", [(True, "qkv_bias"), (False, "qkv_matmul")])
def test_q_k_and_v_stand_side_by_side(
    qwen2: Path, tmp_path: Path, biased: bool, stage: str
) -> None:
    recorder = Recorder(qwen2, biased=biased)
    q, k, v = value(3, 64), value(3, 32), value(1, 3, 2, 16)
    recorder.begin(range(3))
    for part, given in (("k", k), ("v", v), ("q", q)):
        recorder.tap(f"model.layers.0.self_attn.{part}_proj", "out", given)
    recorder.finish(tmp_path / "d", range(3), {})
    expected = np.concatenate([q, k, v.reshape(3, 32)], -1)
    assert (open_trace(tmp_path / "d").read(stage, 0) == expected).all()


def test_values_are_copied_and_keep_their_dtype(qwen2: Path, tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    recorder = Recorder(qwen2)
    held = torch.arange(64, dtype=torch.bfloat16)[None] / 3
    before = held.float().numpy().copy()
    recorder.begin([7])
    recorder.named(0, "attn_norm", held)
    held.zero_()
    made = recorder.finish(tmp_path / "d", [1], {}, format="safetensors").manifest
    found = open_trace(tmp_path / "d").read("attn_norm", 0)
    assert made.dtype == "bfloat16" and found.dtype.name == "bfloat16"
    assert (found.astype(np.float32) == before).all()


def test_a_row_of_the_cache_that_changed_is_told(qwen2: Path, tmp_path: Path) -> None:
    recorder, rows = Recorder(qwen2), value(4, 2, 16)
    for end in (3, 4):
        recorder.begin(range(end - 3, end) if end == 3 else [3])
        recorder.named(0, "attn_norm", value(3 if end == 3 else 1, 64))
        recorder.cached(0, "K", rows[:end])
        recorder.cached(1, "V", rows[:end])
        rows[1, 0, 5] = np.nan
        rows[2] = np.nan
    recorder.cached(1, "V", rows)  # NaN that stays is no change
    found = recorder.finish(tmp_path / "d", range(4), {})
    places = [(each.layer, each.cache, each.row, each.step) for each in found.changed]
    assert places == [(0, "K", 1, 1), (0, "K", 2, 1), (1, "V", 1, 1), (1, "V", 2, 1)]
    assert str(found.changed[0]) == "K cache of layer 0: row 1 changed in step 1"
    assert open_trace(tmp_path / "d").changed == found.changed


def test_what_is_recorded_wrongly_is_one_line(qwen2: Path, tmp_path: Path) -> None:
    recorder = Recorder(qwen2)
    with pytest.raises(UserError, match="before begin"):
        recorder.named(0, "attn_norm", value(3, 64))
    with pytest.raises(UserError, match="showed nothing"):
        recorder.finish(tmp_path / "d", (), {})
    recorder.begin(range(3))
    with pytest.raises(UserError, match=r"attn_norm of layer 0: \[3, 63\] .* T x D: 3 x 64"):
        recorder.named(0, "attn_norm", value(3, 63))
    with pytest.raises(UserError, match="in a call of 3 rows"):
        recorder.named(0, "attn_norm", value(4, 64))
    with pytest.raises(UserError, match="attn_scores of layer 0"):
        recorder.named(0, "attn_scores", value(4, 3, 2))
    with pytest.raises(UserError, match="'q_norm' is no stage of qwen2"):
        recorder.named(0, "q_norm", value(3, 4, 16))
    with pytest.raises(UserError, match="'q' is no part"):
        recorder.named(0, "qkv_bias", value(3, 64), "q")
    recorder.named(0, "attn_norm", value(3, 64))
    with pytest.raises(UserError, match="twice in one call"):
        recorder.named(0, "attn_norm", value(3, 64))
    with pytest.raises(UserError, match="2 tokens, but 3 rows"):
        recorder.finish(tmp_path / "d", (1, 2), {})
    assert not (tmp_path / "d").exists()


# --- llama.cpp


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_llama_cpp_computes_what_jax_does(
    gguf: dict[str, Path], tmp_path: Path, architecture: str
) -> None:
    model = gguf[architecture]
    options = ("--flash", "off", "--cache-k", "f32", "--cache-v", "f32", "--first-position", "3")
    trace = collect("llama.cpp", model, tmp_path / "d", *options)
    assert absent(trace) == {"ffn_silu"}
    assert max(far_from_jax(trace, model, 3).values()) < 1e-5
    assert trace.manifest and trace.manifest.cache == "f32" and trace.positions[0] == 3
    assert set(trace.manifest.producer["weight_types"].values()) == {"f32"}
    assert set(trace.manifest.model.weights) == set(open_model(model).shapes)


@pytest.mark.parametrize(
    "options, steps",
    [
        (("--steps", "7,4,1", "--generate", "2"), (7, 4, 1, 1, 1)),
        (("--ubatch", "5"), (5, 5, 2)),
        (("--flash", "off", "--threads", "2"), (12,)),
        (("--cache-k", "bf16", "--cache-v", "bf16"), (12,)),
    ],
    ids=["steps", "ubatch", "threads", "cache"],
)
def test_llama_cpp_however_it_computes(
    gguf: dict[str, Path], tmp_path: Path, options: tuple[str, ...], steps: tuple[int, ...]
) -> None:
    trace = collect("llama.cpp", gguf["qwen2"], tmp_path / "d", *options)
    assert trace.manifest and trace.manifest.steps == steps
    assert not trace.changed
    assert max(far_from_jax(trace, gguf["qwen2"]).values()) < 0.05


def test_llama_cpp_the_last_row_alone(gguf: dict[str, Path], tmp_path: Path) -> None:
    trace = collect("llama.cpp", gguf["qwen2"], tmp_path / "d", "--logits", "last")
    rows = {stage: trace.rows_of(stage, layer) for stage, layer in trace.entries}
    assert rows["post_ffn_residual"] == rows["final_norm"] == 1 and rows["attn_norm"] == 12
    assert trace.manifest and trace.manifest.logits == "last"
    assert max(far_from_jax(trace, gguf["qwen2"]).values()) < 0.02


@pytest.mark.parametrize("flash", ["on", "off"])
@pytest.mark.parametrize("kind", ["F32", "Q4_K"])
def test_llama_cpp_watched_computes_the_same_bits(
    gguf: dict[str, Path], tmp_path: Path, kind: str, flash: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from tools.collect import llama_cpp

    sizes = {"hidden_size": 256, "head_dim": 64, "intermediate_size": 256}
    path = write_gguf(tmp_path / "m.gguf", "qwen2", kind, **sizes)
    weights = open_model(path)
    settings = options.checked(llama_cpp.Settings, {"flash": flash})

    def logits() -> list[np.ndarray]:
        with llama_cpp.open(weights, settings, Recorder(weights), Calls((11, 1))) as session:
            return [session.step(TOKENS[:11], range(11)), session.step(TOKENS[11:], [11])]

    watched = logits()
    monkeypatch.setattr(llama_cpp.Watch, "__call__", lambda self, tensor, ask, data: not ask)
    for mine, theirs in zip(watched, logits(), strict=True):
        assert mine.tobytes() == theirs.tobytes()


def test_a_build_with_other_structs_is_refused(
    gguf: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    from tools.collect import ggml as interface

    monkeypatch.setitem(interface.CONTEXT_DEFAULTS, "n_ctx", 513)
    with pytest.raises(UserError, match=r"not the llama.cpp that is known .*n_ctx is 512"):
        interface.Library()


# --- transformers


@pytest.mark.parametrize(
    "options",
    [
        (),
        ("--attention", "sdpa", "--cache", "none"),
        ("--attention", "flex_attention"),
        ("--attention", "sdpa", "--steps", "7,4,1", "--generate", "2", "--first-position", "5"),
        ("--cache", "static", "--steps", "7,4,1", "--generate", "2"),
    ],
    ids=["eager", "sdpa", "flex", "steps", "static"],
)
def test_transformers_computes_what_jax_does(
    model: Path, tmp_path: Path, options: tuple[str, ...]
) -> None:
    trace = collect("transformers", model, tmp_path / "d", *options)
    inside = set() if "--attention" not in options else {"attn_softmax"}
    biased = {"qkv_matmul"} if "qkv_bias" in trace.arch.stage else set()
    assert absent(trace) == {"attn_scores"} | inside | biased
    assert trace.manifest and not trace.changed
    first = trace.positions[0]
    assert max(far_from_jax(trace, model, first).values()) < 1e-5


def test_transformers_in_bfloat16(qwen2: Path, tmp_path: Path) -> None:
    trace = collect("transformers", qwen2, tmp_path / "d", "--dtype", "bf16", "--stages", "ffn_up")
    assert trace.dtype == "bfloat16" and absent(trace) == set()
    assert {stage for stage, _ in trace.entries} == {"ffn_up"}
    assert 1e-4 < far_from_jax(trace, qwen2)["ffn_up"] < 0.05


def test_transformers_judged_by_the_weights_it_multiplies_by(qwen2: Path, tmp_path: Path) -> None:
    weights = tmp_path / "weights"
    options = ("--quantize", "int8", "--weights", str(weights))
    trace = collect("transformers", qwen2, tmp_path / "d", *options)
    theirs, given = open_model(weights), open_model(qwen2)
    name = "model.layers.1.mlp.up_proj.weight"
    assert trace.manifest and trace.manifest.model.weights[name] == theirs.hash(name)
    step = np.abs(given.read(name)).max() / 127
    assert 0 < np.abs(theirs.read(name) - given.read(name)).max() < step
    x, y = trace.read("ffn_norm", 1), trace.read("ffn_up", 1)
    right = x @ theirs.read(name).T
    assert np.sqrt(((y - right) ** 2).mean() / (right**2).mean()) < 0.02  # 8-bit inputs


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_transformers_watched_computes_the_same_bits(qwen2: Path, attention: str) -> None:
    need("transformers")
    torch = pytest.importorskip("torch")
    from tools.collect import huggingface

    settings = huggingface.Settings(attention=attention)
    weights = open_model(qwen2)
    with huggingface.open(weights, settings, Recorder(weights), Calls((12,))) as session:
        watched = session.step(TOKENS, range(12))
    bare = huggingface.load(weights, settings)
    with torch.inference_mode():
        alone = bare(input_ids=torch.tensor([TOKENS])).logits[0, -1].numpy()
    assert watched.tobytes() == alone.tobytes()


def test_transformers_reads_a_gguf(gguf: dict[str, Path], tmp_path: Path) -> None:
    trace = collect("transformers", gguf["qwen2"], tmp_path / "d")
    assert max(far_from_jax(trace, gguf["qwen2"]).values()) < 1e-5


def test_the_attention_function_is_given_back(qwen2: Path, tmp_path: Path) -> None:
    modeling_utils = pytest.importorskip("transformers.modeling_utils")
    before = modeling_utils.ALL_ATTENTION_FUNCTIONS["sdpa"]
    collect("transformers", qwen2, tmp_path / "d", "--attention", "sdpa")
    assert modeling_utils.ALL_ATTENTION_FUNCTIONS["sdpa"] is before
    assert modeling_utils.ALL_ATTENTION_FUNCTIONS.get("eager") is None


# --- onnxruntime


@pytest.fixture(scope="module")
def exported(qwen2: Path, tmp_path_factory: pytest.TempPathFactory) -> Trace:
    out = tmp_path_factory.mktemp("onnx") / "d"
    return collect("onnxruntime", qwen2, out, "--first-position", "2")


def test_onnxruntime_computes_what_jax_does(exported: Trace, qwen2: Path) -> None:
    assert absent(exported) == set() and exported.manifest
    assert max(far_from_jax(exported, qwen2, 2).values()) < 1e-5
    assert exported.manifest.cache is None


def test_onnxruntime_watched_computes_the_same_bits(exported: Trace) -> None:
    assert exported.manifest
    assert exported.manifest.producer["watched"] == "same logits, bit for bit, as unwatched"


def test_onnxruntime_quantised(exported: Trace, qwen2: Path, tmp_path: Path) -> None:
    weights = tmp_path / "weights"
    options = ("--quantize", "int8", "--weights", str(weights))
    trace = collect("onnxruntime", qwen2, tmp_path / "d", *options)
    assert absent(trace) == set()
    theirs = open_model(weights)
    for stage, parameter in (("ffn_up", "mlp.up_proj"), ("attn_out", "self_attn.o_proj")):
        x = trace.read(trace.arch.stage[stage].inputs[0], 1)
        right = x @ theirs.read(f"model.layers.1.{parameter}.weight").T
        error = trace.read(stage, 1) - right
        assert 1e-4 < np.sqrt((error**2).mean() / (right**2).mean()) < 0.05


@pytest.mark.parametrize("kind", [f.ggml for f in numbers.used(numbers.WEIGHT) if not f.ways])
def test_rows_are_quantised_as_by_llama_cpp(kind: str) -> None:
    """And what its search for scales would abort on is taken for zero."""
    need("llama.cpp")
    from tests import ggml as theirs

    x = value(3, 5, 512)
    flat = theirs.dequantize(theirs.quantize(x.reshape(15, 512), kind), kind)
    library = ggml.installed()
    assert library is not None
    assert library.quantised(x, kind).tobytes() == flat.tobytes()
    for odd in (np.nan, 1e-40, np.inf):
        library.quantised(np.full((1, 256), odd, np.float32), kind)


# --- the command


def test_the_result_as_json(qwen2: Path, tmp_path: Path, capsys: Any) -> None:
    more = ("--generate", "1", "--layers", "1", "--json", "-")
    collect("transformers", qwen2, tmp_path / "d", *more)
    printed = capsys.readouterr()
    as_described("collect", printed.out.encode())
    data = json.loads(printed.out)
    assert data["engine"] == "transformers" and data["steps"] == [12, 1]
    assert len(data["tokens"]) == 13 and data["next_token"] < 48
    assert {"stage": "ffn_up", "axes": ["T", "F"], "layers": [1], "shape": [13, 96]} in (
        data["stages"]
    )
    assert data["weights"] == "qwen2" and data["producer"]["options"]["attention"] == "eager"
    assert "not there: attn_scores" in printed.err


def test_from_python_without_a_command_line(qwen2: Path, tmp_path: Path) -> None:
    need("transformers")
    found = run("transformers", qwen2, tmp_path / "d", TOKENS, attention="sdpa", steps=(11, 1))
    assert found.to_json()["producer"]["options"]["attention"] == "sdpa"
    assert open_trace(found.path).positions == tuple(range(12)) and found.judged_by == "qwen2"
    for wrong, message in [
        ({"prompt": "the cat"}, "a prompt is text, a file or token ids; give one of them"),
        ({"prompt": Prompt()}, "a Prompt has tokens and first position itself; do not give them"),
        (
            {"flavour": 1},
            "no option 'flavour'; this engine has attention, cache, dtype,",
        ),
        ({"dtype": "int3"}, "--dtype int3: expected one of bfloat16, float16, float32, float64"),
        ({"compile": "x"}, "--compile x: Expected bool, got str"),
    ]:
        with pytest.raises(UserError) as error:
            run("transformers", qwen2, tmp_path / "e", TOKENS, **wrong)
        assert str(error.value).startswith(message) and not (tmp_path / "e").exists()


def test_a_prompt_is_encoded(qwen2: Path, tmp_path: Path) -> None:
    need("transformers")
    assert (
        main(["transformers", str(qwen2), "--prompt", "the cat", "--out", str(tmp_path / "d")]) == 0
    )
    assert open_trace(tmp_path / "d").tokens == (1, 3)


@pytest.mark.parametrize(
    "arguments, message",
    [
        ("nope MODEL", "no engine 'nope'; choose one of llama.cpp, transformers"),
        ("transformers /nowhere", "no such model directory"),
        ("transformers synthetic:0.5b:1 --tokens 1", "reads Hugging Face directories and GGUF"),
        ("transformers MODEL --attention nope", "transformers cannot load qwen2: Specified"),
        ("transformers MODEL --cache none --steps 6,6", "without a cache there is one call"),
        ("transformers MODEL --steps 3,3", "--steps add up to 6, but the prompt has 12 tokens"),
        ("transformers MODEL --steps 3,x", "expected rows of each call"),
        ("transformers MODEL --stages nope", "unknown stage 'nope'"),
        ("transformers MODEL --layers 5", "layer 5 does not exist"),
        ("transformers MODEL --weights W", "multiplies by the values in the files of qwen2"),
        ("transformers MODEL --weights .", "already exists"),
        ("transformers MODEL --tokens 99", "token id 99 is outside the vocabulary"),
        ("llama.cpp MODEL", "qwen2: llama.cpp reads GGUF files"),
        ("llama.cpp GGUF --cache-v q8_0 --flash off", "--cache-v q8_0 needs flash attention"),
        ("llama.cpp GGUF --cache-v q9", "invalid choice: 'q9'"),
        ("llama.cpp GGUF --threads 0", "--threads 0: Expected int >= 1"),
        ("onnxruntime MODEL --generate 2", "so there is one call: no --steps, --generate"),
    ],
)
def test_wrong_use_is_one_line(
    qwen2: Path, gguf: dict[str, Path], tmp_path: Path, arguments: str, message: str
) -> None:
    if (engine := arguments.split()[0]) in engines.ENGINES:
        need(engine)
    words = arguments.replace("MODEL", str(qwen2)).replace("GGUF", str(gguf["qwen2"])).split()
    words = [str(tmp_path / "w") if word == "W" else word for word in words]
    given = [] if "--tokens" in words else ["--tokens", TEXT]
    with pytest.raises(UserError) as error:
        main([*words, *given, "--out", str(tmp_path / "d")])
    assert message in str(error.value) and "\n" not in str(error.value)
    assert not (tmp_path / "d").exists() and not (tmp_path / "w").exists()


def test_what_is_no_gguf_for_llama_cpp_is_one_line(gguf: dict[str, Path], tmp_path: Path) -> None:
    from tests import ggml

    path = tmp_path / "m.gguf"
    raw = tiny.hf_config(**SIZES)
    into = ggml.writer(path, raw)  # without the line on the tokenizer
    ggml.add_tensors(into, raw, tiny.random_tensors(raw), "F32")
    ggml.finish(into)
    with pytest.raises(UserError, match=r"llama.cpp cannot load .*tokenizer.ggml.model"):
        collect("llama.cpp", path, tmp_path / "d")


def test_a_package_that_is_not_installed_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    absent = engines.Engine("nothing", "mlx", ("mlx_of_another_world",))
    monkeypatch.setitem(engines.ENGINES, "mlx-lm", absent)
    with pytest.raises(UserError, match=r"not installed: pip install 'qwen-jax-stages\[mlx\]'"):
        engines.adapter("mlx-lm")


def test_a_trace_is_not_overwritten_unasked(qwen2: Path, tmp_path: Path) -> None:
    collect("transformers", qwen2, tmp_path / "d", "--stages", "lm_head")
    with pytest.raises(UserError, match="already holds a trace; add --overwrite"):
        collect("transformers", qwen2, tmp_path / "d")
    trace = collect("transformers", qwen2, tmp_path / "d", "--overwrite", "--stages", "embedding")
    assert list(trace.entries) == [("embedding", 0)]


def test_every_extra_is_in_pyproject() -> None:
    import tomllib

    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"][
        "optional-dependencies"
    ]
    assert {engine.extra for engine in engines.ENGINES.values()} <= extras.keys()


PAGE = [
    block
    for block in test_readme.blocks((ROOT / "docs/collect.md").read_text("utf-8"))
    if block.language in test_readme.EXECUTED
]


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("page")


@pytest.mark.parametrize("block", PAGE, ids=lambda block: f"line {block.line}")
def test_docs_collect_is_true(block: test_readme.Block, directory: Path) -> None:
    need("transformers")
    test_readme.run(block, directory)
