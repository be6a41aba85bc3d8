"""A short run of the standing campaign, ``make fuzz`` and ``make kill``, which is seen to fail."""

import os
from random import Random
from types import SimpleNamespace

import pytest

from tests.campaign import fuzz, kill, mutate, subjects

CASES = 300
EVERY = 6  # parts of it


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> list[subjects.Subject]:
    pytest.importorskip("gguf")
    every = subjects.make(tmp_path_factory.mktemp("subjects"))
    quick = [each for each in every if "localize" not in each.name]  # which compiles
    fuzz.undamaged(quick, tmp_path_factory.mktemp("scratch"))
    return quick


@pytest.mark.parametrize("part", range(EVERY))
def test_damaged_inputs_are_refused_or_read_right(made, tmp_path, part) -> None:
    found = [fuzz.case(made, 2, number, tmp_path) for number in range(part, CASES, EVERY)]
    assert [each for each in found if each.wrong] == []
    assert {each.code for each in found} <= {0, 1, 2, 3}


def test_the_same_seed_makes_the_same_damage(tmp_path) -> None:
    for name in "ab":
        (tmp_path / name).mkdir()
        (tmp_path / name / "x.json").write_text('{"a": [1, 2, {"b": "c"}], "d": null}')
        (tmp_path / name / "y.bin").write_bytes(bytes(range(200)))
    for number in range(50):
        changes = [mutate.directory(Random(f"0/{number}"), tmp_path / name) for name in "ab"]
        assert changes[0] == changes[1]
        if number % 10 == 9 or not all((tmp_path / n / "y.bin").is_file() for n in "ab"):
            break
    assert kill.content(tmp_path / "a") == kill.content(tmp_path / "b")


@pytest.mark.parametrize(
    ("code", "out", "err", "says"),
    [
        (4, "", "error: a bug in this program\n", "exit 4"),
        (-11, "", "", "exit -11"),
        (None, "", "", "too long"),
        (2, "", "Traceback\nValueError: x\n", "no line"),
        (2, "", "error: " + "x" * 400 + "\n", "no line"),
        (2, "a table\n", "error: x\n", "stdout"),
        (0, "\x1b[31m\n", "", "control character"),
        (2, "", "", "no line"),
    ],
)
def test_what_no_command_may_do_is_seen(tmp_path, code, out, err, says) -> None:
    subject = SimpleNamespace(right=lambda *_: "", path=tmp_path)
    assert says in fuzz.judged(subject, tmp_path, tmp_path / "said", code, out, err)
    assert fuzz.judged(subject, tmp_path, tmp_path / "said", 2, "", "error: x\n") == ""


def test_a_reader_that_believes_everything_is_seen(made, tmp_path, monkeypatch) -> None:
    """Without hashes a changed value would agree with itself at best."""
    monkeypatch.setattr("stages.trace.Trace.read", _without_checks)
    traces = [each for each in made if each.name == "trace, aprt"]
    found = [fuzz.case(traces, 5, number, tmp_path).wrong for number in range(60)]
    assert any("agree" in wrong or "exit 4" in wrong for wrong in found)


def _without_checks(self, stage, layer):
    import numpy as np

    entry = self.entries[stage, layer]
    raw = (self.path / entry.path).read_bytes()[12:]
    return np.frombuffer(raw, "<f4")[: int(np.prod(entry.shape))].reshape(entry.shape)


def test_a_command_that_waits_is_ended() -> None:
    def waits(argv: list[str]) -> int:
        os.read(os.pipe()[0], 1)
        return 0

    assert fuzz.run(waits, [], wait=1) == (None, "", "")


@pytest.mark.parametrize("number", range(2))
def test_killed_traces_are_refused_and_go_on(tmp_path, number) -> None:
    job = kill.jobs(tmp_path)[number]
    with kill.start(job, tmp_path / "good") as process:
        process.communicate()
    good = kill.content(tmp_path / "good")
    assert good
    left, wrong = kill.trial(job, good, Random(number), tmp_path)
    assert not wrong and left in ("nothing", "part", "whole", "full")
