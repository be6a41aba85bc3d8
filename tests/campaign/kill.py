"""``python -m tests.campaign.kill --kills 200``: SIGKILL at random moments, and disks that fill.

What must hold: what is left is whole and right, or is refused in one line by whatever opens it;
and the same command, told to go on or to start anew, then makes what an undisturbed one makes.
"""

import argparse
import json
import os
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from random import Random

from qwen_jax.weights import open_model
from stages.errors import UserError
from stages.open import open_trace
from tests import tiny
from tools.parity import __main__ as parity

ROOT = Path(__file__).parents[2]
TOKENS = "--tokens=" + ",".join(map(str, range(1, 33)))


@dataclass(frozen=True)
class Job:
    """A command that writes ``{}``.

    Attributes:
        anew: what is added to it where something is left over.
        holds: a directory -> whether it opens as whole; UserError where it is refused.
        beside: what else it may leave, which must be refused too: a suffix.
        tells: it says on stderr how far it is, a line a point.
    """

    name: str
    command: tuple[str, ...]
    anew: tuple[str, ...]
    holds: Callable[[Path], object]
    beside: str = ""
    tells: bool = False


def jobs(folder: Path) -> list[Job]:
    model = tiny.write_checkpoint(folder / "model", num_hidden_layers=6)
    large = tiny.write_checkpoint(folder / "large", vocab_size=40_000, hidden_size=64)
    sweep = folder / "sweep.toml"
    sweep.write_text("[[grid]]\nlength = [1, 2, 3]\n")
    swept = ("tools.parity", "--model", str(model), TOKENS, "--sweep", str(sweep), "--jobs=1")
    traced = ("qwen_jax.trace", "--model", str(model), TOKENS, "--out", "{}")
    return [
        Job("trace, aprt", traced, ("--resume",), open_trace),
        Job("trace, safetensors", (*traced, "--format=safetensors"), ("--resume",), open_trace),
        Job("trace over another", (*traced, "--overwrite"), (), open_trace),
        Job(
            "collect",
            ("tools.collect", "transformers", str(model), TOKENS, "--out", "{}"),
            ("--overwrite",),
            open_trace,
        ),
        Job("convert", ("tools.convert", str(large), "{}"), (), open_model, ".partial"),
        Job("parity", (*swept, "--out", "{}"), (), finished_sweep, tells=True),
    ]


def finished_sweep(directory: Path) -> Path:
    """The table of a sweep, which is written last.

    Raises:
        UserError: there is none.
    """
    if not (table := directory / parity.TABLE).is_file():
        raise UserError(f"{directory}: no finished sweep")
    return table


def content(directory: Path) -> dict[str, bytes]:
    """Every file but those whose bytes no two runs have in common: orbax and a sweep note the time,
    and a sweep's points come in any order."""
    files = {p.relative_to(directory).as_posix(): p for p in directory.rglob("*") if p.is_file()}
    if "orbax.json" in files:
        model = open_model(str(directory))
        return {name: model.read(name).tobytes() for name in model.shapes}
    found = {name: path.read_bytes() for name, path in files.items()}
    if parity.ROWS in files:
        stamp, *lines = found.pop(parity.ROWS).splitlines()
        points = [json.loads(line) | {"seconds": 0} for line in lines]
        found["stamp"] = stamp
        found |= {point["key"]: json.dumps(point).encode() for point in points}
    return found


def start(job: Job, out: Path, *more: str, most: int | None = None) -> subprocess.Popen[str]:
    """``most``: bytes of the largest file that it may write."""
    command = [each.replace("{}", str(out)) for each in job.command]
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    process = subprocess.Popen(
        [sys.executable, "-m", *command, *more],
        env=os.environ | {"PYTHONPATH": path},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    if most is not None:  # it has only begun to import
        resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (most, most))
    return process


