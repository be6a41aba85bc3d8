"""``python -m qwen_jax.trace`` as people and programs use it, and every way to use it wrongly."""

import contextlib
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import qwen_jax
from qwen_jax import cli, trace, trace_command
from qwen_jax.prompt import Prompt, load_tokenizer
from qwen_jax.tracing import make_plan
from stages import manifest
from stages.architectures import ALL_NAMES, ARCHITECTURES
from stages.errors import UserError
from stages.files import numpy_dtype
from stages.open import open_trace
from tests.conftest import Result, user_environment
from tests.described import as_described
from tests.tiny import hf_config, write_checkpoint, write_json

NAMES = ARCHITECTURES["qwen2"].names
ALL_FILES = 1 + 2 * len(ARCHITECTURES["qwen2"].layer_stages) + 2


def snapshot(directory):
    """Everything below a directory: files with their bytes, directories with nothing."""
    paths = sorted(directory.rglob("*"))
    return {str(p.relative_to(directory)): p.is_file() and p.read_bytes() for p in paths}


def strict_json(text):
    def refuse(constant):
        raise AssertionError(f"{constant} is no JSON")

    return json.loads(text, parse_constant=refuse)


@pytest.fixture
def world(tmp_path, monkeypatch):
    """A working directory with a model, and much that can be given to a command by mistake."""
    monkeypatch.chdir(tmp_path)
    write_checkpoint(tmp_path / "model")
    write_checkpoint(tmp_path / "truncated")
    os.truncate(tmp_path / "truncated/model.safetensors", 5000)
    write_checkpoint(tmp_path / "mismatch")
    write_json(tmp_path / "mismatch/config.json", hf_config(hidden_size=32))
    write_checkpoint(tmp_path / "llama")
    write_json(tmp_path / "llama/config.json", hf_config(model_type="llama"))
    write_checkpoint(tmp_path / "no-tokenizer")
    (tmp_path / "no-tokenizer/tokenizer.json").unlink()
    write_checkpoint(tmp_path / "bad-tokenizer")
    (tmp_path / "bad-tokenizer/tokenizer.json").write_bytes(b'{"version": 1}')
    for name in ("a-trace/layer-0", "half-a-trace", "strangers", "empty"):
        (tmp_path / name).mkdir(parents=True)
    (tmp_path / "a-trace" / manifest.NAME).write_bytes(b"{}")
    (tmp_path / "a-trace/layer-0/ffn_up.bin").write_bytes(b"APRT")
    (tmp_path / "half-a-trace" / manifest.PARTIAL).write_bytes(b"{}")
    (tmp_path / "strangers/notes.txt").write_bytes(b"mine")
    (tmp_path / "file").write_bytes(b"mine")
    (tmp_path / "latin.txt").write_bytes("café".encode("latin-1"))
    (tmp_path / "empty.txt").write_bytes(b"")
    (tmp_path / "gap.txt").write_text("the cat\n\nthe dog\n")
    (tmp_path / "two.txt").write_text("the cat sat on the mat\nthe dog\n")
    return tmp_path


@pytest.fixture
def run(monkeypatch, capsys):
    """The command in this process, from its arguments to its exit."""

    def run(*args):
        monkeypatch.setattr(sys, "argv", ["qwen_jax.trace", *map(str, args)])
        with pytest.raises(SystemExit) as exit:
            cli.run(trace.main)
        return Result(exit.value.code, *capsys.readouterr())

    return run


class FakeEngine:
    """Numbers that depend on all that is asked, in no time, where the model does not matter."""

    def __init__(self, args, *more):
        self.model, self.args = more[-1].model, args

    def describe(self):
        return {"name": "fake", "backend": self.args.backend}

    def run(self, tokens, positions, logits, want, emit, resume=None):
        config = self.model.config
        for stage, layer in config.arch.computation_order(config.num_hidden_layers):
            if want(stage.name, layer) or stage.name == "lm_head":
                shape = stage.shape(config.dims(len(tokens)), logits)
                seed = [*tokens, *positions, ALL_NAMES.index(stage.name), layer or 0]
                values = np.random.default_rng(seed).standard_normal(shape)
                emit(stage.name, layer, values.astype(numpy_dtype(self.args.dtype)))


@pytest.fixture
def fake(monkeypatch):
    monkeypatch.setattr(trace, "make_engine", FakeEngine)


def refused(result, says):
    assert result.code == 2
    assert result.stdout == ""
    assert result.stderr.endswith("\n")
    (line,) = result.stderr.splitlines()
    assert line.startswith("error: ") and says in line
    return True


TOKENS = ("--tokens", "1,2,3")
MODEL = ("--model", "model", *TOKENS)

