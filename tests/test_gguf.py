"""GGUF files: the values that llama.cpp decodes, the config and the tokenizer; nothing guessed."""

import json
import os
import struct
import sys
import time
import tracemalloc
import unicodedata
from functools import cache
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType
from tokenizers import Tokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging

import qwen_jax.trace as trace
from qwen_jax.config import Yarn
from qwen_jax.prompt import load_tokenizer
from qwen_jax.weights import DEMO, gguf_file, gguf_tokenizer, open_model
from qwen_jax.weights import gguf as gguf_weights
from qwen_jax.weights.gguf import GgufWeights, hf_config
from qwen_jax.weights.huggingface import HuggingFaceWeights
from qwen_jax.weights.orbax import OrbaxWeights
from stages import manifest
from stages.architectures import QWEN3
from stages.errors import UserError
from tests import ggml, tiny
from tests.ggml import BLOCKY, write_gguf
from tools import convert
from tools.localize.__main__ import main as localize

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"


def names_of(model: GgufWeights) -> dict[str, str]:
    """Hugging Face name -> the tensor's name in the file."""
    config = model.config
    tensors = config.arch.tensors(config.num_hidden_layers, config.tie_word_embeddings)
    return {name: row.gguf_name(layer) for name, (row, layer) in tensors.items()}


DEMO_TOKENIZER = json.loads((DEMO / "tokenizer.json").read_text())
NATIVE = ("F32", "F16", "BF16")
QUANTISED = (
    "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "IQ1_S",
    "IQ1_M", "IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ3_XXS", "IQ3_S", "IQ4_NL", "IQ4_XS", "TQ1_0", "TQ2_0",
    "MXFP4", "NVFP4",
)  # fmt: skip
UP = "model.layers.0.mlp.up_proj.weight"
DOWN = "model.layers.1.mlp.down_proj.weight"
TEXTS = (
    "", "The cat sat on the mat.", "  two  spaces\tand\ttabs \n\n newlines\r\n", "I'm we'LL they'd",
    "x1234567890 3.14", "naïve café Ångström", "日本語のテキスト", "🙂👍🏽 emoji", "a<|endoftext|>",
    "<|endoftext|><|endoftext|>", "def f(x):\n    return x**2  # square\n", " !?...---", "e\u0301",
    "\u212b \ufb01", "\x00\x7f", "ꦗꦮ", "[PAD5] <0x41>",
)  # fmt: skip


def same(a, b):
    return a.dtype == b.dtype and a.shape == b.shape and a.tobytes() == b.tobytes()


def refusal(path):
    """The one line with which a file is refused."""
    with pytest.raises(UserError) as error:
        open_model(str(path))
    message = str(error.value)
    assert len(message.splitlines()) == 1 and str(path.parent) in message
    return message


@pytest.fixture(scope="module")
def demo_file(tmp_path_factory):
    """The demo model as llama.cpp's converter would write it."""
    path = tmp_path_factory.mktemp("demo") / "demo.gguf"
    demo = open_model(None)
    raw = json.loads((DEMO / "config.json").read_text())
    into = ggml.writer(path, raw)
    ggml.add_tokenizer(into, DEMO_TOKENIZER)
    into.add_eos_token_id(2047)
    ggml.add_tensors(into, raw, {name: demo.read(name) for name in demo.shapes}, "BF16")
    ggml.finish(into)
    return path


@pytest.fixture(scope="module")
def of_type(tmp_path_factory):
    """A small model in a ggml type, made once: llama.cpp is slow at the smallest ones."""
    directory = tmp_path_factory.mktemp("types")

    @cache
    def make(type_):
        sizes = BLOCKY | {"num_hidden_layers": 1, "intermediate_size": 256, "vocab_size": 40}
        write_gguf(directory / f"{type_}.gguf", type_, **sizes)
        return directory / f"{type_}.gguf"

    return make


# --- values


