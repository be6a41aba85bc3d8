"""Imports run one way: stages knows neither JAX nor PyTorch, each engine only its own."""

import ast
import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import ROOT, user_environment

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
WITHOUT_FRAMEWORK = ("config", "checkpoint", "synthetic", "source", "command")


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
