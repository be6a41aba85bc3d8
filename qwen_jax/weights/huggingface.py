"""Hugging Face checkpoints: are all tensors there, in which shard, reading and writing them.

Imports neither jax nor torch.
"""

import json
import math
import os
import re
from collections import Counter
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import safetensors
import xxhash

from qwen_jax.config import from_hf
from qwen_jax.weights.base import BLOCK, COMPANIONS, Weights, misfits, raw_bytes, some
from qwen_jax.weights.files import Files
from stages.disk import check_regular, read_json
from stages.errors import UserError
from stages.files import numpy_dtype

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
SHARD = 5 * 10**9  # most bytes of one file, as transformers 4 writes them
FLOATS = {"F32": "float32", "BF16": "bfloat16", "F16": "float16"}


class HuggingFaceWeights(Weights):
    """One checkpoint directory, checked against its config when it is opened.

    Raises:
        UserError: nothing there, unreadable, or tensors that do not fit the config.
    """

    directory: Path

    def __init__(self, directory: Path, name: str | None = None) -> None:
        super().__init__()
        if directory.is_file():
            raise UserError(f"{directory} is a file; expected a model directory or FILE.gguf")
        if not directory.is_dir():
            raise UserError(f"no such model directory: {directory}")
        self.directory = directory
        self.name = name or directory.resolve().name
        config_path = directory / "config.json"
        if not config_path.exists():
            raise UserError(f"{directory} has no config.json; expected a Hugging Face model")
        self.config = from_hf(read_json(config_path), str(config_path))
        self._files = self._locate()
        self._dtypes: dict[str, np.dtype] = {}
        self._places: dict[str, int] = {}  # where a tensor's bytes begin in its file
        self._check()

    def _locate(self) -> dict[str, Path]:
        """Tensor name -> the file that holds it."""
        single, index = self.directory / SINGLE, self.directory / INDEX
        if single.exists() and index.exists():
            raise UserError(
                f"{self.directory} has both {SINGLE} and {INDEX}; keep the one you mean"
            )
        if index.exists():
            return self._locate_shards(index)
        if not single.exists():
            raise UserError(f"{self.directory} has neither {SINGLE} nor {INDEX}")
        return dict.fromkeys(_keys(single), single)

    def _locate_shards(self, index: Path) -> dict[str, Path]:
        told = read_json(index).get("weight_map")
        if not isinstance(told, dict) or not all(isinstance(s, str) for s in told.values()):
            raise UserError(f"{index}: expected 'weight_map', an object of file names")
        shards = sorted(set(told.values()))
        outside = [s for s in shards if s != Path(s).name or s == ".."]
        if outside:
            raise UserError(f"{index} names a file outside its directory: {outside[0]!r}")
        absent = [s for s in shards if not (self.directory / s).exists()]
        if absent:
            raise UserError(f"{self.directory}: missing {some(absent, 'shard')} of {INDEX}")
        found = {shard: set(_keys(self.directory / shard)) for shard in shards}
        lost = sorted(name for name, shard in told.items() if name not in found[shard])
        if lost:
            raise UserError(f"{index} lists {some(lost, 'tensor')} that its shard lacks")
        counted = Counter(name for names in found.values() for name in names)
        twice = sorted(name for name, count in counted.items() if count > 1)
        if twice:
            raise UserError(f"{self.directory}: {some(twice, 'tensor')} in two shards")
        return {name: self.directory / s for s, names in found.items() for name in names}

    def _check(self) -> None:
        expected = dict(self.shapes)
        needless = self._needless_heads()
        expected |= {head: expected[held] for head, held in needless.items()}
        found = [name for name in self._files if not name.endswith("rotary_emb.inv_freq")]
        headers = {name: (shape, dtype) for name, shape, dtype in self._headers(found)}
        if problems := misfits(expected, headers, FLOATS):
            raise UserError(f"{self.directory}: weights do not fit config.json: {problems}")
        self._dtypes = {name: numpy_dtype(FLOATS[dtype]) for name, (_, dtype) in headers.items()}
        self._opened = Files(set(self._files.values()))
        for path in self._opened.states:
            self._places |= _places(path)
        for head, held in needless.items():
            # Equal hashes are equal bits; that holds for NaN too, and for a block at a time.
            if self._content(head, expected[head]) != self._content(held, expected[held]):
                raise UserError(
                    f"{self.directory}: config.json ties the head to the embedding, but {head} "
                    "is there and differs from it"
                )

    def _needless_heads(self) -> dict[str, str]:
        """Tensors that a tied model need not have, but some files do -> what they repeat."""
        arch, tied = self.config.arch, self.config.tie_word_embeddings
        return {
            p.tensor_name(None): arch.parameter[p.tied_to].tensor_name(None)
            for p in arch.parameters
            if p.tied_to and tied and p.tensor_name(None) in self._files
        }

    def _content(self, name: str, shape: tuple[int, ...]) -> str:
        digest, step = xxhash.xxh3_64(), max(1, BLOCK // (shape[1] * self.dtype(name).itemsize))
        for start in range(0, shape[0], step):
            rows = np.empty((min(step, shape[0] - start), *shape[1:]), self.dtype(name))
            self.fill(name, start, rows)
            digest.update(raw_bytes(rows))
        return digest.hexdigest()

    def _headers(self, names: Collection[str]) -> Iterator[tuple[str, tuple[int, ...], str]]:
        """Name, shape and dtype of tensors; every shard is opened once."""
        for path in dict.fromkeys(self._files[name] for name in names):
            with _open(path) as file:
                for name in [name for name in names if self._files[name] == path]:
                    view = file.get_slice(name)
                    yield name, tuple(view.get_shape()), view.get_dtype()

    def dtype(self, name: str) -> np.dtype:
        return self._dtypes[name]

    def fill(self, name: str, start: int, out: np.ndarray) -> None:
        """Read straight into ``out``: a mapped file would be copied from, and count as memory."""
        at = self._places[name] + start * (out.nbytes // len(out))
        self._opened.read(self._files[name], at, out, name)


def _open(path: Path) -> safetensors.safe_open:
    check_regular(path)
    try:
        return safetensors.safe_open(path, framework="numpy")
    except (OSError, safetensors.SafetensorError) as error:
        raise UserError(f"{path} is not a whole safetensors file: {error}") from None


def _places(path: Path) -> dict[str, int]:
    """Tensor name -> offset in a file that safetensors has opened, and so checked: 8 bytes of
    length, a JSON header of that length, the tensors (huggingface/safetensors, README)."""
    with open(path, "rb") as file:
        length = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(length))
    header.pop("__metadata__", None)
    return {name: 8 + length + entry["data_offsets"][0] for name, entry in header.items()}


def _keys(path: Path) -> list[str]:
    with _open(path) as file:
        return list(file.keys())


def write(directory: Path, model: Weights, shard: int = SHARD) -> Iterator[int]:
    """Write a model's weights as Hugging Face lays them out, in bounded memory: one file, or files
    of ``shard`` bytes at most and their index. Yields the bytes written, block by block.

    Raises:
        OSError: writing failed; what is there is no checkpoint.
    """
    sizes = {name: math.prod(s) * model.dtype(name).itemsize for name, s in model.shapes.items()}
    files: list[list[str]] = [[]]
    room = shard
    for name, size in sizes.items():
        if size > room and files[-1]:
            files.append([])
            room = shard
        files[-1].append(name)
        room -= size
    count = len(files)
    paths = [f"model-{n:05d}-of-{count:05d}.safetensors" for n in range(1, count + 1)]
    if count == 1:
        paths = [SINGLE]
    for path, names in zip(paths, files, strict=True):
        yield from _write_file(directory / path, model, names)
    if count > 1:
        places = {name: path for path, names in zip(paths, files, strict=True) for name in names}
        index = {"metadata": {"total_size": sum(sizes.values())}, "weight_map": places}
        (directory / INDEX).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n")


def _write_file(path: Path, model: Weights, names: Collection[str]) -> Iterator[int]:
    """The header first, then the tensors as they are read: safetensors' own writer would need all
    of them in memory."""
    names = sorted(names, key=lambda name: -model.dtype(name).itemsize)  # so that all are aligned
    stored = {dtype: name for name, dtype in FLOATS.items()}
    # transformers asks for the format
    header: dict[str, dict[str, Any]] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name in names:
        shape, dtype = model.shapes[name], model.dtype(name)
        start, end = end, end + math.prod(shape) * dtype.itemsize
        header[name] = {"dtype": stored[dtype.name], "shape": shape, "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with open(path, "xb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name in names:
            for _, rows in model.blocks(name):
                file.write(raw_bytes(rows))
                yield rows.nbytes
        file.flush()
        os.fsync(file.fileno())


HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")
HUB_FILES = [*COMPANIONS, SINGLE, INDEX, "model-*.safetensors"]


def open_directory_or_hub(spec: str) -> HuggingFaceWeights:
    """A directory, or the hub's model of that id, which is downloaded to the user's cache.

    Raises:
        UserError: neither, or no whole checkpoint.
    """
    if not Path(spec).exists() and HUB_ID.fullmatch(spec):
        return HuggingFaceWeights(_download(spec), spec.rpartition("/")[2])
    return HuggingFaceWeights(Path(spec))


def _download(hub_id: str) -> Path:
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(hub_id, allow_patterns=HUB_FILES))
    except Exception as error:  # its own kinds, its HTTP library's and the file system's
        why = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise UserError(
            f"{hub_id}: neither a directory here nor to be had from the hub ({why})"
        ) from None
