"""PTX, read from its text: the kernels of a program and their instructions.

Source: NVIDIA, "Parallel Thread Execution ISA", of the version that a file names.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass, field

STATEMENT = re.compile(r"(?:@(!?)(%\w+)\s+)?([a-z][\w.:]*)\s*(.*)", re.DOTALL)
ENTRY = re.compile(r"\.entry\s+([\w$]+)\s*\((.*?)\)(.*?)\{", re.DOTALL)
SHARED = re.compile(r"\.shared\s+\.align\s+(\d+)\s+\.b8\s+([\w$]+)\[(\d*)\]")
REGISTERS = re.compile(r"\.reg\s+\.(pred|\w(\d+))\s+(.*)", re.DOTALL)


@dataclass(frozen=True)
class Instruction:
    """``@guard opcode operands``. ``guard`` is (register, whether it must be true)."""

    opcode: str
    operands: tuple[str, ...]
    guard: tuple[str, bool] | None = None

    @property
    def parts(self) -> list[str]:
        """The opcode's: ["add", "rn", "f32"]."""
        return self.opcode.split(".")

    def __str__(self) -> str:
        return f"{self.opcode} {', '.join(self.operands)}".strip()


@dataclass
class Kernel:
    """One ``.entry``.

    Attributes:
        labels: name -> where in ``instructions``.
        widths: register name or, for ``%r<25>``, its prefix -> bits; 1 for a predicate.
        shared: name -> (alignment, bytes; 0 for what the launch decides), of the whole file.
    """

    name: str
    parameters: list[str]
    instructions: list[Instruction] = field(default_factory=list)
    labels: dict[str, int] = field(default_factory=dict)
    widths: dict[str, int] = field(default_factory=dict)
    shared: dict[str, tuple[int, int]] = field(default_factory=dict)


def kernels(text: str) -> Iterator[Kernel]:
    """The kernels of a file."""
    text = re.sub(r"//[^\n]*|/\*.*?\*/", "", text, flags=re.DOTALL)
    shared = {name: (int(align), int(size or 0)) for align, name, size in SHARED.findall(text)}
    for entry in ENTRY.finditer(text):
        parameters = re.findall(r"([\w$]+)\s*(?:,|$)", entry[2].strip())
        kernel = Kernel(entry[1], parameters, shared=shared)
        _body(kernel, text, entry.end())
        yield kernel


def _body(kernel: Kernel, text: str, start: int) -> None:
    """Read statements up to the brace that closes the kernel. Braces of a scope stand where a
    statement begins, those of a vector inside one."""
    statement, scopes, vector = "", 1, 0
    for character in text[start:]:
        if character == "{":
            if statement.strip():
                vector += 1
            else:
                scopes += 1
                continue
        elif character == "}":
            if vector:
                vector -= 1
            else:
                scopes -= 1
                if not scopes:
                    return
                continue
        elif character == ";":
            _statement(kernel, statement.strip())
            statement = ""
            continue
        elif character == ":" and re.fullmatch(r"\s*[$\w]+", statement):
            kernel.labels[statement.strip()] = len(kernel.instructions)
            statement = ""
            continue
        statement += character


def _statement(kernel: Kernel, text: str) -> None:
    if declared := REGISTERS.match(text):
        width = 1 if declared[1] == "pred" else int(declared[2])
        for name in declared[3].split(","):
            kernel.widths[name.split("<")[0].strip()] = width
        return
    if text.startswith("."):  # shared memory, a pragma
        return
    found = STATEMENT.fullmatch(text)
    if found is None:
        raise ValueError(f"{kernel.name}: no PTX instruction: {text[:80]!r}")
    negated, guard, opcode, operands = found.groups()
    kernel.instructions.append(
        Instruction(opcode, tuple(_operands(operands)), (guard, not negated) if guard else None)
    )


def _operands(text: str) -> Iterator[str]:
    """Split at the commas that stand outside of ``{...}``, ``[...]`` and ``(...)``."""
    depth, current = 0, ""
    for character in text:
        depth += (character in "{[(") - (character in "}])")
        if character == "," and not depth:
            yield current.strip()
            current = ""
        else:
            current += character
    if current.strip():
        yield current.strip()
