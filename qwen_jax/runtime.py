"""How XLA is set up, in one place. Call ``configure`` before the first array is made.

The flags are read once, when JAX starts its backend; they go into every manifest.
"""

import ctypes
import importlib.metadata
import os
import platform
from contextlib import suppress
from typing import Any

from stages.errors import UserError

# Without this XLA keeps float32 precision inside bfloat16 fusions: a captured stage could be a
# value that the model never consumed, and compiled differs from un-jitted by whole bf16 steps.
FLAGS = {"xla_allow_excess_precision": "false"}

# On the CPU these two make compiled equal to un-jitted byte for byte, at some cost in speed: no
# fused multiply-add (AVX has none), and one GEMM and reduction library instead of two.
REFERENCE_FLAGS = {"xla_cpu_max_isa": "AVX", "xla_cpu_experimental_ynn_fusion_type": ""}

# malloc.h of glibc: freed memory stays with the process, in one heap for all threads. Every layer's
# stages are freed and allocated anew, and pages fresh from the system cost a third of a forward.
MALLOPT = {"M_MMAP_THRESHOLD": (-3, 1 << 30), "M_TRIM_THRESHOLD": (-1, -1), "M_ARENA_MAX": (-8, 1)}


def configure(device: str | None = None, reference: bool = False, cache: bool = True) -> Any:
    """``prepare``, and return the JAX device to use: "cpu", "gpu" or the best (None).

    Raises:
        UserError: the device is not there.
    """
    prepare(device, reference, cache)
    return devices(device)[0]


def prepare(
    device: str | None = None,
    reference: bool = False,
    cache: bool = True,
    cpu_devices: int | None = None,
) -> None:
    """Set the project's flags, without starting JAX's backend.

    A flag that is already in ``XLA_FLAGS`` stays as the user set it, and so do JAX's own variables
    for its persistent compilation cache. ``cache`` False compiles everything anew. The CPU is made
    to look like ``cpu_devices`` devices, unless the user has said how many.
    """
    flags = os.environ.get("XLA_FLAGS", "")
    for name, value in (FLAGS | (REFERENCE_FLAGS if reference else {})).items():
        if f"--{name}=" not in flags:
            flags = f"{flags} --{name}={value}".strip()
    os.environ["XLA_FLAGS"] = flags
    _keep_freed_memory()
    if device == "cpu":
        os.environ.setdefault("JAX_PLATFORMS", "cpu")

    import jax

    if not cache:
        jax.config.update("jax_enable_compilation_cache", False)
    elif not jax.config.jax_compilation_cache_dir:
        with suppress(ImportError):  # another JAX has other internals; it then compiles anew
            from qwen_jax import programs

            jax.config.update("jax_compilation_cache_dir", programs.use())
            jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    jax.config.update("jax_enable_x64", True)  # every dtype in this project is explicit
    jax.config.update("jax_default_matmul_precision", "highest")  # f32 means f32, also on a GPU
    counted = jax.config.jax_num_cpu_devices >= 0 or "host_platform_device_count" in flags
    if cpu_devices and not counted:
        with suppress(RuntimeError):  # JAX has started already, with the devices that it has
            jax.config.update("jax_num_cpu_devices", cpu_devices)


def _keep_freed_memory() -> None:
    with suppress(AttributeError, OSError, TypeError):  # another C library
        mallopt = ctypes.CDLL(None).mallopt
        for name, value in MALLOPT.values():
            mallopt(name, value)


def devices(device: str | None) -> list[Any]:
    """The JAX devices of one kind, those of all processes.

    Raises:
        UserError: there are none.
    """
    import jax

    try:
        return jax.devices(device)
    except RuntimeError as error:
        found = ", ".join(sorted({d.platform for d in jax.devices()}))
        why = str(error).splitlines()[0]
        raise UserError(f"--device {device}: JAX finds only {found} here ({why})") from None


def cpu_count() -> int | None:
    """The cores that this process may use, where the system tells."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else None


def describe(device: Any) -> dict[str, Any]:
    """What a manifest says about the machine and the libraries."""
    packages = ("jax", "jaxlib", "numpy")
    return {
        "device": f"{device.platform}: {device.device_kind}",
        "cpu_count": cpu_count(),
        "flags": os.environ.get("XLA_FLAGS", ""),
        "matmul_precision": "highest",
        "versions": {name: importlib.metadata.version(name) for name in packages}
        | {"python": platform.python_version()},
    }
