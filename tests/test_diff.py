"""Comparing two traces: the numbers, the preflight, and where planted faults are placed."""

import io
import json
import math
import shutil
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from msgspec.structs import replace
from rich.console import Console

import qwen_jax
from qwen_jax import cli, models, trace
from stages import aprt, manifest
from stages.architectures import ARCHITECTURES
from stages.compare import _largest, compare, compare_logits
from stages.errors import NotComparable, UserError
from stages.mask import attention_mask
from stages.open import open_trace
from stages.qwen2 import QWEN2
from stages.trace import MemoryTrace
from stages.writer import TraceWriter
from tests.maintain import reference
from tests.tiny import write_checkpoint
from tools import diff

PLAIN, SCORES = QWEN2.stage["ffn_up"], QWEN2.stage["attn_scores"]  # T x F, and N x T x S


@pytest.fixture(scope="module")
def checkpoint(request, tmp_path_factory) -> Path:
    """A Qwen2, or the architecture that a test is parametrized with."""
    directory = tmp_path_factory.mktemp("model")
    write_checkpoint(directory, model_type=getattr(request, "param", "qwen2"))
    return directory


BOTH = pytest.mark.parametrize("checkpoint", ARCHITECTURES, indirect=True)


TOKENS = "5,3,9,1,0,7,2,8,4,6,11,10"


@pytest.fixture(scope="module")
def traced(checkpoint, tmp_path_factory):
    """Make a trace with further arguments; the same arguments give the same directory."""
    made: dict[tuple, Path] = {}

    def make(*arguments: str) -> Path:
        if arguments not in made:
            out = tmp_path_factory.mktemp("traces") / f"t{len(made)}"
            common = ["--model", str(checkpoint), "--tokens", TOKENS, "--out", str(out)]
            assert trace.main([*common, *arguments]) == 0
            made[arguments] = out
        return made[arguments]

    return make


def run(capsys, *arguments: str) -> tuple[int, str]:
    capsys.readouterr()
    code = diff.main([str(a) for a in arguments])
    return code, capsys.readouterr().out


# --- numbers


def arrays() -> st.SearchStrategy:
    shape = st.tuples(st.integers(1, 5), st.integers(1, 700))
    return st.tuples(shape, st.integers(0, 2**32 - 1), st.floats(-6, 2))


@given(arrays())
@settings(max_examples=60, deadline=None, derandomize=True)
def test_numbers_against_numpy_in_float64(case):
    (rows, width), seed, size = case
    rng = np.random.default_rng(seed)
    b = rng.standard_normal((rows, width)).astype(np.float32)
    a = (b + 10.0**size * rng.standard_normal((rows, width))).astype(np.float32)
    x, y = a.astype(np.float64), b.astype(np.float64)
    found = compare(a, b, PLAIN)
    assert found.max_abs == pytest.approx(np.abs(x - y).max(), rel=1e-6)
    assert found.at == np.unravel_index(np.abs(x - y).argmax(), x.shape) or found.max_abs == (
        pytest.approx(abs(x - y)[found.at], rel=1e-6)
    )
    norm = np.linalg.norm
    assert found.relative_l2 == pytest.approx(norm(x - y) / norm(y), rel=1e-5)
    assert found.rms == pytest.approx(np.sqrt(((x - y) ** 2).mean()), rel=1e-5)
    cosine = (x * y).sum() / norm(x) / norm(y)
    # sums are float32 within a block: two norms that differ are known to 3e-6 of the difference
    assert 1 - found.cosine == pytest.approx(
        1 - cosine, rel=1e-3, abs=3e-6 * min(found.relative_l2, 1) + 1e-13
    )
    worst = np.argmax(norm(x - y, axis=1) / norm(y, axis=1))
    assert found.worst["position"][0] == worst


