"""The grid of a sweep: points as data, read from a TOML file. Imports neither jax nor NumPy.

A file is a list of blocks ``[[grid]]``. A block gives each axis a value or a list of values and
stands for their product; an axis that it leaves out has the default of ``Point``.
"""

import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Literal, get_args, get_type_hints

import msgspec
from msgspec import Meta, Struct

from qwen_jax.config import Config
from stages.errors import UserError
from stages.manifest import DType

SHIPPED = {path.stem: path for path in sorted(Path(__file__).parent.glob("*.toml"))}

REQUIRE = "identical"
Count = Annotated[int, Meta(ge=1)]
Bits = Annotated[float, Meta(ge=-64, le=64)]


class Point(Struct, frozen=True, kw_only=True):
    """One thing to run and compare.

    Attributes:
        dtype: of the model.
        precision: of float32 matrix products, as in ``jax_default_matmul_precision``. "high" is
            none: a Triton kernel then has float32 products, and cuBLAS TF32.
        length: tokens of the first sequence.
        batch: sequences; every second one is half as long and padded on the left.
        excess: whether XLA may keep more precision than the dtype has.
        loop: "layer" compiles one layer and runs it for each (what traces), "program" compiles
            the whole model at once, "scan" one layer inside a loop over stacked weights.
        attention: "stages"; "fused" for ``jax.nn.dot_product_attention`` or "online" for the
            online softmax of flash attention, which leave ``attn_scores`` and ``attn_softmax`` out.
        products: of float32, in an arithmetic that a GPU may use, emulated on the CPU: operands
            rounded to TF32, or split into bfloat16 numbers ("bf16x3"), or sums in four parts
            ("split-k").
        flags: of XLA on the CPU. "reference": no fused multiply-add and no YNNPACK; "no-fma" and
            "no-ynn": one of the two; "default": neither.
        device: where the point has a meaning.
        trial: what the candidate is compared with. "reference": the un-jitted run on the CPU.
            All others: the same program under the same flags, but with other stages captured
            ("captured": none, "stages": one at a time), run again, compiled again, in another
            process, or on one thread; "unobserved" is another program, which returns the logits
            alone.
        plant: a fault planted in the candidate, to see the instrument find it.
        require: "identical", the least significant bits of every stage, or nothing.
    """

    dtype: DType = "float32"
    precision: Literal["highest", "default"] = "highest"
    length: Count = 17
    batch: Count = 1
    excess: bool = False
    loop: Literal["layer", "program", "scan"] = "layer"
    attention: Literal["stages", "fused", "online"] = "stages"
    products: Literal["", "tf32", "bf16x3", "split-k"] = ""
    flags: Literal["reference", "no-fma", "no-ynn", "default"] = "reference"
    device: Literal["any", "cpu", "gpu"] = "any"
    trial: Literal[
        "reference",
        "captured",
        "stages",
        "rerun",
        "recompiled",
        "unobserved",
        "process",
        "threads",
    ] = "reference"
    plant: Literal["", "bf16_stage", "truncated_sum", "scaled_bias"] = ""
    require: Literal["identical"] | Bits | None = None

    def to_json(self) -> dict[str, Any]:
        """Its axes, by name."""
        return msgspec.structs.asdict(self)

    @property
    def key(self) -> str:
        """What finished points are found by: everything but what is required."""
        return " ".join(str(v) for name, v in self.to_json().items() if name != "require")

    @property
    def process(self) -> tuple[str, bool]:
        """Points that can share a process: XLA reads its flags once."""
        return self.flags, self.excess

    @property
    def says(self) -> str:
        """One line for people."""
        parts = [self.dtype, f"T {self.length}", f"B {self.batch}", self.loop]
        if self.attention != "stages":
            parts.append(f"{self.attention} attention")
        if self.products:
            parts.append(f"products {self.products}")
        if self.precision != "highest":
            parts.append(f"matmul {self.precision}")
        parts.append(f"flags {self.flags}" + (", excess precision" if self.excess else ""))
        if self.device != "any":
            parts.append(f"for the {self.device}")
        if self.trial != "reference":
            parts.append(f"trial {self.trial}")
        if self.plant:
            parts.append(f"planted {self.plant}")
        return ", ".join(parts)


