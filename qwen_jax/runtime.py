"""How XLA is set up, in one place.

A library call changes no setting of the process: precision and 64-bit types are contexts, and what
XLA must not do is an option of each program. Commands may do more, see ``for_a_command``.
"""

import ctypes
import importlib.metadata
import os
import platform
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import cache
from typing import Any

import jax

from stages.errors import UserError
from stages.version import NAME, version

# Without this XLA keeps float32 precision inside bfloat16 fusions: a captured stage could be a
# value that the model never consumed, and compiled differs from un-jitted by whole bf16 steps.
OPTIONS = {"xla_allow_excess_precision": False}

# malloc.h of glibc: freed memory stays with the process, in one heap for all threads. Every layer's
# stages are freed and allocated anew, and pages fresh from the system cost a third of a forward.
MALLOPT = {"M_MMAP_THRESHOLD": (-3, 1 << 30), "M_TRIM_THRESHOLD": (-1, -1), "M_ARENA_MAX": (-8, 1)}


def compiler_options() -> dict[str, Any]:
    """``OPTIONS``, but for what the user has set in ``XLA_FLAGS``."""
    flags = os.environ.get("XLA_FLAGS", "")
    return {name: value for name, value in OPTIONS.items() if f"--{name}=" not in flags}


@contextmanager
def numerics(precision: str | None = "highest") -> Iterator[None]:
    """Every dtype of this project is explicit, so 64-bit types are what they say; and a float32
    product is one of float32, also on a GPU. ``precision`` None leaves that to the caller.

    JAX keeps both for each thread: a thread that places arrays needs this too.
    """
    with jax.enable_x64(True):
        if precision is None:
            yield
        else:
            with jax.default_matmul_precision(precision):
                yield


def for_a_command(device: str | None = None, cpu_devices: int | None = None) -> None:
    """What a process of our own may change: how it keeps freed memory, which backends JAX starts,
    and how many devices the CPU looks like, unless the user has said how many."""
    _keep_freed_memory()
    if device == "cpu":
        os.environ.setdefault("JAX_PLATFORMS", "cpu")
        with suppress(RuntimeError):  # JAX has read the environment already, and may have started
            jax.config.update("jax_platforms", os.environ["JAX_PLATFORMS"])
    flags = os.environ.get("XLA_FLAGS", "")
    counted = "JAX_NUM_CPU_DEVICES" in os.environ or "host_platform_device_count" in flags
    if cpu_devices and not counted:
        with suppress(RuntimeError):  # JAX has started already, with the devices that it has
            jax.config.update("jax_num_cpu_devices", cpu_devices)


def _keep_freed_memory() -> None:
    with suppress(AttributeError, OSError, TypeError):  # another C library
        mallopt = ctypes.CDLL(None).mallopt
        for name, value in MALLOPT.values():
            mallopt(name, value)


def pick_device(kind: str | None = None) -> jax.Device:
    """The first JAX device: "cpu", "gpu" or the best (None).

    Raises:
        UserError: there is none.
    """
    return devices(kind)[0]


def devices(kind: str | None) -> list[jax.Device]:
    """The JAX devices of one kind, those of all processes.

    Raises:
        UserError: there are none.
    """
    try:
        return jax.devices(kind)
    except RuntimeError as error:
        found = ", ".join(sorted({d.platform for d in jax.devices()}))
        why = str(error).splitlines()[0]
        raise UserError(f"--device {kind}: JAX finds only {found} here ({why})") from None


def cpu_count() -> int | None:
    """The cores that this process may use, where the system tells."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else None


_version = cache(importlib.metadata.version)  # which looks through every installed package


def describe(device: jax.Device, precision: str = "highest") -> dict[str, Any]:
    """What a manifest says about the machine and the libraries."""
    packages = ("jax", "jaxlib", "numpy")
    options = [f"--{name}={str(value).lower()}" for name, value in compiler_options().items()]
    flags = [*os.environ.get("XLA_FLAGS", "").split(), *options]
    return {
        "device": f"{device.platform}: {device.device_kind}",
        "cpu_count": cpu_count(),
        "flags": " ".join(flags),
        "matmul_precision": precision,
        "versions": {name: _version(name) for name in packages}
        | {"python": platform.python_version(), NAME: version()},
    }


def even_step(count: int, most: int) -> int:
    """How many of ``count`` to take at a time, ``most`` at most. All steps have one size where that
    takes at most twice as many: another size would be another program to compile."""
    steps = -(-count // max(1, most))
    return -(-count // next((n for n in range(steps, 2 * steps + 1) if count % n == 0), steps))
