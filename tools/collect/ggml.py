"""llama.cpp's C interface, loaded with ctypes from the shared object of the wheel ``xllamacpp``.

ctypes believes any declaration, so before one is trusted the defaults that the library fills in,
the size of a tensor and where its fields lie are compared with what is known of these builds.
"""

import ctypes as c
import importlib.util
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np

from stages.errors import UserError

KNOWN = "2026.10.11549"  # the wheel whose structs these are
TYPES = {
    "f32": 0, "f16": 1, "q4_0": 2, "q4_1": 3, "q5_0": 6, "q5_1": 7, "q8_0": 8, "iq4_nl": 20,
    "bf16": 30,
}  # fmt: skip
PLAIN: dict[int, np.dtype[Any]] = {0: np.dtype("<f4"), 1: np.dtype("<f2"), 30: np.dtype("<u2")}
SPARE = ("spare", c.c_byte * 256)  # what a newer build may add at the end reads as zero


class Tensor(c.Structure):
    pass


Tensor._fields_ = [
    ("type", c.c_int),
    ("buffer", c.c_void_p),
    ("ne", c.c_int64 * 4),
    ("nb", c.c_size_t * 4),
    ("op", c.c_int),
    ("op_params", c.c_int32 * 16),
    ("flags", c.c_int32),
    ("src", c.POINTER(Tensor) * 10),
    ("view_src", c.c_void_p),
    ("view_offs", c.c_size_t),
    ("data", c.c_void_p),
    ("name", c.c_char * 64),
    ("extra", c.c_void_p),
    ("padding", c.c_char * 8),
]

Eval = c.CFUNCTYPE(c.c_bool, c.POINTER(Tensor), c.c_bool, c.c_void_p)
Log = c.CFUNCTYPE(None, c.c_int, c.c_char_p, c.c_void_p)


def _struct(name: str, text: str, kinds: dict[str, Any]) -> type[c.Structure]:
    fields = [(field, kinds[k]) for k, names in _lines(text) for field in names]
    return type(name, (c.Structure,), {"_fields_": [*fields, SPARE]})


def _lines(text: str) -> list[tuple[str, list[str]]]:
    return [(kind, names) for kind, *names in map(str.split, text.strip().splitlines())]


KINDS = {"p": c.c_void_p, "i": c.c_int32, "f": c.c_float, "b": c.c_bool, "e": Eval, "z": c.c_size_t}
ModelParams = _struct(
    "ModelParams",
    """
    p devices tensor_buft_overrides
    i n_gpu_layers split_mode load_mode lazy_mode main_gpu
    p tensor_split progress_callback progress_callback_user_data kv_overrides
    b vocab_only check_tensors use_extra_bufts no_host no_alloc load_mtp
    """,
    KINDS,
)
ContextParams = _struct(
    "ContextParams",
    """
    i n_ctx n_batch n_ubatch n_seq_max n_rs_seq n_outputs_max n_outputs_max_per_seq
    i n_threads n_threads_batch
    i ctx_type rope_scaling_type pooling_type attention_type flash_attn_type
    f rope_freq_base rope_freq_scale
    f yarn_ext_factor yarn_attn_factor yarn_beta_fast yarn_beta_slow
    i yarn_orig_ctx
    f defrag_thold
    e cb_eval
    p cb_eval_user_data
    i type_k type_v
    p abort_callback abort_callback_data unknown
    b embeddings offload_kqv no_perf op_offload swa_full kv_unified
    p samplers
    z n_samplers
    p ctx_other
    """,
    KINDS,
)
# Every default that is not zero: one field more or fewer in between moves at least one of them.
MODEL_DEFAULTS = dict(
    n_gpu_layers=-1, split_mode=1, load_mode=-1, lazy_mode=1, use_extra_bufts=True
)
CONTEXT_DEFAULTS = dict(
    n_ctx=512, n_batch=2048, n_ubatch=512, n_seq_max=1, n_outputs_max_per_seq=1, n_threads=4,
    n_threads_batch=4, rope_scaling_type=-1, pooling_type=-1, attention_type=-1, flash_attn_type=-1,
    yarn_ext_factor=-1.0, yarn_attn_factor=-1.0, yarn_beta_fast=-1.0, yarn_beta_slow=-1.0,
    defrag_thold=-1.0, type_k=1, type_v=1, offload_kqv=True, no_perf=True, op_offload=True,
    swa_full=True,
)  # fmt: skip


