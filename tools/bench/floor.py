"""How fast a run could be at best: what it multiplies, reads and writes, at this machine's rates.

A floor is no forecast: it has no start-up, no Python, and every product at the rate of a large one.
"""

import math
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from qwen_jax import runtime, tracing
from qwen_jax.prompt import random_tokens
from qwen_jax.weights import open_model

BYTES = 1 << 28  # of what is copied and written to find the rates


@dataclass(frozen=True)
class Rates:
    """What the machine does in a second.

    Attributes:
        products: floating-point operations of a float32 product of 2048 x 2048 matrices.
        memory: bytes read and written by a copy.
        disk: bytes taken by one file, into the page cache.
    """

    products: float
    memory: float
    disk: float


def measure(folder: Path) -> Rates:
    """The best of some tries of each, with a file in ``folder``."""
    square = np.ones((2048, 2048), np.float32)
    source, target = np.ones(BYTES, np.uint8), np.empty(BYTES, np.uint8)
    file = folder / "rate"

    def write() -> None:
        with open(file, "wb", buffering=0) as opened:
            opened.write(memoryview(source))  # type: ignore[arg-type]

    found = Rates(
        products=2 * 2048**3 / _seconds(lambda: square @ square),
        memory=2 * BYTES / _seconds(lambda: np.copyto(target, source)),
        disk=BYTES / _seconds(write),
    )
    file.unlink()
    return found


def _seconds(work: Callable[[], object]) -> float:
    taken = []
    for _ in range(5):
        began = time.perf_counter()
        work()
        taken.append(time.perf_counter() - began)
    return min(taken)


def seconds(model: str | None, length: int, rates: Rates) -> dict[str, float]:
    """The floor of each contender and tool, for a prompt of ``length`` tokens in float32."""
    weights = open_model(model)
    plan = tracing.make_plan(weights, random_tokens(length, weights))
    config, arch = weights.config, weights.config.arch
    linear = {name for stage in arch.layer_stages if stage.linear for name in stage.parameters}
    named = config.tensor_names("layer", 0)
    layer = sum(math.prod(weights.shapes[named[name]]) for name in linear if name in named)
    count = config.num_hidden_layers * layer + config.vocab_size * config.hidden_size
    scores = config.num_hidden_layers * length**2 * config.num_attention_heads * config.head_dim
    products = 2 * length * config.num_hidden_layers * layer + 4 * scores
    products += 2 * config.vocab_size * config.hidden_size
    stored = sum(math.prod(s) * weights.dtype(n).itemsize for n, s in weights.shapes.items())
    bare = max(products / rates.products, 4 * count / rates.memory)
    # hashing and copying take a core from the products
    written = plan.total / rates.disk / (runtime.cpu_count() or os.cpu_count() or 1)
    trace, read = bare + written, stored / rates.memory
    return {
        "bare": bare,
        "trace": trace,
        "one_file": trace,
        "oracle": trace,
        "nnsight": bare,
        "cold": trace + read,
        "diff": 2 * plan.total / rates.memory,
        "localize": (plan.total + 4 * count) / rates.memory,
    }
