"""``manifest.json``: its bytes, and manifests that are damaged, foreign or hostile."""

import json
import os

import pytest
from msgspec.structs import replace

from stages import manifest
from stages.architectures import ARCHITECTURES
from stages.errors import UserError
from stages.manifest import FileEntry, Manifest, Model, WeightEntry

SMALL = Manifest(
    architecture="qwen2",
    format="aprt",
    dtype="bfloat16",
    logits="last",
    tokens=(7, 0),
    positions=(0, 1),
    steps=(2,),
    model=Model(
        name="tiny",
        config={"architecture": "qwen2", "hidden_size": 3},
        weights={
            "model.norm.weight": WeightEntry(dtype="float32", shape=(3,), xxh3="00112233445566aa")
        },
    ),
    producer={"name": "qwen_jax", "backend": "xla"},
    files=(
        FileEntry(
            path="layer-0/attn_norm.bin",
            stage="attn_norm",
            layer=0,
            axes=("T", "D"),
            shape=(2, 3),
            dtype="bfloat16",
            xxh3="0123456789abcdef",
        ),
        FileEntry(
            path="lm_head.bin",
            stage="lm_head",
            layer=None,
            axes=("V",),
            shape=(48,),
            dtype="bfloat16",
            xxh3="fedcba9876543210",
        ),
    ),
)

# If this has to change, old traces read differently: raise manifest.SCHEMA.
GOLDEN = b"""{
 "schema": 2,
 "kind": "stage-trace",
 "architecture": "qwen2",
 "format": "aprt",
 "dtype": "bfloat16",
 "logits": "last",
 "tokens": [
  7,
  0
 ],
 "positions": [
  0,
  1
 ],
 "steps": [
  2
 ],
 "cache": null,
 "model": {
  "name": "tiny",
  "config": {
   "architecture": "qwen2",
   "hidden_size": 3
  },
  "weights": {
   "model.norm.weight": {
    "dtype": "float32",
    "shape": [
     3
    ],
    "xxh3": "00112233445566aa"
   }
  }
 },
 "producer": {
  "name": "qwen_jax",
  "backend": "xla"
 },
 "files": [
  {
   "path": "layer-0/attn_norm.bin",
   "stage": "attn_norm",
   "layer": 0,
   "axes": [
    "T",
    "D"
   ],
   "shape": [
    2,
    3
   ],
   "dtype": "bfloat16",
   "xxh3": "0123456789abcdef"
  },
  {
   "path": "lm_head.bin",
   "stage": "lm_head",
   "layer": null,
   "axes": [
    "V"
   ],
   "shape": [
    48
   ],
   "dtype": "bfloat16",
   "xxh3": "fedcba9876543210"
  }
 ]
}
"""

# As version 0.1.0 wrote them. There are traces like it: this must never change.
GOLDEN_1 = b"""{
 "schema": 1,
 "kind": "qwen2-stage-trace",
 "format": "aprt",
 "dtype": "bfloat16",
 "logits": "last",
 "tokens": [
  7,
  0
 ],
 "positions": [
  0,
  1
 ],
 "model": {
  "name": "tiny",
  "config": {
   "hidden_size": 3
  },
  "weights": {
   "model.norm.weight": {
    "dtype": "float32",
    "shape": [
     3
    ],
    "xxh3": "00112233445566aa"
   }
  }
 },
 "producer": {
  "name": "qwen_jax",
  "backend": "xla"
 },
 "files": [
  {
   "path": "layer-0/attn_norm.bin",
   "stage": "attn_norm",
   "layer": 0,
   "axes": [
    "T",
    "D"
   ],
   "shape": [
    2,
    3
   ],
   "dtype": "bfloat16",
   "xxh3": "0123456789abcdef"
  },
  {
   "path": "lm_head.bin",
   "stage": "lm_head",
   "layer": null,
   "axes": [
    "V"
   ],
   "shape": [
    48
   ],
   "dtype": "bfloat16",
   "xxh3": "fedcba9876543210"
  }
 ]
}
"""


