"""What XLA compiles for a GPU is checked.

The programs are kept in ``tests/gpu``, as XLA 0.10.2 compiled them for an H100. Where the extra
``aot`` is installed they are compiled anew as well.
"""

import importlib.metadata
import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
import pytest

from qwen_jax.weights import open_model
from qwen_jax.weights.base import Weights
from stages.errors import UserError
from tests.conftest import user_environment
from tests.described import as_described
from tests.gpu.programs import BATCH, DTYPES, layers, planted, read
from tests.tiny import write_checkpoint
from tools.parity import __main__ as parity
from tools.parity import grid
from tools.parity.gpu import TARGETS, check, compile, ptx, report
from tools.parity.gpu.compile import Compiled
from tools.parity.grid import Point

needs_compiler = pytest.mark.skipif(
    importlib.util.find_spec("jax_cuda12_plugin") is None,
    reason="the extra aot is not installed: kept programs are read, and none is compiled",
)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Weights:
    return open_model(write_checkpoint(tmp_path_factory.mktemp("gpu") / "tiny"))


@pytest.fixture(scope="module")
def kept() -> dict[str, Compiled]:
    return read()


def parts_of(kept: dict[str, Compiled], model: Weights, dtype: str) -> dict[str, Any]:
    """(what was asked for, what was compiled) of the layer-wise programs, by name."""
    return {name: (part, kept[f"{name}-{dtype}"]) for name, part in layers(model, dtype).items()}


# --- the rules


@pytest.mark.parametrize("dtype", DTYPES)
def test_healthy_programs_break_no_rule(
    dtype: str, kept: dict[str, Compiled], model: Weights
) -> None:
    arch = model.config.arch
    for name, (part, compiled) in parts_of(kept, model, dtype).items():
        found = check.check(part, compiled, arch, (dtype, "highest"))
        assert found.violations == [] and found.contracted == 0
        assert found.kernels == len(compiled.kernels) > 0
        products = {"layer": {check.SHORT[dtype]}, "head": {check.SHORT[dtype]}}
        assert found.products == products.get(name, set())
        assert ("sqrt.approx.f32" in found.approximate) == (name in ("layer", "norm"))
        assert ("ex2.approx.ftz.f32" in found.approximate) == (name == "layer")


@pytest.mark.parametrize(
    "name", ["default", "lower", "exponential", "atomic", "called", "missing", "nothing"]
)
def test_a_broken_rule_names_program_stage_and_instruction(
    name: str, kept: dict[str, Compiled], model: Weights
) -> None:
    wanted = planted(model)[name]
    arch = model.config.arch
    found = check.check(wanted.part, kept[name], arch, ("float32", "highest")).violations
    assert {each.rule for each in found} == {wanted.rule}
    assert {each.stage for each in found} == {wanted.stage}
    assert any(wanted.instruction in each.instruction for each in found), found
    assert {each.program for each in found} == {wanted.part.name}
    row = {"verdict": "violation", "violations": [vars(found[0]) | {"products": "Triton"}]}
    says = report.failure(Point(), row)
    assert wanted.stage in says and found[0].instruction in says


def test_tf32_is_no_violation_where_it_was_asked_for(
    kept: dict[str, Compiled], model: Weights
) -> None:
    part = planted(model)["default"].part
    found = check.check(part, kept["default"], model.config.arch, ("float32", "default"))
    assert found.violations == [] and found.products == {"tf32"}


def test_a_check_that_finds_no_product_is_no_pass(
    kept: dict[str, Compiled], model: Weights
) -> None:
    part, arch = layers(model, "float32")["head"], model.config.arch
    start = kept["start-float32"]
    found = check.check(part, start, arch, ("float32", "highest")).violations
    assert ("products", "no product was found") in {(v.rule, v.instruction) for v in found}


def test_ptx_is_read_statement_by_statement() -> None:
    """Scopes, labels, guards, vectors and comments stand in the way of none; two kernels part."""
    first, second = ptx.kernels("""
        .shared .align 4 .b8 shared_0[64];
        .visible .entry one(.param .u64 p_0, .param .u64 p_1) .reqntid 128, 1, 1 {
        .reg .pred %p<9>; .loc 1 2 3 // a comment; with a semicolon
        ; { .reg .b32 tmp; mov.b32 {tmp, %r1}, %rd1; } add.rn.f32 %f1, %f2, %f3;
        $L__BB0_1: @!%p1 bra $L__BB0_1; $L__end:
        ret; }
        .visible .entry two() { atom.global.add.f32 %f1, [%rd1+4], %f2; ret; }""")
    found = [each.opcode for each in first.instructions]
    assert found == ["mov.b32", "add.rn.f32", "bra", "ret"]
    assert first.instructions[1].operands == ("%f1", "%f2", "%f3")
    assert [each.opcode for each in second.instructions] == ["atom.global.add.f32", "ret"]
    assert (first.name, second.name) == ("one", "two")
    with pytest.raises(ValueError, match="no PTX"):
        list(ptx.kernels(".entry k() { 7 what; }"))


