"""``--report FILE`` and ``-o FILE``: pages, written whole or not at all."""

import os
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from qwen_jax import cli
from qwen_jax.table import Table
from qwen_jax.weights.base import Weights
from stages.errors import UserError
from tools.difference import TraceDifference
from tools.localize.result import Localization
from tools.report import markdown

MARKDOWN = ".md"


def localizations(
    path: Path,
    reports: Sequence[Localization],
    weights: Sequence[Weights],
    difference: TraceDifference | None = None,
) -> None:
    """The page of one localized trace, or of two; see ``page.of_localizations``."""
    if path.suffix == MARKDOWN:
        _whole(path, markdown.of_localizations(reports))
        return
    from tools.report import page

    _whole(path, page.of_localizations(reports, weights, difference))


def comparison(path: Path, found: TraceDifference, table: Table) -> None:
    """The page of two traces that were compared; Markdown has ``table`` instead of a map."""
    if path.suffix == MARKDOWN:
        _whole(path, markdown.of_difference(found, table))
        return
    from tools.report import page

    _whole(path, page.of_difference(found))


def sweep(path: Path, data: dict[str, Any], sections: Iterable[Table], legend: str) -> None:
    """The page of a sweep of ``tools.parity``: what it said, as tables.

    ``data`` is the object of its ``--json``, ``legend`` what the columns mean.
    """
    from tools.report import page

    as_text = markdown.of_tables if path.suffix == MARKDOWN else page.of_tables
    counts = Counter(point["verdict"] for point in data["points"])
    told = ", ".join(f"{count} {name}" for name, count in counts.items())
    count = len(data["points"])
    title = f"{data['verdict']}: {count} point{'s' * (count != 1)} of {data['sweep']}: {told}"
    if data["compiled_for"]:
        title += f"; compiled for {data['compiled_for']}, not run on hardware"
    tables = [*sections]
    made = {"model": data["model"], "device": data["device"], **data["machine"]}
    about = [[name, page.listed(value)] for name, value in made.items()]
    tables.append(Table("Where this is from", ["", ""], about))
    _whole(path, as_text(title, legend, tables))


def said(path: Path) -> str:
    """What was written, for people."""
    what = "as Markdown" if path.suffix == MARKDOWN else "for any browser"
    return f"{path}: {cli.size(path.stat().st_size)}, {what}"


def _whole(path: Path, text: str) -> None:
    """Write by way of a temporary file beside it.

    Raises:
        UserError: it cannot be written.
    """
    temporary = path.with_name(path.name + ".tmp")
    try:
        temporary.write_text(text, encoding="utf-8")
        os.replace(temporary, path)
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}") from None