def refusal(directory, content=None):
    if content is not None:
        (directory / manifest.NAME).write_bytes(content)
    with pytest.raises(UserError) as error:
        manifest.read(directory)
    message = str(error.value)
    assert len(message.splitlines()) == 1 and str(directory / manifest.NAME) in message
    return message


def changed(change, golden=GOLDEN):
    """The golden manifest after ``change`` has had its way with the data."""
    data = json.loads(golden)
    change(data)
    return json.dumps(data).encode()


def test_golden_bytes(tmp_path):
    manifest.write(tmp_path, SMALL)
    assert [path.name for path in tmp_path.iterdir()] == [manifest.NAME]
    assert (tmp_path / manifest.NAME).read_bytes() == GOLDEN


def test_golden_bytes_are_read(tmp_path):
    (tmp_path / manifest.NAME).write_bytes(GOLDEN)
    assert manifest.read(tmp_path) == SMALL


def test_what_is_not_usual_is_written_and_read(tmp_path):
    """Some rows only, positions with a gap, several steps, a cache, and what is still to come."""
    part = replace(SMALL.files[0], shape=(1, 3), rows=1)
    norm = replace(SMALL.files[0], stage="q_norm", axes=("T", "N", "H"), shape=(3, 1, 2))
    unusual = replace(
        SMALL,
        architecture="qwen3",
        tokens=(7, 0, 7),
        positions=(5, 6, 2**31 - 1),
        steps=(2, 1),
        cache="float16",
        model=replace(SMALL.model, config={"architecture": "qwen3"}),
        files=(part, norm),
        planned=(("q_norm", 0), ("lm_head", None)),
    )
    manifest.write(tmp_path, unusual, manifest.PARTIAL)
    assert manifest.read(tmp_path, manifest.PARTIAL) == unusual
    data = json.loads((tmp_path / manifest.PARTIAL).read_bytes())
    assert data["planned"] == [["q_norm", 0], ["lm_head", None]] and data["steps"] == [2, 1]
    assert data["files"][0]["rows"] == 1 and "rows" not in data["files"][1]


def test_the_tables_are_those_of_the_architecture():
    for name in ("qwen2", "qwen3"):
        assert replace(SMALL, architecture=name).arch is ARCHITECTURES[name]


# --- schema 1


def test_schema_1_is_read(tmp_path):
    """It had one architecture, one step and no cache, and says so now."""
    (tmp_path / manifest.NAME).write_bytes(GOLDEN_1)
    assert manifest.read(tmp_path) == SMALL


def test_an_unfinished_trace_of_schema_1(tmp_path):
    planned = [["attn_norm", 0], ["lm_head", None]]
    partial = changed(lambda data: data["model"].update(planned=planned), GOLDEN_1)
    (tmp_path / manifest.PARTIAL).write_bytes(partial)
    found = manifest.read(tmp_path, manifest.PARTIAL)
    assert found == replace(SMALL, planned=(("attn_norm", 0), ("lm_head", None)))


FIELDS_1 = ("format", "dtype", "logits", "tokens", "positions", "model", "producer", "files")


@pytest.mark.parametrize("field", FIELDS_1)
def test_a_field_of_schema_1_is_missing(tmp_path, field):
    message = refusal(tmp_path, changed(lambda data: data.pop(field), GOLDEN_1))
    assert "damaged" in message and field in message


@pytest.mark.parametrize("model", [None, 1, "x", [1], {"config": None}, {"config": "x"}, {}])
def test_a_model_of_schema_1_that_is_none(tmp_path, model):
    assert "damaged" in refusal(tmp_path, changed(lambda d: d.update(model=model), GOLDEN_1))


@pytest.mark.parametrize("tokens", [None, 1, {}, [], [-1, 0], ["7", 0], "70"])
def test_tokens_of_schema_1_that_are_none(tmp_path, tokens):
    assert "damaged" in refusal(tmp_path, changed(lambda d: d.update(tokens=tokens), GOLDEN_1))


# --- what is refused


def test_writing_replaces_as_a_whole(tmp_path):
    manifest.write(tmp_path, replace(SMALL, tokens=tuple(range(1000))))
    manifest.write(tmp_path, SMALL)
    assert manifest.read(tmp_path) == SMALL