def trial(job: Job, good: dict[str, bytes], random: Random, folder: Path) -> tuple[str, str]:
    """Kill a run, or let the disk fill; (what was left of it, what is wrong)."""
    out = folder / "out"
    shutil.rmtree(out, ignore_errors=True)
    beside = out.with_name(out.name + job.beside)
    if job.beside:
        shutil.rmtree(beside, ignore_errors=True)
    if "--overwrite" in job.command:
        with start(job, out, "--layers=0-2") as first:
            first.communicate()
    full = random.random() < 0.15
    most = random.choice((0, 100, 3000, 20_000)) if full else None
    with start(job, out, most=most) as process:
        if not full:
            _wait(process, out, beside, random)
            process.kill()
        error = process.communicate()[1]
    *told, last = error.splitlines() or [""]
    if full and process.returncode:  # else all has fitted
        refused = process.returncode == 2 and last.startswith("error: ") and len(last) <= 400
        if not refused or (told and not job.tells):
            return "full", f"exit {process.returncode}: {error[:300]!r}"
    try:
        job.holds(out)
        whole = True
    except UserError:
        whole = False
    if job.beside and beside.exists():
        try:
            job.holds(beside)
            return "half", f"{beside.name} opens as whole"
        except UserError:
            pass
    left = "full" if full else "whole" if whole else "part" if out.exists() else "nothing"
    if whole and "--overwrite" not in job.command and content(out) != good:
        return left, "what opens as whole is not what an undisturbed run makes"
    if not (whole and job.anew == ("--resume",)):
        more = job.anew if out.exists() else ()
        if whole and job.beside:
            return left, ""
        with start(job, out, *more) as again:
            error = again.communicate()[1]
        if again.returncode:
            return left, f"afterwards exit {again.returncode}: {error[-300:]!r}"
        if content(out) != good:
            return left, "the run after it makes something else"
    return left, ""


def _wait(process: subprocess.Popen[str], out: Path, beside: Path, random: Random) -> None:
    """Until a moment at which it is to die: anywhere, or while it writes."""
    if random.random() < 0.2:
        time.sleep(random.random() * 3)
        return
    before = {p: p.stat().st_mtime_ns for p in out.rglob("*")} if out.exists() else {}
    while process.poll() is None:
        for place in (out, beside):
            if place.exists() and (not before or not before.keys() <= set(out.rglob("*"))):
                time.sleep(random.random() ** 3 * 0.5)
                return
        time.sleep(0.001)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--markdown", type=Path, metavar="FILE")
    args = parser.parse_args()
    found: dict[str, Counter[str]] = {}
    wrong = []
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        every, good = jobs(folder), {}
        for job in every:
            with start(job, folder / "good") as process:
                error = process.communicate()[1]
            if process.returncode:
                raise RuntimeError(f"{job.name}: {error}")
            good[job.name] = content(folder / "good")
            shutil.rmtree(folder / "good")
        for number in range(args.kills):
            job = every[number % len(every)]
            random = Random(f"{args.seed}/{number}")
            left, bad = trial(job, good[job.name], random, folder)
            found.setdefault(job.name, Counter())[left] += 1
            if bad:
                wrong.append(f"- {number}, {job.name}, {left}: {bad}")
                print(wrong[-1], file=sys.stderr, flush=True)
    lines = [f"`python -m tests.campaign.kill --kills {args.kills} --seed {args.seed}`", ""]
    lines += ["| command | times | left nothing | a part, refused | whole | full disk | wrong |"]
    lines += ["|---|---|---|---|---|---|---|"]
    for name, each in found.items():
        bad_ones = sum(f", {name}, " in line for line in wrong)
        lines.append(
            f"| {name} | {each.total()} | {each['nothing']} | {each['part']} | {each['whole']} | "
            f"{each['full']} | {bad_ones} |"
        )
    told = "\n".join([*lines, *(["", *wrong] if wrong else [])]) + "\n"
    print(told)
    if args.markdown:
        args.markdown.write_text(told)
    return int(bool(wrong))


if __name__ == "__main__":
    sys.exit(main())
