"""PTX executed by NumPy: all threads of many blocks at a time, one instruction after the other.

Threads that part at a branch go on in groups, the one furthest behind first, so that they meet
again; that is also how a barrier finds all of its block's threads. Registers hold bits, as in PTX.

What it takes for granted: an approximate instruction gives the nearest number (or, with ``noise``,
any within its documented error), a matrix instruction adds up exactly and rounds once (or, with
``chop``, cuts off), and threads do not race. A GPU's own code, SASS, is another program.

Source: NVIDIA, "Parallel Thread Execution ISA"; the layouts of fragments are its figures.
"""

import operator
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from typing import Any

import ml_dtypes
import numpy as np

from tools.parity.gpu.check import ALLOWED
from tools.parity.gpu.compile import Launch
from tools.parity.gpu.ptx import Instruction, Kernel

Array = np.ndarray
Index = Any  # of the threads that execute: all of them as a slice, or their numbers

BITS = {1: np.bool_, 8: np.uint8, 16: np.uint16, 32: np.uint32, 64: np.uint64}
TYPES: dict[str, Any] = {
    "pred": np.bool_,
    **{f"{kind}{size}": BITS[size] for kind in "bu" for size in (8, 16, 32, 64)},
    "s8": np.int8,
    "s16": np.int16,
    "s32": np.int32,
    "s64": np.int64,
    "f16": np.float16,
    "bf16": ml_dtypes.bfloat16,
    "f32": np.float32,
    "f64": np.float64,
}
PAIRS = {"f16x2": np.float16, "bf16x2": ml_dtypes.bfloat16}
COMPARE: dict[str, Callable[..., Array]] = {
    "eq": operator.eq, "ne": operator.ne, "lt": operator.lt, "le": operator.le,
    "gt": operator.gt, "ge": operator.ge, "lo": operator.lt, "ls": operator.le,
    "hi": operator.gt, "hs": operator.ge,
}  # fmt: skip
LOGIC: dict[str, Callable[..., Array]] = {
    "and": np.bitwise_and, "or": np.bitwise_or, "xor": np.bitwise_xor
}  # fmt: skip
THREADS = 1 << 16  # at a time: registers of so many fit into a cache of some MiB
WARP = 32


class Unsupported(NotImplementedError):
    """PTX that this interpreter does not know."""