def test_what_lies_in_the_way_is_not_written_through(tmp_path):
    """A process that was killed leaves its temporary file; a link is not followed."""
    (tmp_path / "mine").write_bytes(b"mine")
    (tmp_path / (manifest.NAME + ".tmp")).symlink_to("mine")
    manifest.write(tmp_path, SMALL)
    assert (tmp_path / "mine").read_bytes() == b"mine"
    assert sorted(path.name for path in tmp_path.iterdir()) == [manifest.NAME, "mine"]
    assert manifest.read(tmp_path) == SMALL


@pytest.mark.parametrize(
    "content",
    [
        b"",
        GOLDEN[:-3],
        b"\xff" + GOLDEN,
        GOLDEN + b"{}",
        b"[" * 100_000,
        pytest.param(GOLDEN.replace(b"48", b"4" * 5000), id="long number"),
    ],
)
def test_what_is_no_json(tmp_path, content):
    assert "JSON" in refusal(tmp_path, content)


def test_no_manifest(tmp_path):
    assert "no such file" in refusal(tmp_path)


@pytest.mark.parametrize("content", [b"{}", b'{"schema": 1, "kind": "x"}'])
def test_another_kind_of_file(tmp_path, content):
    assert "not the manifest of a stage trace" in refusal(tmp_path, content)


@pytest.mark.parametrize("content", [b"[]", b'"schema"'])
def test_what_is_no_object(tmp_path, content):
    assert "expected a JSON object" in refusal(tmp_path, content)


def test_a_name_that_is_there_twice(tmp_path):
    """The last of the two would count, and others may read the first."""
    content = GOLDEN.replace(b'"dtype": "float32"', b'"dtype": "float32",\n"dtype": "float32"', 1)
    assert "has 'dtype' twice" in refusal(tmp_path, content)


@pytest.mark.parametrize("layers", [0, 4097, 3_000_000, 10**8, 10**30, -1, 1.0, "3"])
def test_layers_that_no_model_has(tmp_path, layers):
    """Refused before anything is made for each of them."""

    def change(data):
        data["model"]["config"] |= {"num_hidden_layers": layers}
        data["model"]["config"].pop("sliding_layers", None)

    assert "num_hidden_layers" in refusal(tmp_path, changed(change))


def test_a_stage_of_a_layer_that_the_model_lacks(tmp_path):
    def change(data):
        data["model"]["config"] |= {"num_hidden_layers": 2, "sliding_layers": [False] * 2}
        data["files"][0] |= {"layer": 2}

    assert "layer 2, of 2 layers" in refusal(tmp_path, changed(change))


def test_a_shape_that_the_config_does_not_have(tmp_path):
    """A shape of other axes has as many values: its file would be read, as something else."""

    def change(data):
        data["model"]["config"] |= {"hidden_size": 7}

    assert "but D is 7" in refusal(tmp_path, changed(change))


def test_a_pipe_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / manifest.NAME)
    assert "pipe" in refusal(tmp_path)


@pytest.mark.parametrize("schema", [0, 3, "1", "2", None, [1]])
def test_another_schema(tmp_path, schema):
    message = refusal(tmp_path, changed(lambda data: data.update(schema=schema)))
    assert f"schema {schema!r}" in message and "reads schemas 1 and 2" in message


FIELDS = ("architecture", "steps", *FIELDS_1)
ENTRY_FIELDS = ("path", "stage", "layer", "axes", "shape", "dtype", "xxh3")


@pytest.mark.parametrize("field", FIELDS)
def test_a_field_is_missing(tmp_path, field):
    message = refusal(tmp_path, changed(lambda data: data.pop(field)))
    assert f"missing required field `{field}`" in message


@pytest.mark.parametrize("field", ["name", "config", "weights"])
def test_a_field_of_the_model_is_missing(tmp_path, field):
    message = refusal(tmp_path, changed(lambda data: data["model"].pop(field)))
    assert f"missing required field `{field}`" in message


@pytest.mark.parametrize("field", ENTRY_FIELDS)
def test_a_field_of_a_file_is_missing(tmp_path, field):
    message = refusal(tmp_path, changed(lambda data: data["files"][0].pop(field)))
    assert f"missing required field `{field}`" in message


