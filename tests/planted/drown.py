"""``python -m tests.planted.drown``: how small a fault may be and still be found.

Each row is one kind of fault at growing size, planted in layer 2 of the demo model; a cell is the
smallest size that the localizer places at the right stage and layer.
"""

import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np

from tests.planted.matrix import ONE_LAYER, Bench, make_bench
from tools.numpy_engine.engine import OPERATIONS, Array, Context, Engine, rms_norm, softmax

SIZES = (1e-7, 1e-6, 1e-5, 1e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1, 3e-1, 1.0)
MODES = ("f32", "f16", "bf16", "act8")
Plant = Callable[[Context, Array, float], Array]


def _channel(c: Context, y: Array, size: float) -> Array:
    y = y.copy()
    y[:, 37] *= np.float32(1 + size)
    return y


def _position(c: Context, y: Array, size: float) -> Array:
    y = y.copy()
    y[20] *= np.float32(1 + size)
    return y


def _element(c: Context, y: Array, size: float) -> Array:
    y = y.copy()
    y[20, 37] += np.float32(size * np.abs(y).max())
    return y


def _all(c: Context, y: Array, size: float) -> Array:
    return y * np.float32(1 + size)


def _temperature(c: Context, y: Array, size: float) -> Array:
    allowed = np.tril(np.ones(y.shape[1:], bool))
    return softmax(c["attn_scores"] * np.float32(1 / (1 + size)), allowed)


def _eps(c: Context, y: Array, size: float) -> Array:
    """eps larger by ``size`` times the mean square of the input."""
    x = c["layer_input"]
    eps = c.shape.eps + size * float((x * x).mean())
    return rms_norm(x, c.weight("input_layernorm.weight"), eps)


FAULTS: list[tuple[str, str, Plant]] = [
    ("one channel of up, relative", "ffn_up", _channel),
    ("one position of up, relative", "ffn_up", _position),
    ("one element of up, of the largest", "ffn_up", _element),
    ("all of the attention output, relative", "attn_out", _all),
    ("softmax temperature, relative", "attn_softmax", _temperature),
    ("eps of the norm, of the mean square", "attn_norm", _eps),
]


def smallest(bench: Bench, stage: str, plant: Plant) -> float | None:
    """The smallest size at which this stage of this layer, and nothing else, is accused."""
    from tools.localize.result import faults as reported

    for size in SIZES:
        engine = Engine(*bench.loaded, bench.mode)
        engine.replace(stage, ONE_LAYER, lambda c, s=size: plant(c, OPERATIONS[stage](c), s))
        found = reported(bench.localize(engine.run(bench.tokens, "all")))
        if [(f.stage, f.layer) for f in found] == [(stage, ONE_LAYER)]:
            return size
    return None


def table() -> str:
    """The Markdown table."""
    lines = ["| fault | " + " | ".join(MODES) + " |", "|---" * (len(MODES) + 1) + "|"]
    with tempfile.TemporaryDirectory() as scratch:
        benches = [make_bench("demo", mode, Path(scratch)) for mode in MODES]
        for says, stage, plant in FAULTS:
            cells = [smallest(bench, stage, plant) for bench in benches]
            shown = ["-" if cell is None else f"{cell:g}" for cell in cells]
            lines.append(f"| {says} | " + " | ".join(shown) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    from qwen_jax import runtime

    runtime.for_a_command("cpu")
    print(table())
