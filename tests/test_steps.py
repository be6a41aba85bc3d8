"""Dumps that come call by call: read as one sequence, refused where they are none."""

import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from safetensors.numpy import save_file

import qwen_jax
from stages import aprt
from stages.architecture import Key
from stages.errors import UserError
from stages.manifest import Changed
from stages.open import open_trace
from stages.trace import MemoryTrace, Trace
from tests.tiny import write_checkpoint
from tools.diff import diff
from tools.localize import __main__, localize
from tools.localize.cache_drift import with_changes
from tools.localize.grouping import faults

TOKENS = (5, 3, 9, 1, 0, 7, 2, 8, 4, 6)
STEPS = (4, 3, 1, 1, 1)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def whole(checkpoint: Path) -> Trace:
    """A prefill, and the caches that a decode of the same tokens would read at its end."""
    made = qwen_jax.trace_model(str(checkpoint), TOKENS)
    values = {key: np.array(made.read(*key)) for key in made.entries}
    for layer in range(2):
        values["k_cache", layer] = values["k_post_rope", layer]
        values["v_cache", layer] = values["qkv_bias", layer][:, -16:].reshape(-1, 2, 8)
        for stage in ("attn_scores", "attn_softmax"):
            values[stage, layer] = np.where(np.tri(10) > 0, values[stage, layer], np.float32(0))
    return MemoryTrace("whole", made.config, TOKENS, "float32", values)


def dump(directory: Path, call: int, stages: dict[Key, np.ndarray], format: str = "aprt") -> None:
    """The files of one call."""
    here = directory / f"step-{call:04}"
    names = {key: key[0] if key[1] is None else f"layer-{key[1]}/{key[0]}" for key in stages}
    here.mkdir(parents=True)
    if format == "safetensors":
        contiguous = {names[k]: np.ascontiguousarray(v) for k, v in stages.items()}
        save_file(contiguous, here / "stages.safetensors", metadata={"engine": "x"})
        return
    for (stage, layer), value in stages.items():
        path = here / f"{names[stage, layer]}.bin"
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(aprt.header(layer, value.size) + aprt.payload(value).tobytes())


def rows_of_call(trace: Trace, begin: int, end: int) -> dict[Key, np.ndarray]:
    """What a call that computes these rows has of each stage."""
    found = {}
    for stage, layer in trace.entries:
        value, axes = trace.read(stage, layer), trace.arch.stage[stage].axes
        if axes[0] == "N":
            value = value[:, begin:end, :end]
        elif axes[0] == "S":
            value = value[:end]
        else:
            value = value[begin:end]
        found[stage, layer] = value
    return found


def split(trace: Trace, directory: Path, steps: tuple[int, ...] = STEPS, **more) -> Path:
    end = 0
    for call, rows in enumerate(steps):
        end += rows
        dump(directory, call, rows_of_call(trace, end - rows, end), **more)
    return directory


def opened(checkpoint: Path, directory: Path, tokens: tuple[int, ...] = TOKENS) -> Trace:
    prompt = qwen_jax.Prompt(tokens=tokens)
    return open_trace(directory, prompt.layout(qwen_jax.open_model(str(checkpoint))))


def rewrite(path: Path, change) -> None:
    """Change the values of an APRT file, flat."""
    raw = path.read_bytes()
    values = np.frombuffer(raw[12:], np.float32).copy()
    change(values)
    path.write_bytes(raw[:12] + values.tobytes())


@pytest.mark.parametrize("format", ["aprt", "safetensors"])
@pytest.mark.parametrize("steps", [STEPS, (10,), (1,) * 10])
def test_the_rows_of_all_calls_are_one_sequence(checkpoint, whole, tmp_path, steps, format):
    found = opened(checkpoint, split(whole, tmp_path / "dump", steps, format=format))
    assert found.steps == steps and found.changed == ()
    assert list(found.entries) == list(whole.entries)
    for key in whole.entries:
        assert found.read(*key).tobytes() == whole.read(*key).tobytes(), key
    assert [found.step_of(row) for row in (0, 9)] == [0, len(steps) - 1]
    assert diff(found, whole).smallest_tolerance == 0


