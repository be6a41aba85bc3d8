"""``python -m qwen_jax.trace``: dump every sub-stage of the JAX forward pass."""

import argparse

from qwen_jax import command
from qwen_jax.weights import Weights
from stages import cli
from stages.errors import UserError


def make_engine(model: Weights, args: argparse.Namespace) -> object:
    device = args.device
    if args.backend == "eager":
        if device == "gpu":
            raise UserError("--backend eager runs un-jitted on the CPU; drop --device gpu")
        device = "cpu"

    from qwen_jax import engine, runtime

    chosen = runtime.configure(device, cache=not args.no_compile_cache)
    return engine.JaxEngine(model, args.dtype, args.backend, chosen)


def main(argv: list[str]) -> int:
    parser = command.parser("python -m qwen_jax.trace", __doc__ or "", ("xla", "eager"))
    parser.add_argument(
        "--no-compile-cache", action="store_true", help="compile anew; keep nothing of it on disk"
    )
    return command.main(parser.parse_args(argv), "trace", make_engine)


if __name__ == "__main__":
    cli.run(main)
