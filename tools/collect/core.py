"""Running an engine and writing what it computes: what the command does, as a function."""

import os
import platform
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import msgspec

from qwen_jax.prompt import Prompt
from qwen_jax.weights import open_model
from qwen_jax.weights.base import Weights
from stages.errors import UserError
from stages.manifest import WeightEntry
from stages.version import NAME, version
from stages.writer import replaceable
from tools.collect import effective, engines, options
from tools.collect.recorder import Collected, Recorder
from tools.collect.session import Calls, Session, run


def collect(
    engine: str,
    model: Weights | str | Path,
    out: str | Path,
    tokens: str | Iterable[int] | None = None,
    *,
    prompt: str | Prompt | None = None,
    first_position: int = 0,
    stages: str = "all",
    layers: str = "all",
    steps: tuple[int, ...] | None = None,
    generate: int = 0,
    of: Weights | str | Path | None = None,
    weights: str | Path | None = None,
    overwrite: bool = False,
    **settings: Any,
) -> Collected:
    """Run an engine on a model, and write every stage that it shows.

    Arguments:
        engine: one of ``tools.collect.engines.ENGINES``.
        model: what the engine loads; ``of`` is what that should be, where it may be wrong.
        tokens, prompt, first_position: as of ``qwen_jax.trace_model``; a ``Prompt`` says all three.
        stages, layers: as ``--stages`` and ``--layers``.
        steps: rows of the prompt in each call; None is all in one. ``generate``: then so many
            tokens, the likeliest each time, in calls of their own.
        weights: a directory for the weights that the engine multiplies by, where those are its own.
        settings: of the engine: the fields of its module's ``Settings``.

    Raises:
        UserError: no such engine, model or setting, an engine that refuses, or a directory that
            cannot be used.
    """
    adapter = engines.adapter(engine)
    chosen, out = options.checked(adapter.Settings, settings), Path(out)
    replaceable(out, overwrite)
    given = model if isinstance(model, Weights) else open_model(model)
    right = given if of is None else of if isinstance(of, Weights) else open_model(of)
    if not isinstance(prompt, Prompt):
        prompt = Prompt(text=prompt, tokens=tokens, first_position=first_position)
    elif tokens is not None or first_position:
        raise UserError("a Prompt has tokens and first position itself; do not give them beside it")
    ids = prompt.read(right)
    positions = prompt.positions(ids)
    calls = Calls(steps or (len(ids),), generate)
    if sum(calls.steps) != len(ids):
        raise UserError(
            f"--steps add up to {sum(calls.steps)}, but the prompt has {len(ids)} tokens"
        )
    recorder = Recorder(right, stages, layers)
    if weights:
        effective.refuse(Path(weights))
    with adapter.open(given, chosen, recorder, calls) as session:
        if weights and not session.own_weights:
            raise UserError(
                f"--weights: {engine} multiplies by the values in the files of {given.name}; "
                "tools.localize takes those"
            )
        computed, logits = run(session, ids, positions, calls)
        hashes, judged_by = _weights(session, given, weights)
        if of is not None:  # what it multiplies by is what is in question
            hashes, judged_by = {}, right.name
        found = recorder.finish(
            out,
            computed,
            describe(session, msgspec.structs.asdict(chosen)),
            cache=session.cache,
            dtype=session.dtype,
            weights=hashes,
            why=session.why,
            overwrite=overwrite,
        )
    return replace(found, judged_by=judged_by, next_token=int(logits.argmax()))


def _weights(
    session: Session, model: Weights, out: str | Path | None
) -> tuple[Mapping[str, WeightEntry] | None, str | None]:
    """Hashes for the manifest, and what ``--model`` of tools.localize should be."""
    if out:
        written = effective.write(Path(out), model, session.weights())
        return {name: written.hash(name) for name in written.shapes}, str(out)
    return ({}, None) if session.own_weights else (None, model.name)


def describe(session: Session, settings: Mapping[str, Any]) -> dict[str, Any]:
    """The ``engine`` object of a manifest: name, version, device, options, versions."""
    told = {"backend": "", "device": f"cpu: {platform.machine()}", "flags": ""} | session.describe()
    versions = {NAME: version(), "python": platform.python_version()}
    return told | {
        "options": {name: value for name, value in settings.items() if value is not None},
        "cpu_count": os.cpu_count(),
        "versions": versions | told.get("versions", {}),
        "own_weights": session.own_weights,
    }


def describe_files(engine: str, map: str) -> dict[str, Any]:
    """The ``engine`` object of a manifest for a trace collected from an engine's own files."""
    told = {"name": engine, "version": "of unknown version", "backend": "", "device": "unknown"}
    return told | {"flags": "", "map": Path(map).stem, "versions": {NAME: version()}}