@pytest.mark.parametrize("type_", QUANTISED)
def test_values_are_those_of_llama_cpp(of_type, type_):
    """Every bit, whichever rows are read."""
    path = of_type(type_)
    model = open_model(str(path))
    stored = {tensor.name: tensor.data for tensor in gguf.GGUFReader(path).tensors}
    assert model.zero_biases == () and len(stored) == len(model.shapes)
    for name in model.shapes:
        found, raw = model.read(name), stored[names_of(model)[name]]
        if raw.ndim == 1:
            assert model.types[name] == "F32" and same(found, raw)
            continue
        expected = ggml.dequantize(raw, type_)
        assert model.types[name] == type_ and same(found, expected)
        assert same(model.rows(name, 5, 18), expected[5:18])
        chosen = np.array([0, 7, 30])
        assert same(model.gather(name, chosen), expected[chosen])
        assert model.hashes[name].dtype == type_
        assert model.value_hash(name).dtype == "float32"


@pytest.mark.parametrize("type_", QUANTISED)
def test_any_bits_are_decoded_as_llama_cpp_does(type_):
    """No pattern raises or warns. The bits of a NaN are free."""
    size = GGML_QUANT_SIZES[GGMLQuantizationType[type_]][1]
    raw = np.random.default_rng(0).integers(0, 256, (200, 3 * size), np.uint8)
    ours, theirs = gguf_file.decode(raw, type_), ggml.dequantize(raw, type_)
    nan = np.isnan(ours)
    assert (nan == np.isnan(theirs)).all() and same(ours[~nan], theirs[~nan])


@pytest.mark.parametrize("type_", NATIVE)
def test_floats_keep_their_dtype_and_hash(tmp_path, type_):
    """A file that was not quantised has the hashes of a Hugging Face directory."""
    dtype = gguf_weights.NATIVE[type_]
    tensors = tiny.random_tensors(tiny.hf_config())
    tensors = {n: t.astype(dtype) if t.ndim == 2 else t for n, t in tensors.items()}
    write_gguf(tmp_path / "m.gguf", type_, tensors=tensors)
    directory = tiny.write_checkpoint(tmp_path / "hf")
    tiny.write_tensors(directory, tensors)
    model, expected = open_model(str(tmp_path / "m.gguf")), HuggingFaceWeights(directory)
    assert type(model) is GgufWeights and model.config == expected.config
    for name in expected.shapes:
        assert same(model.read(name), expected.read(name))
    assert model.hashes == expected.hashes
    assert all(model.value_hash(name) == model.hash(name) for name in model.shapes)


def test_the_hash_is_of_the_file(tmp_path):
    """Blocks that decode to equal values, -0 scales for 0, are told apart by it."""
    tensors = {n: 0 * t for n, t in tiny.random_tensors(tiny.hf_config(**BLOCKY)).items()}
    write_gguf(tmp_path / "a.gguf", "Q8_0", tensors=tensors, **BLOCKY)
    found = gguf_file.read(tmp_path / "a.gguf").tensors["blk.0.ffn_up.weight"]
    data = bytearray((tmp_path / "a.gguf").read_bytes())
    data[found.start + 2] ^= 1  # a quantised value under a scale of zero
    (tmp_path / "b.gguf").write_bytes(data)
    a, b = (open_model(str(tmp_path / f"{name}.gguf")) for name in "ab")
    assert (a.read(UP) == b.read(UP)).all()
    assert a.hash(UP) != b.hash(UP) and a.value_hash(UP) == b.value_hash(UP)
    assert a.hash(DOWN) == b.hash(DOWN)


@pytest.mark.parametrize("type_", ["F16", "BF16", *QUANTISED])
def test_transformers_reads_the_same(of_type, type_):
    path = of_type(type_)
    model = open_model(str(path))
    logging.disable_progress_bar()
    theirs = AutoModelForCausalLM.from_pretrained(
        path.parent, gguf_file=path.name, dtype=torch.float32
    ).state_dict()
    assert theirs.keys() == model.shapes.keys()
    for name in model.shapes:
        assert same(model.read(name).astype(np.float32), theirs[name].numpy())


