"""A model as an orbax checkpoint: reading some rows, restoring it to any sharding, writing it.

The directory holds what belongs to the model (``config.json``, the tokenizer), ``params/``, which
is one orbax checkpoint with the tree of the Hugging Face names, and ``orbax.json``, which lists the
files and their sizes. Rows are read by TensorStore, in whose format orbax stores arrays; neither
orbax nor jax is imported for that.
"""

import json
import math
import os
import re
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from qwen_jax.config import from_hf
from qwen_jax.weights.base import Weights, misfits, some
from qwen_jax.weights.huggingface import FLOATS, INDEX, SINGLE
from stages.disk import check_regular, read_json
from stages.errors import UserError

if TYPE_CHECKING:
    import jax
    from jax.sharding import Sharding

PARAMS, MARK = "params", "orbax.json"
SCHEMA, KIND = 1, "qwen2-orbax-model"
HEADER = "/zarr.json"  # of an array, in Zarr 3
CHUNK = 4 << 20  # bytes: what TensorStore reads at least, some whole rows of a tensor
WRITE = 64 << 20  # bytes that are handed to TensorStore at once
CACHE = 4 * CHUNK  # bytes of chunks that are kept, for rows that are read a few at a time
ORBAX_FILES = ("_METADATA", "_CHECKPOINT_METADATA", "orbax.checkpoint")


def is_orbax(directory: Path) -> bool:
    """Whether this is an orbax checkpoint, of ours or any other, and none of Hugging Face."""
    if (directory / SINGLE).exists() or (directory / INDEX).exists():
        return False
    places = [directory, *(path for path in directory.glob("*") if path.is_dir())]
    return (directory / MARK).exists() or any(
        (place / name).exists() for place in places for name in ORBAX_FILES
    )


class OrbaxWeights(Weights):
    """One directory that ``write`` has made, checked against its config when it is opened.

    Raises:
        UserError: another orbax checkpoint, damaged files, or tensors that do not fit the config.
    """

    directory: Path

    def __init__(self, directory: Path, name: str | None = None) -> None:
        super().__init__()
        self.directory = directory
        self.name = name or directory.resolve().name
        self._stores: dict[str, Any] = {}
        _check_files(directory)
        config_path = directory / "config.json"
        self.config = from_hf(read_json(config_path), str(config_path))
        found = {}
        for key in self._list():
            if key.endswith(HEADER):
                store = self._open(key.removesuffix(HEADER))
                dtype = store.dtype.numpy_dtype.name
                found[key.removesuffix(HEADER)] = (tuple(store.shape), dtype)
        if problems := misfits(self.shapes, found, FLOATS.values()):
            raise UserError(f"{directory}: weights do not fit config.json: {problems}")

    @cached_property
    def _context(self) -> Any:
        import tensorstore

        return tensorstore.Context({"cache_pool": {"total_bytes_limit": CACHE}})

    def _list(self) -> list[str]:
        import tensorstore

        try:
            store = tensorstore.KvStore.open(_kvstore(self.directory / PARAMS)).result()
            keys = store.list().result()
        except Exception as error:  # its kinds depend on what is damaged
            raise self._unreadable(error) from None
        return [key.decode() for key in keys]

    def _open(self, name: str) -> Any:
        import tensorstore

        if name not in self._stores:
            spec = _array(self.directory / PARAMS, name) | {"fill_missing_data_reads": False}
            try:
                opened = tensorstore.open(spec, context=self._context, read=True).result()
            except Exception as error:
                raise self._unreadable(error) from None
            self._stores[name] = opened
        return self._stores[name]

    def _unreadable(self, error: Exception) -> UserError:
        return UserError(f"{self.directory / PARAMS}: cannot be read: {_plain(error)}")

    def dtype(self, name: str) -> np.dtype:
        return self._open(name).dtype.numpy_dtype

    def fill(self, name: str, start: int, out: np.ndarray) -> None:
        store = self._open(name)
        try:
            out[...] = store[start : start + len(out)].read().result()
        except Exception as error:
            raise self._unreadable(error) from None

    def restore(self, shardings: "Mapping[str, Sharding]") -> "dict[str, jax.Array]":
        """The named tensors, each as one array that lies as its sharding says: every device's part
        is read for that device alone, by orbax; nothing is put together on the host.

        Raises:
            KeyError: no such tensor.
            ValueError: a sharding that does not divide its tensor.
            UserError: the files are damaged.
        """
        import jax
        import orbax.checkpoint as ocp
        from flax.traverse_util import flatten_dict, unflatten_dict

        wanted = {
            name: jax.ShapeDtypeStruct(self.shapes[name], self.dtype(name), sharding=sharding)
            for name, sharding in shardings.items()
        }
        for leaf in wanted.values():
            leaf.sharding.shard_shape(leaf.shape)
        tree = unflatten_dict(wanted, sep=".")
        how = ocp.checkpoint_utils.construct_restore_args(tree)
        args = ocp.args.PyTreeRestore(tree, restore_args=how, partial_restore=True)
        with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as checkpointer:
            try:
                restored = checkpointer.restore((self.directory / PARAMS).resolve(), args=args)
            except Exception as error:
                raise self._unreadable(error) from None
        return flatten_dict(restored, sep=".")


