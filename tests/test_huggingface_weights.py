"""Hugging Face directories: what is published is read exactly, what is damaged not at all."""

import json
import os
import subprocess
import sys
from fnmatch import fnmatch
from pathlib import Path

import huggingface_hub
import ml_dtypes
import numpy as np
import pytest
import xxhash
from safetensors.numpy import load_file, save_file

from qwen_jax.config import from_hf
from qwen_jax.forward import read_parameters
from qwen_jax.weights import open_model
from qwen_jax.weights.huggingface import INDEX, SINGLE, HuggingFaceWeights
from stages.errors import UserError
from stages.manifest import WeightEntry
from tests.tiny import hf_config, random_tensors, write_checkpoint, write_json, write_tensors

EMBED = "model.embed_tokens.weight"
HEAD = "lm_head.weight"
NORM = "model.norm.weight"
UP = "model.layers.1.mlp.up_proj.weight"
FLOATS = ("float32", "bfloat16", "float16")


def refusal(directory):
    with pytest.raises(UserError) as error:
        HuggingFaceWeights(directory)
    message = str(error.value)
    assert len(message.splitlines()) == 1 and str(directory) in message
    return message


def changed(directory, change):
    """Rewrite the tensors of a single-file checkpoint after ``change(tensors)``."""
    tensors = load_file(directory / SINGLE)
    change(tensors)
    save_file(tensors, directory / SINGLE)


def reindexed(directory, change):
    """Rewrite the weight map of a sharded checkpoint after ``change(weight_map)``."""
    data = json.loads((directory / INDEX).read_text())
    change(data["weight_map"])
    write_json(directory / INDEX, data)


# --- what there must be


LAYER = {
    "input_layernorm.weight": (24,),
    "self_attn.q_proj.weight": (32, 24),
    "self_attn.k_proj.weight": (16, 24),
    "self_attn.v_proj.weight": (16, 24),
    "self_attn.o_proj.weight": (24, 32),
    "post_attention_layernorm.weight": (24,),
    "mlp.gate_proj.weight": (40, 24),
    "mlp.up_proj.weight": (40, 24),
    "mlp.down_proj.weight": (24, 40),
}
OWN = {
    "qwen2": {
        "self_attn.q_proj.bias": (32,),
        "self_attn.k_proj.bias": (16,),
        "self_attn.v_proj.bias": (16,),
    },
    "qwen3": {"self_attn.q_norm.weight": (8,), "self_attn.k_norm.weight": (8,)},
}


@pytest.mark.parametrize("architecture", OWN)
def test_the_tensors_of_a_model(architecture):
    """A literal: 12 or 11 tensors a layer and three around them, [out, in]."""
    shapes = from_hf(hf_config(model_type=architecture, num_hidden_layers=1)).shapes
    layer = LAYER | OWN[architecture]
    assert shapes == {f"model.layers.0.{name}": shape for name, shape in layer.items()} | {
        "model.embed_tokens.weight": (48, 24),
        "model.norm.weight": (24,),
        "lm_head.weight": (48, 24),
    }


def test_a_tied_model_has_no_head():
    tied = from_hf(hf_config(tie_word_embeddings=True)).shapes
    assert from_hf(hf_config()).shapes.keys() - tied.keys() == {HEAD}


@pytest.mark.parametrize("shards", [1, 3])
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("architecture", OWN)
def test_every_tensor_is_read_exactly(tmp_path, architecture, dtype, shards):
    raw = hf_config(model_type=architecture)
    directory = write_checkpoint(
        tmp_path / "tiny", model_type=architecture, shards=shards, dtype=dtype
    )
    model = HuggingFaceWeights(directory)
    assert model.name == "tiny" and model.config == from_hf(raw)
    for name, expected in random_tensors(raw, dtype=dtype).items():
        found = model.read(name)
        assert (found.dtype, found.shape) == (expected.dtype, expected.shape)
        assert found.tobytes() == expected.tobytes()
        xxh3 = xxhash.xxh3_64_hexdigest(expected.tobytes())
        assert model.hashes[name] == WeightEntry(dtype=dtype, shape=expected.shape, xxh3=xxh3)
    assert model.hashes.keys() == model.config.shapes.keys()


def test_dtypes_may_be_mixed(tmp_path):
    write_checkpoint(tmp_path, dtype="bfloat16")
    changed(tmp_path, lambda tensors: tensors.update({NORM: np.ones(24, np.float32)}))
    model = HuggingFaceWeights(tmp_path)
    assert model.read(NORM).dtype == np.float32
    assert model.read(EMBED).dtype == ml_dtypes.bfloat16


