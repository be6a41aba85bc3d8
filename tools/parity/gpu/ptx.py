"""PTX, read from its text: the kernels of a program and their instructions.

Source: NVIDIA, "Parallel Thread Execution ISA", of the version that a file names.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass

ENTRY = re.compile(r"\.entry\s+([\w$]+)\s*\(.*?\)[^{]*")
AHEAD = re.compile(r"(?:[{}]|[$\w]+:(?!:))\s*")  # of a statement: braces of scopes, labels
STATEMENT = re.compile(r"(?:@!?%\w+\s+)?([a-z][\w.:]*)\s*(.*)", re.DOTALL)


@dataclass(frozen=True)
class Instruction:
    """``opcode operands``, split at every comma: also at those inside of a vector ``{a, b}``."""

    opcode: str
    operands: tuple[str, ...]

    @property
    def parts(self) -> list[str]:
        """The opcode's: ["add", "rn", "f32"]."""
        return self.opcode.split(".")


@dataclass(frozen=True)
class Kernel:
    """One ``.entry``."""

    name: str
    instructions: list[Instruction]


def kernels(text: str) -> Iterator[Kernel]:
    """The kernels of a file, each with everything up to the next.

    Raises:
        ValueError: what stands there is no statement of PTX.
    """
    text = re.sub(r"//[^\n]*|/\*.*?\*/", "", text, flags=re.DOTALL)
    _, *parts = ENTRY.split(text.replace("\n", " "))
    for name, body in zip(parts[::2], parts[1::2], strict=True):
        yield Kernel(name, list(_instructions(name, body)))


def _instructions(name: str, body: str) -> Iterator[Instruction]:
    for statement in body.split(";"):
        statement = statement.strip()
        while ahead := AHEAD.match(statement):
            statement = statement[ahead.end() :]
        if not statement or statement.startswith("."):  # registers, shared memory, a pragma
            continue
        found = STATEMENT.fullmatch(statement)
        if found is None:
            raise ValueError(f"{name}: no PTX instruction: {statement[:80]!r}")
        opcode, operands = found.groups()
        yield Instruction(opcode, tuple(each.strip() for each in operands.split(",")))