def load(spec: str) -> list[Point]:
    """The points of a shipped sweep or of a TOML file, in its order, each once.

    Raises:
        UserError: no such file, no TOML, or an axis or value that does not exist.
    """
    path = SHIPPED.get(spec, Path(spec))
    try:
        blocks = msgspec.toml.decode(path.read_bytes()).get("grid")
    except FileNotFoundError:
        known = ", ".join(SHIPPED)
        raise UserError(f"--sweep {spec}: no such file, and none of {known}") from None
    except OSError as error:
        raise UserError(f"--sweep {spec}: {error.strerror}") from None
    except ValueError as error:  # msgspec's kind, and text that is not UTF-8
        raise UserError(f"--sweep {path}: not TOML: {error}") from None
    if not isinstance(blocks, list) or not blocks:
        raise UserError(f"--sweep {path}: expected blocks [[grid]]")
    points: dict[str, Point] = {}
    for block in blocks:
        for point in _product(block, path):
            if points.setdefault(point.key, point) != point:
                raise UserError(f"--sweep {path}: two requirements for one point: {point.says}")
    return list(points.values())


def _product(block: dict[str, Any], path: Path) -> Iterator[Point]:
    types = get_type_hints(Point, include_extras=True)
    lists = {}
    for name, value in block.items():
        if name not in types:
            raise UserError(f"--sweep {path}: no axis {name!r}; axes: {', '.join(types)}")
        values = value if isinstance(value, list) else [value]
        if not values:
            raise UserError(f"--sweep {path}: {name} is empty")
        for each in values:
            _check(name, each, types[name], path)
        lists[name] = values
    for combination in itertools.product(*lists.values()):
        point = Point(**dict(zip(lists, combination, strict=True)))
        if point.trial != "reference" and point.require not in (None, REQUIRE):
            raise UserError(f"--sweep {path}: a trial has no bits to require: {point.says}")
        yield point


def _check(name: str, value: Any, kind: Any, path: Path) -> None:
    try:
        msgspec.convert(value, kind)
    except msgspec.ValidationError as error:
        choices = [each for each in get_args(kind) if isinstance(each, str) and each]
        if name == "require":
            choices = [repr(REQUIRE) + " or a number of bits"]
        expected = f"expected {', '.join(choices)}" if choices else str(error)
        raise UserError(f"--sweep {path}: {name} = {value!r}; {expected}") from None


def programs(points: list[Point]) -> list[Point]:
    """What there is to compile for a GPU: a point's program alone, without what is of the CPU and
    without second runs of the same program or emulations; each once."""

    def program(point: Point) -> Point:
        changes = {"flags": "default", "device": "gpu", "require": None}
        trial = "unobserved" if point.trial == "unobserved" else "reference"
        return msgspec.structs.replace(point, trial=trial, **changes)

    return list(dict.fromkeys(program(point) for point in points if not point.products))


def impossible(point: Point, config: Config, device: str) -> str | None:
    """Why a point cannot be run on this model and device; None if it can."""
    if point.device not in ("any", device):
        return f"needs --device {point.device}"
    if device == "gpu" and point.flags != "default":
        return f"flags {point.flags} are of XLA's CPU backend"
    if device == "gpu" and point.trial == "threads":
        return "threads are a matter of the CPU"
    if point.precision != "highest" and point.dtype != "float32":
        return f"matmul precision concerns float32 products, not {point.dtype}"
    if point.attention == "fused" and point.dtype == "float16" and device == "cpu":
        return "dot_product_attention asks for F16_F16_F32 products, which XLA's CPU backend lacks"
    if point.products and (device == "gpu" or point.dtype != "float32" or point.loop != "layer"):
        return "products are emulated for float32, layer by layer, on the CPU"
    if point.products and point.attention != "stages":
        return "products are emulated where a stage is one"
    if point.length > config.max_position_embeddings:
        return f"the model has {config.max_position_embeddings} positions"
    if point.loop == "scan" and len(set(config.sliding_layers)) > 1:
        return "a scan runs one program for every layer; some layers here have a sliding window"
    if point.loop != "layer" and (point.attention != "stages" or point.plant):
        return "replaced stages are tried in the per-layer program only"
    if point.plant == "scaled_bias" and "qkv_bias" not in config.arch.stage:
        return f"{config.architecture} has no qkv_bias"
    if point.loop != "layer" and point.trial in ("captured", "stages"):
        return "a whole program always returns every stage; with fewer it is another program"
    if point.trial == "unobserved" and (point.loop != "program" or point.attention != "stages"):
        return "the unobserved program is one program; use loop = program"
    return None