class Batch(c.Structure):
    _fields_ = (
        ("n_tokens", c.c_int32),
        ("token", c.POINTER(c.c_int32)),
        ("embd", c.c_void_p),
        ("pos", c.POINTER(c.c_int32)),
        ("n_seq_id", c.POINTER(c.c_int32)),
        ("seq_id", c.POINTER(c.POINTER(c.c_int32))),
        ("logits", c.POINTER(c.c_int8)),
    )


class InitParams(c.Structure):
    _fields_ = (("size", c.c_size_t), ("buffer", c.c_void_p), ("no_alloc", c.c_bool))


@cache
def installed() -> "Library | None":
    """The library, if it and the package that reads its types are there."""
    if not (importlib.util.find_spec("xllamacpp") and importlib.util.find_spec("gguf")):
        return None
    try:
        return Library()
    except UserError:  # another build
        return None


class Library:
    """The loaded library: its functions as attributes, checked."""

    def __init__(self) -> None:
        spec = importlib.util.find_spec("xllamacpp")
        found = [
            path
            for place in (spec and spec.submodule_search_locations) or ()
            for path in Path(place).glob("xllamacpp*.so")
        ]
        if not found:
            raise UserError("llama.cpp comes with the wheel xllamacpp: pip install xllamacpp gguf")
        self.version = metadata.version("xllamacpp")
        try:
            self._lib = c.CDLL(str(found[0]))
            self._declare()
        except (OSError, AttributeError) as error:
            raise self._unknown(str(error).splitlines()[0]) from None
        self._check_tensor()
        self.model_params = self._defaults(
            "llama_model_default_params", ModelParams, MODEL_DEFAULTS
        )
        self.context_params = self._defaults(
            "llama_context_default_params", ContextParams, CONTEXT_DEFAULTS
        )

    def __getattr__(self, name: str) -> Any:
        return getattr(self._lib, name)

    def _unknown(self, why: str) -> UserError:
        return UserError(
            f"xllamacpp {self.version} is not the llama.cpp that is known here ({why}); "
            f"pip install xllamacpp=={KNOWN}"
        )

    def _declare(self) -> None:
        p, i, s, t = c.c_void_p, c.c_int32, c.c_char_p, c.POINTER(Tensor)
        for name, result, *arguments in (
            ("llama_model_load_from_file", p, s, ModelParams),
            ("llama_init_from_model", p, p, ContextParams),
            ("llama_decode", i, p, Batch),
            ("llama_model_free", None, p),
            ("llama_free", None, p),
            ("llama_log_set", None, Log, p),
            ("llama_model_get_vocab", p, p),
            ("llama_vocab_n_tokens", i, p),
            ("llama_model_meta_val_str", i, p, s, p, c.c_size_t),
            ("llama_print_system_info", s),
            ("llama_version", s),
            ("llama_get_logits_ith", c.POINTER(c.c_float), p, i),
            ("ggml_op_desc", s, t),
            ("ggml_type_name", s, i),
            ("ggml_type_size", c.c_size_t, i),
            ("ggml_blck_size", c.c_int64, i),
            ("ggml_nbytes", c.c_size_t, t),
            ("ggml_backend_tensor_get", None, t, p, c.c_size_t, c.c_size_t),
            ("ggml_tensor_overhead", c.c_size_t),
            ("ggml_init", p, InitParams),
            ("ggml_free", None, p),
            ("ggml_new_tensor_2d", t, p, i, c.c_int64, c.c_int64),
            ("ggml_set_name", t, t, s),
            ("ggml_quantize_chunk", c.c_size_t, i, p, p, c.c_int64, c.c_int64, c.c_int64, p),
        ):
            function = getattr(self._lib, name)
            function.restype, function.argtypes = result, arguments

    def _check_tensor(self) -> None:
        """A tensor is made, and must read as what was asked for."""
        if (size := self.ggml_tensor_overhead()) != c.sizeof(Tensor) + 32:
            raise self._unknown(f"a tensor has {size - 32} bytes, not {c.sizeof(Tensor)}")
        context = self.ggml_init(InitParams(4096, None, True))
        made = self.ggml_set_name(self.ggml_new_tensor_2d(context, 1, 3, 5), b"probe").contents
        seen = (made.type, list(made.ne), list(made.nb), made.name, bool(made.src[0]))
        self.ggml_free(context)
        if seen != (1, [3, 5, 1, 1], [2, 6, 30, 30], b"probe", False):
            raise self._unknown("a tensor's fields lie elsewhere")

    def _defaults(self, name: str, struct: type[c.Structure], known: dict[str, Any]) -> c.Structure:
        function = getattr(self._lib, name)
        function.restype = struct
        found = function()
        c.memset(c.byref(found, struct.spare.offset), 0, struct.spare.size)
        for field, kind in struct._fields_[:-1]:  # type: ignore[misc]
            value = getattr(found, field)
            if kind is not Eval and (value or 0) != known.get(field, 0):
                raise self._unknown(f"the default {field} is {value}, not {known.get(field, 0)}")
        return found

    def quantised(self, x: np.ndarray, kind: str) -> np.ndarray:
        """Rows [..., C] quantised to a type such as "Q4_K" without an importance matrix, and back:
        float32."""
        from gguf import GGMLQuantizationType, quant_shape_to_byte_shape, quants

        number = GGMLQuantizationType[kind]
        rows = np.array(x, np.float32).reshape(-1, x.shape[-1])
        rows[~(np.abs(rows) > 1e-30)] = 0  # it would abort where a scale's inverse is infinite
        raw = np.empty(quant_shape_to_byte_shape(rows.shape, number), np.uint8)
        self.ggml_quantize_chunk(number, rows.ctypes.data, raw.ctypes.data, 0, *rows.shape, None)
        with np.errstate(all="ignore"):  # scales that float16 cannot hold
            return quants.dequantize(raw, number).reshape(x.shape)

    # --- reading a tensor

    def op(self, tensor: Tensor) -> str:
        return self.ggml_op_desc(c.byref(tensor)).decode()

    def read(self, tensor: Tensor) -> np.ndarray:
        """A tensor's values as float32 in its four axes, slowest first.

        Its strides are followed, so permuted tensors and views come out as they are meant; rows of
        a quantised type are dequantised.
        """
        raw = np.empty(self.ggml_nbytes(c.byref(tensor)), np.uint8)
        if not raw.size:
            return np.empty([*tensor.ne][::-1], np.float32)
        self.ggml_backend_tensor_get(c.byref(tensor), raw.ctypes.data, 0, raw.size)
        shape, strides = [*tensor.ne][::-1], [*tensor.nb][::-1]
        if dtype := PLAIN.get(tensor.type):
            first = raw[: dtype.itemsize].view(dtype)
            value = np.lib.stride_tricks.as_strided(first, shape, strides)
            if tensor.type == TYPES["bf16"]:
                return (value.astype(np.uint32) << 16).view(np.float32)
            return value.astype(np.float32)
        from gguf import GGMLQuantizationType, quants

        row = self.ggml_type_size(tensor.type) * shape[-1] // self.ggml_blck_size(tensor.type)
        rows = np.lib.stride_tricks.as_strided(raw, [*shape[:-1], row], [*strides[:-1], 1])
        flat = np.ascontiguousarray(rows).reshape(-1, row)
        kind = GGMLQuantizationType(tensor.type)
        return quants.dequantize(flat, kind).astype(np.float32).reshape(shape)
