"""What XLA compiles for a GPU is checked, and executed by an interpreter.

The programs are kept in ``tests/gpu``, as XLA 0.10.2 compiled them for an H100. Where the extra
``aot`` is installed they are compiled anew as well.
"""

import importlib.metadata
import importlib.util
import json
import subprocess
import sys
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from typing import Any

import jax
import ml_dtypes
import numpy as np
import pytest

from qwen_jax.weights import open_model
from qwen_jax.weights.base import Weights
from stages.errors import UserError
from tests.conftest import user_environment
from tests.described import as_described
from tests.gpu.programs import BATCH, DTYPES, layers, planted, read
from tests.tiny import write_checkpoint
from tools.parity import __main__ as parity
from tools.parity import grid, measure, programs, variants
from tools.parity.gpu import TARGETS, check, compile, execute, hlo, interpreter, ptx, report
from tools.parity.gpu.compile import Compiled, Launch
from tools.parity.gpu.interpreter import Memory, Unsupported
from tools.parity.grid import Point
from tools.parity.memory import sequences

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


# --- the interpreter


def execute_text(body: str, given: np.ndarray | None = None) -> np.ndarray:
    """What 64 threads of a kernel leave in its one array, of uint32: %rd2 is where a thread's own
    number is."""
    text = f"""
        .visible .entry k(.param .u64 k_param_0) {{
        .reg .pred %p<9>; .reg .b32 %r<99>; .reg .b64 %rd<9>;
        ld.param.b64 %rd1, [k_param_0]; mov.u32 %r1, %tid.x; mul.wide.u32 %rd2, %r1, 4;
        add.s64 %rd2, %rd1, %rd2; {body} }}"""
    (kernel,) = ptx.kernels(text)
    array = np.zeros(64, np.uint32) if given is None else given
    memory = Memory({0: array.nbytes})
    memory.write(memory.at(0, 0), array)
    launch = Launch("kCustomKernel", "k", (1, 1, 1), (64, 1, 1), 0)
    interpreter.run(kernel, launch, [memory.at(0, 0)], memory)
    return memory.read(memory.at(0, 0), array.dtype, array.shape)


def test_threads_part_and_meet_again() -> None:
    """Thread n adds n + 1 times 3, the odd ones 100 more; then a warp adds up."""
    found = execute_text("""
        mov.b32 %r2, 0; mov.b32 %r3, 0;
        $loop: add.s32 %r2, %r2, 3; add.s32 %r3, %r3, 1;
        setp.le.u32 %p1, %r3, %r1; @%p1 bra $loop;
        and.b32 %r4, %r1, 1; setp.eq.b32 %p2, %r4, 0; @%p2 bra $even;
        add.s32 %r2, %r2, 100;
        $even: bar.sync 0; shfl.sync.bfly.b32 %r5, %r2, 1, 31, -1; add.s32 %r2, %r2, %r5;
        @!%p2 st.global.b32 [%rd2], %r2;
        ret;""")
    n = np.arange(64)
    alone = 3 * (n + 1) + 100 * (n % 2)
    assert (found == np.where(n % 2, alone + alone[n ^ 1], 0)).all()


def test_what_a_gpu_would_not_do_either_is_refused() -> None:
    for body, why in [
        ("setp.lt.u32 %p1, %r1, 7; @%p1 bra $on; bar.sync 0; $on: ret;", "barrier"),
        ("setp.lt.u32 %p1, %r1, 7; @%p1 bra $on; shfl.sync.bfly.b32 %r2, %r1, 1, 31, -1; $on: ret;",
         "together"),
        ("ld.global.b32 %r2, [%rd2+2]; ret;", "aligned"),
        ("ld.global.b32 %r2, [%rd2+4096]; ret;", "IndexError"),
        ("add.rz.f32 %r2, %r1, %r1; ret;", "rz"),
        ("tanh.approx.f32 %r2, %r1; ret;", "tanh"),
        ("atom.global.add.f32 %r2, [%rd2], %r1; ret;", "atom"),
    ]:  # fmt: skip
        with pytest.raises(Unsupported, match=why):
            execute_text(body)


