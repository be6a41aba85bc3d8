"""Conversion: bit for bit there and back, bounded memory, and nothing half that reads as whole."""

import fcntl
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import tensorstore
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from qwen_jax import trace
from qwen_jax.config import from_hf
from qwen_jax.prompt import load_tokenizer
from qwen_jax.weights import UNFINISHED, huggingface, open_model
from qwen_jax.weights import orbax as orbax_module
from qwen_jax.weights.base import Weights
from qwen_jax.weights.huggingface import INDEX, SINGLE, HuggingFaceWeights
from qwen_jax.weights.orbax import MARK, PARAMS, OrbaxWeights
from stages.architectures import QWEN2
from stages.errors import UserError
from stages.manifest import NAME as MANIFEST
from tests.conftest import ROOT, interruptible, user_environment
from tests.tiny import hf_config, random_tensors, write_checkpoint, write_json, write_tensors
from tools import convert, diff
from tools.localize import __main__ as localize

EMBEDDING = "model.embed_tokens.weight"
NORM = "model.norm.weight"
HEAD = "lm_head.weight"
UP = "model.layers.1.mlp.up_proj.weight"
FORMATS = ("hf", "orbax")


def contents(directory):
    paths = sorted(path for path in directory.rglob("*") if path.is_file())
    return {str(path.relative_to(directory)): path.read_bytes() for path in paths}


def bits(model):
    return {name: (str(a.dtype), a.tobytes()) for name in model.shapes for a in [model.read(name)]}


def refusal(directory):
    with pytest.raises(UserError) as error:
        open_model(str(directory))
    message = str(error.value)
    assert len(message.splitlines()) == 1 and str(directory) in message
    return message


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """A model in both forms, for tests that change neither."""
    directory = tmp_path_factory.mktemp("pair")
    write_checkpoint(directory / "hf", shards=2, dtype="bfloat16")
    assert convert.main([str(directory / "hf"), str(directory / "orbax")]) == 0
    return directory


@pytest.fixture
def orbax(pair, tmp_path):
    return Path(shutil.copytree(pair / "orbax", tmp_path / "orbax"))


class Tensors(Weights):
    """A model of given tensors, whether they make one or not."""

    directory = None

    def __init__(self, tensors, config=None):
        super().__init__()
        self.tensors, self.config = tensors, config

    @property
    def shapes(self):
        return {name: tensor.shape for name, tensor in self.tensors.items()}

    def dtype(self, name):
        return self.tensors[name].dtype

    def fill(self, name, start, out):
        out[...] = self.tensors[name][start : start + len(out)]


# --- there and back


@pytest.mark.parametrize(
    ("dtype", "tied", "shards"),
    [("bfloat16", False, 3), ("float16", True, 1), ("float32", True, 2), ("mixed", False, 2)],
)
def test_there_and_back(tmp_path, dtype, tied, shards):
    """Every bit of every tensor, NaN payloads too, and every byte of the files that go along."""
    tensors = random_tensors(
        hf_config(tie_word_embeddings=tied), dtype="float32" if dtype == "mixed" else dtype
    )
    if dtype == "mixed":
        tensors[UP] = tensors[UP].astype("float16")
        tensors["model.layers.0.self_attn.q_proj.bias"][:2] = np.nan, -np.nan
        tensors[EMBEDDING].view(np.uint32)[7] = 0x7F812345
    there = write_checkpoint(tmp_path / "there", tie_word_embeddings=tied)
    (there / SINGLE).unlink()
    write_tensors(there, tensors, shards)
    (there / "config.json").write_text((there / "config.json").read_text() + "\n\n")
    (there / "tokenizer_config.json").write_bytes(b'{"a": "\xc3\xa9"}\r\n')
    (there / "README.md").write_text("no part of the model")
    assert convert.main([str(there), str(tmp_path / "orbax")]) == 0
    assert convert.main([str(tmp_path / "orbax"), str(tmp_path / "back")]) == 0
    first, second, third = (open_model(str(tmp_path / name)) for name in ("there", "orbax", "back"))
    assert type(second) is OrbaxWeights and type(third) is HuggingFaceWeights
    assert bits(first) == bits(second) == bits(third)
    assert first.hashes == second.hashes == third.hashes
    along = ("config.json", "tokenizer.json", "tokenizer_config.json")
    for name in ("orbax", "back"):
        assert {path.name for path in (tmp_path / name).iterdir()} - set(along) <= {
            PARAMS, MARK, SINGLE
        }  # fmt: skip
        for file in along:
            assert (tmp_path / name / file).read_bytes() == (there / file).read_bytes()
    assert not list(tmp_path.glob("*.partial"))


