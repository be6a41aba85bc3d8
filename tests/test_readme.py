"""The README is true: its code blocks run, in order, and print what they show.

The blocks share one temporary directory. What each kind means:

- ``console``: each line that starts with ``$ `` runs, by itself (a final backslash continues it).
  If lines follow, the output must be those lines. Every number, with its unit of time or memory,
  counts as equal to every other, runs of blanks and of rules as one, a line ``...`` stands for any
  lines or none, and ``...`` at the end of a line for the rest of it. In a verdict whole numbers are
  what they are: which layer, which position, how many stages.
- ``sh``: a script that must succeed. ``python``: a program that must.
- After the language, ``no-run: REASON`` skips a block, and ``exit=1`` says that the last command
  of a console block ends with that code, instead of with 0.
"""

import re
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest

from stages.manifest import SCHEMA
from tests.conftest import ROOT, user_environment

FENCE = re.compile(r"^```([^\n`]*)\n(.*?)^```[ \t]*$", re.MULTILINE | re.DOTALL)
NUMBER = re.compile(r"[-+]?\d+(?:[.,]\d+)*(?:[eE][-+]?\d+)?(?: (?:[kMGT]?B|m?s|min)\b)?")
VERDICT = re.compile(r"\bfault\b|\bmatches\b|\b(?:agree|differ|identical):")
RULE = re.compile(r"([-─━═])\1+")
EXECUTED = ("console", "sh", "python")
SHOWN = ("", "text", "json", "rust", "c", "cpp")  # anything else could be code that nobody runs


class Block(NamedTuple):
    """One fenced code block."""

    line: int
    language: str
    note: str
    code: str


def blocks(markdown: str) -> list[Block]:
    """All fenced code blocks in order."""
    found = []
    for match in FENCE.finditer(markdown):
        language, _, note = match[1].strip().partition(" ")
        line = markdown.count("\n", 0, match.start()) + 1
        assert language in EXECUTED + SHOWN, f"line {line}: {language!r}: use one of {EXECUTED}"
        found.append(Block(line, language, note.strip(), match[2]))
    fences = re.findall(r"^\s*(?:```|~~~)", markdown, re.MULTILINE)
    assert len(fences) == 2 * len(found), "a block that is indented, open or fenced with ~~~"
    return found


def commands(code: str) -> list[tuple[str, list[str]]]:
    """(command, the lines shown below it) of a console block."""
    parts: list[tuple[str, list[str]]] = []
    for line in code.splitlines():
        if line.startswith("$ "):
            parts.append((line[2:], []))
            continue
        assert parts, f"a console block starts with '$ ', not with {line!r}"
        command, shown = parts[-1]
        if command.endswith("\\") and not shown:
            parts[-1] = (f"{command}\n{line.removeprefix('> ')}", shown)
        else:
            shown.append(line)
    return parts


def normal(line: str) -> str:
    """A line without what changes from run to run, or from processor to processor."""
    verdict = VERDICT.search(line) is not None

    def number(match: re.Match[str]) -> str:
        return match[0] if verdict and match[0].lstrip("+-").isdigit() else "#"

    return RULE.sub(r"\1", NUMBER.sub(number, " ".join(line.split())))


def pattern(shown: str) -> str:
    """What matches the normal form of the lines that a line of the README stands for."""
    if shown == "...":
        return r"(?:.*\n)*"
    if shown.endswith("..."):
        return re.escape(normal(shown.removesuffix("..."))) + r".*\n"
    return re.escape(normal(shown)) + r"\n"


def matches(shown: list[str], output: str) -> bool:
    """Whether the output is what is shown."""
    actual = "".join(normal(line) + "\n" for line in output.rstrip().splitlines())
    return re.fullmatch("".join(map(pattern, shown)), actual) is not None


def run(block: Block, directory: Path) -> None:
    """Run one block in a directory; AssertionError if the README says otherwise."""
    if block.language == "python":
        steps = [([sys.executable, "-c", block.code], block.code, [])]
    elif block.language == "sh":
        steps = [(["bash", "-euo", "pipefail", "-c", block.code], block.code, [])]
    else:
        steps = [(["bash", "-c", text], text, shown) for text, shown in commands(block.code)]
    expected = re.fullmatch(r"exit=(\d+)|", block.note)
    assert expected, f"line {block.line}: {block.note!r} is neither exit=N nor no-run: REASON"
    codes = [0] * (len(steps) - 1) + [int(expected[1] or 0)]
    for (command, text, shown), code in zip(steps, codes, strict=True):
        done = subprocess.run(
            command,
            cwd=directory,
            env=user_environment(),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            encoding="utf-8",
            timeout=1800,
        )
        says = f"README.md, line {block.line}: {text}\n"
        assert done.returncode == code, f"{says}exit code {done.returncode}\n{done.stdout}"
        if shown:
            wanted = "\n".join(shown)
            assert matches(shown, done.stdout), f"{says}shows\n{wanted}\nprints\n{done.stdout}"


