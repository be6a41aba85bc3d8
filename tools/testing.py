"""For your own tests: trace a model, and assert that two traces agree.

pytest_plugins = ["tools.testing"]  # in conftest.py: the fixture ``trace_model``

def test_my_engine(trace_model):
    reference = trace_model("path/to/model", tokens=(1, 2, 3))
    assert_traces_agree("path/to/my/dump", reference, bits=16, stages="attn_norm,lm_head")
"""

import argparse
import io
import math
from collections.abc import Callable, Iterable
from pathlib import Path

import pytest
from rich.console import Console

from qwen_jax import source
from stages import preflight
from stages.errors import NotComparable
from stages.table import parse_layers, parse_stages
from stages.trace import Trace, open_trace
from tools import diff
from tools.diff import compare_traces


def trace_of(
    model: str | None = None,
    tokens: Iterable[int] | None = None,
    dtype: str = "float32",
    backend: str = "xla",
    device: str = "cpu",
) -> Trace:
    """Every stage of one sequence, in memory.

    Arguments:
        model: as ``--model``; None is the demo model.
        tokens: None is the embedded prompt.
        backend: "xla" as it is traced, or "eager": un-jitted.

    Raises:
        UserError: no such model, or tokens outside its vocabulary.
    """
    import numpy as np

    from qwen_jax import runtime
    from qwen_jax.engine import JaxEngine
    from tools.sweep.memory import MemoryTrace

    parser = argparse.ArgumentParser()
    source.add_model_arguments(parser)
    checkpoint = source.open_model(model)
    given = [] if tokens is None else ["--tokens=" + ",".join(map(str, tokens))]
    ids = source.read_tokens(parser.parse_args(given), checkpoint)
    engine = JaxEngine(checkpoint, dtype, backend, runtime.configure(device))
    values: dict[tuple[str, int | None], np.ndarray] = {}
    engine.run(ids, "all", lambda *key: True, lambda s, n, value: values.update({(s, n): value}))
    return MemoryTrace(f"{backend} trace of {checkpoint.name}", checkpoint, ids, dtype, values)


@pytest.fixture(scope="session")
def trace_model() -> Callable[..., Trace]:
    """``trace_of`` that remembers: the same model, tokens and dtype are traced once a session."""
    kept: dict[tuple, Trace] = {}

    def trace(
        model: str | Path | None = None, tokens: Iterable[int] | None = None, **more: str
    ) -> Trace:
        ids = None if tokens is None else tuple(tokens)
        key = (model, ids, *sorted(more.items()))
        if key not in kept:
            kept[key] = trace_of(None if model is None else str(model), ids, **more)
        return kept[key]

    return trace


def assert_traces_agree(
    a: Trace | str | Path,
    b: Trace | str | Path,
    *,
    bits: float | None = None,
    stages: str = "all",
    layers: str = "all",
) -> None:
    """Fail, with the table of ``tools.diff``, unless ``a`` is as close to ``b`` as asked.

    Arguments:
        a, b: traces, or their directories; ``b`` is the reference.
        bits: every stage must be within a relative L2 of 2^-bits; ``math.inf`` asks for the same
            numbers. None is what ``tools.diff`` accepts for the dtype.
        stages, layers: as ``--stages`` and ``--layers``. A stage of the list that one side lacks
            in every layer is a failure: what was not compared did not agree.

    Raises:
        AssertionError: they differ, or cannot be compared.
    """
    __tracebackhide__ = True
    a, b = (t if isinstance(t, Trace) else open_trace(Path(t)) for t in (a, b))
    names = parse_stages(stages)
    numbers = parse_layers(layers, b.config["num_hidden_layers"])
    try:
        ready = preflight.check(a, b)
        keys = [(s, n) for s, n in ready.common if s in names and (n is None or n in numbers)]
        missing = [] if stages == "all" else [s for s in names if s not in {k[0] for k in keys}]
        if missing or not keys:
            lacking = ", ".join(missing) or "any of them"
            raise AssertionError(f"not compared, because not on both sides: {lacking}")
        rows, logits = compare_traces(a, b, keys)
    except NotComparable as error:
        raise AssertionError(str(error)) from None
    default = diff.TOLERANCE[diff.coarser(a.dtype, b.dtype)]
    tolerance = default if bits is None else 0.0 if math.isinf(bits) else 2.0**-bits
    if all(row.within(tolerance) for row in rows.values()):
        return
    table = Console(file=io.StringIO(), width=110, highlight=False, emoji=False, soft_wrap=True)
    diff.show_comparison(table, b, rows, logits, tolerance)
    raise AssertionError(f"{a.name} against {b.name}\n\n{table.file.getvalue()}")