def test_memory_stays_small(tmp_path):
    """However large a tensor is, its blocks are decoded one at a time."""
    sizes = BLOCKY | {"intermediate_size": 1 << 14, "num_hidden_layers": 1}
    shape = (1 << 14, 256)  # 16 MiB of float32
    tensors = tiny.random_tensors(tiny.hf_config(**sizes))
    write_gguf(tmp_path / "m.gguf", "Q4_K", tensors=tensors, **sizes)
    model = open_model(str(tmp_path / "m.gguf"))
    assert model.shapes[UP] == shape
    tracemalloc.start()
    model.hash(UP)
    model.gather(UP, np.arange(0, 1 << 14, 5000))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 8 << 20


# --- config


def test_the_demo_model(demo_file, demo):
    model = GgufWeights(demo_file)
    assert model.name == "demo" and model.config == demo.config and model.directory is None
    assert model.hf_config["eos_token_id"] == 2047
    for name in demo.shapes:
        assert (model.read(name).astype("float32") == demo.read(name).astype("float32")).all()


def test_settings_from_the_metadata(tmp_path):
    write_gguf(
        tmp_path / "m.gguf",
        tie_word_embeddings=True,
        rms_norm_eps=1e-5,
        rope_theta=123456.7,
        rope_scaling={
            "rope_type": "yarn",
            "factor": 4.0,
            "original_max_position_embeddings": 64,
        },
    )
    config = GgufWeights(tmp_path / "m.gguf").config
    assert config.tie_word_embeddings and config.rms_norm_eps == 1e-5
    assert config.rope_theta == 123456.7 and config.max_position_embeddings == 256
    assert config.yarn == Yarn(factor=4.0, original_max_position_embeddings=64)


def small(path, raw=None, without=(), extra=None, tokenizer=None, **metadata):
    """A small file with some metadata changed, tensors left out or added."""
    raw = raw or tiny.hf_config()
    into = ggml.writer(path, raw, **metadata)
    tensors = tiny.random_tensors(tiny.hf_config(**raw) if raw["model_type"] == "qwen2" else raw)
    ggml.add_tensors(into, raw, {n: t for n, t in tensors.items() if n not in without}, "F32")
    for name, values in (extra or {}).items():
        into.add_tensor(name, values)
    if tokenizer:
        ggml.add_tokenizer(into, tokenizer)
    ggml.finish(into)
    return path


def test_what_llama_cpp_has_a_default_for(tmp_path):
    raw = tiny.hf_config(num_key_value_heads=4, hidden_size=32)
    left_out = {"attention__head_count_kv": ..., "attention__key_length": ...}
    left_out |= {"rope__freq_base": ..., "attention__value_length": ..., "vocab_size": ...}
    model = GgufWeights(small(tmp_path / "m.gguf", raw, **left_out))
    assert model.config.num_key_value_heads == 4 and model.config.head_dim == 8
    assert model.config.rope_theta == 10000


@pytest.mark.parametrize(
    "metadata",
    [
        {"rope__scaling__type": "none", "rope__scaling__factor": 4.0},
        {"rope__scaling__type": "linear"},
        {"rope__scaling__factor": 1.0},
        {"rope__dimension_count": 8, "expert_count": 0, "pooling_type": 3},
        {"attention__head_count_kv": [2, 2], "rope__scaling__finetuned": True},
    ],
)
def test_what_changes_nothing(tmp_path, metadata):
    model = GgufWeights(small(tmp_path / "m.gguf", **metadata))
    assert model.config == GgufWeights(small(tmp_path / "n.gguf")).config


