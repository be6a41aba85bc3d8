"""The measurements of ``tools.bench``."""

import importlib.metadata
import importlib.util
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from qwen_jax.weights import open_model
from stages.entry import Entry
from stages.errors import UserError
from stages.open import open_trace
from tools.bench import floor
from tools.bench.worker import CONTENDERS
from tools.parity.child import last_line

Doing = Callable[[str], None]
OF_CPU = ", CPU time"  # of all threads: what a busy machine does not change as much
DECODED = 256
ROOT = Path(__file__).resolve().parents[2]


@dataclass(frozen=True, kw_only=True)
class Figure:
    """One line of a table.

    Attributes:
        part: "cold", "warm", "decode", "tools" or "memory".
        of: model and prompt length.
        what: what was measured.
        value: the median; ``low`` and ``high`` are the extremes of the runs.
        unit: "s", "x" (a ratio of medians), "GB/s" or "GiB".
        bar: what the ratio or the memory should be: at least, or with ``most`` at most.
        floor: the seconds that it takes at best: see ``tools.bench.floor``.
    """

    part: str
    of: str
    what: str
    value: float
    unit: str
    low: float | None = None
    high: float | None = None
    bar: float | None = None
    most: bool = False
    floor: float | None = None

    @property
    def reached(self) -> bool | None:
        if self.bar is None:
            return None
        return self.value <= self.bar if self.most else self.value >= self.bar


class FigureRow(Entry, frozen=True):
    """One figure; see ``tools.bench.measure.Figure``. ``reached`` is null without a bar."""

    part: Literal["cold", "warm", "decode", "tools", "memory"]
    of: str
    what: str
    value: float
    unit: Literal["s", "x", "GB/s", "GiB"]
    low: float | None
    high: float | None
    bar: float | None
    most: bool
    floor: float | None
    reached: bool | None


class BenchResult(Entry, frozen=True):
    """``tools.bench --json``; ``repeat`` is of how many runs a figure is the median."""

    schema: Literal[1]
    machine: dict[str, Any]
    repeat: int
    figures: list[FigureRow]


@dataclass(frozen=True)
class Workload:
    """One model on disk, one prompt, a folder for what comes of it, and what it takes at best."""

    model: str | None
    name: str
    length: int
    folder: Path
    floors: Mapping[str, float | None] = field(default_factory=dict)

    @property
    def of(self) -> str:
        return f"{self.name}, {self.length} tokens"

    @property
    def arguments(self) -> list[str]:
        model = ["--model", self.model] if self.model else []
        return [*model, "--tokens", f"random:{self.length}"]


def make_workload(
    model: str, length: int, scratch: Path, rates: floor.Rates, doing: Doing
) -> Workload:
    """The model as a Hugging Face directory (a synthetic one is written first), and tokens."""
    given = None if model == "demo" else model
    if model.startswith("synthetic:"):
        given = str(on_disk(model, scratch, doing))
    elif given and Path(given).exists():
        given = str(Path(given).resolve())
    opened = open_model(given)
    if length > opened.config.max_position_embeddings:
        raise UserError(f"--lengths {length}: {model} has fewer positions")
    folder = scratch / f"{opened.name}-{length}"
    folder.mkdir(exist_ok=True)
    return Workload(given, model, length, folder, floor.seconds(given, length, rates))


def on_disk(model: str, scratch: Path, doing: Doing) -> Path:
    """A synthetic model written as a Hugging Face directory, once."""
    directory = scratch / model.replace(":", "-")
    if not directory.exists():
        doing(f"writing {model}")
        _process(["tools.convert", model, str(directory), "--to", "hf"], scratch)
    return directory


def _process(arguments: list[str], folder: Path) -> float:
    """Seconds of one whole process. Raises UserError if it failed."""
    return _usage(arguments, folder)[0]


