"""Imports run one way: stages knows neither JAX nor PyTorch, each engine only its own. And whoever
uses this project as a library has the process that they had before."""

import ast
import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import ROOT, user_environment
from tests.tiny import write_checkpoint

# Imports the named modules and everything below them, then says which packages that loaded.
PROBE = """
import importlib, json, pkgutil, sys
for name in sys.argv[1:]:
    module = importlib.import_module(name)
    for found in pkgutil.walk_packages(getattr(module, "__path__", ()), name + "."):
        importlib.import_module(found.name)
print(json.dumps(sorted({name.partition(".")[0] for name in sys.modules})))
"""

FORBIDDEN = {
    "stages": {"jax", "flax", "torch", "transformers", "qwen_jax", "oracle", "tools"},
    "qwen_jax": {"torch", "transformers", "oracle", "tools"},
    "oracle": {"jax", "flax", "tools"},
}
WITHOUT_FRAMEWORK = (
    "config", "weights", "prompt", "arguments", "cli", "tracing", "trace_command", "trace",
    "estimate",
)  # fmt: skip


def loaded(root: Path, *modules: str) -> set[str]:
    """Top-level packages that importing the modules of the tree at ``root`` brings in."""
    done = subprocess.run(
        [sys.executable, "-c", PROBE, *modules],
        env=user_environment() | {"PYTHONPATH": str(root)},
        cwd=root,
        capture_output=True,
        encoding="utf-8",
    )
    assert done.returncode == 0, done.stderr
    return set(json.loads(done.stdout))