@pytest.mark.parametrize(
    ("metadata", "said"),
    [
        ({"context_length": ...}, "lacks qwen2.context_length"),
        ({"attention__layer_norm_rms_epsilon": ...}, "lacks qwen2.attention.layer_norm_rms"),
        ({"rope__scaling__type": "linear", "rope__scaling__factor": 2.0}, "'linear'"),
        ({"rope__scaling__factor": 2.0}, "'linear'"),
        ({"rope__scaling__type": "longrope"}, "'longrope'"),
        ({"rope__scaling__type": "yarn"}, "without a factor"),
        ({"rope__scaling__yarn_attn_factor": 0.8}, "yarn_attn_factor is 0.8"),
        ({"rope__dimension_count": 4}, "rope.dimension_count is 4; only 8"),
        ({"attention__value_length": 16}, "value_length is 16; only 8"),
        ({"attention__head_count_kv": [2, 1]}, "2 different values"),
        ({"attention__head_count_kv": 3}, "3 key/value heads"),
        ({"attention__head_count": "four"}, "'four'"),
        ({"attention__sliding_window": 64}, "sliding_window (64) is not known"),
        ({"attention__causal": False}, "causal is False"),
        ({"vocab_size": 49}, "vocab_size is 49; only 48"),
        ({"block_count": 2**32 - 1}, "27 tensors cannot make 4294967295 layers"),
        ({"block_count": 0}, "cannot make 0 layers"),
        ({"block_count": 3}, "missing 9 tensors (blk.2."),
        ({"block_count": 1}, "unexpected 12 tensors (blk.1."),
        ({"feed_forward_length": 41}, "blk.0.ffn_gate.weight is [40, 24], not [41, 24]"),
        ({"embedding_length": 2**31}, "token_embd.weight is [48, 24]"),
        ({"rope__freq_base": float("nan")}, "rope_theta is nan"),
    ],
)
def test_settings_that_are_refused(tmp_path, metadata, said):
    assert said in refusal(small(tmp_path / "m.gguf", **metadata))


def test_tensors_that_do_not_fit(tmp_path):
    path = small(tmp_path / "a.gguf", without=[UP])
    assert "missing 1 tensor (blk.0.ffn_up.weight)" in refusal(path)
    path = small(tmp_path / "b.gguf", without=[EMBEDDING])
    assert "has no token_embd.weight" in refusal(path)
    extra = {"blk.0.attn_output.bias": np.zeros(24, np.float32)}
    assert "unexpected 1 tensor (blk.0.attn_output.bias)" in refusal(
        small(tmp_path / "c.gguf", extra=extra)
    )
    extra = {"blk.0.ffn_up.scale": np.ones(1, np.float32)}  # as NVFP4 files have
    assert "blk.0.ffn_up.scale" in refusal(small(tmp_path / "d.gguf", extra=extra))
    word = {"model": {"vocab": {"a": 0, "b": 1}, "merges": [["a", "b"]]}, "added_tokens": []}
    path = small(tmp_path / "e.gguf", tokenizer=word)
    assert "2 tokens, token_embd.weight 48 rows" in refusal(path)


def test_a_missing_bias_is_zero_and_a_missing_head_tied(tmp_path):
    biases = [f"model.layers.{n}.self_attn.{p}_proj.bias" for n in (0, 1) for p in "qkv"]
    model = GgufWeights(small(tmp_path / "m.gguf", without=[*biases, HEAD]))
    assert model.zero_biases == tuple(biases) and model.config.tie_word_embeddings
    for name in biases:
        assert same(model.read(name), np.zeros(model.shapes[name], np.float32))
    assert HEAD not in model.shapes and model.hashes[biases[0]].dtype == "float32"
    assert not model.types.keys() & set(biases)


def test_qwen3_metadata(tmp_path):
    """Its own head size, norms of q and k, no biases. Whether the config is taken is not for the
    reader of files to say."""
    raw = tiny.hf_config(model_type="qwen3", head_dim=16)
    into = ggml.writer(tmp_path / "m.gguf", raw)
    into.add_tensor("token_embd.weight", np.zeros((48, 24), np.float32))
    for number in range(3):
        into.add_tensor(f"{number}", np.zeros(1, np.float32))
    ggml.finish(into)
    found = hf_config(gguf_file.read(tmp_path / "m.gguf"), "m")
    assert found["model_type"] == "qwen3" and found["architectures"] == ["Qwen3ForCausalLM"]
    assert found["head_dim"] == 16 and found["attention_bias"] is False
    names = ggml.name_map(raw)
    for name in ("q_norm", "k_norm", "o_proj"):
        name = f"model.layers.1.self_attn.{name}.weight"
        row, layer = QWEN3.tensors(2, True)[name]
        assert row.gguf_name(layer) == names.get_name(name, (".weight",))


