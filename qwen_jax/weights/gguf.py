"""Models in GGUF files, as llama.cpp reads them: config, tensors and tokenizer are all in the file.

Quantised tensors are decoded to float32 as they are read, some rows at a time, to the bits that
llama.cpp decodes them to. Imports neither jax nor torch.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import xxhash
from tokenizers import Tokenizer

from qwen_jax.config import from_hf
from qwen_jax.weights import gguf_file, gguf_tokenizer
from qwen_jax.weights.base import BLOCK, Weights, misfits, raw_bytes, some
from qwen_jax.weights.files import Files
from qwen_jax.weights.gguf_file import PART, Content, Tensor
from stages.architecture import Architecture
from stages.architectures import ARCHITECTURES
from stages.errors import UserError
from stages.manifest import WeightEntry

NATIVE = {
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
}
DECODED = np.dtype(np.float32)

# Metadata below "qwen2." -> attribute of config.json.
ATTRIBUTES = {
    "embedding_length": "hidden_size",
    "block_count": "num_hidden_layers",
    "feed_forward_length": "intermediate_size",
    "context_length": "max_position_embeddings",
    "attention.head_count": "num_attention_heads",
    "attention.layer_norm_rms_epsilon": "rms_norm_eps",
    "attention.head_count_kv": "num_key_value_heads",
    "attention.key_length": "head_dim",
    "rope.freq_base": "rope_theta",
}
REQUIRED = tuple(ATTRIBUTES)[:6]  # llama.cpp has a default for the others
ROPE = {
    "rope.scaling.type": "rope_type",
    "rope.scaling.factor": "factor",
    "rope.scaling.original_context_length": "original_max_position_embeddings",
    "rope.scaling.yarn_beta_fast": "beta_fast",
    "rope.scaling.yarn_beta_slow": "beta_slow",
}
# What would change the forward pass at any other value. What is in no table is refused by name.
NEUTRAL = {
    "attention.causal": True,
    "expert_count": 0,
    "expert_used_count": 0,
    "rope.scaling.attn_factor": 1.0,
    "rope.scaling.yarn_attn_factor": 1.0,
    "rope.scaling.yarn_ext_factor": 1.0,
    "rope.scaling.yarn_log_multiplier": 0.0,
}
IGNORED = ("rope.scaling.finetuned", "pooling_type")


class GgufWeights(Weights):
    """One GGUF model, checked when it is opened.

    Attributes:
        path: the file, or the first of a split model's.
        files: all its files.
        hf_config: what its ``config.json`` would be.
        types: tensor name -> ggml type; without ``zero_biases``.
        zero_biases: the biases that the file has not; they are read as zeros.

    Raises:
        UserError: not such a file, damaged, another architecture, or tensors that do not fit the
            metadata.
    """

    directory = None

    def __init__(self, path: Path, name: str | None = None) -> None:
        super().__init__()
        self.path = path
        part = PART.fullmatch(path.name)
        self.name = name or (part[1] if part else path.stem)
        content = gguf_file.read(path)
        self._vocabulary = gguf_tokenizer.unsupported(content.metadata)
        self.hf_config = hf_config(content, str(path))
        self.config = from_hf(self.hf_config, str(path))
        self._tensors = self._fit(content.tensors)
        self.types = {name: tensor.type for name, tensor in self._tensors.items()}
        self.zero_biases = tuple(name for name in self.shapes if name not in self._tensors)
        self._opened = Files({tensor.path for tensor in content.tensors.values()} | {path})

    @property
    def files(self) -> list[Path]:
        return sorted(self._opened.states)

    def _fit(self, found: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The tensors by their Hugging Face names."""
        tensors = self.config.arch.tensors(
            self.config.num_hidden_layers, self.config.tie_word_embeddings
        )
        names = {name: row.gguf_name(layer) for name, (row, layer) in tensors.items()}
        absent = {name for name in names if name.endswith("bias") and names[name] not in found}
        expected = {names[name]: s for name, s in self.shapes.items() if name not in absent}
        told = {name: (tensor.shape, tensor.type) for name, tensor in found.items()}
        if problems := misfits(expected, told, {tensor.type for tensor in found.values()}):
            raise UserError(f"{self.path}: tensors do not fit the metadata: {problems}")
        # A row is what is read at least, and of a vector that is one value, never a block.
        wrong = [
            f"{name} is {type_}"
            for name, (shape, type_) in told.items()
            if type_ not in NATIVE and (len(shape) < 2 or not gguf_file.decodes(type_))
        ]
        if wrong:
            raise UserError(f"{self.path}: {some(wrong, 'tensor')} of a type that cannot be read")
        return {name: found[names[name]] for name in self.shapes if name not in absent}

    def dtype(self, name: str) -> np.dtype:
        return NATIVE.get(self.types.get(name, ""), DECODED)

    def fill(self, name: str, start: int, out: np.ndarray) -> None:
        if name not in self._tensors:
            out[...] = 0
        elif self.types[name] in NATIVE:
            self._read(name, start, out)
        else:
            out[...] = gguf_file.decode(self._raw(name, start, len(out)), self.types[name])

    def _read(self, name: str, start: int, out: np.ndarray) -> None:
        tensor = self._tensors[name]
        self._opened.read(tensor.path, tensor.start + start * tensor.row, out, name)

    def _raw(self, name: str, start: int, count: int) -> np.ndarray:
        """Rows of a quantised tensor as they lie in the file."""
        raw = np.empty((count, self._tensors[name].row), np.uint8)
        self._read(name, start, raw)
        return raw

    def _hashed(self, name: str, start: int, rows: np.ndarray) -> tuple[memoryview, str]:
        """The hash of a quantised tensor is of its blocks, under ggml's name of the type, so that a
        manifest says which file it was; that of any other is as in a Hugging Face directory."""
        if self.types.get(name, "F32") in NATIVE:
            return super()._hashed(name, start, rows)
        return raw_bytes(self._raw(name, start, len(rows))), self.types[name]

    def gather(self, name: str, rows: np.ndarray) -> np.ndarray:
        """As of any form; a quantised tensor is hashed as it lies in the file, so that no other row
        needs to be decoded."""
        if self.types.get(name, "F32") not in NATIVE and name not in self.hashes:
            count = self.shapes[name][0]
            step = max(1, BLOCK // self._tensors[name].row)
            for start in range(0, count, step):
                self._hash(name, start, np.empty((min(step, count - start), 0), DECODED))
        return super().gather(name, rows)

    def value_hash(self, name: str) -> WeightEntry:
        if self.types.get(name, "F32") in NATIVE:
            return self.hash(name)
        digest = xxhash.xxh3_64()
        for _, rows in self.blocks(name):
            digest.update(raw_bytes(rows))
        return WeightEntry(dtype=str(DECODED), shape=self.shapes[name], xxh3=digest.hexdigest())

    def companions(self) -> dict[str, bytes]:
        made = {"config.json": json.dumps(self.hf_config, indent=2) + "\n"}
        if tokenizer := self.tokenizer():
            made["tokenizer.json"] = tokenizer.to_str(pretty=True)
        return {name: text.encode() for name, text in made.items()}

    @property
    def no_tokenizer(self) -> str:
        return self._vocabulary or super().no_tokenizer

    def tokenizer(self) -> Tokenizer | None:
        """The tokenizer in the file, which is read again for it; None where ``no_tokenizer`` says
        why.

        Raises:
            UserError: it is damaged.
        """
        if self._vocabulary:
            return None
        metadata = gguf_file.read_header(self.path).metadata
        return gguf_tokenizer.build(metadata, str(self.path))

    def chat_template(self) -> tuple[str, dict[str, str]] | None:
        metadata = gguf_file.read_header(self.path).metadata
        names = "tokenizer.chat_template", "tokenizer.ggml.tokens"
        template, tokens = map(metadata.get, names)
        if not isinstance(template, str) or not isinstance(tokens, list):
            return None
        ids = {name: metadata.get(f"tokenizer.ggml.{name}_token_id") for name in ("bos", "eos")}
        known = {n: i for n, i in ids.items() if isinstance(i, int) and 0 <= i < len(tokens)}
        return template, {f"{name}_token": tokens[i] for name, i in known.items()}


def hf_config(content: Content, where: str) -> dict[str, Any]:
    """The ``config.json`` that a model would have in Hugging Face's form.

    Raises:
        UserError: another architecture, or metadata that is missing, contradicts the tensors or
            might change the forward pass in a way that is not known here.
    """
    metadata, tensors = content
    architecture, kind = (metadata.get(f"general.{key}") for key in ("architecture", "type"))
    if architecture not in ARCHITECTURES:
        raise UserError(
            f"{where}: its architecture is {architecture!r}; {' and '.join(ARCHITECTURES)} are "
            "supported"
        )
    if kind not in (None, "model"):
        raise UserError(f"{where}: holds {kind!r}, not a model")
    prefix = architecture + "."
    told = {
        key.removeprefix(prefix): _scalar(value, f"{where}: {key}")
        for key, value in metadata.items()
        if key.startswith(prefix)
    }
    if missing := [prefix + key for key in REQUIRED if key not in told]:
        raise UserError(f"{where}: its metadata lacks {missing[0]}")
    arch = ARCHITECTURES[architecture]
    head = arch.parameter[arch.head.parameters[0]].gguf
    raw = {
        "architectures": [arch.hf_class],
        "model_type": architecture,
        "hidden_act": "silu",
        "num_key_value_heads": told["attention.head_count"],
        "rope_theta": 10000.0,
        "tie_word_embeddings": head not in tensors,
        "torch_dtype": str(DECODED),  # which holds every value of every type
        **arch.fixed,
        "vocab_size": _vocabulary(arch, metadata, tensors, where),
    }
    raw |= {name: told[key] for key, name in ATTRIBUTES.items() if key in told}
    if (layers := raw["num_hidden_layers"]) not in range(1, len(tensors)):
        raise UserError(f"{where}: {len(tensors)} tensors cannot make {layers!r} layers")
    _check_neutral(told, raw, f"{where}: {prefix}")
    raw |= _scaling(told, where)
    for name in ("bos_token_id", "eos_token_id"):
        if type(value := metadata.get(f"tokenizer.ggml.{name}")) is int:
            raw[name] = value
    return raw


def _scalar(value: Any, where: str) -> Any:
    """Some settings may be one value or one a layer, which must be alike here."""
    if not isinstance(value, np.ndarray | list):
        return value
    alike = set(value if isinstance(value, list) else value.tolist())
    if len(alike) != 1:
        raise UserError(f"{where} has {len(alike)} different values; expected one")
    return alike.pop()


def _vocabulary(
    arch: Architecture, metadata: Mapping[str, Any], tensors: Mapping[str, Tensor], where: str
) -> int:
    """The rows of the embedding, which must be as many as the tokens that are listed."""
    name = arch.embedding.gguf
    embedding = tensors.get(name)
    if embedding is None or len(embedding.shape) != 2:
        raise UserError(f"{where}: has no {name}, or one that is no matrix")
    rows = embedding.shape[0]
    listed = metadata.get("tokenizer.ggml.tokens")
    if isinstance(listed, list) and len(listed) != rows:
        raise UserError(f"{where}: its vocabulary has {len(listed)} tokens, {name} {rows} rows")
    return rows


def _check_neutral(told: Mapping[str, Any], raw: Mapping[str, Any], where: str) -> None:
    head = raw.get("head_dim")
    if head is None:
        hidden, heads = raw["hidden_size"], raw["num_attention_heads"]
        head = hidden // heads if type(hidden) is type(heads) is int and heads > 0 else None
    neutral = NEUTRAL | {
        "attention.value_length": head,
        "rope.dimension_count": head,
        "vocab_size": raw["vocab_size"],
    }
    for key, value in told.items():
        if key in neutral:
            if value != neutral[key]:
                raise UserError(f"{where}{key} is {value!r}; only {neutral[key]!r} is supported")
        elif key not in {*ATTRIBUTES, *ROPE, *IGNORED}:
            raise UserError(
                f"{where}{key} ({value!r}) is not known and may change the forward pass"
            )


def _scaling(told: Mapping[str, Any], where: str) -> dict[str, Any]:
    """``rope_scaling``, where there is any. Without a type it is linear, without a factor none,
    as llama.cpp has it."""
    rope = {name: told[key] for key, name in ROPE.items() if key in told}
    kind = rope.setdefault("rope_type", "linear")
    if kind == "none" or (kind == "linear" and rope.get("factor", 0) in (0, 1)):
        return {}
    if kind != "yarn":
        raise UserError(f"{where}: RoPE scaling is {kind!r}; 'none' and 'yarn' are supported")
    if rope.get("factor", 0) == 0:
        raise UserError(f"{where}: RoPE scaling is 'yarn', but without a factor")
    return {"rope_scaling": rope}
