"""Localizing one trace: measure every stage, judge the measurements, explain what is odd."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from qwen_jax.prompt import Prompt
from qwen_jax.weights import open_model
from qwen_jax.weights.base import Weights
from stages import headroom
from stages.architecture import SCORES
from stages.errors import NotComparable
from stages.manifest import NAME
from stages.trace import Trace, coarsest_dtype, numpy_dtype, open_trace
from stages.verdict import LocalError
from tools.localize import coverage
from tools.localize.cache_drift import with_changes
from tools.localize.cost.query import Question
from tools.localize.result import Localization


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
        harm: of which token to say what the error costs it; None is of none.
        right: the weights that the model's own are a rounding of: what that rounding, and all else,
            costs the token is said too.
        exact: measure every product in full, also those that are plainly sound.
        advance: is called after every stage.

    Raises:
        NotComparable: nothing in the trace can be replayed, or another model made it.
        UserError: no such trace or model, or a file is damaged.
    """
    from qwen_jax.replay import Replay
    from tools.localize import blaming, explaining, suspecting
    from tools.localize.cost import softmax_error
    from tools.localize.cost.attribution import measure
    from tools.localize.formats import fit, sample
    from tools.localize.measure import settle

    weights = model if isinstance(model, Weights) else open_model(model)
    if not isinstance(trace, Trace):
        given, path = Prompt(text=prompt, tokens=tokens, first_position=first_position), Path(trace)
        trace = open_trace(path, None if (path / NAME).exists() else given.layout(weights))
    check_model(trace, weights)
    dtype = trace_dtype(trace)
    replay = Replay(trace, weights, numpy_dtype(dtype))
    held, measured, fitted = {}, {}, fit.Fitted()
    guesses = sample.guess(replay) if dtype == "float32" and not exact else {}
    probed = replay.probed(sample.readings(replay, guesses))
    # a float64 trace has errors as small as those of the estimate's own arithmetic
    for m in replay if exact or dtype == "float64" else probed:
        key = m.stage.name, m.layer
        item = settle.judged(replay, m, dtype)
        formats = guesses.get(m.stage.name, ())
        if known := sample.explained(replay, m, item, formats, dtype):
            item = fitted.explain(*known)
        measured[key], held[key] = m, item
        advance(held[key])
    if not held:
        raise NotComparable(f"not comparable: {trace.path} holds no stage that can be replayed")
    _check_weights(trace, weights)
    settle.settle(replay, measured, held, dtype, fitted)
    if not any(item.compared or item.born for item in held.values()):
        raise NotComparable(
            f"not comparable: no stage of {trace.path} has a number, nor has what {weights.name} "
            "computes from it; all is NaN or infinite"
        )
    with replay.numerics():
        items = fit.fit(replay, [*measured.values()], [*held.values()], dtype, fitted)
        evidence = suspecting.Evidence(replay, items, dtype, fitted)
        blame = blaming.clear(evidence, suspecting.suspects(evidence))
        explained = explaining.explain(evidence, blame)
    findings = with_changes(trace, [f for f in explained if not f.odd])
    odd = [f for f in explained if f.odd]
    skipped = _skipped(trace, weights.config.num_hidden_layers, items)
    sound = {item.layer for item in items if item.row.kind is SCORES and item.estimated}
    felt = softmax_error.measure(replay, sound)
    found = Localization(
        trace, weights.name, dtype, items, findings, skipped, fitted, felt, odd,
        coverage.of(trace, items),
    )  # fmt: skip
    clean = found.verdict == "clean"
    if harm is not None and (harm.of_clean or not clean or right is not None):
        found.harm = measure(replay, harm, clean)
    found.headroom = headroom.measure(trace)
    if right is not None and harm is not None:
        check_model(trace, right)
        found.rounding = right.name, measure(Replay(trace, right, numpy_dtype(dtype)), harm, clean)
    return found


def trace_dtype(trace: Trace) -> str:
    """The precision that a trace was computed in: its manifest's, or the coarsest format that
    holds all values of its first dumped stages exactly."""
    if trace.dtype:
        return trace.dtype
    # not the embedding, which has the weights' format, nor scores, where a mask's fill may stand
    first = trace.arch.first.name
    telling = [k for k in trace.entries if k[0] != first and not trace.row(k[0]).kind.masked]
    values = [trace.read(*key).ravel()[:65536] for key in telling[:6]]
    return coarsest_dtype(np.concatenate(values)) if values else "float32"


def check_model(trace: Trace, weights: Weights) -> None:
    """The weights must be those that made the trace, or every number would be about the wrong
    model.

    Raises:
        NotComparable: the configuration is another one.
    """
    if trace.config != weights.config.to_json():
        raise NotComparable(
            f"not comparable: {trace.path} was made with another config than {weights.name}"
            f"{_how(trace.config, weights.config.to_json())}; give its own model with --model"
        )


def _how(theirs: Mapping[str, Any], ours: Mapping[str, Any]) -> str:
    differing = [k for k in ours if theirs.get(k) != ours[k] and k != "sliding_layers"]
    return "".join(f" ({k} {theirs.get(k)!r} / {ours[k]!r})" for k in differing[:1])


def _check_weights(trace: Trace, weights: Weights) -> None:
    """Called when the replay has read, and so hashed, every weight.

    Raises:
        NotComparable: the trace was made with other weights, so nothing it shows is a fault.
    """
    if trace.manifest is None:
        return
    stated = trace.manifest.model.weights
    other = [n for n, w in weights.hashes.items() if n in stated and stated[n] != w]
    if other:
        raise NotComparable(
            f"not comparable: {trace.path} was made with other weights than {weights.name} "
            f"({len(other)} of {len(weights.hashes)} tensors differ, first {other[0]}); "
            "give its own model with --model"
        )


def _skipped(trace: Trace, layers: int, items: list[LocalError]) -> list[dict[str, Any]]:
    """What was not checked alone: stages that are not in the trace, or that cannot be replayed from
    what is, by stage."""
    measured = {item.key for item in items}
    rows: dict[tuple[str, str], list[int | None]] = {}
    for stage, layer in trace.arch.computation_order(layers):
        if (stage.name, layer) not in trace.entries:
            rows.setdefault((stage.name, "not in the trace"), []).append(layer)
        elif (stage.name, layer) not in measured:
            why = "what it is computed from has too few rows"
            rows.setdefault((stage.name, why), []).append(layer)
    covered = {link: item.stage for item in items for link in item.segment}
    result = []
    for (name, why), found in rows.items():
        entry: dict[str, Any] = {"stage": name, "why": why}
        if trace.row(name).scope == "layer" and len(found) < layers:
            entry["layers"] = found
        through = {covered.get((name, layer)) for layer in found}
        if None not in through:
            entry["checked_through"] = sorted(t for t in through if t)
        result.append(entry)
    return result
