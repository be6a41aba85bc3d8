"""The observer changes nothing: whatever is captured, the same bytes are computed, and a captured
value is the value that the rest of the model consumed."""

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import jax
import numpy as np
import pytest

from qwen_jax import runtime
from qwen_jax.engine import JaxEngine
from qwen_jax.forward import read_parameters, run_stages
from qwen_jax.models.ops import positional_by_layer
from qwen_jax.weights.huggingface import HuggingFaceWeights
from stages.architecture import LAYER_INPUT
from stages.architectures import ARCHITECTURES
from stages.files import numpy_dtype
from tests.conftest import ROOT, user_environment
from tests.tiny import write_checkpoint
from tests.traces import Trace, collect, jax_trace, ulps
from tools.parity.worker import REFERENCE as REFERENCE_FLAGS

TOKENS = tuple(int(token) for token in np.random.default_rng(0).integers(0, 48, 37))


@pytest.fixture(scope="module", params=ARCHITECTURES)
def tiny(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Grouped heads, and one layer of each kind of attention."""
    return write_checkpoint(
        tmp_path_factory.mktemp("observer") / "tiny",
        model_type=request.param,
        num_hidden_layers=3,
        use_sliding_window=True,
        sliding_window=9,
        max_window_layers=2,
    )


def observe(engine: JaxEngine, want: Callable[[str, int | None], bool]) -> dict:
    """(stage, layer) -> bytes of what one run emitted."""
    return {key: v.tobytes() for key, v in collect(engine, TOKENS, "last", want).items()}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("backend", ["xla", "eager"])
def test_what_is_captured_changes_no_byte(tiny: Path, backend: str, dtype: str) -> None:
    """Nothing, each stage alone, one layer, everything: the same logits, and each stage the same
    as among all others."""

    def engine() -> JaxEngine:
        return JaxEngine(HuggingFaceWeights(tiny), dtype, backend, jax.devices("cpu")[0])

    first = engine()
    everything = observe(first, lambda stage, layer: True)
    head = "lm_head", None
    names = first.arch.names
    choices = [lambda stage, layer, name=name: stage == name for name in names]
    choices += [lambda stage, layer: False, lambda stage, layer: layer == 1]
    for want in choices:
        seen = observe(first, want)
        assert set(seen) == {key for key in everything if want(*key)} | {head}
        for key, value in seen.items():
            assert value == everything[key], key
    assert observe(first, lambda stage, layer: True) == everything
    assert observe(engine(), lambda stage, layer: False) == {head: everything[head]}
    assert observe(engine(), lambda stage, layer: True) == everything


@pytest.mark.parametrize("stages", ["all", "lm_head"])
def test_a_new_process_computes_the_same_bytes(
    tiny: Path, tmp_path: Path, run_cli, stages: str
) -> None:
    tokens = ",".join(map(str, TOKENS))
    settings = ["--model", tiny, "--tokens", tokens, "--dtype", "bfloat16", "--device", "cpu"]
    done = run_cli("qwen_jax.trace", *settings, "--stages", stages, "--out", tmp_path / "trace")
    assert done.code == 0, done.stderr
    file = (tmp_path / "trace" / "lm_head.bin").read_bytes()[12:]
    here = jax_trace(tiny, TOKENS, "bfloat16", logits="last")["lm_head", None]
    assert file == here.astype(np.float32).tobytes()


def recompute(
    model: HuggingFaceWeights, trace: Trace, layer: int, stage: str, dtype: str
) -> np.ndarray:
    """One stage of one layer, un-jitted, from the inputs that were captured."""
    arch, config = model.config.arch, model.config
    row = arch.stage[stage]
    rows = [*(arch.stage[name] for name in row.unrounded), row]
    above = arch.stored_as(LAYER_INPUT, layer, config.num_hidden_layers)
    captured = {s.name: trace[s.name, layer][None] for s in arch.layer_stages}
    captured[LAYER_INPUT] = trace[above][None]
    pos = positional_by_layer(config, np.arange(len(TOKENS))[None])[config.sliding_layers[layer]]
    with runtime.numerics():
        given = {name: jax.numpy.asarray(captured[name]) for row in rows for name in row.inputs}
        weights, pos = jax.tree.map(
            jax.numpy.asarray, (read_parameters(model, "layer", layer), pos)
        )
        values = run_stages(rows, config, weights, pos, given, numpy_dtype(dtype))
        return np.asarray(values[stage])[0]


def check_consumed(model: HuggingFaceWeights, dtype: str) -> None:
    """Each captured stage follows from the captured stages before it. The float32 arithmetic may
    come out a few 2**-24 apart (fused multiply-add, order of a sum), which moves an element to the
    neighbouring 16-bit number once in some 2**16 (bfloat16) or 2**13 (float16) elements. Where a
    value is consumed without the rounding that its capture shows, 20 % of its readers differ."""
    differing = {"bfloat16": 1e-3, "float16": 8e-3}[dtype]
    trace = jax_trace(model.directory, TOKENS, dtype)
    for layer in range(model.config.num_hidden_layers):
        for stage in model.config.arch.layer_stages:
            again = recompute(model, trace, layer, stage.name, dtype)
            apart = (ulps(again, trace[stage.name, layer]) > 0).mean()
            assert apart <= differing, f"{stage.name}, layer {layer}: {apart:.2%} differ"


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_a_captured_value_is_the_consumed_one(tiny: Path, dtype: str) -> None:
    check_consumed(HuggingFaceWeights(tiny), dtype)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_a_captured_value_of_a_trained_model(demo: HuggingFaceWeights, dtype: str) -> None:
    check_consumed(demo, dtype)


REFERENCE = """
import sys
from pathlib import Path
from tests.traces import jax_trace
demo, *tiny = map(Path, sys.argv[1:])
cases = [(demo, "float32", 37), (demo, "bfloat16", 37)]
cases += [(each, *case) for each in tiny for case in (("float16", 37), ("float32", 1))]
for directory, dtype, length in cases:
    tokens = tuple(range(1, 1 + length))
    compiled = jax_trace(directory, tokens, dtype, "xla")
    unjitted = jax_trace(directory, tokens, dtype, "eager")
    for key, value in compiled.items():
        if value.tobytes() != unjitted[key].tobytes():
            sys.exit(f"{directory}, {dtype}, {length} tokens: first {key}")
"""


def test_reference_mode_compiles_to_what_unjitted_computes(
    demo: HuggingFaceWeights, tmp_path: Path
) -> None:
    """Byte for byte, every stage. Un-jitted, a stage is a function of what is captured because
    nothing else exists; so here the same holds of the compiled layer. In a process of its own:
    the flags of reference mode are read once."""
    window = {"use_sliding_window": True, "sliding_window": 9, "max_window_layers": 1}
    tiny = [write_checkpoint(tmp_path / name, model_type=name, **window) for name in ARCHITECTURES]
    done = subprocess.run(
        [sys.executable, "-c", REFERENCE, demo.directory, *tiny],
        cwd=ROOT,
        env=user_environment() | {"XLA_FLAGS": " ".join(REFERENCE_FLAGS), "JAX_PLATFORMS": "cpu"},
        capture_output=True,
        encoding="utf-8",
    )
    assert done.returncode == 0, done.stderr