BAD = [
    # stages and layers
    (("--stages", ""), "empty name"),
    (("--stages", "ffn_up,"), "empty name"),
    (("--stages", "ffn_upp"), "unknown stage 'ffn_upp'"),
    (("--stages", "ffn_up\nffn_gate"), "unknown stage"),
    (("--stages", "ffn_up,ffn_up"), "'ffn_up' twice"),
    (("--layers", "2"), "layer 2 does not exist; the model has 2 layers"),
    (("--layers", "0,x"), "'x' is no layer"),
    (("--layers", "0,0"), "twice"),
    (("--layers", ""), "is no layer"),
    (("--stages", "embedding", "--layers", "1"), "select nothing"),
    # tokens and prompts
    (("--tokens", "1,48"), "token id 48 is outside the vocabulary; ids go from 0 to 47"),
    (("--tokens=-1",), "token id -1 is outside the vocabulary"),
    (("--tokens", "1,x"), "expected ids such as 1,2,3"),
    (("--tokens", "1.0"), "expected ids"),
    (("--tokens", "1,"), "expected ids"),
    (("--tokens", ""), "expected ids"),
    (("--tokens", "1,,2"), "expected ids"),
    (("--tokens", "random:0"), "or random:64 for 64 drawn ids"),
    (("--tokens", "random:12345678"), "expected ids"),
    (("--first-position", "-1"), "--first-position -1: expected 0 or more"),
    (("--first-position", "x"), "invalid int value: 'x'"),
    (("--first-position", str(2**31 - 2)), "--first-position 2147483646"),  # of 3 tokens
    (("--tokens", ",".join(["1"] * 32768)), "use --format safetensors"),  # N T S is 2**32
    (("--prompt", ""), "the prompt is empty"),
    (("--prompt", "  "), "the prompt is empty"),
    (("--prompt", "caf\udce9"), "--prompt: not UTF-8"),
    (("--prompt-file", "empty.txt"), "the prompt is empty"),
    (("--prompt-file", "absent.txt"), "absent.txt: No such file"),
    (("--prompt-file", "latin.txt"), "latin.txt: not UTF-8"),
    (("--prompt-file", "strangers"), "strangers: Is a directory"),
    (("--prompt", "the", "--tokens", "1"), "not allowed with"),
    # in several calls, and several at once
    (("--generate", "0"), "--generate 0: expected 1 or more tokens"),
    (("--generate", "300"), "tokens needs position 301, and model has positions 0 to 255"),
    (("--prefill-chunk", "4"), "--prefill-chunk 4: the prompt has 3 tokens; give 1 to 3"),
    (("--prefill-chunk", "0"), "the prompt has 3 tokens; give 1 to 3"),
    (("--cache", "q5"), "no cache format 'q5'; choose one of float32, "),
    (("--cache", "q8_0"), "blocks of 32, which do not divide this model's head size 8"),
    (("--stages", "k_cache"), "k_cache is there only with a key/value cache: add --cache"),
    (("--prompts", "empty.txt"), "empty.txt: is empty; expected a prompt a line"),
    (("--prompts", "gap.txt"), "gap.txt: line 2 is empty"),
    (("--prompts", "absent.txt"), "absent.txt: No such file"),
    (("--prompts", "two.txt", "--prompt", "the"), "not allowed with"),
    (("--prompts", "two.txt", "--out", "a-trace", "--overwrite"), "no sequence of a batch"),
    (("--prompts", "two.txt", "--resume"), "use --overwrite with --prompts"),
    (("--prompt", "the", "--chat"), "model has no chat template"),
    (("--chat",), "--tokens are ids already"),
    # models
    (("--model", "absent", *TOKENS), "no such model directory: absent"),
    (("--model", "file", *TOKENS), "file is a file; expected a model directory or FILE.gguf"),
    (("--model", "ab\nsent", *TOKENS), "no such model directory: ab sent"),
    (("--model", "empty", *TOKENS), "empty has no config.json"),
    (("--model", "llama", *TOKENS), "'llama'"),
    (("--model", "truncated", *TOKENS), "not a whole safetensors file"),
    (("--model", "mismatch", *TOKENS), "weights do not fit config.json"),
    (("--model", "no-tokenizer", "--prompt", "the"), "has no tokenizer.json"),
    (("--model", "no-tokenizer"), "has no tokenizer.json"),
    (("--model", "bad-tokenizer", "--prompt", "the"), "not a tokenizer"),
    (("--model", "bad-tokenizer", *TOKENS), "not a tokenizer"),  # not after the run
    # where it goes
    (("--out", "a-trace"), "add --overwrite"),
    (("--out", "half-a-trace"), "add --overwrite"),
    (("--out", "strangers"), "holds 'notes.txt'"),
    (("--out", "strangers", "--overwrite"), "holds 'notes.txt'"),
    (("--out", ".", "--overwrite"), "no part of a trace"),
    (("--out", "file"), "--out file: "),
    (("--out", "file/below"), "--out file/below: "),
    (("--json", "absent/x.json"), "no such directory: 'absent'"),
    (("--json", "file/x.json"), "no such directory: 'file'"),
    (("--json", "empty"), "'empty' is a directory"),
    (("--json", ""), "is a directory"),
    (("--json", "empty/x.json", "--out", "empty"), "would lie in the trace"),
    (("--json", "a-trace/manifest.json", "--out", "a-trace", "--overwrite"), "would lie in"),
    # the rest
    (("--format", "aprt", "--dtype", "float64"), "use --format safetensors"),
    (("--format", "npz"), "invalid choice: 'npz'"),
    (("--dtype", "float8"), "'float8' is none of float32, bfloat16, float16, float64"),
    (("--dtype", ""), "'' is none of float32"),
    (("--logits", "some"), "invalid choice: 'some'"),
    (("--backend", "torch"), "invalid choice: 'torch'"),
    (("--device", "tpu"), "invalid choice: 'tpu'"),
    (("--no-such-option",), "unrecognized arguments: --no-such-option"),
    (("stray",), "unrecognized arguments: stray"),
    (("--out",), "expected one argument"),
]