# --- the tokenizer


def agree(tokenizer, other, special=False, normal=None):
    texts = [*TEXTS, (DEMO / "prompt.txt").read_text(), Path(__file__).read_text()]
    for text in texts:
        text = unicodedata.normalize(normal, text) if normal else text
        ids = tokenizer.encode(text).ids
        assert ids == other.encode(text).ids
        assert tokenizer.decode(ids, skip_special_tokens=special) == other.decode(
            ids, skip_special_tokens=special
        )


def test_tokens_are_those_of_the_original(demo_file, demo):
    agree(GgufWeights(demo_file).tokenizer(), load_tokenizer(demo))
    agree(GgufWeights(demo_file).tokenizer(), load_tokenizer(demo), special=True)


def test_tokens_are_those_of_transformers(demo_file):
    """Of text that is in NFC: for a GGUF file it normalises nothing."""
    theirs = AutoTokenizer.from_pretrained(demo_file.parent, gguf_file=demo_file.name)
    agree(GgufWeights(demo_file).tokenizer(), theirs.backend_tokenizer, normal="NFC")


def test_special_user_defined_and_unused_tokens():
    """As Qwen2.5 has them: special ones, tool marks that are plain text, and padding."""
    raw = json.loads(json.dumps(DEMO_TOKENIZER))
    mark = {"id": 2048, "content": "<tool_call>", "normalized": False, "special": False}
    raw["added_tokens"].append(raw["added_tokens"][0] | mark)
    original = Tokenizer.from_str(json.dumps(raw))
    words = {n: w for w, n in raw["model"]["vocab"].items()}
    words |= {token["id"]: token["content"] for token in raw["added_tokens"]} | {2049: "[PAD2049]"}
    metadata = {
        "tokenizer.ggml.tokens": [words[n].encode() for n in range(2050)],
        "tokenizer.ggml.merges": [" ".join(pair).encode() for pair in raw["model"]["merges"]],
        "tokenizer.ggml.token_type": np.array([1] * 2047 + [3, 4, 5], np.int32),
    }
    tokenizer = gguf_tokenizer.build(metadata, "m")
    agree(tokenizer, original)
    for text in ("<tool_call>x</tool_call>", "a [PAD2049] b", "<tool_call><|endoftext|>"):
        ids = tokenizer.encode(text).ids
        assert ids == original.encode(text).ids
        assert tokenizer.decode(ids) == original.decode(ids)
    for name, value in (
        ("tokens", metadata["tokenizer.ggml.tokens"][:-1]),
        ("tokens", [*metadata["tokenizer.ggml.tokens"][:-1], b"\xff"]),
        ("tokens", [*metadata["tokenizer.ggml.tokens"][:-2], b"a", b"b"]),
        ("tokens", "text"),
        ("merges", [b"one"]),
        ("merges", [b"no such\ntoken"]),
        ("merges", None),
        ("token_type", np.ones(3, np.int32)),
        ("token_type", [b"1"]),
        ("token_type", 1),
    ):
        with pytest.raises(UserError) as error:
            gguf_tokenizer.build(metadata | {f"tokenizer.ggml.{name}": value}, "m")
        assert len(str(error.value).splitlines()) == 1


def test_another_tokenizer_is_not_guessed_at(tmp_path):
    """Text is refused, ids are taken."""
    for number, pre in enumerate(("deepseek-r1-qwen", None)):
        path = tmp_path / f"{number}.gguf"
        raw = tiny.hf_config(vocab_size=2048)
        into = ggml.writer(path, raw)
        if pre:
            ggml.add_tokenizer(into, DEMO_TOKENIZER, pre)
        ggml.add_tensors(into, raw, tiny.random_tensors(raw), "F32")
        ggml.finish(into)
        out = str(tmp_path / f"trace{number}")
        arguments = ["--model", str(path), "--out", out, "--stages", "final_norm"]
        with pytest.raises(UserError) as error:
            trace.main([*arguments, "--prompt", "text"])
        said = "of kind 'deepseek-r1-qwen'" if pre else "has no tokenizer"
        assert said in str(error.value) and "--tokens" in str(error.value)
        assert trace.main([*arguments, "--tokens", "1,2,3"]) == 0


