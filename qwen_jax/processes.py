"""Several processes that compute one trace: how they meet, keep in step and part.

JAX's own service brings them together and watches over them. Where all are at the same point each
tells whether it failed, and all end in order. Elsewhere a process that ends breaks the collective
that the others are in; JAX aborts them where that was process 0, which has the service.
"""

import atexit
import hashlib
import json
import os
import socket
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from types import TracebackType
from typing import Any

import numpy as np

from qwen_jax import cli
from stages.errors import UserError

HEARTBEAT = 10  # seconds without a sign of a process, until JAX aborts the others


class Group:
    """The processes of one trace, seen from one of them. A context manager around the whole run:
    on leaving it all are known to be done, or are told that one is not.

    Arguments:
        address: (host, port) at which process 0 is met.
        process, count: which one of how many this is.
        timeout: seconds to wait for the others.
    """

    def __init__(self, address: tuple[str, int], process: int, count: int, timeout: float) -> None:
        self.address, self.process, self.count, self.timeout = address, process, count, timeout
        self._joined = False
        self._in_step = False  # what all do next, together, is to ``meet`` or to ``compare``
        self._told = False  # all know that one has failed

    def join(self, arguments: dict[str, Any]) -> None:
        """Wait until all processes are there; from then on JAX sees the devices of all. Where they
        do not come in time this process ends, with one line and the exit code of a user error.

        Raises:
            UserError: not all have the same ``arguments``, or the address is of no use.
        """
        import jax

        host, port = self.address
        where = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
        if self.process == 0:
            _check_address(self.address, where)
        _free_stdout()
        late = f"error: not all of {self.count} processes came to --coordinator {where} within "
        late += f"{self.timeout:g} s; start every --process-id from 0 to {self.count - 1}"
        timer = threading.Timer(self.timeout, _leave, [UserError.exit_code, late])
        timer.daemon = True
        timer.start()
        # It would take SIGTERM for a notice to save and go on.
        jax.config.update("jax_enable_preemption_service", False)
        jax.distributed.initialize(
            where,
            self.count,
            self.process,
            initialization_timeout=int(self.timeout) + 60,  # it aborts: later than we end
            heartbeat_timeout_seconds=HEARTBEAT,
            coordinator_bind_address=where,
        )
        timer.cancel()
        self._joined = self._in_step = True
        self.compare("arguments", arguments)

    def gather(self, value: np.ndarray) -> np.ndarray:
        """The values of all processes, [process, ...]; all call this, with the same shape."""
        import jax
        from jax.experimental.multihost_utils import process_allgather
        from jax.sharding import Mesh, NamedSharding, PartitionSpec

        # Over one device of each: how many a process has may be what differs.
        first = {device.process_index: device for device in reversed(jax.devices())}
        mesh = Mesh(np.array([first[i] for i in range(self.count)]), ("process",))
        sharding = NamedSharding(mesh, PartitionSpec("process"))
        own = jax.make_array_from_process_local_data(sharding, value[None])
        return process_allgather(own, tiled=True)

    def compare(self, what: str, facts: dict[str, Any]) -> None:
        """All processes call this, with facts of the same names.

        Raises:
            UserError: in all of them, where one has other facts than process 0.
        """
        texts = [json.dumps(fact).encode() for fact in facts.values()]
        hashes = [list(hashlib.blake2b(text, digest_size=8).digest()) for text in texts]
        found = self.gather(np.array(hashes, np.uint8))
        for process, other in enumerate((found != found[0]).any(axis=2)):
            if names := [name for name, differs in zip(facts, other, strict=True) if differs]:
                raise UserError(
                    f"process {process} has other {what} than process 0: "
                    f"{', '.join(names[:3])}{', ...' if len(names) > 3 else ''}"
                )

    def meet(self, error: BaseException | None = None) -> None:
        """All processes call this, each with what went wrong in it, if anything did.

        Raises:
            UserError: something went wrong in another one. ``error`` itself, if there is one.
        """
        failed = np.flatnonzero(self.gather(np.array(error is not None)))
        if failed.size:
            self._in_step = self._told = True
            raise error or UserError(f"process {failed[0]} failed; it says why")

    @contextmanager
    def computing(self, emit: Callable[..., None]) -> Iterator[Callable[..., None]]:
        """Around what all compute together; yields what to emit with. Where ``emit`` fails, this
        process computes on until all meet, after the layer: the others need it until then."""
        failed: BaseException | None = None
        current: int | None = -1

        def emit_or_note(stage: str, layer: int | None, *value: Any) -> None:
            nonlocal failed, current
            if layer != current:
                self.meet(failed)
                current = layer
            try:
                if failed is None:
                    emit(stage, layer, *value)
            except BaseException as error:
                failed = error

        self.meet()
        self._in_step = False
        yield emit_or_note
        self.meet(failed)
        self._in_step = True

    def __enter__(self) -> "Group":
        return self

    def __exit__(
        self, kind: type | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._joined:
            self._part(error)

    def _part(self, error: BaseException | None) -> None:
        """Leave together where all can; raises what this process is to end with.

        Raises:
            UserError: another process failed, or is gone. ``error`` itself, if it is of this one.
        """
        import jax

        if self._in_step and not self._told and not _is_loss(error):
            try:
                self.meet(error)
            except BaseException as found:
                error = found
        lost = _is_loss(error)
        if self._in_step and not lost:
            jax.distributed.shutdown()
        else:
            ours = error if error and not lost else UserError()  # or another process is missing
            atexit.register(_leave, cli.exit_code(ours))
        if lost:
            raise UserError("another process ended before the trace was whole; it says why")
        if error:
            raise error


def _is_loss(error: BaseException | None) -> bool:
    """Did a collective fail? That is an error of several classes."""
    return isinstance(error, Exception) and any(name in str(error) for name in ("Gloo", "NCCL"))


def _check_address(address: tuple[str, int], where: str) -> None:
    """Refuse an address that is in use or of another machine, where JAX would crash."""
    try:
        family = socket.getaddrinfo(*address, type=socket.SOCK_STREAM)[0][0]
        with socket.socket(family) as trial:
            trial.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            trial.bind(address)
    except OSError as error:
        why = f"--coordinator {where}: {error.strerror or error}"
        raise UserError(f"{why}; it must be a free port of the machine of process 0") from None


def _free_stdout() -> None:
    """Gloo greets every peer on the C level's stdout, which is the report's."""
    sys.stdout.flush()
    kept = sys.stdout.errors  # for the report, a descriptor that Python alone knows
    sys.stdout = os.fdopen(os.dup(1), "w", encoding=sys.stdout.encoding, errors=kept)
    nothing = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nothing, 1)
    os.close(nothing)


def _leave(code: int, line: str = "") -> None:
    """End at once, where others are missing or gone. Nothing else interrupts JAX's wait for them,
    or leaves JAX's own way out: that waits 5 minutes, then aborts with a stack dump."""
    with suppress(OSError):
        print(line, end="\n" if line else "", file=sys.stderr, flush=True)
        sys.stdout.flush()
    os._exit(code)