def test_a_synthetic_model_becomes_files(tmp_path, monkeypatch):
    sizes = dict(QWEN2.published["0.5b"], hidden_size=64, num_attention_heads=2, vocab_size=50)
    sizes |= {"num_key_value_heads": 1, "intermediate_size": 96}
    monkeypatch.setitem(QWEN2.published, "0.5b", sizes)
    assert convert.main(["synthetic:0.5b:2", str(tmp_path / "hf")]) == 0
    model, made = HuggingFaceWeights(tmp_path / "hf"), open_model("synthetic:0.5b:2")
    assert bits(model) == bits(made) and model.config == made.config
    assert convert.main(["synthetic:0.5b:2", str(tmp_path / "orbax"), "--to", "orbax"]) == 0
    assert bits(open_model(str(tmp_path / "orbax"))) == bits(made)


@settings(deadline=None, max_examples=25)
@given(data=st.data())
def test_shards_of_any_size(data, tmp_path_factory):
    """Files below the limit unless one tensor alone is above it, all read by safetensors itself."""
    heads = data.draw(st.integers(1, 3))
    raw = hf_config(
        hidden_size=data.draw(st.integers(1, 9)),
        intermediate_size=data.draw(st.integers(1, 9)),
        num_hidden_layers=data.draw(st.integers(1, 3)),
        num_attention_heads=2 * heads,
        num_key_value_heads=heads,
        head_dim=2,
        vocab_size=data.draw(st.integers(1, 40)),
        tie_word_embeddings=data.draw(st.booleans()),
    )
    tensors = random_tensors(raw)
    for name in tensors:
        dtype = data.draw(st.sampled_from(["float32", "bfloat16", "float16"]))
        tensors[name] = tensors[name].astype(dtype)
    limit = data.draw(st.integers(1, 4000))
    directory = tmp_path_factory.mktemp("shards")
    model = Tensors(tensors, from_hf(raw))
    written = sum(huggingface.write(directory, model, limit))
    write_json(directory / "config.json", raw)
    assert written == sum(tensor.nbytes for tensor in tensors.values())
    assert bits(HuggingFaceWeights(directory)) == bits(model)
    paths = sorted(directory.glob("*.safetensors"))
    found = {}
    for path in paths:
        part = load_file(path)
        assert sum(a.nbytes for a in part.values()) <= limit or len(part) == 1
        with safe_open(path, "numpy") as file:
            assert file.metadata() == {"format": "pt"}  # transformers refuses a file without it
        places = huggingface._places(path)
        assert all(place % part[name].itemsize == 0 for name, place in places.items())
        found |= part
    assert {name: a.tobytes() for name, a in found.items()} == {
        name: a.tobytes() for name, a in tensors.items()
    }
    if len(paths) == 1:
        assert paths[0].name == SINGLE and not (directory / INDEX).exists()
    else:
        index = json.loads((directory / INDEX).read_text())
        assert index["metadata"]["total_size"] == written
        assert index["weight_map"].keys() == tensors.keys()


def test_a_file_is_what_safetensors_would_write(tmp_path):
    """But for the order: its header is as long, and what follows begins where it may be mapped."""
    tensors = random_tensors(hf_config())
    assert sum(huggingface.write(tmp_path, Tensors(tensors, from_hf(hf_config()))))
    save_file(tensors, tmp_path / "theirs", metadata={"format": "pt"})
    header = (tmp_path / SINGLE).read_bytes()[:8]
    assert int.from_bytes(header, "little") % 8 == 0
    sizes = [(tmp_path / name).stat().st_size for name in (SINGLE, "theirs")]
    assert abs(sizes[0] - sizes[1]) <= 8  # blanks that align the header


