"""The way of a dump: measured, judged by the arithmetic that it was computed in, explained."""

from collections.abc import Callable
from pathlib import Path

from qwen_jax.prompt import Prompt
from qwen_jax.weights import open_model
from qwen_jax.weights.base import Weights
from stages import headroom
from stages.files import numpy_dtype
from stages.manifest import NAME
from stages.open import open_trace
from stages.trace import Trace
from stages.verdict import LocalError
from tools.localize import coverage
from tools.localize import show as show  # what is made here can then be printed,
from tools.localize.cache_drift import with_changes
from tools.localize.cost.query import Question
from tools.localize.preflight import check_model, trace_dtype
from tools.localize.result import Localization
from tools.report import notebook as notebook  # and drawn

SHORT = 64  # tokens of a trace whose measuring takes less time than compiling it well


def localize(
    trace: Trace | str | Path,
    model: Weights | str | Path | None = None,
    tokens: str | tuple[int, ...] | None = None,
    *,
    prompt: str | None = None,
    first_position: int = 0,
    harm: Question | None = None,
    right: Weights | None = None,
    exact: bool = False,
    advance: Callable[[LocalError], None] = lambda measured: None,
) -> Localization:
    """Where error is created in a trace, and what the mistakes are.

    Changes no setting of the process.

    Arguments:
        trace: a trace, or its directory.
        model: the weights that made it, or what ``open_model`` takes; None is the demo model.
        tokens, prompt, first_position: of a dump without a manifest, as of ``trace_model``.
        harm: the token whose log-probability the error is to be followed to; None skips that.
        right: the weights that the model's own are a rounding of: what that rounding, and all else,
            costs the token is said too.
        exact: measure every product in full, also those that are plainly sound.
        advance: is called after every stage.

    Raises:
        NotComparable: nothing in the trace can be replayed, or another model made it.
        UserError: no such trace or model, or a file is damaged.
    """
    from qwen_jax.replay import Replay
    from tools.localize import blaming, explaining, layout, suspecting
    from tools.localize.cost import measure as cost
    from tools.localize.formats import fit
    from tools.localize.measure import whole

    # what is judged, by which weights, in which precision
    weights = model if isinstance(model, Weights) else open_model(model)
    if not isinstance(trace, Trace):
        given, path = Prompt(text=prompt, tokens=tokens, first_position=first_position), Path(trace)
        trace = open_trace(path, None if (path / NAME).exists() else given.layout(weights))
    check_model(trace, weights)
    dtype = trace_dtype(trace)
    replay = Replay(trace, weights, numpy_dtype(dtype), unoptimised=len(trace.tokens) <= SHORT)

    # how much error each stage creates, and the arithmetic that explains it
    measured = whole.measure(replay, dtype, exact, advance)
    with replay.numerics():
        sums, found = [*measured.sums.values()], [*measured.items.values()]
        items = fit.fit(replay, sums, found, dtype, measured.fitted)

        # what is wrong, whose fault it is, and what the mistake is
        evidence = suspecting.Evidence(replay, items, dtype, measured.fitted)
        suspects, layouts = layout.take_out(evidence, suspecting.suspects(evidence))
        blame = blaming.clear(evidence, suspects)
        explained = explaining.explain(evidence, blame)

    result = Localization(
        trace=trace,
        model=weights.name,
        dtype=dtype,
        items=items,
        findings=with_changes(trace, [finding for finding in explained if not finding.odd]),
        layouts=layouts,
        odd=[finding for finding in explained if finding.odd],
        skipped=coverage.skipped(trace, weights.config.num_hidden_layers, items),
        coverage=coverage.of(trace, items),
        fitted=measured.fitted,
        nats=cost.of_scores(replay, items),
        headroom=headroom.measure(trace),
    )
    return cost.of_a_token(result, replay, harm, right)
