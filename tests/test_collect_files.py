"""What other tools have left on disk, read by maps: true to their formats, and never run."""

import os
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from qwen_jax.weights import open_model
from stages.errors import UserError
from stages.open import open_trace
from stages.trace import Trace
from tests import tiny
from tests.test_collect import SIZES, absent, far_from_jax
from tools.collect.__main__ import main

torch = pytest.importorskip("torch")
from tests import sglang_like  # noqa: E402 -- needs torch

TOKENS = [3, 1, 4, 1, 5, 9, 2]
PASSES = [(TOKENS[:5], [0, 1, 2, 3, 4]), ([9], [5]), ([2], [6])]
WARM_UP = ([7, 7], [0, 1])


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.write_checkpoint(tmp_path_factory.mktemp("model") / "qwen2", **SIZES)


def collect(model: Path, folder: Path, name: str, out: Path, *more: str) -> Trace:
    tokens = ",".join(map(str, TOKENS))
    given = ["files", str(folder), "--map", name, "--model", str(model), "--out", str(out)]
    assert main([*given, "--tokens", tokens, *more]) == 0
    return open_trace(out)


def test_transformers_debugger(model: Path, tmp_path: Path) -> None:
    utils = pytest.importorskip("transformers.model_debugging_utils")
    from transformers import AutoModelForCausalLM

    network = AutoModelForCausalLM.from_pretrained(model, attn_implementation="sdpa").eval()
    with utils.model_addition_debugger_context(
        network, debug_path=str(tmp_path / "dump"), do_prune_layers=False, use_repr=False
    ):
        network.forward(torch.tensor([TOKENS]))
    trace = collect(model, tmp_path / "dump", "transformers-debugger", tmp_path / "d")
    inside = {"q_post_rope", "k_post_rope", "attn_scores", "attn_softmax"}
    assert absent(trace) == {"qkv_matmul"} | inside
    assert trace.rows_of("lm_head", None) == 7 and max(far_from_jax(trace, model).values()) < 1e-5


def test_sglang_passes(model: Path, tmp_path: Path) -> None:
    passes = [WARM_UP, *PASSES, WARM_UP]
    sglang_like.dump_passes(open_model(model), passes, tmp_path / "dump")
    trace = collect(model, tmp_path / "dump", "sglang-passes", tmp_path / "d", "--calls", "1-3")
    assert absent(trace) == {"qkv_matmul", "attn_scores", "attn_softmax", "ffn_silu"}
    assert trace.manifest and trace.manifest.steps == (5, 1, 1)
    assert trace.positions == tuple(range(7)) and trace.rows_of("lm_head", None) == 3
    assert max(far_from_jax(trace, model).values()) < 1e-5


def test_sglang_dumper(model: Path, tmp_path: Path) -> None:
    sglang_like.dump_values(open_model(model), PASSES, tmp_path / "dump")
    trace = collect(model, tmp_path / "dump", "sglang-dumper", tmp_path / "d")
    assert absent(trace) == {"qkv_matmul", "attn_scores", "attn_softmax", "ffn_silu"}
    assert trace.manifest and trace.manifest.steps == (5, 1, 1)
    assert max(far_from_jax(trace, model).values()) < 1e-5


def vllm(folder: Path, ids: list[int], states: np.ndarray) -> None:
    """As ExampleHiddenStatesConnector of vLLM 0.33.0 writes it: one file a request."""
    folder.mkdir()
    found = {"hidden_states": states[:, ids], "token_ids": np.array(TOKENS)}
    save_file(
        {name: np.ascontiguousarray(v) for name, v in found.items()}, folder / "r1.safetensors"
    )
    (folder / "r1.safetensors.lock").touch()


def test_vllm_hidden_states(model: Path, tmp_path: Path) -> None:
    network = sglang_like.SglangLike(open_model(model))
    states = []
    for layer in network.model.layers:  # what enters each, and at last what enters the norm
        layer.input_layernorm.register_forward_hook(
            lambda _, given, out: states.append(given[0] + given[1] if len(given) > 1 else given[0])
        )
    network.model.norm.register_forward_hook(lambda _, given, out: states.append(out[1]))
    with torch.no_grad():
        network(torch.tensor(TOKENS), torch.arange(7))
    vllm(tmp_path / "dump", [0, 2], torch.stack(states, 1).numpy())
    ids = ("--hidden-ids", "0,2")
    trace = collect(model, tmp_path / "dump", "vllm-hidden-states", tmp_path / "d", *ids)
    assert list(trace.entries) == [("embedding", 0), ("post_ffn_residual", 1)]
    assert max(far_from_jax(trace, model).values()) < 1e-5
    with pytest.raises(
        UserError, match=r"--hidden-ids names 1 layers, but the file has \[7, 2, 64"
    ):
        collect(model, tmp_path / "dump", "vllm-hidden-states", tmp_path / "e", "--hidden-ids", "0")