def _plain(error: Exception) -> str:
    """A TensorStore error without the places in its source that follow."""
    return re.sub(r" \[[\w ]+='.*", "", " ".join(str(error).split()))


def _kvstore(params: Path) -> dict[str, Any]:
    """Where TensorStore finds the arrays: below their names."""
    return {"driver": "ocdbt", "base": {"driver": "file", "path": f"{params.resolve()}/"}}


def _array(params: Path, name: str) -> dict[str, Any]:
    return {"driver": "zarr3", "kvstore": _kvstore(params) | {"path": name + "/"}}


def _check_files(directory: Path) -> None:
    """All files of ``params/`` are there and whole, as far as their sizes tell."""
    mark = directory / MARK
    check_regular(mark)
    if not mark.exists():
        raise UserError(
            f"{directory} is an orbax checkpoint, but none of a whole model that python -m "
            f"tools.convert has written: it has no {MARK}"
        )
    told = read_json(mark)
    if (told.get("kind"), told.get("schema")) != (KIND, SCHEMA):
        raise UserError(
            f"{mark}: kind {told.get('kind')!r}, schema {told.get('schema')!r}; "
            f"expected {KIND!r}, {SCHEMA}"
        )
    files = told.get("files")
    if not isinstance(files, dict):
        raise UserError(f"{mark}: expected 'files', an object of sizes")
    found = _sizes(directory / PARAMS)
    if torn := sorted(name for name, size in files.items() if found.get(name) != size):
        raise UserError(
            f"{directory / PARAMS}: {some(torn, 'file')} missing or cut short; copy or convert the "
            "model again"
        )


def _sizes(directory: Path) -> dict[str, int]:
    files = (path for path in directory.rglob("*") if path.is_file())
    return {path.relative_to(directory).as_posix(): path.stat().st_size for path in sorted(files)}


