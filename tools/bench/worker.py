"""One contender in a process of its own: ``python -m tools.bench.worker``, a job as JSON on stdin.

It loads its model, runs twice to be warm (the first run compiles; with the second, memory stops
growing), and says so. Then every further line on stdin is one run, and every line on stdout the
seconds that it took; contenders take turns, so that a busy machine hits all of them alike.
"""

import json
import os
import shutil
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from qwen_jax import trace_command, tracing
from qwen_jax.tracing import Engine, Plan
from stages.places import modules

Run = Callable[[], None]


def trace(plan: Plan, out: Path) -> Run:
    """The JAX forward, every stage to disk; weights stay in memory, as in the others."""
    engine = _jax_engine(plan)
    return lambda: _written(plan, out, engine)


def one_file(plan: Plan, out: Path) -> Run:
    """The same as one safetensors file."""
    return trace(replace(plan, format="safetensors"), out)


def outputs(plan: Plan, out: Path) -> Run:
    """Each layer's output alone, to disk."""
    name = plan.arch.layer_output.name
    stored = tuple(key for key in plan.stored if key[0] == name)
    return trace(replace(plan, stages=(name,), stored=stored), out)


def bare(plan: Plan, out: Path) -> Run:
    """The same compiled forward with nothing captured."""
    engine, nothing = _jax_engine(plan), replace(plan, stages=())

    def run() -> None:
        tracing.compute(engine, [nothing], lambda *stage: None)

    return run


def oracle(plan: Plan, out: Path) -> Run:
    """transformers with hooks, every stage to disk."""
    from oracle.recorder import TorchEngine

    engine = TorchEngine(plan.model, plan.dtype, "cpu")
    return lambda: _written(plan, out, engine)


def nnsight(plan: Plan, out: Path) -> Run:
    """nnsight on the same network, its module outputs saved in memory. It has no access to
    q_post_rope, k_post_rope, attn_scores and attn_softmax."""
    import nnsight
    import torch

    from oracle import recorder

    model = recorder.load(plan.model, plan.dtype, "eager")
    network = nnsight.NNsight(model)
    ids = torch.tensor([plan.tokens])

    config = plan.model.config
    wanted = {
        each
        for stage, layer in config.arch.computation_order(config.num_hidden_layers)
        for each in modules(config.arch, stage, layer)
    }
    places: list[tuple[str, str]] = []  # in the order of PyTorch's computation, as nnsight asks
    hooks = [
        module.register_forward_pre_hook(lambda *_, path=path: places.append((path, "in")))
        for path, module in model.named_modules()
    ] + [
        module.register_forward_hook(lambda *_, path=path: places.append((path, "out")))
        for path, module in model.named_modules()
    ]
    with torch.inference_mode():
        model(ids, use_cache=False, logits_to_keep=1)
    for hook in hooks:
        hook.remove()
    places = [each for each in places if each in wanted]
    assert set(places) == wanted

    def run() -> None:
        saved = []
        with torch.inference_mode(), network.trace(ids, use_cache=False, logits_to_keep=1):
            for path, side in places:
                module = network.get(path)
                saved.append((module.input if side == "in" else module.output).save())
        assert len(saved) == len(wanted)

    return run


EVERY = (trace, one_file, outputs, bare, oracle, nnsight)
CONTENDERS = {each.__name__: each for each in EVERY}


def _jax_engine(plan: Plan) -> Any:
    from qwen_jax import engine, runtime

    runtime.for_a_command("cpu")
    return engine.JaxEngine(plan.model, plan.dtype, "xla", runtime.pick_device("cpu"), keep=True)


def _written(plan: Plan, out: Path, engine: Engine) -> None:
    tracing.to_disk(engine, plan, out)


def main() -> None:
    job = json.loads(sys.stdin.readline())
    replies = os.fdopen(os.dup(1), "w")  # a library that prints must not break the lines
    os.dup2(2, 1)
    parser = trace_command.parser("trace", "", ("xla",))
    [plan] = trace_command.plans_of(parser.parse_args(job["arguments"]))
    run = CONTENDERS[job["contender"]](plan, Path(job["out"]))
    for _ in range(2):
        shutil.rmtree(Path(job["out"]), ignore_errors=True)
        run()
    print("warm", file=replies, flush=True)
    for _ in sys.stdin:
        shutil.rmtree(Path(job["out"]), ignore_errors=True)
        began, used = time.perf_counter(), time.process_time()
        run()
        taken = time.perf_counter() - began, time.process_time() - used
        print(*taken, file=replies, flush=True)


if __name__ == "__main__":
    main()
