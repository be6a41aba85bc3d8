"""The optimised HLO of one program, read from its text.

Only what the checks need: computations, their instructions, shapes and the
stage that an instruction was traced in (``jax.named_scope``, which XLA keeps as ``op_name``).
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

import ml_dtypes
import numpy as np

from stages.architectures import ALL_NAMES

DTYPES = {
    "pred": np.dtype(bool),
    "s8": np.dtype(np.int8),
    "u8": np.dtype(np.uint8),
    "s32": np.dtype(np.int32),
    "u32": np.dtype(np.uint32),
    "s64": np.dtype(np.int64),
    "f16": np.dtype(np.float16),
    "bf16": np.dtype(ml_dtypes.bfloat16),
    "f32": np.dtype(np.float32),
    "f64": np.dtype(np.float64),
}

INSTRUCTION = re.compile(
    r"\s+(?P<root>ROOT )?%(?P<name>[\w.\-]+) = (?P<shape>\(.*?\)(?= [a-z])|\S+) "
    r"(?P<opcode>[\w\-]+)\((?P<operands>(?:[^()]|\([^()]*\))*)\)(?P<rest>.*)"
)
COMPUTATION = re.compile(r"(?P<entry>ENTRY )?%(?P<name>[\w.\-]+) \(.*\{$")
SHAPE = re.compile(r"(\w+)\[([\d,]*)\]")


@dataclass(frozen=True)
class Shape:
    """The dtype and the sizes of one array."""

    dtype: np.dtype
    sizes: tuple[int, ...]


def shapes(text: str) -> list[Shape]:
    """The arrays of a shape: one, or those of a tuple."""
    return [
        Shape(DTYPES[name], tuple(map(int, filter(None, sizes.split(",")))))
        for name, sizes in SHAPE.findall(text)
    ]


@dataclass(frozen=True)
class Instruction:
    """``%name = shape opcode(operands), rest``."""

    name: str
    shape: str
    opcode: str
    operands: tuple[str, ...]
    rest: str
    root: bool

    @cached_property
    def stage(self) -> str | None:
        """The stage that it was traced in; None for what XLA made by itself."""
        found = re.search(r'op_name="([^"]*)"', self.rest)
        parts = found.group(1).split("/") if found else []
        return next((part for part in reversed(parts) if part in ALL_NAMES), None)

    @cached_property
    def calls(self) -> str | None:
        found = re.search(r"calls=%([\w.\-]+)", self.rest)
        return found.group(1) if found else None

    @cached_property
    def target(self) -> str | None:
        """Of a custom call."""
        found = re.search(r'custom_call_target="([^"]*)"', self.rest)
        return found.group(1) if found else None


class Module:
    """All computations of a program.

    Attributes:
        computations: name -> instructions, in the order in which they run.
        entry: the name of the first.
    """

    def __init__(self, text: str) -> None:
        self.computations: dict[str, list[Instruction]] = {}
        self.entry = ""
        current: list[Instruction] = []
        for line in text.splitlines():
            if head := COMPUTATION.match(line):
                current = self.computations.setdefault(head["name"], [])
                if head["entry"]:
                    self.entry = head["name"]
            elif found := INSTRUCTION.match(line):
                current.append(
                    Instruction(
                        name=found["name"],
                        shape=found["shape"],
                        opcode=found["opcode"],
                        operands=tuple(re.findall(r"%([\w.\-]+)", found["operands"])),
                        rest=found["rest"],
                        root=bool(found["root"]),
                    )
                )

    @property
    def instructions(self) -> Iterator[Instruction]:
        for computation in self.computations.values():
            yield from computation

    @property
    def outputs(self) -> list[Shape]:
        """What the program returns."""
        (root,) = (each for each in self.computations[self.entry] if each.root)
        return shapes(root.shape)

    def inside(self, instruction: Instruction) -> Iterator[Instruction]:
        """What a fusion consists of; any other instruction is by itself."""
        if instruction.calls is None:
            yield instruction
            return
        for each in self.computations[instruction.calls]:
            yield from self.inside(each)

    def stages(self, instruction: Instruction) -> set[str]:
        """The stages that a fusion computes parts of."""
        found = {each.stage for each in (instruction, *self.inside(instruction))}
        return {stage for stage in found if stage is not None}