class Evil:
    """What a pickle can do."""

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.mkdir, (str(self.path),)

    def __init__(self, path: Path) -> None:
        self.path = path


def test_a_pickle_is_not_run(model: Path, tmp_path: Path) -> None:
    folder = tmp_path / "dump" / "TP0_PP0_Rank0_pid1"
    folder.mkdir(parents=True)
    torch.save({"model.norm": Evil(tmp_path / "ran")}, folder / "Pass00000.pt")
    with pytest.raises(UserError, match="not a file of tensors alone, so it is not loaded"):
        collect(model, tmp_path / "dump", "sglang-passes", tmp_path / "d")
    assert not (tmp_path / "ran").exists() and not (tmp_path / "d").exists()


OWN_MAP = r"""
engine = "my-engine"
files = '(?P<call>\d)/b(?P<name>.*)\.safetensors'
key = "x"
[[rules]]
match = '(?P<layer>\d+)\.gate'
stage = "ffn_gate"
"""


def test_a_map_of_ones_own(model: Path, tmp_path: Path) -> None:
    (tmp_path / "m.toml").write_text(OWN_MAP)
    for call, rows in enumerate((4, 3)):
        (tmp_path / "dump" / str(call)).mkdir(parents=True)
        x = np.full((rows, 96), call, np.float16)
        save_file({"x": x, "y": x}, tmp_path / "dump" / str(call) / "b1.gate.safetensors")
    arguments = (model, tmp_path / "dump", str(tmp_path / "m.toml"), tmp_path / "d")
    with pytest.raises(UserError, match="the files hold 2 calls; --steps says the rows of each"):
        collect(*arguments)
    trace = collect(*arguments, "--steps", "4,3")
    assert trace.dtype == "float16" and trace.manifest
    assert trace.manifest.producer["name"] == "my-engine"
    assert trace.read("ffn_gate", 1)[:, 0].tolist() == [0] * 4 + [1] * 3


@pytest.mark.parametrize(
    "name, text, message",
    [
        ("nope", None, "neither a file nor one of sglang-dumper, sglang-passes, transformers-deb"),
        ("m.toml", "engine = ", "not a map"),
        ("m.toml", "engine = 'x'\nfiles = '('\nrules = []", "not a map"),
        ("m.toml", "engine = 'x'\nfiles = 'x'\nrules = [{say = 1}]", "not a map"),
        ("m.toml", "engine = 'x'\nfiles = 'x'\nrules = []", "holds nothing that the map knows"),
        ("sglang-passes", None, "holds nothing that the map knows"),
    ],
)
def test_a_wrong_map_is_one_line(
    model: Path, tmp_path: Path, name: str, text: str | None, message: str
) -> None:
    (tmp_path / "dump").mkdir()
    if text is not None:
        (tmp_path / name).write_text(text)
        name = str(tmp_path / name)
    with pytest.raises(UserError) as error:
        collect(model, tmp_path / "dump", name, tmp_path / "d")
    assert message in str(error.value) and "\n" not in str(error.value)


def test_tokens_must_be_those_of_the_files(model: Path, tmp_path: Path) -> None:
    sglang_like.dump_passes(open_model(model), [([9, 9, 9, 9, 9, 9, 9], list(range(7)))], tmp_path)
    with pytest.raises(UserError, match="the files are of 7 other tokens"):
        collect(model, tmp_path, "sglang-passes", tmp_path / "d")
    with pytest.raises(UserError, match="computed 7 rows, but there are 2 tokens"):
        given = ["--model", str(model), "--out", str(tmp_path / "d"), "--tokens", "1,2"]
        main(["files", str(tmp_path), "--map", "sglang-passes", *given])
    with pytest.raises(UserError, match="no such directory"):
        collect(model, tmp_path / "nowhere", "sglang-passes", tmp_path / "d")
