"""The GGUF file format: metadata, tensor directory and split files, read strictly.

Laid out as in ggml-org/ggml, docs/gguf.md; versions 2 and 3 differ in nothing that matters here.
The ``gguf`` package has a reader too, but it makes several arrays of every token of a vocabulary,
which takes seconds, and stumbles in many ways over damaged bytes. It is asked for what belongs to
the quantised types only. Imports neither jax nor torch.
"""

import math
import os
import re
import struct
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any, BinaryIO, NamedTuple

import numpy as np

from stages.disk import check_regular
from stages.errors import UserError

MAGIC = b"GGUF"
VERSIONS = (2, 3)
SUFFIX = ".gguf"
PART = re.compile(r"(.+)-(\d{5})-of-(\d{5})\.gguf")
SCALARS = {
    0: "<u1", 1: "<i1", 2: "<u2", 3: "<i2", 4: "<u4", 5: "<i4", 6: "<f4", 10: "<u8", 11: "<i8",
    12: "<f8",
}  # fmt: skip
BOOL, STRING, ARRAY = 7, 8, 9
MOST_AXES = 4
LONGEST = 255  # name; ggml's own are below 64


class Tensor(NamedTuple):
    """Where one tensor lies. Its shape is NumPy's, the reverse of the file's."""

    path: Path
    type: str  # ggml's name: F32, Q4_K, ...
    shape: tuple[int, ...]
    start: int  # offset in the file
    row: int  # bytes of one index of the first axis


class Content(NamedTuple):
    """What the header of a file, or those of all its parts, says."""

    metadata: dict[str, Any]
    tensors: dict[str, Tensor]


def is_gguf(path: Path) -> bool:
    """Whether a path is meant to be a GGUF file, or is one under another name."""
    if path.suffix == SUFFIX and not path.is_dir():
        return True
    if not path.is_file():
        return False
    try:
        with open(path, "rb") as file:
            return file.read(len(MAGIC)) == MAGIC
    except OSError:
        return False


@cache
def package() -> ModuleType:
    """The ``gguf`` package, which knows ggml's types."""
    try:
        import gguf
    except ImportError:
        raise UserError(
            "a GGUF file needs the gguf package; install it with pip install '.[gguf]'"
        ) from None
    return gguf


def read(path: Path) -> Content:
    """A whole model: one file, or the first of a split one and the parts beside it.

    Raises:
        UserError: damaged, cut short, a part missing, or a form that is not known here.
    """
    content = read_header(path)
    count = content.metadata.get("split.count", 0)
    named = PART.fullmatch(path.name)
    if count in (0, 1):
        return content
    if named is None or int(named[3]) != count or int(named[2]) != 1:
        raise UserError(
            f"{path}: is part {_number(content.metadata, 'split.no') + 1} of a model in {count} "
            f"parts; give the first, whose name ends in -00001-of-{count:05d}{SUFFIX}"
        )
    tensors = dict(content.tensors)
    for number in range(1, count):
        part = path.with_name(f"{named[1]}-{number + 1:05d}-of-{count:05d}{SUFFIX}")
        if not part.exists():
            raise UserError(f"{path}: part {number + 1} of {count} is missing: {part.name}")
        told, found = read_header(part)
        if (_number(told, "split.no"), _number(told, "split.count")) != (number, count):
            raise UserError(f"{part}: is not part {number + 1} of {count} as its name says")
        if twice := sorted(found.keys() & tensors.keys()):
            raise UserError(f"{part}: has {twice[0]}, which an earlier part has too")
        tensors |= found
    stated = content.metadata.get("split.tensors.count", len(tensors))
    if stated != len(tensors):
        raise UserError(f"{path}: its {count} parts have {len(tensors)} tensors, not {stated}")
    return Content(content.metadata, tensors)


def _number(metadata: dict[str, Any], key: str) -> int:
    value = metadata.get(key)
    return value if type(value) is int else -1


def read_header(path: Path) -> Content:
    """Metadata and tensor directory of one file. A number array is a NumPy array, an array of
    strings a list of bytes."""
    check_regular(path)
    try:
        with open(path, "rb") as file:
            return _Header(file, path).content()
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from None


