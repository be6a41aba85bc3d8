"""Several processes that compute one trace: how they meet, keep in touch and part.

JAX has a service of its own for this, which aborts a process with a C++ stack dump when another one
is late, missing or gone. So the processes first meet over plain TCP at the coordinator's address,
and keep those connections: whoever fails says why, and all the others end with that line. Imports
jax only once all are there.
"""

import atexit
import json
import os
import queue
import signal
import socket
import sys
import threading
import time
from contextlib import suppress
from types import TracebackType
from typing import Any

from stages.errors import UserError

RETRY = 0.2  # seconds between two tries to reach process 0
NEWS = 3.0  # seconds in which the reason for an error of JAX arrives, where another process is it
GRACE = 10.0  # seconds that a process has to end by itself when another one has failed


class Peer:
    """The connection to another process: one JSON object a line, either way."""

    def __init__(self, connection: socket.socket) -> None:
        self.connection = connection
        self.lines = connection.makefile("rb")
        self.inbox: queue.Queue[dict[str, Any]] = queue.Queue()

    def send(self, message: dict[str, Any]) -> None:
        with suppress(OSError):  # if it is gone, reading from it will tell
            self.connection.sendall(json.dumps(message).encode() + b"\n")

    def receive(self) -> dict[str, Any] | None:
        """The next message; None where there will be none."""
        try:
            message = json.loads(self.lines.readline())
        except (OSError, ValueError):
            return None
        return message if isinstance(message, dict) else None


