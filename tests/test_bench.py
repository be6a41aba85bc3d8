"""The bench measures what it says, and refuses what it cannot measure."""

import os
import subprocess
from dataclasses import dataclass
from pathlib import Path

import jax
import msgspec
import pytest

from qwen_jax import tracing
from qwen_jax.engine import JaxEngine
from qwen_jax.weights import open_model
from stages.architecture import Key
from stages.errors import UserError
from stages.open import open_trace
from tests.described import as_described
from tests.tiny import write_checkpoint
from tools.bench import __main__ as bench
from tools.bench import floor, measure, report, worker
from tools.bench.measure import Figure, Workload
from tools.diff import diff

TOKENS = (3, 1, 4, 1, 5)
WORK = Workload(None, "demo", 5, Path())


@dataclass(frozen=True)
class Job:
    """What a worker is given."""

    model: Path
    plan: tracing.Plan
    out: Path


def hashes(directory: Path) -> dict[Key, str]:
    return {key: entry.xxh3 for key, entry in open_trace(directory).entries.items()}


def _start(name: str, work: Workload) -> subprocess.Popen[str]:
    return measure._start(name, work, work.arguments)


@pytest.fixture
def job(tmp_path: Path) -> Job:
    model = write_checkpoint(tmp_path / "model")
    return Job(model, tracing.make_plan(open_model(model), TOKENS), tmp_path / "out")


def test_nnsight_runs(job: Job, tmp_path: Path) -> None:
    """In its own process, as in the bench: it gives every object of a process a method ``save``,
    which breaks PyTorch's ONNX exporter."""
    process = _start("nnsight", Workload(str(job.model), "tiny", 5, tmp_path))
    process.kill()  # it has said that it is warm: it ran twice
    process.communicate()


@pytest.mark.parametrize("name", [name for name in worker.CONTENDERS if name != "nnsight"])
def test_a_contender_runs_and_writes_what_it_should(job: Job, name: str) -> None:
    run = worker.CONTENDERS[name](job.plan, job.out)
    run()
    if name == "bare":
        assert not job.out.exists()
    else:
        found = open_trace(job.out)
        outputs = {key for key in job.plan.stored if key[0] == "post_ffn_residual"}
        assert found.entries.keys() == (outputs if name == "outputs" else set(job.plan.stored))
        assert found.manifest and (name == "one_file") == (found.manifest.format == "safetensors")


def test_a_floor_is_of_the_products_the_bytes_and_the_rates(job: Job) -> None:
    """By hand, for the tiny model: D 24, N*H 32, N+2K 8 heads of 8, F 40, V 48, 2 layers."""
    layer = 24 * 64 + 32 * 24 + 3 * 24 * 40
    products = 2 * 10 * 2 * layer + 4 * 2 * 10**2 * 32 + 2 * 48 * 24
    slow = floor.seconds(str(job.model), 10, floor.Rates(1.0, 1e30, 1e30))
    assert slow["bare"] == slow["trace"] == products
    plan = tracing.make_plan(open_model(job.model), tuple(range(10)))
    found = floor.seconds(str(job.model), 10, floor.Rates(1e30, 1e30, 1.0))
    assert found["trace"] * (os.cpu_count() or 1) == pytest.approx(plan.total)
    found = floor.seconds(str(job.model), 10, floor.Rates(1e30, 1.0, 1e30))
    assert found["diff"] == 2 * plan.total
    assert found["bare"] == pytest.approx(4 * (2 * layer + 48 * 24))


def test_ours_and_the_oracle_write_the_same_stages(job: Job, tmp_path: Path) -> None:
    worker.trace(job.plan, job.out)()
    worker.oracle(job.plan, tmp_path / "oracle")()
    a, b = open_trace(job.out), open_trace(tmp_path / "oracle")
    assert a.entries.keys() == b.entries.keys()
    assert diff(a, b, tolerance=1e-5).agree


def test_weights_that_stay_in_memory_give_the_same_bytes(job: Job, tmp_path: Path) -> None:
    run, found = worker.trace(job.plan, job.out), []
    for number in range(2):
        run()
        found.append(hashes(job.out))
        job.out.rename(tmp_path / f"out-{number}")
    fresh = JaxEngine(job.plan.model, job.plan.dtype, "xla", jax.devices("cpu")[0])
    tracing.to_disk(fresh, job.plan, job.out)
    assert found[0] == found[1] == hashes(job.out)


def test_a_worker_answers_each_line_with_seconds(job: Job, tmp_path: Path) -> None:
    work = Workload(str(job.model), "tiny", 5, tmp_path)
    process = _start("trace", work)
    try:
        for _ in range(2):
            print("run", file=process.stdin, flush=True)
            seconds, used = map(float, measure._reply("trace", process).split())
            assert 0 < seconds < 60 and 0 < used < 60
        assert len(open_trace(tmp_path / "warm-trace").entries) == len(job.plan.stored)
    finally:
        process.kill()
        process.communicate()
    with pytest.raises(UserError, match=r"trace failed: .*no such model"):
        _start("trace", Workload(str(tmp_path / "none"), "none", 5, tmp_path))


def figure(**changed: object) -> Figure:
    base = {"part": "warm", "of": "m, 5 tokens", "what": "x", "value": 2.0, "unit": "x"}
    return Figure(**base | changed)


def test_a_bar_is_reached_or_not_and_the_table_says_so() -> None:
    assert figure().reached is None
    assert figure(bar=2.0).reached and not figure(bar=2.1).reached
    assert figure(bar=2.0, most=True).reached and not figure(bar=1.9, most=True).reached
    text = report.markdown([figure(bar=2.1), figure(part="memory")], measure.machine(), 3)
    assert "| m, 5 tokens | x | 2.00 x |  |  | >= 2.1 x | no |" in text
    assert "## Memory" in text and "## Cold" not in text


def test_json_is_as_described() -> None:
    figures = [figure(bar=2.1), *measure._seconds("cold", WORK, {"trace": [1.0, 2.0, 4.0]})]
    told = bench.to_json(figures, measure.machine(), 3)
    as_described("bench", msgspec.json.encode(told))


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