@pytest.mark.parametrize("tied", [False, True])
def test_parameters_are_read_by_name(tmp_path, tied):
    model = HuggingFaceWeights(write_checkpoint(tmp_path, tie_word_embeddings=tied))
    layer, end = read_parameters(model, "layer", 1), read_parameters(model, "end")
    assert layer["up_proj"].tobytes() == model.read(UP).tobytes() and len(layer) == 12
    assert end.keys() == {"norm", "lm_head"}
    assert end["lm_head"].tobytes() == model.read(EMBED if tied else HEAD).tobytes()


def test_nothing_is_read_before_it_is_asked_for(tmp_path):
    assert HuggingFaceWeights(write_checkpoint(tmp_path)).hashes == {}


def test_hashes_do_not_depend_on_the_files(tmp_path):
    hashes = []
    for shards in (1, 2):
        model = HuggingFaceWeights(write_checkpoint(tmp_path / str(shards), shards=shards))
        for name in model.config.shapes:
            model.read(name)
        hashes.append(model.hashes)
    assert hashes[0] == hashes[1]


def test_old_rotary_buffers_are_no_weights(tmp_path):
    write_checkpoint(tmp_path)
    name = "model.layers.0.self_attn.rotary_emb.inv_freq"
    changed(tmp_path, lambda tensors: tensors.update({name: np.ones(4, np.float32)}))
    HuggingFaceWeights(tmp_path)


# --- tied heads


def test_a_tied_head_that_is_there_is_the_embedding(tmp_path):
    write_checkpoint(tmp_path, tie_word_embeddings=True)
    plain = HuggingFaceWeights(tmp_path)
    plain.read(EMBED)
    changed(tmp_path, lambda tensors: tensors.update({HEAD: tensors[EMBED].copy()}))
    with pytest.raises(UserError, match="changed while it was being read"):
        plain.read(EMBED)
    model = HuggingFaceWeights(tmp_path)
    model.read(EMBED)
    assert model.hashes == plain.hashes and HEAD not in model.hashes
    assert model.shapes == plain.shapes


def test_a_tied_head_may_hold_nan(tmp_path):
    write_checkpoint(tmp_path, tie_word_embeddings=True)

    def change(tensors):
        tensors[EMBED][3, 4] = np.nan
        tensors[HEAD] = tensors[EMBED].copy()

    changed(tmp_path, change)
    HuggingFaceWeights(tmp_path)


def test_a_tied_head_that_differs(tmp_path):
    write_checkpoint(tmp_path, tie_word_embeddings=True)

    def change(tensors):
        tensors[HEAD] = tensors[EMBED].copy()
        tensors[HEAD][47, 23] = np.nextafter(tensors[HEAD][47, 23], np.float32(9))

    changed(tmp_path, change)
    assert f"{HEAD} is there and differs" in refusal(tmp_path)


@pytest.mark.parametrize(
    ("head", "says"),
    [
        (np.ones((48, 25), np.float32), "[48, 25], not [48, 24]"),
        (np.ones((48, 24), np.int8), "I8"),
        (np.ones((48, 24), np.float16), "differs"),
    ],
)
def test_a_tied_head_of_another_shape_or_dtype(tmp_path, head, says):
    write_checkpoint(tmp_path, tie_word_embeddings=True)
    changed(tmp_path, lambda tensors: tensors.update({HEAD: head}))
    assert says in refusal(tmp_path)


def test_an_untied_model_without_a_head(tmp_path):
    write_checkpoint(tmp_path)
    changed(tmp_path, lambda tensors: tensors.pop(HEAD))
    assert f"missing 1 tensor ({HEAD})" in refusal(tmp_path)


# --- tensors that do not fit


def test_everything_that_does_not_fit_is_said_at_once(tmp_path):
    write_checkpoint(tmp_path)

    def change(tensors):
        del tensors[NORM]
        tensors["model.norm.bias"] = np.ones(24, np.float32)
        tensors[EMBED] = np.ones((49, 24), np.float32)
        tensors[UP] = np.ones((40, 24), np.float64)

    changed(tmp_path, change)
    message = refusal(tmp_path)
    assert f"missing 1 tensor ({NORM})" in message
    assert "unexpected 1 tensor (model.norm.bias)" in message
    assert f"2 mismatches ({EMBED} is [49, 24], not [48, 24], {UP} is F64, not one of" in message