def test_fused_multiply_add_is_the_nearest_number() -> None:
    """Against rational numbers; a third of the cases lie halfway, or next to it."""
    random = np.random.default_rng(0)
    a, b, c = random.standard_normal((3, 3000)).astype(np.float32)
    half = np.spacing(c[:1000]) / 2
    b[:1000] = half / a[:1000]  # a b is half a step of c, about
    a[:300], b[:300] = half[:300], 1  # and exactly
    for down in (False, True):
        found = interpreter.fma(a, b, c, down)
        above, below = np.nextafter(found, np.float32(9e9)), np.nextafter(found, np.float32(-9e9))
        for x, y, z, f, over, under in zip(a, b, c, found, above, below, strict=True):
            exact = Fraction(float(x)) * Fraction(float(y)) + Fraction(float(z))
            off = abs(exact - Fraction(float(f)))
            if down:
                assert Fraction(float(f)) <= exact < Fraction(float(over))
                continue
            least = min(abs(exact - Fraction(float(near))) for near in (over, under))
            assert off < least or (off == least and not f.view(np.uint32) & 1)


@pytest.mark.parametrize(("kind", "depth"), [("bf16", 16), ("f16", 16), ("tf32", 8)])
def test_a_matrix_instruction_is_a_product(kind: str, depth: int) -> None:
    """A [16, depth] B [depth, 8] + 1, whole numbers; fragments as in the manual's figures."""
    dtype = {"bf16": ml_dtypes.bfloat16, "f16": np.float16, "tf32": np.float32}[kind]
    random = np.random.default_rng(1)
    a, b = random.integers(-8, 8, (16, depth)), random.integers(-8, 8, (depth, 8))
    each = 4 // np.dtype(dtype).itemsize  # numbers in a register
    memory = np.zeros((10, 64), np.uint32)  # a register of every thread each
    for thread in range(64):
        g, t = divmod(thread % 32, 4)
        near = slice(each * t, each * t + each)
        far = slice(4 * each + each * t, 4 * each + each * t + each)
        parts = [a[g, near], a[g + 8, near], a[g, far], a[g + 8, far], b[near, g], b[far, g]]
        memory[:6, thread] = [part.astype(dtype).view(np.uint32)[0] for part in parts]
    load = "".join(f"ld.global.b32 %r{10 + n}, [%rd2+{256 * n}];" for n in range(6))
    store = "".join(f"st.global.b32 [%rd2+{256 * (6 + n)}], %r{30 + n};" for n in range(4))
    body = f"""{load} mov.b32 %r20, 0f3F800000;
        mma.sync.aligned.m16n8k{depth}.row.col.f32.{kind}.{kind}.f32
        {{%r30, %r31, %r32, %r33}}, {{%r10, %r11, %r12, %r13}}, {{%r14, %r15}},
        {{%r20, %r20, %r20, %r20}}; {store} ret;"""
    found = execute_text(body, memory)[6:, :32].view(np.float32).reshape(2, 2, 8, 4)
    wanted = (a @ b + 1).reshape(2, 8, 4, 2)  # row half, row, thread, column of its two
    assert (found == wanted.transpose(0, 3, 1, 2)).all()


@pytest.fixture(scope="module")
def runs(kept: dict[str, Compiled], model: Weights) -> Callable[..., Any]:
    """Every stage of the small checkpoint from programs for an H100, as traces."""

    def run(dtype: str, **how: Any) -> Any:
        found = execute.values(parts_of(kept, model, dtype), model, BATCH, **how)
        return found, sequences(found, BATCH, model, dtype)

    return run


@pytest.mark.parametrize(
    ("dtype", "most"), [("float32", 1.0), ("bfloat16", 1e-3), ("float16", 1e-3)]
)
def test_an_executed_model_is_as_exact_as_its_dtype(
    dtype: str, most: float, runs: Callable[..., Any], model: Weights
) -> None:
    """Against un-jitted on the CPU, and every stage against float64. Of 16-bit values hardly any
    differ from what the CPU makes of the same inputs (measured: 0.2 per mille at most)."""
    found, traces = runs(dtype)
    variant = variants.variant(model.config.arch, "stages", "")
    eager = programs.Layers(model, dtype, "eager", jax.devices("cpu")[0], variant)
    with jax.default_matmul_precision("highest"):
        reference = sequences(eager.values(BATCH), BATCH, model, dtype)
    both = measure.agreement(traces, reference)
    assert both.within(dtype) and both.stages == len(reference[0].entries)
    point = Point(dtype=dtype, flags="default", device="gpu")
    assert measure.local(traces, model, point, "gpu").faults == []
    values = sum(value.size for value in found.values())
    made = execute.created(found, variant, model, BATCH, dtype)
    assert made <= most * values and made <= measure.differing(traces, reference)