class Group:
    """The processes of one trace, seen from one of them. A context manager around the whole run:
    on leaving it all are known to be done, or are told why not.

    Process 0 is connected to every other one, and they to it alone.

    Arguments:
        address: (host, port) at which process 0 is met.
        process, count: which one of how many this is.
        timeout: seconds to wait for the others.
    """

    def __init__(self, address: tuple[str, int], process: int, count: int, timeout: float) -> None:
        self.address, self.process, self.count = address, process, count
        self.timeout = timeout
        self.peers: dict[int, Peer] = {}
        self._lost: str | None = None  # what made another process fail
        self._news = threading.Event()
        self._leaving = threading.Event()  # this process is on its way out
        self._listeners: list[threading.Thread] = []
        self._joined = False

    def join(self, arguments: dict[str, Any]) -> None:
        """Wait until all processes are there, then have JAX see the devices of all.

        Raises:
            UserError: not all came in time or with the same ``arguments``, or the address is of
                no use.
        """
        deadline = time.monotonic() + self.timeout
        try:
            self._meet(deadline) if self.process == 0 else self._reach(deadline)
        except OSError as error:
            why = (error.strerror or str(error)).partition(" (")[0]
            more = "" if self.process else "; it must be a free port of the machine of process 0"
            raise UserError(f"--coordinator {self._where}: {why}{more}") from None
        for process, peer in self.peers.items():
            thread = threading.Thread(target=self._listen, args=(process, peer), daemon=True)
            self._listeners.append(thread)
            thread.start()
        self.compare("arguments", arguments)
        self._free_stdout()
        self._joined = True

        import jax

        # It would take SIGTERM for a notice to save and go on.
        jax.config.update("jax_enable_preemption_service", False)
        jax.distributed.initialize(
            self._where, self.count, self.process, coordinator_bind_address=self._where
        )

    @property
    def _where(self) -> str:
        host, port = self.address
        return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"

    def _meet(self, deadline: float) -> None:
        """Process 0: wait for the others, then tell them that all are there."""
        family = socket.getaddrinfo(*self.address, type=socket.SOCK_STREAM)[0][0]
        with socket.create_server(self.address, family=family) as server:
            while missing := sorted(set(range(1, self.count)) - self.peers.keys()):
                server.settimeout(max(0.01, deadline - time.monotonic()))
                try:
                    connection, _ = server.accept()
                except TimeoutError:
                    raise self._absent(missing) from None
                connection.settimeout(NEWS)  # a stranger that says nothing must not hold us up
                peer = Peer(connection)
                greeting = peer.receive() or {}
                if greeting.get("of") == self.count and greeting.get("process") in missing:
                    self.peers[greeting["process"]] = peer
                else:
                    peer.send({"failed": self._unexpected(greeting)})
        for peer in self.peers.values():
            peer.connection.settimeout(None)
            peer.send({"all": "there"})

    def _unexpected(self, greeting: dict[str, Any]) -> str:
        who, of = greeting.get("process"), greeting.get("of")
        if of != self.count:
            return f"was started with --num-processes {self.count}, process {who} with {of}"
        return f"already has a process {who}; give each --process-id once"

    def _absent(self, missing: list[int]) -> UserError:
        which = ", ".join(map(str, missing))
        noun = "processes" if len(missing) > 1 else "process"
        return UserError(
            f"{noun} {which} did not come to --coordinator {self._where} within "
            f"{self.timeout:g} s; start every --process-id from 0 to {self.count - 1}"
        )

    def _reach(self, deadline: float) -> None:
        """Another process: find process 0, and wait until it says that all are there."""
        while True:
            try:
                connection = socket.create_connection(self.address, timeout=self.timeout)
                break
            except (ConnectionError, TimeoutError):
                if time.monotonic() + RETRY > deadline:
                    raise UserError(
                        f"process 0 was not to be found at --coordinator {self._where} within "
                        f"{self.timeout:g} s; is it running there, without an error?"
                    ) from None
                time.sleep(RETRY)
        connection.settimeout(2 * self.timeout)  # process 0 gives up before that
        peer = self.peers[0] = Peer(connection)
        peer.send({"process": self.process, "of": self.count})
        answer = peer.receive() or {"failed": "ended while it waited for the others"}
        if "failed" in answer:
            raise UserError(f"process 0: {answer['failed']}")
        connection.settimeout(None)

    @staticmethod
    def _free_stdout() -> None:
        """Gloo greets every peer on the C level's stdout, which is the report's."""
        sys.stdout.flush()
        kept = sys.stdout.errors  # for the report, a descriptor that Python alone knows
        sys.stdout = os.fdopen(os.dup(1), "w", encoding=sys.stdout.encoding, errors=kept)
        nothing = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nothing, 1)
        os.close(nothing)

    def compare(self, what: str, facts: dict[str, Any]) -> None:
        """All processes must call this with the same facts.

        Raises:
            UserError: in process 0, where they differ. The others go on and learn of it later.
        """
        facts = json.loads(json.dumps(facts))
        if self.process:
            return self.peers[0].send({what: facts})
        for process, peer in self.peers.items():
            theirs = self._next(peer)[what]
            if differing := [name for name in facts if theirs.get(name) != facts[name]]:
                raise UserError(
                    f"process {process} has other {what} than process 0: "
                    f"{', '.join(differing[:3])}{', ...' if len(differing) > 3 else ''}"
                )

    def _next(self, peer: Peer) -> dict[str, Any]:
        """What another process says next, however long it takes.

        Raises:
            UserError: one of them failed.
        """
        while True:
            try:
                return peer.inbox.get(timeout=RETRY)
            except queue.Empty:
                if self._lost:
                    self._leaving.set()
                    raise UserError(self._lost) from None

    def explained(self, error: Exception) -> Exception:
        """The reason for an error of JAX, where that is another process's failure."""
        if not self._news.wait(NEWS):
            return error
        self._leaving.set()
        return UserError(self._lost)

    def _listen(self, process: int, peer: Peer) -> None:
        """A thread: take down what a process says until it ends."""
        while message := peer.receive():
            if "failed" in message:
                break
            peer.inbox.put(message)
            if "done" in message:
                return
        self._lost = f"process {process} " + (
            f"failed: {message['failed']}" if message else "ended before the trace was whole"
        )
        self._news.set()
        # This process may be waiting for the other one in a way that nothing interrupts. Process 0
        # has files to leave in order, if it can.
        if not self._leaving.wait(GRACE if self.process == 0 else 0):
            print(f"error: {self._lost}", file=sys.stderr, flush=True)
            os._exit(UserError.exit_code)
        while peer.receive():
            pass

    def __enter__(self) -> "Group":
        signal.signal(signal.SIGTERM, _terminate)
        return self

    def __exit__(
        self, kind: type | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is None and self._joined:
            self._part()
        elif error is not None:
            self._leaving.set()
            for peer in self.peers.values():
                peer.send({"failed": _reason(error)})
            if self._joined:
                if self.process == 0:  # JAX's service goes with it, which aborts who is still there
                    for thread in self._listeners:
                        thread.join(NEWS)
                atexit.register(_leave, _code(error))

    def _part(self) -> None:
        """All is computed and written: no process goes before that is so."""
        import jax

        if self.process:
            self._next(self.peers[0])
        self._leaving.set()
        for peer in self.peers.values():
            peer.send({"done": True})
        jax.distributed.shutdown()


def _terminate(number: int, frame: Any) -> None:
    """A SIGTERM ends this process in order, so that it can tell the others."""
    raise SystemExit(128 + number)


def _reason(error: BaseException) -> str:
    """One line for the other processes."""
    if isinstance(error, UserError):
        return " ".join(str(error).split())
    names = {KeyboardInterrupt: "interrupted", SystemExit: "terminated"}
    return names.get(type(error), type(error).__name__)


def _code(error: BaseException) -> int:
    """The exit code of ``cli.run`` for an error."""
    if isinstance(error, SystemExit):
        return int(error.code or 0)
    return getattr(error, "exit_code", 130 if isinstance(error, KeyboardInterrupt) else 1)


def _leave(code: int) -> None:
    """End at once: JAX's own end would wait minutes for processes that have failed, then abort."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
