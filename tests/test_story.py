"""docs/story.md: the bug hunt that this project is for, done again as the page shows it."""

from pathlib import Path

from tests.conftest import ROOT
from tests.test_readme import blocks, run


def test_the_hunt_takes_three_commands(tmp_path: Path) -> None:
    shown = blocks((ROOT / "docs" / "story.md").read_text("utf-8"))
    assert [block.language for block in shown] == ["console"] * 3
    for block in shown:
        run(block, tmp_path)