def test_units_in_the_last_place():
    b = np.array([[1.0, -0.0, 2.0, 1e-40]], np.float32)
    a = np.array([[np.nextafter(np.float32(1), np.float32(2)), 0.0, 2.0, 0.0]], np.float32)
    found = compare(a, b, PLAIN)
    assert (found.ulp_0, found.ulp_1) == (0.5, 0.75)
    assert found.ulp_max == int(b.view(np.int32)[0, 3])
    ones = np.ones((1, 4), ml_dtypes.bfloat16)
    assert compare(ones * ml_dtypes.bfloat16(1.0078125), ones, PLAIN, "bfloat16").ulp_max == 1


def test_nan_is_a_difference_unless_on_both_sides():
    b = np.ones((3, 4), np.float32)
    a = b.copy()
    a[1, 2] = np.nan
    one = compare(a, b, PLAIN)
    assert (one.nonfinite_a, one.nonfinite_b, one.unmatched) == (1, 0, 1)
    assert not one.within(1e9)
    assert not one.identical
    both = compare(a, a.copy(), PLAIN)
    assert (both.unmatched, both.relative_l2) == (0, 0.0)
    assert both.identical
    a[1, 2], b[1, 2] = np.inf, -np.inf
    assert compare(a, b, PLAIN).unmatched == 1


def test_sizes_that_float32_squares_cannot_hold():
    for scale in (1e-30, 1e30):
        b = np.full((2, 8), scale, np.float32)
        found = compare(b * np.float32(1.5), b, PLAIN)
        assert found.relative_l2 == pytest.approx(0.5)


def test_masked_scores_are_left_out():
    b = np.ones((2, 3, 3), np.float32)
    a = np.where(attention_mask(np.arange(3)), b, np.float32(-np.inf))
    found = compare(a, b, SCORES, mask=attention_mask(np.arange(3)), heads=2)
    assert found.identical
    assert found.count == 12
    assert not compare(a, b, SCORES, heads=2).identical


def test_logits():
    b = np.array([[1.0, 2.0, 3.0], [3.0, 2.0, 1.0]])
    a = np.array([[1.0, 2.0, 3.0], [3.0, 3.5, 1.0]])
    found = compare_logits(a, b)
    assert (found.positions, found.argmax_equal, found.margin) == (2, 1, 1.0)
    p, q = (np.exp(x) / np.exp(x).sum() for x in (b[1], a[1]))
    assert found.kl_max == pytest.approx((p * np.log(p / q)).sum())
    a[0, 0] = np.nan
    assert compare_logits(a, b).argmax_equal == 0


@given(
    st.lists(st.sampled_from([-2.0, -0.0, 0.0, 1.0, np.inf, -np.inf, np.nan]), min_size=1),
    st.integers(1, 5),
)
def test_the_largest_are_those_of_a_full_stable_sort(values, count):
    x, count = np.array(values), min(count, len(values))
    assert _largest(x, count).tolist() == np.argsort(-x, kind="stable")[:count].tolist()


def test_nothing_compared_is_an_error():
    empty = np.zeros((0, 4), np.float32)
    with pytest.raises(UserError, match="nothing to compare"):
        compare(empty, empty, PLAIN)


# --- traces


@BOTH
def test_a_trace_and_itself_are_identical(traced, capsys):
    code, out = run(capsys, traced(), traced())
    assert code == 0
    assert "identical" in out


@BOTH
def test_aprt_against_safetensors(traced, capsys):
    code, out = run(capsys, traced(), traced("--format", "safetensors"))
    assert code == 0
    assert "identical" in out


@BOTH
def test_last_logits_against_all(traced, capsys):
    code, out = run(capsys, traced(), traced("--logits", "all"))
    assert code == 0
    assert "arg-max equal at 1 of 1" in out


def test_dtypes_are_judged_by_the_coarser(traced, capsys):
    code, out = run(capsys, traced("--dtype", "bfloat16"), traced())
    assert code == 0
    assert "judged as bfloat16" in out
    assert run(capsys, traced("--dtype", "bfloat16"), traced(), "--tolerance", "1e-6")[0] == 1


