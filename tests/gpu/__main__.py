"""Compile the programs that the tests keep: ``python -m tests.gpu``, with the extra ``aot``."""

import tarfile
from pathlib import Path
from tempfile import TemporaryDirectory

import jax

from qwen_jax import runtime
from qwen_jax.weights import open_model
from tests.gpu.programs import DTYPES, KEPT, layers, planted
from tests.tiny import write_checkpoint
from tools.parity.gpu.compile import FILES, compiled, device

TARGET = "h100"


def main() -> None:
    """Keep of each program those of XLA's files that are read."""
    runtime.for_a_command("cpu")
    where = device(TARGET)
    with TemporaryDirectory() as folder:
        model = open_model(write_checkpoint(Path(folder)))
        wanted = {
            f"{part.name}-{dtype}": (part, "highest")
            for dtype in DTYPES
            for part in layers(model, dtype).values()
        }
        wanted |= {name: (each.part, each.precision) for name, each in planted(model).items()}
        with tarfile.open(KEPT, "w:xz", preset=9) as file:
            for name, (part, precision) in wanted.items():
                with TemporaryDirectory() as dump, jax.default_matmul_precision(precision):
                    compiled(part, where, dump=Path(dump))
                    for path in (p for files in FILES for p in sorted(Path(dump).glob(files))):
                        entry = tarfile.TarInfo(f"{name}/{path.name}")  # of no date
                        entry.size = path.stat().st_size
                        with path.open("rb") as content:
                            file.addfile(entry, content)


if __name__ == "__main__":
    main()
