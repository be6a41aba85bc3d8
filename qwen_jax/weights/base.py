"""What every source of a model's weights has in common: reading them in bounded memory.

Each form of a model (see ``qwen_jax.weights``) gives rows of a tensor; the rest is here. Imports
neither jax nor torch.
"""

import json
import math
from abc import ABC, abstractmethod
from collections.abc import Collection, Iterable, Iterator, Mapping
from pathlib import Path

import ml_dtypes  # noqa: F401 -- teaches NumPy, and so safetensors, the name "bfloat16"
import numpy as np
import xxhash
from tokenizers import Tokenizer

from qwen_jax.config import Config
from stages.disk import check_regular
from stages.errors import UserError
from stages.manifest import WeightEntry

BLOCK = 1 << 20  # bytes of one read: hashed and widened while they are in the cache
# What belongs to a model besides its weights.
CHAT_TEMPLATE = "chat_template.jinja"  # or in tokenizer_config.json
COMPANIONS = (
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    CHAT_TEMPLATE,
)
ALIGNMENT = 64  # bytes: JAX takes a host array that is aligned so as it lies, without a copy


def misfits(
    expected: Mapping[str, tuple[int, ...]],
    found: Mapping[str, tuple[tuple[int, ...], str]],
    dtypes: Collection[str],
) -> str:
    """What of the tensors found (name -> shape and dtype) is missing, unexpected, of another shape
    or of none of the ``dtypes``; empty if they fit."""
    problems = []
    if missing := [name for name in expected if name not in found]:
        problems.append(f"missing {some(missing, 'tensor')}")
    if unexpected := sorted(found.keys() - expected.keys()):
        problems.append(f"unexpected {some(unexpected, 'tensor')}")
    wrong = []
    for name in (name for name in expected if name in found):
        shape, dtype = found[name]
        if shape != expected[name]:
            wrong.append(f"{name} is {list(shape)}, not {list(expected[name])}")
        if dtype not in dtypes:
            wrong.append(f"{name} is {dtype}, not one of {', '.join(dtypes)}")
    if wrong:
        problems.append(some(wrong, "mismatch", "mismatches"))
    return "; ".join(problems)


def some(items: Iterable[str], one: str, many: str | None = None) -> str:
    """'1 tensor (a)' or '7 tensors (a, b, c, ...)'."""
    items = list(items)
    noun = one if len(items) == 1 else many or one + "s"
    return f"{len(items)} {noun} ({', '.join(items[:3])}{', ...' if len(items) > 3 else ''})"


