"""A small engine for Qwen2 and Qwen3 in plain NumPy, as the author of another one would write it.

It reads a Hugging Face directory, runs one sequence and dumps every sub-stage as APRT files
without a manifest: a foreign trace. It shares no code with the project's forward pass.

    engine = Engine.open("qwen_jax/demo", mode="bf16")
    engine.replace("attn_norm", 2, lambda c: c["layer_input"])  # plant a fault by hand
    engine.run([1, 2, 3]).dump("build/foreign")
    engine.run([1, 2, 3, 4], steps=[2, 1, 1], cache="q8_0").dump_calls("build/decoded")

With ``steps`` it runs in calls, a prompt in chunks and the tokens after it one by one, through a
key/value cache. What it reads back from that are two more stages, ``k_cache`` and ``v_cache``.

Qwen3 differs in the attention alone: q and k have no bias but an RMSNorm over every head, before
RoPE, v has no bias either, and a head has a size of its own: N*H need not be D.

Axis letters: T query position, S key position, N query heads, K key/value heads, G = N/K, H head
size, D hidden, F intermediate, V vocabulary.
"""

import json
import struct
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import ml_dtypes  # also makes safetensors read bfloat16 as NumPy
import numpy as np
from safetensors.numpy import load_file

Array = np.ndarray
Rounding = Callable[[Array], Array]
Weights = dict[str, Array]  # Hugging Face name -> float32 array, a weight as [out, in]
Key = tuple[int | None, str]  # (layer it is stored under, stage)

BLOCK = 32  # values that share a scale in Q8_0, terms of a blocked sum, keys of a flash block


# ---------------------------------------------------------------------------------------------
# Rounding
# ---------------------------------------------------------------------------------------------


def exact(x: Array) -> Array:
    """No rounding."""
    return x


def _keep_bits(x: Array, dropped: int) -> Array:
    """Round float32 to nearest-even with the lowest ``dropped`` mantissa bits zero."""
    bits = np.ascontiguousarray(x, np.float32).view(np.uint32)
    last = (bits >> np.uint32(dropped)) & np.uint32(1)
    half = np.uint32((1 << (dropped - 1)) - 1)
    mask = np.uint32(0xFFFFFFFF << dropped & 0xFFFFFFFF)
    rounded = ((bits + half + last) & mask).view(np.float32)
    return np.where(np.isfinite(x), rounded, x)


def bf16(x: Array) -> Array:
    """float32 rounded to bfloat16, as float32."""
    return _keep_bits(x, 16)


def tf32(x: Array) -> Array:
    """float32 rounded to TF32's ten mantissa bits, as float32."""
    return _keep_bits(x, 13)


def f16(x: Array) -> Array:
    """float32 rounded to float16, as float32. What is too large becomes infinite."""
    with np.errstate(over="ignore"):
        return x.astype(np.float16).astype(np.float32)


