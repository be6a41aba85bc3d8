"""Qwen2 and Qwen3 in JAX, every named sub-stage of the forward pass an output.

    import qwen_jax

    model = qwen_jax.open_model("Qwen/Qwen2.5-0.5B")  # or a directory, or nothing for the demo
    trace = qwen_jax.trace_model(model, prompt="The capital of France is")
    trace.read("attn_softmax", 3)  # [N, T, S]

Importing this imports no JAX, and using it changes no setting of the process.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from qwen_jax.prompt import Prompt
from qwen_jax.weights import open_model
from qwen_jax.weights.base import Weights
from stages.open import open_trace
from stages.trace import Trace

__all__ = ["Prompt", "Trace", "Weights", "open_model", "open_trace", "trace_model"]


def trace_model(
    model: Weights | str | Path | None = None,
    tokens: str | Iterable[int] | None = None,
    *,
    prompt: str | None = None,
    first_position: int = 0,
    stages: str = "all",
    layers: str = "all",
    dtype: str = "float32",
    backend: str = "xla",
    device: Any = "cpu",
    logits: str = "all",
    generate: int | None = None,
    prefill_chunk: int | None = None,
    cache: str | None = None,
    out: str | Path | None = None,
    format: str | None = None,
    overwrite: bool = False,
) -> Trace:
    """Every stage of one sequence, in memory or on disk.

    Arguments:
        model: of ``open_model``, or what it takes; None is the demo model.
        tokens: ids, or ``--tokens``'s text; without them ``prompt`` is encoded, and without that
            the embedded prompt.
        stages, layers: as ``--stages`` and ``--layers``.
        dtype: what the model computes in: float32, bfloat16, float16 or float64.
        backend: "xla" compiles a layer once and runs it for every layer; "eager" is un-jitted.
        device: "cpu", "gpu", None for the best, or a ``jax.Device``.
        logits: "all" positions in ``lm_head``, or the "last".
        generate, prefill_chunk, cache: as ``--generate``, ``--prefill-chunk`` and ``--cache``: the
            same sequence in several calls, through a key/value cache. ``tokens`` of the trace then
            has what was generated, but for the last.
        out: a directory to write to, as the stages come; None keeps them in memory.
        format: of the files: "aprt" or "safetensors".

    Raises:
        UserError: no such model, stage, layer or device, tokens outside the vocabulary, or a
            directory that cannot be used.
    """
    from qwen_jax import engine, runtime, tracing

    weights = model if isinstance(model, Weights) else open_model(model)
    given = Prompt(text=prompt, tokens=tokens, first_position=first_position)
    ids = given.read(weights)
    plan = tracing.make_plan(
        weights,
        ids,
        given.positions(ids),
        stages=stages,
        layers=layers,
        dtype=dtype,
        format=format,
        logits=logits,
        generate=generate,
        prefill_chunk=prefill_chunk,
        cache=cache,
    )
    chosen = runtime.pick_device(device) if device is None or isinstance(device, str) else device
    made = engine.JaxEngine(weights, dtype, backend, chosen, keep=plan.cache is not None)
    if out is None:
        return tracing.to_memory(made, plan)
    tracing.check_out(plan, Path(out), overwrite)
    return tracing.to_disk(made, plan, Path(out), overwrite=overwrite).open()
