"""The known mistakes, the planted ones and the page that tells of them are the same."""

import ast
import re
from pathlib import Path

import pytest

from tests.conftest import ROOT
from tests.planted import cached, faults
from tests.planted.matrix import Row, markdown, summary
from tools.localize.mistakes import CATALOGUE

# Known, and planted nowhere so far: to be planted, and then to go from here.
NOT_PLANTED = {"weight_zero_point"}


def expected_elsewhere() -> set[str]:
    """What the other tests, which plant in engines and files of their own, expect by name."""
    files = (path for path in ROOT.glob("tests/test_*.py") if path.name != Path(__file__).name)
    trees = (ast.parse(path.read_text("utf-8")) for path in files)
    return {
        node.value
        for tree in trees
        for node in ast.walk(tree)
        if isinstance(node, ast.Constant) and isinstance(node.value, str)
    }


def test_every_known_mistake_is_planted() -> None:
    """By its name: what a fault is to be called, or what it is called where a cache is not
    dumped; or what a test expects of an engine of its own."""
    planted = [*faults.FAULTS.values(), *cached.known().values()]
    names = {name for fault in planted for name in (fault.diagnosis, *fault.accept)}
    names |= {*cached.UNSEEN.values()}
    assert {mistake.name for mistake in CATALOGUE} - names - expected_elsewhere() == NOT_PLANTED


def test_only_what_has_a_name_is_counted_as_named() -> None:
    def row(named: bool | None, placed: bool = True) -> Row:
        return Row("a.b", True, (("ffn_up", 2),), ("x",), placed, named, 0.5)

    found = [row(True), row(False), row(None), row(None, placed=False)]
    assert summary(found).startswith("4 faults due: 3 placed, 1 of 2 with a name named;")
    *_, named, other, nameless, missed = markdown(found).splitlines()
    ends = [line.split(" | ")[-1] for line in (named, other, nameless, missed)]
    assert ends == ["ok |", "placed |", "ok |", "missed |"]


@pytest.mark.xfail(strict=True, reason="the page is of before the localizer was rebuilt")
def test_the_page_has_every_planted_fault() -> None:
    text = (ROOT / "docs" / "fault-matrix.md").read_text("utf-8")
    told = set(re.findall(r"^\| (\w+\.\w+) \|", text, re.MULTILINE))
    assert told == faults.FAULTS.keys()
