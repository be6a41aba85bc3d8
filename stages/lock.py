"""One process at a time in a directory."""

import fcntl
import os
from pathlib import Path

from stages.errors import UserError


def lock(directory: Path, busy: str) -> int:
    """A descriptor that keeps every other process out of ``directory`` until it is closed.

    Raises:
        UserError: ``busy``, where another process is in it.
    """
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        raise UserError(busy) from None
    return descriptor