# --- the orbax form in use


def test_traces_do_not_depend_on_the_form(pair, tmp_path):
    given_ = ["--tokens", "1,2,3", "--dtype", "float32"]
    for form in FORMATS:
        model = ["--model", str(pair / form), "--out", str(tmp_path / form)]
        assert trace.main([*model, *given_]) == 0
    hf, orbax = contents(tmp_path / "hf"), contents(tmp_path / "orbax")
    manifests = [json.loads(each.pop(MANIFEST)) for each in (hf, orbax)]
    assert hf == orbax and len(hf) > 30
    for each in manifests:
        each["model"].pop("name")
        assert len(each["model"]["weights"]) == 27
    assert manifests[0] == manifests[1]
    assert diff.main([str(tmp_path / "hf"), str(tmp_path / "orbax")]) == 0
    (tmp_path / "hf" / MANIFEST).unlink()
    foreign = [str(tmp_path / "hf"), "--model", str(pair / "orbax"), "--tokens", "1,2,3"]
    assert localize.main(foreign) == 0
    assert diff.main([str(tmp_path / "orbax"), *foreign]) == 0


def test_the_tokenizer_is_found(pair):
    tokenizers = [load_tokenizer(open_model(str(pair / form))) for form in FORMATS]
    assert tokenizers[0].encode("the cat").ids == tokenizers[1].encode("the cat").ids == [1, 3]


def test_rows_are_the_same_however_they_are_cut(tmp_path, monkeypatch):
    """Over the borders of chunks, of which the last is shorter, and of what is written at once."""
    monkeypatch.setattr(orbax_module, "CHUNK", 7 * 24 * 4)
    monkeypatch.setattr(orbax_module, "WRITE", 15 * 24 * 4)
    directory = write_checkpoint(tmp_path / "hf", vocab_size=48)
    assert convert.main([str(directory), str(tmp_path / "orbax")]) == 0
    model, orbax = (open_model(str(tmp_path / form)) for form in FORMATS)
    files = {"driver": "file", "path": f"{tmp_path / 'orbax' / PARAMS}/"}
    kvstore = {"driver": "ocdbt", "base": files, "path": f"{EMBEDDING}/"}
    stored = tensorstore.open({"driver": "zarr3", "kvstore": kvstore}).result()
    assert stored.chunk_layout.read_chunk.shape == (7, 24)
    for start in range(48):
        for stop in range(start + 1, 49):
            rows = orbax.rows(EMBEDDING, start, stop)
            assert rows.tobytes() == model.rows(EMBEDDING, start, stop).tobytes()
    assert (
        orbax.gather(EMBEDDING, np.array([0, 6, 7, 47])).tobytes()
        == model.gather(EMBEDDING, np.array([0, 6, 7, 47])).tobytes()
    )


RESTORE = """
import json, sys
import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec as P, SingleDeviceSharding
from qwen_jax.weights import open_model
model = open_model(sys.argv[1])
devices = jax.devices()
assert len(devices) == 8
mesh = Mesh(np.array(devices).reshape(2, 4), ("a", "b"))
specs = {1: [P("b"), P()], 2: [P("a", "b"), P("b", None), P(None, "a"), P(("a", "b"), None)]}
wanted = {}
for number, (name, shape) in enumerate(model.shapes.items()):
    choices = specs[len(shape)]
    wanted[name] = NamedSharding(mesh, choices[number % len(choices)])
wanted["model.norm.weight"] = SingleDeviceSharding(devices[5])
shards = 0
for asked in (wanted, dict(list(wanted.items())[3:5])):
    restored = model.restore(asked)
    assert restored.keys() == asked.keys()
    for name, array in restored.items():
        assert array.sharding == asked[name], name
        whole = model.read(name)
        assert (array.shape, array.dtype) == (whole.shape, whole.dtype), name
        for shard in array.addressable_shards:
            shards += shard.data.size < array.size
            assert np.asarray(shard.data).tobytes() == whole[shard.index].tobytes(), name
try:
    model.restore({"model.other": wanted["model.norm.weight"]})
except KeyError as error:
    print(error, shards)
odd = Mesh(np.array(devices[:5]), ("c",))
try:
    model.restore({"model.norm.weight": NamedSharding(odd, P("c"))})
except ValueError as error:
    print("indivisible")
"""


