"""The bench measures what it says, and refuses what it cannot measure."""

from pathlib import Path

import pytest
from tools.bench import measure, report, worker
from tools.bench.measure import Case, Figure

from qwen_jax import command
from stages.errors import UserError
from stages.trace import open_trace
from tests.tiny import write_checkpoint
from tools import bench
from tools.diff import compare_traces


@pytest.fixture
def plan(tmp_path: Path) -> command.Plan:
    model = write_checkpoint(tmp_path / "model")
    arguments = ["--model", str(model), "--tokens", "random:5", "--out", str(tmp_path / "out")]
    return command.make_plan(command.parser("x", "", ("xla",)).parse_args(arguments), "x")


@pytest.mark.filterwarnings("ignore")  # of nnsight and what it imports
@pytest.mark.parametrize("name", worker.CONTENDERS)
def test_a_contender_runs_and_writes_what_it_should(plan: command.Plan, name: str) -> None:
    run = worker.CONTENDERS[name](plan)
    run()
    if name in ("bare", "nnsight"):
        assert not plan.out.exists()
    else:
        assert len(open_trace(plan.out).entries) == len(plan.stored)


def test_ours_and_the_oracle_write_the_same_stages(plan: command.Plan, tmp_path: Path) -> None:
    worker.trace(plan)()
    ours = plan.out.rename(tmp_path / "ours")
    worker.oracle(plan)()
    a, b = open_trace(ours), open_trace(plan.out)
    assert a.entries.keys() == b.entries.keys()
    rows, _ = compare_traces(a, b, list(a.entries))
    assert all(row.within(1e-5) for row in rows.values())


def test_weights_that_stay_in_memory_give_the_same_bytes(
    plan: command.Plan, tmp_path: Path
) -> None:
    run, found = worker.trace(plan), []
    for _ in range(2):
        run()
        trace = open_trace(plan.out)
        found.append({key: entry.xxh3 for key, entry in trace.entries.items()})
        plan.out.rename(tmp_path / f"out-{len(found)}")
    command.main(
        command.parser("x", "", ("xla",)).parse_args(
            ["--model", str(plan.model.directory), "--tokens", "random:5", "--out", str(plan.out)]
        ),
        "x",
        lambda model, args: worker._jax_engine(plan),
        lambda *_: 0,
    )
    found.append({key: entry.xxh3 for key, entry in open_trace(plan.out).entries.items()})
    assert found[0] == found[1] == found[2]


def test_a_worker_answers_each_line_with_seconds(plan: command.Plan, tmp_path: Path) -> None:
    case = Case(str(plan.model.directory), "tiny", 5, tmp_path)
    process = measure._start("trace", case)
    try:
        for _ in range(2):
            print("run", file=process.stdin, flush=True)
            assert 0 < float(measure._reply("trace", process)) < 60
        assert len(open_trace(tmp_path / "warm-trace").entries) == len(plan.stored)
    finally:
        process.kill()
        process.communicate()
    with pytest.raises(UserError, match=r"trace failed: .*no such model"):
        measure._start("trace", Case(str(tmp_path / "none"), "none", 5, tmp_path))


def figure(**changed: object) -> Figure:
    base = {"part": "warm", "of": "m, 5 tokens", "what": "x", "value": 2.0, "unit": "x"}
    return Figure(**base | changed)


def test_a_bar_is_reached_or_not_and_the_table_says_so() -> None:
    assert figure().reached is None
    assert figure(bar=2.0).reached and not figure(bar=2.1).reached
    assert figure(bar=2.0, most=True).reached and not figure(bar=1.9, most=True).reached
    text = report.markdown([figure(bar=2.1), figure(part="memory")], measure.machine(), 3)
    assert "| m, 5 tokens | x | 2.00 x |  | >= 2.1 x | no |" in text
    assert "## Memory" in text and "## Cold" not in text


@pytest.mark.parametrize(
    ("asked", "says"),
    [
        (["--repeat", "0"], "at least one run"),
        (["--lengths", "a"], "expected lengths such as 64,512"),
        (["--lengths", "0"], "expected lengths such as 64,512"),
        (["--lengths", "99999"], "has fewer positions"),
        (["--model", "synthetic:9b"], "choose one of"),
        (["--scratch", "/nonexistent"], "no such directory"),
        (["--markdown", "/nonexistent/x.md"], "no such directory"),
    ],
)
def test_wrong_use_is_one_line(tmp_path: Path, asked: list[str], says: str) -> None:
    with pytest.raises(UserError) as caught:
        bench.main([*asked, "--json", str(tmp_path / "x.json")])
    assert says in str(caught.value) and "\n" not in str(caught.value)
    assert not (tmp_path / "x.json").exists()
