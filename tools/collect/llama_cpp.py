"""llama.cpp: a GGUF run on the CPU, every stage read as it is computed.

llama.cpp asks before each operation whether anybody wants to see its result (``cb_eval``). What an
operation is, is told by the weights that go into it (``blk.3.attn_q.weight``), where there are any,
for their names are the file's; and by the name of its result elsewhere.
"""

import ctypes as c
import re
from collections.abc import Callable, Sequence
from typing import Annotated, Any, Literal

import numpy as np
from msgspec import Meta

from qwen_jax.weights.base import Weights
from qwen_jax.weights.gguf import GgufWeights
from stages.architecture import ADD, LINEAR, LOOKUP, NORM
from stages.architectures import ARCHITECTURES
from stages.errors import UserError
from stages.places import parts
from tools.collect.ggml import PLAIN, TYPES, Batch, Eval, Library, Log, Tensor
from tools.collect.options import Options
from tools.collect.recorder import Recorder
from tools.collect.session import Calls, Session

ERROR = 4  # the level of a log line
FLASH = {"auto": -1, "off": 0, "on": 1}
WEIGHT = re.compile(r"(?:blk\.(\d+)\.)?(\w+)\.(weight|bias)")
RESULT = re.compile(r"(\w+)-(\d+)")
CACHE = re.compile(r"cache_(k|v)_l(\d+)")
TURN = re.compile(r"attn_inp_(k|v)_rot")

OPERATIONS = {LOOKUP: "GET_ROWS", LINEAR: "MUL_MAT", NORM: "MUL", ADD: "ADD"}


def _by_weight() -> dict[tuple[str, str], tuple[str, str]]:
    """(operation, weight) -> stage, part of qkv. An operation's second weight is what a MUL or an
    ADD takes beside its input."""
    found = {("MUL_MAT", "attn_qkv.weight"): ("qkv_matmul", "")}  # q, k and v in one
    found["ADD", "attn_qkv.bias"] = ("qkv_bias", "")
    for arch in ARCHITECTURES.values():
        for stage in arch.stages:
            beside = parts(arch, stage.name)
            for parameter in (arch.parameter[name] for name in stage.parameters):
                part = parameter.module.rpartition(".")[2] if beside else ""
                found[OPERATIONS[stage.kind], parameter.gguf] = stage.name, part
                if parameter.tied_to:
                    tied = arch.parameter[parameter.tied_to].gguf
                    found[OPERATIONS[stage.kind], tied] = stage.name, part
    return found


BY_WEIGHT = _by_weight()
# (operation, name of its result) -> stage
BY_NAME = {
    ("ROPE", "Qcur"): "q_post_rope",
    ("ROPE", "Kcur"): "k_post_rope",
    ("ADD", "ffn_inp"): "post_attn_residual",
    ("SILU", "ffn_silu"): "ffn_silu",
    ("SWIGLU", "ffn_swiglu"): "ffn_swigl",
    ("MUL", "ffn_gate_par"): "ffn_swigl",
    ("ADD", "l_out"): "post_ffn_residual",
}


FUSED = "silu and product are one operation here"
FLASHED = "flash attention computes neither scores nor softmax"


Stored = Literal["f32", "f16", "q4_0", "q4_1", "q5_0", "q5_1", "q8_0", "iq4_nl", "bf16"]


class Settings(Options, frozen=True):
    threads: Annotated[int, Meta(ge=1, description="default: 1")] = 1
    ubatch: Annotated[int, Meta(ge=1, description="rows of one graph; default: 512")] = 512
    flash: Annotated[
        Literal["auto", "off", "on"], Meta(description="flash attention; default: auto")
    ] = "auto"
    cache_k: Annotated[Stored, Meta(description="of the K cache; default: f16")] = "f16"
    cache_v: Annotated[Stored, Meta(description="of the V cache; default: f16")] = "f16"
    logits: Annotated[
        Literal["all", "last"],
        Meta(description="last: of each call; then the last layer drops its other rows too"),
    ] = "all"
    repack: Annotated[bool, Meta(description="lay no weights out anew")] = True


