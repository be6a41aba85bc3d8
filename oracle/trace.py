"""``python -m oracle.trace``: dump the same stages from PyTorch and Hugging Face transformers."""

import argparse

from qwen_jax import command
from qwen_jax.checkpoint import Checkpoint
from qwen_jax.estimate import whole_memory
from qwen_jax.weights import Weights
from stages import cli
from stages.errors import UserError


def make_engine(model: Weights, args: argparse.Namespace) -> object:
    if not isinstance(model, Checkpoint):
        raise UserError(
            f"--model {args.model}: transformers reads Hugging Face directories only; write one "
            f"first: python -m tools.convert {args.model} DIR"
        )
    if args.resume:
        raise UserError("--resume: Hugging Face runs a model in one go; use --overwrite")
    try:
        from oracle import recorder
    except ImportError as error:
        raise UserError(f"the oracle cannot start ({error}): pip install '.[oracle]'") from None
    return recorder.TorchEngine(model, args.dtype, args.device)


def main(argv: list[str]) -> int:
    parser = command.parser("python -m oracle.trace", __doc__ or "", ("eager",))
    return command.main(parser.parse_args(argv), "oracle", make_engine, whole_memory)


if __name__ == "__main__":
    cli.run(main)