def test_what_engines_leave_away(checkpoint, whole, tmp_path):
    """The end of the last layer for the last row of a call only, scores of decoded rows only, the
    cache after the last call only, and a cache of a fixed size with something in its free rows."""
    directory, end = tmp_path / "dump", 0
    for call, rows in enumerate(STEPS):
        end += rows
        stages = rows_of_call(whole, end - rows, end)
        for key in (("ffn_out", 1), ("final_norm", None), ("lm_head", None)):
            stages[key] = stages[key][-1:]
        for layer in range(2):
            if rows > 1:
                del stages["attn_scores", layer]
            if end < len(TOKENS):
                del stages["k_cache", layer]
            free = ((0, 16 - end), (0, 0), (0, 0))
            stages["v_cache", layer] = np.pad(stages["v_cache", layer], free, constant_values=7)
            stages["attn_softmax", layer] = np.pad(
                stages["attn_softmax", layer], ((0, 0), (0, 0), (0, 16 - end))
            )
        dump(directory, call, stages)
    found = opened(checkpoint, directory)
    last = {("ffn_out", 1): 4, ("final_norm", None): 4, ("lm_head", None): 4}
    last |= {("attn_scores", 0): 3, ("attn_scores", 1): 3}
    for key in whole.entries:
        rows = last.get(key, 10)
        assert found.rows_of(*key) == rows, key
        value = whole.read(*key)
        value = value[:, -rows:] if key[0] == "attn_scores" else value[-rows:]
        assert np.array_equal(found.read_rows(*key), value), key
    assert found.changed == ()
    assert localize(found, str(checkpoint)).verdict == "clean"


def test_a_sequence_of_one_row(checkpoint, whole, tmp_path):
    directory = split(whole, tmp_path / "dump", (1,))
    found = opened(checkpoint, directory, TOKENS[:1])
    assert found.entries["lm_head", None].axes == ("V",)
    assert np.array_equal(found.read("lm_head", None), whole.read("lm_head", None)[0])


def test_positions_and_the_alias(checkpoint, whole, tmp_path):
    directory = split(whole, tmp_path / "dump")
    for file in directory.glob("step-*/layer-0/post_ffn_residual.bin"):
        file.rename(file.with_name("layer_output.bin"))
    prompt = qwen_jax.Prompt(tokens=TOKENS, first_position=3)
    found = open_trace(directory, prompt.layout(qwen_jax.open_model(str(checkpoint))))
    assert found.positions == tuple(range(3, 13)) and ("post_ffn_residual", 0) in found.entries


def test_one_stage_is_in_memory_at_a_time(checkpoint, whole, tmp_path, monkeypatch):
    """Reading one touches no other stage's files, and of the cache two calls at a time."""
    from stages import steps

    directory, read = split(whole, tmp_path / "dump"), []
    real = steps.read_file
    monkeypatch.setattr(steps, "read_file", lambda r, e: read.append(e.path) or real(r, e))
    found = opened(checkpoint, directory)
    assert read == []
    found.read("ffn_up", 1)
    assert read == [f"step-{call:04}/layer-1/ffn_up.bin" for call in range(len(STEPS))]


# --- rows that change


def test_a_row_that_changed_is_a_finding(checkpoint, whole, tmp_path, capsys):
    """Row 2 of K in layer 0 is another from call 3 on, and attention reads it so."""
    directory = split(whole, tmp_path / "dump")
    for file in directory.rglob("*.bin"):
        if file.stem not in ("attn_norm", "qkv_bias", "q_post_rope", "k_cache", "attn_scores"):
            file.unlink()
    other = whole.read("k_cache", 0)[7].ravel()
    for call in (3, 4):

        def put(values):
            values[32:48] = other

        rewrite(directory / f"step-{call:04}/layer-0/k_cache.bin", put)

        q = whole.read("q_post_rope", 0)[5 + call].reshape(2, 2, 8)
        score = np.einsum("kgh,kh->kg", q, other.reshape(2, 8)).ravel() / np.sqrt(8)

        def change(values):
            values.reshape(4, -1)[:, 2] = score  # noqa: B023 -- called at once

        rewrite(directory / f"step-{call:04}/layer-0/attn_scores.bin", change)
    found = opened(checkpoint, directory)
    (change,) = found.changed
    assert str(change) == "K cache of layer 0: row 2 changed in step 3" and change.bits < 3
    assert np.array_equal(found.read("k_cache", 0), whole.read("k_cache", 0))  # as first read

    tokens = ",".join(map(str, TOKENS))
    given = [str(directory), "--model", str(checkpoint), "--tokens", tokens]
    page = tmp_path / "page.html"
    assert __main__.main([*given, "--json", str(tmp_path / "found.json"), "--report", str(page)])
    assert page.read_text("utf-8").count("row 2 changed in step 3") >= 2
    told = capsys.readouterr().out
    assert "fault: layer 0 k_cache and attn_scores: row 2 changed in step 3" in told
    fault = json.loads((tmp_path / "found.json").read_text())["faults"][0]
    assert fault["stage"] == "k_cache" and fault["also"] == ["attn_scores"]
    assert fault["where"] == {"positions": "2"} and fault["bits"] < 3
    assert fault["diagnosis"][0]["name"] == "cache_row_changed"
    with pytest.raises(UserError, match="row 2 changed in step 3; that is between two calls"):
        __main__.main([*given, "--harm", "none", "--repro", str(tmp_path / "repro")])