def test_restored_to_any_sharding(pair):
    """In a process of its own: eight devices."""
    flags = {"XLA_FLAGS": "--xla_force_host_platform_device_count=8", "JAX_PLATFORMS": "cpu"}
    done = subprocess.run(
        [sys.executable, "-c", RESTORE, pair / "orbax"],
        env=user_environment() | flags,
        capture_output=True,
        encoding="utf-8",
    )
    assert done.returncode == 0, done.stderr
    name, shards, error = done.stdout.split()
    assert name == "'model.other'" and int(shards) > 100 and error == "indivisible"


def test_orbax_reads_it_by_itself(pair):
    """What lies there is orbax's own format, tree and all, with the names of Hugging Face."""
    from flax.traverse_util import flatten_dict
    from orbax.checkpoint import PyTreeCheckpointer

    found = flatten_dict(PyTreeCheckpointer().restore((pair / "orbax" / PARAMS).resolve()), sep=".")
    model = HuggingFaceWeights(pair / "hf")
    assert found.keys() == model.shapes.keys()
    for name, array in found.items():
        assert np.asarray(array).tobytes() == model.read(name).tobytes()


def test_zeros_are_stored(tmp_path):
    """TensorStore leaves chunks of zeros out unless told otherwise, and orbax misses them."""
    from orbax.checkpoint import PyTreeCheckpointer

    tensors = {"w": np.zeros((5, 3), np.float32), "b": np.ones(3, np.float32)}
    write_orbax(tmp_path / "m", tensors)
    found = PyTreeCheckpointer().restore((tmp_path / "m" / PARAMS).resolve())
    assert all((found[name] == tensor).all() for name, tensor in tensors.items())


def test_an_orbax_that_sees_something_else(pair, tmp_path, monkeypatch):
    """One that would keep the shapes, say, in files of its own: nothing is written for it."""
    import orbax.checkpoint as ocp

    seen = SimpleNamespace(tree={"w": SimpleNamespace(shape=(1,), dtype=np.uint8)})
    told = SimpleNamespace(item_metadata=seen)
    monkeypatch.setattr(ocp.Checkpointer, "metadata", lambda self, path: told)
    with pytest.raises(UserError, match=f"orbax-checkpoint {ocp.__version__} does not see"):
        convert.main([str(pair / "hf"), str(tmp_path / "x")])
    assert list(tmp_path.iterdir()) == []


# --- orbax directories that will not do


def write_orbax(directory, tensors, **config):
    directory.mkdir()
    assert sum(orbax_module.write(directory, Tensors(tensors)))
    write_json(directory / "config.json", hf_config(**config))
    return directory


def test_tensors_that_do_not_fit(tmp_path):
    """orbax itself casts a wrong dtype without a word."""
    tensors = random_tensors(hf_config())
    del tensors[NORM]
    tensors["optimizer.step"] = np.ones(1, np.float32)
    tensors[EMBEDDING] = tensors[EMBEDDING][:47]
    tensors[UP] = tensors[UP].astype(np.float64)
    message = refusal(write_orbax(tmp_path / "m", tensors))
    assert f"missing 1 tensor ({NORM})" in message
    assert "unexpected 1 tensor (optimizer.step)" in message
    assert f"{EMBEDDING} is [47, 24], not [48, 24], {UP} is float64, not one of float32" in message


def test_the_config_of_another_model(orbax):
    write_json(orbax / "config.json", hf_config(tie_word_embeddings=True))
    assert f"unexpected 1 tensor ({HEAD})" in refusal(orbax)
    write_json(orbax / "config.json", hf_config(hidden_size=32))
    assert "mismatches" in refusal(orbax)
    (orbax / "config.json").unlink()
    assert "no such file" in refusal(orbax)


