"""``python -m tests.campaign.fuzz --cases 20000``: damaged inputs, one change or two at a time.

What must hold of every command: exit 0 only with the right answer; 1 is a difference, 2 and 3 one
line of at most 400 characters and nothing on stdout; never 4, a signal, 2 GiB or 30 seconds.
"""

import argparse
import io
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter, defaultdict
from contextlib import redirect_stderr, redirect_stdout, suppress
from pathlib import Path
from random import Random
from typing import Any, NamedTuple

SECONDS, MEMORY, LINE = 30, 2 << 30, 400  # seconds of the processor; bytes; characters
WAIT = 4 * SECONDS  # for what waits without using any; other processes may need some too
ROOT = Path(__file__).parents[2]


class Outcome(NamedTuple):
    """How one case ended; ``wrong`` is what it should not have done."""

    number: int
    subject: str
    change: str
    code: int | None
    wrong: str
    seconds: float
    bytes: int


class TooLong(BaseException):
    """No command can take it for an error of its own."""


def case(subjects: list[Any], seed: int, number: int, scratch: Path) -> Outcome:
    """Damage one subject and run its command in this process."""
    from tests.campaign import mutate

    random = Random(f"{seed}/{number}")
    subject = random.choices(subjects, [each.weight for each in subjects])[0]
    copy, said = scratch / "copy", scratch / "said.json"
    shutil.rmtree(copy, ignore_errors=True)
    shutil.copytree(subject.path, copy)
    said.unlink(missing_ok=True)
    change = mutate.directory(random, copy)
    asked = [
        each.replace("{}", str(copy)).replace("{json}", str(said)) for each in subject.arguments
    ]
    peak_again()
    began, held = time.process_time(), peak_memory()  # which a process of other tests has, too
    code, out, err = run(subject.main, asked)
    seconds, peak = time.process_time() - began, peak_memory() - held
    wrong = judged(subject, copy, said, code, out, err)
    if not wrong and (seconds > SECONDS or peak > MEMORY):
        wrong = f"{seconds:.0f} s, {peak >> 20} MiB"
    return Outcome(number, subject.name, change, code, wrong, seconds, peak)


def undamaged(subjects: list[Any], scratch: Path) -> None:
    """Each command says yes to what is not damaged, or the rest would mean nothing."""
    said = scratch / "said.json"
    for subject in subjects:
        asked = [each.replace("{}", str(subject.path)) for each in subject.arguments]
        asked = [each.replace("{json}", str(said)) for each in asked]
        code, out, err = run(subject.main, asked, 10 * WAIT)  # it compiles
        wrong = judged(subject, subject.path, said, code, out, err)
        if code != 0 or wrong:
            raise RuntimeError(f"{subject.name}, undamaged: exit {code}, {wrong or err}")


def run(main: Any, arguments: list[str], wait: int = WAIT) -> tuple[int | None, str, str]:
    """(exit code, stdout, stderr) of a command as ``cli.run`` ends it; None after ``wait``."""
    from qwen_jax import cli

    def end(code: int) -> None:
        sys.exit(code)

    def late(*_: object) -> None:
        raise TooLong

    out, err = io.StringIO(), io.StringIO()
    before, leave = sys.argv, cli.leave
    handler = signal.signal(signal.SIGALRM, late)
    sys.argv, cli.leave = ["x", *arguments], end  # type: ignore[assignment]
    try:
        signal.alarm(wait)
        with redirect_stdout(out), redirect_stderr(err):
            cli.run(main)
    except SystemExit as ended:
        return int(ended.code or 0), out.getvalue(), err.getvalue()
    except TooLong:
        pass
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, handler)
        sys.argv, cli.leave = before, leave
    return None, out.getvalue(), err.getvalue()


def judged(subject: Any, copy: Path, said: Path, code: int | None, out: str, err: str) -> str:
    """What a command should not have done; "" is nothing."""
    if code not in (0, 1, 2, 3):
        return f"exit {code}: {err.strip()[-300:]}" if code is not None else "too long"
    if any(not line.isprintable() for line in (out + err).split("\n")):
        return "a control character was printed"
    if code >= 2:
        if err.count("\n") != 1 or len(err) > LINE + 1 or not err.startswith("error: "):
            return f"no line: {err[:300]!r}"
        return "" if not out else "said something on stdout too"
    told = json.loads(said.read_text()) if said.exists() else {}
    return subject.right(subject.path, copy, told) if code == 0 else ""