def _usage(arguments: list[str], folder: Path) -> tuple[float, int]:
    """Seconds of one whole process, and the most resident memory it had, bytes.

    Raises:
        UserError: it failed.
    """
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    began = time.perf_counter()
    process = subprocess.Popen(
        [sys.executable, "-m", *arguments],
        cwd=folder,
        env=os.environ | {"PYTHONPATH": path},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stderr
    with process.stderr:
        said = process.stderr.read()
    _, status, used = os.wait4(process.pid, 0)
    seconds = time.perf_counter() - began
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode not in (0, 1):  # 1 is a verdict of diff and localize
        raise UserError(f"{' '.join(arguments)[:100]} failed: {last_line(said)}")
    return seconds, used.ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def _seconds(part: str, work: Workload, taken: dict[str, list[float]]) -> list[Figure]:
    floors = work.floors if part != "decode" else {}
    if part == "cold":
        floors = dict.fromkeys(taken, floors.get("cold"))
    return [
        Figure(
            part=part,
            of=work.of,
            what=what,
            value=statistics.median(each),
            unit="s",
            low=min(each),
            high=max(each),
            floor=floors.get(what),
        )
        for what, each in taken.items()
    ]


def _ratio(figures: list[Figure], above: str, below: str, bar: float, most: bool = False) -> Figure:
    values = {each.what: each.value for each in figures}
    first = figures[0]
    return Figure(
        part=first.part,
        of=first.of,
        what=f"{above} / {below}",
        value=values[above] / values[below],
        unit="x",
        bar=bar,
        most=most,
    )


def cold(work: Workload, repeat: int, doing: Doing) -> list[Figure]:
    """Whole processes: the trace with its compiled programs on disk and without, the oracle."""
    commands = {
        "trace": ["qwen_jax.trace", "--device", "cpu"],
        "trace, compiling": ["qwen_jax.trace", "--device", "cpu", "--no-compile-cache"],
        "oracle": ["oracle.trace", "--device", "cpu"],
    }
    taken: dict[str, list[float]] = {name: [] for name in commands}
    for turn in range(repeat + 1):
        for name, command in commands.items():
            doing(f"{work.of}: {name}, cold, {turn} of {repeat}")
            out = work.folder / name.replace(", ", "-")
            shutil.rmtree(out, ignore_errors=True)
            os.sync()
            seconds = _process([*command, *work.arguments, "--out", str(out)], work.folder)
            if turn:  # the first round fills the page cache and the compilation cache
                taken[name].append(seconds)
    found = _seconds("cold", work, taken)
    return [
        *found,
        _ratio(found, "oracle", "trace", 4),
        _ratio(found, "oracle", "trace, compiling", 4),
    ]


def warm(work: Workload, repeat: int, doing: Doing) -> list[Figure]:
    """Every contender in its own process, in turn; and the disk's own speed."""
    found = _in_turn("warm", work, tuple(CONTENDERS), work.arguments, repeat, doing)
    return [
        *found,
        _ratio(found, "oracle", "trace", 2.5),
        _ratio(found, "nnsight", "trace", 1),
        _ratio(found, "trace", "bare", 1.4, most=True),
        _ratio(found, "one_file", "bare", 1.3, most=True),
        _ratio(found, "outputs", "bare", 1.05, most=True),
        *(
            _ratio(found, f"{name}{OF_CPU}", f"bare{OF_CPU}", bar, most=True)
            for name, bar in {"trace": 1.4, "one_file": 1.3, "outputs": 1.05}.items()
        ),
    ]


def decode(work: Workload, repeat: int, doing: Doing) -> list[Figure]:
    """The prompt and then ``DECODED`` tokens, a call each, through a key/value cache: every stage
    of every call to disk, and with nothing captured."""
    arguments = [*work.arguments, "--generate", str(DECODED + 1)]
    found = _in_turn("decode", work, ("trace", "bare", "oracle"), arguments, repeat, doing)
    return [
        *found,
        _ratio(found, "oracle", "trace", 2),
        _ratio(found, "trace", "bare", 1.5, most=True),
    ]


def _in_turn(
    part: str,
    work: Workload,
    names: tuple[str, ...],
    arguments: list[str],
    repeat: int,
    doing: Doing,
) -> list[Figure]:
    """Seconds of each of the contenders ``names``, and how fast the disk takes what they write."""
    workers = {}
    taken: dict[str, list[float]] = {}
    try:
        for name in names:
            doing(f"{work.of}: loading {name}")
            workers[name], taken[name] = _start(name, work, arguments), []
        out = work.folder / "warm-trace"
        for turn in range(repeat):
            for name, worker in workers.items():
                doing(f"{work.of}: {name}, {part}, {turn} of {repeat}")
                os.sync()  # nobody waits for the disk to take what another has written
                print("run", file=worker.stdin, flush=True)
                seconds, used = map(float, _reply(name, worker).split())
                taken[name].append(seconds)
                taken.setdefault(name + OF_CPU, []).append(used)
            taken.setdefault("plain write", []).append(_plain_write(out, work.folder))
    finally:
        for worker in workers.values():
            worker.kill()
            worker.communicate()
    bytes_ = sum(path.stat().st_size for path in out.rglob("*") if path.is_file())
    ceiling = Figure(
        part=part,
        of=work.of,
        what=f"plain write of the same {bytes_ / 1e9:.2f} GB",
        value=bytes_ / 1e9 / statistics.median(taken["plain write"]),
        unit="GB/s",
    )
    return [*_seconds(part, work, taken), ceiling]


def _start(name: str, work: Workload, arguments: list[str]) -> subprocess.Popen[str]:
    out = str(work.folder / f"warm-{name}")
    job = {"contender": name, "arguments": arguments, "out": out}
    worker = subprocess.Popen(
        [sys.executable, "-m", "tools.bench.worker"],
        cwd=ROOT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    print(json.dumps(job), file=worker.stdin, flush=True)
    _reply(name, worker)
    return worker


def _reply(name: str, worker: subprocess.Popen[str]) -> str:
    assert worker.stdout
    line = worker.stdout.readline()
    if not line:
        raise UserError(f"{name} failed: {last_line(worker.communicate()[1])}")
    return line


def _plain_write(like: Path, folder: Path) -> float:
    """Seconds to write files of the same sizes, from memory, without a thought."""
    sizes = [path.stat().st_size for path in like.rglob("*") if path.is_file()]
    content, target = memoryview(bytes(max(sizes))), folder / "plain"
    shutil.rmtree(target, ignore_errors=True)
    target.mkdir()
    os.sync()
    began = time.perf_counter()
    for number, size in enumerate(sizes):
        with open(target / str(number), "wb", buffering=0) as file:
            left = content[:size]
            while left:
                left = left[file.write(left) :]
    return time.perf_counter() - began


def tools(work: Workload, repeat: int, doing: Doing) -> list[Figure]:
    """diff of the trace with the oracle's, and localize of the trace, beside making it: whole
    processes."""
    first, second = work.folder / "trace", work.folder / "oracle"
    given = ["--device", "cpu", *work.arguments, "--overwrite", "--out"]
    model = ["--model", work.model] if work.model else []
    if not second.exists():
        doing(f"{work.of}: oracle.trace")
        _process(["oracle.trace", *given, str(second)], work.folder)
    commands = {
        "trace": ["qwen_jax.trace", *given, str(first)],
        "localize": ["tools.localize", str(first), *model],
        "diff": ["tools.diff", str(first), str(second)],
    }
    taken: dict[str, list[float]] = {name: [] for name in (*commands, "diff without start-up")}
    for turn in range(repeat + 1):
        for name, command in commands.items():
            doing(f"{work.of}: {name}, {turn} of {repeat}")
            os.sync()
            seconds = _process(command, work.folder)
            if turn:  # the first round compiles
                taken[name].append(seconds)
        if turn:
            taken["diff without start-up"].append(_compare(first, second))
    found = _seconds("tools", work, taken)
    bytes_ = sum(entry.stat().st_size for entry in first.rglob("*.bin"))
    seconds = statistics.median(taken["diff without start-up"])
    speed = Figure(
        part="tools",
        of=work.of,
        what=f"diff of {bytes_ / 1e9:.2f} GB a side",
        value=bytes_ / 1e9 / seconds,
        unit="GB/s",
        bar=1.5,
    )
    return [*found, _ratio(found, "localize", "trace", 1, most=True), speed]


def _compare(first: Path, second: Path) -> float:
    from tools.diff import compare_traces

    a, b = open_trace(first), open_trace(second)
    began = time.perf_counter()
    compare_traces(a, b, list(a.entries))
    return time.perf_counter() - began


def memory(model: str, length: int, bar: int, scratch: Path, doing: Doing) -> list[Figure]:
    """Peak memory of a trace of all stages, in float32, what --dry-run had said of it, and that of
    localize."""
    directory = on_disk(model, scratch, doing)
    doing(f"{model}, {length} tokens: memory")
    out, told = scratch / "memory-trace", scratch / "memory.json"
    arguments = ["qwen_jax.trace", "--device", "cpu", "--model", str(directory)]
    arguments += ["--tokens", f"random:{length}", "--out", str(out), "--json", str(told)]
    _process([*arguments, "--dry-run"], scratch)
    expected = json.loads(told.read_text())["peak_memory_bytes"]
    seconds = _process(arguments, scratch)
    found = json.loads(told.read_text())
    doing(f"{model}, {length} tokens: memory of localize")
    judging, most = _usage(["tools.localize", str(out), "--model", str(directory)], scratch)
    shutil.rmtree(out)
    shutil.rmtree(directory)

    def figure(what: str, value: float, unit: str, bar: float | None = None) -> Figure:
        of = f"{model}, {length} tokens"
        return Figure(part="memory", of=of, what=what, value=value, unit=unit, bar=bar, most=True)

    return [
        figure("peak resident memory", found["peak_memory_bytes"] / 2**30, "GiB", bar / 2**30),
        figure("as --dry-run had said", expected / 2**30, "GiB"),
        figure("whole process", seconds, "s"),
        figure("trace", found["file_bytes"] / 2**30, "GiB"),
        figure("localize, peak resident memory", most / 2**30, "GiB", bar / 2**30),
        figure("localize, whole process", judging, "s"),
        figure("localize / trace", judging / seconds, "x", 1),
    ]


def check_contenders() -> None:
    """Raises UserError where one of them is not installed."""
    needed = ("torch", "transformers", "nnsight")
    if absent := [name for name in needed if not importlib.util.find_spec(name)]:
        raise UserError(f"{', '.join(absent)}: not installed; pip install '.[oracle,bench]'")


def machine() -> dict[str, Any]:
    """What a table says about where it was made."""
    from qwen_jax import runtime

    info, model = Path("/proc/cpuinfo"), platform.processor() or platform.machine()
    if info.exists():
        lines = info.read_text().splitlines()
        model = next((x.partition(": ")[2] for x in lines if x.startswith("model name")), model)
    packages = ("jax", "jaxlib", "numpy", "torch", "transformers", "nnsight")
    return {
        "cpu": model,
        "cores": runtime.cpu_count(),
        "load": round(os.getloadavg()[0], 1),
        "versions": {name: importlib.metadata.version(name) for name in packages}
        | {"python": platform.python_version()},
    }
