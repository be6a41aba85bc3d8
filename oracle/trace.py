"""``python -m oracle.trace``: dump the same stages from PyTorch and Hugging Face transformers."""

from functools import partial

from qwen_jax import cli, trace_command
from qwen_jax.estimate import whole_memory
from qwen_jax.tracing import Engine, Plan
from qwen_jax.weights.huggingface import HuggingFaceWeights
from stages.errors import UserError, called


def make_engine(spec: str | None, device: str | None, resume: bool, plan: Plan) -> Engine:
    """Hugging Face's model, with its stages recorded.

    Raises:
        UserError: a model that transformers cannot read, or no transformers here.
    """
    if not isinstance(plan.model, HuggingFaceWeights):
        raise UserError(
            f"--model {spec}: transformers reads Hugging Face directories only; write one "
            f"first: {called('tools.convert')} {spec} DIR"
        )
    if resume:
        raise UserError("--resume: Hugging Face runs a model in one go; use --overwrite")
    try:
        from oracle import recorder
    except ImportError as error:
        raise UserError(f"the oracle cannot start ({error}): pip install '.[oracle]'") from None
    return recorder.TorchEngine(plan.model, plan.dtype, device)


def main(argv: list[str]) -> int:
    parser = trace_command.parser("oracle.trace", __doc__ or "", ("eager",))
    args = parser.parse_args(argv)
    make = partial(make_engine, args.model, args.device, args.resume)
    return trace_command.main(args, "oracle", make, whole_memory)


if __name__ == "__main__":
    cli.run(main)