def test_many_faults_are_counted_and_some_named(tmp_path):
    write_checkpoint(tmp_path)
    write_json(tmp_path / "config.json", hf_config(num_hidden_layers=3, hidden_size=32))
    message = refusal(tmp_path)
    assert "missing 12 tensors (model.layers.2.input_layernorm.weight, " in message
    assert "mismatches (model.embed_tokens.weight is [48, 24], not [48, 32]" in message
    assert message.count("...") == 2 and len(message) < 700


def test_layers_that_the_config_does_not_have(tmp_path):
    write_checkpoint(tmp_path)
    write_json(tmp_path / "config.json", hf_config(num_hidden_layers=1))
    assert "unexpected 12 tensors (model.layers.1.input_layernorm" in refusal(tmp_path)


def test_the_tensors_of_another_architecture(tmp_path):
    write_checkpoint(tmp_path)
    write_json(tmp_path / "config.json", hf_config(model_type="qwen3"))
    message = refusal(tmp_path)
    assert "missing 4 tensors (model.layers.0.self_attn.q_norm.weight, " in message
    assert "unexpected 6 tensors (model.layers.0.self_attn.k_proj.bias, " in message


@pytest.mark.parametrize("shape", [(24, 40), (960,), (40, 24, 1)])
def test_a_shape_of_the_same_size(tmp_path, shape):
    write_checkpoint(tmp_path)
    changed(tmp_path, lambda tensors: tensors.update({UP: np.ones(shape, np.float32)}))
    assert f"{UP} is {list(shape)}, not [40, 24]" in refusal(tmp_path)


@pytest.mark.parametrize("dtype", ["F8_E4M3", "F4"])
def test_a_dtype_that_numpy_lacks(tmp_path, dtype):
    write_checkpoint(tmp_path)
    size = 24 if dtype == "F8_E4M3" else 12
    content = (tmp_path / SINGLE).read_bytes()
    length = int.from_bytes(content[:8], "little")
    told, body = json.loads(content[8 : 8 + length]), content[8 + length :]
    told |= {NORM: {"dtype": dtype, "shape": [24], "data_offsets": [len(body), len(body) + size]}}
    first, last = json.loads(content[8 : 8 + length])[NORM]["data_offsets"]
    told["unused"] = {"dtype": "F32", "shape": [24], "data_offsets": [first, last]}
    header = json.dumps(told).encode()
    parts = [len(header).to_bytes(8, "little"), header, body, bytes(size)]
    (tmp_path / SINGLE).write_bytes(b"".join(parts))
    assert f"{NORM} is {dtype}, not one of F32, BF16, F16" in refusal(tmp_path)


# --- files that are damaged


@pytest.mark.parametrize("shards", [1, 2])
@pytest.mark.parametrize("length", [0, 7, 8, 100, -1])
def test_a_file_cut_short(tmp_path, length, shards):
    write_checkpoint(tmp_path, shards=shards)
    path = sorted(tmp_path.glob("*.safetensors"))[-1]
    os.truncate(path, length % path.stat().st_size)
    assert f"{path} is not a whole safetensors file" in refusal(tmp_path)


@pytest.mark.parametrize(
    "content",
    [
        b"version https://git-lfs.github.com/spec/v1\noid sha256:0000\nsize 988097824\n",
        b"PK\x03\x04" + bytes(100),
        b"\x02\0\0\0\0\0\0\0[]",
        b"\xff" * 100,
    ],
)
def test_a_file_of_another_kind(tmp_path, content):
    (write_checkpoint(tmp_path) / SINGLE).write_bytes(content)
    assert f"{tmp_path / SINGLE} is not a whole safetensors file" in refusal(tmp_path)


def test_bytes_after_the_end(tmp_path):
    path = write_checkpoint(tmp_path) / SINGLE
    path.write_bytes(path.read_bytes() + b"\0")
    assert "not a whole safetensors file" in refusal(tmp_path)


@pytest.mark.parametrize("offset", [8, 9, 20, 60])
def test_a_damaged_header(tmp_path, offset):
    path = write_checkpoint(tmp_path) / SINGLE
    content = bytearray(path.read_bytes())
    content[offset] = 0
    path.write_bytes(content)
    assert str(tmp_path) in refusal(tmp_path)


# --- shards


def test_a_missing_shard(tmp_path):
    write_checkpoint(tmp_path, shards=3)
    (tmp_path / "model-00002-of-00003.safetensors").unlink()
    assert "missing 1 shard (model-00002-of-00003.safetensors)" in refusal(tmp_path)