def test_changes_by_layer_cache_and_call(checkpoint, whole, tmp_path):
    directory = split(whole, tmp_path / "dump")

    def put(stage, layer, rows, calls, value):
        for call in calls:
            path = directory / f"step-{call:04}/layer-{layer}/{stage}.bin"

            def change(values):
                for row in rows:
                    values[16 * row : 16 * row + 16] = value

            rewrite(path, change)

    for layer in range(2):
        put("v_cache", layer, (1, 6), (2, 3, 4), np.nan)
    put("k_cache", 1, (0,), (1, 4), 0.5)  # and back in between
    found = opened(checkpoint, directory)
    assert [(c.layer, c.cache, c.row, c.step) for c in found.changed] == [
        (0, "V", 1, 2), (0, "V", 6, 2), (1, "K", 0, 1), (1, "V", 1, 2), (1, "V", 6, 2),
    ]  # fmt: skip
    report = localize(found, str(checkpoint))
    told = [(f["layer"], f["stage"], f["diagnosis"][0]["says"]) for f in report.to_json()["faults"]]
    assert told == [
        ("all", "v_cache", "rows 1,6 changed, first in step 2"),
        (1, "k_cache", "row 0 changed in step 1"),
    ]


def test_changes_of_a_cache_that_is_no_stage_of_the_trace(whole):
    """As an engine's recorder tells them; alone, or beside what else was measured."""
    places = [(0, "K", 2, 3), (1, "K", 2, 3), (0, "V", 2, 3), (1, "V", 2, 3), (1, "V", 5, 4)]
    values = {key: whole.read(*key) for key in whole.entries if not key[0].endswith("_cache")}
    trace = MemoryTrace("told", whole.config, TOKENS, "float32", values)
    for alone in (True, False):
        told = [dict(zip(("layer", "cache", "row", "step"), each, strict=True)) for each in places]
        given = SimpleNamespace(
            changed=[Changed(**each, bits=0.5) for each in told],
            arch=trace.arch,
            config={"num_hidden_layers": 3},
            tokens=TOKENS,
        )
        items = [SimpleNamespace(name="ffn_up", layer=n, key=("ffn_up", n)) for n in range(3)]
        found = faults(with_changes(given, []), [] if alone else items)
        assert [(f.layer, f.stage, f.diagnosis[0].says) for f in found] == [
            ("all" if alone else "0-1", "k_cache", "row 2 changed in step 3"),
            (0, "v_cache", "row 2 changed in step 3"),
            (1, "v_cache", "rows 2,5 changed, first in step 3"),
        ]


# --- what is no sequence


def refusal(checkpoint, directory, tokens=TOKENS) -> str:
    with pytest.raises(UserError) as caught:
        opened(checkpoint, directory, tokens)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_without_the_model_and_the_tokens(whole, tmp_path):
    with pytest.raises(UserError, match="--model and --tokens"):
        open_trace(split(whole, tmp_path / "dump"))


