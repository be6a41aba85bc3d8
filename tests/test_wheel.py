"""What is installed is whole: the first example of the README runs from a wheel."""

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from tests.conftest import ROOT, user_environment


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with what the wheel holds, and nothing else of ours."""
    made, folder = (tmp_path_factory.mktemp(name) for name in ("wheel", "site"))
    build = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(made)]
    subprocess.run(build, cwd=ROOT, check=True, capture_output=True)
    with zipfile.ZipFile(next(made.glob("*.whl"))) as wheel:
        wheel.extractall(folder)
    return folder


def run(installed: Path, *command: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    environment = user_environment() | {"PYTHONPATH": str(installed)}
    return subprocess.run(
        [sys.executable, *command], cwd=cwd, env=environment, capture_output=True, encoding="utf-8"
    )


def test_the_first_example_runs(installed: Path, tmp_path: Path) -> None:
    made = run(installed, "-m", "tools.numpy_engine", "none", "--out", "dump", cwd=tmp_path)
    assert made.returncode == 0, made.stderr
    found = run(installed, "-m", "tools.localize", "dump", "--model", "demo", cwd=tmp_path)
    assert found.returncode == 0 and found.stdout.startswith("clean"), found.stdout
    mistake = "post_ffn_residual.residual_layer_input"  # what is planted is no part of the wheel
    refused = run(installed, "-m", "tools.numpy_engine", mistake, cwd=tmp_path)
    assert refused.returncode == 2 and "in a checkout" in refused.stderr


def test_the_script_does_not_mind_other_tools(installed: Path, tmp_path: Path) -> None:
    """Another repository's own ``tools/`` in the current directory is not taken for ours."""
    (tmp_path / "tools").mkdir()
    (tmp_path / "tools" / "__init__.py").write_text("raise ImportError('not ours')\n")
    (tmp_path / "bin").mkdir()
    script = tmp_path / "bin" / "qwen-stages"  # as an installer writes it
    script.write_text("from qwen_jax.__main__ import main\nmain()\n")
    found = run(installed, str(script), "diff", "--help", cwd=tmp_path)
    assert found.returncode == 0 and found.stdout.startswith("usage: qwen-stages diff"), (
        found.stderr
    )


def test_maintainers_scripts_stay_out(installed: Path) -> None:
    held = {path.relative_to(installed).parts[0] for path in installed.iterdir()}
    assert {"qwen_jax", "stages", "oracle", "tools"} <= held and "tests" not in held
    assert (installed / "tools" / "numpy_engine" / "engine.py").exists()
    assert not (installed / "tools" / "maintain").exists()
    assert {"report.js", "report.css"} <= {p.name for p in (installed / "tools/report").iterdir()}
    assert len(list((installed / "tools" / "report" / "vendor").iterdir())) == 4  # and licences
    assert os.path.getsize(installed / "qwen_jax" / "demo" / "model.safetensors") > 1 << 20
