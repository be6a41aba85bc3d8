"""Healthy engines, and the number formats that they truly compute in.

llama.cpp's options have too many combinations to try all. ``covering`` chooses some in which every
pair of values occurs together at least once.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import combinations, product
from typing import Any

OPTIONS: dict[str, tuple[Any, ...]] = {
    "weights": ("F32", "F16", "Q8_0", "Q6_K", "Q5_K", "Q4_K", "Q4_0", "IQ4_XS"),
    "length": (48, 20, 1, 200, 1000),
    "cache": ("f16", "f32", "q8_0", "q4_0"),
    "theta": (1e6, 1e4, 1e5),
    "calls": (1, 3, 16),
    "head": (64, 128),
    "flash": ("on", "off"),
}
# What ggml rounds the inputs of a product to, by the type of the weight.
INPUTS = {
    "F16": "float16", "Q8_0": "q8_0", "Q4_0": "q8_0",
    "Q6_K": "q8_K", "Q5_K": "q8_K", "Q4_K": "q8_K", "IQ4_XS": "q8_K",
}  # fmt: skip
LINEAR = ("qkv_matmul", "qkv_bias", "attn_out", "ffn_gate", "ffn_up", "ffn_out", "lm_head")
ROPE = ("q_post_rope", "k_post_rope")
ATTENTION = ("attn_scores", "attn_softmax", "attention")
GROUPS = {"linear": LINEAR, "RoPE": ROPE, "attention": ATTENTION}  # and "rest"


@dataclass(frozen=True)
class Case:
    """One run of a healthy engine.

    Attributes:
        model: ("gguf", head, theta, type), ("directory", architecture, head, theta) or ("demo",).
        true: group of stages -> the names of formats that are true there. None is any.
    """

    engine: str
    model: tuple[Any, ...]
    options: tuple[str, ...]
    length: int
    calls: int
    true: dict[str, frozenset[str]]

    @property
    def name(self) -> str:
        words = [self.engine, *map(str, self.model), *self.options, str(self.length)]
        return " ".join([*words, f"in {self.calls}"])


def covering(options: dict[str, tuple[Any, ...]]) -> list[dict[str, Any]]:
    """Combinations in which each pair of values of two options occurs, few of them: always the
    one next that has most pairs that were not there yet."""
    names = list(options)
    rows = [dict(zip(names, values, strict=True)) for values in product(*options.values())]

    def pairs(row: dict[str, Any]) -> set[tuple[Any, ...]]:
        return {(a, row[a], b, row[b]) for a, b in combinations(names, 2)}

    of_row = [pairs(row) for row in rows]
    left = set().union(*of_row)
    chosen = []
    while left:
        best = max(range(len(rows)), key=lambda n: len(of_row[n] & left))
        chosen.append(rows[best])
        left -= of_row[best]
    return chosen


def _true(**groups: Sequence[str] | str) -> dict[str, frozenset[str]]:
    return {
        name: frozenset([names] if isinstance(names, str) else names)
        for name, names in groups.items()
    }


def llama_cpp() -> Iterator[Case]:
    """The covering design, and the trained demo with llama.cpp's own defaults."""
    for row in covering(OPTIONS):
        yield llama_case(**row)
    for kind in ("Q8_0", "F16"):
        yield llama_case(kind, 48, "f16", 1e6, 1, 32, "on")


def llama_case(
    weights: str, length: int, cache: str, theta: float, calls: int, head: int, flash: str
) -> Case:
    """Without flash attention llama.cpp has no quantised V cache: K's alone is then quantised."""
    v = "f16" if flash == "off" and cache[0] == "q" else cache
    options = ("--flash", flash, "--cache-k", cache, "--cache-v", v)
    # flash attention casts what a float32 cache holds to float16
    held = {"f16" if each == "f32" and flash == "on" else each for each in (cache, v)} - {"f32"}
    kept = {f"kv {'float16' if each == 'f16' else each}" for each in held}
    if flash == "on" and "f16" in held:
        kept |= {"flash float16"}
    true = _true(
        linear=[INPUTS[weights]] if weights in INPUTS else [],
        RoPE=["rope recurrence f32", "rope products f32"],
        attention=sorted(kept),
        rest=[],
    )
    return Case("llama.cpp", ("gguf", head, theta, weights), options, length, calls, true)


HALF = {"bf16": "bfloat16", "f16": "float16"}


def _all_in(name: str) -> dict[str, frozenset[str]]:
    return _true(
        linear=name, RoPE=[name, f"rope tables {name}"], attention=[name, f"kv {name}"], rest=name
    )


PLAIN = _true(linear=[], RoPE=[], attention=[], rest=[])
DIRECTORY = ("directory", "qwen2", 64, 1e6)
QWEN3 = ("directory", "qwen3", 128, 1e6)


def transformers() -> Iterator[Case]:
    def case(options: str, true: dict[str, frozenset[str]], calls: int = 1, **more: Any) -> Case:
        model = more.get("model", DIRECTORY)
        return Case("transformers", model, tuple(options.split()), 48, calls, true)

    yield case("--attention eager", PLAIN)
    yield case("--attention sdpa", PLAIN, 3, model=QWEN3)
    yield case("--attention flex_attention", PLAIN)
    yield case("--attention sdpa --cache static", PLAIN, 16)
    yield case("--attention sdpa --compile", PLAIN)
    for dtype, name in HALF.items():
        for attention in ("eager", "sdpa"):
            yield case(f"--attention {attention} --dtype {dtype}", _all_in(name))
    yield case("--attention sdpa --dtype bf16", _all_in("bfloat16"), 16, model=QWEN3)
    int8 = PLAIN | _true(linear=["uint7 per tensor", "uint8 per tensor"])
    yield case("--quantize int8", int8)


def others() -> Iterator[Case]:
    def case(
        engine: str,
        options: str,
        true: dict[str, frozenset[str]],
        calls: int = 1,
        model: tuple[Any, ...] = DIRECTORY,
    ) -> Case:
        return Case(engine, model, tuple(options.split()), 48, calls, true)

    mlas = PLAIN | _true(rest="silu mlas")
    yield case("onnxruntime", "", mlas)
    yield case("onnxruntime", "", mlas, model=("demo",))
    yield case("transformers", "--attention sdpa", PLAIN, model=("demo",))
    yield case("onnxruntime", "--quantize int8", mlas | _true(linear="uint8 per tensor"))
    yield case("openvino", "", PLAIN)
    yield case("openvino", "--precision bf16", _all_in("bfloat16"))
    exp2 = _true(RoPE="rope exp2 f32")
    yield case("mlx-lm", "", PLAIN | exp2, 3)
    yield case("mlx-lm", "--dtype bf16", _all_in("bfloat16"))
    yield case("mlx-lm", "--bits 4", PLAIN | exp2)
    yield case("tunix", "", PLAIN)
    yield case("tunix", "--dtype bf16", _all_in("bfloat16"), 3)


def cases() -> list[Case]:
    return [*llama_cpp(), *transformers(), *others()]