def test_the_documented_error_of_instructions_is_no_fault(
    runs: Callable[..., Any], model: Weights
) -> None:
    exact, _ = runs("float32")
    found, traces = runs("float32", noise=np.random.default_rng(0))
    assert (found["attn_norm", 0] != exact["attn_norm", 0]).any()
    assert (found["embedding", 0] == exact["embedding", 0]).all()
    point = Point(flags="default", device="gpu")
    assert measure.local(traces, model, point, "gpu").faults == []


def test_a_matrix_instruction_that_cuts_off_shows_at_products_alone(
    runs: Callable[..., Any], model: Weights
) -> None:
    """Sums of 7 bits in a bfloat16 model: a bit or two less than its dtype has."""
    _, traces = runs("bfloat16", chop=7)
    point = Point(dtype="bfloat16", flags="default", device="gpu")
    found = measure.local(traces, model, point, "gpu")
    kinds = {model.config.arch.stage[fault["stage"]].kind.sums_products for fault in found.faults}
    assert kinds == {True}


def test_a_corrupted_input_first_shows_where_it_is_used(
    kept: dict[str, Compiled], model: Weights
) -> None:
    part, compiled = parts_of(kept, model, "float32")["layer"]
    random = np.random.default_rng(3)
    arguments = {
        name: random.standard_normal(each.shape).astype(each.dtype)
        for name, each in execute.named(part.arguments).items()
    }
    arguments["pos.mask"] = np.tril(np.ones((1, 17, 17), bool))
    names = [path[-1].key for path, _ in part.returns]
    plain = dict(zip(names, execute.execute(compiled, arguments), strict=True))
    order = [stage.name for stage in model.config.arch.layer_stages]
    for name, stage in [
        ("parameters['up_proj']", "ffn_up"),
        ("parameters['k_bias']", "qkv_bias"),
        ("parameters['post_attention_layernorm']", "ffn_norm"),
        ("given['layer_input']", "attn_norm"),
    ]:
        changed = arguments[name].copy()
        changed.flat[5] += 1
        found = execute.execute(compiled, arguments | {name: changed})
        differ = [n for n, value in zip(names, found, strict=True) if (value != plain[n]).any()]
        assert min(differ, key=order.index) == stage
        assert order[-1] in differ


def test_constants_of_a_program_are_its_numbers() -> None:
    text = """
ENTRY %main (x: f32[]) -> (f32[2,2], s32[3]) {
  %a = f32[2,2]{1,0} constant({ { 1.5, -inf }, { 2e-3, -0 } })
  %b = s32[3]{0} constant({7, -1, 0})
  ROOT %t = (f32[2,2]{1,0}, s32[3]{0}) tuple(%a, %b)
}"""
    buffers = {"a": (0, 0), "b": (0, 256)}
    program = Compiled(hlo.Module(text), {}, (), {0: 512}, buffers)
    first, second = execute.execute(program, {})
    assert first.tolist() == [[1.5, -np.inf], [np.float32(2e-3), 0]] and np.signbit(first[1, 1])
    assert second.tolist() == [7, -1, 0] and second.dtype == np.int32
    cut = text.replace("7, -1, 0", "...")
    with pytest.raises(Unsupported, match="print"):
        execute.execute(Compiled(hlo.Module(cut), {}, (), {0: 512}, buffers), {})


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
        (["--execute"], "add --aot"),
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
def test_compiled_checked_and_executed(model: Weights, tmp_path: Path) -> None:
    sweep, target = tmp_path / "grid.toml", tmp_path / "found.json"
    sweep.write_text("[[grid]]\nlength = 5\n[[grid]]\nloop = 'program'\nlength = 5\n")
    given = {
        "sweep": sweep,
        "model": Path(model.files[0]).parent,
        "out": tmp_path / "out",
        "json": target,
    }
    given |= {"tokens": ",".join(map(str, BATCH.tokens[0])), "aot": "l4"}
    code = parity.main([*(f"--{name}={value}" for name, value in given.items()), "--execute"])
    as_described("parity", target.read_bytes())
    data = json.loads(target.read_text())
    assert (code, data["verdict"], data["compiled_for"]) == (0, "pass", "l4")
    assert [point["verdict"] for point in data["points"]] == ["executed", "checked"]
    assert data["points"][0]["executed"]["local_bits"]["worst"] > 20
    assert data["machine"]["versions"].keys() >= {"jax-cuda12-plugin", "jax-cuda12-pjrt"}
    table = (tmp_path / "out" / parity.TABLE).read_text()
    assert "Compiled and checked" in table and "Executed by an interpreter" in table


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