class _Header:
    """Reads one header from start to end. No count in it is believed before the file is seen to
    be large enough: a damaged one may be anything."""

    def __init__(self, file: BinaryIO, path: Path) -> None:
        self.file, self.path = file, path
        self.size = os.fstat(file.fileno()).st_size

    def content(self) -> Content:
        if self.file.read(len(MAGIC)) != MAGIC:
            raise UserError(f"{self.path}: is no GGUF file: it does not begin with 'GGUF'")
        version = self._scalar("<u4")
        if version & 0xFFFF == 0:
            raise UserError(f"{self.path}: is a big-endian GGUF file; only little-endian is read")
        if version not in VERSIONS:
            raise UserError(f"{self.path}: is GGUF version {version}; versions 2 and 3 are read")
        tensors, entries = self._scalar("<u8"), self._scalar("<u8")
        metadata: dict[str, Any] = {}
        for _ in range(entries):
            key = self._name()
            if key in metadata:
                raise self._damaged(f"{key} is there twice")
            metadata[key] = self._value(self._scalar("<u4"))
        return Content(metadata, self._tensors(tensors, metadata))

    def _tensors(self, count: int, metadata: dict[str, Any]) -> dict[str, Tensor]:
        alignment = metadata.get("general.alignment", 32)
        if type(alignment) is not int or alignment < 1 or alignment & (alignment - 1):
            raise self._damaged(f"general.alignment is {alignment!r}, no power of two")
        told = {}
        for _ in range(count):
            name = self._name()
            axes = self._scalar("<u4")
            if not 1 <= axes <= MOST_AXES:
                raise self._damaged(f"the tensor '{name}' has {axes} axes")
            shape = tuple(self._scalar("<u8") for _ in range(axes))[::-1]
            if name in told:
                raise self._damaged(f"{name} is there twice")
            told[name] = shape, self._scalar("<u4"), self._scalar("<u8")
        first = _up(self.file.tell(), alignment)
        return self._places(told, first, alignment)

    def _places(
        self, told: dict[str, tuple[Any, ...]], first: int, alignment: int
    ) -> dict[str, Tensor]:
        """Tensors follow one another without gaps, as llama.cpp demands; all lie in the file."""
        tensors, end = {}, 0
        for name, (shape, number, offset) in told.items():
            type_, block, size = _type(number, f"{self.path}: {name}")
            if shape[-1] % block:
                raise self._damaged(f"{name} is {type_}, but {shape[-1]} is no multiple of {block}")
            if offset != end:
                raise self._damaged(f"{name} begins at {offset}, not at {end}")
            length = math.prod(shape) // block * size
            if first + offset + length > self.size:
                raise self._cut_short(name)
            row = length // shape[0] if length else 0
            tensors[name] = Tensor(self.path, type_, shape, first + offset, row)
            end = _up(offset + length, alignment)
        return tensors

    def _value(self, kind: int) -> Any:
        if kind == STRING:
            return self._text()
        if kind == BOOL:
            return bool(self._scalar("<u1"))
        if kind == ARRAY:
            kind, count = self._scalar("<u4"), self._scalar("<u8")
            if kind == STRING:
                return self._strings(count)
            dtype = np.dtype("<u1" if kind == BOOL else self._code(kind))
            return np.frombuffer(self._bytes(count * dtype.itemsize), dtype)
        return self._scalar(self._code(kind))

    def _code(self, kind: int) -> str:
        if kind not in SCALARS:
            raise self._damaged(f"a metadata value is of type {kind}, which is not known")
        return SCALARS[kind]

    def _scalar(self, code: str) -> Any:
        value = np.frombuffer(self._bytes(int(code[2])), code)[0]
        # The shortest decimal that is this float32: 1e-6, not 9.99999997e-7.
        return float(str(value)) if code == "<f4" else value.item()

    def _bytes(self, count: int) -> bytes:
        if count > self.size - self.file.tell():
            raise self._cut_short("its header")
        return self.file.read(count)

    def _text(self) -> str:
        return self._bytes(self._scalar("<u8")).decode("utf-8", "replace")

    def _name(self) -> str:
        """A name that can be told in one line."""
        text = self._text()
        if len(text) > LONGEST:
            raise self._damaged(f"a name of {len(text)} characters")
        return text if text.isprintable() else ascii(text)[1:-1]

    def _strings(self, count: int) -> list[bytes]:
        """A vocabulary has 150,000, its merges too: nothing is called that need not be."""
        self._bytes(0 if 8 * count <= self.size else self.size + 1)
        read, length = self.file.read, struct.Struct("<Q").unpack
        texts = []
        left = self.size - self.file.tell()
        for _ in range(count):
            if left < 8:
                raise self._cut_short("its header")
            (size,) = length(read(8))
            left -= 8 + size
            if left < 0:
                raise self._cut_short("its header")
            texts.append(read(size))
        return texts

    def _damaged(self, why: str) -> UserError:
        return UserError(f"{self.path}: damaged, or no GGUF file that llama.cpp would read: {why}")

    def _cut_short(self, what: str) -> UserError:
        return UserError(f"{self.path}: ends within {what}; it was cut short")


def _up(offset: int, alignment: int) -> int:
    return -(-offset // alignment) * alignment


def _type(number: int, where: str) -> tuple[str, int, int]:
    """Name, values in a block and bytes of a block of a ggml type."""
    gguf = package()
    try:
        known = gguf.GGMLQuantizationType(number)
    except ValueError:
        raise UserError(
            f"{where} is of ggml type {number}, which the installed gguf package does not know"
        ) from None
    return known.name, *gguf.GGML_QUANT_SIZES[known]


@cache
def decodes(type_: str) -> bool:
    """Whether the ``gguf`` package can turn a ggml type into float32."""
    gguf = package()
    known = gguf.GGMLQuantizationType[type_]
    block = np.zeros((1, gguf.GGML_QUANT_SIZES[known][1]), np.uint8)
    try:
        gguf.dequantize(block, known)
    except NotImplementedError:
        return False
    return True


def decode(raw: np.ndarray, type_: str) -> np.ndarray:
    """Rows of bytes as rows of float32. Every pattern of bits is a number or NaN."""
    gguf = package()
    with np.errstate(all="ignore"):  # a damaged scale may be infinite
        return gguf.dequantize(raw, gguf.GGMLQuantizationType[type_])
