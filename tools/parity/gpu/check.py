"""Rules for what XLA compiled for a GPU: each finding names program, stage and instruction.

Optimised HLO says which stage an operation belongs to, PTX what it became. A kernel is named after
the fusion that it computes.
"""

import re
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from stages.architecture import ACTIVATION, NORM, ROTATION, SOFTMAX, Architecture
from tools.parity.gpu import hlo, ptx
from tools.parity.gpu.compile import Compiled
from tools.parity.programs import Part

# Arithmetic on two 16-bit values rounded once to 16 bits has the bits of the same in float32
# rounded to 16: 24 >= 2 * 11 + 2 (Figueroa, "When is double rounding innocuous?", 1995).
INNOCUOUS = ("add", "sub", "mul")
ROUNDS = (*INNOCUOUS, "fma", "mad", "div", "rcp", "sqrt", "rsqrt", "ex2", "lg2", "sin", "cos",
          "tanh", "cvt")  # fmt: skip
FLOATS = {"f64": 64, "f32": 32, "tf32": 19, "f16": 16, "bf16": 16, "f16x2": 16, "bf16x2": 16}

ONE, MINUS_ZERO = {"0x3f80", "1065369472"}, {"0x8000", "-2147450880"}  # bfloat16, one and two of it
FORBIDDEN = {"atom": "atomics", "red": "atomics", "call": "calls"}  # instruction -> the rule
MATRIX = ("mma", "wgmma", "tcgen05")  # instructions that multiply matrices
SLICED = "dynamic_slice_fusion"  # a copy or a call of cuBLAS, with where it reads and writes

# PTX that rounds otherwise than to nearest -> the HLO that it may come from, and the largest error
# in ulp of float32 ("Parallel Thread Execution ISA"). The last three have none: steps of XLA's
# exponential, which splits its argument, and a rounding to whole numbers; any stage may have them.
ALLOWED: dict[str, tuple[tuple[str, ...], float]] = {
    "ex2.approx.ftz.f32": (("exponential",), 2),
    "rcp.approx.f32": (("divide",), 1),
    "div.full.f32": (("divide",), 2),
    "sqrt.approx.f32": (("sqrt",), 1),
    "fma.rm.f32": (("exponential",), 0),
    "cvt.sat.f32.f32": (("exponential",), 0),
    "cvt.rni.f32.f32": (("round-nearest-even",), 0),
}
# The HLO that is no sum or product, by the kind of stage that has it.
OPERATIONS = {
    NORM: ("divide", "sqrt"),
    SOFTMAX: ("divide", "exponential"),
    ACTIVATION: ("divide", "exponential"),
    ROTATION: ("round-nearest-even",),
}
SHORT = {"float64": "f64", "float32": "f32", "bfloat16": "bf16", "float16": "f16"}
PRODUCTS = {
    ("float32", "highest"): {"f32"},
    ("float32", "default"): {"f32", "tf32"},
    ("bfloat16", "highest"): {"bf16", "f32"},
    ("float16", "highest"): {"f16", "f32"},
    ("float64", "highest"): {"f64"},
}


@dataclass(frozen=True)
class Violation:
    """Where a rule does not hold.

    Attributes:
        rule: "products", "rounding", "outputs", "atomics" or "calls".
        stage: None where XLA does not say.
    """

    rule: str
    program: str
    stage: str | None
    instruction: str

    def __str__(self) -> str:
        return f"{self.rule}: {self.program}, {self.stage or 'no stage'}: {self.instruction}"


@dataclass
class Checked:
    """What was found in one program.

    Attributes:
        products: the formats that its products multiply in.
        approximate: PTX of ``ALLOWED`` that has an error -> how often it stands there.
        contracted: fused multiply-adds outside of products and exponentials: one rounding where
            two operations have two.
    """

    kernels: int = 0
    instructions: int = 0
    products: set[str] = field(default_factory=set)
    approximate: dict[str, int] = field(default_factory=dict)
    contracted: int = 0
    violations: list[Violation] = field(default_factory=list)

    def to_json(self) -> dict[str, Any]:
        return asdict(self) | {"products": sorted(self.products)}


