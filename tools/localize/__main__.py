"""``python -m tools.localize TRACE --model M``: where error is created, and what the mistake is.

Every dumped stage is replayed alone, in float64, on its own dumped inputs. What differs from the
dump was created at that stage; what arrived there from before cannot show.
"""

import argparse
import math
import os
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import msgspec

from qwen_jax import arguments, cli
from qwen_jax.config import Config
from qwen_jax.prompt import Prompt
from qwen_jax.weights import open_model
from qwen_jax.weights.base import Weights
from stages.errors import NotComparable, UserError
from stages.invariance import equality
from tools.localize import bisect
from tools.localize.cost.query import HOW, Question, affordable, usual
from tools.localize.pipeline import localize
from tools.localize.preflight import check_model
from tools.localize.result import SCHEMA, Localization, to_json

Ask = Callable[[Config, int], Question | None]  # of which token to ask, for a number of rows


def parser() -> argparse.ArgumentParser:
    result = cli.Parser(prog="tools.localize", description=__doc__)
    result.add_argument("trace", type=Path, metavar="TRACE", help="a trace directory")
    arguments.add_model_arguments(result)
    result.add_argument(
        "--against", type=Path, metavar="OTHER", help="a second trace, judged side by side"
    )
    result.add_argument(
        "--against-model",
        metavar="DIR|HUB_ID",
        help="the weights of OTHER, by default --model; without "
        "OTHER, those that the trace's own are a rounding of",
    )
    cli.add_report(result)
    result.add_argument(
        "--repro",
        type=cli.writable_directory,
        metavar="DIR",
        help="write the first fault, cut to its smallest slice, and a script that shows it",
    )
    result.add_argument(
        "--exact",
        action="store_true",
        help="make every product again in float64, also where random probes show no doubt",
    )
    expected = result.add_argument_group(
        "for git bisect run", "exit 0: not there, 1: there, 125: cannot be judged"
    )
    expected.add_argument("--expect-stage", metavar="STAGE", help="the stage that is wrong")
    expected.add_argument(
        "--expect-layer", type=int, metavar="N", help="its layer; default: any of them"
    )
    harm = result.add_argument_group("what the error costs the next token, in nats")
    help = "shares of every stage, by one backward pass; checked by a forward in float64 and by "
    help += "making the largest exact; default: none of a clean trace, else what takes no more "
    help += "than about a minute"
    harm.add_argument("--harm", choices=HOW, help=help)
    help = "the row of the sequence after which the token comes; default: the last"
    harm.add_argument("--position", type=int, metavar="ROW", help=help)
    help = "its id; default: the one that the trace puts first"
    harm.add_argument("--token", type=int, metavar="ID", help=help)
    help = "the token that it is compared with; default: the best of the others"
    harm.add_argument("--rival", type=int, metavar="ID", help=help)
    help = "exit with 1 if the error moves the log-probability of the token by more"
    harm.add_argument("--max-nats", type=_nats, metavar="X", help=help)
    cli.add_json(result)
    return result