@pytest.mark.parametrize(("args", "says"), [pytest.param(*c, id=" ".join(c[0])[:40]) for c in BAD])
def test_bad_input(world, run, monkeypatch, args, says):
    """One line, exit 2, before an engine is made, and nothing is left or changed."""
    given = set(args)
    if "--model" not in given:
        args = ("--model", "model", *args)
        if not given & {"--prompt", "--prompt-file", "--prompts"} and not args[2].startswith(
            "--tokens"
        ):
            args = (*MODEL, *args[2:])

    def make_engine(*_):
        raise AssertionError("bad input got as far as the engine")

    monkeypatch.setattr(trace, "make_engine", make_engine)
    before = snapshot(world)
    assert refused(run(*args), says)
    assert snapshot(world) == before


def test_no_gpu(world, run_cli):
    """What only JAX can tell is told before anything is written too."""
    before = snapshot(world)
    result = run_cli("qwen_jax.trace", *MODEL, "--device", "gpu", env={"JAX_PLATFORMS": "cpu"})
    assert refused(result, "--device gpu: JAX finds only cpu here")
    assert snapshot(world) == before


def test_eager_runs_on_the_cpu_alone(world, run):
    before = snapshot(world)
    assert refused(run(*MODEL, "--backend", "eager", "--device", "gpu"), "drop --device gpu")
    assert snapshot(world) == before


def test_a_json_file_that_may_not_be_written(world, run, monkeypatch):
    monkeypatch.setattr(os, "access", lambda *_: False)  # root may write everywhere
    assert refused(run(*MODEL, "--json", "x.json"), "'x.json' cannot be written")
    assert refused(run(*MODEL, "--json", "file"), "'file' cannot be written")


def test_bad_input_costs_no_import_of_jax(world):
    code = (
        "import sys\n"
        "from qwen_jax import trace\n"
        "from qwen_jax import cli\n"
        "cli.leave = sys.exit\n"
        "try:\n"
        "    cli.run(trace.main)\n"
        "finally:\n"
        "    print(sorted({'jax', 'torch', 'huggingface_hub'} & set(sys.modules)))\n"
    )
    for args in ((*MODEL, "--stages", "x"), (*MODEL, "--out", "file"), (*MODEL, "--dry-run")):
        done = subprocess.run(
            [sys.executable, "-c", code, *args],
            env=user_environment(), capture_output=True, text=True, timeout=1800,
        )  # fmt: skip
        assert done.stdout.splitlines()[-1] == "[]", args


# --- dry runs


@pytest.mark.parametrize("out", ["a-trace", "half-a-trace", "strangers", "file"])
def test_a_dry_run_says_what_a_run_would_refuse(world, run, out):
    dry, real = run(*MODEL, "--out", out, "--dry-run"), run(*MODEL, "--out", out)
    assert dry.code == 0 and refused(real, f"--out {out}: ")
    told = dry.stdout.splitlines()[-1].removeprefix("a run would refuse: ")
    assert f"error: {told}\n" == real.stderr
    assert strict_json(run(*MODEL, "--out", out, "--dry-run", "--json=-").stdout)["refused"] == told


