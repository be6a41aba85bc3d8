"""The pictures in docs/: ``python -m tests.maintain.pictures``, of the README's own example.

Needs Playwright and a Chromium.
"""

import os
import shutil
import tempfile
from pathlib import Path

from playwright.sync_api import sync_playwright

from tests.planted import faults
from tools.numpy_engine import engine
from tools.numpy_engine.__main__ import DEMO
from tools.report.__main__ import main as report

DOCS = Path(__file__).parents[2] / "docs"
MISTAKE, CELL = "post_ffn_residual.residual_layer_input", "#A-3-post_ffn_residual button"


def main() -> None:
    with tempfile.TemporaryDirectory() as scratch:
        os.chdir(scratch)  # the page shows where the trace is
        page = Path(scratch) / "report.html"
        tokens = list(range(1, 97))
        faults.plant(engine.load(DEMO), tokens, faults.FAULTS[MISTAKE], [3], "f32").dump(
            "engine-dump"
        )
        report(
            [
                "engine-dump",
                "--model",
                "demo",
                "--tokens",
                ",".join(map(str, tokens)),
                "-o",
                str(page),
            ]
        )
        with sync_playwright() as driver:
            chromium = driver.chromium.launch(
                executable_path=shutil.which("chromium"), args=["--no-sandbox"]
            )
            for scheme in ("light", "dark"):
                shown = chromium.new_page(
                    viewport={"width": 1280, "height": 1250}, color_scheme=scheme
                )
                shown.goto(page.as_uri())
                shown.click(CELL)
                shown.evaluate("scrollTo(0, 0)")
                shown.mouse.move(0, 0)
                shown.screenshot(path=DOCS / f"report-{scheme}.png")
            chromium.close()


if __name__ == "__main__":
    main()