def q8_0(x: Array) -> Array:
    """Rounded to 8 bits in blocks of 32 along the last axis, with a float16 scale, as ggml does."""
    length = x.shape[-1]
    padded = np.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, -length % BLOCK)])
    blocks = padded.reshape(*x.shape[:-1], padded.shape[-1] // BLOCK, BLOCK)
    scale = np.abs(blocks).max(axis=-1, keepdims=True) / np.float32(127)
    with np.errstate(divide="ignore"):
        inverse = np.where(scale > 0, np.float32(1) / scale, np.float32(0))
    values = np.rint(blocks * inverse) * f16(scale)
    return values.reshape(padded.shape)[..., :length]


def q4_0(x: Array) -> Array:
    """Rounded to sixteen steps in blocks of 32 along the last axis, as ggml does: the value of
    largest magnitude is the lowest step."""
    blocks = x.reshape(*x.shape[:-1], x.shape[-1] // BLOCK, BLOCK)
    largest = np.abs(blocks).argmax(axis=-1, keepdims=True)
    scale = np.take_along_axis(blocks, largest, axis=-1) / np.float32(-8)
    inverse = np.divide(1, scale, out=np.zeros_like(scale), where=scale != 0)
    steps = np.minimum(np.floor(blocks * inverse + np.float32(8.5)), 15) - 8
    return (steps * f16(scale)).reshape(x.shape)


def int8(x: Array) -> Array:
    """Rounded to 8 bits, one float32 scale for each row of the last axis."""
    scale = np.abs(x).max(axis=-1, keepdims=True) / np.float32(127)
    steps = np.rint(np.divide(x, scale, out=np.zeros_like(x), where=scale != 0))
    return (steps * scale).astype(np.float32)


def float8(x: Array, dtype: Any) -> Array:
    """Rounded to an 8-bit float without a scale; what is too large becomes the largest."""
    most = float(ml_dtypes.finfo(dtype).max)
    return np.clip(x, -most, most).astype(dtype).astype(np.float32)


CACHES: dict[str, Rounding] = {
    "float32": exact,
    "bfloat16": bf16,
    "float16": f16,
    "float8_e4m3fn": partial(float8, dtype=ml_dtypes.float8_e4m3fn),
    "float8_e5m2": partial(float8, dtype=ml_dtypes.float8_e5m2),
    "q8_0": q8_0,
    "q4_0": q4_0,
    "int8": int8,
}


@dataclass(frozen=True)
class Arithmetic:
    """Where an engine rounds.

    Attributes:
        store: the weights, the RoPE tables and every stage's output.
        activation, weight: the two operands of the linear layers.
        linear_out: what a linear layer returns.
        attention: the operands of q.k and p.v.
        cache: k and v as attention reads them. The dumped stages are not rounded by it.
        block: matmuls are summed in sequential blocks of that many terms.
        online: attention is computed block by block with a running maximum, from the scores. The
            dumped ``attn_softmax`` is then a by-product that nothing reads.
    """

    store: Rounding = exact
    activation: Rounding = exact
    weight: Rounding = exact
    linear_out: Rounding = exact
    attention: Rounding = exact
    cache: Rounding = exact
    block: int | None = None
    online: bool = False


ARITHMETIC: dict[str, Arithmetic] = {
    "f32": Arithmetic(),
    "bf16": Arithmetic(store=bf16),
    "f16": Arithmetic(store=f16),
    "tf32": Arithmetic(activation=tf32, weight=tf32, attention=tf32),
    "act8": Arithmetic(activation=q8_0),
    "bf16_matmul": Arithmetic(activation=bf16, weight=bf16, linear_out=bf16),
    "f16_kv": Arithmetic(cache=f16),
    "blocked": Arithmetic(block=BLOCK),
    "online_softmax": Arithmetic(online=True),
}


# ---------------------------------------------------------------------------------------------
# The model
# ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Shape:
    """The sizes and constants of one model; ``theta`` and ``eps`` are dimensionless.

    ``sliding`` has the layers that see the last ``window`` positions alone; ``yarn`` is the
    configuration's own entry.
    """

    architecture: str  # "qwen2" or "qwen3"
    layers: int
    hidden: int
    heads: int
    kv_heads: int
    head: int
    vocabulary: int
    eps: float
    theta: float
    tied: bool
    window: int | None = None
    sliding: frozenset[int] = frozenset()
    yarn: Mapping[str, Any] | None = None

    @property
    def layer_stages(self) -> tuple[str, ...]:
        """The stages of a layer, in the order of computation."""
        return LAYER_STAGES[self.architecture]

    @property
    def stages(self) -> tuple[str, ...]:
        """All stages, in the order of computation."""
        return ("embedding", *self.layer_stages, *END_STAGES)


def load(directory: str | Path) -> tuple[Shape, Weights]:
    """The shape and the float32 weights of a Hugging Face directory (one safetensors file).

    Raises:
        ValueError: another architecture or another scaling of RoPE than YaRN.
    """
    directory = Path(directory)
    raw = json.loads((directory / "config.json").read_text(encoding="utf-8"))
    rope = raw.get("rope_parameters") or raw.get("rope_scaling") or {}
    architecture = raw["model_type"]
    if architecture not in LAYER_STAGES:
        raise ValueError(f"{directory}: model_type {architecture!r} is none of {[*LAYER_STAGES]}")
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind not in ("default", "yarn"):
        raise ValueError(f"{directory}: RoPE of type {kind!r} is not supported")
    layers, window = raw["num_hidden_layers"], None
    if raw.get("use_sliding_window"):
        window = raw["sliding_window"]
    heads = raw["num_attention_heads"]
    head = raw["hidden_size"] // heads if architecture == "qwen2" else 128
    shape = Shape(
        architecture=architecture,
        layers=layers,
        hidden=raw["hidden_size"],
        heads=heads,
        kv_heads=raw.get("num_key_value_heads", heads),
        head=raw.get("head_dim") or head,
        vocabulary=raw["vocab_size"],
        eps=raw["rms_norm_eps"],
        theta=rope.get("rope_theta", raw.get("rope_theta", 10000.0)),
        tied=raw.get("tie_word_embeddings", False),
        window=window,
        sliding=frozenset(range(raw.get("max_window_layers", 28), layers) if window else ()),
        yarn=rope | {"most": raw["max_position_embeddings"]} if kind == "yarn" else None,
    )
    weights = load_file(directory / "model.safetensors")
    weights = {name: weight.astype(np.float32) for name, weight in weights.items()}
    if shape.tied:
        weights["lm_head.weight"] = weights["model.embed_tokens.weight"]
    return shape, weights


def rope_table(
    positions: Array,
    head: int,
    theta: float,
    step: float = 2,
    yarn: Mapping[str, Any] | None = None,
) -> tuple[Array, Array]:
    """cos and sin, [T, head/2] float32, of ``position * theta ** (-step * i / head)``."""
    exponent = step * np.arange(head // 2) / head
    frequency, size = (1.0 / theta**exponent), 1.0
    if yarn:
        frequency, size = _stretched(frequency, head, theta, yarn)
    angle = positions.astype(np.float32)[:, None] * frequency.astype(np.float32)
    return np.cos(angle) * np.float32(size), np.sin(angle) * np.float32(size)


def _stretched(
    frequency: Array, head: int, theta: float, yarn: Mapping[str, Any]
) -> tuple[Array, float]:
    """YaRN (arXiv 2309.00071): slow pairs turn ``factor`` times slower, fast ones as before, and
    what lies between is blended; and the factor on cos and sin."""
    original = yarn.get("original_max_position_embeddings") or yarn["most"]

    def pair(turns: float) -> float:
        return head * np.log(original / (turns * 2 * np.pi)) / (2 * np.log(theta))

    low = max(np.floor(pair(yarn.get("beta_fast", 32))), 0)
    high = min(np.ceil(pair(yarn.get("beta_slow", 1))), head - 1)
    slow = np.clip((np.arange(head // 2) - low) / max(high - low, 1e-3), 0, 1)
    factor = yarn["factor"]
    size = yarn.get("attention_factor") or 0.1 * np.log(factor) + 1
    return frequency * (slow / factor + 1 - slow), float(size)


def rotate(x: Array, cos: Array, sin: Array) -> Array:
    """x [T, heads, H] rotated by tables [T, H/2]: channel i pairs with channel i + H/2."""
    cos, sin = cos[:, None], sin[:, None]
    first, second = np.split(x, 2, axis=-1)
    return np.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)


@dataclass
class Context:
    """What an operation reads: earlier values by stage name, weights, and the engine's arithmetic.

    ``c["layer_input"]`` is the layer's input; ``c["tokens"]`` the ids. Outside the layers
    ``layer`` is None and ``c["post_ffn_residual"]`` is the last layer's output.

    Of an engine that runs in calls, everything but the cache has the rows of this call alone:
    ``past`` is how many came before them, ``prompt`` how many before the first decoded one,
    ``memory`` the layer's cache by stage.
    """

    engine: "Engine"
    layer: int | None
    values: dict[str, Array]
    past: int = 0
    prompt: int = 0
    memory: Mapping[str, Array] = field(default_factory=dict)

    def __getitem__(self, name: str) -> Array:
        return self.values[name]

    @property
    def shape(self) -> Shape:
        """The model's sizes."""
        return self.engine.shape

    @property
    def positions(self) -> Array:
        """[T] int, one apart."""
        return self["positions"]

    @property
    def keys(self) -> int:
        """How many positions there are up to now."""
        return self.past + len(self.positions)

    @property
    def k(self) -> Array:
        """[S, K, H]: k as the scores read it, out of the cache where there is one."""
        return self["k_cache"] if self.memory else self["k_post_rope"]

    @property
    def v(self) -> Array:
        """[S, K, H]: v as the weighted sum reads it."""
        return self["v_cache"] if self.memory else self.attended()[2]

    @property
    def allowed(self) -> Array:
        """[T, S] bool: a position sees itself and what came before it, in a sliding layer no more
        than a window of it."""
        query = self.past + np.arange(len(self.positions))[:, None]
        back = query - np.arange(self.keys)
        window = self.shape.window if self.layer in self.shape.sliding else None
        return (back >= 0) & (back < (window or self.keys))

    def put(self, stage: str, rows: Array, first: int | None = None) -> Array:
        """Write rows [T, K, H] into the cache in its format, where this call's belong unless
        ``first`` says where, and read back everything up to now, [S, K, H]."""
        held, first = self.memory[stage], self.past if first is None else first
        count = max(0, min(len(rows), len(held) - first))
        held[first : first + count] = self.engine.keep(rows[:count])
        return held[: self.keys].copy()

    def weight(self, name: str, layer: int | None = None) -> Array:
        """A weight by its Hugging Face name; inside a layer, without ``model.layers.N.``."""
        layer = self.layer if layer is None else layer
        full = name if layer is None else f"model.layers.{layer}.{name}"
        return self.engine.weights[full]

    def linear(self, x: Array, weight: Array) -> Array:
        """x [T, in] times weight [out, in] -> [T, out]."""
        a = self.engine.arithmetic
        return a.linear_out(self.product(a.activation(x), a.weight(weight).T))

    def dot(self, x: Array, y: Array) -> Array:
        """x [..., M, J] times y [..., J, P], the two batched matmuls of attention."""
        a = self.engine.arithmetic
        return self.product(a.attention(x), a.attention(y))

    def product(self, x: Array, y: Array) -> Array:
        """A float32 matmul, summed in the engine's order."""
        block = self.engine.arithmetic.block
        if block is None:
            return x @ y
        total: Array = np.zeros((), np.float32)
        for start in range(0, x.shape[-1], block):
            total = total + x[..., start : start + block] @ y[..., start : start + block, :]
        return total

    def heads(self, qkv: Array) -> tuple[Array, Array, Array]:
        """[T, (N+2K)*H] -> q [T, N, H], k [T, K, H], v [T, K, H]."""
        s = self.shape
        x = qkv.reshape(len(qkv), -1, s.head)
        return x[:, : s.heads], x[:, s.heads : s.heads + s.kv_heads], x[:, s.heads + s.kv_heads :]

    def attended(self) -> tuple[Array, Array, Array]:
        """q [T, N, H] and k [T, K, H] as RoPE reads them, and v [T, K, H] as attention does."""
        if self.shape.architecture == "qwen2":
            return self.heads(self["qkv_bias"])
        return self["q_norm"], self["k_norm"], self.heads(self["qkv_matmul"])[2]

    def normed(self, stage: str) -> Array:
        """What a norm is taken of, over the last axis: [T, D], or heads [T, N or K, H]."""
        if stage in HEAD_NORMS:
            return self.heads(self["qkv_matmul"])[HEAD_NORMS.index(stage)]
        return self[NORMS[stage][0]]

    def tables(self) -> tuple[Array, Array]:
        """The RoPE tables, as the engine stores them."""
        store = self.engine.arithmetic.store
        s = self.shape
        cos, sin = rope_table(self.positions, s.head, s.theta, yarn=s.yarn)
        return store(cos), store(sin)

    def groups(self) -> Array:
        """[N] int: the key/value head that each query head reads."""
        return np.arange(self.shape.heads) // (self.shape.heads // self.shape.kv_heads)

    def scores(self, q: Array, k: Array, groups: Array | None = None) -> Array:
        """q [T, N, H], k [S, K, H] -> q.k [N, T, S], not scaled."""
        k = self.engine.arithmetic.cache(k)[:, self.groups() if groups is None else groups]
        return self.dot(q.transpose(1, 0, 2), k.transpose(1, 2, 0))

    def mix(self, weights: Array, v: Array, groups: Array | None = None) -> Array:
        """weights [N, T, S], v [S, K, H] -> the weighted sum, [T, N, H]."""
        v = self.engine.arithmetic.cache(v)[:, self.groups() if groups is None else groups]
        return self.dot(weights, v.transpose(1, 0, 2)).transpose(1, 0, 2)


Operation = Callable[[Context], Array]


def softmax(scores: Array, allowed: Array) -> Array:
    """Softmax over S of scores [N, T, S] where ``allowed`` [T, S] is true, zero elsewhere."""
    masked = np.where(allowed, scores, np.float32(-np.inf))
    weights = np.exp(masked - masked.max(axis=-1, keepdims=True))
    return weights / weights.sum(axis=-1, keepdims=True)


def causal(length: int) -> Array:
    """[T, S] bool: a position sees itself and what came before."""
    return np.tri(length, dtype=bool)


def rms_norm(x: Array, weight: Array, eps: float) -> Array:
    """x over its root mean square along the last axis, times a weight of that size."""
    mean = np.mean(x * x, axis=-1, keepdims=True)
    return x / np.sqrt(mean + np.float32(eps)) * weight


# ---------------------------------------------------------------------------------------------
# One operation a stage
# ---------------------------------------------------------------------------------------------

NORMS: dict[str, tuple[str, str]] = {  # stage -> its input, its weight
    "attn_norm": ("layer_input", "input_layernorm.weight"),
    "q_norm": ("qkv_matmul", "self_attn.q_norm.weight"),
    "k_norm": ("qkv_matmul", "self_attn.k_norm.weight"),
    "ffn_norm": ("post_attn_residual", "post_attention_layernorm.weight"),
    "final_norm": ("post_ffn_residual", "model.norm.weight"),
}
HEAD_NORMS = ("q_norm", "k_norm")  # over H: one weight, the same for every head
LINEARS: dict[str, tuple[str, str]] = {
    "attn_out": ("attention", "self_attn.o_proj.weight"),
    "ffn_gate": ("ffn_norm", "mlp.gate_proj.weight"),
    "ffn_up": ("ffn_norm", "mlp.up_proj.weight"),
    "ffn_out": ("ffn_swigl", "mlp.down_proj.weight"),
    "lm_head": ("final_norm", "lm_head.weight"),
}
QKV = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")


def _embedding(c: Context) -> Array:
    return c.weight("model.embed_tokens.weight")[c["tokens"]]


def _norm(stage: str, c: Context) -> Array:
    return rms_norm(c.normed(stage), c.weight(NORMS[stage][1]), c.shape.eps)


def _linear(stage: str, c: Context) -> Array:
    source, weight = LINEARS[stage]
    return c.linear(c[source], c.weight(weight))


def _qkv_matmul(c: Context) -> Array:
    parts = [c.linear(c["attn_norm"], c.weight(f"{name}.weight")) for name in QKV]
    return np.concatenate(parts, axis=-1)


def _qkv_bias(c: Context) -> Array:
    return c["qkv_matmul"] + np.concatenate([c.weight(f"{name}.bias") for name in QKV])


def _q_post_rope(c: Context) -> Array:
    return rotate(c.attended()[0], *c.tables())


def _k_post_rope(c: Context) -> Array:
    return rotate(c.attended()[1], *c.tables())


def _k_cache(c: Context) -> Array:
    return c.put("k_cache", c["k_post_rope"])


def _v_cache(c: Context) -> Array:
    return c.put("v_cache", c.attended()[2])


def _attn_scores(c: Context) -> Array:
    return c.scores(c["q_post_rope"], c.k) * np.float32(c.shape.head**-0.5)


def _attn_softmax(c: Context) -> Array:
    return softmax(c["attn_scores"], c.allowed)


def _attention(c: Context) -> Array:
    mixed = _flash(c, c.v) if c.engine.arithmetic.online else c.mix(c["attn_softmax"], c.v)
    return mixed.reshape(len(mixed), -1)


def _flash(c: Context, v: Array) -> Array:
    """The weighted sum without a softmax that is ever whole: blocks of keys, a running maximum."""
    length = len(v)
    scores = np.where(c.allowed, c["attn_scores"], np.float32(-np.inf))
    v = v[:, c.groups()].transpose(1, 0, 2)  # [N, S, H]
    high = np.full((*scores.shape[:2], 1), -np.inf, np.float32)
    total = np.zeros_like(high)
    mixed = np.zeros((*scores.shape[:2], v.shape[-1]), np.float32)
    for start in range(0, length, BLOCK):
        block = scores[..., start : start + BLOCK]
        higher = np.maximum(high, block.max(axis=-1, keepdims=True))
        shrink = np.exp(high - higher)
        weights = np.exp(block - higher)
        total = total * shrink + weights.sum(axis=-1, keepdims=True)
        mixed = mixed * shrink + weights @ v[:, start : start + BLOCK]
        high = higher
    return (mixed / total).transpose(1, 0, 2)


def _post_attn_residual(c: Context) -> Array:
    return c["layer_input"] + c["attn_out"]


def _ffn_silu(c: Context) -> Array:
    return c["ffn_gate"] / (np.float32(1) + np.exp(-c["ffn_gate"]))


def _ffn_swigl(c: Context) -> Array:
    return c["ffn_silu"] * c["ffn_up"]


def _post_ffn_residual(c: Context) -> Array:
    return c["post_attn_residual"] + c["ffn_out"]


OPERATIONS: dict[str, Operation] = {
    "embedding": _embedding,
    "attn_norm": partial(_norm, "attn_norm"),
    "qkv_matmul": _qkv_matmul,
    "qkv_bias": _qkv_bias,
    "q_norm": partial(_norm, "q_norm"),
    "k_norm": partial(_norm, "k_norm"),
    "q_post_rope": _q_post_rope,
    "k_post_rope": _k_post_rope,
    "k_cache": _k_cache,
    "v_cache": _v_cache,
    "attn_scores": _attn_scores,
    "attn_softmax": _attn_softmax,
    "attention": _attention,
    "attn_out": partial(_linear, "attn_out"),
    "post_attn_residual": _post_attn_residual,
    "ffn_norm": partial(_norm, "ffn_norm"),
    "ffn_gate": partial(_linear, "ffn_gate"),
    "ffn_up": partial(_linear, "ffn_up"),
    "ffn_silu": _ffn_silu,
    "ffn_swigl": _ffn_swigl,
    "ffn_out": partial(_linear, "ffn_out"),
    "post_ffn_residual": _post_ffn_residual,
    "final_norm": partial(_norm, "final_norm"),
    "lm_head": partial(_linear, "lm_head"),
}
END_STAGES = ("final_norm", "lm_head")
CACHED = ("k_cache", "v_cache")  # only where there is a cache
SQUARE = ("attn_scores", "attn_softmax")  # [N, T, S]
LACKS = {"qwen2": HEAD_NORMS, "qwen3": ("qkv_bias",)}
LAYER_STAGES: dict[str, tuple[str, ...]] = {
    architecture: tuple(
        s for s in OPERATIONS if s not in ("embedding", *lacking, *END_STAGES, *CACHED)
    )
    for architecture, lacking in LACKS.items()
}


def keys_of(stage: str, layers: int) -> list[Key]:
    """Everywhere that a stage is stored: once a layer, or once."""
    if stage in ("embedding", *END_STAGES):
        return [(0 if stage == "embedding" else None, stage)]
    return [(layer, stage) for layer in range(layers)]


# ---------------------------------------------------------------------------------------------
# Running and dumping
# ---------------------------------------------------------------------------------------------


@dataclass
class Run:
    """One run's stages as they are dumped, in the order of computation.

    Attributes:
        stages: (layer or None, stage) -> float32 array with the axes of the stage. Rows of several
            calls are joined; a row of a cache is what the call that wrote it read back. Keys that a
            call could not see are zero.
        steps: how many rows each call computed.
        cache: the format of the cache; None without one.
        calls: the stages as each call had them: rows of that call, caches with all rows up to then.
        effects: for each planted fault, how far its stage is from what the right operation makes
            of the same inputs: the relative L2 norm, infinite if something is not finite. Zero is
            a fault that nobody can see.
        peaks: the same for the worst row or channel, which is what shows of a confined fault.
        first: for each planted fault, the first row that it changes.
    """

    stages: dict[Key, Array]
    steps: tuple[int, ...] = ()
    cache: str | None = None
    calls: list[dict[Key, Array]] = field(default_factory=list)
    effects: dict[Key, float] = field(default_factory=dict)
    peaks: dict[Key, float] = field(default_factory=dict)
    first: dict[Key, int] = field(default_factory=dict)

    def dump(self, directory: str | Path, omit: Collection[str] = ()) -> Path:
        """Write APRT files without a manifest. ``omit`` names stages that a fused engine lacks."""
        return write_stages(Path(directory), self.stages, omit)

    def dump_calls(self, directory: str | Path, omit: Collection[str] = ()) -> Path:
        """The same call by call, as the engine had them: ``step-0000/``, ``step-0001/``, ..."""
        for number, stages in enumerate(self.calls):
            write_stages(Path(directory) / f"step-{number:04d}", stages, omit)
        return Path(directory)


def write_stages(directory: Path, stages: Mapping[Key, Array], omit: Collection[str]) -> Path:
    """Write APRT files."""
    for (layer, stage), values in stages.items():
        if stage not in omit:
            write_aprt(aprt_path(directory, layer, stage), layer, values)
    return directory


def aprt_path(directory: Path, layer: int | None, stage: str) -> Path:
    """``layer-<N>/<stage>.bin``, or ``<stage>.bin`` for what belongs to no layer."""
    return directory / ("" if layer is None else f"layer-{layer}") / f"{stage}.bin"


def write_aprt(path: Path, layer: int | None, values: Array) -> None:
    """APRT, u32 layer or 0xFFFFFFFF, u32 count, float32 values, little-endian."""
    path.parent.mkdir(parents=True, exist_ok=True)
    header = struct.pack("<4sII", b"APRT", 0xFFFFFFFF if layer is None else layer, values.size)
    path.write_bytes(header + values.astype("<f4").tobytes())


# A dump mistake: from the engine, all stages and the place, what the file holds instead.
Redump = Callable[["Engine", Mapping[Key, Array], Key], Array]


class Engine:
    """One model, one arithmetic, and whatever was planted in it.

    Args:
        shape, weights: as ``load`` returns them.
        mode: a name of ``ARITHMETIC``.
        mutate: changes the loaded weights in place (a weight fault of the file, so to speak).
    """

    def __init__(
        self,
        shape: Shape,
        weights: Weights,
        mode: str = "f32",
        mutate: Callable[[Weights], None] | None = None,
    ):
        self.shape, self.mode, self.arithmetic = shape, mode, ARITHMETIC[mode]
        weights = dict(weights)
        if mutate:
            mutate(weights)
        self.weights = {name: self.arithmetic.store(weight) for name, weight in weights.items()}
        self.keep: Rounding = exact  # what the cache of a run rounds to
        self._operations: dict[Key, Operation] = {}
        self._redumps: dict[Key, Redump] = {}

    @classmethod
    def open(
        cls,
        directory: str | Path,
        mode: str = "f32",
        mutate: Callable[[Weights], None] | None = None,
    ) -> "Engine":
        """An engine on a checkpoint directory."""
        return cls(*load(directory), mode, mutate)

    def replace(self, stage: str, layer: int | None, operation: Operation) -> None:
        """Compute a stage differently in one layer (None for stages that belong to no layer)."""
        self._operations[layer, stage] = operation

    def redump(self, stage: str, layer: int | None, redump: Redump) -> None:
        """Dump a stage differently in one layer; what is computed stays right."""
        self._redumps[layer, stage] = redump

    def run(
        self,
        tokens: Sequence[int],
        logits: str = "last",
        first_position: int = 0,
        last_row: bool = False,
        steps: Sequence[int] = (),
        cache: str | None = None,
    ) -> Run:
        """One forward pass.

        Args:
            logits: "last" (lm_head is [V]) or "all" ([T, V]).
            first_position: of the first token.
            last_row: what follows the last layer's attention is computed for the last position
                alone, as nothing else is needed for the next token; those stages have one row.
            steps: how many tokens each call is given, such as (32, 32, 1, 1): through a cache.
            cache: its format, of ``CACHES``; where none is given the model's own.
        """
        ids, steps = np.asarray(tokens), tuple(steps) or (len(tokens),)
        if sum(steps) != len(ids) or min(steps) < 1:
            raise ValueError(f"steps {steps} are not of {len(ids)} tokens")
        if len(steps) > 1 and cache is None:
            cache = "float32"  # exact, whatever is put away
        if cache in ("q8_0", "q4_0") and self.shape.head % BLOCK:
            raise ValueError(f"{cache} has blocks of {BLOCK}, and heads have {self.shape.head}")
        self.keep = CACHES[cache or "float32"]
        run = Run({}, steps, cache)
        rights: list[dict[Key, Array]] = []
        memory, shadow = (self._memory(len(ids) if cache else 0) for _ in range(2))
        first = 0
        with np.errstate(all="ignore"):
            for count in steps:
                rows = slice(first, first + count)
                positions = first_position + np.arange(len(ids))[rows]
                given = {"tokens": ids[rows], "positions": positions}
                start = Context(self, None, given, first, _prompt(steps))
                rights.append({})
                run.calls.append(dict(self._call(start, memory, shadow, rights[-1], last_row)))
                first += count
            run.stages = joined(run.calls, steps)
            right = joined(rights, steps)
            for key in right:
                _measure(run, key, run.stages[key], right[key])
                run.first[key] = _first_row(run.stages[key], right[key], key[1] in SQUARE)
            computed = dict(run.stages)
            for key, redump in self._redumps.items():
                wrong = np.ascontiguousarray(redump(self, computed, key), np.float32)
                _measure(run, key, wrong, computed[key])
                run.stages[key] = wrong
            if logits == "last":
                head = run.stages[None, "lm_head"]
                run.stages[None, "lm_head"] = head[-1] if head.ndim == 2 else head
            return run

    def _memory(self, length: int) -> list[dict[str, Array]]:
        """A cache for every layer, empty where there is to be none."""
        size = (length, self.shape.kv_heads, self.shape.head)
        names = CACHED if length else ()
        return [
            {name: np.zeros(size, np.float32) for name in names} for _ in range(self.shape.layers)
        ]

    def _call(
        self,
        start: Context,
        memory: list[dict[str, Array]],
        shadow: list[dict[str, Array]],
        rights: dict[Key, Array],
        last_row: bool,
    ) -> Iterator[tuple[Key, Array]]:
        """Every stage of one call. ``shadow`` is a cache in which nothing is wrong; ``rights`` is
        given what a stage with a fault should have been."""
        given = start.values

        def step(context: Context, key: Key) -> Array:
            layer, stage = key
            right, store = context, self.arithmetic.store
            if stage in CACHED and layer is not None and key in self._operations:
                right = replace(context, memory=shadow[layer])
            value = store(OPERATIONS[stage](right))
            if key in self._operations:
                rights[key] = value
                value = store(self._operations[key](context).astype(np.float32))
            context.values[stage] = value
            return value

        x = step(replace(start, values=dict(given)), (0, "embedding"))
        yield (0, "embedding"), x
        for layer in range(self.shape.layers):
            context = replace(
                start, layer=layer, values=given | {"layer_input": x}, memory=memory[layer]
            )
            for stage in self._stages_of_a_layer(memory[layer]):
                x = step(context, (layer, stage))
                yield (layer, stage), x
                if last_row and stage == "attention" and layer == self.shape.layers - 1:
                    # of scores and their softmax this is no row, but nobody reads them any more
                    context.values = {name: value[-1:] for name, value in context.values.items()}
        context = replace(start, values=given | {"post_ffn_residual": x})
        for stage in END_STAGES:
            yield (None, stage), step(context, (None, stage))

    def _stages_of_a_layer(self, memory: Mapping[str, Array]) -> Iterator[str]:
        for stage in self.shape.layer_stages:
            yield stage
            if stage == "k_post_rope":
                yield from memory


def _prompt(steps: Sequence[int]) -> int:
    """How many tokens come before the first of those that are given one by one at the end."""
    decoded = next((n for n, count in enumerate(reversed(steps)) if count > 1), len(steps) - 1)
    return sum(steps) - decoded


def _first_row(wrong: Array, right: Array, square: bool) -> int:
    """The first row that differs."""
    if wrong.shape != right.shape:
        return 0
    rows = np.moveaxis(wrong != right, 1 if square else 0, 0).reshape(
        len(wrong[0] if square else wrong), -1
    )
    return int(rows.any(axis=1).argmax())


def joined(calls: Sequence[Mapping[Key, Array]], steps: Sequence[int]) -> dict[Key, Array]:
    """Each stage over all calls: its rows one after the other, keys that came later zero; of a
    cache the rows as the call that wrote them read them back."""
    ends = np.cumsum(steps)
    result = {}
    for key in calls[-1]:
        parts = [call[key] for call in calls]
        if key[1] in SQUARE:
            parts = [
                np.pad(part, [(0, 0), (0, 0), (0, ends[-1] - part.shape[-1])]) for part in parts
            ]
        if key[1] in CACHED:
            parts = [part[end - n :] for part, end, n in zip(parts, ends, steps, strict=True)]
        result[key] = np.concatenate(parts, axis=1 if key[1] in SQUARE else 0)
    return result


def _measure(run: Run, key: Key, wrong: Array, right: Array) -> None:
    """Note how far a planted fault is from right. Layouts are compared as they lie in memory."""
    run.effects[key] = run.peaks[key] = np.inf
    if wrong.size != right.size:
        return
    a, b = (x.reshape(right.shape).astype(np.float64) for x in (wrong, right))
    if key[1] == "attn_scores":  # nothing above the diagonal is part of the computation
        a, b = np.tril(a), np.tril(b)
    if not np.isfinite(a).all():
        return
    error, size = ((x * x).reshape(-1, x.shape[-1]) for x in (a - b, b))
    run.effects[key] = float(np.sqrt(error.sum() / max(size.sum(), 1e-60)))
    ratios = [
        error.sum(axis) / np.maximum(size.sum(axis), 0.01 * size.sum(axis).mean() + 1e-60)
        for axis in (0, 1)
    ]
    run.peaks[key] = float(np.sqrt(max(ratio.max() for ratio in ratios)))
