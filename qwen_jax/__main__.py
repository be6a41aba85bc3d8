"""``qwen-stages COMMAND``: every command of this project, from any directory.

trace      dump every sub-stage of the JAX forward pass
oracle     dump the same stages from PyTorch and Hugging Face transformers
diff       how far one trace has come from another, stage by stage
localize   where error is created in a trace, and what the mistake is
report     what localize finds, as one HTML file to look at and to send
parity     XLA-compiled against un-jitted, over a grid of ways to compile
collect    run another engine and trace what it computes
convert    a model to Hugging Face or orbax files, from those or from GGUF
bench      what tracing costs, beside what one would do instead

qwen-stages COMMAND --help says more.
"""

import importlib

from qwen_jax import cli
from stages.errors import UserError
from stages.version import NAME, version

COMMANDS = {
    "trace": "qwen_jax.trace",
    "oracle": "oracle.trace",
    "diff": "tools.diff",
    "localize": "tools.localize.__main__",
    "report": "tools.report.__main__",
    "parity": "tools.parity.__main__",
    "collect": "tools.collect.__main__",
    "convert": "tools.convert",
    "bench": "tools.bench.__main__",
}


def run(argv: list[str]) -> int:
    """Run the command that the first argument names."""
    name, *rest = argv or ["--help"]
    if name in ("-h", "--help"):
        print(__doc__.strip().replace("``", ""))
        return 0
    if name == "--version":
        print(f"{NAME} {version()}")
        return 0
    if name not in COMMANDS:
        raise UserError(f"no command {name!r}; choose one of {', '.join(COMMANDS)}")
    code: int = importlib.import_module(COMMANDS[name]).main(rest)
    return code


def main() -> None:
    """The entry point of the ``qwen-stages`` script."""
    cli.run(run)


if __name__ == "__main__":
    main()