class Watch:
    """What ``cb_eval`` calls: it picks the results that are stages and hands them to a recorder.

    A result is read as soon as it is there, and with it what the operation read: later operations
    may use the same memory.
    """

    def __init__(self, llama: Library, recorder: Recorder, biased: bool) -> None:
        self.failed: BaseException | None = None
        self.types: dict[str, str] = {}  # of the weights, by name
        self._llama, self._recorder, self._biased = llama, recorder, biased
        self._past = 0  # rows that have begun
        self.positions: list[int] = []  # of the rows that are to come in this call
        self._kq = np.empty(0)
        self.rotations = {"k": 0, "v": 0}  # channels that a quantised cache is rotated by

    def __call__(self, tensor: Any, ask: bool, _: Any) -> bool:
        try:
            take = self._find(tensor.contents)
            if take and not ask:
                take()
            return take is not None or not ask
        except BaseException as error:  # ctypes would print it and go on
            self.failed = error
            return False

    def _find(self, tensor: Tensor) -> Callable[[], None] | None:
        op, name = self._llama.op(tensor), tensor.name.decode()
        if op == "GET_ROWS" and name != "embd":
            return None  # rows for inputs that are part tokens, part vectors: there are none here
        for place in (0, 1):
            if tensor.src[place]:
                weight = WEIGHT.fullmatch(_source(tensor, place).name.decode())
                if weight and (hit := BY_WEIGHT.get((op, f"{weight[2]}.{weight[3]}"))):
                    layer = None if weight[1] is None else int(weight[1])
                    self._note_type(_source(tensor, place))
                    return lambda: self._weighted(tensor, layer, *hit)
        if op == "FLASH_ATTN_EXT":  # without a name of its own
            return lambda: self._flash(tensor)
        if op == "MUL_MAT" and name.startswith("kq-"):
            return lambda: self._scores(tensor)
        if op == "SOFT_MAX" and name.startswith("kq_soft_max-"):
            return lambda: self._softmax(tensor, int(name.rpartition("-")[2]))
        if op == "MUL_MAT" and name.startswith("kqv-"):
            return lambda: self._cache("v", _source(tensor, 0), transposed=True)
        if op == "MUL_MAT" and (turn := TURN.fullmatch(_source(tensor, 0).name.decode())):
            self.rotations[turn[1]] = tensor.ne[0]
        found = RESULT.fullmatch(name)
        if found and (stage := BY_NAME.get((op, found[1]))):
            return lambda: self._named(int(found[2]), stage, tensor)
        return None

    def _note_type(self, weight: Tensor) -> None:
        name = self._llama.ggml_type_name(weight.type).decode()
        self.types[weight.name.decode()] = name

    def _named(self, layer: int | None, stage: str, tensor: Tensor, part: str = "") -> None:
        self._recorder.named(layer, stage, self._llama.read(tensor), part)

    def _weighted(self, tensor: Tensor, layer: int | None, stage: str, part: str) -> None:
        if stage == "embedding":  # a new graph begins
            rows = tensor.ne[1]
            self._recorder.begin(self.positions[:rows])
            del self.positions[:rows]
            self._past += rows
            layer = 0
        self._named(layer, stage, tensor, part)
        if stage == "qkv_matmul" and self._biased:
            self._named(layer, "qkv_bias", tensor, part)  # until the bias is added, if there is one
        if stage == "attn_out":  # what enters it is in the right basis, whatever the V cache is in
            self._named(layer, "attention", _source(tensor, 1))

    def _scores(self, tensor: Tensor) -> None:
        self._kq = self._llama.read(tensor)[0]  # softmax may be computed in the same memory
        self._cache("k", _source(tensor, 0))

    def _softmax(self, tensor: Tensor, layer: int) -> None:
        """Scores are scaled inside the softmax: by its own float32 product, so the product here
        has the same bits. Cells of the cache that hold nothing yet are cut off."""
        scale = np.array(tensor.op_params[:1], np.int32).view(np.float32)
        keys = np.s_[..., : self._past]
        self._recorder.named(layer, "attn_scores", self._kq[keys] * scale)
        self._recorder.named(layer, "attn_softmax", self._llama.read(tensor)[0][keys])

    def _flash(self, tensor: Tensor) -> None:
        self._cache("k", _source(tensor, 1))
        self._cache("v", _source(tensor, 2))

    def _cache(self, kind: str, source: Tensor, transposed: bool = False) -> None:
        """Record the keys or values that attention reads, [S, K, H]; V lies [K, H, S] without flash
        attention."""
        if not (name := CACHE.match(source.name.decode())):
            return
        cells = self._llama.read(source)[0]
        rows = (cells.transpose(2, 0, 1) if transposed else cells.swapaxes(0, 1))[: self._past]
        value = unrotated(rows, self.rotations[kind])
        self._recorder.cached(int(name[2]), kind.upper(), value)


def unrotated(value: np.ndarray, size: int) -> np.ndarray:
    """Rows of a quantised cache in the basis of their stage: llama.cpp multiplies heads, ``size``
    channels at a time, by an orthonormal Walsh-Hadamard matrix, which is its own inverse."""
    if not size:
        return value
    matrix = np.ones((1, 1))
    while len(matrix) < size:
        matrix = np.block([[matrix, matrix], [matrix, -matrix]])
    turned = value.reshape(-1, size).astype(np.float64) @ matrix / np.sqrt(size)
    return turned.reshape(value.shape).astype(np.float32)