# --- the file


def parts(directory, count=3, name="m"):
    """One model in several files, as llama.cpp splits it: all metadata is in the first."""
    raw = tiny.hf_config()
    tensors = list(tiny.random_tensors(raw).items())
    for number in range(count):
        path = directory / f"{name}-{number + 1:05d}-of-{count:05d}.gguf"
        into = ggml.writer(path, raw) if number == 0 else gguf.GGUFWriter(path, "qwen2")
        into.add_uint16("split.no", number)
        into.add_uint16("split.count", count)
        into.add_int32("split.tensors.count", len(tensors))
        ggml.add_tensors(into, raw, dict(tensors[number::count]), "F32")
        ggml.finish(into)
    return sorted(directory.glob(f"{name}-*.gguf"))


def test_a_model_in_parts(tmp_path):
    first, second, third = parts(tmp_path)
    model = open_model(str(first))
    assert model.name == "m" and model.files == [first, second, third]
    for name, values in tiny.random_tensors(tiny.hf_config()).items():
        assert same(model.read(name), values)
    assert "is part 2 of a model in 3" in refusal(second)
    renamed = tmp_path / "m.gguf"
    renamed.write_bytes(first.read_bytes())
    assert "is part 1 of a model in 3" in refusal(renamed)
    held = second.read_bytes()
    second.write_bytes(third.read_bytes())
    assert "is not part 2 of 3" in refusal(first)
    second.unlink()
    assert f"part 2 of 3 is missing: {second.name}" in refusal(first)
    second.write_bytes(held[:-4])
    assert "cut short" in refusal(first)
    other = tmp_path / "other"
    other.mkdir()
    twice = parts(other)
    data = twice[1].read_bytes().replace(b"blk.0.attn_norm.weight", b"token_embd.weight\0\0\0\0\0")
    twice[1].write_bytes(data)
    assert "unexpected" in refusal(twice[0]) or "missing" in refusal(twice[0])


def test_a_tensor_in_two_parts(tmp_path):
    paths = parts(tmp_path, 2)
    raw = tiny.hf_config()
    tensors = list(tiny.random_tensors(raw).items())
    into = gguf.GGUFWriter(paths[1], "qwen2")
    into.add_uint16("split.no", 1)
    into.add_uint16("split.count", 2)
    ggml.add_tensors(into, raw, dict(tensors), "F32")
    ggml.finish(into)
    assert "which an earlier part has too" in refusal(paths[0])


def test_it_is_a_gguf_under_another_name(tmp_path):
    path = small(tmp_path / "model.bin")
    assert type(open_model(str(path))) is GgufWeights


def patched(path, at, code, value):
    data = bytearray(path.read_bytes())
    struct.pack_into(code, data, at, value)
    other = path.with_name("patched.gguf")
    other.write_bytes(data)
    return other


