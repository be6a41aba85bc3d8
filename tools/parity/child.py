"""A function run in a process of its own. XLA reads its flags once a process, so what is to be
compared under other flags, or must not take the caller with it, runs elsewhere."""

import multiprocessing
import os
import signal
from collections.abc import Callable, Iterator, Mapping
from multiprocessing.connection import Connection
from tempfile import NamedTemporaryFile
from typing import Any

SPAWN = multiprocessing.get_context("spawn")


class Child:
    """``function(*arguments)``, which yields what is to be sent here, in a fresh process.

    A child ends by itself where this process does: then nobody reads what it sends.

    Arguments:
        environment: the whole of it; None for that of this process.
        cores: how many it may use; None for those of this process.

    Attributes:
        connection: readable when something was sent, or when the child has ended.
    """

    def __init__(
        self,
        function: Callable[..., Iterator[Any]],
        *arguments: Any,
        environment: Mapping[str, str] | None = None,
        cores: int | None = None,
    ) -> None:
        self._said = NamedTemporaryFile("r", encoding="utf-8", errors="replace")  # noqa: SIM115
        self.connection, there = SPAWN.Pipe(duplex=False)
        given = dict(os.environ if environment is None else environment)
        self._process = SPAWN.Process(
            target=_work, args=(there, self._said.name, given, cores, function, arguments)
        )
        self._process.start()
        there.close()  # or there would be no end to what is sent

    def receive(self) -> Any:
        """What was sent next.

        Raises:
            EOFError: the child has ended, and how.
        """
        try:
            return self.connection.recv()
        except (EOFError, OSError):  # also in the middle of what it sent
            self._process.join()
            says = last_line(self._said.read())
            raise EOFError(f"ended with {self._process.exitcode}: {says}") from None

    def end(self) -> None:
        """End it, if it has not ended, and forget it."""
        self._process.kill()
        self._process.join()
        self._said.close()
        self.connection.close()


def ask(function: Callable[..., Iterator[Any]], *arguments: Any, **how: Any) -> Any:
    """The one thing that a child sends.

    Raises:
        EOFError: it ended before.
    """
    child = Child(function, *arguments, **how)
    try:
        return child.receive()
    finally:
        child.end()


def _work(
    connection: Connection,
    said: str,
    environment: dict[str, str],
    cores: int | None,
    function: Callable[..., Iterator[Any]],
    arguments: tuple[Any, ...],
) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the parent, which ends its own
    descriptor = os.open(said, os.O_WRONLY | os.O_APPEND)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    os.environ.clear()
    os.environ.update(environment)
    if cores is not None:
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:cores])
    for each in function(*arguments):
        connection.send(each)


def last_line(text: str) -> str:
    """The last line of what a process said, shortened."""
    lines = text.strip().splitlines()
    return lines[-1][:300] if lines else "it said nothing"
