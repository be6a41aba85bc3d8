"""Engines that the tests do not install: run where they are, skipped where not."""

from pathlib import Path

import numpy as np
import pytest

from qwen_jax.weights import open_model
from tests import tiny
from tests.test_collect import SIZES, TOKENS, absent, collect, far_from_jax
from tools.collect import Recorder
from tools.collect.session import Calls

# Their imports and their C++ warn of what is not ours to mend.
pytestmark = pytest.mark.filterwarnings("ignore")
BOTH = pytest.mark.parametrize("architecture", ["qwen2", "qwen3"])


def checkpoint(folder: Path, architecture: str = "qwen2", **more: int) -> Path:
    # the one theta that tunix has for a Qwen3, whatever its configuration says
    theta = 1e6 if architecture == "qwen3" else 1e4
    return tiny.write_checkpoint(
        folder / architecture, model_type=architecture, rope_theta=theta, **{**SIZES, **more}
    )


@BOTH
def test_openvino(tmp_path: Path, architecture: str) -> None:
    pytest.importorskip("openvino")
    model = checkpoint(tmp_path, architecture)
    trace = collect("openvino", model, tmp_path / "d", "--first-position", "2")
    assert absent(trace) == set() and max(far_from_jax(trace, model, 2).values()) < 1e-5
    assert trace.manifest and trace.manifest.producer["watched"].startswith("same logits")


@BOTH
def test_mlx(tmp_path: Path, architecture: str) -> None:
    pytest.importorskip("mlx_lm")
    model = checkpoint(tmp_path, architecture)
    trace = collect("mlx-lm", model, tmp_path / "d", "--steps", "7,5", "--generate", "2")
    inside = {"attn_scores", "attn_softmax", "ffn_silu"}
    biased = {"qkv_matmul"} if architecture == "qwen2" else set()
    assert absent(trace) == inside | biased
    assert max(far_from_jax(trace, model).values()) < 1e-5
    assert trace.manifest and not trace.changed


def test_mlx_quantised(tmp_path: Path) -> None:
    pytest.importorskip("mlx_lm")
    model, weights = checkpoint(tmp_path, intermediate_size=128), tmp_path / "w"
    options = ("--bits", "4", "--group", "32", "--weights", str(weights))
    trace = collect("mlx-lm", model, tmp_path / "d", *options)
    x, y = trace.read("ffn_norm", 1), trace.read("ffn_up", 1)
    right = x @ open_model(weights).read("model.layers.1.mlp.up_proj.weight").T
    assert np.sqrt(((y - right) ** 2).mean() / (right**2).mean()) < 1e-5


@pytest.mark.parametrize("quantised", [None, 4])
def test_mlx_watched_computes_the_same_bits(
    tmp_path: Path, quantised: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("mlx_lm")
    from tools.collect import mlx_lm_models

    model = open_model(checkpoint(tmp_path, intermediate_size=128))
    settings = mlx_lm_models.Settings(dtype="bfloat16", bits=quantised, group=32)

    def logits() -> bytes:
        with mlx_lm_models.open(model, settings, Recorder(model), Calls((12,))) as session:
            return session.step(TOKENS, range(12)).tobytes()

    watched = logits()
    monkeypatch.setattr(mlx_lm_models.MlxSession, "_wrap", lambda self: None)
    assert watched == logits()


@BOTH
@pytest.mark.parametrize("jit", [(), ("--no-jit",)])
def test_tunix(tmp_path: Path, architecture: str, jit: tuple[str, ...]) -> None:
    pytest.importorskip("tunix")
    model = checkpoint(tmp_path, architecture)
    options = ("--steps", "7,5", "--generate", "2", "--first-position", "1", *jit)
    trace = collect("tunix", model, tmp_path / "d", *options)
    inside = {"attn_scores", "attn_softmax", "ffn_silu"}
    biased = {"qkv_bias"} if architecture == "qwen2" else set()
    assert absent(trace) == inside | biased
    assert max(far_from_jax(trace, model, 1).values()) < 1e-5
    assert trace.manifest and not trace.changed


def test_tunix_watched_computes_the_same_bits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("tunix")
    from tools.collect import tunix_models

    model = open_model(checkpoint(tmp_path))

    def logits(jit: bool) -> bytes:
        settings = tunix_models.Settings(jit=jit)
        with tunix_models.open(model, settings, Recorder(model), Calls((12,))) as session:
            return session.step(TOKENS, range(12)).tobytes()

    watched = logits(False), logits(True)
    monkeypatch.setattr(tunix_models, "wrap", lambda network, see: None)
    monkeypatch.setattr(tunix_models, "ROTATION", {"qwen2": "shard_map"})  # not called
    assert watched == (logits(False), logits(True))
