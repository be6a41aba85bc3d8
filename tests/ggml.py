"""GGUF files as llama.cpp's converter writes them, and llama.cpp's own quantisation."""

import ctypes
import importlib.util
from functools import cache
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

from tests.tiny import hf_config, random_tensors

# Rows are multiples of 256, the largest block; no two axes are of one size.
BLOCKY = {
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_attention_heads": 4,
    "head_dim": 64,
    "vocab_size": 96,
}
# llama.cpp takes seconds before it makes the first block of these.
SLOW = ("IQ1_S", "IQ1_M", "IQ2_XXS", "IQ2_XS", "IQ2_S")


class _Traits(ctypes.Structure):
    """``struct ggml_type_traits`` of ggml.h."""

    _fields_ = (
        ("name", ctypes.c_char_p),
        ("block", ctypes.c_int64),
        ("interleaved", ctypes.c_int64),
        ("size", ctypes.c_size_t),
        ("quantized", ctypes.c_bool),
        ("to_float", ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64)),
        ("from_float", ctypes.c_void_p),
    )


@cache
def library() -> ctypes.CDLL:
    """llama.cpp, which xllamacpp's one shared object exports."""
    found = importlib.util.find_spec("xllamacpp")
    if found is None:
        pytest.skip("xllamacpp is not installed: no llama.cpp to compare with")
    (shared,) = Path(found.origin).parent.glob("xllamacpp*.so")
    result = ctypes.CDLL(str(shared))
    result.ggml_get_type_traits.restype = ctypes.POINTER(_Traits)
    result.ggml_quantize_chunk.restype = ctypes.c_size_t
    pointer, integer = ctypes.c_void_p, ctypes.c_int64
    result.ggml_quantize_chunk.argtypes = [
        ctypes.c_int, pointer, pointer, integer, integer, integer, pointer
    ]  # fmt: skip
    return result