# fmt: off
WRONG = {
    "architecture": (None, 2, ["qwen2"], {}),
    "steps": (None, 2, "2", [], [2.0], [0, 2], [-1, 3], [True, 1], ["2"], [3], [1]),
    "cache": (1, ["float16"], {}),
    "planned": (None, 1, ["lm_head"], [["lm_head"]], [["lm_head", 0, 0]], [["lm_head", "0"]]),
    "format": (None, 1, "gguf", ["aprt"]),
    "dtype": (None, 1, "float8", []),
    "logits": (None, True, "first", {}),
    "tokens": (None, 1, "7", [None, 0], [7.0, 0], ["7", "0"], [-7, 0], [True, 0], [[7], [0]],
               [2**31, 0]),
    "positions": (None, 1, "0", [None, 1], [0.0, 1], ["0", "1"], [-1, 0], [False, 1], [0, 2**31]),
    "model": (None, 1, "x", [1], {"config": None, "weights": {}}, {"config": {}, "weights": "x"},
              {"name": "x", "config": {}, "weights": {}},
              {"name": 1, "config": {"architecture": "qwen2"}, "weights": {}},
              {"name": "x", "config": {"architecture": "qwen3"}, "weights": {}},
              {"name": "x", "config": {"architecture": "qwen2"}, "weights": {"a": {}}}),
    "producer": (None, 1, "qwen_jax", [1]),
    "files": (None, 1, "x", [1], [None], ["path"], [[]], {"a": 1}),
}
WRONG_IN_A_FILE = {
    "path": (None, 1, ["x"], {}, "layer-0/\0"),
    "stage": (None, 1, "ffn_upp", "lm_head", ["attn_norm"], {}),
    "layer": (None, "0", 0.0, -1, False, [0]),
    "axes": (None, 1, "TD", ["T"], ["D", "T"], ["T", "D", "D"], [["T"], ["D"]]),
    "shape": (None, 6, "23", [6], [2, 3, 1], [-2, -3], [2, 3.0], ["2", "3"], [True, 3], [1, 3],
              [3, 3]),
    "rows": (0, -1, 1, 2, 3, 1.0, "1", True, [2]),
    "dtype": (None, 1, "float8", ["float32"]),
    "xxh3": (None, 1, "", "0123", "0123456789ABCDEF", "0123456789abcdef0", []),
}
# fmt: on


@pytest.mark.parametrize(("field", "value"), [(f, v) for f in WRONG for v in WRONG[f]])
def test_a_field_is_of_another_kind(tmp_path, field, value):
    assert "damaged" in refusal(tmp_path, changed(lambda data: data.update({field: value})))


@pytest.mark.parametrize(
    ("field", "value"), [(f, v) for f in WRONG_IN_A_FILE for v in WRONG_IN_A_FILE[f]]
)
def test_a_field_of_a_file_is_of_another_kind(tmp_path, field, value):
    message = refusal(tmp_path, changed(lambda data: data["files"][0].update({field: value})))
    assert "damaged" in message


def test_another_architecture(tmp_path):
    """Of a later version, say: not damaged, but not known."""
    message = refusal(tmp_path, changed(lambda data: data.update(architecture="llama")))
    assert "'llama'" in message and "qwen2, qwen3" in message


@pytest.mark.parametrize(("architecture", "stage"), [("qwen2", "q_norm"), ("qwen3", "qkv_bias")])
def test_a_stage_of_another_architecture(tmp_path, architecture, stage):
    def change(data):
        data["architecture"] = data["model"]["config"]["architecture"] = architecture
        data["files"][0]["stage"] = stage

    assert f"{stage!r} is no stage of {architecture}" in refusal(tmp_path, changed(change))


@pytest.mark.parametrize("size", ["x", 0, -1, 2.5, True, None, [1]])
def test_sizes_that_no_model_has(tmp_path, size):
    def change(data):
        data["model"]["config"]["vocab_size"] = size

    assert "vocab_size of model.config is" in refusal(tmp_path, changed(change))


