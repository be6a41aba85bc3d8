"""Two engines side by side: at every stage where they differ, which one is right; and which stages
make the difference of their margins."""

from dataclasses import replace
from typing import Any

from rich.console import Console
from rich.text import Text

from qwen_jax.table import Table
from stages import verdict
from stages.architecture import place_of
from stages.architectures import ALL_NAMES, any_stage
from stages.invariance import Equality, equality
from stages.trace import Trace
from tools.localize.cost.query import Question
from tools.localize.cost.result import LARGEST, SEEN
from tools.localize.cost.show import named
from tools.localize.result import COLOURS, Localization

MADE_BY = ("made by, in nats", "A", "B", "A - B")  # columns of the rows of ``margins``
EQUAL = "equal to the last bit"
CLEAR = 2.0  # bits by which one side must be better to be called the right one


def judgements(a: Localization, b: Localization) -> list[dict[str, Any]]:
    """One row a stage that both traces hold: each side's bits, and who is right.

    ``right`` is "A", "B", "both" (no more than ``CLEAR`` bits apart and no fault) or "neither".
    The bits are those of the worst layer; each side is judged by its own weights.
    """
    rows = []
    for name in ALL_NAMES:
        levels = [[item.level for item in r.items if item.name == name] for r in (a, b)]
        if not all(levels):
            continue
        worst = [min(each) for each in levels]
        layers = [_faulty_layers(report, name) for report in (a, b)]
        faulty = [bool(found) for found in layers]
        if all(faulty):
            right = "neither"
        elif any(faulty):
            right = "B" if faulty[0] else "A"
        elif abs(worst[0] - worst[1]) <= CLEAR:
            right = "both"
        else:
            right = "A" if worst[0] > worst[1] else "B"
        rows.append(
            {
                "stage": name,
                "a": {"bits": _bits(a, name), "fault_layers": layers[0]},
                "b": {"bits": _bits(b, name), "fault_layers": layers[1]},
                "right": right,
            }
        )
    return rows


def _faulty_layers(report: Localization, stage: str) -> list[int | None]:
    return [f.suspect.item.layer for f in report.findings if f.suspect.item.name == stage]


def _bits(report: Localization, stage: str) -> list[float]:
    """[lowest, highest] over the layers."""
    found = [round(item.bits, 1) for item in report.items if item.name == stage]
    return [min(found), max(found)]


def same_weights(a: Localization, b: Localization) -> bool | None:
    """Whether both sides ran the same weights; None where a manifest is missing to say so."""
    weights = [r.trace.manifest.model.weights if r.trace.manifest else None for r in (a, b)]
    return None if None in weights else weights[0] == weights[1]


def about_both(question: Question, a: Trace, b: Trace) -> Question:
    """The question put to both engines: of the token that A puts first, over the one that B does
    where that is another."""
    first = [_first(trace, question.row) for trace in (a, b)]
    given = question.token is not None or question.against is not None
    if given or None in first or a.config["vocab_size"] != b.config["vocab_size"]:
        return question
    token, other = first
    if token == other:
        return replace(question, token=token)
    return replace(question, token=token, against=other, of_clean=True)


def _first(trace: Trace, row: int | None) -> int | None:
    """The token that a trace puts first after a row; None where it does not say."""
    key, length = (trace.arch.head.name, None), len(trace.tokens)
    after = -1 if row is None else row if row < 0 else row - length
    if key not in trace.entries or not -trace.rows_of(*key) <= after < 0:
        return None
    return int(trace.read_rows(*key)[after].argmax())


def apart(a: Localization, b: Localization) -> dict[str, Any] | None:
    """Which stages make the difference of the two margins: each side's shares, and how far they are
    apart, the largest first. None where the two were not asked about the same tokens."""
    if not a.harm or not b.harm:
        return None
    asked = [(harm.token, harm.against) for harm in (a.harm, b.harm)]
    if asked[0] != asked[1]:
        return None
    keys = dict.fromkeys([*a.harm.shares, *b.harm.shares])
    shares = {key: [h.shares[key].margin if key in h.shares else 0.0 for h in (a.harm, b.harm)]
              for key in keys}  # fmt: skip
    rows = [
        {"stage": stage, "layer": layer, "a": ours, "b": theirs, "difference": ours - theirs}
        for (stage, layer), (ours, theirs) in shares.items()
    ]
    return {
        "token": a.harm.token,
        "against": a.harm.against,
        "margins": [a.harm.margin, b.harm.margin],
        "difference": a.harm.margin - b.harm.margin,
        "sum_of_shares": a.harm.sum - b.harm.sum,
        "shares": sorted(rows, key=lambda row: -abs(row["difference"])),
    }


