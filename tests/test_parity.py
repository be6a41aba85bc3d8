"""The sweep finds what it must: planted faults, what is not identical, what could not be run."""

import json
import math
import multiprocessing
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import get_args, get_type_hints

import jax
import numpy as np
import pytest

import qwen_jax
from qwen_jax.prompt import Prompt
from qwen_jax.weights import open_model
from qwen_jax.weights.base import Weights
from stages import aprt
from stages.errors import NotComparable, UserError
from tests.conftest import interruptible, user_environment
from tests.described import as_described
from tests.tiny import write_checkpoint
from tools.parity import __main__ as parity
from tools.parity import grid, measure, programs, report, sweep, variants, worker
from tools.parity.grid import Point
from tools.parity.memory import sequences
from tools.testing import assert_traces_agree, trace_model  # noqa: F401 -- a fixture

TOKENS = tuple(int(n) for n in np.random.default_rng(1).integers(48, size=20))


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("parity") / "tiny")


@pytest.fixture(scope="module")
def tiny3(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Qwen3."""
    return write_checkpoint(tmp_path_factory.mktemp("parity") / "tiny3", model_type="qwen3")


def sweep_file(directory: Path, text: str) -> Path:
    path = directory / "grid.toml"
    path.write_text(text)
    return path


def run(sweep: Path | str, model: Path, out: Path, *more: str) -> tuple[int, dict]:
    """Exit code and JSON of the command, in this process; its workers are their own."""
    target = out.parent / "result.json"
    given = {"sweep": sweep, "model": model, "out": out, "json": target}
    given["tokens"] = ",".join(map(str, TOKENS))
    code = parity.main([*(f"--{name}={value}" for name, value in given.items()), *more])
    as_described("parity", target.read_bytes())
    return code, json.loads(target.read_text())


# --- the grid


def test_a_block_stands_for_the_product_of_its_axes(tmp_path: Path) -> None:
    file = sweep_file(tmp_path, '[[grid]]\ndtype = ["float32", "bfloat16"]\nlength = [1, 2, 3]\n')
    points = grid.load(str(file))
    assert [(p.dtype, p.length) for p in points] == [
        (dtype, length) for dtype in ("float32", "bfloat16") for length in (1, 2, 3)
    ]
    assert all(p.batch == 1 and p.loop == "layer" for p in points)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[[grid]]\ncolour = 1\n", "no axis 'colour'"),
        ("[[grid]]\ndtype = 'float8'\n", "float32, bfloat16"),
        ("[[grid]]\nlength = 0\n", "Expected `int` >= 1"),
        ("[[grid]]\nlength = true\n", "Expected `int`, got `bool`"),
        ("[[grid]]\nexcess = 1\n", "Expected `bool`"),
        ("[[grid]]\nrequire = 'equal'\n", "number of bits"),
        ("[[grid]]\nrequire = nan\n", "number of bits"),
        ("[[grid]]\nrequire = 20\ntrial = 'rerun'\n", "no bits to require"),
        ("[[grid]]\nlength = []\n", "length is empty"),
        ("[[grid]]\nrequire = 20\n[[grid]]\nrequire = 'identical'\n", "two requirements"),
        ("grid = 3\n", "[[grid]]"),
        ("no toml", "not TOML"),
    ],
)
def test_a_wrong_grid_is_refused_in_one_line(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(UserError) as caught:
        grid.load(str(sweep_file(tmp_path, text)))
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_the_shipped_grids_load_and_cover_the_axes() -> None:
    with pytest.raises(UserError, match="quick"):
        grid.load("none-such")
    assert {"quick", "full", "plants"} <= grid.SHIPPED.keys()
    full = grid.load("full")
    hints = {axis: get_args(hint) for axis, hint in get_type_hints(Point).items()}
    for axis in (
        "dtype",
        "precision",
        "loop",
        "attention",
        "products",
        "flags",
        "device",
        "trial",
        "plant",
    ):
        choices = hints[axis]
        seen = {getattr(point, axis) for point in full}
        absent = {"dtype": {"float64"}, "device": {"cpu"}, "plant": set(choices[1:])}
        plants = axis == "plant"
        assert seen == set(choices) - absent.get(axis, set()), axis
        assert not plants or {p.plant for p in grid.load("plants")} == set(choices[1:])
    assert {p.length for p in full} == {1, 2, 17, 64, 600}
    assert {p.batch for p in full} == {1, 3} and {p.excess for p in full} == {False, True}


def test_every_impossible_point_has_its_reason(demo: Weights, tiny3: Path) -> None:
    for changed, device, reason in [
        ({"device": "gpu"}, "cpu", "needs --device gpu"),
        ({"flags": "no-fma"}, "gpu", "CPU"),
        ({"dtype": "bfloat16", "precision": "default"}, "cpu", "float32"),
        ({"length": 4096}, "cpu", "2048 positions"),
        ({"loop": "scan", "plant": "bf16_stage"}, "cpu", "per-layer"),
        ({"loop": "scan", "trial": "captured"}, "cpu", "another program"),
        ({"trial": "unobserved"}, "cpu", "loop = program"),
        ({"dtype": "float16", "attention": "fused"}, "cpu", "F16"),
        ({"trial": "threads", "flags": "default"}, "gpu", "CPU"),
        ({"products": "tf32", "flags": "default"}, "gpu", "on the CPU"),
        ({"products": "tf32", "attention": "online"}, "cpu", "emulated"),
    ]:
        assert reason in (grid.impossible(Point(**changed), demo.config, device) or "")
    assert grid.impossible(Point(), demo.config, "cpu") is None
    qwen3 = open_model(tiny3).config
    assert "qkv_bias" in grid.impossible(Point(plant="scaled_bias"), qwen3, "cpu")


# --- what fails a sweep


def row(**changed: object) -> dict:
    first = {"stage": "attn_norm", "layer": 0}
    base = {
        "verdict": "precision",
        "identical": False,
        "stages": 5,
        "stages_differing": 2,
        "first_difference": first,
        "relative_l2": {"worst": 1e-6, **first},
        "argmax_equal": 1,
        "positions": 1,
        "kl_max": 0.0,
        "local_bits": {"worst": 21.0, "unadjusted": 21.0, **first},
    }
    return base | changed


def test_what_fails_a_sweep_and_what_does_not() -> None:
    same = row(verdict="identical", identical=True, first_difference=None)
    fault = {"stage": "ffn_up", "layer": 1, "bits": 9.0, "expected": "f32", "why": "bits"}
    assert report.failure(Point(), row()) is None
    assert report.failure(Point(require="identical"), same) is None
    assert "attn_norm 0" in report.failure(Point(require="identical"), row())
    assert report.failure(Point(require=20), row()) is None
    assert "22 bits" in report.failure(Point(require=22), row())
    assert "ffn_up of layer 1" in report.failure(Point(), row(verdict="fault", faults=[fault]))
    assert report.failure(Point(), {"verdict": "not run", "why": "no GPU"}) is None
    assert report.failure(Point(), {"verdict": "not run", "why": "died", "failed": True}) == "died"


def test_the_table_says_what_is_required_and_what_fails() -> None:
    same = row(verdict="identical", identical=True, first_difference=None, stages_differing=0)
    gone = {"verdict": "not run", "why": "needs --device gpu"}
    pairs = [
        (Point(device="gpu"), gone),
        (Point(dtype="float16"), row()),
        (Point(trial="rerun", require="identical"), same),
        (Point(dtype="float64", require=22), row()),
        (Point(length=3, require="identical"), row()),
        (Point(require="identical"), same),
    ]
    found = list(report.sections(pairs))
    assert [(s.title, len(s.rows)) for s in found] == [
        ("compiled against un-jitted; required: every byte the same", 2),
        ("compiled against un-jitted; required: 22 bits in every stage", 1),
        ("compiled against un-jitted; required: no fault", 1),
        ("compiled against compiled; required: every byte the same", 1),
        ("not run: needs --device gpu", 1),
    ]
    last = [cells[-1] for section in found[:4] for cells in section.text]
    assert last == ["precision: fails", "identical", "precision: fails", "precision", "identical"]
    assert "second run" in found[3].names and "second run" not in found[0].names
    assert found[4].names == ["dtype", "T", "B", "program", "flags"]
    assert report.markdown(found).count("### ") == 5


# --- the command


def test_identical_resumed_and_impossible(tiny: Path, tmp_path: Path, capsys) -> None:
    file = sweep_file(
        tmp_path,
        """
        [[grid]]
        length = [1, 5, 600]
        require = "identical"
        [[grid]]
        device = "gpu"
        """,
    )
    out = tmp_path / "out"
    code, data = run(file, tiny, out)
    assert (code, data["verdict"]) == (0, "pass")
    verdicts = [(p["point"]["length"], p["verdict"]) for p in data["points"]]
    assert verdicts == [(1, "identical"), (5, "identical"), (600, "not run"), (17, "not run")]
    assert [p["why"] for p in data["points"] if "why" in p] == [
        "the model has 256 positions",
        "needs --device gpu",
    ]
    first = data["points"][1]
    assert first["argmax_equal"] == first["positions"] == 5 and first["kl_max"] == 0
    assert first["local_bits"]["worst"] > 20 and first["classes"]["linear"] == "f32"
    table = (out / parity.TABLE).read_text()
    assert "### Not run: needs --device gpu" in table and table.count("| identical |") == 2

    rows = out / parity.ROWS
    lines = rows.read_text().splitlines(keepends=True)
    assert len(lines) == 3  # of what sweep, and a point each
    rows.write_text("".join(lines[:-1]) + lines[-1][:40])  # killed in the middle of a line
    capsys.readouterr()
    page = tmp_path / "sweep.html"
    code, data = run(file, tiny, out, f"--report={page}")
    assert code == 0 and "1 from before" in capsys.readouterr().out
    said = page.read_text("utf-8")
    assert "<h1>pass: 4 points of" in said and said.count(">identical</td>") == 2
    _, *kept = map(json.loads, rows.read_text().splitlines())
    assert len({row["key"] for row in kept}) == len(kept) == 2

    other = write_checkpoint(tmp_path / "other", seed=5)
    with pytest.raises(UserError, match="with another model;"):
        run(file, other, out)


def test_planted_faults_are_reported_at_their_stage(tiny: Path, tmp_path: Path, run_cli) -> None:
    given = f"--sweep plants --model {tiny} --tokens {','.join(map(str, TOKENS))} --json found.json"
    done = run_cli("tools.parity", *given.split())
    data = json.loads((tmp_path / "found.json").read_text())
    assert (done.code, data["verdict"]) == (1, "fail")
    for entry in data["points"]:
        stage, _ = variants.PLANTS[entry["point"]["plant"]]
        assert entry["verdict"] == "fault"
        assert {fault["stage"] for fault in entry["faults"]} == {stage}
        assert entry["first_difference"] == {"stage": stage, "layer": 0}
        assert f"planted {entry['point']['plant']}: {stage} of layer 0,1: " in done.stdout
    assert done.stdout.count("fails float32") == 3 and "\nfail; " in done.stdout
    assert len(data["points"]) == 3 and done.stderr.count("\n") == 3  # a line a point


def test_interrupted_it_says_how_to_go_on(tiny: Path, tmp_path: Path) -> None:
    ids = ",".join(map(str, TOKENS))
    sweep = sweep_file(tmp_path, "[[grid]]\ntrial = 'rerun'\nlength = [1, 2, 3, 4, 5, 6, 7, 8]\n")
    given = f"--sweep {sweep} --model {tiny} --tokens {ids} --out {tmp_path / 'out'}"
    with interruptible():
        child = subprocess.Popen(
            [sys.executable, "-m", "tools.parity", *given.split()],
            env=user_environment(),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            encoding="utf-8",
            cwd=tmp_path,
        )
    first = child.stderr.readline()
    child.send_signal(signal.SIGINT)
    out, err = child.communicate(timeout=1800)
    assert first.startswith("[1/8] ") and child.returncode == 130 and out == ""
    *_, says, last = err.splitlines()
    assert says.endswith(f"are in {tmp_path / 'out'}; the same command goes on from there")
    assert last == "interrupted" and "Traceback" not in err
    rows = (tmp_path / "out" / parity.ROWS).read_text().count("\n") - 1
    assert says.startswith(f"{rows} finished points") and 1 <= rows < 8


def dying(job: dict, points: list[Point]) -> Iterator[dict]:
    """A worker that ends without a word at two tokens."""
    for point in points:
        if point.length == 2:
            print("no memory", file=sys.stderr, flush=True)
            os.kill(os.getpid(), signal.SIGKILL)
        same = row(verdict="identical", identical=True, first_difference=None)
        yield same | {"key": point.key, "seconds": 0.0}


def test_a_process_that_dies_costs_one_point(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sweep, "machine", lambda job: {"device": "cpu"})
    monkeypatch.setattr(worker, "rows", dying)
    file = sweep_file(tmp_path, "[[grid]]\nlength = [1, 2, 3]\n")
    code, data = run(file, tiny, tmp_path / "out")
    assert code == 1
    assert [p["verdict"] for p in data["points"]] == ["identical", "not run", "identical"]
    assert data["points"][1]["failure"] == "its process ended with -9: no memory"
    assert len((tmp_path / "out" / parity.ROWS).read_text().splitlines()) == 3  # tried again


def test_who_stops_asking_ends_all_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(worker, "rows", dying)
    running = sweep.run([Point(length=1), Point(length=3), Point(dtype="float64")], {}, 2)
    next(running)
    assert multiprocessing.active_children()
    running.close()
    assert not multiprocessing.active_children()


def test_killed_as_it_begins_it_begins_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where it was to forget another sweep's points, which are never taken for its own."""

    def killed(path: Path, *given: object, **more: object) -> None:
        path.open("w").close()  # nothing of what was to be written
        raise KeyboardInterrupt

    for out, before in ((tmp_path / "new", None), (tmp_path / "used", {"code": "other"})):
        out.mkdir()
        if before:
            assert sweep.finished(out, before, False) == {}
            sweep.add(out, {"key": "of another sweep"})
            with pytest.raises(UserError, match="another code"):
                sweep.finished(out, {"code": "this"}, False)
        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(Path, "write_text", killed)
            sweep.finished(out, {"code": "this"}, overwrite=bool(before))
        assert sweep.finished(out, {"code": "this"}, False) == {}


def test_nothing_run_is_no_pass(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sweep, "machine", lambda job: {"device": "cpu"})
    with pytest.raises(NotComparable, match="nothing compared"):
        run(sweep_file(tmp_path, "[[grid]]\nlength = 600\n"), tiny, tmp_path / "out")


@pytest.mark.skipif(jax.default_backend() == "gpu", reason="there is a GPU")
def test_no_gpu_is_one_line_and_exit_2(run_cli) -> None:
    done = run_cli("tools.parity", "--device", "gpu")
    assert done.code == 2 and done.stderr.count("\n") == 1 and "gpu" in done.stderr
    assert done.stdout == ""


# --- what it stands on


def layers(model: Weights, attention: str = "stages") -> programs.Layers:
    """The engine that traces."""
    variant = variants.variant(model.config.arch, attention, "")
    return programs.Layers(model, "float32", "xla", jax.devices("cpu")[0], variant)


BOTH = pytest.mark.parametrize("which", ["tiny", "tiny3"])


@BOTH
def test_padding_reaches_nothing(which: str, request: pytest.FixtureRequest) -> None:
    model = open_model(request.getfixturevalue(which))
    engine = layers(model)
    batch = programs.make_batch(TOKENS, 9, 3)
    assert batch.lengths == [9, 5, 9]
    other = replace(batch, tokens=np.where(batch.valid, batch.tokens, 7))
    first, second = (sequences(engine.values(b), b, model, "float32") for b in (batch, other))
    assert measure.agreement(first, second).first is None
    alone = programs.make_batch(first[1].tokens, 5, 1)
    single = sequences(engine.values(alone), alone, model, "float32")
    assert measure.agreement(first[1:2], single).within("float32")


@BOTH
def test_other_programs_compute_the_same_model(which: str, request: pytest.FixtureRequest) -> None:
    model = open_model(request.getfixturevalue(which))
    batch = programs.make_batch(TOKENS, 6, 2)
    theirs = sequences(layers(model).values(batch), batch, model, "float32")
    count = len(theirs[0].entries)
    fused = count - 2 * model.config.num_hidden_layers
    for form, stages in [
        ("program", count),
        ("scan", count),
        ("unobserved", 1),
        ("fused", fused),
        ("online", fused),
    ]:
        if form in variants.ATTENTION:
            program = layers(model, form)
        else:
            program = programs.Whole(model, "float32", jax.devices("cpu")[0], form)
        ours = sequences(program.values(batch), batch, model, "float32")
        found = measure.agreement(ours, theirs)
        assert found.within("float32"), form
        assert found.stages == stages, form


def test_a_sweep_of_a_qwen3_is_identical_too(tiny3: Path, tmp_path: Path) -> None:
    file = sweep_file(
        tmp_path,
        """
        [[grid]]
        loop = ["layer", "scan"]
        length = 9
        batch = 2
        require = "identical"
        """,
    )
    code, data = run(file, tiny3, tmp_path / "out")
    assert (code, data["verdict"]) == (0, "pass")
    assert {point["verdict"] for point in data["points"]} == {"identical"}


def test_emulated_products_lose_what_they_must(demo: Weights, tmp_path: Path) -> None:
    """Bits that the formats leave: TF32 has 11, two bfloat16 numbers 16, each a sign more."""
    file = sweep_file(tmp_path, '[[grid]]\nproducts = ["tf32", "bf16x3", "split-k"]\nlength = 9\n')
    code, data = run(file, demo.name, tmp_path / "out")
    assert (code, data["verdict"]) == (0, "pass")
    for point, (least, most) in zip(data["points"], [(11.5, 13), (17, 20), (22, 24)], strict=True):
        assert point["verdict"] == "precision"
        assert point["first_difference"] == {"stage": "qkv_matmul", "layer": 0}
        assert least < point["local_bits"]["worst"] < most
        assert point["classes"]["norm"] == "f32"


# --- for other people's tests


def test_traces_agree_or_show_the_table(tiny: Path, trace_model) -> None:  # noqa: F811
    ours = trace_model(tiny, TOKENS)
    assert trace_model(tiny, TOKENS) is ours
    assert_traces_agree(ours, ours, bits=math.inf)
    eager = trace_model(tiny, TOKENS, backend="eager")
    assert_traces_agree(ours, eager)
    wrong = qwen_jax.trace_model(tiny, TOKENS)
    wrong.values["ffn_up", 1] = wrong.values["ffn_up", 1] * np.float32(1.01)
    with pytest.raises(AssertionError) as caught:
        assert_traces_agree(wrong, eager, bits=16)
    message = str(caught.value)
    assert "the traces part at layer 1 ffn_up: relative L2 1.0e-02" in message
    assert "worst layer" in message and "arg-max equal" in message
    assert_traces_agree(wrong, eager, bits=16, stages="ffn_gate,lm_head")
    assert_traces_agree(wrong, eager, bits=6)


def test_what_was_not_compared_does_not_agree(tiny: Path) -> None:
    whole = qwen_jax.trace_model(tiny, TOKENS)
    part = qwen_jax.trace_model(tiny, TOKENS)
    for layer in (0, 1):
        del part.entries["ffn_up", layer]
    assert_traces_agree(part, whole)
    with pytest.raises(AssertionError, match=r"not on both sides: ffn_up 0, ffn_up 1$"):
        assert_traces_agree(part, whole, stages="ffn_up,ffn_gate")
    with pytest.raises(AssertionError, match=r"not on both sides: ffn_up 1$"):
        assert_traces_agree(part, whole, stages="ffn_up,ffn_gate", layers="1")
    part.entries = {key: entry for key, entry in part.entries.items() if key[1] != 1}
    assert_traces_agree(part, whole, layers="0")
    with pytest.raises(AssertionError, match=r"not on both sides: layer 1$"):
        assert_traces_agree(part, whole, layers="0-1")
    with pytest.raises(AssertionError, match="tokens"):
        assert_traces_agree(qwen_jax.trace_model(tiny, TOKENS[:-1]), whole)


def test_a_dump_without_manifest_is_of_the_other_sides_model(
    tiny: Path,
    tmp_path: Path,
    trace_model,  # noqa: F811
) -> None:
    reference = trace_model(tiny, TOKENS)
    for (stage, layer), value in reference.values.items():
        path = tmp_path / ("" if layer is None else f"layer-{layer}") / f"{stage}.bin"
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(aprt.header(layer, value.size) + aprt.payload(value).tobytes())
    assert_traces_agree(tmp_path, reference, bits=math.inf)
    assert_traces_agree(reference, tmp_path, bits=math.inf)
    with pytest.raises(UserError, match="no such trace directory"):
        assert_traces_agree(tmp_path / "none", reference)


def test_a_model_without_tokenizer_is_swept_with_drawn_ids(tmp_path: Path) -> None:
    directory = write_checkpoint(tmp_path / "bare")
    (directory / "tokenizer.json").unlink()
    tokens = parity.read_tokens(Prompt(), open_model(directory))
    assert len(tokens) == 64 and max(tokens) < 48