ASKED = {
    "all": (),
    "some": ("--stages", "Layer_Output, embedding,lm_head", "--layers", "1"),
    "all logits": ("--logits", "all", "--dtype", "bfloat16"),
    "bfloat16": ("--dtype", "bfloat16", "--format", "safetensors", "--layers", "0"),
    "float64": ("--dtype", "float64", "--stages", "attn_scores,k_post_rope"),
}


@pytest.mark.parametrize("asked", ASKED)
def test_a_dry_run_writes_nothing_and_says_what_a_run_writes(world, run, asked):
    before = snapshot(world)
    dry = run(*MODEL, *ASKED[asked], "--out", "out", "--dry-run", "--json", "-")
    assert dry.code == 0 and snapshot(world) == before
    assert "nothing was computed or written" in dry.stderr

    real = run(*MODEL, *ASKED[asked], "--out", "out", "--json", "-")
    assert real.code == 0
    plan, done = strict_json(dry.stdout), strict_json(real.stdout)
    assert plan.pop("peak_memory_bytes") and done["peak_memory_bytes"]
    assert plan.pop("refused") is None
    assert {name: done[name] for name in plan} == plan

    opened = open_trace(world / "out")
    assert sum(row["files"] for row in plan["stages"]) == len(opened.entries) == plan["files"]
    for row in plan["stages"]:
        keys = [key for key in opened.entries if key[0] == row["stage"]]
        arrays = [opened.read(*key) for key in keys]
        assert len(arrays) == row["files"]
        assert sum(array.nbytes for array in arrays) == row["bytes"]
        for key, array in zip(keys, arrays, strict=True):
            assert list(array.shape) == row["shape"]
            assert list(opened.entries[key].axes) == row["axes"]
    assert plan["bytes"] == sum(row["bytes"] for row in plan["stages"])
    files = snapshot(world / "out")
    del files[manifest.NAME]
    on_disk = sum(len(content) for content in files.values() if content is not False)
    assert done["file_bytes"] == on_disk > done["bytes"]


# --- what is written


def test_all_stages_of_all_layers(world, run):
    result = run(*MODEL, "--out", "out")
    assert (result.code, result.stderr) == (0, "")
    opened = open_trace(world / "out")
    assert len(opened.entries) == ALL_FILES
    assert {stage for stage, _ in opened.entries} == set(NAMES)
    assert opened.tokens == (1, 2, 3) and opened.manifest.positions == (0, 1, 2)
    assert opened.manifest.model.name == "model" and opened.dtype == "float32"
    assert len(opened.manifest.model.weights) == 27
    for key in opened.entries:
        assert np.isfinite(opened.read(*key)).all(), key


def test_stages_and_layers_write_exactly_their_files(world, run, fake):
    asked = ("--stages", "lm_head,ffn_up,embedding", "--layers", "1")
    assert run(*MODEL, *asked, "--out", "out").code == 0
    files = {name for name, content in snapshot(world / "out").items() if content is not False}
    assert files == {"manifest.json", "layer-1/ffn_up.bin", "lm_head.bin"}


def test_a_subset_holds_the_same_bytes_as_the_whole(world, run):
    run(*MODEL, "--out", "whole")
    run(*MODEL, "--out", "part", "--stages", "attn_out,lm_head", "--layers", "1")
    whole, part = snapshot(world / "whole"), snapshot(world / "part")
    del part["manifest.json"]
    assert part and part.items() <= whole.items()


def test_where_it_goes_by_default(world, run, fake):
    run(*MODEL, "--stages", "lm_head")
    assert (world / "model-trace" / manifest.NAME).exists()
    data = strict_json(run("--dry-run", "--json", "-").stdout)
    assert (data["model"], data["out"]) == ("demo", "demo-trace")
    assert not (world / "demo-trace").exists()


def test_a_batch_is_a_directory_of_traces(world, run):
    asked = ("--prompts", "two.txt", "--generate", "2", "--json", "-", "--out", "batch")
    data = strict_json(run("--model", "model", *asked).stdout)
    as_described("batch", json.dumps(data).encode())
    first, second = (open_trace(world / f"batch/sequence-{i}") for i in (0, 1))
    assert [len(t.tokens) for t in (first, second)] == [7, 3]
    assert second.manifest.batch == manifest.Batch(row=1, size=2, padding=4)
    with pytest.raises(UserError, match="a batch of traces; give one of them"):
        open_trace(world / "batch")
    for each, trace_ in zip(data["sequences"], (first, second), strict=True):
        assert each["tokens"] == list(trace_.tokens)
        assert each["tokens"][-1] == each["generated"][0]["token"] and len(each["generated"]) == 2