def test_wrong_files(tmp_path, monkeypatch):
    path = small(tmp_path / "m.gguf")
    data = path.read_bytes()
    assert "No such file" in refusal(tmp_path / "none.gguf")
    (tmp_path / "zip.gguf").write_bytes(b"PK\3\4" + data)
    assert "is no GGUF file" in refusal(tmp_path / "zip.gguf")
    (tmp_path / "empty.gguf").touch()
    assert "is no GGUF file" in refusal(tmp_path / "empty.gguf")
    assert "big-endian" in refusal(patched(path, 4, ">I", 3))
    assert "version 1;" in refusal(patched(path, 4, "<I", 1))
    assert "version 4;" in refusal(patched(path, 4, "<I", 4))
    assert GgufWeights(patched(path, 4, "<I", 2)).config == GgufWeights(path).config
    assert "damaged" in refusal(patched(path, 8, "<Q", 2**63))
    assert "ends within its header" in refusal(patched(path, 16, "<Q", 2**63))
    place = data.index(b"blk.0.ffn_up.weight") + len(b"blk.0.ffn_up.weight")
    assert "is of ggml type 99" in refusal(patched(path, place + 20, "<I", 99))
    assert "has 9 axes" in refusal(patched(path, place, "<I", 9))
    assert "Q4_0, but 24 is no multiple of 32" in refusal(patched(path, place + 20, "<I", 2))
    assert "begins at 1, not at" in refusal(patched(path, place + 24, "<Q", 1))
    (tmp_path / "cut.gguf").write_bytes(data[:-100])
    assert "ends within output.weight; it was cut short" in refusal(tmp_path / "cut.gguf")
    place = data.index(b"general.architecture") - 8
    swapped = data.replace(b"qwen2.block_count", b"general.archX_cou")
    (tmp_path / "key.gguf").write_bytes(swapped)
    assert "lacks qwen2.block_count" in refusal(tmp_path / "key.gguf")
    other = data[: place + 45].replace(b"qwen2", b"llama") + data[place + 45 :]
    (tmp_path / "llama.gguf").write_bytes(other)
    assert "architecture is 'llama'; qwen2 and qwen3" in refusal(tmp_path / "llama.gguf")
    folder = tmp_path / "folder.gguf"
    folder.mkdir()
    assert "config.json" in refusal(folder)
    gguf_file.package.cache_clear()
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(UserError, match=r"pip install '\.\[gguf\]'"):
        open_model(str(path))
    gguf_file.package.cache_clear()