@pytest.mark.parametrize("where", [".", "default", "state"])
def test_a_training_checkpoint(tmp_path, where):
    import orbax.checkpoint as ocp

    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "m" / where, {"step": np.int32(3), "w": np.ones(3)})
    assert "none of a whole model that python -m tools.convert has written" in refusal(
        tmp_path / "m"
    )
    write_json(tmp_path / "m" / "config.json", hf_config())
    assert f"no {MARK}" in refusal(tmp_path / "m")


def test_an_orbax_folder_in_a_hugging_face_directory_is_no_matter(pair, tmp_path):
    model = write_checkpoint(tmp_path / "m")
    shutil.copytree(pair / "orbax" / PARAMS, model / "training")
    assert type(open_model(str(model))) is HuggingFaceWeights


def test_the_params_alone(pair):
    assert f"no {MARK}" in refusal(pair / "orbax" / PARAMS)


def test_every_file_matters(orbax):
    """Whichever is missing or cut short, it is said before anything is read."""
    files = sorted(path for path in (orbax / PARAMS).rglob("*") if path.is_file())
    assert len(files) > 5
    for path in files:
        content = path.read_bytes()
        if content:
            os.truncate(path, len(content) - 1)
            assert "1 file (" in refusal(orbax) and path.name in refusal(orbax)
        path.unlink()
        assert f"{path.name}) missing or cut short" in refusal(orbax)
        path.write_bytes(content)
    open_model(str(orbax))


def test_a_damaged_bit(orbax, pair):
    """Found by a checksum, if it is in anything that is read. Never a wrong number."""
    right, refused = bits(HuggingFaceWeights(pair / "hf")), []
    random = np.random.default_rng(0)
    files = sorted((orbax / PARAMS).rglob("d/*"), key=lambda path: path.stat().st_size)
    for path in files:
        content = path.read_bytes()
        for place in random.integers(len(content), size=2):
            damaged = bytearray(content)
            damaged[place] ^= 1
            path.write_bytes(damaged)
            try:
                assert bits(open_model(str(orbax))) == right
            except UserError as error:
                refused.append(path)
                assert "cannot be read: " in str(error) and len(str(error).splitlines()) == 1
        path.write_bytes(content)
    assert refused[-2:] == 2 * files[-1:]  # the last that was written


@pytest.mark.parametrize(
    "mark", [{}, {"schema": 2, "kind": "qwen2-orbax-model"}, {"schema": 1, "kind": "x"},
             {"schema": 1, "kind": "qwen2-orbax-model", "files": []}],
)  # fmt: skip
def test_a_mark_of_another_kind(orbax, mark):
    write_json(orbax / MARK, mark)
    assert MARK in refusal(orbax)


def test_the_oracle_says_what_to_do(pair, run_cli):
    result = run_cli("oracle.trace", "--model", pair / "orbax", "--tokens", "1")
    assert (result.code, result.stdout) == (2, "")
    (line,) = result.stderr.splitlines()
    assert line.endswith(f"write one first: python -m tools.convert {pair / 'orbax'} DIR")


# --- nothing half


def test_what_is_there_is_not_touched(pair, tmp_path):
    for name in ("file", "link"):
        target = tmp_path / name
        target.write_text("mine") if name == "file" else target.symlink_to("nowhere")
        with pytest.raises(UserError, match="already exists"):
            convert.main([str(pair / "hf"), str(target)])
    (tmp_path / "x.partial").mkdir()
    (tmp_path / "x.partial" / "mine").touch()
    with pytest.raises(UserError, match="in the way"):
        convert.main([str(pair / "hf"), str(tmp_path / "x")])
    assert [path.name for path in (tmp_path / "x.partial").iterdir()] == ["mine"]
    with pytest.raises(UserError, match="no such directory"):
        convert.main([str(pair / "hf"), str(tmp_path / "a" / "b")])
    (tmp_path / "x.partial" / UNFINISHED).touch()
    (tmp_path / "y.partial").symlink_to("x.partial")
    with pytest.raises(UserError, match="in the way"):
        convert.main([str(pair / "hf"), str(tmp_path / "y")])
    assert (tmp_path / "x.partial" / "mine").exists()


