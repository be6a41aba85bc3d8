"""For your own tests: trace a model, and assert that two traces agree.

``pytest_plugins = ["tools.testing"]`` in conftest.py brings the fixture ``trace_model``; in a test
file then

    from tools.testing import assert_traces_agree

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
from qwen_jax.config import Config
from stages import manifest, preflight
from stages.compare import coarser
from stages.errors import NotComparable, UserError
from stages.table import computation_order, parse_layers, parse_stages
from stages.trace import Layout, Trace, open_trace
from tools import diff
from tools.diff import compare_traces
from tools.sweep.measure import name_of


def trace_of(
    model: str | None = None,
    tokens: Iterable[int] | None = None,
    dtype: str = "float32",
    backend: str = "xla",
    device: str = "cpu",
) -> Trace:
    """Every stage of one sequence, in memory.

    JAX is set up for the whole process (``qwen_jax.runtime.configure``): 64-bit types are on.

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
        spec = None if model is None else str(model)
        key = (spec, ids, *sorted(more.items()))
        if key not in kept:
            kept[key] = trace_of(spec, ids, **more)
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
        a, b: traces, or their directories; ``b`` is the reference. A dump without a manifest is
            taken to be of the other side's model and tokens.
        bits: every stage must be within a relative L2 of 2^-bits; ``math.inf`` asks for the same
            numbers. None is what ``tools.diff`` accepts for the dtype.
        stages, layers: as ``--stages`` and ``--layers``. What they name and one side lacks is a
            failure: what was not compared did not agree. "all" is all that both sides have.

    Raises:
        AssertionError: they differ, or cannot be compared.
        UserError: no such trace, stage or layer.
    """
    __tracebackhide__ = True
    try:
        a, b = _open(a, b), _open(b, a)
        keys = preflight.check(a, b).common
        keys = _asked(keys, stages, layers, b.config["num_hidden_layers"])
        rows, logits = compare_traces(a, b, keys)
    except NotComparable as error:
        raise AssertionError(str(error)) from None
    except UserError as error:
        raise type(error)(str(error)) from None  # without where in this project it came from
    default = diff.TOLERANCE[coarser(a.dtype, b.dtype)]
    tolerance = default if bits is None else 0.0 if math.isinf(bits) else 2.0**-bits
    if all(row.within(tolerance) for row in rows.values()):
        return
    table = Console(file=io.StringIO(), width=110, highlight=False, emoji=False, soft_wrap=True)
    diff.show_comparison(table, b, rows, logits, tolerance)
    raise AssertionError(f"{a.name} against {b.name}\n\n{table.file.getvalue()}")


def _open(this: Trace | str | Path, other: Trace | str | Path) -> Trace:
    if isinstance(this, Trace):
        return this
    path, layout = Path(this), None
    if path.is_dir() and not (path / manifest.NAME).exists():
        known = other if isinstance(other, Trace) else open_trace(Path(other))
        dims = Config.from_json(known.config).dims(len(known.tokens))
        layout = Layout(config=known.config, dims=dims, tokens=known.tokens)
    return open_trace(path, layout)


def _asked(common: list[diff.Key], stages: str, layers: str, count: int) -> list[diff.Key]:
    """Those of ``common`` that are asked for.

    Raises:
        AssertionError: some that are asked for by name are not there.
    """
    __tracebackhide__ = True
    names, numbers = parse_stages(stages), parse_layers(layers, count)
    asked = [
        (stage.name, layer)
        for stage, layer in computation_order(count)
        if stage.name in names and (layer is None or layer in numbers)
    ]
    found = [key for key in asked if key in common]
    every_stage, every_layer = (text.strip().lower() == "all" for text in (stages, layers))
    if not every_stage:
        missing = [name_of(*key) for key in asked if key not in common]
    else:
        there = {layer for _, layer in found}
        missing = [f"layer {n}" for n in numbers if not every_layer and n not in there]
    if missing or not found:
        more = f" and {len(missing) - 3} more" if len(missing) > 3 else ""
        lacking = (", ".join(missing[:3]) or "any of them") + more
        raise AssertionError(f"not compared, because not on both sides: {lacking}")
    return found
