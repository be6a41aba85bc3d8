"""What error costs the next token, for people."""

import math

from rich.console import Console
from rich.table import Table
from rich.text import Text

from stages.architecture import Key
from tools.localize.harm import Harm, Share
from tools.localize.report import Localization

SEEN = 0.001  # nats: shares below that change nothing that anybody can see
NAMED = 3  # shares that are told in words


def show_harm(show: Console, report: Localization) -> None:
    """Print what the error costs; the shares as a table where there is anything to see."""
    harm = report.harm
    if harm is None:
        return
    show.print(f"\n{summary(harm)}", soft_wrap=True)
    largest = [pair for pair in harm.largest if abs(pair[1].margin) >= SEEN]
    if not largest:
        return
    unit = 10.0 ** (math.floor(math.log10(abs(largest[0][1].margin))) - 1)
    show.print(f"\nshares of that margin, in {unit:g} nats\n")
    show.print(_table(report, harm, unit))
    for key, share in largest[:NAMED]:
        show.print(f"{_place(key)} {share.margin:+.2g} nats{_where(share)}")


def summary(harm: Harm) -> str:
    """What it costs, in one sentence."""
    token, rival = _name(harm.token, harm.text), _name(harm.against, harm.against_text)
    exact = harm.margin - harm.change
    fate = "exact arithmetic puts the other one first" if harm.flips else "the token stands"
    lost = f"; nothing is known of what comes before {_place(harm.lost)}" if harm.lost else ""
    return (
        f"after row {harm.row}: the error moves log p({token}) by {harm.logprob_change:+.2g} nats "
        f"to {harm.logprob:.3g}, and its margin over {rival} by {harm.change:+.2g} from "
        f"{exact:.4g} to {harm.margin:.4g}: {fate}{lost}"
    )


def _name(token: int, text: str | None) -> str:
    return str(token) if text is None else repr(text)


def _place(key: Key) -> str:
    return key[0] if key[1] is None else f"layer {key[1]} {key[0]}"


def _where(share: Share) -> str:
    """The one head, position and channel that have most of a share, where they have half of it."""
    parts = [
        f"{axis[:-1]} {rows[0]['index']} {rows[0]['share']:+.2g}"
        for axis, rows in share.where.items()
        if rows and abs(rows[0]["share"]) >= abs(share.margin) / 2
    ]
    return f" ({', '.join(parts)})" if parts else ""


def _table(report: Localization, harm: Harm, unit: float) -> Table:
    """Layers down, stages across, whole units in the cells; without what is zero throughout."""
    seen = {key for key, share in harm.shares.items() if round(share.margin / unit)}
    shown = [row.name for row in report.trace.tables.layer_stages if row.name in dict(seen)]
    table = Table(box=None, header_style="bold", pad_edge=False, padding=(0, 1, 0, 0))
    table.add_column("layer", justify="right")
    for name in shown:
        table.add_column(name.replace("_", "\n"), justify="right")
    for layer in sorted({layer for name, layer in seen if name in shown and layer is not None}):
        cells = [_cell(harm.shares.get((name, layer)), unit) for name in shown]
        table.add_row(str(layer), *cells)
    return table


def _cell(share: Share | None, unit: float) -> Text:
    if share is None:
        return Text("-", style="dim")
    count = round(share.margin / unit)
    if not count:
        return Text("0", style="dim")
    return Text(f"{count:+d}", style="bold red" if abs(count) >= 10 else "yellow")
