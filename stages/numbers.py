"""The number formats that are known, each registered once.

What an engine's arithmetic may be, which caches are offered on the command line, what a weight may
have been rounded to, whose range a trace is measured against and the table in the documents are
comprehensions over ``FORMATS``. The roundings themselves are in ``stages.roundings``.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal

import ml_dtypes
import numpy as np

from stages import roundings as r

Use = Literal["activation", "cache", "weight"]
Keeps = Literal["values", "cache", "blocks"]  # every value, what a cache has, sums of each block
ACTIVATION: Use = "activation"  # what a product reads: the input of a linear layer
CACHE: Use = "cache"  # keys and values, along a head
WEIGHT: Use = "weight"
EVERYWHERE: tuple[Use, ...] = (ACTIVATION, CACHE, WEIGHT)

Rounding = Callable[..., np.ndarray]  # x [..., C], nudge -> what is left of it, float32


@dataclass(frozen=True)
class NumberFormat:
    """How numbers are kept, and by whom.

    Attributes:
        name: in ``--json``, of an input of a linear layer. See ``of_cache`` and ``of_weight``.
        ways: the rounding; several where engines differ by last bits.
        level: the precision class that it is, see ``stages.verdict.CLASSES``.
        says: for people, after "rounded to".
        uses: where engines have it.
        block: how many values share a scale: a row, or a head, is a multiple of it.
        partner: the format that the other factor of a product is then rounded to, where the
            engine's kernels do that (ggml's ``vec_dot_type``).
        minimum: a block has a minimum, which multiplies a sum that the partner stores.
        offered: the name under which our own cache keeps it; "" where it does not.
        dtype: the numbers whose end is the end of the format; ``keeps`` says of what.
        proof: the engines whose values were reproduced by it.
        ggml: its name there as the type of a weight.
    """

    name: str
    ways: tuple[Rounding, ...]
    level: str
    says: str
    uses: tuple[Use, ...] = EVERYWHERE
    block: int = 1
    partner: str = ""
    minimum: bool = False
    offered: str = ""
    dtype: Any = None
    keeps: Keeps = "values"
    proof: str = ""
    ggml: str = ""

    @property
    def round(self) -> Rounding:
        """The first of its ways."""
        return self.ways[0]

    @property
    def of_cache(self) -> str:
        """Its name where keys and values are kept: a row is there one head of one token."""
        return f"kv {self.name.replace('per row', 'per token and head')}"

    @property
    def of_weight(self) -> str:
        """Its name as the type of a weight."""
        return self.ggml or self.name


def _each(sizes: tuple[int, ...], name: str, level: str, rounding: Rounding, uses: tuple[Use, ...],
          proof: str = "") -> Iterator[NumberFormat]:  # fmt: skip
    """One format for each size of a block."""
    for size in sizes:
        words = f"{name} in blocks of {size}"
        ways = (partial(rounding, block=size),)
        yield NumberFormat(words, ways, level, words, uses, size, proof=proof)


_HALF, _GGML = "tf32/f16", "llama.cpp"

# fmt: off
FORMATS: tuple[NumberFormat, ...] = (
    NumberFormat("float32", (r.f32,), "f32", "float32", (), offered="float32"),
    NumberFormat("float64", (r.f32,), "f64", "float64", (), offered="float64"),
    NumberFormat("float16", (r.f16,), _HALF, "float16", partner="float16", offered="float16",
                 dtype=np.float16, proof=f"{_GGML}, transformers", ggml="F16"),
    NumberFormat("bfloat16", (r.bf16,), "bf16", "bfloat16", partner="bfloat16", offered="bfloat16",
                 dtype=ml_dtypes.bfloat16, proof=f"{_GGML}, transformers, OpenVINO, MLX",
                 ggml="BF16"),
    NumberFormat("tf32", (r.tf32,), _HALF, "TF32", (ACTIVATION,), partner="tf32"),
    NumberFormat("tf32 cut off", (r.tf32_cut,), _HALF, "TF32, mantissas cut off", (ACTIVATION,),
                 partner="tf32 cut off"),
    NumberFormat("q8_0", (r.q8_0, r.q8_0_ref), "8-bit",
                 "8 bits in blocks of 32 with a float16 scale (Q8_0)", EVERYWHERE, 32, "q8_0",
                 offered="q8_0", proof=_GGML, ggml="Q8_0"),
    NumberFormat("q8_1", (r.q8_0,), "8-bit", "8 bits in blocks of 32 with a float16 sum (Q8_1)",
                 (ACTIVATION,), 32, dtype=np.float16, keeps="blocks", proof=_GGML),
    NumberFormat("q8_K", (r.q8_k,), "8-bit", "8 bits in blocks of 256 (Q8_K)", (ACTIVATION,), 256,
                 proof=_GGML),
    *(NumberFormat(name, (way,), "lower", name.upper(), (CACHE, WEIGHT), 32, "q8_0", minimum,
                   "q4_0" if name == "q4_0" else "", proof=_GGML, ggml=name.upper())
      for name, way, minimum in (
          ("q5_0", r.q5_0, False), ("q5_1", r.q5_1, True), ("q4_0", r.q4_0, False),
          ("q4_1", r.q4_1, True))),
    NumberFormat("iq4_nl", (r.iq4_nl,), "lower", "IQ4_NL", (CACHE,), 32, "q8_0", proof=_GGML),
    # made by ggml alone, where it is installed: it searches for the scales
    NumberFormat("iq4_nl of a weight", (), "lower", "IQ4_NL", (WEIGHT,), 32, "q8_0", proof=_GGML,
                 ggml="IQ4_NL"),
    *(NumberFormat(name.lower(), (), "lower", name, (WEIGHT,), 256, "q8_K", proof=_GGML, ggml=name)
      for name in ("Q6_K", "Q5_K", "Q4_K", "Q3_K", "Q2_K", "IQ4_XS")),
    *_each((32, 64, 128, 256), "int8", "8-bit", r.symmetric, (ACTIVATION, WEIGHT)),
    *_each((32, 64, 128), "int4", "lower", partial(r.symmetric, most=7), (WEIGHT,)),
    # torchao divides by half of the 255 steps
    NumberFormat("int8 per row",
                 (r.symmetric, *(partial(r.symmetric, half=half) for half in (0.5, 1.0))),
                 "8-bit", "8 bits per row", offered="int8", proof="torchao"),
    NumberFormat("int8 per tensor", (r.symmetric_tensor,), "8-bit", "8 bits per tensor",
                 (ACTIVATION,)),
    NumberFormat("int8 per row beside float16", (r.llm_int8, r.llm_int8_plain), "8-bit",
                 "8 bits per row, columns with outliers to float16 (LLM.int8)", (ACTIVATION,),
                 proof="bitsandbytes"),
    NumberFormat("uint8 per row", (r.affine_row,), "8-bit", "8 bits per row with a zero point"),
    NumberFormat("uint8 per tensor", (r.affine_tensor,), "8-bit",
                 "8 bits per tensor with a zero point", (ACTIVATION,), proof="onnxruntime"),
    NumberFormat("uint7 per tensor", (partial(r.affine_tensor, levels=127),), "8-bit",
                 "7 bits per tensor with a zero point", (ACTIVATION,), proof="PyTorch"),
    NumberFormat("int4 per row", (partial(r.symmetric, most=7),), "lower", "4 bits per row",
                 (CACHE, WEIGHT)),
    NumberFormat("int4 per row, with a zero point", (partial(r.affine_row, levels=15),), "lower",
                 "4 bits per row with a zero point", (CACHE,)),
    NumberFormat("float8_e4m3", (r.e4m3,), "lower", "float8_e4m3", offered="float8_e4m3fn",
                 dtype=ml_dtypes.float8_e4m3fn, keeps="cache", proof="transformers"),
    NumberFormat("float8_e5m2", (r.e5m2,), "lower", "float8_e5m2", offered="float8_e5m2",
                 dtype=ml_dtypes.float8_e5m2, keeps="cache"),
    NumberFormat("float8_e4m3 per row", (r.scaled_e4m3,), "lower", "float8_e4m3 per row"),
    *_each((128,), "float8_e4m3", "lower", r.scaled_e4m3, (ACTIVATION, WEIGHT)),
    NumberFormat("float8_e4m3 per tensor", (r.scaled_e4m3_tensor,), "lower",
                 "float8_e4m3 per tensor"),
    NumberFormat("nf4", (partial(r.by_table, table=r.NF4),), "lower",
                 "NF4 in blocks of 64", (WEIGHT,), 64, proof="bitsandbytes"),
    NumberFormat("fp4", (partial(r.by_table, table=r.FP4),), "lower",
                 "bitsandbytes' FP4 in blocks of 64", (WEIGHT,), 64, proof="bitsandbytes"),
    NumberFormat("mxfp4", (r.mxfp4,), "lower", "MXFP4 in blocks of 32", (ACTIVATION, WEIGHT), 32,
                 partner="q8_0"),
    NumberFormat("nvfp4", (r.nvfp4, partial(r.nvfp4, of_tensor=False)), "lower",
                 "NVFP4 in blocks of 16", (ACTIVATION, WEIGHT), 16),
)
# fmt: on


def used(use: Use) -> list[NumberFormat]:
    """The formats that engines have somewhere."""
    return [f for f in FORMATS if use in f.uses]


def named(name: str) -> NumberFormat:
    """The format of a name.

    Raises:
        KeyError: there is none.
    """
    return _BY_NAME[name]


_BY_NAME = {f.name: f for f in FORMATS}


def _read_back(kept: Rounding, grid: Rounding, x: np.ndarray, nudge: float = 0.0) -> np.ndarray:
    return grid(kept(x, nudge=nudge))


def caches() -> list[NumberFormat]:
    """What keys and values are kept in. Models in 16 bits round what they read back once more."""
    found = used(CACHE)
    return found + [
        replace(
            kept,
            name=f"{kept.name} read in {grid.name}",
            ways=(partial(_read_back, kept.round, grid.round),),
            partner="",
        )
        for kept in map(named, ("q8_0", "q4_0", "int8 per row"))
        for grid in map(named, ("bfloat16", "float16"))
    ]


# Name on the command line -> how many channels of a head share a scale.
OFFERED_CACHES = {f.offered: f.block for f in FORMATS if f.offered}


def markdown() -> str:
    """The table of all formats, as the documents have it."""
    lines = [
        "| format | input of a linear layer | cache | weight | as in |",
        "|---|---|---|---|---|",
    ]
    for f in FORMATS:
        if f.uses:
            marks = " | ".join("yes" if use in f.uses else "" for use in EVERYWHERE)
            lines.append(f"| {f.name} | {marks} | {f.proof} |")
    return "\n".join(lines)