def test_calls_that_are_missing_or_twice(checkpoint, whole, tmp_path):
    directory = split(whole, tmp_path / "dump")
    shutil.move(directory / "step-0002", tmp_path / "kept")
    assert "step-0002 is missing" in refusal(checkpoint, directory)
    shutil.copytree(directory / "step-0001", directory / "step-2")
    shutil.copytree(directory / "step-0001", directory / "step-0002")
    assert "step-0002 and step-2 are the same call" in refusal(checkpoint, directory)


def test_a_call_in_the_middle_that_lacks_a_layer(checkpoint, whole, tmp_path):
    """What comes before it would be left out without a word."""
    directory = split(whole, tmp_path / "dump")
    shutil.rmtree(directory / "step-0002/layer-1")
    message = refusal(checkpoint, directory)
    assert message.startswith(f"{directory / 'step-0002'}: lacks ")
    assert "of layer 1, which step-0001 has" in message
    for call in (0, 1):  # a capture may begin late
        shutil.rmtree(directory / f"step-{call:04}/layer-1")
    assert opened(checkpoint, directory).read("ffn_up", 1).shape[0] == 2


def test_calls_beside_a_whole(checkpoint, whole, tmp_path):
    directory = split(whole, tmp_path / "dump")
    shutil.copytree(directory / "step-0000/layer-1", directory / "layer-1")
    assert "step-0000/ may be of all calls or of one" in refusal(checkpoint, directory)


def test_other_tokens(checkpoint, whole, tmp_path):
    directory = split(whole, tmp_path / "dump")
    message = refusal(checkpoint, directory, TOKENS[:4])
    assert (
        "5 calls computed 10 rows (4, 3, 1, 1, 1), but there are 4 tokens; give --tokens every one"
        in message
    )


@pytest.mark.parametrize(
    ("other", "says"),
    [
        ({"hidden_size": 32}, "are no rows of 24"),
        ({"num_hidden_layers": 3}, "the model has 2 layers"),
        ({"num_hidden_layers": 1}, "lacks k_cache of layer 0, which step-0003 has"),
        ({"intermediate_size": 80}, "has 1 rows, but ffn_gate of the same call has 2"),
    ],
)
def test_calls_of_other_models(checkpoint, whole, tmp_path, other, says):
    directory = split(whole, tmp_path / "dump")
    shutil.rmtree(directory / "step-0004")
    second = write_checkpoint(tmp_path / "model", **other)
    made = qwen_jax.trace_model(str(second), TOKENS)
    dump(directory, 4, rows_of_call(made, 9, 10))
    assert says in refusal(checkpoint, directory)


def test_what_does_not_fit_a_call(checkpoint, whole, tmp_path):
    directory = split(whole, tmp_path / "dump")
    path = directory / "step-0003/layer-0/k_cache.bin"
    kept = path.read_bytes()
    path.write_bytes(aprt.header(0, 16) + kept[12 : 12 + 64])  # its own row alone
    assert "S x K x H is 9 x 2 x 8" in refusal(checkpoint, directory)
    path.write_bytes(kept)
    path = directory / "step-0002/layer-1/ffn_up.bin"
    path.write_bytes(path.read_bytes()[:12])
    assert "0 values are no rows of 40" in refusal(checkpoint, directory)
    for each in (directory / "step-0002").glob("layer-*/*"):
        if not each.name.startswith("attn_s"):
            each.unlink()
    for each in (directory / "step-0002").glob("*.bin"):
        each.unlink()
    assert "nothing in it says how many rows" in refusal(checkpoint, directory)


def test_a_file_that_is_no_safetensors(checkpoint, whole, tmp_path):
    directory = split(whole, tmp_path / "dump", format="safetensors")
    path = directory / "step-0001/stages.safetensors"
    raw = path.read_bytes()
    path.write_bytes(raw[:-4])
    assert "not a whole safetensors file" in refusal(checkpoint, directory)
    path.write_bytes(raw)
    save_file({"layer-0/ffn_up": np.zeros((3, 40), np.int8)}, path)
    assert "layer-0/ffn_up is in I8" in refusal(checkpoint, directory)
    stages = rows_of_call(whole, 4, 7)
    stages["ffn_up", 1] = stages["ffn_up", 1].astype(np.float16)
    shutil.rmtree(directory / "step-0001")
    dump(directory, 1, stages, format="safetensors")
    assert "in float16, but step-0000/stages.safetensors in float32" in refusal(
        checkpoint, directory
    )
