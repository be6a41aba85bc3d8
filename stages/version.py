"""The project's own version, as installed."""

import importlib.metadata
from functools import cache

NAME = "qwen-jax-stages"


@cache
def version() -> str:
    """Of the installed distribution; a checkout that is not installed has none."""
    try:
        return importlib.metadata.version(NAME)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"
