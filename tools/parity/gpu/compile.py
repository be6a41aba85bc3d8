"""Compiling for a named GPU, with no GPU and no driver: XLA's CUDA compiler is in two wheels, and
what it needs to know of a device is written down here.

It is the compiler alone: no kernel is timed (``xla_gpu_autotune_level`` 0), so tiles are XLA's
first choice, where a run on hardware would try several.
"""

import importlib.metadata
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import jax
from jax.experimental import topologies
from jax.sharding import SingleDeviceSharding

from qwen_jax import runtime
from stages.errors import UserError
from tools.parity.gpu import COMMON, TARGETS, hlo, ptx
from tools.parity.programs import Part

EXTRA = ("jax-cuda12-plugin", "jax-cuda12-pjrt")

FILES = ("*_gpu_after_optimizations.txt", "*.ptx")


@dataclass(frozen=True)
class Compiled:
    """A program as XLA compiled it: its optimised HLO, and its kernels in PTX by name."""

    module: hlo.Module
    kernels: Mapping[str, ptx.Kernel]

    @classmethod
    def read(cls, folder: Path) -> "Compiled":
        """What XLA leaves in ``xla_dump_to``; only ``FILES`` are needed."""
        (module,), files = (
            [file.read_text("utf-8") for file in sorted(folder.glob(name))] for name in FILES
        )
        kernels = {kernel.name: kernel for file in files for kernel in ptx.kernels(file)}
        return cls(hlo.Module(module), kernels)


def versions() -> dict[str, str]:
    """Of what compiles.

    Raises:
        UserError: the extra is not installed.
    """
    try:
        return {name: importlib.metadata.version(name) for name in ("jax", "jaxlib", *EXTRA)}
    except importlib.metadata.PackageNotFoundError as error:
        raise UserError(
            f"--aot: {error.name} is not installed; pip install 'qwen-jax-stages[aot]'"
        ) from None


def device(target: str) -> jax.Device:
    """The GPU that is compiled for. It can hold no array.

    Raises:
        UserError: the plugin does not start.
    """
    versions()
    config = f'gpu_device_info {{ {COMMON} {TARGETS[target]} }} platform_name: "CUDA"'
    try:
        topology = topologies.get_topology_desc("", "cuda", topology="1x1x1", target_config=config)
    except (NotImplementedError, RuntimeError) as error:
        raise UserError(f"--aot {target}: {str(error).splitlines()[0]}") from None
    return topology.devices[0]


def compiled(
    part: Part, where: jax.Device, triton: bool = True, dump: Path | None = None
) -> Compiled:
    """Compile one program for a device.

    Arguments:
        where: of ``device``.
        triton: whether products may be Triton kernels, or else calls of cuBLAS.
        dump: an empty directory that XLA's own files are left in.
    """
    if dump is None:
        with tempfile.TemporaryDirectory() as folder:
            return compiled(part, where, triton, Path(folder))
    placed = SingleDeviceSharding(where)
    arguments = jax.tree.map(
        lambda each: jax.ShapeDtypeStruct(each.shape, each.dtype, sharding=placed), part.arguments
    )
    options = {
        "xla_dump_to": str(dump),
        "xla_dump_hlo_as_text": True,
        "xla_gpu_autotune_level": 0,
        "xla_gpu_enable_triton_gemm": triton,
    }
    with runtime.numerics(None):
        lowered = part.function.trace(*arguments).lower(lowering_platforms=("cuda",))
        lowered.compile(compiler_options=options)
    return Compiled.read(dump)