def test_a_line_is_what_ends_in_a_line_feed(world, run):
    """Not at a form feed, or a separator of lines; and a byte-order mark is no text."""
    (world / "odd.txt").write_bytes("\ufeffthe cat\f sat\r\nthe\u2028cat\n".encode())
    asked = ("--model", "model", "--dry-run", "--json", "-")
    data = strict_json(run(*asked, "--prompts", "odd.txt").stdout)
    plain = strict_json(run(*asked, "--prompt", "the cat\f sat").stdout)
    assert [len(data["sequences"]), data["sequences"][0]["tokens"]] == [2, plain["tokens"]]
    told = run("--model", "model", "--prompts", "two.txt", "--dry-run").stdout
    assert "longest of 2 sequences" in told


def test_positions_that_the_model_was_not_made_for_are_said(world, run):
    asked = ("--model", "model", "--tokens", "1,2,3", "--dry-run")
    known = json.loads((world / "model/config.json").read_text())["max_position_embeddings"]
    within = run(*asked, "--first-position", str(known - 3))
    beyond = run(*asked, "--first-position", str(known - 2))
    assert within.code == beyond.code == 0 and "note:" not in within.stderr
    assert f"note: position {known} is beyond those of model, 0 to {known - 1}" in beyond.stderr


def test_overwrite(world, run, fake):
    assert run(*MODEL, "--stages", "ffn_up", "--out", "out").code == 0
    again = ("--stages", "lm_head", "--out", "out")
    assert refused(run(*MODEL, *again), "add --overwrite")
    assert run(*MODEL, *again, "--overwrite").code == 0
    assert snapshot(world / "out").keys() == {"manifest.json", "lm_head.bin"}


def test_text_a_file_and_ids_give_the_same_trace(world, run, fake):
    (world / "prompt.txt").write_bytes(b"the cat sat")
    tokens = strict_json(run("--model", "model", "--prompt", "the cat sat", "--dry-run",
                             "--json", "-").stdout)["tokens"]  # fmt: skip
    assert tokens == [1, 3, 5]
    given = [("--prompt", "the cat sat"), ("--prompt-file", "prompt.txt")]
    given += [("--tokens", ids) for ids in (" 1, 3,5", "1 3 5", "1,3 , 5", "\t1  3\n5 ")]
    for number, prompt in enumerate(given):
        assert run("--model", "model", *prompt, "--out", str(number)).code == 0
    traces = [snapshot(world / str(number)) for number in range(len(given))]
    assert all(each == traces[0] for each in traces)
    assert open_trace(world / "2").tokens == (1, 3, 5)


def test_tokens_that_are_drawn(world, run, fake):
    """Once and for all: the same in every run, and from the whole vocabulary."""
    for name in "ab":
        run("--model", "model", "--tokens", "random:500", "--out", name, "--stages", "lm_head")
    a, b = (open_trace(world / name).tokens for name in "ab")
    assert a == b and len(a) == 500 and set(a) == set(range(48))


# --- positions


def test_the_first_position(world, run):
    """RoPE alone knows of it: the scores depend on how far apart two tokens are, and on no more,
    but for its tables, which are float32."""
    for first in (0, 7):
        asked = ("--first-position", first, "--out", first, "--dtype", "float64")
        assert run(*MODEL, *asked).code == 0
    near, far = open_trace(world / "0"), open_trace(world / "7")
    assert (near.positions, far.positions) == ((0, 1, 2), (7, 8, 9))
    assert far.manifest.positions == (7, 8, 9)
    assert snapshot(world / "7")["manifest.json"] != snapshot(world / "0")["manifest.json"]
    for key in near.entries:
        x, y = near.read(*key), far.read(*key)
        apart = np.abs(x - y).max() / np.abs(x).max()
        assert (apart > 1e-2) == (key[0] in ("q_post_rope", "k_post_rope")), key
        assert apart < 1e-6 or "rope" in key[0], key


def test_json_tells_the_positions(world, run, fake):
    asked = ("--first-position", "4", "--stages", "lm_head", "--out", "out", "--json", "-")
    dry, real = run(*MODEL, *asked, "--dry-run"), run(*MODEL, *asked)
    for result in (dry, real):
        data = strict_json(result.stdout)
        assert data["positions"] == [4, 5, 6] and data["architecture"] == "qwen2"


# --- another architecture


@pytest.fixture
def qwen3(world):
    write_checkpoint(world / "model3", model_type="qwen3")
    return "--model", "model3", *TOKENS