@BOTH
def test_a_foreign_trace_needs_the_model_and_the_tokens(traced, checkpoint, tmp_path, capsys):
    foreign = tmp_path / "foreign"
    shutil.copytree(traced(), foreign)
    (foreign / "manifest.json").unlink()
    (foreign / "layer-1" / "post_ffn_residual.bin").rename(foreign / "layer-1" / "layer_output.bin")
    with pytest.raises(UserError, match="--model"):
        run(capsys, foreign, traced())
    code, out = run(capsys, foreign, traced(), "--model", checkpoint, "--tokens", TOKENS)
    assert code == 0
    assert "taken on trust" in out
    assert "identical" in out


def test_stages_on_one_side_are_listed(traced, capsys):
    code, out = run(capsys, traced("--stages", "embedding,ffn_up"), traced())
    assert code == 0
    assert "only in" in out
    assert "not in both traces" in out  # nothing can be said of the logits


def test_what_is_not_comparable(traced, checkpoint, tmp_path, capsys):
    other_tokens = tmp_path / "tokens"
    assert (
        trace.main(["--model", str(checkpoint), "--tokens", "1,2", "--out", str(other_tokens)]) == 0
    )
    weights, config = tmp_path / "weights", tmp_path / "config"
    write_checkpoint(weights, seed=1)
    write_checkpoint(config, rope_theta=77.0)
    for place in (weights, config):
        out = str(place) + "-trace"
        assert trace.main(["--model", str(place), "--tokens", TOKENS, "--out", out]) == 0
    cases = {
        other_tokens: "tokens",
        Path(f"{weights}-trace"): "weight tensors differ",
        Path(f"{config}-trace"): "configs differ: rope_theta",
        traced("--stages", "ffn_up"): "no stage in common",
    }
    for other, why in cases.items():
        mine = traced("--stages", "ffn_gate") if "no stage" in why else traced()
        with pytest.raises(NotComparable, match=why) as caught:
            run(capsys, mine, other)
        assert caught.value.exit_code == 3
        with pytest.raises(NotComparable):
            run(capsys, mine, other, "--json", tmp_path / "d.json")
        assert json.loads((tmp_path / "d.json").read_text())["verdict"] == "not_comparable"


def test_nothing_selected_is_not_a_pass(traced, capsys):
    with pytest.raises(NotComparable):
        run(capsys, traced("--stages", "ffn_up"), traced(), "--stages", "ffn_gate")


# --- positions and rows


def test_other_positions_are_not_comparable(traced, checkpoint, tmp_path, capsys):
    far = traced("--first-position", "3")
    with pytest.raises(NotComparable, match="positions differ, first in row 0: 0 / 3") as caught:
        run(capsys, traced(), far, "--json", tmp_path / "d.json")
    assert caught.value.exit_code == 3
    told = json.loads((tmp_path / "d.json").read_text())
    assert told["verdict"] == "not_comparable" and told["schema"] == 2
    assert run(capsys, far, far)[0] == 0
    foreign = without_manifest(far, tmp_path / "foreign")
    given = ["--model", checkpoint, "--tokens", TOKENS]
    with pytest.raises(NotComparable, match="positions differ, first in row 0: 0 / 3"):
        run(capsys, foreign, far, *given)
    code, out = run(capsys, foreign, far, *given, "--first-position", "3")
    assert code == 0 and "identical" in out


def test_a_dump_is_taken_to_be_of_the_other_sides_model(traced, checkpoint, tmp_path):
    far = traced("--first-position", "3")
    foreign = without_manifest(far, tmp_path / "foreign")
    for found in (diff.diff(foreign, far), diff.diff(str(far), str(foreign))):
        assert all(row.identical for row in found.rows.values())
    held = qwen_jax.trace_model(checkpoint, TOKENS, first_position=3)
    assert diff.diff(foreign, held).a.positions == held.positions
    with pytest.raises(UserError, match="has no manifest"):
        diff.diff(foreign, foreign)


