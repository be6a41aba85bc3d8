"""What error costs the next token, for people."""

import math

from rich.console import Console
from rich.text import Text

from qwen_jax.table import Cell, Table
from stages.architecture import place_of
from tools.localize.cost.result import PATCHED, SEEN, Harm, Share
from tools.localize.result import Localization


def show_harm(show: Console, report: Localization) -> None:
    """Print what the error costs; the shares as a table where there is anything to see."""
    if report.harm:
        _show(show, report, report.harm, "")
    model, rounding = report.rounding or ("", None)
    if rounding:
        _show(show, report, rounding, f"against the weights of {model}, ")


def _show(show: Console, report: Localization, harm: Harm, against: str) -> None:
    show.print(f"\n{against}{summary(harm)}", soft_wrap=True)
    largest = [pair for pair in harm.largest if abs(pair[1].size) >= SEEN]
    if not largest:
        return
    unit = 10.0 ** (math.floor(math.log10(abs(largest[0][1].size))) - 1)
    table = _table(report, harm, unit)
    if table.rows:
        show.print(f"\n{table.title}\n")
        show.print(table.terminal)
    else:
        show.print("\nshares of that margin")
    for key, share in largest[:PATCHED]:
        show.print(f"{place_of(*key)} {_told(share)}{_where(share)}")


def summary(harm: Harm) -> str:
    """What it costs, in one sentence."""
    token, rival = named(harm.token, harm.text), named(harm.against, harm.against_text)
    told = "" if harm.truth else "as far as its shares tell "
    fate = "exact arithmetic puts the other one first" if harm.flips else "the token stands"
    lost = f"; nothing is known of what comes before {place_of(*harm.lost)}" if harm.lost else ""
    change = harm.margin - harm.exact_margin
    sum = f" (sum of shares {harm.sum:+.2g})" if harm.truth and abs(change) >= SEEN else ""
    return (
        f"after row {harm.row}: {told}the error moves log p({token}) by {harm.logprob_change:+.2g} "
        f"nats to {harm.logprob:.3g}, and its margin over {rival} by {change:+.2g} from "
        f"{harm.exact_margin:.4g} to {harm.margin:.4g}{sum}: {fate}{lost}"
    )


def _told(share: Share) -> str:
    """A share in words: what it comes to where it was tried, if that is another."""
    if share.patched is None:
        return f"{share.margin:+.2g} nats"
    tried = f"made exact {share.patched:+.2g}"
    return f"{share.margin:+.2g} nats, {tried}{'' if share.linear else ': not linear'}"


def named(token: int, text: str | None) -> str:
    """A token, for people."""
    return str(token) if text is None else repr(text)


def _where(share: Share) -> str:
    """The one tensor, head, position and channel that have most of a share, where they have half of
    it."""
    largest = [*share.tensors.items()]
    largest += [
        (f"{axis[:-1]} {rows[0]['index']}", rows[0]["share"])
        for axis, rows in share.where.items()
        if rows
    ]
    parts = [f"{name} {part:+.2g}" for name, part in largest if abs(part) >= abs(share.margin) / 2]
    return f" ({', '.join(parts)})" if parts else ""


def _table(report: Localization, harm: Harm, unit: float) -> Table:
    """Layers down, stages across, whole units in the cells; without what is zero throughout."""
    seen = {key for key, share in harm.shares.items() if round(share.margin / unit)}
    shown = [row.name for row in report.trace.arch.layer_stages if row.name in dict(seen)]
    layers = sorted({n for name, n in seen if name in shown and n is not None})
    rows: list[list[Cell]] = []
    for n in layers:
        rows.append([str(n), *(_cell(harm.shares.get((name, n)), unit) for name in shown)])
    return Table(
        f"shares of that margin, in {unit:g} nats", ["layer", *shown], rows, (), (), True, 1
    )


def _cell(share: Share | None, unit: float) -> Text:
    if share is None:
        return Text("-", style="dim")
    count = round(share.margin / unit)
    if not count:
        return Text("0", style="dim")
    return Text(f"{count:+d}", style="bold red" if abs(count) >= 10 else "yellow")