def test_a_disk_that_is_too_small(pair, tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=1000))
    with pytest.raises(UserError, match=r"the model needs 25\.8 kB, the disk has 1\.0 kB free"):
        convert.main([str(pair / "hf"), str(tmp_path / "x")])
    assert list(tmp_path.iterdir()) == []


def command(*args):
    return [sys.executable, "-m", "tools.convert", *map(str, args)]


@pytest.mark.parametrize("to", FORMATS)
def test_a_disk_that_fills_half_way(tmp_path, to):
    """A limit on the size of files stands in for it."""

    shell = ["bash", "-c", 'ulimit -f 10000; exec "$@"', "bash"]
    done = subprocess.run(
        [*shell, *command("synthetic:0.5b:1", tmp_path / "x", "--to", to)],
        env=user_environment(),
        capture_output=True,
        encoding="utf-8",
    )
    assert (done.returncode, done.stdout) == (2, "")
    (line,) = done.stderr.splitlines()
    assert line == f"error: {tmp_path / 'x'}: writing stopped: File too large; nothing was kept"
    assert list(tmp_path.iterdir()) == []


def test_what_is_left_of_a_failed_write_is_said(tmp_path, monkeypatch):
    def fails(directory):
        raise OSError(5, "Input/output error")

    with (
        pytest.raises(UserError, match=r"No space.*; .*x\.partial is left; remove it$"),
        convert.unfinished(tmp_path / "x"),
    ):
        monkeypatch.setattr(convert, "_clear", fails)
        raise OSError(28, "No space left on device")
    assert (tmp_path / "x.partial" / UNFINISHED).exists()  # so no command takes it for a model


def test_a_failed_write_waits_for_all_of_its_chunks():
    """None goes on in a directory that is about to be removed."""
    waited = []

    class Writing:
        def __init__(self, first):
            self.first = first

        def result(self):
            if self.first == 4:
                raise ValueError("full")

        def exception(self):
            waited.append(self.first)

    class Store:
        def __getitem__(self, rows):
            return SimpleNamespace(write=lambda part: Writing(rows.start))

    with pytest.raises(ValueError, match="full"):
        orbax_module.write_rows(Store(), 4, np.zeros((7, 2)), chunk=3)
    assert waited == [4, 7, 10]


def started(tmp_path, to):
    """A conversion that has begun to write."""
    with interruptible():
        process = subprocess.Popen(
            command("synthetic:3b", tmp_path / "x", "--to", to),
            env=user_environment(),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            encoding="utf-8",
        )
    while process.poll() is None:
        with suppress(FileNotFoundError):  # orbax renames its folder
            if sum(path.stat().st_size for path in tmp_path.rglob("x.partial/**/*")) > 1 << 20:
                return process
        time.sleep(0.02)
    raise AssertionError(process.communicate())


@pytest.mark.parametrize("to", FORMATS)
def test_interrupted(tmp_path, to):
    process = started(tmp_path, to)
    process.send_signal(signal.SIGINT)
    assert process.communicate() == ("", "interrupted\n") and process.returncode == 130
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("to", FORMATS)
def test_killed(pair, tmp_path, to):
    """What is left is no model, and the next conversion takes its place."""
    process = started(tmp_path, to)
    process.kill()
    process.communicate()
    assert [path.name for path in tmp_path.iterdir()] == ["x.partial"]
    refusal(tmp_path / "x.partial")
    assert convert.main([str(pair / "hf"), str(tmp_path / "x"), "--to", to]) == 0
    assert bits(open_model(str(tmp_path / "x"))) == bits(HuggingFaceWeights(pair / "hf"))
    assert [path.name for path in tmp_path.iterdir()] == ["x"]


@pytest.mark.parametrize("to", FORMATS)
def test_killed_while_it_reads_back(pair, tmp_path, monkeypatch, to):
    """All of a model is there, but nobody has compared it."""
    left = tmp_path / "x.partial"
    with monkeypatch.context() as patch:
        patch.setattr(convert, "read_back", lambda *args: shutil.copytree(args[2], left))
        assert convert.main([str(pair / "hf"), str(tmp_path / "y"), "--to", to]) == 0
    message = refusal(left)
    assert "an unfinished conversion: run python -m tools.convert again" in message
    assert convert.main([str(pair / "hf"), str(tmp_path / "x"), "--to", to]) == 0
    open_model(str(tmp_path / "x"))


