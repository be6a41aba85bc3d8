"""``python -m tests.planted.shares``: does the sum of the shares tell what the error does?

A row is a checkpoint and a length, a column an engine's arithmetic; a cell has the sum of all
shares of the log-probability, in brackets that of slopes at the dump alone, and the true change:
the engine's own against a forward in float64.
"""

import argparse
import tempfile
from functools import cache
from pathlib import Path

import numpy as np

from qwen_jax import trace_model
from qwen_jax.replay import Replay
from qwen_jax.weights.base import Weights
from stages.files import numpy_dtype
from stages.trace import MemoryTrace
from tests.planted.matrix import Bench, make_bench
from tools.localize.cost import attribution
from tools.localize.cost.result import Harm
from tools.localize.preflight import trace_dtype
from tools.numpy_engine.engine import Run

MODES = ("f32", "f16", "bf16", "act8")
CHECKPOINTS = ("demo", "small", "small-qwen3", "hard", "hard-qwen3", "0.5b")


def memory_trace(bench: Bench, run: Run, omit: tuple[str, ...] = ()) -> MemoryTrace:
    """A run as a trace, without some stages."""
    values = {(s, layer): v for (layer, s), v in run.stages.items() if s not in omit}
    layout = bench.layout
    trace = MemoryTrace("run", layout.config, layout.tokens, "", values, layout.positions)
    trace.dtype = trace_dtype(trace)
    return trace


def replay_of(bench: Bench, run: Run, omit: tuple[str, ...] = ()) -> Replay:
    trace = memory_trace(bench, run, omit)
    return Replay(trace, bench.model, numpy_dtype(trace.dtype or "float32"), unoptimised=True)


def measured(bench: Bench, run: Run, omit: tuple[str, ...] = (), **asked: int) -> Harm:
    """What the error of a run costs, in the precision that a command takes for it."""
    clean = bench.mode == "f32" and run is bench.right
    found = attribution.measure(replay_of(bench, run, omit), attribution.Question(**asked), clean)
    assert found is not None
    return found


@cache
def exact_logits(model: Weights, tokens: tuple[int, ...], first: int) -> np.ndarray:
    """[T, V] in float64."""
    trace = trace_model(model, tokens, first_position=first, stages="lm_head", dtype="float64")
    return trace.read("lm_head", None)


def log_softmax(logits: np.ndarray) -> np.ndarray:
    shifted = logits.astype(np.float64) - logits.max()
    return shifted - np.log(np.exp(shifted).sum())


def true_changes(bench: Bench, run: Run, found: Harm) -> tuple[float, float]:
    """By how much the engine's margin and log-probability differ from exact arithmetic's."""
    first = bench.layout.positions[0]
    exact = log_softmax(exact_logits(bench.model, tuple(bench.tokens), first)[found.row])
    ours = log_softmax(run.stages[None, "lm_head"][found.row - len(bench.tokens)])
    a, b = found.token, found.against
    return ours[a] - ours[b] - exact[a] + exact[b], ours[a] - exact[a]


def table(names: tuple[str, ...], lengths: tuple[int, ...]) -> str:
    """The Markdown table."""
    lines = ["| checkpoint, tokens | " + " | ".join(MODES) + " |", "|---" * 5 + "|"]
    with tempfile.TemporaryDirectory() as scratch:
        for name in names:
            for length in lengths:
                cells = []
                for mode in MODES:
                    bench = make_bench(name, mode, Path(scratch), length)
                    found = measured(bench, bench.right)
                    alone = measured(bench, bench.right, checked=False)
                    _, true = true_changes(bench, bench.right, found)
                    sums = f"{found.logprob_sum:+.3e} ({alone.logprob_sum:+.3e})"
                    cells.append(f"{sums} for {true:+.3e}")
                lines.append(f"| {name}, {length} | " + " | ".join(cells) + " |")
                print(lines[-1], flush=True)
    return "\n".join(lines)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--checkpoint", nargs="+", choices=CHECKPOINTS, default=CHECKPOINTS)
    parser.add_argument("--tokens", nargs="+", type=int, default=[64, 512])
    args = parser.parse_args()
    print(table(tuple(args.checkpoint), tuple(args.tokens)))
