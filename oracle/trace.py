"""``python -m oracle.trace``: dump the same stages from PyTorch and Hugging Face transformers."""

import argparse
from functools import partial

from qwen_jax import cli, trace_command
from qwen_jax.estimate import whole_memory
from qwen_jax.tracing import Engine, Plan
from qwen_jax.weights.huggingface import HuggingFaceWeights
from stages.errors import UserError, called


def make_engine(args: argparse.Namespace, plan: Plan) -> Engine:
    """Hugging Face's model, with its stages recorded.

    Raises:
        UserError: a model that transformers cannot read, a cache that it has not, or no
            transformers here.
    """
    spec = args.model
    if not isinstance(plan.model, HuggingFaceWeights):
        raise UserError(
            f"--model {spec}: transformers reads Hugging Face directories only; write one "
            f"first: {called('tools.convert')} {spec} DIR"
        )
    if args.resume:
        raise UserError("--resume: Hugging Face runs a model in one go; use --overwrite")
    try:
        from oracle import cache, recorder
    except ImportError as error:
        raise UserError(f"the oracle cannot start ({error}): pip install '.[oracle]'") from None
    if plan.cache and plan.cache not in cache.FORMATS:
        raise UserError(
            f"--cache {plan.cache}: of the oracle it is one of {', '.join(cache.FORMATS)}; "
            f"{called('qwen_jax.trace')} has {plan.cache}"
        )
    if args.static_cache and not plan.cache:
        raise UserError(
            "--static-cache: there is no cache; add --generate, --prefill-chunk or --cache"
        )
    return recorder.TorchEngine(plan.model, plan.dtype, args.device, args.static_cache)


def main(argv: list[str]) -> int:
    parser = trace_command.parser("oracle.trace", __doc__ or "", ("eager",))
    help = "transformers' StaticCache; default: its DynamicCache"
    parser.add_argument("--static-cache", action="store_true", help=help)
    args = parser.parse_args(argv)
    return trace_command.main(args, "oracle", partial(make_engine, args), whole_memory)


if __name__ == "__main__":
    cli.run(main)