def test_two_at_once(pair, tmp_path):
    partial = tmp_path / "x.partial"
    partial.mkdir()
    (partial / UNFINISHED).touch()
    (partial / "theirs").touch()
    descriptor = os.open(partial, os.O_RDONLY)
    fcntl.flock(descriptor, fcntl.LOCK_EX)
    with pytest.raises(UserError, match="another process is converting there"):
        convert.main([str(pair / "hf"), str(tmp_path / "x")])
    assert (partial / "theirs").exists()
    os.close(descriptor)
    assert convert.main([str(pair / "hf"), str(tmp_path / "x")]) == 0


@pytest.mark.parametrize("to", FORMATS)
def test_what_reads_back_otherwise(pair, tmp_path, monkeypatch, to):
    """A write that went wrong without a word."""
    module = orbax_module if to == "orbax" else huggingface
    write = module.write

    def wrong(directory, model):
        return write(directory, Tensors(bent(model)))

    def bent(model):
        tensors = {name: model.read(name) for name in model.shapes}
        tensors[UP].view(np.uint16)[39, 23] ^= 1
        return tensors

    monkeypatch.setattr(module, "write", wrong)
    with pytest.raises(UserError, match=f"{UP} reads back otherwise"):
        convert.main([str(pair / "hf"), str(tmp_path / "x"), "--to", to])
    assert list(tmp_path.iterdir()) == []


def test_a_source_that_is_damaged(tmp_path):
    write_checkpoint(tmp_path / "m", shards=2)
    (tmp_path / "m" / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(UserError, match="missing 1 shard"):
        convert.main([str(tmp_path / "m"), str(tmp_path / "x")])
    assert [path.name for path in tmp_path.iterdir()] == ["m"]


# --- the command


@pytest.mark.parametrize("to", FORMATS)
def test_memory_is_bounded(tmp_path, to):
    """A tensor of 272 MB, of which neither form holds even one copy."""
    probe = (
        "import sys\nfrom pathlib import Path\nfrom tools import convert\n"
        "convert.main(sys.argv[1:])\n"
        "status = Path('/proc/self/status').read_text().split()\n"
        "print(status[status.index('VmHWM:') + 1])\n"
    )
    if not Path("/proc/self/status").exists():
        pytest.skip("needs /proc")
    done = subprocess.run(
        [sys.executable, "-c", probe, "synthetic:0.5b:1", tmp_path / "x", "--to", to],
        env=user_environment(),
        capture_output=True,
        encoding="utf-8",
    )
    assert done.returncode == 0, done.stderr
    started_with = 60 if to == "hf" else 200  # MB: Python; and jax, orbax
    assert int(done.stdout.split()[-1]) / 1e3 < started_with + 272


def test_json(pair, tmp_path, capsys):
    assert convert.main([str(pair / "hf"), str(tmp_path / "x"), "--json", "-"]) == 0
    out, err = capsys.readouterr()
    told = json.loads(out)
    assert told.pop("seconds") > 0
    size = sum(array.nbytes for array in random_tensors(hf_config(), dtype="bfloat16").values())
    assert told == {
        "schema": 1,
        "source": str(pair / "hf"),
        "destination": str(tmp_path / "x"),
        "format": "orbax",
        "tensors": len(from_hf(hf_config()).shapes),
        "bytes": size,
    }
    assert "orbax, 27 tensors, 25.8 kB" in err and "read back and compared" in err


def test_help_costs_no_import_of_jax(run_cli):
    code = (
        "import sys\nfrom tools import convert\n"
        "try: convert.main(['--help'])\nexcept SystemExit: pass\n"
        "print({'jax', 'orbax', 'tensorstore', 'torch'} & sys.modules.keys())"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, encoding="utf-8"
    )
    assert done.stdout.splitlines()[-1] == "set()" and "--to {hf,orbax}" in done.stdout