class Weights(ABC):
    """The weights of one model, read a tensor or some rows at a time.

    Attributes:
        name: what traces of the model are named after.
        config: the architecture.
        directory: where its tokenizer lies; None for a model that is not on disk.
        files: what it is read from; empty for a model that is not on disk.
        no_tokenizer: what to say of the model where it has no tokenizer.
        hashes: tensor name -> what a manifest says of it, for every tensor read whole so far.
    """

    name: str
    config: Config
    directory: Path | None

    @property
    def no_tokenizer(self) -> str:
        return "has no tokenizer.json"

    @property
    def files(self) -> list[Path]:
        if self.directory is None:
            return []
        return [path for path in sorted(self.directory.rglob("*")) if path.is_file()]

    def __init__(self) -> None:
        self.hashes: dict[str, WeightEntry] = {}
        self._hashing: dict[str, tuple[int, xxhash.xxh3_64]] = {}  # next row, hash of those before

    def __repr__(self) -> str:
        config = self.config
        return (
            f"<{type(self).__name__} {self.name}: {config.architecture}, "
            f"{config.num_hidden_layers} layers, {len(self.shapes)} tensors>"
        )

    @abstractmethod
    def dtype(self, name: str) -> np.dtype:
        """The dtype in which a tensor is stored."""

    @abstractmethod
    def fill(self, name: str, start: int, out: np.ndarray) -> None:
        """Write rows ``start`` to ``start + len(out)`` of one tensor into ``out``, which is
        C-contiguous and has the tensor's own dtype."""

    def tokenizer(self) -> Tokenizer | None:
        """Its tokenizer; None if it has no ``tokenizer.json``.

        Raises:
            UserError: the file is damaged.
        """
        if self.directory is None or not (self.directory / "tokenizer.json").exists():
            return None
        path = self.directory / "tokenizer.json"
        check_regular(path)
        try:
            return Tokenizer.from_file(str(path))
        except Exception as error:  # the library raises bare Exception for a damaged file
            raise UserError(f"{path}: not a tokenizer: {error}") from None

    def chat_template(self) -> tuple[str, dict[str, str]] | None:
        """How its tokenizer writes a chat, in Jinja, and the special tokens that this may name;
        None where it does not say.

        Raises:
            UserError: the file is damaged.
        """
        if self.directory is None:
            return None
        path, alone = self.directory / "tokenizer_config.json", self.directory / CHAT_TEMPLATE
        try:
            said = json.loads(path.read_bytes()) if path.is_file() else {}
            template = alone.read_text("utf-8") if alone.is_file() else said.get("chat_template")
            if isinstance(template, list):  # several, by name
                template = {each["name"]: each["template"] for each in template}["default"]
            tokens = {name: said.get(name) for name in ("bos_token", "eos_token", "pad_token")}
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise UserError(f"{path}: no chat template can be read: {error!r}") from None
        if not isinstance(template, str):
            return None
        text = {n: t.get("content") if isinstance(t, dict) else t for n, t in tokens.items()}
        return template, {name: each for name, each in text.items() if isinstance(each, str)}

    def companions(self) -> dict[str, bytes]:
        """The files that go with the weights, by name, config.json first."""
        paths = [self.directory / name for name in COMPANIONS] if self.directory else []
        for path in paths:
            check_regular(path)
        return {path.name: path.read_bytes() for path in paths if path.is_file()}

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Every tensor's shape, by its Hugging Face name."""
        return self.config.shapes

    def load(self, name: str, start: int, out: np.ndarray) -> None:
        """Read rows from ``start`` on into ``out``, which is of the tensor's dtype or a wider one.
        Once all rows were loaded in order, the content hash is in ``hashes``."""
        dtype, hashed = self.dtype(name), name in self.hashes
        step = max(1, BLOCK // (math.prod(out.shape[1:]) * dtype.itemsize))
        scratch = None if out.dtype == dtype else np.empty((step, *out.shape[1:]), dtype)
        for first in range(0, len(out), step):
            part = out[first : first + step]
            rows = part if scratch is None else scratch[: len(part)]
            self.fill(name, start + first, rows)
            if not hashed:
                self._hash(name, start + first, rows)
            if scratch is not None:
                part[...] = rows

    def _hash(self, name: str, start: int, rows: np.ndarray) -> None:
        following, digest = self._hashing.pop(name, (0, None)) if start else (0, xxhash.xxh3_64())
        if digest is None or start != following:
            return  # not in order; the next pass from the start will do
        content, dtype = self._hashed(name, start, rows)
        digest.update(content)
        shape = self.shapes[name]
        if start + len(rows) < shape[0]:
            self._hashing[name] = start + len(rows), digest
        else:
            self.hashes[name] = WeightEntry(dtype=dtype, shape=shape, xxh3=digest.hexdigest())

    def _hashed(self, name: str, start: int, rows: np.ndarray) -> tuple[memoryview, str]:
        """The bytes that a content hash is of, and the name of their dtype: those of the values,
        unless a form makes these of something else."""
        return raw_bytes(rows), str(rows.dtype)

    def value_hash(self, name: str) -> WeightEntry:
        """The content hash of the values as they are read, whatever the file stores."""
        return self.hash(name)

    def rows(self, name: str, start: int, stop: int) -> np.ndarray:
        """Rows ``start`` to ``stop`` (of the first axis) of one tensor, in its own dtype."""
        out = aligned_empty((stop - start, *self.shapes[name][1:]), self.dtype(name))
        self.load(name, start, out)
        return out

    def read(self, name: str) -> np.ndarray:
        """One tensor in its own dtype."""
        return self.rows(name, 0, self.shapes[name][0])

    def blocks(self, name: str, step: int | None = None) -> Iterator[tuple[int, np.ndarray]]:
        """A whole tensor as (first row, rows): ``step`` rows at a time, the last ones maybe fewer,
        or as many as make about ``BLOCK`` bytes. Each is an array of its own."""
        count, *rest = self.shapes[name]
        step = step or max(1, BLOCK // (math.prod(rest) * self.dtype(name).itemsize))
        for start in range(0, count, step):
            yield start, self.rows(name, start, min(start + step, count))

    def hash(self, name: str) -> WeightEntry:
        """The entry of one tensor in ``hashes``, computed if need be."""
        if name not in self.hashes:
            for _ in self.blocks(name):
                pass
        return self.hashes[name]

    def gather(self, name: str, rows: np.ndarray) -> np.ndarray:
        """The given rows of a tensor, in any order; in one pass over all of it, unless its hash is
        known."""
        if name in self.hashes:
            return self.some(name, rows)
        found = aligned_empty((len(rows), *self.shapes[name][1:]), self.dtype(name))
        order = np.argsort(rows)
        for start, block in self.blocks(name):
            first, last = np.searchsorted(rows, (start, start + len(block)), sorter=order)
            here = order[first:last]
            found[here] = block[rows[here] - start]
        return found

    def some(self, name: str, rows: np.ndarray) -> np.ndarray:
        """The same at the cost of these rows, whatever is known of the hash."""
        found = aligned_empty((len(rows), *self.shapes[name][1:]), self.dtype(name))
        for place, row in enumerate(rows):
            self.fill(name, int(row), found[place : place + 1])
        return found


def raw_bytes(array: np.ndarray) -> memoryview:
    """The bytes of a C-contiguous array, of whatever dtype."""
    return memoryview(array.reshape(-1).view(np.uint8))  # type: ignore[arg-type]


def aligned_empty(shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    """``np.empty`` at an address that is a multiple of ``ALIGNMENT``."""
    size = int(np.prod(shape)) * dtype.itemsize
    raw = np.empty(size + ALIGNMENT, np.uint8)
    first = -raw.ctypes.data % ALIGNMENT
    return raw[first : first + size].view(dtype).reshape(shape)
