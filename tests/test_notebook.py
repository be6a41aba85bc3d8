"""The example notebook runs, and shows what it says that it shows."""

import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import ROOT

NOTEBOOK = json.loads((ROOT / "docs" / "example.ipynb").read_text("utf-8"))


def test_it_runs_and_results_show_themselves(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {}
    for cell in (c for c in NOTEBOOK["cells"] if c["cell_type"] == "code"):
        *before, last = "".join(cell["source"]).splitlines()
        exec("\n".join(before), names)
        try:
            value = eval(last, names)
        except SyntaxError:
            exec(last, names)
            continue
        shown = next((o["data"] for o in cell["outputs"] if "data" in o), {})
        if "text/html" not in shown:
            continue
        now, then = value._repr_html_(), "".join(shown["text/html"])
        HTMLParser().feed(now)
        assert now.split("<table")[0] == then.split("<table")[0]  # the verdict
        assert now.count("<td") == then.count("<td")
        assert "<script" not in now and "<style" not in now
    assert names["found"].verdict == "fault"


def test_it_was_executed_and_has_no_path_of_a_machine() -> None:
    text = json.dumps(NOTEBOOK)
    assert text.count("text/html") == 2
    # an absolute path: of two names or more, after a blank, a quote or a bracket
    assert not re.search(r"""(?:^|[\s"'(=>])/[A-Za-z][\w.-]*/[\w.-]+""", text)
    assert all(c["outputs"] for c in NOTEBOOK["cells"] if "diff(" in "".join(c.get("source", "")))