def tables(a: Localization, b: Localization) -> list[Table]:
    """Who is right at each stage, and what of it is equal; and which stages make the difference of
    the two margins, where both were asked about the same tokens."""
    same = equality(a.trace, b.trace)
    made = "Which of the two is right"
    if same_weights(a, b) is False:
        made += "; they have different weights, and each is judged by its own"
    elif a.model != b.model:
        made += f"; A is judged by the weights of {a.model}, B by those of {b.model}"
    rows = [
        (row["stage"], *(_range(row[side], row["stage"]) for side in ("a", "b")), said(row),
         *([] if same is None else [_equal(same, row["stage"])]))
        for row in judgements(a, b)
    ]  # fmt: skip
    names = ("stage", "A bits", "B bits", "right", *([] if same is None else [EQUAL]))
    found = [Table(made, names, rows, left=("stage", "right"))]
    if (parts := margins(a, b)) and parts.rows:
        found.append(parts)
    return found


def sentences(a: Localization, b: Localization) -> list[str]:
    """Where two computations of one sequence part, and how far their margins are apart."""
    found = []
    if same := equality(a.trace, b.trace):
        found.append(parting(same, len(a.trace.tokens)))
    if parts := margins(a, b):
        found.append(parts.title)
    return found


def _equal(same: Equality, stage: str) -> str:
    """How many elements of a stage are equal, over all layers."""
    found = [each for each in same.operations if each.stage == stage]
    return f"{sum(each.equal for each in found):,} of {sum(each.of for each in found):,}"


def parting(same: Equality, length: int) -> str:
    """Which operation makes unequal values of equal ones first, of ``length`` rows."""
    whole = sum(each.equal == each.of for each in same.operations)
    counted = f"{whole} of {len(same.operations)} operations are equal to the last bit"
    if (first := same.parts_first) is None:
        return counted
    return (
        f"{counted}; the first to make unequal values of equal ones is {place_of(*first.key)}, in "
        f"{len(first.rows)} of {length} rows"
    )


def show(console: Console, a: Localization, b: Localization) -> None:
    """Print who is right at each stage, where the two part, and how far their margins are apart."""
    first, *more = tables(a, b)
    console.print(f"\n{first.title}\n")
    console.print(first.terminal)
    for sentence in sentences(a, b):
        console.print(f"\n{sentence}", soft_wrap=True)
    for table in more:
        console.print(table.terminal)


def said(row: dict[str, Any]) -> str:
    """Who is right at a stage, and why, for people; of a row of ``judgements``."""
    if row["right"] == "both":
        return "both"
    if row["right"] == "neither":
        return "neither: a fault on both sides"
    faulty = row["a"]["fault_layers"] or row["b"]["fault_layers"]
    return f"{row['right']} ({'the other has a fault' if faulty else 'more precise'})"


def margins(a: Localization, b: Localization) -> Table | None:
    """How far the two margins are apart, as a sentence, and the stages that are seen in that, with
    their shares in A, in B, and A - B; None where the two were not asked about the same tokens."""
    found = apart(a, b)
    if found is None or a.harm is None:
        return None
    token, rival = named(a.harm.token, a.harm.text), named(a.harm.against, a.harm.against_text)
    ours, theirs = found["margins"]
    sum = (
        "" if abs(found["difference"]) < SEEN else f" (sum of shares {found['sum_of_shares']:+.2g})"
    )
    told = f"B puts {rival} first" if ours * theirs < 0 else "both put the same one first"
    sentence = (
        f"the margin of {token} over {rival} is {ours:+.4g} in A and {theirs:+.4g} in B, "
        f"{found['difference']:+.2g} apart{sum}: {told}"
    )
    rows = [row for row in found["shares"] if abs(row["difference"]) >= SEEN][:LARGEST]
    sides = ("a", "b", "difference")
    cells = [
        [place_of(row["stage"], row["layer"]), *(f"{row[side]:+.2g}" for side in sides)]
        for row in rows
    ]
    return Table(sentence, MADE_BY, cells)


def _range(side: dict[str, Any], stage: str) -> Text:
    low, high = side["bits"]
    text = f"{low:.1f}" if low == high else f"{low:.1f} - {high:.1f}"
    if side["fault_layers"]:
        return Text(text + "*", style="bold red")
    return Text(text, style=COLOURS[verdict.class_of(low, any_stage(stage)) or "lower"])