def _nats(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 <= value < math.inf:
        raise argparse.ArgumentTypeError(f"{text!r}: expected nats, 0 or more")
    return value


def question_of(args: argparse.Namespace, config: Config, length: int) -> Question | None:
    """The token for which the command line asks what the error costs it; None asks for none.

    Raises:
        UserError: ``--harm none`` together with an option that asks for a token.
    """
    asked = {"row": args.position, "token": args.token, "against": args.rival}
    wanted = [*asked.values(), args.max_nats]
    if args.expect_stage:
        return None
    how = args.harm or affordable(config, length)
    if how != "none":
        of_clean = bool(args.harm) or any(value is not None for value in wanted)
        return Question(**asked, checked=how == "checked", of_clean=of_clean)
    if not args.harm and any(value is not None for value in wanted):
        return Question(**asked, checked=False)
    if any(value is not None for value in wanted):
        raise UserError(
            "--harm none measures nothing: drop it, or --position, --token, --rival and --max-nats"
        )
    return None


def run_both(
    given: Sequence[tuple[Path, Weights]], prompt: Prompt, ask: Ask = usual, exact: bool = False
) -> list[Localization]:
    """Localize two traces, each beside its own weights, and ask both about the same tokens."""
    from tools.localize.side_by_side import about_both

    def of_both(config: Config, length: int) -> Question | None:
        question = ask(config, length)
        return question and about_both(
            question, *(arguments.open_given(path, prompt, weights) for path, weights in given)
        )

    def the_same(config: Config, length: int) -> Question | None:
        question, harm = ask(config, length), first.harm
        if not (question and harm) or first.trace.config["vocab_size"] != config.vocab_size:
            return question
        return replace(question, token=harm.token, against=harm.against, of_clean=True)

    a, b = given
    first = run(*a, prompt, of_both, exact)
    return [first, run(*b, prompt, the_same, exact)]


def run(
    path: Path,
    model: Weights,
    prompt: Prompt,
    ask: Ask = usual,
    exact: bool = False,
    right: Weights | None = None,
) -> Localization:
    """Localize one trace with a progress bar."""
    trace = arguments.open_given(path, prompt, model)
    arguments.check_tokens(prompt, trace, model)
    check_model(trace, model)
    harm = ask(model.config, len(trace.tokens))
    with cli.progress() as bar:
        task = bar.add_task(f"replaying {trace.name}", total=len(trace.entries))
        more = {"harm": harm, "right": right, "exact": exact}
        return localize(trace, model, **more, advance=lambda measured: bar.advance(task))  # type: ignore[arg-type]


def _costly(reports: list[Localization], most: float) -> bool:
    """Whether the error of one of them moves the log-probability by more than ``most``.

    Raises:
        NotComparable: a trace has no finite logits to tell by.
    """
    sound = [report for report in reports if not report.wrong]
    if untold := [report.trace.path for report in sound if report.harm is None]:
        raise NotComparable(
            f"not comparable: {untold[0]} has no finite logits, nor what they are computed from; "
            "--max-nats has nothing to measure"
        )
    return any(abs(report.harm.logprob_change) > most for report in sound if report.harm)


def _beside(first: Localization, second: Localization) -> dict[str, Any]:
    """What ``--json`` says of two engines beside what it says of the first."""
    from tools.localize import side_by_side

    data: dict[str, Any] = {
        "against": to_json(second),
        "right": side_by_side.judgements(first, second),
        "same_weights": side_by_side.same_weights(first, second),
    }
    if same := equality(first.trace, second.trace):
        data["equality"] = msgspec.to_builtins(same)
    if apart := side_by_side.apart(first, second):
        data["apart"] = apart
    return data


def main(argv: list[str]) -> int:
    if any(word.startswith("--expect-") for word in argv):
        with bisect.unjudged():
            return _main(argv)
    return _main(argv)


def _main(argv: list[str]) -> int:
    args = parser().parse_args(argv)
    if args.expect_layer is not None and not args.expect_stage:
        raise UserError("--expect-layer is the layer of --expect-stage; give that too")
    model, prompt = open_model(args.model), arguments.prompt_of(args)
    if args.expect_stage:
        arch, layers = model.config.arch.cached, model.config.num_hidden_layers
        expected = bisect.asked(arch, layers, args.expect_stage, args.expect_layer)

    ask = partial(question_of, args)

    with cli.undisturbed():
        from qwen_jax import compile_cache, runtime
        from tools.localize.show import show_localization

    runtime.for_a_command("cpu")
    try:
        with compile_cache.use("localize", model.config, os.environ.get("XLA_FLAGS")):
            other = open_model(args.against_model) if args.against_model else model
            right = other if args.against_model and not args.against else None
            if args.against:
                given = [(args.trace, model), (args.against, other)]
                reports = run_both(given, prompt, ask, args.exact)
            else:
                reports = [run(args.trace, model, prompt, ask, args.exact, right)]
    except NotComparable as error:
        if args.json:
            nothing: dict[str, Any] = {"faults": [], "precision": {}, "skipped": []}
            why = {"schema": SCHEMA, "verdict": "not_comparable", "why": str(error)}
            cli.report(args.json, why | nothing)
        raise
    data = to_json(reports[0])
    show = cli.report(args.json, data | _beside(*reports) if args.against else data)
    # all files before a word is printed: whoever reads may stop after ten lines
    if args.report:
        from tools.report import write

        models = [model, other] if args.against else [model]
        write.localizations(args.report, reports, models)
    made = ""
    if args.repro:
        from tools.localize import repro

        made = f"no fault, so nothing was written to {args.repro}"
        if reports[0].findings:
            made = repro.write(reports[0], model, args.repro)
    show_localization(show, reports[0])
    if args.against:
        show.print()
        show_localization(show, reports[1])
        from tools.localize import side_by_side

        side_by_side.show(show, *reports)
    if made:
        show.print(f"\n{made}")
    if args.expect_stage:
        there = bisect.there(reports[0], expected)
        show.print(f"\n{bisect.says(there, args.expect_stage, args.expect_layer)}")
        return int(there)
    if any(report.wrong for report in reports):
        return 1
    return int(args.max_nats is not None and _costly(reports, args.max_nats))


if __name__ == "__main__":
    cli.run(main)