@pytest.mark.parametrize("sliding", ["x", {}, None, True, [], [False] * 9, [1, 0]])
def test_sliding_layers_that_are_not_one_for_each(tmp_path, sliding):
    def change(data):
        data["model"]["config"] |= {"num_hidden_layers": 2, "sliding_layers": sliding}

    assert "sliding_layers of model.config is not" in refusal(tmp_path, changed(change))


@pytest.mark.parametrize("positions", [[0, 0], [1, 0], [5, 4]])
def test_positions_that_do_not_rise(tmp_path, positions):
    message = refusal(tmp_path, changed(lambda data: data.update(positions=positions)))
    assert "positions must rise" in message
    message = refusal(tmp_path, changed(lambda data: data.update(positions=positions), GOLDEN_1))
    assert "positions must rise" in message


@pytest.mark.parametrize("steps", [[1], [3], [1, 2], [1, 1, 1]])
def test_steps_that_are_not_of_the_tokens(tmp_path, steps):
    message = refusal(tmp_path, changed(lambda data: data.update(steps=steps)))
    assert f"steps compute {sum(steps)} rows, of 2 tokens" in message


def test_fewer_rows_than_tokens_are_told(tmp_path):
    (tmp_path / manifest.NAME).write_bytes(
        changed(lambda data: data["files"][0].update(shape=[1, 3], rows=1))
    )
    assert manifest.read(tmp_path).files[0].rows == 1


@pytest.mark.parametrize(
    ("stage", "layer"), [("lm_head", 0), ("attn_norm", None), ("embedding", 1), ("embedding", None)]
)
def test_a_stage_lies_where_it_cannot(tmp_path, stage, layer):
    change = {"stage": stage, "layer": layer}
    message = refusal(tmp_path, changed(lambda data: data["files"][0].update(change)))
    assert f"{stage} of layer {layer}" in message


@pytest.mark.parametrize(("logits", "axes"), [("last", ["T", "V"]), ("all", ["V"])])
def test_the_axes_of_lm_head_follow_the_kept_logits(tmp_path, logits, axes):
    def change(data):
        data["logits"] = logits
        data["files"][1] |= {"axes": axes, "shape": [1] * len(axes)}

    assert "axes" in refusal(tmp_path, changed(change))


def test_a_stage_is_there_twice(tmp_path):
    message = refusal(tmp_path, changed(lambda data: data["files"].append(data["files"][0])))
    assert "twice" in message


@pytest.mark.parametrize("length", [1, 3])
def test_tokens_and_positions_are_of_one_length(tmp_path, length):
    message = refusal(tmp_path, changed(lambda data: data.update(positions=[0] * length)))
    assert f"{length} positions, 2 tokens" in message


@pytest.mark.parametrize(
    "path", ["/etc/hostname", "../x.bin", "layer-0/../../x.bin", "layer-0/../lm_head.bin", "//x"]
)
def test_a_path_leaves_the_directory(tmp_path, path):
    (tmp_path / "layer-0").mkdir()

    def change(data):
        data["files"][0]["path"] = path

    message = refusal(tmp_path, changed(change))
    assert "leaves the trace directory" in message and repr(path) in message


def test_a_link_leaves_the_directory(tmp_path):
    outside, trace = tmp_path / "outside", tmp_path / "trace"
    outside.mkdir()
    trace.mkdir()
    (trace / "layer-0").symlink_to(outside)
    assert "leaves the trace directory" in refusal(trace, GOLDEN)


def test_a_link_that_stays_inside_is_followed(tmp_path):
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "layer-0").symlink_to("elsewhere")
    (tmp_path / manifest.NAME).write_bytes(GOLDEN)
    assert manifest.read(tmp_path) == SMALL


def test_a_trace_reached_through_a_link_is_read(tmp_path):
    (tmp_path / "trace").mkdir()
    (tmp_path / "link").symlink_to("trace")
    (tmp_path / "trace" / manifest.NAME).write_bytes(GOLDEN)
    assert manifest.read(tmp_path / "link") == SMALL


def test_a_link_to_itself(tmp_path):
    (tmp_path / "layer-0").symlink_to("layer-0")
    (tmp_path / manifest.NAME).write_bytes(GOLDEN)
    assert manifest.read(tmp_path) == SMALL  # reading the file is refused later, by the system