def test_all_stages_of_a_qwen3(world, run, qwen3):
    result = run(*qwen3, "--out", "out", "--json", "-")
    assert result.code == 0
    data, opened = strict_json(result.stdout), open_trace(world / "out")
    arch = ARCHITECTURES["qwen3"]
    assert data["architecture"] == opened.manifest.architecture == "qwen3"
    assert opened.arch == arch
    wanted = [(stage.name, layer) for stage, layer in arch.computation_order(2)]
    assert [(entry.stage, entry.layer) for entry in opened.manifest.files] == wanted
    assert [row["stage"] for row in data["stages"]] == list(arch.names)
    assert opened.read("q_norm", 1).shape == (3, 4, 8)
    assert opened.read("k_norm", 1).shape == (3, 2, 8)
    assert opened.read("attention", 1).shape == (3, 32)  # N*H, which is not D
    assert len(opened.manifest.model.weights) == 2 + 2 * 11 + 1
    for key in opened.entries:
        assert np.isfinite(opened.read(*key)).all(), key


def test_the_head_norms_of_a_qwen3(world, run, qwen3):
    """What is written is the RMSNorm of every head, computed here by hand."""
    run(*qwen3, "--out", "out", "--dtype", "float64")
    opened, tensors = open_trace(world / "out"), load_file(world / "model3/model.safetensors")
    for layer in (0, 1):
        qkv = opened.read("qkv_matmul", layer).reshape(3, 8, 8)
        for name, heads in (("q_norm", qkv[:, :4]), ("k_norm", qkv[:, 4:6])):
            weight = tensors[f"model.layers.{layer}.self_attn.{name}.weight"].astype(np.float64)
            mean = (heads**2).mean(-1, keepdims=True)
            expected = weight * heads / np.sqrt(mean + 1e-6)
            np.testing.assert_allclose(opened.read(name, layer), expected, rtol=1e-12)


def test_a_stage_that_the_architecture_lacks(world, run, qwen3):
    assert refused(run(*qwen3, "--stages", "qkv_bias"), "unknown stage 'qkv_bias'")
    assert refused(run(*MODEL, "--stages", "q_norm"), "unknown stage 'q_norm'")


def test_the_library_computes_what_the_command_writes(world, run, qwen3):
    for model in (MODEL, qwen3):
        out = f"{model[1]}-out"
        assert run(*model, "--logits", "all", "--first-position", "2", "--out", out).code == 0
        held = qwen_jax.trace_model(model[1], tokens="1 2 3", first_position=2)
        written = open_trace(world / out)
        assert list(held.entries) == list(written.entries)
        assert held.positions == written.positions == (2, 3, 4)
        for key in held.entries:
            np.testing.assert_array_equal(held.read(*key), written.read(*key))


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        ({"dtype": "int8"}, "no dtype 'int8'; choose one of float32"),
        ({"backend": "metal"}, "no backend 'metal'; choose one of xla, eager"),
        ({"logits": "first"}, "no logits 'first'; choose one of last, all"),
        ({"format": "npz"}, "no format 'npz'; choose one of aprt, safetensors"),
        ({"tokens": (1.5, 2)}, "token ids are whole numbers"),
        ({"tokens": 5}, "token ids are whole numbers"),
    ],
)
def test_the_library_refuses_what_the_command_refuses(world, wrong, says):
    with pytest.raises(UserError, match=says):
        qwen_jax.trace_model(MODEL[1], **{"tokens": (1, 2), "out": "out"} | wrong)
    assert not (world / "out").exists()


@pytest.mark.parametrize("positions", [(3, 2, 4), (3, 3, 4), (-1, 0, 1), (0, 1), (0, 1, 2**31)])
def test_positions_that_no_reader_would_accept_are_not_traced(world, positions):
    """Or what was written could not be opened."""
    with pytest.raises(UserError, match="no positions of a trace"):
        make_plan(qwen_jax.open_model(MODEL[1]), (1, 2, 3), positions)


def test_a_model_says_what_it_is(world):
    found = repr(qwen_jax.open_model(MODEL[1]))
    assert found == f"<HuggingFaceWeights {MODEL[1]}: qwen2, 2 layers, 27 tensors>"


@pytest.mark.parametrize("text", ["a\r\nb\n", "a\nb", " a", "\ufeffa", "é\0"])
def test_a_prompt_is_taken_as_it_is(tmp_path, demo, text):
    """The same bytes are the same tokens, from the command line and from a file."""
    (tmp_path / "prompt.txt").write_bytes(text.encode())

    from_file = Prompt(file=tmp_path / "prompt.txt").read(demo)
    assert from_file == Prompt(text=text).read(demo)
    assert load_tokenizer(demo).decode(from_file) == text