def test_positions_that_part_after_the_first_are_shown(checkpoint):
    whole = qwen_jax.trace_model(checkpoint, TOKENS, stages="ffn_up")
    gap = (*whole.positions[:-1], 99)
    given = (whole.config, whole.tokens, whole.dtype, whole.values, gap)
    with pytest.raises(NotComparable, match=f"first in row {len(gap) - 1}: .* / 99"):
        diff.diff(whole, MemoryTrace("gap", *given))


def without_manifest(directory: Path, copy: Path) -> Path:
    shutil.copytree(directory, copy)
    (copy / manifest.NAME).unlink()
    return copy


def last_rows(trace, rows: int, layer: int) -> MemoryTrace:
    """As an engine does that computes the end of the last layer for the last positions only."""
    values = {}
    for stage, number in trace.entries:
        value = trace.read_rows(stage, number)
        if number in (None, layer) and trace.arch.stage[stage].kind.name not in ("linear", "norm"):
            axis = trace.arch.stage[stage].axes.index("T")
            value = np.take(value, range(value.shape[axis] - rows, value.shape[axis]), axis)
        values[stage, number] = value
    return MemoryTrace("last", trace.config, trace.tokens, trace.dtype, values, trace.positions)


@BOTH
@pytest.mark.parametrize("rows", [1, 5])
def test_fewer_rows_on_one_side(checkpoint, rows):
    """They are the last ones; what the other side has before them is not compared."""
    whole = qwen_jax.trace_model(checkpoint, TOKENS)
    part = last_rows(whole, rows, 1)
    for a, b in ((whole, part), (part, whole)):
        found = diff.diff(a, b)
        assert found.agree and all(row.identical for row in found.rows.values())
        for (stage, layer), row in found.rows.items():
            shape = part.read(stage, layer).shape
            count = np.prod(shape)
            if stage == "attn_scores":
                seen = 12 * 13 // 2 if layer == 0 else sum(range(12 - rows + 1, 13))
                count = shape[0] * seen
            assert row.count == count, (stage, layer)
    assert part.rows_of("attn_softmax", 1) == rows and part.rows_of("attn_softmax", 0) == 12


@pytest.mark.parametrize("stage", ["attn_softmax", "q_post_rope", "ffn_silu", "post_ffn_residual"])
def test_a_difference_in_fewer_rows_is_placed_in_the_sequence(checkpoint, stage):
    whole = qwen_jax.trace_model(checkpoint, TOKENS)
    part = last_rows(whole, 5, 1)
    values = {key: value.copy() for key, value in part.values.items()}
    axis = whole.arch.stage[stage].axes.index("T")
    wrong = np.zeros(values[stage, 1].ndim, int)
    wrong[axis] = 2
    values[stage, 1][tuple(wrong)] += 1
    changed = MemoryTrace("changed", whole.config, whole.tokens, "float32", values)
    for a, b in ((changed, whole), (whole, changed), (changed, part)):
        found = diff.diff(a, b)
        assert not found.agree and found.parting == (stage, 1)
        row = found.rows[stage, 1]
        assert row.at[axis] == 12 - 5 + 2 and row.worst["position"][0] == 12 - 5 + 2
        assert [found.rows[key].identical for key in found.rows].count(False) == 1


def test_a_difference_before_the_rows_in_common_is_none(checkpoint):
    whole = qwen_jax.trace_model(checkpoint, TOKENS)
    values = {key: value.copy() for key, value in whole.values.items()}
    values["ffn_silu", 1][:7] += 1
    values["attn_scores", 1][:, :7] = np.nan
    values["attn_scores", 1][:, 7, 8:] = np.nan  # masked
    changed = MemoryTrace("changed", whole.config, whole.tokens, "float32", values)
    assert not diff.diff(changed, whole).agree
    assert diff.diff(changed, last_rows(whole, 5, 1)).agree


