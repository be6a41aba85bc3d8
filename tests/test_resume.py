"""An interrupted trace goes on, and is then byte for byte what it would have been."""

import json
import sys
from collections import namedtuple
from pathlib import Path

import pytest
from safetensors.numpy import load_file, save_file

from qwen_jax import cli, engine, trace, tracing
from stages import manifest, writer
from stages.architectures import ARCHITECTURES
from stages.open import open_trace
from tests.conftest import Result
from tests.tiny import write_checkpoint

TOKENS = "--tokens=" + ",".join(map(str, range(1, 13)))
LAYERS = 4
EVERY = 17 * LAYERS + 3  # stages of the model


@pytest.fixture
def model(tmp_path, monkeypatch):
    """A working directory with a model of four layers; every finished file is noted at once."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(writer, "NOTE_EVERY", 0.0)
    return write_checkpoint(tmp_path / "model", num_hidden_layers=LAYERS)


@pytest.fixture
def run(model, monkeypatch, capsys):
    """The command; ``stop`` raises after that many stages, ``killed`` as if nothing ran after."""

    def run(*args, stop=None, killed=False, model=model):
        emitted = []

        class Engine(engine.JaxEngine):
            def run(self, tokens, positions, logits, want, emit, resume=None):
                def counted(stage, layer, value):
                    if len(emitted) == stop:
                        raise KeyboardInterrupt
                    emitted.append((stage, layer))
                    emit(stage, layer, value)

                super().run(tokens, positions, logits, want, counted, resume)

        def leave(self, *_):
            self._stop()
            self._held.close()

        with monkeypatch.context() as patch:
            patch.setattr(engine, "JaxEngine", Engine)
            if killed:
                patch.setattr(writer.TraceWriter, "__exit__", leave)
            patch.setattr(sys, "argv", ["x", "--model", str(model), TOKENS, *map(str, args)])
            with pytest.raises(SystemExit) as exit:
                cli.run(trace.main)
        return Result(exit.value.code, *capsys.readouterr()), emitted

    return run


def content(directory: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(directory)): path.read_bytes()
        for path in directory.rglob("*")
        if path.is_file()
    }


@pytest.mark.parametrize("killed", [False, True])
@pytest.mark.parametrize("stop", [0, 1, 10, 19, 20, 40, 17 * LAYERS + 1, EVERY - 1])
def test_what_is_finished_later_is_the_same_trace(run, tmp_path, stop, killed):
    run("--out", "whole")
    stopped, _ = run("--out", "half", stop=stop, killed=killed)
    assert stopped.code == 130 and "--resume" in stopped.stderr
    result, computed = run("--out", "half", "--resume")
    assert result.code == 0, result.stderr
    assert "starts anew" in result.stderr or f"of {LAYERS} layers are there" in result.stderr
    assert content(tmp_path / "half") == content(tmp_path / "whole")
    finished = max(0, stop - 1) // 17  # layers
    if not killed:
        assert len(computed) == EVERY - (17 * finished + 1 if finished else 0)
    assert len(computed) <= EVERY


@pytest.mark.parametrize("kind", ["--dtype=bfloat16", "--dtype=float16", "--format=safetensors",
                                  "--dtype=float64", "--logits=all"])  # fmt: skip
def test_in_every_dtype_and_format(run, tmp_path, kind):
    run("--out", "whole", kind)
    run("--out", "half", kind, stop=45)
    result, computed = run("--out", "half", kind, "--resume")
    assert result.code == 0 and len(computed) < EVERY - 17
    assert content(tmp_path / "half") == content(tmp_path / "whole")


@pytest.mark.parametrize("kind", ["--first-position=5", "--dtype=bfloat16"])
def test_a_model_of_qwen3(run, tmp_path, kind):
    stages = 3 + LAYERS * len(ARCHITECTURES["qwen3"].layer_stages)
    model = write_checkpoint(tmp_path / "3/model", model_type="qwen3", num_hidden_layers=LAYERS)
    _, computed = run("--out", "whole", kind, model=model)
    assert len(computed) == stages
    run("--out", "half", kind, stop=50, model=model)
    result, computed = run("--out", "half", kind, "--resume", model=model)
    assert result.code == 0 and computed[0] == ("attn_norm", 2)
    assert content(tmp_path / "half") == content(tmp_path / "whole")


def test_a_damaged_file_is_made_anew(run, tmp_path):
    run("--out", "whole")
    run("--out", "half", stop=60)
    path = tmp_path / "half/layer-1/ffn_up.bin"
    path.write_bytes(path.read_bytes()[:-4] + b"\0\0\0\0")
    result, computed = run("--out", "half", "--resume")
    assert result.code == 0 and computed[0] == ("attn_norm", 1)
    assert content(tmp_path / "half") == content(tmp_path / "whole")


def test_without_a_layer_to_go_on_from_it_starts_anew(run, tmp_path):
    some = "--stages=ffn_up,lm_head"
    run("--out", "whole", some)
    run("--out", "half", some, stop=3)
    result, computed = run("--out", "half", some, "--resume")
    assert result.code == 0 and len(computed) == LAYERS + 1
    assert content(tmp_path / "half") == content(tmp_path / "whole")


def refused(result: Result, says: str) -> None:
    assert result.code == 2 and result.stderr.count("\n") == 1 and says in result.stderr


def test_what_cannot_go_on_is_refused_and_left_as_it_is(run, tmp_path, model):
    run("--out", "whole")
    run("--out", "half", stop=60)
    before = content(tmp_path / "half")
    refused(run("--out", "whole", "--resume")[0], "is a whole trace")
    refused(run("--out", "half", "--resume", "--dtype=bfloat16")[0], "other dtype")
    refused(run("--out", "half", "--resume", "--tokens=1,2")[0], "other tokens, positions, steps")
    refused(run("--out", "half", "--resume", "--first-position=1")[0], "other positions;")
    refused(run("--out", "half", "--resume", "--layers=0-2")[0], "other stages or layers")
    refused(run("--out", "half", "--resume", "--stages=lm_head")[0], "other stages or layers")
    refused(run("--out", "half", "--resume", "--backend=eager")[0], "backend ('xla', now 'eager')")
    other = write_checkpoint(tmp_path / "b/model", num_hidden_layers=5)
    refused(run("--out", "half", "--resume", model=other)[0], "other model config")
    refused(run("--out", "half", "--resume", "--overwrite")[0], "not allowed with")
    refused(run("--out", "half")[0], "already holds a trace")
    tensors = load_file(model / "model.safetensors")
    tensors["model.layers.0.mlp.up_proj.weight"][0, 0] += 1
    save_file(tensors, model / "model.safetensors")
    refused(run("--out", "half", "--resume")[0], "model.layers.0.mlp.up_proj.weight")
    assert content(tmp_path / "half") == before


def test_with_nothing_there_it_just_starts(run, tmp_path):
    result, computed = run("--out", "new", "--resume")
    assert result.code == 0 and len(computed) == EVERY
    assert "no interrupted trace is there to go on with" in result.stderr
    open_trace(tmp_path / "new")


def test_a_trace_larger_than_the_free_disk_is_refused_before_it_starts(run, tmp_path, monkeypatch):
    run("--out", "old")
    bytes_ = sum(map(len, (v for k, v in content(tmp_path / "old").items() if "json" not in k)))
    usage = namedtuple("usage", "free")
    monkeypatch.setattr(tracing.shutil, "disk_usage", lambda path: usage(bytes_ // 2))
    result, computed = run("--out", "new")
    refused(result, "choose fewer --stages")
    assert not computed and not (tmp_path / "new").exists()
    result, _ = run("--out", "old", "--overwrite")  # the old trace makes room for the new one
    assert result.code == 0


def test_the_mark_says_what_is_whole(run, tmp_path):
    run("--out", "half", stop=30)
    marked = manifest.read(tmp_path / "half", manifest.PARTIAL)
    assert len(marked.files) == 30
    assert {f"half/{entry.path}" for entry in marked.files} == {
        str(p.relative_to(tmp_path)) for p in (tmp_path / "half").rglob("*.bin")
    }
    assert "model.layers.1.mlp.up_proj.weight" in marked.model.weights


@pytest.mark.parametrize(
    ("module", "asked"),
    [
        ("qwen_jax.trace", ["--tokens=random:700"]),
        ("qwen_jax.trace", ["--model=synthetic:3b:2", "--tokens=random:8"]),
        ("oracle.trace", []),
    ],
)
def test_peak_memory_is_told_beforehand(run_cli, module, asked):
    told = json.loads(run_cli(module, *asked, "--dry-run", "--json=-").stdout)
    done = json.loads(run_cli(module, *asked, "--json=-").stdout)
    assert 0.75 < told["peak_memory_bytes"] / done["peak_memory_bytes"] < 1.33
