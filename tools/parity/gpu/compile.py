"""Compiling for a named GPU, with no GPU and no driver: XLA's CUDA compiler is in two wheels, and
what it needs to know of a device is written down here.

It is the compiler alone: no kernel is timed (``xla_gpu_autotune_level`` 0), so tiles are XLA's
first choice, where a run on hardware would try several.
"""

import importlib.metadata
import re
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

FILES = (
    "*_gpu_after_optimizations.txt",
    "*.thunk_sequence.txt",
    "*-buffer-assignment.txt",
    "*.ptx",
)
LAUNCH = re.compile(
    r"\d+: (?P<kind>k\w+)\s+\[.*?\] (?P<kernel>[\w.\-]+)"
    r"(?: grid: \[(?P<grid>[\d, ]+)\] threads: \[(?P<threads>[\d, ]+)\]"
    r"\s+shared_memory: (?P<shared>\d+) bytes)?"
)
ALLOCATION = re.compile(r"allocation (\d+): size (\d+)")
VALUE = re.compile(r" value: <\d+ ([\w.\-]+(?:\{\d*\})?) @\d+> \(size=\d+,offset=(\d+)\)")


@dataclass(frozen=True)
class Launch:
    """One step of a program, in the order in which they run.

    Attributes:
        kind: XLA's name of it: "kCustomKernel" is a kernel of the program's own.
        grid, threads: (x, y, z); blocks, and threads in each.
        shared: bytes of shared memory that the launch adds to what the kernel declares.
    """

    kind: str
    kernel: str
    grid: tuple[int, ...]
    threads: tuple[int, ...]
    shared: int


@dataclass(frozen=True)
class Compiled:
    """A program as XLA compiled it.

    Attributes:
        launches: its steps, in the order in which they run.
        allocations: bytes of each.
        buffers: what an HLO instruction computes, "name" or of a tuple "name{0}" -> (allocation,
            offset in it).
    """

    module: hlo.Module
    kernels: Mapping[str, ptx.Kernel]
    launches: tuple[Launch, ...]
    allocations: Mapping[int, int]
    buffers: Mapping[str, tuple[int, int]]

    @classmethod
    def read(cls, folder: Path) -> "Compiled":
        """What XLA leaves in ``xla_dump_to``; only those files are needed."""
        (module,), (sequence,), (assignment,), files = (
            [file.read_text("utf-8") for file in sorted(folder.glob(name))] for name in FILES
        )
        kernels = {kernel.name: kernel for file in files for kernel in ptx.kernels(file)}
        return cls(hlo.Module(module), kernels, tuple(launches(sequence)), *buffers(assignment))


def launches(text: str) -> list[Launch]:
    """The steps of XLA's ``thunk_sequence``."""

    def triple(numbers: str | None) -> tuple[int, ...]:
        return tuple(map(int, (numbers or "0, 0, 0").split(",")))

    return [
        Launch(
            m["kind"], m["kernel"], triple(m["grid"]), triple(m["threads"]), int(m["shared"] or 0)
        )
        for m in map(LAUNCH.search, text.splitlines())
        if m
    ]


def buffers(text: str) -> tuple[dict[int, int], dict[str, tuple[int, int]]]:
    """XLA's buffer assignment: the size of each allocation, and what lies where."""
    allocations, found, number = dict[int, int](), dict[str, tuple[int, int]](), 0
    for line in text.splitlines():
        if head := ALLOCATION.match(line):
            number = int(head[1])
            allocations[number] = int(head[2])
        elif value := VALUE.match(line):
            found[value[1]] = number, int(value[2])
        elif not line.strip():
            break  # what follows says the same in another order
    return allocations, found


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