def test_all_logits_end_in_the_last(world, run):
    for logits in ("last", "all"):
        run(*MODEL, "--stages", "lm_head", "--logits", logits, "--out", logits)
    last, all_ = (open_trace(world / name).read("lm_head", None) for name in ("last", "all"))
    assert last.shape == (48,) and all_.shape == (3, 48)
    np.testing.assert_allclose(all_[-1], last, rtol=1e-5, atol=1e-6)
    assert open_trace(world / "all").manifest.logits == "all"


@pytest.mark.parametrize("dtype", manifest.DTYPES)
def test_safetensors_hold_the_dtype_of_the_model(world, run, fake, dtype):
    asked = ("--dtype", dtype, "--format", "safetensors", "--stages", "ffn_up,lm_head")
    assert run(*MODEL, *asked, "--out", "out").code == 0
    opened = open_trace(world / "out")
    assert opened.dtype == dtype and opened.manifest.format == "safetensors"
    for key in opened.entries:
        assert opened.read(*key).dtype.name == opened.entries[key].dtype == dtype
    names = {Path(name).suffix for name, content in snapshot(world / "out").items() if content}
    assert names == {".safetensors", ".json"}


@pytest.mark.parametrize(
    ("short", "dtype"),
    [("bf16", "bfloat16"), ("fp16", "float16"), ("f16", "float16"), ("f32", "float32"),
     ("BFloat16", "bfloat16"), ("BF16", "bfloat16")],
)  # fmt: skip
def test_short_names_of_dtypes(world, run, fake, short, dtype):
    asked = ("--stages", "lm_head", "--out", "out", "--json", "-")
    data = strict_json(run(*MODEL, "--dtype", short, *asked).stdout)
    opened = open_trace(world / "out")
    assert data["dtype"] == opened.dtype == opened.entries["lm_head", None].dtype == dtype


def test_float64_is_written_as_safetensors_by_default(world, run, fake):
    assert run(*MODEL, "--dtype", "float64", "--stages", "lm_head", "--out", "out").code == 0
    assert (world / "out/stages.safetensors").exists()
    wide = open_trace(world / "out").read("lm_head", None)
    assert wide.dtype == np.float64 and (wide != wide.astype(np.float32)).any()


def test_both_formats_hold_the_same_values(world, run, fake):
    for format in ("aprt", "safetensors"):
        run(*MODEL, "--dtype", "bfloat16", "--format", format, "--out", format)
    a, b = open_trace(world / "aprt"), open_trace(world / "safetensors")
    assert list(a.entries) == list(b.entries)
    for key in a.entries:
        np.testing.assert_array_equal(a.read(*key), b.read(*key).astype(np.float32))


# --- what is said


def test_json_on_stdout_is_alone_there(world, run, fake):
    result = run(*MODEL, "--stages", "lm_head", "--out", "out", "--json", "-")
    data = strict_json(result.stdout)
    assert data["schema"] == 2 and data["tokens"] == [1, 2, 3] and data["files"] == 1
    assert "next token" in result.stderr and "out/: 1 file," in result.stderr


def test_json_in_a_file(world, run, fake):
    (world / "x.json").write_bytes(b"old" * 10_000)
    result = run(*MODEL, "--stages", "lm_head", "--out", "out", "--json", "x.json")
    data = strict_json((world / "x.json").read_text(encoding="utf-8"))
    assert data["out"] == "out" and result.stderr == ""
    assert "next token" in result.stdout and "out/: 1 file," in result.stdout
    logits = open_trace(world / "out").read("lm_head", None)
    assert [row["token"] for row in data["top"]] == list(np.argsort(-logits)[:5])
    assert data["top"][0]["logit"] == logits.max()
    assert 0 < sum(row["probability"] for row in data["top"]) < 1


def test_the_next_token_is_that_of_the_last_position(world, run, fake):
    asked = ("--stages", "lm_head", "--logits", "all", "--out", "out", "--json", "-")
    top = strict_json(run(*MODEL, *asked).stdout)["top"]
    logits = open_trace(world / "out").read("lm_head", None)
    assert top[0]["token"] == logits[-1].argmax() != logits[0].argmax()


def test_logits_that_are_not_finite(world, run):
    """The trace of a model that overflows is written; JSON has null where it has NaN."""
    tensors = load_file(world / "model/model.safetensors")
    tensors["model.norm.weight"][0] = np.nan
    save_file(tensors, world / "model/model.safetensors")
    result = run(*MODEL, "--stages", "lm_head", "--out", "out", "--json", "-")
    assert result.code == 0
    assert [row["logit"] for row in strict_json(result.stdout)["top"]] == [None] * 5
    assert np.isnan(open_trace(world / "out").read("lm_head", None)).all()