README = [b for b in blocks((ROOT / "README.md").read_text("utf-8")) if b.language in EXECUTED]


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The one directory in which the whole README is followed."""
    return tmp_path_factory.mktemp("readme")


@pytest.mark.parametrize("block", README, ids=lambda block: f"line {block.line}")
def test_block(block: Block, directory: Path) -> None:
    if block.note.startswith("no-run"):
        reason = block.note.removeprefix("no-run").removeprefix(":").strip()
        assert reason, f"line {block.line}: no-run without a reason"
        pytest.skip(reason)
    run(block, directory)


def test_something_is_run() -> None:
    assert any(not block.note.startswith("no-run") for block in README)


def planted(text: str) -> Block:
    """The only block of a small README."""
    (block,) = blocks(text)
    return block


GOOD = [
    "```console\n$ echo 'took 1.5e-3 s,   1.3 GB of 7'\ntook 99 ms, 3 MB of 12,000\n```\n",
    "```console\n$ printf 'a\\nb\\nc\\nd\\n'\na\n...\nd\n```\n",
    "```console\n$ echo 'fault: layer 3, 22.5 bits, -199'\nfault: layer 3, 21.1 bits, -199\n```\n",
    "```console\n$ echo 'agree: to 1e-05; at layer 3'\nagree: to 2e-06; ...\n```\n",
    "```console\n$ echo one \\\n>   two\none two\n$ echo 3 > kept; cat kept\n4\n```\n",
    "```console exit=3\n$ true\n$ echo last; exit 3\nlast\n```\n",
    "```sh\ntrue\necho anything\n```\n",
    "```python\nimport stages\n```\n",
]
BAD = [
    "```console\n$ echo sunshine\nrain\n```\n",
    "```console\n$ echo one; echo two\none\n```\n",
    "```console\n$ echo one\none\n...\ntwo\n```\n",
    "```console\n$ echo 3 files\n4 tokens\n```\n",
    "```console\n$ echo 'fault: layer 3'\nfault: layer 0\n```\n",
    "```console\n$ echo 'fault: off by -199'\nfault: off by -198\n```\n",
    "```console\n$ echo 'identical: all 88 stages'\nidentical: all 87 stages\n```\n",
    "```console\n$ echo 'agree: to 1e-05'\ndiffer: ...\n```\n",
    "```console\n$ echo loss inf\nloss 3.5\n```\n",
    "```console\n$ exit 1\n```\n",
    "```console exit=1\n$ exit 1\n$ exit 1\n```\n",
    "```console exit=1\n$ true\n```\n",
    "```console\n$ no-such-command\n```\n",
    "```console\nno prompt\n```\n",
    "```console norun\n$ true\n```\n",
    "```bash\ntrue\n```\n",
    "- indented\n\n  ```sh\n  true\n  ```\n",
    "```sh\nfalse\ntrue\n```\n",
    "```python\nimport no_such_module\n```\n",
]


@pytest.mark.parametrize("text", GOOD)
def test_a_true_block_passes(text: str, tmp_path: Path) -> None:
    run(planted(text), tmp_path)


@pytest.mark.parametrize("text", BAD)
def test_a_false_block_fails(text: str, tmp_path: Path) -> None:
    with pytest.raises(AssertionError):
        run(planted(text), tmp_path)


def test_no_run_needs_a_reason(tmp_path: Path) -> None:
    with pytest.raises(AssertionError, match="without a reason"):
        test_block(planted("```sh no-run\nfalse\n```\n"), tmp_path)
    with pytest.raises(pytest.skip.Exception, match="needs the network"):
        test_block(planted("```sh no-run: needs the network\nfalse\n```\n"), tmp_path)


def test_the_changelog_names_the_trace_format() -> None:
    assert f"manifest schema {SCHEMA}" in (ROOT / "CHANGELOG.md").read_text("utf-8")