@pytest.mark.parametrize(
    ("text", "dtype", "nearest"),
    [
        ("add.rn.f32 %f1, %f2, %f3;", "float32", True),
        ("add.rz.f32 %f1, %f2, %f3;", "float32", False),
        ("mul.rn.ftz.f32 %f1, %f2, %f3;", "float32", False),
        ("cvt.rn.bf16.f32 %h1, %f2;", "bfloat16", True),
        ("cvt.rz.bf16.f32 %h1, %f2;", "bfloat16", False),
        ("cvt.f32.bf16 %f1, %h1;", "float32", True),
        ("add.rn.bf16 %h1, %h2, %h3;", "bfloat16", True),
        ("add.rn.bf16 %h1, %h2, %h3;", "float32", False),
        ("fma.rn.bf16 %h1, %h2, %h3, %h4;", "bfloat16", False),
        ("mov.b16 %h3, 0x3F80; fma.rn.bf16 %h1, %h2, %h3, %h4;", "bfloat16", True),
        ("mov.b16 %h4, 0x8000; fma.rn.bf16 %h1, %h2, %h3, %h4;", "bfloat16", True),
        ("tanh.approx.f32 %f1, %f2;", "float32", False),
        ("add.s32 %r1, %r2, %r3;", "float32", True),
    ],
)
def test_arithmetic_rounds_to_nearest_once(text: str, dtype: str, nearest: bool) -> None:
    (kernel,) = ptx.kernels(f".visible .entry k() {{ {text} }}")
    each = kernel.instructions[-1]
    assert check.nearest(each, dtype, check.constants(kernel)) is nearest


# --- the command


def test_a_sweep_is_made_of_programs() -> None:
    """Second runs, the CPU's flags and requirements make no other program."""
    points = [
        Point(),
        Point(flags="reference", require="identical"),
        Point(flags="default", trial="rerun"),
        Point(products="tf32"),
        Point(loop="program"),
        Point(loop="program", trial="unobserved"),
    ]
    found = grid.programs(points)
    assert [(p.loop, p.trial) for p in found] == [
        ("layer", "reference"),
        ("program", "reference"),
        ("program", "unobserved"),
    ]
    assert all(p.device == "gpu" and p.flags == "default" and p.require is None for p in found)


def test_wrong_use_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    for given, message in [
        (["--aot", "h100", "--device", "gpu"], "no GPU at hand"),
        (["--aot", "h200"], "invalid choice"),
    ]:
        with pytest.raises(UserError, match=message):
            parity.main(given)

    def version(name: str) -> str:
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "version", version)
    with pytest.raises(UserError, match=r"pip install 'qwen-jax-stages\[aot\]'"):
        compile.versions()


@needs_compiler
def test_compiled_and_checked(model: Weights, tmp_path: Path) -> None:
    sweep, target = tmp_path / "grid.toml", tmp_path / "found.json"
    sweep.write_text("[[grid]]\nlength = 5\n[[grid]]\nloop = 'program'\nlength = 5\n")
    given = {
        "sweep": sweep,
        "model": Path(model.files[0]).parent,
        "out": tmp_path / "out",
        "json": target,
    }
    given |= {"tokens": ",".join(map(str, BATCH.tokens[0])), "aot": "l4"}
    code = parity.main([f"--{name}={value}" for name, value in given.items()])
    as_described("parity", target.read_bytes())
    data = json.loads(target.read_text())
    assert (code, data["verdict"], data["compiled_for"]) == (0, "pass", "l4")
    assert [point["verdict"] for point in data["points"]] == ["checked", "checked"]
    assert data["machine"]["versions"].keys() >= {"jax-cuda12-plugin", "jax-cuda12-pjrt"}
    table = (tmp_path / "out" / parity.TABLE).read_text()
    assert "Compiled and checked" in table


@needs_compiler
@pytest.mark.parametrize("target", TARGETS)
def test_rules_are_broken_as_before_when_compiled_anew(target: str, model: Weights) -> None:
    where, arch = compile.device(target), model.config.arch
    for name, wanted in planted(model).items():
        with jax.default_matmul_precision(wanted.precision):
            made = compile.compiled(wanted.part, where)
        found = check.check(wanted.part, made, arch, ("float32", "highest")).violations
        assert {(each.rule, each.stage) for each in found} == {(wanted.rule, wanted.stage)}, name
        assert any(wanted.instruction in each.instruction for each in found)


# --- the reference

ALONE = """
import sys
import jax
jax.config.update("jax_num_cpu_devices", 2)
first, other = jax.devices()
jax.config.update("jax_default_device", other)
import qwen_jax, tools.localize
with jax.transfer_guard_device_to_device("disallow"):
    trace = qwen_jax.trace_model(sys.argv[1], (1, 2, 3), backend="eager", device="cpu")
    print(tools.localize.localize(trace, model=sys.argv[1]).verdict)
"""


def test_un_jitted_stays_on_its_device_where_another_is_the_default(model: Weights) -> None:
    """A constant that came into being on the default device would have to be moved."""
    command = [sys.executable, "-c", ALONE, str(Path(model.files[0]).parent)]
    done = subprocess.run(command, env=user_environment(), capture_output=True, text=True)
    assert (done.returncode, done.stdout.strip()) == (0, "clean"), done.stderr
