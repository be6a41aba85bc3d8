"""The page: true without JavaScript, and in a real browser, which it asks for nothing."""

import re
import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import qwen_jax
from qwen_jax import replay
from stages.errors import UserError
from stages.open import open_trace
from stages.trace import Trace
from tests.planted import faults
from tests.planted.checkpoints import random_checkpoint
from tests.planted.matrix import Bench, make_bench
from tools import diff as diff_module
from tools.diff import diff
from tools.diff import main as diff_command
from tools.localize import Localization, localize, show
from tools.localize.__main__ import main as localize_command
from tools.localize.cost.query import Question
from tools.report import cells, page, views
from tools.report.__main__ import main

FAULT = "q_post_rope.rope_interleaved"
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "chrome"))), None)


@pytest.fixture(scope="module", autouse=True)
def frugal() -> Iterator[None]:
    """Compiled in half the time, as the matrix does."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(replay, "Replay", partial(replay.Replay, unoptimised=True))
        yield


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Bench:
    return make_bench("small", "f32", tmp_path_factory.mktemp("report"), length=24)


def opened(bench: Bench, path: Path, fault: str | None) -> Trace:
    run = bench.plant(faults.FAULTS[fault], "one") if fault else bench.right
    return open_trace(run.dump(path), bench.layout)


@pytest.fixture(scope="module")
def broken(bench: Bench, tmp_path_factory: pytest.TempPathFactory) -> Localization:
    trace = opened(bench, tmp_path_factory.mktemp("a") / "broken", FAULT)
    return localize(trace, bench.model, harm=Question())


@pytest.fixture(scope="module")
def sound(bench: Bench, tmp_path_factory: pytest.TempPathFactory) -> Localization:
    return localize(opened(bench, tmp_path_factory.mktemp("b") / "sound", None), bench.model)


@pytest.fixture(scope="module")
def text(bench: Bench, broken: Localization) -> str:
    return page.of_localizations([broken], [bench.model])


# --- what is written


class Reader(HTMLParser):
    """Which elements there are, that each is closed in turn, and what they refer to."""

    VOID = ("meta", "link", "input", "br")

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[str] = []
        self.refers: list[str] = []
        self.ids: list[str] = []
        self.feed(text)
        assert not self.open, self.open

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        found = dict(attributes)
        self.refers += [found[name] or "" for name in ("src", "href", "action") if name in found]
        self.ids += [found["id"] or ""] if "id" in found else []
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def test_it_is_whole_and_refers_to_nothing_outside(text: str) -> None:
    read = Reader(text)
    assert len(set(read.ids)) == len(read.ids)
    inner = {ref[1:] for ref in read.refers if ref.startswith("#")}
    assert inner and inner <= set(read.ids)
    assert all(ref.startswith("#") or ref == "data:," for ref in read.refers)
    assert "default-src 'none'" in text


def test_it_is_a_document_without_a_script(text: str, broken: Localization) -> None:
    body = re.sub(r"<script.*?</script>|<style>.*?</style>", "", text, flags=re.DOTALL)
    assert '<h1 class="verdict">fault: layer 2 q_post_rope: RoPE pairs interleaved</h1>' in body
    item = next(i for i in broken.items if i.key == ("q_post_rope", 2))
    assert f'class="s8 fault">{item.bits:.1f}*</td>' in body
    assert "after row 23: the error moves log p(" in body
    assert body.count("<td id=") == len(broken.items)
    assert "every stage was checked alone" in body


def test_what_is_foreign_is_text(bench: Bench, tmp_path: Path) -> None:
    name = "<script>alert(1)<_script>&'"
    report = localize(opened(bench, tmp_path / name, FAULT), bench.model)
    report = replace(report, model="</script><b>")
    made = page.of_localizations([report], [bench.model])
    Reader(made)
    assert "<script>alert" not in made and "</script><b>" not in made
    assert "&lt;script&gt;alert(1)" in made


def test_shades_can_be_read() -> None:
    """Text on every shade has the contrast that WCAG 2.2 asks for, 4.5."""

    def luminance(colour: str) -> float:
        digits = colour.lstrip("#")
        whole = digits if len(digits) == 6 else "".join(2 * c for c in digits)
        parts = np.array([int(whole[i : i + 2], 16) / 255 for i in (0, 2, 4)])
        linear = np.where(parts <= 0.03928, parts / 12.92, ((parts + 0.055) / 1.055) ** 2.4)
        return float(linear @ [0.2126, 0.7152, 0.0722])

    style = (Path(page.__file__).parent / "report.css").read_text()
    shades = re.findall(r"\.s(\d) \{ background: (#\w+); color: (#\w+);", style)
    assert [int(n) for n, _, _ in shades] == list(range(views.SHADES))
    for _, ground, ink in shades:
        low, high = sorted(map(luminance, (ground, ink)))
        assert (high + 0.05) / (low + 0.05) >= 4.5, (ground, ink)
    grounds = [luminance(ground) for _, ground, _ in shades]
    assert grounds == sorted(grounds, reverse=True)  # in grey as well


def test_a_model_of_28_layers_is_below_2_MB(tmp_path: Path) -> None:
    model = qwen_jax.open_model(random_checkpoint(tmp_path / "deep", num_hidden_layers=28))
    trace = qwen_jax.trace_model(model, tuple(range(1, 129)))
    report = localize(trace, model)
    assert len(report.items) == 28 * 17 + 3
    assert len(page.of_localizations([report], [model]).encode()) < 2e6


# --- numbers


def test_levels_come_back(text: str) -> None:
    from base64 import b64decode

    given = np.array([-12.0, 0.1, 22.4, 53.0, np.nan])
    codes = np.frombuffer(b64decode(cells.packed(given)), np.uint8)
    assert codes[-1] == 255
    np.testing.assert_allclose(codes[:-1] / 4 - 10, [-10, 0, 22.5, 53], atol=1e-9)


def test_a_histogram_counts_every_element() -> None:
    exact = np.array([1.0, 1.5, -2.0, 0.0, 3e-30, 1000.0])
    error = np.array([0.0, 0.25, -0.25, 1.0, 0.0, 0.5])
    found = cells._histogram(error, exact)["counts"]
    assert sum(n for _, _, n in found) == 6
    assert [0, None, 1] in found and [0, -2, 1] in found and [1, -2, 1] in found
    assert [9, -1, 1] in found  # 1000 is 2^9 and more


def test_the_grid_and_the_numbers_are_those_of_the_values(
    bench: Bench, broken: Localization
) -> None:
    key = ("q_post_rope", 2)
    found = dict(cells.details(broken, bench.model))[key]
    right = bench.right.stages[2, "q_post_rope"].astype(np.float64)
    wrong = broken.trace.read(*key).astype(np.float64)
    expected = np.linalg.norm(wrong - right) / np.linalg.norm(right)
    assert found["relative_l2"] == pytest.approx(expected, rel=1e-4)
    place = np.unravel_index(np.abs(wrong - right).argmax(), right.shape)
    assert tuple(found["largest"]["at"].values()) == place
    assert found["largest"]["found"] == wrong[place]
    assert found["elements"] == right.size
    assert found["grid"]["rows"] == right.shape[1]


def test_a_budget_spares_what_is_sound(
    bench: Bench, broken: Localization, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cells, "BUDGET", 0)
    assert [key for key, _ in cells.details(broken, bench.model)] == [("q_post_rope", 2)]
    assert "not looked at: the model is large" in str(page._behind(broken, {}))


# --- the commands


def test_the_commands_write_it(bench: Bench, tmp_path: Path, capsys: Any) -> None:
    run = bench.plant(faults.FAULTS[FAULT], "one")
    a, b = str(run.dump(tmp_path / "a")), str(bench.right.dump(tmp_path / "b"))
    model = ["--model", str(bench.model.directory), "--tokens", ",".join(map(str, bench.tokens))]
    out = tmp_path / "report.html"
    assert main([a, b, *model, "-o", str(out)]) == 1
    assert f"{out}: " in capsys.readouterr().out
    assert "Which of the two is right" in out.read_text()
    table = out.read_text().partition("<caption>the margin of ")[2].partition("</table>")[0]
    assert "A - B</th>" in table and '<th scope="row">layer 2 q_post_rope</th>' in table
    assert localize_command([b, *model, "--report", str(out)]) == 0
    assert '<h1 class="verdict">clean' in out.read_text()
    assert diff_command([a, b, *model, "--report", str(out)]) == 1
    assert "<h1>differ: the traces part at layer 2 q_post_rope" in out.read_text()
    assert [p.name for p in tmp_path.glob("report*")] == ["report.html"]
    value = tmp_path / "a" / "layer-0" / "attn_norm.bin"
    before = value.read_bytes()
    for wrong in (tmp_path, tmp_path / "no" / "where.html", value):
        with pytest.raises(UserError):
            main([a, *model, "-o", str(wrong)])
    assert value.read_bytes() == before


@pytest.mark.parametrize("shows", ["localize", "diff"])
def test_a_reader_who_stops_early_has_the_page(
    bench: Bench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, shows: str
) -> None:
    """As where the output is piped to ``head``."""

    def stop(*_: Any, **__: Any) -> None:
        raise BrokenPipeError

    monkeypatch.setattr(show, "show_localization", stop)
    monkeypatch.setattr(diff_module, "show_difference", stop)
    a = str(bench.right.dump(tmp_path / "a"))
    model = ["--model", str(bench.model.directory), "--tokens", ",".join(map(str, bench.tokens))]
    out = tmp_path / "report.html"
    command = {"localize": [localize_command, a], "diff": [diff_command, a, a]}[shows]
    with pytest.raises(BrokenPipeError):
        command[0]([*command[1:], *model, "--report", str(out)])  # type: ignore[operator]
    assert "</html>" in out.read_text()


# --- in a browser


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    sync = pytest.importorskip(
        "playwright.sync_api", reason="no playwright: pip install playwright"
    )
    if CHROMIUM is None:
        pytest.skip("no browser to look at the page with: apt install chromium")
    with sync.sync_playwright() as driver:
        started = driver.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield started
        started.close()


@pytest.fixture
def look(browser: Any, tmp_path: Path) -> Iterator[Callable[..., Any]]:
    """Open a page; when the test ends, nothing may have been said or asked for."""
    said: list[str] = []

    def show(text: str, **settings: Any) -> Any:
        path = tmp_path / "page.html"
        path.write_text(text, encoding="utf-8")
        context = browser.new_context(viewport={"width": 1400, "height": 1000}, **settings)
        shown = context.new_page()
        shown.set_default_timeout(20000)
        shown.on("console", lambda message: said.append(message.text))
        shown.on("pageerror", lambda error: said.append(str(error)))
        shown.on("request", lambda r: r.url == path.as_uri() or said.append(r.url[:80]))
        shown.goto(path.as_uri())
        if settings.get("java_script_enabled", True):
            shown.wait_for_selector("html[data-ready]")
        return shown

    yield show
    assert not said


def test_a_click_opens_a_cell(look: Any, text: str) -> None:
    shown = look(text)
    assert not shown.is_visible("#detail")
    shown.click("#A-2-q_post_rope button")
    assert shown.inner_text("#detail-title") == "layer 2 q_post_rope"
    assert "RoPE pairs interleaved" in shown.inner_text("#detail .note")
    headings = shown.locator("#detail figure h3").all_inner_texts()
    assert headings == [
        "bits by head and position", "error against value", "bits by head", "bits by position",
        "bits by channel", "q_post_rope over the layers",
    ]  # fmt: skip
    assert shown.locator("#detail figure svg[aria-label]").count() >= len(headings)
    assert shown.url.endswith("#A-2-q_post_rope")
    shown.click("text=close (Esc)")
    assert not shown.is_visible("#detail")
    shown.click(".faults a")
    shown.locator("#detail").wait_for(state="visible")  # the browser tells of a link later on


def test_keys_do_what_they_say(look: Any, text: str) -> None:
    shown = look(text)
    here = lambda: shown.evaluate("document.activeElement.closest('td')?.id")  # noqa: E731
    shown.locator("#A-2-q_post_rope button").focus()
    for key, place in [
        ("ArrowRight", "2-k_post_rope"), ("ArrowUp", "1-k_post_rope"), ("Home", "1-attn_norm"),
        ("End", "1-post_ffn_residual"), ("ArrowDown", "2-post_ffn_residual"),
        ("ArrowLeft", "2-ffn_out"),
    ]:  # fmt: skip
        shown.keyboard.press(key)
        assert here() == f"A-{place}", key
    shown.keyboard.press("Enter")
    assert shown.inner_text("#detail-title") == "layer 2 ffn_out"
    assert shown.evaluate("document.activeElement.id") == "detail"
    shown.keyboard.press("Escape")
    assert not shown.is_visible("#detail") and here() == "A-2-ffn_out"
    label = shown.get_attribute("#A-2-q_post_rope button", "aria-label")
    assert label.startswith("layer 2 q_post_rope: ") and label.endswith(", fault")
    assert shown.locator("td button:not([aria-label])").count() == 0
    assert shown.locator("td button[tabindex='0']").count() == 1  # one stop on the way through


def test_views_are_switched(look: Any, bench: Bench, broken: Localization, monkeypatch) -> None:
    plain = views.to_json
    headroom = {"layer": 2, "stage": "ffn_swigl", "largest": 58820.0, "float16": 0.898}
    more = {"headroom": [headroom]}
    share = next(r for r in broken.to_json()["harm"]["shares"] if r["layer"] == 2)
    felt = broken.to_json()["nats"][1]["max"]
    monkeypatch.setattr(views, "to_json", lambda report: plain(report) | more)
    shown = look(page.of_localizations([broken], [bench.model]))
    for name, cell, expected in [
        ("shares", f"2-{share['stage']}", format(share["share"], "+.0e")),
        ("nats", "1-attn_scores", format(felt, ".2g")),
        ("headroom", "2-ffn_swigl", "0.9"), ("l2", "0-embedding", "0"),
    ]:  # fmt: skip
        before = shown.inner_text("#says")
        shown.check(f"input[value={name}]")
        assert shown.inner_text(f"#A-{cell}").rstrip("*") == expected
        assert shown.inner_text("#says") != before
    assert float(shown.inner_text("#A-2-q_post_rope").rstrip("*")) > 0.1
    assert shown.locator("#legend li").first.inner_text() == "< 1e-07"
    shown.check("input[value=nats]")
    assert "none" in shown.get_attribute("#A-0-qkv_bias", "class")
    assert not shown.is_visible("#call")  # one call computed all


def test_a_slider_goes_through_the_calls(look: Any, bench: Bench, tmp_path: Path) -> None:
    trace = qwen_jax.trace_model(bench.model, tuple(bench.tokens), out=tmp_path / "t")
    trace.steps = (20, 1, 1, 1, 1)
    whole = trace.read
    value = whole("ffn_up", 1).copy()
    value[-2] *= 1.5

    def read(stage: str, layer: int | None) -> np.ndarray:
        return value if (stage, layer) == ("ffn_up", 1) else whole(stage, layer)

    trace.read = read  # type: ignore[method-assign]
    shown = look(page.of_localizations([localize(trace, bench.model)], [bench.model]))
    assert shown.inner_text("#call output") == "all"
    found, marked = [], []
    for call in range(5):
        shown.locator("#call input").fill(str(call))
        text = shown.inner_text("#A-1-ffn_up")
        found.append(float(text.rstrip("*")))
        marked.append(text.endswith("*"))
        assert marked[-1] == ("fault" in shown.get_attribute("#A-1-ffn_up", "class"))
    assert marked == [False, False, False, True, False]
    assert shown.inner_text("#call output") == "5 of 5: row 23"
    assert found[3] < 3 and min(found[:3] + found[4:]) > 20
    assert "rows of each call of the engine" in shown.inner_text("body")


def test_two_engines_side_by_side(look: Any, bench: Bench, broken: Any, sound: Any) -> None:
    between = diff(broken.trace, sound.trace)
    shown = look(page.of_localizations([broken, sound], [bench.model] * 2, between))
    assert shown.locator("table.heat").count() == 2
    shown.click("#B-2-q_post_rope button")
    assert shown.locator("#detail .pair > div > h3").all_inner_texts() == ["A", "B"]
    shown.check("input[value=apart]")
    assert shown.inner_text("#A-1-ffn_out") == "0"
    row = shown.locator("table.plain tr", has_text="q_post_rope").inner_text().split()
    assert row[0] == "q_post_rope" and row[-6:] == ["B", "(the", "other", "has", "a", "fault)"]


def test_a_key_is_no_channel(look: Any, text: str) -> None:
    shown = look(text)
    shown.click("#A-1-attn_softmax button")
    titles = shown.locator("#detail figure h3").all_inner_texts()
    assert "bits by key" in titles and "bits by channel" not in titles


def test_a_comparison_alone(look: Any, broken: Localization, sound: Localization) -> None:
    shown = look(page.of_difference(diff(broken.trace, sound.trace)))
    shown.click("#A-2-ffn_up button")
    assert "equal, within one ULP" in shown.inner_text("#detail")


def test_light_dark_and_paper(look: Any, text: str) -> None:
    ground = "getComputedStyle(document.body).backgroundColor"
    light, dark = (look(text, color_scheme=s).evaluate(ground) for s in ("light", "dark"))
    assert (light, dark) == ("rgb(255, 255, 255)", "rgb(21, 23, 26)")
    shown = look(text, color_scheme="dark")
    shown.emulate_media(media="print")
    assert shown.evaluate(ground) == light
    assert not shown.is_visible("#controls") and shown.is_visible("table.heat")
    assert shown.pdf(format="A4")[:5] == b"%PDF-"


def test_without_javascript(look: Any, text: str) -> None:
    shown = look(text, java_script_enabled=False)
    assert shown.is_visible("h1") and shown.is_visible("table.heat")
    assert not shown.is_visible("#controls") and not shown.is_visible("#detail")
    shown.click(".faults a")
    assert shown.url.endswith("#A-2-q_post_rope")


def test_a_narrow_screen_scrolls_the_map_alone(look: Any, text: str) -> None:
    shown = look(text)
    shown.set_viewport_size({"width": 400, "height": 700})
    assert shown.evaluate("document.documentElement.scrollWidth") <= 400


def test_a_narrow_screen_breaks_no_word(look: Any) -> None:
    names = ["dtype", "T", "program", "flags", "differ", "rel. L2", "local bits", "verdict"]
    row = ["float32", "17", "program", "reference", "0/88", "5.3e-07", "22.2", "identical"]
    digest = "0123456789abcdef" * 4
    tables = [("points", names, [row]), ("where from", ("", ""), [["weights", digest]])]
    shown = look(page.of_tables("pass", "columns", tables), java_script_enabled=False)
    shown.set_viewport_size({"width": 400, "height": 700})
    heights = (
        shown.locator("table.plain")
        .first.locator("td")
        .evaluate_all("cells => cells.map(cell => cell.clientHeight)")
    )
    assert len(set(heights)) == 1 and heights[0] < 40
    assert shown.locator("td.long").bounding_box()["width"] < 400
    assert shown.evaluate("document.documentElement.scrollWidth") <= 400