def test_types_that_cannot_be_read(tmp_path):
    """No decoder; or blocks in a vector, of which a row is one value."""
    for type_ in ("Q8_K", "I32", "Q1_0"):
        path = tmp_path / f"{type_}.gguf"
        write_gguf(path, "Q8_0", **BLOCKY)
        data = bytearray(path.read_bytes())
        at = data.index(b"\0output.weight") + len(b"\0output.weight") + 20
        struct.pack_into("<I", data, at, GGMLQuantizationType[type_])
        path.write_bytes(data + bytes(1 << 18))
        assert f"1 tensor (output.weight is {type_}) of a type" in refusal(path)
    raw = tiny.hf_config(**BLOCKY)
    norm = "model.norm.weight"
    rest = {name: t for name, t in tiny.random_tensors(raw).items() if name != norm}
    into = ggml.writer(tmp_path / "vector.gguf", raw)
    ggml.add_tensors(into, raw, rest, "F16")
    blocks = np.zeros(256 // 32 * 34, np.uint8)
    into.add_tensor("output_norm.weight", blocks, raw_dtype=GGMLQuantizationType.Q8_0)
    ggml.finish(into)
    assert "1 tensor (output_norm.weight is Q8_0)" in refusal(tmp_path / "vector.gguf")


def test_a_file_that_changes_while_it_is_read(tmp_path):
    path = small(tmp_path / "m.gguf")
    model = open_model(str(path))
    model.read(UP)
    os.utime(path, (1, 1))
    with pytest.raises(UserError, match="was changed while it was being read"):
        model.read(UP)
    path.unlink()
    with pytest.raises(UserError, match="cannot be read"):
        model.read(UP)


def test_a_large_vocabulary_opens_at_once(tmp_path):
    """As many tokens and merges as Qwen2 has; the gguf package's reader takes seconds."""
    into = gguf.GGUFWriter(tmp_path / "m.gguf", "qwen2")
    into.add_token_list([b"token%06d" % n for n in range(151936)])
    into.add_token_merges([f"merge{n} merge{n}" for n in range(151387)])
    into.add_token_types([1] * 151936)
    ggml.finish(into)
    began = time.perf_counter()
    metadata = gguf_file.read_header(tmp_path / "m.gguf").metadata
    assert time.perf_counter() - began < 1
    assert metadata["tokenizer.ggml.tokens"][-1] == b"token151935"
    assert len(metadata["tokenizer.ggml.merges"]) == 151387
    assert len(metadata["tokenizer.ggml.token_type"]) == 151936


def letters():
    """A tokenizer of 48 ids."""
    words = [chr(ord("A") + n) for n in range(45)] + ["AB", "CD"]
    added = {"id": 47, "content": "<|end|>", "special": True}
    vocabulary = {word: number for number, word in enumerate(words)}
    merges = [["A", "B"], ["C", "D"]]
    return {"model": {"vocab": vocabulary, "merges": merges}, "added_tokens": [added]}


def test_damaged_bytes_are_refused_or_read(tmp_path):
    """Nothing but UserError escapes, in one line, wherever a file is damaged or cut."""
    path = small(tmp_path / "m.gguf", tokenizer=letters())
    data = path.read_bytes()
    head = data.index(b"output.weight") + 100
    model = open_model(str(path))
    assert model.tokenizer().encode("ABCDE<|end|>").ids == [45, 46, 4, 47]
    random = np.random.default_rng(0)
    whole = refused = 0
    extremes = [0, 1, 2**31, 2**32 - 1, 2**63 - 1, 2**64 - 1, 24, 8, 9]
    for _ in range(600):
        damaged = bytearray(data)
        for _ in range(random.integers(1, 4)):
            at = int(random.integers(head - 8))
            match random.integers(5):
                case 0:
                    damaged[at] ^= 1 << random.integers(8)
                case 1:
                    damaged[at] = random.integers(256)
                case 2:
                    struct.pack_into("<Q", damaged, at, extremes[random.integers(9)])
                case 3:
                    del damaged[at : at + int(random.integers(1, 20))]
                case 4:
                    del damaged[int(random.integers(len(damaged))) :]
            if len(damaged) < head:
                break
        path.write_bytes(damaged)
        try:
            model = GgufWeights(path)
            for name in model.shapes:
                model.hash(name)
            whole += 1
            if (tokenizer := model.tokenizer()) is not None:
                tokenizer.encode("ABCDE<|end|>")
        except UserError as error:
            refused += 1
            assert len(str(error).splitlines()) == 1
    assert refused > 300 and whole > 20


# --- what is done with it


@pytest.mark.parametrize("to", ["hf", "orbax"])
def test_conversion(tmp_path, demo_file, to):
    path = tmp_path / "q.gguf"
    raw = tiny.hf_config(**BLOCKY)
    into = ggml.writer(path, raw, vocab_size=96)
    ggml.add_tensors(into, raw, tiny.random_tensors(raw), "Q6_K")
    ggml.finish(into)
    for file in (path, demo_file):
        out = tmp_path / f"{file.stem}-{to}"
        assert convert.main([str(file), str(out), "--to", to]) == 0
        model, made = open_model(str(file)), open_model(str(out))
        assert type(made) is {"hf": HuggingFaceWeights, "orbax": OrbaxWeights}[to]
        assert made.config == model.config
        assert all(same(made.read(name), model.read(name)) for name in model.shapes)
        assert all(made.hash(name) == model.value_hash(name) for name in model.shapes)
    tokenizer = load_tokenizer(open_model(str(tmp_path / f"demo-{to}")))
    agree(tokenizer, load_tokenizer(open_model(None)))
    assert not (tmp_path / f"q-{to}" / "tokenizer.json").exists()


def test_a_trace_says_which_file_it_was(tmp_path):
    path = tmp_path / "m.gguf"
    write_gguf(path, "Q4_K", **BLOCKY)
    out = tmp_path / "trace"
    arguments = ["--model", str(path), "--tokens", "1,2,3", "--stages", "all"]
    assert trace.main([*arguments, "--out", str(out)]) == 0
    stated = manifest.read(out).model.weights
    model = open_model(str(path))
    assert stated[UP] == model.hash(UP) and stated[UP].dtype == "Q4_K"
    assert localize([str(out), "--model", str(path)]) == 0
    write_gguf(path, "Q4_K", seed=1, **BLOCKY)
    with pytest.raises(UserError, match="made with other weights"):
        localize([str(out), "--model", str(path)])