@pytest.mark.filterwarnings("error")
def test_infinite_logits_have_no_probabilities():
    top = trace_command._top(None, np.array([1.0, np.inf, -np.inf, 2.0]), 2)
    assert [row["token"] for row in top] == [1, 3]
    assert np.isnan(top[0]["probability"])


def test_a_model_without_a_tokenizer_takes_ids(world, run, fake):
    asked = ("--stages", "lm_head", "--out", "out", "--json", "-")
    result = run("--model", "no-tokenizer", *TOKENS, *asked)
    assert strict_json(result.stdout)["top"][0]["text"] is None


def test_names_are_printed_as_they_are(world, run, fake):
    """Not as rich's markup or emoji."""
    name = "[/bold] [red]:cat:"
    result = run(*MODEL, "--stages", "lm_head", "--out", name)
    assert result.code == 0 and f"{name}/: 1 file," in result.stdout
    assert f"{name}2/" in run(*MODEL, "--dry-run", "--out", name + "2").stdout


def test_tokens_are_printed_as_they_are(capsys):
    row = {"token": 7, "text": "[/INST] :cat:", "logit": 1.0, "probability": 0.5}
    trace_command._print_top(cli.console(), [row])
    assert "'[/INST] :cat:'" in capsys.readouterr().out


@pytest.mark.parametrize("option", ["--help", "-h"])
def test_help(run, option):
    result = run(option)
    assert (result.code, result.stderr) == (0, "")
    assert "``" not in result.stdout  # markup is for the docs
    for name in ("--stages", "--layers", "--dry-run", "--first-position", *ALL_NAMES):
        assert name in result.stdout


# --- a process of its own


def test_as_users_run_it(world, run_cli):
    result = run_cli("qwen_jax.trace", "--model", "model", "--prompt", "the cat", "--out", "out")
    assert (result.code, result.stderr) == (0, "")
    assert len(open_trace(world / "out").entries) == ALL_FILES
    assert refused(run_cli("qwen_jax.trace", *MODEL, "--out", "out"), "add --overwrite")


def test_an_ascii_terminal(world, run_cli):
    asked = ("--dry-run", "--out", "café")
    result = run_cli("qwen_jax.trace", *MODEL, *asked, env={"PYTHONIOENCODING": "ascii"})
    assert (result.code, result.stderr) == (0, "") and "caf\\xe9/" in result.stdout


def test_a_reader_that_goes_away(world):
    """``... | head``: no complaint, and no exit code that means anything else."""
    reading, writing = os.pipe()
    os.close(reading)
    line = [sys.executable, "-m", "qwen_jax.trace", *MODEL, "--dry-run"]
    done = subprocess.run(
        line, stdout=writing, stderr=subprocess.PIPE, env=user_environment(), timeout=1800
    )
    os.close(writing)
    assert (done.returncode, done.stderr) == (141, b"")


def test_an_interrupt(world, run, monkeypatch):
    def make_engine(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(trace, "make_engine", make_engine)
    before = snapshot(world)
    result = run(*MODEL)
    assert (result.code, result.stderr) == (130, "interrupted\n") and snapshot(world) == before


def test_an_error_in_the_engine_leaves_no_trace(world, run, monkeypatch):
    class Engine(FakeEngine):
        def run(self, *args):
            super().run(*args)
            raise UserError("out of memory,\nor so")

    monkeypatch.setattr(trace, "make_engine", Engine)
    assert refused(run(*MODEL, "--out", "out"), "out of memory, or so")
    with pytest.raises(UserError, match="interrupted"):
        open_trace(world / "out")


@pytest.mark.parametrize(
    ("count", "text"),
    [(0, "0 B"), (999, "999 B"), (1000, "1.0 kB"), (1_500_000, "1.5 MB"), (7e9, "7.0 GB"),
     (4.2e12, "4.2 TB")],
)  # fmt: skip
def test_sizes_for_people(count, text):
    assert cli.size(count) == text


def test_the_exit_code_is_that_of_the_command(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["x", "a"])
    with pytest.raises(SystemExit) as exit, contextlib.redirect_stdout(sys.__stdout__):
        cli.run(lambda argv: len(argv))
    assert exit.value.code == 1


def test_an_error_of_the_system_says_of_which_file():
    code = "from qwen_jax import cli; cli.run(lambda argv: open('/absent/file').close())"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=user_environment()
    )
    assert done.returncode == 2
    assert done.stderr == "error: /absent/file: No such file or directory\n"
