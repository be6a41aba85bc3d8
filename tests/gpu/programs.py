"""The programs: layers of a small checkpoint, and one that breaks each rule."""

import tarfile
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from qwen_jax.config import Config
from qwen_jax.forward import run_stages
from qwen_jax.models import FUNCTIONS
from qwen_jax.models.ops import Positional, linear, rms_norm
from qwen_jax.weights.base import Weights
from tools.parity import programs, variants
from tools.parity.gpu.compile import Compiled
from tools.parity.programs import Part

KEPT = Path(__file__).with_name("programs.tar.xz")
TOKENS = (5, 41, 17, 30, 2, 23, 11, 38, 46, 9, 28, 33, 4, 19, 44, 7, 25)
BATCH = programs.make_batch(TOKENS, len(TOKENS), 1)
DTYPES = ("float32", "bfloat16", "float16")


class Planted(NamedTuple):
    """A program that breaks one rule, and what must be said of it."""

    part: Part
    precision: str
    rule: str
    stage: str
    instruction: str


def layers(model: Weights, dtype: str) -> dict[str, Part]:
    """The layer-wise programs, by name."""
    variant = variants.variant(model.config.arch, "stages", "")
    cpu = jax.devices("cpu")[0]
    engine = programs.Layers(model, dtype, "xla", cpu, variant)
    return {part.name: part for part in engine.programs(BATCH)}


def exponential(config: Config, pos: Positional, x: Array, weight: Array) -> Array:
    """RMSNorm with its root by way of an exponential."""
    mean = (x * x).mean(-1, keepdims=True) + np.float32(config.rms_norm_eps)
    return x * jnp.exp(-jnp.log(mean) / 2) * weight


def atomic(config: Config, pos: Positional, x: Array, weight: Array) -> Array:
    """RMSNorm of what several threads add up."""
    length = x.shape[1]
    rows = jnp.zeros_like(x).at[:, (np.arange(length) * 7) % length // 2].add(x)
    return rms_norm(config, rows, weight)


def called(config: Config, pos: Positional, x: Array, weight: Array) -> Array:
    """RMSNorm of what a library factorises."""
    square = jnp.einsum("btd,bsd->bts", x, x) + jnp.eye(x.shape[1], dtype=x.dtype)
    return rms_norm(config, x, weight) + lax.linalg.cholesky(square).sum((1, 2))[:, None, None]


def nothing(config: Config, pos: Positional, x: Array, weight: Array) -> Array:
    """No RMSNorm."""
    return x


def lower(config: Config, pos: Positional, x: Array, weight: Array) -> Array:
    """A product of bfloat16 numbers."""
    return linear(x.astype(jnp.bfloat16), weight.astype(jnp.bfloat16))


def planted(model: Weights) -> dict[str, Planted]:
    """A program for each rule."""
    arch, parts = model.config.arch, layers(model, "float32")

    def replaced(name: str, stage: str = "", function: Any = None, without: str = "") -> Part:
        """A program with another function for a stage, or one that keeps a stage to itself."""
        part = parts[name]
        functions = FUNCTIONS[arch.name] | {stage: function}
        rows = [arch.stage[each] for each in part.stages]

        def run(parameters: Any, pos: Any, given: Any) -> dict[str, Array]:
            dtype = np.dtype(np.float32)
            found = run_stages(rows, model.config, parameters, pos, given, dtype, functions)
            return {name: value for name, value in found.items() if name != without}

        return Part(part.name, jax.jit(run), part.arguments, part.stages)

    norm = partial(replaced, "norm", "final_norm")
    return {
        "default": Planted(parts["head"], "default", "products", "lm_head", "tf32"),
        "lower": Planted(
            replaced("head", "lm_head", lower), "highest", "products", "lm_head", "bf16"
        ),
        "exponential": Planted(
            norm(exponential), "highest", "rounding", "final_norm", "ex2.approx.ftz.f32"
        ),
        "atomic": Planted(norm(atomic), "highest", "atomics", "final_norm", "atom."),
        "called": Planted(norm(called), "highest", "calls", "final_norm", "custom-call cusolver"),
        "missing": Planted(
            replaced("layer", without="attn_scores"),
            "highest",
            "outputs",
            "attn_scores",
            "no output",
        ),
        "nothing": Planted(norm(nothing), "highest", "outputs", "final_norm", "parameter"),
    }


def read() -> dict[str, Compiled]:
    """The programs that are kept here, by name."""
    with TemporaryDirectory() as folder, tarfile.open(KEPT) as file:
        file.extractall(folder, filter="data")
        return {path.name: Compiled.read(path) for path in sorted(Path(folder).iterdir())}