def check(part: Part, compiled: Compiled, arch: Architecture, asked: tuple[str, str]) -> Checked:
    """All rules on one program. ``asked``: (dtype, precision), as of ``PRODUCTS``."""
    result, module = Checked(), compiled.module
    result.violations += _outputs(part, module)
    result.violations += _hlo(part, module, PRODUCTS[asked], result.products)
    allowed = _operations(part, arch)
    fusions = {sanitised(each.name): each for each in module.instructions}
    for kernel in compiled.kernels.values():
        fusion = fusions.get(kernel.name)
        inside = list(module.inside(fusion)) if fusion else []
        result.violations += _kernel(part, kernel, inside, allowed, asked, result)
    summed = {stage for stage in part.stages if arch.stage[stage].kind.sums_products}
    if not result.products:  # of one row, XLA makes products and a sum
        result.products |= {
            SHORT[hlo.shapes(each.shape)[0].dtype.name]
            for each in module.instructions
            if each.opcode == "reduce" and each.stage in summed
        }
    if summed and not result.products:
        what = "no product was found"
        result.violations.append(Violation("products", part.name, min(summed), what))
    return result


def sanitised(name: str) -> str:
    """The kernel's name of an HLO instruction."""
    return re.sub(r"[.\-]", "_", name)


def _operations(part: Part, arch: Architecture) -> dict[str, set[str]]:
    """Stage -> the HLO that it may have. A stage that the program leaves out leaves its own to the
    next: fused attention has the softmax inside."""
    allowed: dict[str, set[str]] = {}
    for rows in (arch.start_stages, arch.layer_stages, arch.end_stages):
        here, carried = any(row.name in part.stages for row in rows), set[str]()
        for row in rows:
            allowed[row.name] = carried | set(OPERATIONS.get(row.kind, ()))
            carried = allowed[row.name] if here and row.name not in part.stages else set()
    return allowed


def _outputs(part: Part, module: hlo.Module) -> Iterator[Violation]:
    """Every stage is returned, with its dtype and size, and computed here."""

    def missing(stage: str, what: str) -> Violation:
        return Violation("outputs", part.name, stage, what)

    entry = {each.name: each for each in module.computations[module.entry]}
    (root,) = (each for each in entry.values() if each.root)
    producers = [entry[name] for name in root.operands] if root.opcode == "tuple" else [root]
    names = [path[-1].key if path else part.stages[-1] for path, _ in part.returns]
    for stage in part.stages:
        if stage not in names:
            yield missing(stage, "is no output of the program")
    if len(module.outputs) != len(names):
        yield missing(names[0], f"{len(names)} outputs were traced, {len(module.outputs)} compiled")
        return
    for name, (_, traced), shape, producer in zip(
        names, part.returns, module.outputs, producers, strict=True
    ):
        if (traced.dtype, traced.shape) != (shape.dtype, shape.sizes):
            yield missing(name, f"traced as {traced.dtype}{list(traced.shape)}, "
                                f"compiled as {shape.dtype}{list(shape.sizes)}")  # fmt: skip
        while producer.opcode in ("bitcast", "copy", "get-tuple-element"):
            producer = entry[producer.operands[0]]
        if producer.opcode in ("parameter", "constant"):
            yield missing(name, f"is {producer.opcode} {producer.name}, and nothing computed")


def _hlo(
    part: Part, module: hlo.Module, asked: set[str], products: set[str]
) -> Iterator[Violation]:
    """Calls out of the program, and the precision of products where HLO has it."""
    shapes = {each.name: each.shape for each in module.instructions}
    for each in module.instructions:
        kind = re.search(r'"kind":"(__[^"]*)"', each.rest)
        said = re.search(r'operand_precision"?[=:][\[{]([^\]}]*)', each.rest)
        precisions = set(re.findall(r"\w+", said[1].lower())) if said else {"default"}
        if each.opcode == "custom-call":
            if not (each.target or "").startswith("__cublas$"):
                yield Violation("calls", part.name, each.stage, f"custom-call {each.target}")
                continue
            found = SHORT[hlo.shapes(shapes[each.operands[0]])[0].dtype.name]
            if found == "f32" and precisions != {"highest"}:
                found = "tf32"
            products.add(found)
            if found not in asked:
                yield Violation("products", part.name, each.stage, f"{each.target} of {found}")
        elif kind and not kind[1].startswith("__triton") and SLICED not in each.rest:
            yield Violation("calls", part.name, each.stage, f"fusion {kind[1]}")
        elif each.opcode == "dot" and asked == {"f32"} and precisions != {"highest"}:
            what = f"dot, operand_precision {'/'.join(sorted(precisions))}"
            yield Violation("products", part.name, each.stage, what)