class Memory:
    """Global memory: allocations of given sizes. An address is an offset; what nobody has written
    reads as NaN."""

    def __init__(self, allocations: Mapping[int, int]) -> None:
        end, self.starts = 256, dict[int, int]()  # null points nowhere
        for number, size in allocations.items():
            self.starts[number] = end
            end += -(-size // 256) * 256 + 256
        self.words = np.full(end // 8, 2**64 - 1, np.uint64)

    def at(self, allocation: int, offset: int) -> int:
        return self.starts[allocation] + offset

    def write(self, address: int, value: Array) -> None:
        """Put an array somewhere, in C order."""
        flat = np.ascontiguousarray(value).reshape(-1).view(np.uint8)
        self.words.view(np.uint8)[address : address + flat.size] = flat

    def read(self, address: int, dtype: np.dtype, sizes: tuple[int, ...]) -> Array:
        count = int(np.prod(sizes, dtype=np.int64)) * dtype.itemsize
        return (
            self.words.view(np.uint8)[address : address + count].copy().view(dtype).reshape(sizes)
        )


def run(
    kernel: Kernel,
    launch: Launch,
    arguments: Sequence[int],
    memory: Memory,
    noise: np.random.Generator | None = None,
    chop: int | None = None,
) -> None:
    """Execute one kernel.

    Arguments:
        arguments: addresses, one a parameter.
        noise: approximate results are moved by it, within their documented errors.
        chop: of what a matrix instruction adds up so many significant bits are kept, the rest is
            cut off.

    Raises:
        Unsupported: an instruction, or what a GPU would not do either.
    """
    size = int(np.prod(launch.threads))
    blocks = int(np.prod(launch.grid))
    step = max(1, THREADS // size)
    for first in range(0, blocks, step):
        numbers = np.arange(first, min(first + step, blocks))
        with np.errstate(all="ignore"):
            _Threads(kernel, launch, numbers, arguments, memory, noise, chop).run()


class _Threads:
    """The threads of some blocks."""

    def __init__(
        self,
        kernel: Kernel,
        launch: Launch,
        blocks: Array,
        arguments: Sequence[int],
        memory: Memory,
        noise: np.random.Generator | None,
        chop: int | None,
    ) -> None:
        size = int(np.prod(launch.threads))
        thread, block = np.tile(np.arange(size), len(blocks)), np.repeat(blocks, size)
        self.count, self.size = len(thread), size
        self.kernel, self.memory, self.noise, self.chop = kernel, memory, noise, chop
        self.registers: dict[str, Array] = {"%laneid": (thread % WARP).astype(np.uint32)}
        for name, number, sizes in (("tid", thread, launch.threads), ("ctaid", block, launch.grid)):
            for axis, along in zip("xyz", sizes, strict=True):
                self.registers[f"%{name}.{axis}"] = (number % along).astype(np.uint32)
                of = {"tid": "ntid", "ctaid": "nctaid"}[name]
                self.registers[f"%{of}.{axis}"] = np.full(self.count, along, np.uint32)
                number = number // along
        self.parameters = dict(zip(kernel.parameters, arguments, strict=True))
        self.symbols, end = dict[str, int](), 0
        for name, (align, nbytes) in sorted(kernel.shared.items(), key=lambda s: s[1][1] == 0):
            self.symbols[name] = -(-end // align) * align
            end = self.symbols[name] + nbytes
        end = -(-(end + launch.shared) // 16) * 16
        self.shared = np.zeros(len(blocks) * end // 8, np.uint64)
        self.own = (np.arange(self.count) // size * end).astype(np.uint64)  # where a block's begins
        self.live = np.ones(self.count, bool)
        self.at: Index = slice(None)

    def run(self) -> None:
        """Until every thread has returned."""
        groups: dict[int, Array] = {0: np.arange(self.count)}
        instructions, labels = self.kernel.instructions, self.kernel.labels
        while groups:
            pc = min(groups)
            threads = groups.pop(pc)
            while threads.size:
                if pc in groups:
                    threads = np.sort(np.concatenate([threads, groups.pop(pc)]))
                each, active = instructions[pc], threads
                everyone = slice(None) if len(threads) == self.count else threads
                self.at = everyone
                if each.guard:
                    name, wanted = each.guard
                    active = threads[self.registers[name][everyone] == wanted]
                    self.at = everyone if len(active) == len(threads) else active
                pc += 1
                operation = each.parts[0]
                if operation in ("bra", "ret", "exit"):
                    rest = np.setdiff1d(threads, active, assume_unique=True)
                    if operation == "bra":
                        target = labels[each.operands[-1]]
                        waiting = groups.pop(target, np.array([], np.int64))
                        groups[target] = np.sort(np.concatenate([waiting, active]))
                    else:
                        self.live[active] = False
                    threads = rest
                    if groups and threads.size and min(groups) < pc:
                        groups[pc] = np.sort(np.concatenate([groups.pop(pc, threads[:0]), threads]))
                        break
                elif active.size:
                    self.execute(each)

    def execute(self, each: Instruction) -> None:
        """One instruction in the threads at ``self.at``."""
        method = getattr(self, f"do_{each.parts[0]}", None)
        if method is None:
            raise Unsupported(f"{self.kernel.name}: {each}")
        try:
            method(each.parts[1:], *each.operands)
        except (KeyError, TypeError, IndexError, ValueError) as error:
            raise Unsupported(f"{self.kernel.name}: {each}: {error!r}") from error

    # --- operands

    def get(self, operand: str, dtype: Any) -> Array:
        """Bits of a register, a symbol or a number; a narrower type takes the low ones."""
        if operand in self.registers:
            bits = self.registers[operand][self.at]
            dtype = np.dtype(dtype)
            if bits.dtype == bool:
                return bits
            if bits.itemsize != dtype.itemsize:
                bits = bits.astype(BITS[8 * dtype.itemsize])
            return bits.view(dtype)
        if operand in self.symbols:
            return np.array([self.symbols[operand]], dtype)
        return _literal(operand, np.dtype(dtype))

    def put(self, operand: str, value: Array) -> None:
        """Into a register; a whole number is extended by its sign, other bits by zeros."""
        if operand == "_":
            return
        width = self.kernel.widths.get(operand) or self.kernel.widths[operand.rstrip("0123456789")]
        if value.dtype.kind not in "iub":
            value = value.view(BITS[8 * value.dtype.itemsize])
        register = self.registers.get(operand)
        if register is None:
            register = self.registers[operand] = np.zeros(self.count, BITS[width])
        register[self.at] = value.astype(register.dtype)

    def address(self, operand: str) -> Array:
        """``[register+number]``, as whole numbers."""
        base, _, offset = operand.strip("[] ").replace(" ", "").partition("+")
        return self.get(base, np.uint64).astype(np.int64) + int(offset or 0)

    @property
    def threads(self) -> Array:
        return np.arange(self.count)[self.at]

    def warps(self, value: Array) -> Array:
        """[threads] -> [warps, 32]: what a warp does together, all of it must do."""
        threads = self.threads
        if threads.size % WARP or (threads.reshape(-1, WARP)[:, 0] % WARP).any() or (
            np.diff(threads.reshape(-1, WARP), axis=1) != 1
        ).any():  # fmt: skip
            raise Unsupported(f"{self.kernel.name}: a warp that is not together")
        return np.broadcast_to(value, threads.shape).reshape(-1, WARP)

    # --- moving

    def do_mov(self, kind: list[str], target: str, source: str) -> None:
        dtype = TYPES[kind[-1]]
        parts = _vector(target)
        if len(parts) > 1:  # a register taken apart
            bits = np.broadcast_to(self.get(source, dtype), self.threads.shape)
            narrow: Array = np.ascontiguousarray(bits).view(
                BITS[8 * np.dtype(dtype).itemsize // len(parts)]
            )
            for n, part in enumerate(parts):
                self.put(part, narrow.reshape(-1, len(parts))[:, n])
        elif len(_vector(source)) > 1:  # put together
            self.put(target, self.together(_vector(source), dtype))
        else:
            self.put(target, self.get(source, dtype))

    def together(self, parts: list[str], dtype: Any) -> Array:
        narrow = BITS[8 * np.dtype(dtype).itemsize // len(parts)]
        columns = [np.broadcast_to(self.get(p, narrow), self.threads.shape) for p in parts]
        return np.ascontiguousarray(np.stack(columns, 1)).view(dtype)[:, 0]

    def do_cvta(self, kind: list[str], target: str, source: str) -> None:
        self.put(target, self.get(source, np.uint64))

    def do_griddepcontrol(self, kind: list[str], *operands: str) -> None:
        """Waiting for the kernel before: it has ended."""

    def do_bar(self, kind: list[str], *operands: str) -> None:
        blocks = np.unique(self.threads // self.size)
        here, there = (
            np.zeros(self.count, bool),
            np.isin(np.arange(self.count) // self.size, blocks),
        )
        here[self.at] = True
        if (there & self.live & ~here).any():
            raise Unsupported(f"{self.kernel.name}: a barrier without all threads of a block")

    do_barrier = do_bar

    def memory_of(self, kind: list[str], operand: str) -> tuple[Array, Array]:
        """(bytes, addresses in them) of a load or a store."""
        where = self.address(operand)
        if "shared" in kind:
            return self.shared, self.own[self.at].astype(np.int64) + where
        if "global" in kind:
            return self.memory.words, where
        raise Unsupported(f"{self.kernel.name}: memory {kind}")

    def do_ld(self, kind: list[str], target: str, source: str) -> None:
        if "param" in kind:
            self.put(target, np.array([self.parameters[source.strip("[]")]], np.uint64))
            return
        dtype = np.dtype(TYPES[kind[-1]])
        words, where = self.memory_of(kind, source)
        if (where % dtype.itemsize).any():
            raise Unsupported(f"{self.kernel.name}: an address that is not aligned")
        view, first = words.view(dtype), where // dtype.itemsize
        for n, part in enumerate(_vector(target)):
            self.put(part, view[first + n])

    def do_st(self, kind: list[str], target: str, source: str) -> None:
        dtype = np.dtype(TYPES[kind[-1]])
        words, where = self.memory_of(kind, target)
        if (where % dtype.itemsize).any():
            raise Unsupported(f"{self.kernel.name}: an address that is not aligned")
        view, first = words.view(dtype), where // dtype.itemsize
        for n, part in enumerate(_vector(source)):
            view[first + n] = self.get(part, dtype)

    def do_ldmatrix(self, kind: list[str], target: str, source: str) -> None:
        rows = self.matrix_rows(kind, source)  # [warps, matrices, 8 rows, 8 columns]
        if "trans" in kind:
            rows = rows.swapaxes(2, 3)
        for n, part in enumerate(_vector(target)):
            pairs = np.ascontiguousarray(rows[:, n]).view(np.uint32)  # [warps, 8, 4]: a lane each
            self.put(part, pairs.reshape(-1))

    def do_stmatrix(self, kind: list[str], target: str, source: str) -> None:
        where = self.matrix_addresses(kind, target)
        for n, part in enumerate(_vector(source)):
            bits = np.ascontiguousarray(self.warps(self.get(part, np.uint32)))
            rows = bits.reshape(-1, 8, 4).view(np.uint16)
            if "trans" in kind:
                rows = rows.swapaxes(1, 2)
            self.shared.view(np.uint16)[where[:, n]] = rows

    def matrix_addresses(self, kind: list[str], operand: str) -> Array:
        """[warps, matrices, 8, 8]: lane 8 m + r has the address of row r of matrix m."""
        _, where = self.memory_of(kind, operand)
        count = next(int(part[1:]) for part in kind if part in ("x1", "x2", "x4"))
        rows = self.warps(where)[:, : 8 * count].reshape(-1, count, 8, 1)
        return rows // 2 + np.arange(8)

    def matrix_rows(self, kind: list[str], operand: str) -> Array:
        return self.shared.view(np.uint16)[self.matrix_addresses(kind, operand)]

    def do_shfl(self, kind: list[str], target: str, *operands: str) -> None:
        source, distance, clamp, _ = operands
        mode = kind[1]
        value = self.warps(self.get(source, np.uint32))
        by, bound = (self.warps(self.get(each, np.int32)) for each in (distance, clamp))
        lane = np.arange(WARP)
        segment = (bound >> 8) & 31
        last, first = (lane & segment) | (bound & 31 & ~segment), lane & segment
        taken = {
            "bfly": lane ^ by,
            "down": lane + by,
            "up": lane - by,
            "idx": first | (by & ~segment),
        }
        wanted = taken[mode]
        within = wanted >= last if mode == "up" else wanted <= last
        moved = np.take_along_axis(value, np.where(within, wanted, lane), 1)
        name, _, predicate = target.partition("|")
        self.put(name, moved.reshape(-1))
        if predicate:
            self.put(predicate, within.reshape(-1))

    def do_cvt(self, kind: list[str], target: str, *sources: str) -> None:
        to, source = kind[-2:]
        if to in PAIRS:
            high, low = (self.get(each, TYPES[source]).astype(PAIRS[to]) for each in sources)
            self.put(target, np.ascontiguousarray(np.stack([low, high], 1)).view(np.uint32)[:, 0])
            return
        value = self.get(sources[0], TYPES[source])
        if to == "tf32":  # rna: to nearest, ties away from zero
            bits = value.view(np.uint32) + np.uint32(0x1000)
            self.put(target, bits & np.uint32(0xFFFFE000))
            return
        if "sat" in kind:
            value = np.nan_to_num(np.clip(value, 0, 1), nan=0)
        for name, rounding in (("rni", np.rint), ("rzi", np.trunc), ("rmi", np.floor)):
            if name in kind:
                value = rounding(value)
        self.put(target, value.astype(TYPES[to]))

    # --- choosing

    def do_setp(self, kind: list[str], target: str, *operands: str) -> None:
        a, b = (self.get(each, TYPES[kind[-1]]) for each in operands[:2])
        name = kind[0]
        if name in ("num", "nan"):
            found = (np.isnan(a) | np.isnan(b)) == (name == "nan")
        elif name.endswith("u") and name[:-1] in COMPARE:
            found = COMPARE[name[:-1]](a, b) | np.isnan(a) | np.isnan(b)
        else:
            found = COMPARE[name](a, b)
            if name == "ne" and kind[-1] in ("f32", "f64"):
                found &= ~(np.isnan(a) | np.isnan(b))
        first, _, second = target.partition("|")
        if len(operands) > 2:
            found = LOGIC[kind[1]](found, self.get(operands[2], np.bool_))
        self.put(first, found)
        if second:
            self.put(second, ~found)

    def do_selp(self, kind: list[str], target: str, a: str, b: str, predicate: str) -> None:
        dtype = BITS[8 * np.dtype(TYPES[kind[-1]]).itemsize]
        chosen = self.get(predicate, np.bool_)
        self.put(target, np.where(chosen, self.get(a, dtype), self.get(b, dtype)))

    # --- whole numbers

    def do_and(self, kind: list[str], target: str, a: str, b: str) -> None:
        self.bitwise("and", kind, target, a, b)

    def do_or(self, kind: list[str], target: str, a: str, b: str) -> None:
        self.bitwise("or", kind, target, a, b)

    def do_xor(self, kind: list[str], target: str, a: str, b: str) -> None:
        self.bitwise("xor", kind, target, a, b)

    def bitwise(self, name: str, kind: list[str], target: str, a: str, b: str) -> None:
        dtype = TYPES[kind[-1]]
        self.put(target, LOGIC[name](self.get(a, dtype), self.get(b, dtype)))

    def do_not(self, kind: list[str], target: str, a: str) -> None:
        self.put(target, ~self.get(a, TYPES[kind[-1]]))

    def do_shl(self, kind: list[str], target: str, a: str, b: str) -> None:
        self.shift(np.left_shift, kind, target, a, b)

    def do_shr(self, kind: list[str], target: str, a: str, b: str) -> None:
        self.shift(np.right_shift, kind, target, a, b)

    def shift(self, by: Any, kind: list[str], target: str, a: str, b: str) -> None:
        """Beyond the width nothing is left but the sign."""
        dtype = np.dtype(TYPES[kind[-1]])
        value, count = self.get(a, dtype), self.get(b, np.uint32)
        most, width = dtype.type(8 * dtype.itemsize - 1), 8 * dtype.itemsize
        moved = by(value, np.minimum(count, width - 1).astype(dtype))
        rest = value >> most if dtype.kind == "i" else np.zeros_like(moved)
        self.put(target, np.where(count < width, moved, rest))

    def do_bfe(self, kind: list[str], target: str, a: str, start: str, length: str) -> None:
        dtype = np.dtype(TYPES[kind[-1]])
        first, count = (self.get(each, np.uint32).astype(np.int64) for each in (start, length))
        width = 8 * dtype.itemsize
        if (count <= 0).any() or (first + count > width).any():
            raise Unsupported(f"{self.kernel.name}: bfe beyond the register")
        left = (width - first - count).astype(dtype)
        self.put(target, (self.get(a, dtype) << left) >> (width - count).astype(dtype))

    def do_mad(self, kind: list[str], target: str, a: str, b: str, c: str) -> None:
        product = self.product(kind, a, b)
        self.put(target, product + self.get(c, product.dtype))

    def product(self, kind: list[str], a: str, b: str) -> Array:
        dtype = np.dtype(TYPES[kind[-1]])
        x, y = self.get(a, dtype), self.get(b, dtype)
        if "lo" in kind:
            return x * y
        twice = np.dtype(f"{dtype.kind}{2 * dtype.itemsize}")
        wide = x.astype(twice) * y.astype(twice)
        return wide if "wide" in kind else (wide >> (8 * dtype.itemsize)).astype(dtype)

    # --- arithmetic

    def do_add(self, kind: list[str], target: str, a: str, b: str) -> None:
        self.put(target, self.apply(np.add, kind, a, b))

    def do_sub(self, kind: list[str], target: str, a: str, b: str) -> None:
        self.put(target, self.apply(np.subtract, kind, a, b))

    def do_mul(self, kind: list[str], target: str, a: str, b: str) -> None:
        if {"lo", "hi", "wide"} & set(kind):
            self.put(target, self.product(kind, a, b))
        else:
            self.put(target, self.apply(np.multiply, kind, a, b))

    def do_min(self, kind: list[str], target: str, a: str, b: str) -> None:
        self.put(target, self.apply(np.minimum if "NaN" in kind else np.fmin, kind, a, b))

    def do_max(self, kind: list[str], target: str, a: str, b: str) -> None:
        self.put(target, self.apply(np.maximum if "NaN" in kind else np.fmax, kind, a, b))

    def do_neg(self, kind: list[str], target: str, a: str) -> None:
        self.put(target, self.apply(np.negative, kind, a))

    def do_abs(self, kind: list[str], target: str, a: str) -> None:
        self.put(target, self.apply(np.abs, kind, a))

    def apply(self, operation: Any, kind: list[str], *operands: str) -> Array:
        """An operation that rounds to nearest, if at all."""
        if {"rz", "rm", "rp", "ftz", "sat", "approx"} & set(kind):
            raise Unsupported(f"{self.kernel.name}: arithmetic {kind}")
        if kind[-1] in PAIRS:
            pairs = [self.pairs(each, kind[-1]) for each in operands]
            return np.ascontiguousarray(operation(*pairs)).view(np.uint32)[:, 0]
        return operation(*(self.get(each, TYPES[kind[-1]]) for each in operands))

    def pairs(self, operand: str, kind: str) -> Array:
        """[threads, 2] of a register that holds two."""
        bits = np.broadcast_to(self.get(operand, np.uint32), self.threads.shape)
        return np.ascontiguousarray(bits)[:, None].view(PAIRS[kind])

    def do_fma(self, kind: list[str], target: str, a: str, b: str, c: str) -> None:
        if kind in (["rn", "f32"], ["rm", "f32"]):
            x, y, z = (self.get(each, np.float32) for each in (a, b, c))
            self.put(target, fma(x, y, z, down="rm" in kind))
        elif kind[0] == "rn" and kind[-1] in PAIRS:
            x, y, z = (self.pairs(each, kind[-1]).astype(np.float32) for each in (a, b, c))
            pair = np.ascontiguousarray((x * y + z).astype(PAIRS[kind[-1]]))
            self.put(target, pair.view(np.uint32)[:, 0])
        elif kind[0] == "rn" and kind[-1] in ("f16", "bf16"):
            dtype = TYPES[kind[-1]]
            x, y, z = (self.get(each, dtype).astype(np.float32) for each in (a, b, c))
            self.put(target, (x * y + z).astype(dtype))
        else:
            raise Unsupported(f"{self.kernel.name}: fma {kind}")

    def do_div(self, kind: list[str], target: str, a: str, b: str) -> None:
        self.rounded("div", kind, target, np.divide, a, b)

    def do_rcp(self, kind: list[str], target: str, a: str) -> None:
        self.rounded("rcp", kind, target, np.reciprocal, a)

    def do_sqrt(self, kind: list[str], target: str, a: str) -> None:
        self.rounded("sqrt", kind, target, np.sqrt, a)

    def do_ex2(self, kind: list[str], target: str, a: str) -> None:
        self.rounded("ex2", kind, target, np.exp2, a)

    def rounded(self, name: str, kind: list[str], target: str, function: Any, *a: str) -> None:
        """A function of float32: the nearest number to it, or one that its error allows."""
        if kind[-1] != "f32" or not {"approx", "full", "rn"} & set(kind):
            raise Unsupported(f"{self.kernel.name}: {name} {kind}")
        exact = function(*(self.get(each, np.float32).astype(np.float64) for each in a))
        value = exact.astype(np.float32)
        if "ftz" in kind:
            value = np.where(np.abs(value) < np.finfo(np.float32).tiny, value * 0, value)
        if self.noise is not None and "rn" not in kind:
            ulp = int(ALLOWED[".".join([name, *kind])][1])
            moved = value.view(np.int32) + self.noise.integers(-ulp, ulp + 1, value.shape, np.int32)
            plain = np.isfinite(value) & (np.abs(value) > 1e-30)
            value = np.where(plain, moved.view(np.float32), value)
        self.put(target, value)

    def do_mma(self, kind: list[str], *operands: str) -> None:
        """D [16, 8] = A [16, k] B [k, 8] + C. Lane 4 g + t holds rows g and g + 8 of A, C and D and
        column g of B."""
        target, a, b, c = map(_vector, operands)
        shape = next(part for part in kind if part.startswith("m16n8k"))
        summed, left, right, _ = kind[-4:]
        if summed != "f32" or left != right:
            raise Unsupported(f"{self.kernel.name}: mma {kind}")
        x, y = ([self.fragment(each, left) for each in part] for part in (a, b))
        rows = [np.concatenate(x[half::2], 2) for half in (0, 1)]  # [warps, 8, k] each
        columns = np.concatenate(y, 2)  # [warps, 8, k]
        if rows[0].shape[2] != int(shape.removeprefix("m16n8k")):
            raise Unsupported(f"{self.kernel.name}: mma {kind}")
        for half in (0, 1):
            pair = slice(2 * half, 2 * half + 2)
            before = np.stack([self.warps(self.get(each, np.float32)) for each in c[pair]], 2)
            found = rows[half] @ columns.swapaxes(1, 2) + before.reshape(-1, 8, 8)
            if self.chop:
                found = (found.view(np.int64) & -(1 << 53 - self.chop)).view(np.float64)
            value = found.astype(np.float32)
            for n, part in enumerate(target[pair]):
                self.put(part, value.reshape(-1, WARP, 2)[:, :, n].reshape(-1))

    def fragment(self, operand: str, kind: str) -> Array:
        """[warps, 8, 4 or 8] float64: of a register in each lane, one TF32 number or two others."""
        bits = np.ascontiguousarray(self.warps(self.get(operand, np.uint32))).reshape(-1, 8, 4)
        if kind == "tf32":
            return (bits & np.uint32(0xFFFFE000)).view(np.float32).astype(np.float64)
        return bits.view(TYPES[kind]).astype(np.float64)


def fma(a: Array, b: Array, c: Array, down: bool = False) -> Array:
    """a b + c in float32, rounded once: to nearest, or down.

    In float64 the product is exact. The sum is not: where it comes out halfway between two float32
    numbers, what was lost decides.
    """
    product, addend = a.astype(np.float64) * b.astype(np.float64), c.astype(np.float64)
    total = np.atleast_1d(product + addend)
    halfway = (total.view(np.uint64) & np.uint64(0x1FFFFFFF)) == np.uint64(0x10000000)
    if halfway.any():
        part = total - product  # two-sum (Knuth): what the addition lost
        lost = (product - (total - part)) + (addend - part)
        total = np.where(halfway & (lost > 0), np.nextafter(total, np.inf), total)
        total = np.where(halfway & (lost < 0), np.nextafter(total, -np.inf), total)
    found = total.astype(np.float32)
    if down:
        found = np.where(found > total, np.nextafter(found, np.float32(-np.inf)), found)
    return found


@cache
def _vector(operand: str) -> list[str]:
    """The registers of ``{a, b}``, or the one there is."""
    return [part.strip() for part in operand.strip("{} ").split(",")]


@cache
def _literal(text: str, dtype: np.dtype) -> Array:
    """A number in PTX's notation, [1]: 0f and 0d are bits of a float."""
    if text[:2] in ("0f", "0F"):
        return np.array([int(text[2:], 16)], np.uint32).view(dtype)
    if text[:2] in ("0d", "0D"):
        return np.array([int(text[2:], 16)], np.uint64).view(dtype)
    bits = BITS[8 * dtype.itemsize]
    value: Array = np.array([int(text, 0) & (2 ** (8 * dtype.itemsize) - 1)], bits)
    return value != 0 if dtype.kind == "b" else value.view(dtype)
