"""``python -m tools.collect ENGINE MODEL --out D``: run another engine and trace what it computes.

The trace has a manifest that says which engine it was, its version and its options, so every
command reads it as one of ours. What an engine cannot show is said there and on the screen.
``python -m tools.collect files DIR --map NAME`` turns dumps that lie on disk into a trace.
"""

import argparse
from pathlib import Path

from qwen_jax import arguments, cli
from tools.collect import core, engines, files, options
from tools.collect.command import PROG, add_common, counts, show
from tools.collect.session import Adapter


def _count(text: str) -> int:
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"{text!r} is no number of tokens")
    return int(text)


def overview() -> argparse.ArgumentParser:
    """The parser of ``--help`` before an engine is chosen."""
    result = cli.Parser(prog=PROG, description=__doc__)
    names = ", ".join([*engines.ENGINES, "files"])
    result.add_argument("engine", metavar="ENGINE", help=f"{names}; ENGINE --help says more")
    return result


def parser(name: str, adapter: Adapter) -> argparse.ArgumentParser:
    """The arguments of one engine."""
    result = cli.Parser(prog=PROG, description=adapter.__doc__)
    result.prog += f" {name}"
    options.add_arguments(result, adapter.Settings)
    result.add_argument("model", metavar="MODEL", help="as --model of the other commands")
    add_common(result)
    result.add_argument(
        "--steps", type=counts, metavar="16,16,1,1", help="rows of each call; default: all in one"
    )
    result.add_argument(
        "--generate",
        type=_count,
        default=0,
        metavar="N",
        help="then N tokens more, the likeliest each time, computed one by one",
    )
    result.add_argument(
        "--of",
        metavar="MODEL",
        help="what MODEL should be, where it may have been made wrongly: the trace is then one of "
        "that, for tools.localize --model",
    )
    result.add_argument(
        "--weights",
        type=Path,
        metavar="DIR",
        help="also write the weights that the engine multiplies by, for tools.localize --model",
    )
    return result


def main(argv: list[str]) -> int:
    name, *rest = argv or ["--help"]
    if name.startswith("-"):
        overview().parse_args(argv or ["--help"])
    if name == "files":
        return files.main(rest)
    adapter = engines.adapter(name)
    args = parser(name, adapter).parse_args(rest)
    found = core.collect(
        name,
        args.model,
        args.out,
        prompt=arguments.prompt_of(args),
        stages=args.stages,
        layers=args.layers,
        steps=args.steps,
        generate=args.generate,
        of=args.of,
        weights=args.weights,
        overwrite=args.overwrite,
        **{each: getattr(args, each) for each in options.names(adapter.Settings)},
    )
    data = found.to_json()
    show(cli.report(args.json, data), data, found)
    return 0


if __name__ == "__main__":
    cli.run(main)