def write(directory: Path, model: Weights) -> Iterator[int]:
    """Write a model's weights as one orbax checkpoint, in bounded memory, and then the list of its
    files. Yields the bytes written, block by block.

    orbax holds all of a tensor, and its chunks are neither whole rows nor have a checksum. So it
    saves the tree with a byte for each tensor, and TensorStore puts an array of the tensor's shape
    there and fills it, some rows at a time.

    Raises:
        OSError: writing failed; what is there is no checkpoint.
        UserError: an orbax that does not see the arrays.
    """
    params = (directory / PARAMS).resolve()
    try:
        with ThreadPoolExecutor(1) as pool:  # an interrupt waits for it; orbax's threads go on
            arrays = pool.submit(_make_arrays, params, model).result()
        for name, array in arrays.items():
            chunk = array.chunk_layout.write_chunk.shape[0]
            row = math.prod(array.shape[1:]) * model.dtype(name).itemsize
            for start, rows in model.blocks(name, chunk * max(1, WRITE // (chunk * row))):
                write_rows(array, start, rows, chunk)
                yield rows.nbytes
    except (ValueError, RuntimeError) as error:  # TensorStore's, an error of the system among them
        code = re.search(r"os_error_code='(\d+)'", str(error))
        why = os.strerror(int(code[1])) if code else _plain(error)
        raise OSError(why) from None
    told = {"schema": SCHEMA, "kind": KIND, "files": _sizes(params)}
    (directory / MARK).write_text(json.dumps(told, indent=1) + "\n", encoding="utf-8")


def write_rows(array: Any, start: int, rows: np.ndarray, chunk: int) -> None:
    """Fill rows of an array, its chunks at once, and leave nothing that still writes.

    The future of a write has an error as soon as one chunk has; the others go on by themselves, and
    would make files below a directory that is being removed. So each chunk has its own.

    Raises:
        ValueError, RuntimeError: TensorStore's.
    """
    parts = [(start + i, rows[i : i + chunk]) for i in range(0, len(rows), chunk)]
    writing = [array[i : i + len(part)].write(part) for i, part in parts]
    try:
        for each in writing:
            each.result()
    finally:
        for each in writing:
            each.exception()  # waits for its end


def _make_arrays(params: Path, model: Weights) -> dict[str, Any]:
    """An orbax checkpoint of a model's tree, and its arrays by name, which have no content yet.

    Raises:
        UserError: orbax does not see these arrays: it has what belongs to them elsewhere, too.
    """
    import orbax.checkpoint as ocp
    import tensorstore
    from flax.traverse_util import flatten_dict, unflatten_dict

    tree = unflatten_dict(dict.fromkeys(model.shapes, np.zeros(1, np.uint8)), sep=".")
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler(use_zarr3=True)) as checkpointer:
        checkpointer.save(params, args=ocp.args.PyTreeSave(tree))
        # One cache, and all at once: a few files in all. Else there are a hundred for each array.
        context = tensorstore.Context({"cache_pool": {"total_bytes_limit": CACHE}})
        opening = {
            name: tensorstore.open(
                _array(params, name) | _layout(shape, model.dtype(name)),
                context=context,
                create=True,
                delete_existing=True,
            )
            for name, shape in model.shapes.items()
        }
        arrays = {name: array.result() for name, array in opening.items()}
        seen = flatten_dict(checkpointer.metadata(params).item_metadata.tree, sep=".")
    if {name: (tuple(each.shape), each.dtype) for name, each in seen.items()} != {
        name: (shape, model.dtype(name)) for name, shape in model.shapes.items()
    }:
        raise UserError(
            f"orbax-checkpoint {ocp.__version__} does not see the arrays that TensorStore makes; "
            "install a version that pyproject.toml names"
        )
    return arrays


def _layout(shape: tuple[int, ...], dtype: np.dtype) -> dict[str, Any]:
    """How TensorStore is to lay an array out: in chunks of whole rows, each with a checksum."""
    count, *rest = shape
    row = math.prod(rest) * dtype.itemsize
    chunks = -(-count // min(count, max(1, CHUNK // row)))
    chunk = [-(-count // chunks), *rest]  # all alike, for the last one is stored whole
    metadata = {
        "shape": shape,
        "data_type": dtype.name,
        "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": chunk}},
        "codecs": [
            {"name": "bytes", "configuration": {"endian": "little"}},
            {"name": "crc32c"},  # damage is found when a chunk is read
        ],
    }
    # A chunk of zeros is stored as any other, for orbax takes one that is not there for damage.
    return {"metadata": metadata, "store_data_equal_to_fill_value": True}