def quantize(values: np.ndarray, type_: str) -> np.ndarray:
    """Rows of bytes, by llama.cpp; of a slow type any blocks of finite values, for what is tested
    is how they are read."""
    number = GGMLQuantizationType[type_]
    block, size = GGML_QUANT_SIZES[number]
    values = np.ascontiguousarray(values, np.float32)
    rows, columns = values.shape
    if type_ in SLOW:
        random = np.random.default_rng(values[:, 0].view(np.uint32))
        blocks = random.integers(0, 256, (values.size // block * 5 // 4, size), np.uint8)
        finite = np.isfinite(dequantize(blocks, type_)).all(1)
        return blocks[finite][: values.size // block].reshape(rows, -1)
    out = np.empty((rows, columns // block * size), np.uint8)
    done = library().ggml_quantize_chunk(
        number, values.ctypes.data, out.ctypes.data, 0, rows, columns, None
    )
    assert done == out.nbytes
    return out


def rounded(values: np.ndarray, type_: str) -> np.ndarray:
    """What is left of rows by llama.cpp's plain conversion, which its caches go through: float32.
    ``quantize`` may search for better scales."""
    number = GGMLQuantizationType[type_]
    block, size = GGML_QUANT_SIZES[number]
    raw = np.empty((len(values), values.shape[1] // block * size), np.uint8)
    convert = library().ggml_get_type_traits(int(number)).contents.from_float
    kind = ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64)
    flat = np.ascontiguousarray(values, np.float32)
    kind(convert)(flat.ctypes.data, raw.ctypes.data, flat.size)
    return dequantize(raw, type_)


def dequantize(raw: np.ndarray, type_: str) -> np.ndarray:
    """Rows of float32, by llama.cpp."""
    number = GGMLQuantizationType[type_]
    block, size = GGML_QUANT_SIZES[number]
    traits = library().ggml_get_type_traits(int(number)).contents
    assert (traits.block, traits.size) == (block, size)  # else the structure is another
    raw = np.ascontiguousarray(raw)
    out = np.empty((len(raw), raw.shape[1] // size * block), np.float32)
    traits.to_float(raw.ctypes.data, out.ctypes.data, out.size)
    return out


def name_map(raw: dict[str, Any]) -> gguf.TensorNameMap:
    """The converter's own table of names."""
    arch = {"qwen2": gguf.MODEL_ARCH.QWEN2, "qwen3": gguf.MODEL_ARCH.QWEN3}[raw["model_type"]]
    return gguf.get_tensor_name_map(arch, raw["num_hidden_layers"])


def writer(path: Path, raw: dict[str, Any], **metadata: Any) -> gguf.GGUFWriter:
    """A file with the metadata of a ``config.json``; ``metadata`` changes some below the
    architecture (dots as double underscores; ``...`` leaves one out)."""
    result = gguf.GGUFWriter(path, raw["model_type"])
    scaling = raw.get("rope_scaling") or {}
    told = {
        "context_length": raw["max_position_embeddings"],
        "embedding_length": raw["hidden_size"],
        "block_count": raw["num_hidden_layers"],
        "feed_forward_length": raw["intermediate_size"],
        "attention.head_count": raw["num_attention_heads"],
        "attention.head_count_kv": raw["num_key_value_heads"],
        "attention.key_length": raw["head_dim"],
        "attention.value_length": raw["head_dim"],
        "attention.layer_norm_rms_epsilon": float(raw["rms_norm_eps"]),
        "rope.freq_base": float(raw["rope_theta"]),
        "vocab_size": raw["vocab_size"],
    }
    if scaling:
        told["rope.scaling.type"] = scaling["rope_type"]
        told["rope.scaling.factor"] = float(scaling["factor"])
        told["rope.scaling.original_context_length"] = scaling["original_max_position_embeddings"]
    told |= {name.replace("__", "."): value for name, value in metadata.items()}
    for name, value in told.items():
        key = f"{raw['model_type']}.{name}"
        if isinstance(value, bool):
            result.add_bool(key, value)
        elif isinstance(value, int):
            result.add_uint32(key, value)
        elif isinstance(value, float):
            result.add_float32(key, value)
        elif isinstance(value, str):
            result.add_string(key, value)
        elif value is not ...:
            result.add_array(key, value)
    return result


def add_tensors(
    into: gguf.GGUFWriter, raw: dict[str, Any], tensors: dict[str, np.ndarray], type_: str
) -> None:
    """Matrices in a ggml type, vectors in float32, as the converter does."""
    names = name_map(raw)
    for name, values in tensors.items():
        key = names.get_name(name, try_suffixes=(".weight", ".bias"))
        if values.ndim == 1 or type_ == "F32":
            into.add_tensor(key, values.astype(np.float32))
        elif type_ == "F16":
            into.add_tensor(key, values.astype(np.float16))
        elif type_ == "BF16":
            rows = np.ascontiguousarray(values.astype("bfloat16")).view(np.uint8)
            into.add_tensor(key, rows, raw_dtype=GGMLQuantizationType.BF16)
        else:
            rows = quantize(values, type_)
            into.add_tensor(key, rows, raw_dtype=GGMLQuantizationType[type_])


def add_tokenizer(into: gguf.GGUFWriter, tokenizer: dict[str, Any], pre: str = "qwen2") -> None:
    """The vocabulary of a ``tokenizer.json``."""
    words = {number: word for word, number in tokenizer["model"]["vocab"].items()}
    added = {token["id"]: token for token in tokenizer["added_tokens"]}
    words |= {number: token["content"] for number, token in added.items()}
    types = [
        1 if number not in added else 3 if added[number]["special"] else 4
        for number in range(len(words))
    ]
    into.add_tokenizer_model("gpt2")
    into.add_tokenizer_pre(pre)
    into.add_token_list([words[number] for number in range(len(words))])
    into.add_token_types(types)
    into.add_token_merges([" ".join(pair) for pair in tokenizer["model"]["merges"]])


def finish(into: gguf.GGUFWriter) -> None:
    into.write_header_to_file()
    into.write_kv_data_to_file()
    into.write_tensors_to_file()
    into.close()


def write_gguf(
    path: Path, type_: str = "F32", seed: int = 0, tensors: dict | None = None, **overrides: Any
) -> dict[str, np.ndarray]:
    """A model of random weights; overrides are of the config. Returns its tensors."""
    raw = hf_config(**overrides)
    tensors = random_tensors(raw, seed) if tensors is None else tensors
    into = writer(path, raw)
    add_tensors(into, raw, tensors, type_)
    finish(into)
    return tensors
