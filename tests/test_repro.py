"""A repro bundle shows its bug, in NumPy alone, and stops to when the bug is gone."""

import ast
import io
import re
import runpy
import sys
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest

from qwen_jax import replay
from stages.errors import UserError
from stages.open import open_trace
from tests.planted import faults
from tests.planted.matrix import Bench, make_bench
from tools.localize import Localization, __main__, localize, repro
from tools.localize.stage_case import StageReplay


@pytest.fixture(autouse=True)
def frugal(monkeypatch: pytest.MonkeyPatch) -> None:
    """Compiled in half the time, as the matrix does."""
    monkeypatch.setattr(replay, "Replay", partial(replay.Replay, unoptimised=True))


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("repro")


def localized(
    bench: Bench, path: Path, fault: str | None, omit: tuple[str, ...] = ()
) -> Localization:
    planted = faults.FAULTS[fault] if fault else None
    run = bench.plant(planted, "one") if planted else bench.right
    return localize(open_trace(run.dump(path, omit), bench.layout), bench.model)


class Done(NamedTuple):
    code: int
    stdout: str
    stderr: str


def script(directory: Path, *arguments: object) -> Done:
    """How the script ends, in this process: there are hundreds."""
    said, complained = io.StringIO(), io.StringIO()
    file = str(directory / repro.SCRIPT)
    with pytest.MonkeyPatch.context() as patch, np.printoptions():
        patch.setattr(sys, "argv", [file, *map(str, arguments)])
        patch.setattr(sys, "stdout", said)
        patch.setattr(sys, "stderr", complained)
        with pytest.raises(SystemExit) as ended:
            runpy.run_path(file, run_name="__main__")
    return Done(ended.value.code, said.getvalue(), complained.getvalue())


@pytest.mark.parametrize("name", ["small", "small-qwen3"])
def test_every_kind_of_stage_has_its_formula(directory, tmp_path, name):
    """Of a right engine, in every stage: what the script computes is what the engine has."""
    bench = make_bench(name, "f32", directory, length=24)
    trace = open_trace(bench.right.dump(tmp_path / "right"), bench.layout)
    whole = replay.Replay(trace, bench.model, np.dtype("float32"))
    with whole.numerics():
        for stage in trace.arch.stages:
            layer = stage.layer_of(1)
            case = StageReplay(whole, stage, layer)
            heads = case.heads or 1
            cut = repro.Slice(case, heads - 1, np.array([20, 23]), np.array([3, 5, 12]))
            values, code = repro._operands(cut)
            assert code, stage.name
            names = {"np": np, **values}
            exec(code, names)
            dumped = trace.read(stage.name, layer).ravel()[repro._places(cut)]
            np.testing.assert_array_equal(dumped, cut.cut(case.dump))
            np.testing.assert_allclose(names["expected"], dumped, rtol=1e-4, atol=1e-6)


OTHERS = [
    ("f32", "attn_softmax.mask_missing", ("attn_scores", "attn_softmax")),
    ("f16_kv", "attention.v_from_k", ()),
    ("act8", "qkv_matmul.k_weight_transposed", ()),
    ("bf16", "attn_norm.norm_layernorm", ()),
    ("f32", "ffn_out.inf", ()),
]


@pytest.mark.parametrize(("mode", "fault", "omit"), OTHERS)
def test_it_exits_1_while_the_bug_is_there(directory, tmp_path, mode, fault, omit):
    bench = make_bench("small", mode, directory, length=24)
    report = localized(bench, tmp_path / "broken", fault, omit)
    repro.write(report, bench.model, tmp_path / "repro")
    right = bench.right.dump(tmp_path / "right", omit)

    assert script(tmp_path / "repro").code == 1
    text = (tmp_path / "repro" / repro.SCRIPT).read_text()
    again = re.search(r"python repro.py (\S+)", text)[1]
    assert script(tmp_path / "repro", tmp_path / "broken" / again).code == 1
    gone = script(tmp_path / "repro", right / again)
    assert gone.code == 0, (gone.stdout, gone.stderr, text)


def test_it_is_short_small_and_numpy_alone(directory, tmp_path):
    bench = make_bench("small", "f32", directory, length=24)
    report = localized(bench, tmp_path / "broken", "ffn_up.row_scaled")
    says = repro.write(report, bench.model, tmp_path / "repro")
    text = (tmp_path / "repro" / repro.SCRIPT).read_text()
    tree = ast.parse(text)
    imported = {n for s in tree.body if isinstance(s, ast.Import) for n in (s.names[0].name,)}
    imported |= {s.module for s in tree.body if isinstance(s, ast.ImportFrom)}
    assert imported == {"sys", "pathlib", "numpy"}
    assert len([line for line in text.splitlines() if line]) <= 40
    assert "positions" in says and "0 of" not in says
    data = np.load(tmp_path / "repro" / repro.DATA)  # without pickle
    assert data["found"].size <= 16
    assert max(map(len, text.splitlines())) <= 100


def test_a_wrong_file_is_no_verdict(directory, tmp_path):
    bench = make_bench("small", "f32", directory, length=24)
    report = localized(bench, tmp_path / "broken", "ffn_up.row_scaled")
    repro.write(report, bench.model, tmp_path / "repro")
    for file in ("nowhere.bin", "nowhere.npy", "attn_norm.bin"):
        done = script(tmp_path / "repro", tmp_path / "broken" / "layer-2" / file)
        assert (done.code, done.stderr.count("\n")) == (2, 1), done


def test_the_command(directory, tmp_path, capsys):
    bench = make_bench("small", "f32", directory, length=24)
    path = bench.plant(faults.FAULTS["ffn_up.row_scaled"], "one").dump(tmp_path / "broken")
    tokens = ",".join(map(str, bench.tokens))
    argv = [str(path), "--model", str(bench.model.directory), "--tokens", tokens, "--repro"]
    with pytest.raises(UserError, match="no such directory"):
        __main__.main([*argv, str(tmp_path / "no" / "where")])
    assert __main__.main([*argv, str(tmp_path / "r")]) == 1
    assert capsys.readouterr().out.endswith("exits 1 while the bug is there\n")
    argv[0] = str(bench.right.dump(tmp_path / "right"))
    assert __main__.main([*argv, str(tmp_path / "none")]) == 0
    assert "no fault" in capsys.readouterr().out
    assert not (tmp_path / "none").exists()