def test_a_foreign_dump_of_fewer_rows(traced, checkpoint, tmp_path, capsys):
    whole = traced("--logits", "all")
    foreign = without_manifest(whole, tmp_path / "foreign")
    files = (("layer-1/ffn_up", 1), ("layer-1/attn_scores", 1), ("final_norm", None))
    for name, layer in (*files, ("lm_head", None)):
        value = open_trace(whole).read(name.rpartition("/")[2], layer)
        last = value[:, -3:] if "scores" in name else value[-3:]
        header, payload = aprt.header(layer, last.size), aprt.payload(last)
        (foreign / f"{name}.bin").write_bytes(header + payload.tobytes())
    given = ["--model", checkpoint, "--tokens", TOKENS]
    for a, b in ((foreign, whole), (whole, foreign)):
        code, out = run(capsys, a, b, *given)
        assert code == 0 and "identical" in out and "arg-max equal at 3 of 3" in out


# --- as a library


@BOTH
def test_a_trace_in_memory_against_one_on_disk(traced, checkpoint, tmp_path, capsys):
    held = qwen_jax.trace_model(checkpoint, TOKENS, logits="last", dtype="bfloat16")
    found = diff.diff(held, traced())
    assert found.agree and found.a is held and found.tolerance == diff.TOLERANCE["bfloat16"]
    narrow = traced("--dtype", "bfloat16")
    assert all(row.identical for row in diff.diff(narrow, held).rows.values())
    code, out = run(capsys, narrow, traced(), "--json", tmp_path / "d.json")
    told = json.loads((tmp_path / "d.json").read_text())
    again = diff.diff(narrow, str(traced()))
    assert code == 0 and told == json.loads(json.dumps(again.to_json()))
    assert str(again) == out
    assert repr(again) == f"<TraceDifference of {again.a.path} and {again.b.path}: agree>"
    some = diff.diff(narrow, traced(), stages="ffn_up,lm_head", layers="1", tolerance=1e-9)
    assert list(some.rows) == [("ffn_up", 1), ("lm_head", None)]
    assert not some.agree and some.parting == ("ffn_up", 1)
    assert some.smallest_tolerance == max(row.relative_l2 for row in some.rows.values()) > 1e-9


@pytest.mark.parametrize("tolerance", [math.nan, math.inf, -1.0])
def test_a_tolerance_is_a_relative_l2(traced, tolerance):
    with pytest.raises(UserError, match="expected a relative L2"):
        diff.diff(traced(), traced(), tolerance=tolerance)


def test_another_architecture_is_not_comparable(traced, tmp_path):
    write_checkpoint(tmp_path / "three", model_type="qwen3")
    three = qwen_jax.trace_model(tmp_path / "three", TOKENS)
    with pytest.raises(NotComparable, match="configs differ: architecture 'qwen3' / 'qwen2'"):
        diff.diff(three, traced())


@pytest.mark.parametrize("tolerance", ["nan", "-1", "inf", "x"])
def test_a_tolerance_that_would_disarm_the_gate_is_refused(traced, capsys, tolerance):
    with pytest.raises(UserError):
        run(capsys, traced(), traced(), f"--tolerance={tolerance}")


EVERY = [(arch.name, stage.name) for arch in ARCHITECTURES.values() for stage in arch.layer_stages]


@pytest.mark.parametrize(("checkpoint", "stage"), EVERY, indirect=["checkpoint"])
def test_a_planted_fault_is_where_the_traces_part(
    stage, traced, checkpoint, tmp_path, monkeypatch, capsys
):
    """One stage function of ours is replaced, in all layers: the traces part in layer 0 there."""
    functions = models.FUNCTIONS[open_trace(traced()).arch.name]
    right = functions[stage]

    def wrong(*args):
        return right(*args) * 1.001

    monkeypatch.setitem(functions, stage, wrong)
    out = str(tmp_path / "wrong")
    common = ["--model", str(checkpoint), "--tokens", TOKENS, "--out", out]
    assert trace.main([*common, "--backend", "eager"]) == 0
    code, _ = run(capsys, out, traced(), "--json", tmp_path / "d.json")
    data = json.loads((tmp_path / "d.json").read_text())
    assert code == 1
    assert data["parting"] == {"stage": stage, "layer": 0}
    assert data["smallest_tolerance"] > 5e-4