def test_an_index_that_lists_what_its_shard_lacks(tmp_path):
    write_checkpoint(tmp_path, shards=2)
    first = "model-00001-of-00002.safetensors"
    reindexed(tmp_path, lambda weight_map: weight_map.update({"model.extra": first}))
    assert "lists 1 tensor (model.extra) that its shard lacks" in refusal(tmp_path)


def test_an_index_that_disagrees_about_where_a_tensor_lies(tmp_path):
    write_checkpoint(tmp_path, shards=2)

    def change(weight_map):
        files = sorted(set(weight_map.values()))
        weight_map[NORM] = next(file for file in files if file != weight_map[NORM])

    reindexed(tmp_path, change)
    assert f"lists 1 tensor ({NORM}) that its shard lacks" in refusal(tmp_path)


def test_an_index_that_lists_a_tensor_twice(tmp_path):
    """JSON readers keep the last of two, silently: here the one that is true."""
    write_checkpoint(tmp_path, shards=2)
    text = (tmp_path / INDEX).read_text()
    line = next(line for line in text.splitlines() if NORM in line).rstrip(",")
    other = line.replace("00001-of", "0000X-of").replace("00002-of", "00001-of")
    other = other.replace("0000X-of", "00002-of")
    (tmp_path / INDEX).write_text(text.replace(line, f"{other},\n{line}"))
    assert json.loads((tmp_path / INDEX).read_text()) == json.loads(text)
    assert f"{INDEX} has '{NORM}' twice" in refusal(tmp_path)


def test_an_index_that_does_not_list_all(tmp_path):
    """The shards say what they hold; transformers reads them whole too."""
    write_checkpoint(tmp_path, shards=2)
    reindexed(tmp_path, lambda weight_map: weight_map.pop(NORM))
    assert HuggingFaceWeights(tmp_path).read(NORM).shape == (24,)


def test_a_tensor_in_two_shards(tmp_path):
    write_checkpoint(tmp_path, shards=2)
    paths = sorted(tmp_path.glob("*.safetensors"))
    parts = [load_file(path) for path in paths]
    parts[EMBED in parts[0]][EMBED] = parts[EMBED not in parts[0]][EMBED]
    for path, part in zip(paths, parts, strict=True):
        save_file(part, path)
    assert f"1 tensor ({EMBED}) in two shards" in refusal(tmp_path)


@pytest.mark.parametrize("shard", ["../x.safetensors", "/x.safetensors", "a/x.safetensors", ".."])
def test_a_shard_outside_of_the_directory(tmp_path, shard):
    model = write_checkpoint(tmp_path / "model", shards=2)
    (tmp_path / "model" / "a").mkdir()
    for outside in (tmp_path, tmp_path / "model" / "a"):
        write_tensors(outside, {NORM: np.ones(24, np.float32)})
        (outside / SINGLE).rename(outside / "x.safetensors")
    reindexed(model, lambda weight_map: weight_map.update({NORM: shard}))
    assert f"outside its directory: {shard!r}" in refusal(model)


@pytest.mark.parametrize("content", [[], {}, {"weight_map": []}, {"weight_map": {NORM: 1}},
                                     {"weight_map": {NORM: ["x"]}}])  # fmt: skip
def test_an_index_of_another_kind(tmp_path, content):
    write_checkpoint(tmp_path, shards=2)
    write_json(tmp_path / INDEX, content)
    assert INDEX in refusal(tmp_path)


def test_an_index_that_is_damaged(tmp_path):
    write_checkpoint(tmp_path, shards=2)
    os.truncate(tmp_path / INDEX, 100)
    assert "JSON" in refusal(tmp_path)


def test_a_single_file_and_shards(tmp_path):
    write_checkpoint(tmp_path, shards=2)
    write_checkpoint(tmp_path, seed=1)
    assert "has both" in refusal(tmp_path)


@pytest.mark.parametrize("name", ["config.json", SINGLE])
def test_a_pipe_is_not_waited_for(tmp_path, name):
    directory = write_checkpoint(tmp_path / "m")
    (directory / name).unlink()
    os.mkfifo(directory / name)
    assert "pipe" in refusal(directory)


def test_a_pipe_among_the_companions_is_not_left_away(tmp_path):
    directory = write_checkpoint(tmp_path / "m")
    (directory / "tokenizer.json").unlink(missing_ok=True)
    os.mkfifo(directory / "tokenizer.json")
    with pytest.raises(UserError, match="pipe"):
        open_model(directory).companions()


