"""No file imports, directly or through others, a file that imports it; and results, which are
data, import nothing that prints."""

import ast
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

from tests.conftest import ROOT

PACKAGES = ("stages", "qwen_jax", "oracle", "tools")
RESULTS = (
    "tools.difference", "tools.localize.result", "tools.localize.grouping",
    "tools.localize.cost.result", "stages.invariance", "stages.compare", "stages.headroom",
)  # fmt: skip


def imports(root: Path) -> dict[str, set[str]]:
    """Module -> the modules of ours that it names, inside functions and for types too."""
    files = {
        ".".join(path.relative_to(root).with_suffix("").parts).removesuffix(".__init__"): path
        for package in PACKAGES
        for path in (root / package).rglob("*.py")
    }
    graph: dict[str, set[str]] = {}
    for name, path in files.items():
        named = set()
        for node in ast.walk(ast.parse(path.read_bytes())):
            if isinstance(node, ast.Import):
                named |= {alias.name for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.module:
                inner = {f"{node.module}.{alias.name}" for alias in node.names}
                modules = inner & files.keys()
                named |= modules | ({node.module} if inner - modules else set())
        graph[name] = named & files.keys()
    return graph


def circle(root: Path) -> list[str] | None:
    """The modules of a circle of imports, each imported by the next; None where there is none."""
    try:
        TopologicalSorter(imports(root)).prepare()
    except CycleError as error:
        return error.args[1]
    return None


def reached(graph: dict[str, set[str]], start: str) -> set[str]:
    found, left = set[str](), [start]
    while left:
        new = graph[left.pop()] - found
        found |= new
        left += new
    return found


def named_packages(path: Path) -> set[str]:
    nodes = [*ast.walk(ast.parse(path.read_bytes()))]
    names = {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
    names |= {node.module or "" for node in nodes if isinstance(node, ast.ImportFrom)}
    return {name.partition(".")[0] for name in names}


def test_no_module_imports_one_that_imports_it() -> None:
    assert circle(ROOT) is None


def test_a_result_imports_nothing_that_prints() -> None:
    graph = imports(ROOT)
    for each in set(RESULTS).union(*(reached(graph, name) for name in RESULTS)):
        path = Path(ROOT, *each.split("."))
        path = path / "__init__.py" if path.is_dir() else path.with_suffix(".py")
        assert not {"rich", "jinja2", "argparse"} & named_packages(path), each


@pytest.mark.parametrize("late", ["", "def late():\n    "])
def test_the_test_of_circles_can_fail(tmp_path: Path, late: str) -> None:
    for package in PACKAGES:
        (tmp_path / package / "inner").mkdir(parents=True)
    one, two, three = (
        tmp_path / "stages" / "one.py",
        tmp_path / "tools" / "inner" / "two.py",
        tmp_path / "qwen_jax" / "__init__.py",
    )
    one.write_text("import tools.inner.two\n")
    two.write_text("from qwen_jax import something\n")
    three.write_text("something = 1\n")
    assert circle(tmp_path) is None
    three.write_text(late + "from stages import one\n")
    assert set(circle(tmp_path) or ()) == {"stages.one", "tools.inner.two", "qwen_jax"}
