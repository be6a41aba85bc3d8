"""``python -m tools.report TRACE``: what localize finds in a trace as one HTML file to look at.

With two traces both are localized, side by side, and compared where they can be. The file needs no
network and no server; without JavaScript it is a document with tables.
"""

import argparse
import os
from pathlib import Path

from qwen_jax import arguments, cli
from qwen_jax.weights import open_model
from qwen_jax.weights.base import Weights
from stages.errors import NotComparable, UserError
from tools.diff import diff
from tools.localize.result import Localization, sentence
from tools.report import explorer, write


def parser() -> argparse.ArgumentParser:
    result = cli.Parser(prog="tools.report", description=__doc__)
    result.add_argument("a", type=Path, metavar="A", help="a trace directory")
    result.add_argument("b", type=Path, nargs="?", metavar="B", help="a second one, side by side")
    arguments.add_model_arguments(result)
    result.add_argument(
        "--against-model", metavar="DIR|HUB_ID", help="the weights of B; default: --model"
    )
    result.add_argument(
        "-o",
        "--out",
        type=cli.page,
        default=Path("report.html"),
        metavar="FILE.html",
        help="default: report.html",
    )
    result.add_argument(
        "--model-explorer",
        type=Path,
        metavar="DIR",
        help="also write A's stage graph and node data for google-ai-edge/model-explorer",
    )
    return result


def main(argv: list[str]) -> int:
    args = parser().parse_args(argv)
    if args.against_model and not args.b:
        raise UserError("--against-model is the model of B; give that trace too")
    if args.model_explorer and not args.model_explorer.parent.is_dir():
        raise UserError(f"no such directory: {args.model_explorer.parent}")
    prompt = arguments.prompt_of(args)
    models = [open_model(args.model)]
    if args.b:
        models.append(open_model(args.against_model) if args.against_model else models[0])

    from qwen_jax import compile_cache, runtime
    from tools.localize.__main__ import run, run_both

    runtime.for_a_command("cpu")
    with compile_cache.use("localize", models[0].config, os.environ.get("XLA_FLAGS")):
        if args.b:
            reports = run_both([(args.a, models[0]), (args.b, models[1])], prompt)
        else:
            reports = [run(args.a, models[0], prompt)]
        code = _write(args.out, reports, models)
    if args.model_explorer:
        files = [path.name for path in explorer.write(reports[0], args.model_explorer)]
        cli.console().print(f"{args.model_explorer}: {', '.join(files)}")
    return code


def _write(out: Path, reports: list[Localization], models: list[Weights]) -> int:
    difference = None
    if len(reports) > 1:
        try:
            difference = diff(reports[0].trace, reports[1].trace)
        except NotComparable as error:
            cli.console(to_stderr=True).print(f"note: {error}")
    write.localizations(out, reports, models, difference)
    show = cli.console()
    for report in reports:
        show.print(f"{report.trace.path}: {sentence(report)}")
    show.print(write.said(out))
    return 1 if any(report.wrong for report in reports) else 0


if __name__ == "__main__":
    cli.run(main)
