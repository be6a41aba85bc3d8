"""``python -m qwen_jax.trace``: dump every sub-stage of the JAX forward pass."""

import argparse
import os
import re
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, nullcontext, suppress
from dataclasses import asdict
from functools import partial
from typing import TYPE_CHECKING

from qwen_jax import cli, trace_command, tracing
from qwen_jax.estimate import peak_memory
from qwen_jax.processes import Group
from qwen_jax.tracing import Engine, Plan
from qwen_jax.weights.base import Weights
from stages.errors import UserError

if TYPE_CHECKING:
    import jax


def add_mesh_arguments(parser: argparse.ArgumentParser) -> None:
    """--mesh, and what several processes need to find each other."""
    add = parser.add_argument
    add("--mesh", type=_mesh, metavar="tp=N", help="split the model over N devices")
    add("--coordinator", type=_address, metavar="HOST:PORT", help="where process 0 is met")
    add("--process-id", type=int, metavar="I", help="which process of the mesh this is, from 0")
    add("--num-processes", type=int, metavar="N", help="how many processes share the mesh")
    help = "how long to wait for the other processes; default: 60"
    add("--join-timeout", type=float, default=60.0, metavar="SECONDS", help=help)


def _mesh(text: str) -> int:
    if not re.fullmatch("tp=[1-9][0-9]{0,5}", text):
        raise argparse.ArgumentTypeError(f"{text!r} is no mesh; write tp=N for N devices: tp=8")
    return int(text.removeprefix("tp="))


def _address(text: str) -> tuple[str, int]:
    host, _, port = text.rpartition(":")
    host = host.removeprefix("[").removesuffix("]")
    if not host or not re.fullmatch("[0-9]{1,5}", port) or not 0 < int(port) < 65536:
        raise argparse.ArgumentTypeError(f"{text!r} is no address; expected HOST:PORT")
    return host, int(port)


def make_group(args: argparse.Namespace) -> Group | None:
    """The group that this process is part of; None where it is alone.

    Raises:
        UserError: arguments that do not go together.
    """
    if args.mesh and args.backend == "eager":
        raise UserError("--backend eager runs un-jitted on one device; drop --mesh")
    given = (args.coordinator, args.process_id, args.num_processes)
    if given == (None, None, None):
        return None
    if None in given:
        raise UserError(
            "--coordinator, --process-id and --num-processes go together: give all three to each "
            "process, or none"
        )
    if not args.mesh:
        raise UserError(f"--num-processes {args.num_processes} share a mesh: add --mesh tp=N")
    if not 0 <= args.process_id < args.num_processes:
        raise UserError(
            f"--process-id {args.process_id}: of --num-processes {args.num_processes} they go "
            f"from 0 to {args.num_processes - 1}"
        )
    if args.join_timeout <= 0:
        raise UserError(f"--join-timeout {args.join_timeout:g}: expected seconds, more than 0")
    return Group(args.coordinator, args.process_id, args.num_processes, args.join_timeout)


@contextmanager
def _reading(model: Weights) -> Iterator[None]:
    """Read and hash the embedding, much of a small model, while JAX is imported: afterwards the
    rows in use are all that is read of it."""

    def read() -> None:
        with suppress(UserError):  # found again, and told, when the rows are read
            model.hash(model.config.arch.embedding.tensor)

    thread = threading.Thread(target=read)
    thread.start()
    yield
    thread.join()


def make_engine(
    args: argparse.Namespace, group: Group | None, at_end: ExitStack, plan: Plan
) -> Engine:
    """The engine that the command line asks for; what it compiles is kept ``at_end``."""
    device, model = args.device, plan.model
    if args.backend == "eager":
        if device == "gpu":
            raise UserError("--backend eager runs un-jitted on the CPU; drop --device gpu")
        device = "cpu"

    with _reading(model), cli.undisturbed():
        from qwen_jax import compile_cache, engine, mesh, runtime

    def keep_programs(device: "jax.Device") -> None:
        if not args.no_compile_cache:
            sizes = sorted({*plan.steps}), len(plan.positions), plan.batch and plan.batch.size
            how = [plan.dtype, args.backend, args.mesh, args.num_processes, *sizes, plan.cache]
            where = (device.device_kind, os.environ.get("XLA_FLAGS"))
            at_end.enter_context(compile_cache.use(plan.model.config, *how, *where))

    if not args.mesh:
        runtime.for_a_command(device)
        chosen = runtime.pick_device(device)
        keep_programs(chosen)
        return engine.JaxEngine(model, plan.dtype, args.backend, chosen, keep=bool(plan.cache))
    names = ["mesh", "device", "dtype", "logits", "stages", "layers", "resume"]
    names += ["generate", "prefill_chunk", "cache", "prompts"]
    same = {f"--{name.replace('_', '-')}": getattr(args, name) for name in names}
    same |= {"config.json": asdict(model.config), "tokens": plan.tokens}
    same |= {"--first-position": plan.positions[0]}
    devices = mesh.open_devices(model.config, args.mesh, device, group, same)
    if not args.process_id:  # JAX writes for process 0 alone
        keep_programs(devices[0])
    return mesh.MeshEngine(model, plan.dtype, devices, group, keep=bool(plan.cache))


def follow(args: argparse.Namespace, group: Group, at_end: ExitStack) -> int:
    """What a process other than 0 does: compute. Process 0 alone writes and reports."""
    plans = trace_command.plans_of(args)
    if not args.dry_run:
        tracing.compute(make_engine(args, group, at_end, plans[0]), plans, lambda *stage: None)
    return 0


def main(argv: list[str]) -> int:
    parser = trace_command.parser("qwen_jax.trace", __doc__ or "", ("xla", "eager"))
    parser.add_argument(
        "--no-compile-cache", action="store_true", help="compile anew; keep nothing of it on disk"
    )
    add_mesh_arguments(parser)
    args = parser.parse_args(argv)
    group = make_group(args)
    with ExitStack() as at_end, group or nullcontext():
        if group and group.process:
            return follow(args, group, at_end)
        make = partial(make_engine, args, group, at_end)
        return trace_command.main(args, "trace", make, peak_memory)


if __name__ == "__main__":
    cli.run(main)
