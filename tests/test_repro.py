"""A repro bundle shows its bug, in NumPy alone, and stops to when the bug is gone."""

import ast
import re
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest

from qwen_jax import replay
from stages.errors import UserError
from stages.trace import open_trace
from tests.planted.matrix import Bench, make_bench
from tools.localize import Localization, __main__, localize, repro
from tools.numpy_engine import faults

# One a kind of arithmetic, in every shape that a stage has; and of formats, gaps and NaN.
PLANTED = [
    ("small", "f32", "embedding.embedding_id_off_by_one", ()),
    ("small", "bf16", "attn_norm.norm_layernorm", ()),
    ("small-qwen3", "f32", "k_norm.norm_over_all_heads", ()),
    ("small", "act8", "qkv_matmul.k_weight_transposed", ()),
    ("small", "f32", "ffn_up.row_scaled", ()),
    ("small", "f32", "qkv_bias.bias_k_missing", ()),
    ("small", "f32", "post_ffn_residual.residual_layer_input", ()),
    ("small-qwen3", "f32", "q_post_rope.rope_theta", ()),
    ("small", "f16_kv", "attn_scores.gqa_tiled", ()),
    ("small", "f32", "attn_softmax.mask_off_by_one", ()),
    ("small", "f16_kv", "attention.v_from_k", ()),
    ("small", "f32", "attn_softmax.mask_missing", ("attn_scores", "attn_softmax")),
    ("small", "bf16", "ffn_silu.act_gelu", ()),
    ("small", "f32", "ffn_swigl.swigl_added", ()),
    ("small", "f32", "ffn_out.inf", ()),
    ("small", "f32", "lm_head.head_zero_initialised", ()),
]


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


def script(directory: Path, *arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, directory / repro.SCRIPT, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True)


@pytest.mark.parametrize(("name", "mode", "fault", "omit"), PLANTED)
def test_it_exits_1_while_the_bug_is_there(directory, tmp_path, name, mode, fault, omit):
    bench = make_bench(name, mode, directory, length=24)
    report = localized(bench, tmp_path / "broken", fault, omit)
    repro.write(report, bench.model, tmp_path / "repro")
    right = bench.right.dump(tmp_path / "right", omit)

    assert script(tmp_path / "repro").returncode == 1
    text = (tmp_path / "repro" / repro.SCRIPT).read_text()
    again = re.search(r"python repro.py (\S+)", text)[1]
    assert script(tmp_path / "repro", tmp_path / "broken" / again).returncode == 1
    gone = script(tmp_path / "repro", right / again)
    assert gone.returncode == 0, (gone.stdout, gone.stderr, text)


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
    data = repro.np.load(tmp_path / "repro" / repro.DATA)  # without pickle
    assert data["found"].size <= 16
    assert max(map(len, text.splitlines())) <= 100


def test_a_wrong_file_is_no_verdict(directory, tmp_path):
    bench = make_bench("small", "f32", directory, length=24)
    report = localized(bench, tmp_path / "broken", "ffn_up.row_scaled")
    repro.write(report, bench.model, tmp_path / "repro")
    for file in ("nowhere.bin", "nowhere.npy", "attn_norm.bin"):
        done = script(tmp_path / "repro", tmp_path / "broken" / "layer-2" / file)
        assert (done.returncode, done.stderr.count("\n")) == (2, 1), done


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