def named(root: Path, package: str) -> set[str]:
    """Top-level packages named by any import statement, those inside functions too."""
    names = set()
    for path in (root / package).rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_bytes())):
            if isinstance(node, ast.Import):
                names |= {alias.name for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and not node.level:
                names.add(node.module)
    return {name.partition(".")[0] for name in names}


@pytest.mark.parametrize("package", FORBIDDEN)
def test_a_package_stays_clear_of_what_is_not_its_own(package: str) -> None:
    assert not loaded(ROOT, package) & FORBIDDEN[package]
    assert not named(ROOT, package) & FORBIDDEN[package]


def test_bad_input_is_refused_before_a_framework_loads() -> None:
    modules = [f"qwen_jax.{name}" for name in WITHOUT_FRAMEWORK]
    assert not loaded(ROOT, *modules) & {"jax", "torch"}


def test_importing_the_library_or_a_tool_loads_no_framework() -> None:
    code = "import json, sys, {0}; print(json.dumps(sorted(sys.modules)))"
    for module in ("qwen_jax", "tools.diff", "tools.localize"):
        done = child(code.format(module))
        assert not {"jax", "torch", "transformers", "flax"} & set(json.loads(done)), module


def child(code: str, *args: object, env: dict[str, str] | None = None, cwd: Path = ROOT) -> str:
    """What a process of a user's own that runs ``code`` prints last."""
    own = {k: v for k, v in user_environment().items() if not k.startswith(("JAX_", "XLA_"))}
    done = subprocess.run(
        [sys.executable, "-c", code, *map(str, args)],
        env=own | (env or {}),
        cwd=cwd,
        capture_output=True,
        encoding="utf-8",
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()[-1]


# What of a process others in it see. JAX's configuration is the main thread's, with what a context
# that was not left would have set.
SETTINGS = """
def settings():
    import logging, os, signal, sys, threading, warnings
    import jax, numpy
    return {
        "environment": dict(os.environ),
        "jax": {n: repr(getattr(jax.config, n, None)) for n in sorted(jax.config.values)},
        "numpy": [numpy.geterr(), numpy.get_printoptions(), repr(numpy.random.get_state()[1][:9])],
        "signals": [repr(signal.getsignal(each)) for each in sorted(signal.valid_signals())],
        "warnings": repr(warnings.filters),
        "hooks": repr([sys.excepthook, threading.excepthook, sys.stdout, sys.stderr]),
        "logging": [logging.root.level, repr(logging.root.handlers)],
        "else": [os.getcwd(), sys.path[:], sys.argv[:], sys.getrecursionlimit()],
    }
"""

# The library put to use.
USE = """
def use():
    import qwen_jax
    from tools import diff, localize
    hashes = []
    for model, dtype in (("demo", "float32"), ("tiny", "bfloat16"), ("tiny", "float64")):
        asked = {"tokens": (1, 2, 3), "dtype": dtype}
        trace = qwen_jax.trace_model(model, **asked)
        written = qwen_jax.trace_model(model, out=f"{model}-{dtype}", **asked)
        assert all(row.identical for row in diff.diff(trace, written).rows.values())
        hashes += [entry.xxh3 for entry in written.manifest.files]
    eager = qwen_jax.trace_model(model, backend="eager", **asked)
    assert diff.diff(trace, eager).agree
    assert localize.localize(eager, model).verdict == "clean"
    return hashes
"""

CHANGES = """
import json
started = settings()
found = use()
now = settings()
print(json.dumps([{k: [started[k], now[k]] for k in now if now[k] != started[k]}, found]))
"""


@pytest.fixture
def place(tmp_path: Path) -> Path:
    write_checkpoint(tmp_path / "tiny", model_type="qwen3")
    return tmp_path


def test_using_the_library_changes_no_setting_of_the_process(place: Path) -> None:
    """XLA_FLAGS, JAX_PLATFORMS, 64-bit types, precision, compiled programs, and all the rest. Nor
    do the settings of a user's own program change any number."""
    flags = {"XLA_FLAGS": "--xla_cpu_multi_thread_eigen=true", "JAX_PLATFORMS": "cpu"}
    theirs = (
        "jax.config.update('jax_default_matmul_precision', 'bfloat16')\n"
        "jax.config.update('jax_enable_x64', True)\n"
    )
    found = []
    for number, (env, call) in enumerate([({}, ""), (flags, theirs)]):
        code = f"import jax\n{call}jax.numpy.ones(1).sum()\n" + SETTINGS + USE + CHANGES
        here = place / str(number)
        shutil.copytree(place / "tiny", here / "tiny")
        changed, hashes = json.loads(child(code, env=env, cwd=here))
        assert changed == {}
        found.append(hashes)
    assert found[0] == found[1]


def test_importing_jax_later_finds_it_as_it_is(place: Path) -> None:
    """Where the library is what imports JAX."""
    code = SETTINGS + USE + "import json\n"
    say = "print(json.dumps(settings()))"
    alone, after = (json.loads(child(code + more + say, cwd=place)) for more in ("", "use()\n"))
    for each in ("environment", "jax", "signals", "hooks", "else"):
        assert after[each] == alone[each], each


@pytest.mark.parametrize(
    ("change", "where"),
    [
        ("os.environ['XLA_FLAGS'] = '--xla_x=1'", "environment"),
        ("jax.config.update('jax_enable_x64', True)", "jax"),
        ("jax.config.update('jax_default_matmul_precision', 'highest')", "jax"),
        ("jax.config.update('jax_compilation_cache_dir', 'x')", "jax"),
        ("jax.enable_x64(True).__enter__()", "jax"),
        ("numpy.seterr(all='raise')", "numpy"),
    ],
)
def test_the_test_of_settings_can_fail(change: str, where: str) -> None:
    use = f"def use():\n    import os, jax, numpy\n    {change}\n"
    code = "import jax\n" + SETTINGS + use + CHANGES
    assert list(json.loads(child(code))[0]) == [where]


def test_the_tests_above_can_fail(tmp_path: Path) -> None:
    deep = tmp_path / "planted" / "inner" / "deep.py"
    deep.parent.mkdir(parents=True)
    for folder in (deep.parent, deep.parent.parent):
        (folder / "__init__.py").touch()
    deep.write_text("import json\n")
    assert "jax" not in loaded(tmp_path, "planted") | named(tmp_path, "planted")
    deep.write_text("import jax.numpy\n")
    assert "jax" in loaded(tmp_path, "planted")
    deep.write_text("def late():\n    from jax import numpy\n")
    assert "jax" not in loaded(tmp_path, "planted")
    assert "jax" in named(tmp_path, "planted")
