"""``python -m tools.convert SOURCE DESTINATION``: a model between Hugging Face and orbax files.

SOURCE is whatever ``--model`` takes: a Hugging Face directory or hub id, an orbax directory made by
this command, a GGUF file, or synthetic:SIZE. Weights go over bit for bit, some rows at a time, and
are read back and compared before DESTINATION gets its name; config.json and the tokenizer go along
as they are. What a GGUF file has quantised becomes float32.
"""

import argparse
import logging
import math
import os
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Literal

from qwen_jax import cli
from qwen_jax.weights import UNFINISHED, huggingface, open_model, orbax
from qwen_jax.weights.base import Weights
from stages.entry import Entry
from stages.errors import UserError
from stages.lock import lock

FORMATS = {"hf": "Hugging Face safetensors", "orbax": "orbax"}


class ConvertResult(Entry, frozen=True):
    """``tools.convert --json``; ``bytes`` are those of the tensors."""

    schema: Literal[1]
    source: str
    destination: str
    format: Literal["hf", "orbax"]
    tensors: int
    bytes: int
    seconds: float


def parser() -> argparse.ArgumentParser:
    result = cli.Parser(prog="tools.convert", description=__doc__)
    add = result.add_argument
    add("source", metavar="SOURCE", help="as --model of the other commands")
    add("destination", metavar="DESTINATION", type=Path, help="a directory that does not exist yet")
    add("--to", choices=tuple(FORMATS), help="default: orbax for a Hugging Face source, else hf")
    cli.add_json(result)
    return result


def main(argv: list[str]) -> int:
    args = parser().parse_args(argv)
    began = time.perf_counter()
    logging.getLogger("absl").setLevel(logging.CRITICAL)  # orbax's, with a stack for a full disk
    refuse_existing(args.destination)
    model = open_model(args.source)
    to: Literal["hf", "orbax"] = args.to or (
        "orbax" if isinstance(model, huggingface.HuggingFaceWeights) else "hf"
    )
    size = sum(math.prod(s) * model.dtype(name).itemsize for name, s in model.shapes.items())
    check_space(args.destination, size)
    with unfinished(args.destination) as directory, cli.progress("MB") as bar:
        task = bar.add_task("writing", total=round(2 * size / 1e6))
        convert(model, to, directory, lambda count: bar.advance(task, count / 1e6))
        bar.update(task, description="reading back")
        read_back(model, to, directory, lambda count: bar.advance(task, count / 1e6))
    seconds = time.perf_counter() - began
    data = ConvertResult(
        schema=1,
        source=args.source,
        destination=str(args.destination),
        format=to,
        tensors=len(model.shapes),
        bytes=size,
        seconds=round(seconds, 3),
    )
    cli.report(args.json, data).print(
        f"{args.destination}/: {FORMATS[to]}, {len(model.shapes)} tensors, {cli.size(size)}, "
        f"read back and compared, in {seconds:.1f} s"
    )
    return 0


def refuse_existing(destination: Path) -> None:
    if destination.exists() or destination.is_symlink():
        raise UserError(f"{destination} already exists; choose a new directory")
    if not destination.absolute().parent.is_dir():
        raise UserError(f"no such directory: {destination.absolute().parent}")


def check_space(destination: Path, size: int) -> None:
    """Refuse what the disk cannot hold before anything is written."""
    free = shutil.disk_usage(destination.absolute().parent).free
    if size > free:
        raise UserError(
            f"{destination}: the model needs {cli.size(size)}, the disk has {cli.size(free)} free; "
            "choose another disk"
        )


@contextmanager
def unfinished(destination: Path) -> Iterator[Path]:
    """A directory beside ``destination`` that becomes it if all goes well, and goes if not.

    Raises:
        UserError: writing failed, or another process is at it.
    """
    directory = destination.with_name(destination.name + ".partial")
    try:
        directory.mkdir()
    except FileExistsError:
        if directory.is_symlink() or not (directory / UNFINISHED).is_file():
            raise UserError(f"{directory} is in the way; remove it") from None
    except OSError as error:
        raise UserError(f"{directory}: {error.strerror}") from None
    if (directory / UNFINISHED).is_symlink():
        raise UserError(f"{directory / UNFINISHED} is a link; remove it")
    (directory / UNFINISHED).touch()
    descriptor = lock(directory, f"{directory}: another process is converting there")
    try:
        _clear(directory)  # of a process that was killed
        yield directory
        (directory / UNFINISHED).unlink()
        directory.rename(destination)
    except OSError as error:
        why = error.strerror or str(error)
        kept = "nothing was kept" if _removed(directory) else f"{directory} is left; remove it"
        raise UserError(f"{destination}: writing stopped: {why}; {kept}") from None
    finally:
        os.close(descriptor)
        _removed(directory)


def _removed(directory: Path) -> bool:
    """Remove it; whether it is gone."""
    if directory.exists():
        with suppress(OSError):
            _clear(directory)
            (directory / UNFINISHED).unlink()
            directory.rmdir()
    return not directory.exists()


def _clear(directory: Path) -> None:
    for path in directory.iterdir():
        if path.is_dir():
            shutil.rmtree(path)
        elif path.name != UNFINISHED:
            path.unlink()


def convert(model: Weights, to: str, directory: Path, wrote: Callable[[int], None]) -> None:
    """Write weights and companions; config.json last, for without it nothing is a model."""
    write = orbax.write if to == "orbax" else huggingface.write
    for count in write(directory, model):
        wrote(count)
    for name, content in reversed(model.companions().items()):
        (directory / name).write_bytes(content)


def read_back(model: Weights, to: str, directory: Path, read: Callable[[int], None]) -> None:
    """Open what was written as any command does, and compare the hash of every tensor.

    Raises:
        UserError: it is not what was read from the source.
    """
    written: Weights = (
        orbax.OrbaxWeights(directory)
        if to == "orbax"
        else huggingface.HuggingFaceWeights(directory)
    )
    for name in model.shapes:
        if written.hash(name) != model.value_hash(name):
            raise UserError(f"{directory}: {name} reads back otherwise than it was written")
        read(math.prod(model.shapes[name]) * model.dtype(name).itemsize)


if __name__ == "__main__":
    cli.run(main)
