"""docs/bisect.md is true, and nothing but a verdict is ever a verdict to git."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import ROOT
from tests.planted import faults
from tests.planted.matrix import make_bench
from tests.test_readme import EXECUTED, blocks, run
from tools.localize import Localization, __main__, bisect, localize


def test_the_page_is_true(tmp_path: Path) -> None:
    page = (ROOT / "docs" / "bisect.md").read_text("utf-8")
    for block in blocks(page):
        if block.language in EXECUTED:
            run(block, tmp_path)


@pytest.fixture(scope="module")
def given(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """A dump with a fault at ffn_gate of layer 1 that lacks some stages, as arguments."""
    directory = tmp_path_factory.mktemp("bisect")
    bench = make_bench("small", "f32", directory, length=24)
    wrong = faults.plant(bench.loaded, bench.tokens, "ffn_gate.row_corrupted", [1], "f32")
    dump = wrong.dump(directory / "dump", ("attn_scores", "ffn_gate", "final_norm", "lm_head"))
    tokens = ",".join(map(str, bench.tokens))
    return [str(dump), "--model", str(bench.model.directory), "--tokens", tokens]


@pytest.fixture(scope="module", autouse=True)
def once() -> Iterator[None]:
    """The dump is always the same, so it is localized once."""
    with pytest.MonkeyPatch.context() as patch:
        found: list[Localization] = []

        def remembered(*given: Any, **more: Any) -> Localization:
            found[:] = found or [localize(*given, **more)]
            return found[0]

        patch.setattr(__main__, "localize", remembered)
        yield


@pytest.mark.parametrize(
    ("question", "answer"),
    [
        (["--expect-stage", "ffn_up"], 0),
        (["--expect-stage", "ffn_silu", "--expect-layer", "1"], 1),
        (["--expect-stage", "ffn_silu", "--expect-layer", "0"], 0),
        (["--expect-stage", " FFN_silu"], 1),
        (["--expect-stage", "ffn_gate"], 1),  # not dumped: judged with ffn_silu
        (["--expect-stage", "attn_scores"], 0),  # with attn_softmax
    ],
)
def test_a_verdict(given: list[str], question: list[str], answer: int) -> None:
    assert __main__.main([*given, *question]) == answer


@pytest.mark.parametrize(
    "words",
    [
        ["--expect-stage", "lm_head"],  # not dumped, and nothing after it
        ["--expect-stage", "no_such_stage"],
        ["--expect-stage", "ffn_up", "--expect-layer", "7"],
        ["--expect-stage", "lm_head", "--expect-layer", "0"],
        ["--expect-layer", "0"],
        ["--expect-stage", "ffn_up", "--no-such-option"],
        ["--expect-stage", "ffn_up", "--expect-layer", "one"],
        ["--expect-stage", "ffn_up", "--tokens", "1,2"],
    ],
)
def test_anything_else_is_125(given: list[str], words: list[str]) -> None:
    with pytest.raises(bisect.Unjudged) as caught:
        __main__.main([*given, *words])
    assert caught.value.exit_code == bisect.UNJUDGED == 125


def test_a_bug_of_ours_is_125(given: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(__main__, "localize", lambda *a, **k: 1 // 0)
    with pytest.raises(bisect.Unjudged, match="bug"):
        __main__.main([*given, "--expect-stage", "ffn_up"])
