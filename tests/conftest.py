"""The device of the tests, chosen before any of them imports JAX, and what many of them need."""

import gc
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import pytest

from qwen_jax import cli
from qwen_jax.weights import open_model
from qwen_jax.weights.base import Weights
from tests import grids

ROOT = Path(__file__).resolve().parent.parent
USER_ENVIRONMENT = dict(os.environ)  # a command that a user starts knows nothing of ours

os.environ.setdefault("JAX_PLATFORMS", "cpu")


class Result(NamedTuple):
    """How a command ended."""

    code: int
    stdout: str
    stderr: str


def user_environment() -> dict[str, str]:
    """The environment of a user's shell: `python` is this one, and it finds this checkout."""
    scripts = str(Path(sys.executable).parent)
    path = os.pathsep.join([scripts, USER_ENVIRONMENT.get("PATH", os.defpath)])
    return USER_ENVIRONMENT | {"PATH": path, "PYTHONPATH": str(ROOT)}


@contextmanager
def interruptible() -> Iterator[None]:
    """A process that is started in here is ended by SIGINT, whatever started the tests: a job in
    the background ignores it, and a child inherits that."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def with_mount(mount: str, script: str) -> list[str]:
    """What a command is appended to that ``script`` runs as "$0" "$@" after ``mount``, in a mount
    namespace of its own. Skips the test where that is not allowed."""
    shell = ["unshare", "--mount", "--map-root-user", "sh", "-c"]
    try:
        subprocess.run([*shell, mount], capture_output=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("mounting is not allowed here")
    return [*shell, f"{mount} && {script}"]


@pytest.fixture(autouse=True)
def stay(monkeypatch: pytest.MonkeyPatch) -> None:
    """A command that ends in the tests' own process must leave that process's garbage to it."""
    monkeypatch.setattr(cli, "leave", sys.exit)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--whole", action="store_true", help="all combinations of each grid of tests")


@pytest.hookimpl(trylast=True)  # of what -k has left: one that is asked for by name is run
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if not config.getoption("--whole"):
        left_out = grids.thin(items)
        config.hook.pytest_deselected(items=left_out)
        items[:] = [item for item in items if item not in left_out]


def pytest_sessionstart(session: pytest.Session) -> None:
    """What this process compiles is kept on disk until it ends: a file of tests forgets what it
    has of it in memory, and the next one needs much of the same. One process, one directory: JAX
    writes its files in more than one step."""
    import jax

    from qwen_jax import compile_cache

    folder = tempfile.mkdtemp(prefix="qwen-jax-programs-")
    session.config.add_cleanup(lambda: shutil.rmtree(folder, ignore_errors=True))
    for name, value in {"jax_compilation_cache_dir": folder, **compile_cache.SETTINGS}.items():
        jax.config.update(name, value)


@pytest.fixture(scope="module", autouse=True)
def forget_programs() -> Iterator[None]:
    """What a file of tests has in memory of them goes with it: thousands in one process are more
    pieces of memory than Linux lets one have (vm.max_map_count), and XLA then aborts."""
    yield
    if jax := sys.modules.get("jax"):
        jax.clear_caches()
        gc.collect()


@pytest.fixture
def demo() -> Weights:
    """The embedded demo model, freshly opened: a model remembers what was read from it."""
    return open_model()


@pytest.fixture
def run_cli(tmp_path: Path) -> Callable[..., Result]:
    """Run a command as users do: ``run_cli("qwen_jax.trace", "--stages", "all")``.

    In a process of its own, in ``tmp_path`` unless ``cwd`` is given; ``env`` adds variables. Where
    speed matters call the module's ``main(argv)``, which raises UserError with its exit code.
    """

    def run(
        module: str, *args: object, cwd: Path = tmp_path, env: dict[str, str] | None = None
    ) -> Result:
        done = subprocess.run(
            [sys.executable, "-m", module, *map(str, args)],
            cwd=cwd,
            env=user_environment() | (env or {}),
            stdin=subprocess.DEVNULL,
            capture_output=True,
            encoding="utf-8",
            timeout=1800,  # a guard against hanging, on the busiest machine
        )
        return Result(done.returncode, done.stdout, done.stderr)

    return run
