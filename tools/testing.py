"""For your own tests: trace a model, and assert that two traces agree.

``pytest_plugins = ["tools.testing"]`` in conftest.py brings the fixture ``trace_model``; in a test
file then

    from tools.testing import assert_traces_agree

    def test_my_engine(trace_model):
        reference = trace_model("path/to/model", tokens=(1, 2, 3))
        assert_traces_agree("path/to/my/dump", reference, bits=16, stages="attn_norm,lm_head")
"""

import math
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest

import qwen_jax
from stages.architecture import Key
from stages.errors import NotComparable, UserError
from stages.selection import parse_layers, parse_stages
from stages.trace import Trace
from tools.diff import diff


@pytest.fixture(scope="session")
def trace_model() -> Callable[..., Trace]:
    """``qwen_jax.trace_model`` that remembers: the same model, tokens and more are traced once a
    session."""
    kept: dict[tuple[Any, ...], Trace] = {}

    def trace(
        model: str | Path | None = None, tokens: Iterable[int] | None = None, **more: Any
    ) -> Trace:
        ids = None if tokens is None else tuple(tokens)
        spec = None if model is None else str(model)
        key = (spec, ids, *sorted(more.items()))
        if key not in kept:
            kept[key] = qwen_jax.trace_model(spec, ids, **more)
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
    allowed = None if bits is None else 0.0 if math.isinf(bits) else 2.0**-bits
    try:
        found = diff(a, b, stages=stages, layers=layers, tolerance=allowed)
        _check_asked(list(found.rows), stages, layers, found.b)
    except NotComparable as error:
        raise AssertionError(str(error)) from None
    except UserError as error:
        raise type(error)(str(error)) from None  # without where in this project it came from
    if not found.agree:
        raise AssertionError(f"{found.a.name} against {found.b.name}\n\n{found}")


def _check_asked(found: list[Key], stages: str, layers: str, trace: Trace) -> None:
    """What is asked for by name must have been compared.

    Raises:
        AssertionError: some of it was not.
    """
    __tracebackhide__ = True
    count = trace.config["num_hidden_layers"]
    names, numbers = parse_stages(stages, trace.arch), parse_layers(layers, count)
    asked = [
        (stage.name, layer)
        for stage, layer in trace.arch.computation_order(count)
        if stage.name in names and (layer is None or layer in numbers)
    ]
    every_stage, every_layer = (text.strip().lower() == "all" for text in (stages, layers))
    if not every_stage:
        missing = [f"{s} {n}" if n is not None else s for s, n in asked if (s, n) not in found]
    else:
        there = {layer for _, layer in found}
        missing = [f"layer {n}" for n in numbers if not every_layer and n not in there]
    if missing:
        more = f" and {len(missing) - 3} more" if len(missing) > 3 else ""
        lacking = ", ".join(missing[:3]) + more
        raise AssertionError(f"not compared, because not on both sides: {lacking}")