def test_one_wrong_value_in_one_file(traced, checkpoint, tmp_path, capsys):
    changed = tmp_path / "changed"
    shutil.copytree(traced(), changed)
    path = changed / "layer-1" / "ffn_up.bin"
    values = aprt.read(path, 1).copy()
    values[37] += 1
    header, payload = aprt.header(1, values.size), aprt.payload(values)
    path.write_bytes(header + payload.tobytes())
    with pytest.raises(UserError, match="was changed"):
        run(capsys, changed, traced())
    (changed / "manifest.json").unlink()
    given = ["--model", str(checkpoint), "--tokens", TOKENS]
    code, out = run(capsys, changed, traced(), *given)
    assert code == 1
    assert "part at layer 1 ffn_up" in out
    values[37] = np.nan
    path.write_bytes(header + values.astype("<f4").tobytes())
    code, out = run(capsys, changed, traced(), *given)
    assert code == 1
    assert "no tolerance would pass" in out


def test_other_embeddings_of_a_foreign_trace_are_not_comparable(
    traced, checkpoint, tmp_path, capsys
):
    foreign = tmp_path / "foreign"
    shutil.copytree(traced(), foreign)
    (foreign / "manifest.json").unlink()
    tokens = TOKENS.replace("5,3", "3,5")
    with pytest.raises(NotComparable, match="tokens differ"):
        run(capsys, foreign, traced(), "--model", checkpoint, "--tokens", tokens)
    path = foreign / "layer-0" / "embedding.bin"
    values = aprt.read(path, 0) * np.float32(1.1)
    path.write_bytes(aprt.header(0, values.size) + aprt.payload(values).tobytes())
    with pytest.raises(NotComparable, match="embeddings differ"):
        run(capsys, foreign, traced(), "--model", checkpoint, "--tokens", TOKENS)


def test_every_layer_has_a_row(traced, capsys):
    _, brief = run(capsys, traced("--dtype", "bfloat16"), traced())
    _, long = run(capsys, traced("--dtype", "bfloat16"), traced(), "--every-layer")
    assert brief.count("\nffn_up ") == 1
    assert long.count("\nffn_up ") == len(
        {layer for stage, layer in open_trace(traced()).entries if stage == "ffn_up"}
    )


def test_bad_input_from_the_shell(tmp_path, run_cli):
    for arguments in (["nowhere", "nowhere"], [str(tmp_path), str(tmp_path)], ["one"]):
        result = run_cli("tools.diff", *arguments)
        assert result.code == 2
        assert result.stderr.count("\n") == 1
        assert result.stderr.startswith("error: ")


def test_the_reference_page_is_up_to_date():
    """It is made from the tables that the code runs on."""
    assert reference.FILE.read_text(encoding="utf-8") == reference.render(), (
        "run: python -m tests.maintain.reference"
    )
    assert cli.size(1536) == "1.5 kB"