def _kernel(
    part: Part,
    kernel: ptx.Kernel,
    inside: list[hlo.Instruction],
    allowed: Mapping[str, set[str]],
    asked: tuple[str, str],
    result: Checked,
) -> Iterator[Violation]:
    """The instructions of one kernel; ``inside`` is the HLO that it computes, ``allowed`` of
    ``_operations``."""
    result.kernels += 1
    result.instructions += len(kernel.instructions)
    stages = sorted({each.stage for each in inside if each.stage})
    has = {each.opcode for each in inside}
    known = constants(kernel)
    sources: dict[str, list[hlo.Instruction]] = {}  # by approximate opcode

    def violation(rule: str, stage: str | None = "+".join(stages) or None) -> Violation:
        return Violation(rule, part.name, stage, f"{each.opcode} in {kernel.name}")

    for each in kernel.instructions:
        name, *more = each.parts
        if name in MATRIX or "tf32" in more:
            summed, multiplied, *_ = _formats(more)
            if name == "cvt":  # cvt.rna.tf32.f32: operands, before they are multiplied
                summed, multiplied = multiplied, summed
            result.products.add(multiplied)
            if summed != "f32" or multiplied not in PRODUCTS[asked]:
                yield violation("products")
        elif name in FORBIDDEN:
            yield violation(FORBIDDEN[name])
        elif name in ROUNDS and not nearest(each, asked[0], known):
            operations, ulp = ALLOWED.get(each.opcode, ((), 0))
            if ulp:
                result.approximate[each.opcode] = result.approximate.get(each.opcode, 0) + 1
            if each.opcode in sources:  # said once a kernel
                continue
            found = sources[each.opcode] = [op for op in inside if op.opcode in operations]
            if not found:
                yield violation("rounding")
            elif ulp and (op := _astray(found, stages, allowed)):
                yield violation("rounding", op.stage)
        elif each.opcode == "fma.rn.f32" and not has & {"dot", "exponential"}:
            result.contracted += 1
    if "dot" in has and not any(each.parts[0] in MATRIX for each in kernel.instructions):
        fma = {each.parts[-1] for each in kernel.instructions if each.parts[0] == "fma"}
        result.products |= fma


def _astray(
    operations: list[hlo.Instruction], stages: list[str], allowed: Mapping[str, set[str]]
) -> hlo.Instruction | None:
    """The first that none of its stages may have; without one of its own, of the kernel's."""
    for each in operations:
        of = [each.stage] if each.stage else stages
        if of and not any(each.opcode in allowed[name] for name in of):
            return each
    return None


def _formats(parts: list[str]) -> list[str]:
    """[accumulator, operand, ...] of an mma's opcode."""
    return [part for part in parts if part in FLOATS]


def constants(kernel: ptx.Kernel) -> dict[str, str]:
    """Register -> what is moved into it."""
    moves = (each.operands for each in kernel.instructions if each.parts[0] == "mov")
    return {target: source for target, source, *_ in moves}


def nearest(each: ptx.Instruction, dtype: str, known: Mapping[str, str]) -> bool:
    """Whether an operation rounds to nearest, once, in a format that is no surprise in a program
    of ``dtype``. ``known`` is of ``constants``."""
    formats = _formats(each.parts)
    if not formats:  # of whole numbers
        return True
    if each.parts[0] == "cvt":
        target, source = each.parts[-2:]
        if "sat" not in each.parts and FLOATS.get(target, 0) > FLOATS.get(source, 65):
            return True  # to a wider format: exact
        if target not in FLOATS:
            return False
    elif FLOATS[formats[-1]] == 16:
        values = [known.get(name, "").lower() for name in each.operands[1:]]
        # Before sm_90 a sum of bfloat16 is written x * 1 + y, and a product x * y + -0.
        plain = each.opcode in ("fma.rn.bf16", "fma.rn.bf16x2") and (
            ONE & set(values[:2]) or values[2] in MINUS_ZERO
        )
        if dtype == "float32" or not (plain or each.parts[0] in INNOCUOUS):
            return False
    return "rn" in each.parts and not {"ftz", "sat", "approx"} & set(each.parts)