def _source(tensor: Tensor, place: int) -> Tensor:
    return tensor.src[place].contents


class LlamaSession(Session):
    """A GGUF that llama.cpp has loaded, and a context of its own."""

    dtype = "float32"  # what its operations give, whatever their factors are in

    def __init__(
        self, model: GgufWeights, settings: Settings, recorder: Recorder, calls: Calls
    ) -> None:
        self.settings, self.model = settings, model
        self.llama = Library()
        self._errors: list[str] = []
        self._log = Log(self._hear)  # kept, for the library calls it as long as it is loaded
        self.llama.llama_log_set(self._log, None)
        biased = "qkv_bias" in model.config.arch.stage
        self.watch = Watch(self.llama, recorder, biased)
        self._callback = Eval(self.watch)
        params = self.llama.model_params
        params.use_extra_bufts, params.n_gpu_layers = settings.repack, 0
        self._loaded = self.llama.llama_model_load_from_file(str(model.path).encode(), params)
        self._context = None
        if not self._loaded:
            raise self._refused(f"load {model.path}")
        try:
            self._context = self._make_context(calls.length)
        except UserError:
            self.close()
            raise
        k, v = settings.cache_k, settings.cache_v
        self.cache = k if k == v else f"k {k}, v {v}"
        self.why = {"ffn_silu": FUSED, "attn_scores": FLASHED, "attn_softmax": FLASHED}

    def _hear(self, level: int, text: bytes, _: Any) -> None:
        if level == ERROR and text:
            self._errors.append(text.decode(errors="replace").strip())

    def _refused(self, what: str) -> UserError:
        return UserError(f"llama.cpp cannot {what}: {(self._errors or ['it does not say why'])[0]}")

    def _make_context(self, length: int) -> int:
        params = self.llama.context_params
        params.n_ctx, params.n_batch = length, length
        params.n_ubatch = min(self.settings.ubatch, length)
        params.n_threads = params.n_threads_batch = self.settings.threads
        params.flash_attn_type = FLASH[self.settings.flash]
        params.type_k, params.type_v = TYPES[self.settings.cache_k], TYPES[self.settings.cache_v]
        params.cb_eval = self._callback
        context: int | None = self.llama.llama_init_from_model(self._loaded, params)
        if not context:
            raise self._refused("make a context")
        return context

    def step(self, tokens: Sequence[int], positions: Sequence[int]) -> np.ndarray:
        self.watch.positions = list(positions)
        batch = _batch(tokens, positions, self.settings.logits == "all")
        code = self.llama.llama_decode(self._context, batch)
        if self.watch.failed:
            raise self.watch.failed
        if code:
            raise self._refused(f"compute positions {positions[0]} to {positions[-1]}")
        size = self.model.config.vocab_size
        logits = self.llama.llama_get_logits_ith(self._context, -1)
        return np.ctypeslib.as_array(logits, (size,)).copy()

    def describe(self) -> dict[str, Any]:
        return {
            "name": "llama.cpp",
            "version": self.llama.llama_version().decode(),
            "backend": "CPU",
            "flags": self.llama.llama_print_system_info().decode().strip(),
            "threads": self.settings.threads,
            "versions": {"xllamacpp": self.llama.version},
            "weight_types": self.watch.types,
            "rotations": self.watch.rotations,
        }

    def close(self) -> None:
        if self._context:
            self.llama.llama_free(self._context)
        self.llama.llama_model_free(self._loaded)


def _batch(tokens: Sequence[int], positions: Sequence[int], all_logits: bool) -> Batch:
    n = len(tokens)
    sequence = c.cast((c.c_int32 * 1)(0), c.POINTER(c.c_int32))
    return Batch(
        n_tokens=n,
        token=(c.c_int32 * n)(*tokens),
        pos=(c.c_int32 * n)(*positions),
        n_seq_id=(c.c_int32 * n)(*[1] * n),
        seq_id=(c.POINTER(c.c_int32) * n)(*[sequence] * n),
        logits=(c.c_int8 * n)(*[all_logits] * (n - 1), 1),
    )


def open(model: Weights, settings: Settings, recorder: Recorder, calls: Calls) -> Session:
    if not isinstance(model, GgufWeights):
        raise UserError(
            f"{model.name}: llama.cpp reads GGUF files; its convert_hf_to_gguf.py writes one"
        )
    if settings.flash == "off" and TYPES[settings.cache_v] not in PLAIN:
        raise UserError(f"--cache-v {settings.cache_v} needs flash attention: --flash on")
    return LlamaSession(model, settings, recorder, calls)