@pytest.mark.parametrize("seed", range(8))
def test_against_extended_precision(seed):
    """Sizes from 1e-30 to 1e18 on either side, equal parts, zeros of both signs."""
    random = np.random.default_rng(seed)
    for _ in range(60):
        shape = tuple(random.integers(1, (40, 60)))
        sizes = 10.0 ** random.uniform(-30, 18, 2)
        b = (random.standard_normal(shape) * sizes[0]).astype(np.float32)
        a = (random.standard_normal(shape) * sizes[1]).astype(np.float32)
        if random.random() < 0.7:
            change = np.where(random.random(shape) < 0.5, 10.0 ** random.uniform(-8, 0), 0)
            a = (b * (1 + change * random.standard_normal(shape))).astype(np.float32)
        zeros = random.random((2, *shape)) < random.choice([0, 0.1])
        a[zeros[0]], b[zeros[1]] = 0.0, -0.0
        found = compare(a, b, PLAIN)
        x, y = a.astype(np.longdouble), b.astype(np.longdouble)
        error, size = np.sqrt(((x - y) ** 2).sum()), np.sqrt((y**2).sum())
        assert found.rms == pytest.approx(float(error / np.sqrt(a.size)), rel=3e-5)
        if size:
            assert found.relative_l2 == pytest.approx(float(error / size), rel=3e-5)
        if size and x.any():
            cosine = (x * y).sum() / np.sqrt((x**2).sum()) / size
            assert found.cosine == pytest.approx(float(cosine), abs=3e-6)
        ordered = [np.where(i < 0, -(i & 0x7FFFFFFF), i) for i in (a.view("i4"), b.view("i4"))]
        ulps = np.abs(ordered[0].astype(np.int64) - ordered[1])
        assert found.ulp_max == ulps.max()
        assert found.ulp_0 == np.mean(ulps == 0) and found.ulp_1 == np.mean(ulps <= 1)
        assert found.identical == (a.tobytes() == b.tobytes())


# --- for people


def of_nan(trace, directory, keys):
    """The same trace with nothing but NaN in some of its stages."""
    opened = open_trace(trace)
    planned = {key: (entry.shape, str(entry.dtype)) for key, entry in opened.entries.items()}
    header = replace(opened.manifest, files=())
    with TraceWriter(directory, header, opened.manifest.model.weights, planned) as writer:
        for key in opened.entries:
            value = opened.read(*key)
            writer.add(*key, np.full_like(value, np.nan) if keys(key) else value)
        writer.finish()
    return directory


def test_two_traces_that_are_nan_throughout(capsys, traced, tmp_path):
    """Bit for bit the same, and no reason to trust either."""
    some = of_nan(traced(), tmp_path / "some", lambda key: key[1] in (1, None))
    code, out = run(capsys, some, some)
    assert code == 0 and "NaN or infinite throughout on both sides" in out
    assert "nothing is known of 19 stages, first layer 1 attn_norm" in out
    every = of_nan(traced(), tmp_path / "all", lambda key: True)
    with pytest.raises(NotComparable, match="no stage has a number on both sides"):
        diff.main([str(every), str(every)])


def test_differing_traces_name_the_command_that_goes_on(capsys, traced, checkpoint, tmp_path):
    broken = of_nan(traced(), tmp_path / "a b", lambda key: key == ("ffn_up", 1))
    code, out = run(capsys, broken, traced())
    assert code == 1
    asked = f"python -m tools.localize '{broken}' --model DIR_OF_{checkpoint.name}"
    assert out.splitlines()[-1] == asked
    code, out = run(capsys, broken, traced(), "--model", str(checkpoint))
    asked = f"python -m tools.localize '{broken}' --model {checkpoint}"
    assert out.splitlines()[-1] == asked
    (broken / "manifest.json").unlink()
    code, out = run(capsys, broken, traced(), "--model", str(checkpoint), "--tokens", TOKENS)
    assert out.splitlines()[-1] == f"{asked} --tokens {TOKENS}"


@pytest.mark.parametrize("width", [60, 80])
def test_no_number_is_cut_in_a_narrow_terminal(traced, tmp_path, width):
    broken = of_nan(traced(), tmp_path / "a", lambda key: key == ("ffn_up", 1))
    wide, narrow = (Console(file=io.StringIO(), width=w) for w in (200, width))
    found = diff.diff(broken, traced())
    for show in (wide, narrow):
        diff.show_difference(show, found)
    cells = [word for word in wide.file.getvalue().split() if "e-" in word or "%" in word]
    assert set(cells) <= set(narrow.file.getvalue().split())