@pytest.mark.parametrize("layers", [4097, 3_000_000, 10**18])
def test_layers_that_no_model_has(tmp_path, layers):
    """Refused before anything is made for each of them."""
    directory = write_checkpoint(tmp_path / "m")
    data = json.loads((directory / "config.json").read_text())
    data.pop("layer_types", None)
    write_json(directory / "config.json", data | {"num_hidden_layers": layers})
    assert f"num_hidden_layers is {layers}" in refusal(directory)


def test_shards_may_be_links_as_in_the_hub_cache(tmp_path):
    model = write_checkpoint(tmp_path / "model", shards=2)
    (tmp_path / "blobs").mkdir()
    for number, path in enumerate(sorted(model.iterdir())):
        path.rename(tmp_path / "blobs" / str(number))
        path.symlink_to(Path("..") / "blobs" / str(number))
    assert HuggingFaceWeights(model).read(NORM).shape == (24,)


# --- what is no checkpoint


def test_what_is_no_checkpoint(tmp_path):
    assert "no such model directory" in refusal(tmp_path / "absent")
    (tmp_path / "file").write_bytes(b"")
    assert "is a file; expected a model directory" in refusal(tmp_path / "file")
    assert "has no config.json" in refusal(tmp_path)
    write_json(tmp_path / "config.json", hf_config())
    assert f"has neither {SINGLE} nor {INDEX}" in refusal(tmp_path)
    write_json(tmp_path / "config.json", hf_config(model_type="llama"))
    assert "'llama'" in refusal(tmp_path)


# --- the hub


def test_a_hub_id_offline(tmp_path):
    """One line, at once: the whole command in a process of its own."""
    command = [sys.executable, "-m", "qwen_jax.trace", "--model", "Nobody/has-this"]
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path)}
    root = Path(__file__).parent.parent
    result = subprocess.run(
        command, cwd=root, env=environment, capture_output=True, text=True, timeout=30
    )
    assert (result.returncode, result.stdout) == (2, "")
    (line,) = result.stderr.splitlines()
    assert line.startswith("error: Nobody/has-this: neither a directory here nor to be had")


def fake_hub(monkeypatch, answer):
    asked = []

    def snapshot_download(repo_id, **options):
        asked.append((repo_id, options))
        if isinstance(answer, Exception):
            raise answer
        return str(answer)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    return asked


@pytest.mark.parametrize(
    "error",
    [
        ConnectionError(""),
        OSError(28, "No space left on device"),
        ValueError("Cannot have -- or .. in repo_id: 'a/b--c'."),
        RuntimeError("first line\nsecond line"),
    ],
)
def test_a_download_that_fails(monkeypatch, error):
    fake_hub(monkeypatch, error)
    with pytest.raises(UserError) as caught:
        open_model("a/b--c")
    message = str(caught.value)
    assert len(message.splitlines()) == 1 and "second" not in message
    assert (str(error).splitlines() or ["ConnectionError"])[0] in message


def test_a_download(tmp_path, monkeypatch):
    write_checkpoint(tmp_path / "0123abcd", shards=2)
    asked = fake_hub(monkeypatch, tmp_path / "0123abcd")
    model = open_model("Qwen/Qwen2.5-0.5B")
    assert model.name == "Qwen2.5-0.5B" and model.read(NORM).shape == (24,)
    ((repo, options),) = asked
    assert repo == "Qwen/Qwen2.5-0.5B"
    for file in (path.name for path in (tmp_path / "0123abcd").iterdir()):
        assert any(fnmatch(file, pattern) for pattern in options["allow_patterns"]), file
    for file in ("pytorch_model.bin", "modeling_qwen.py", "original/model.safetensors"):
        assert not any(fnmatch(file, pattern) for pattern in options["allow_patterns"]), file


def test_a_directory_here_goes_before_the_hub(tmp_path, monkeypatch):
    asked = fake_hub(monkeypatch, RuntimeError("must not be asked"))
    monkeypatch.chdir(tmp_path)
    write_checkpoint(tmp_path / "Qwen" / "tiny")
    assert open_model("Qwen/tiny").name == "tiny"
    for spec in ("./Qwen/none", "/Qwen/none", "Qwen", "a/b/c", "../Qwen/tiny", ""):
        with pytest.raises(UserError):
            open_model(spec)
    assert asked == []


@pytest.mark.parametrize("spec", [None, "demo"])
def test_the_demo_model(spec):
    assert open_model(spec).name == "demo"