def peak_again() -> None:
    """Have the high-water mark of resident memory begin anew."""
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def peak_memory() -> int:
    status = Path("/proc/self/status")
    if not status.exists():
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    line = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) * 1024


# --- many, each worker a process of its own: what ends one is told


def worker(seed: int, first: int, stop: int, folder: Path, step: int) -> None:
    from tests.campaign import subjects

    resource.setrlimit(resource.RLIMIT_DATA, (8 << 30, 8 << 30))
    replies = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        made = subjects.make(Path(scratch) / "made")
        undamaged(made, Path(scratch))
        for number in range(first, stop, step):
            print(json.dumps({"begin": number}), file=replies, flush=True)
            outcome = case(made, seed, number, Path(scratch))
            print(json.dumps(outcome._asdict()), file=replies, flush=True)


def campaign(cases: int, seed: int, workers: int, folder: Path) -> list[Outcome]:
    """All cases, shared between processes; one that ends is started again behind the case."""
    import threading

    outcomes: list[Outcome] = []

    def share(which: int) -> None:
        number = which
        while number < cases:
            command = [sys.executable, "-m", "tests.campaign.fuzz", "--seed", str(seed), "--worker",
                       str(number), str(cases), str(workers), "--scratch", str(folder)]  # fmt: skip
            begun = None
            with subprocess.Popen(
                command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
            ) as process:
                assert process.stdout
                for line in process.stdout:
                    told = json.loads(line)
                    if "begin" in told:
                        begun = told["begin"]
                        continue
                    outcomes.append(Outcome(**told))
                    begun, number = None, told["number"] + workers
                    if len(outcomes) % 500 == 0:
                        print(f"{len(outcomes)} cases", file=sys.stderr, flush=True)
            if begun is None:
                if process.returncode:
                    raise RuntimeError(f"a worker ended with {process.returncode}")
                return
            wrong = f"ended the process: {process.returncode}"
            outcomes.append(Outcome(begun, "?", "?", process.returncode, wrong, 0, 0))
            number = begun + workers

    threads = [threading.Thread(target=share, args=(i,)) for i in range(workers)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return sorted(outcomes)


def summary(outcomes: list[Outcome], command: str) -> str:
    """What happened, as Markdown."""
    by: dict[str, list[Outcome]] = defaultdict(list)
    for each in outcomes:
        by[each.subject].append(each)
    lines = [f"`{command}`", "", f"{len(outcomes)} damaged inputs:", ""]
    lines += ["| subject | cases | exit 0 | 1 | 2 | 3 | wrong | slowest | most memory |"]
    lines += ["|---|---|---|---|---|---|---|---|---|"]
    for name, each in sorted(by.items()):
        codes = Counter(one.code for one in each)
        lines.append(
            f"| {name} | {len(each)} | {codes[0]} | {codes[1]} | {codes[2]} | {codes[3]} | "
            f"{sum(bool(one.wrong) for one in each)} | {max(one.seconds for one in each):.1f} s | "
            f"{max(one.bytes for one in each) >> 20} MiB |"
        )
    if wrong := [each for each in outcomes if each.wrong]:
        lines += ["", "What should not have been:", ""]
        lines += [f"- {w.number}, {w.subject}, {w.change}: {w.wrong}" for w in wrong]
    return "\n".join(lines) + "\n"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cases", type=int, default=20_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--workers", type=int, default=os.cpu_count())
    parser.add_argument("--markdown", type=Path, metavar="FILE")
    parser.add_argument("--scratch", type=Path, default=Path(tempfile.gettempdir()))
    parser.add_argument("--worker", type=int, nargs=3, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        first, stop, step = args.worker
        worker(args.seed, first, stop, args.scratch, step)
        return 0
    outcomes = campaign(args.cases, args.seed, args.workers, args.scratch)
    command = f"python -m tests.campaign.fuzz --cases {args.cases} --seed {args.seed}"
    told = summary(outcomes, command)
    print(told)
    if args.markdown:
        args.markdown.write_text(told)
    return int(any(each.wrong for each in outcomes))


if __name__ == "__main__":
    sys.exit(main())
