"""``--report FILE`` and ``-o FILE``: pages, written whole or not at all."""

import os
from collections.abc import Sequence
from pathlib import Path

from qwen_jax import cli
from qwen_jax.weights.base import Weights
from stages.errors import UserError
from tools.diff import TraceDifference
from tools.localize.report import Localization


def localizations(
    path: Path,
    reports: Sequence[Localization],
    weights: Sequence[Weights],
    difference: TraceDifference | None = None,
) -> None:
    """The page of one localized trace, or of two; see ``page.of_localizations``."""
    from tools.report import page

    _whole(path, page.of_localizations(reports, weights, difference))


def comparison(path: Path, found: TraceDifference) -> None:
    """The page of two traces that were compared."""
    from tools.report import page

    _whole(path, page.of_difference(found))


def said(path: Path) -> str:
    """What was written, for people."""
    return f"{path}: {cli.size(path.stat().st_size)}, for any browser"


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
