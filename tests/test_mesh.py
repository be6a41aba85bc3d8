"""One model over several devices, and over several processes: where every value lies, that nothing
is created by the splitting that float32 rounding would not create, and the same bytes at one mesh
size however its devices are spread over processes."""

import json
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

import jax
import numpy as np
import pytest
from jax.sharding import AbstractMesh, AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from oracle.recorder import modeling
from qwen_jax import mesh, trace
from qwen_jax.config import from_hf
from qwen_jax.forward import abstract, read_parameters
from qwen_jax.models.ops import positional_by_layer
from qwen_jax.replay import Replay
from qwen_jax.weights import open_model
from qwen_jax.weights.huggingface import HuggingFaceWeights
from stages import verdict
from stages.architecture import LAYER_INPUT, QKV, TOKENS, Architecture
from stages.architectures import ARCHITECTURES, any_stage
from stages.errors import UserError
from stages.files import numpy_dtype
from stages.open import open_trace
from tests.conftest import user_environment
from tests.test_config import PUBLISHED, PUBLISHED_3
from tests.tiny import hf_config, write_checkpoint
from tests.traces import check_stages, relative_l2

# Eight key/value heads, four layers, one kind of attention each way; sizes that are all different.
HEADS = {
    "num_attention_heads": 16,
    "num_key_value_heads": 8,
    "num_hidden_layers": 4,
    "use_sliding_window": True,
    "sliding_window": 5,
    "max_window_layers": 2,
}
IDS = ",".join(map(str, np.random.default_rng(0).integers(0, 48, 19)))
DTYPES = ("float32", "bfloat16")
DECODE = ("--generate", "4", "--prefill-chunk", "8", "--cache", "float16")
MESHES = [("heads", "float32", size) for size in (1, 2, 4, 8)]  # model, dtype, devices
MESHES += [("heads", "bfloat16", 8), *(("demo", dtype, 2) for dtype in DTYPES)]
MESHES += [("qwen3", "float32", 4), ("qwen3", "bfloat16", 8)]

# Which axis of each stage, the batch in front, is split over the devices; None where all is
# everywhere.
SPLIT = {
    "embedding": None,
    "attn_norm": None,
    "qkv_matmul": 2,
    "qkv_bias": 2,
    "q_post_rope": 2,
    "k_post_rope": 2,
    "q_norm": 2,
    "k_norm": 2,
    "attn_scores": 1,
    "attn_softmax": 1,
    "attention": 2,
    "attn_out": None,
    "post_attn_residual": None,
    "ffn_norm": None,
    "ffn_gate": 2,
    "ffn_up": 2,
    "ffn_silu": 2,
    "ffn_swigl": 2,
    "ffn_out": None,
    "post_ffn_residual": None,
    "final_norm": None,
    "lm_head": 2,
}


def placed(stage: str) -> tuple[str | None, ...]:
    """How a stage lies on the devices, by the list above."""
    rank = 1 + len(any_stage(stage).axes)
    return tuple("tp" if axis == SPLIT[stage] else None for axis in range(rank))


# --- one process, many devices

# Traces as the command does, each a command line, and notes where the computed arrays lie and how
# many layers' weights are on the devices whenever more are read.
WORKER = """
import json, sys
import jax
from qwen_jax import mesh, trace
from qwen_jax.weights.base import Weights
host, load, lies, alive = mesh.MeshEngine._host, Weights.load, {}, []
def noting_host(self, stage, value):
    lies[stage] = list(value.sharding.spec)
    return host(self, stage, value)
def noting_load(self, name, start, out):
    shape = self.shapes["model.layers.0.self_attn.q_proj.weight"]
    alive.append(sum(array.shape == shape for array in jax.live_arrays()))
    load(self, name, start, out)
mesh.MeshEngine._host, Weights.load = noting_host, noting_load
said, sys.stdout = sys.stdout, sys.stderr
notes = {}
for out, line in json.load(sys.stdin).items():
    lies.clear(), alive.clear()
    assert trace.main([*line, "--out", out]) == 0
    notes[out] = {"lies": dict(lies), "alive": max(alive)}
json.dump(notes, said)
"""


@dataclass(frozen=True)
class World:
    """Traces that one process with eight devices made.

    Attributes:
        folder: of the traces and of the model ``heads``.
        notes: the name of a trace -> what ``WORKER`` noted of it.
    """

    folder: Path
    notes: dict[str, dict]

    def model(self, name: str) -> HuggingFaceWeights:
        return open_model("demo") if name == "demo" else HuggingFaceWeights(self.folder / name)


def arguments(model: str, dtype: str, size: int | None, *more: str) -> list[str]:
    """A command line of the trace command, without --out; the demo's prompt is the embedded one."""
    chosen = [] if model == "demo" else ["--model", model, "--tokens", IDS]
    split = ["--mesh", f"tp={size}"] if size else []
    return [*chosen, "--dtype", dtype, *split, *more]


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    folder = tmp_path_factory.mktemp("mesh")
    write_checkpoint(folder / "heads", **HEADS)
    write_checkpoint(folder / "qwen3", model_type="qwen3", **HEADS)
    alone = [(model, dtype, None) for model in ("heads", "qwen3", "demo") for dtype in DTYPES]
    lines = {"-".join(map(str, made)): arguments(*made) for made in (*MESHES, *alone)}
    few = ["--stages", "attn_scores,lm_head", "--layers", "1"]
    lines["few"] = arguments("heads", "bfloat16", 8, *few)
    lines["none"] = arguments("heads", "bfloat16", 8, "--stages", "lm_head")
    lines |= {f"decode-{size}": arguments("heads", "float32", size, *DECODE) for size in (4, None)}
    done = subprocess.run(
        [sys.executable, "-c", WORKER],
        input=json.dumps(lines),
        cwd=folder,
        env=user_environment() | {"JAX_NUM_CPU_DEVICES": "8"},
        capture_output=True,
        encoding="utf-8",
    )
    assert done.returncode == 0, done.stderr
    return World(folder, json.loads(done.stdout))


def content(folder: Path) -> dict[str, bytes]:
    return {str(f.relative_to(folder)): f.read_bytes() for f in folder.rglob("*.bin")}


@pytest.mark.parametrize(("model", "dtype", "size"), MESHES)
def test_every_stage_lies_where_it_should(world: World, model: str, dtype: str, size: int) -> None:
    lies = world.notes[f"{model}-{dtype}-{size}"]["lies"]
    names = world.model(model).config.arch.names
    assert {stage: tuple(axes) for stage, axes in lies.items()} == {s: placed(s) for s in names}


@pytest.mark.parametrize(("model", "dtype", "size"), MESHES)
def test_splitting_creates_no_error(world: World, model: str, dtype: str, size: int) -> None:
    """Each stage, replayed alone, has the bits of its precision, 20 at least in float32."""
    weights = world.model(model)
    opened = open_trace(world.folder / f"{model}-{dtype}-{size}")
    config, dims = weights.config, weights.config.dims(len(opened.tokens))
    measured = []
    for m in Replay(opened, weights, numpy_dtype(dtype), unoptimised=True):
        heads = m.stage.heads(dims)
        item = verdict.judge(m.stage, m.layer, m.sums, m.segment, heads, 0, dtype)
        least = 20 if dtype == "float32" else 8.4
        assert item.bits >= least, f"{m.stage.name}, layer {m.layer}: {item.bits:.1f} bits"
        measured.append((m.stage, m.layer))
    assert measured == list(config.arch.computation_order(config.num_hidden_layers))


@pytest.mark.parametrize("model", ["heads", "qwen3"])
def test_partial_products_are_rounded_once(world: World, model: str) -> None:
    """After they are added up: then nearly every element is the exact sum, rounded to bfloat16. The
    rest lies so near the middle of two such numbers that float32 does not tell. With the parts
    rounded before, half of all elements differ, which costs no more than half a bit."""
    weights, bf16 = world.model(model), numpy_dtype("bfloat16")
    opened = open_trace(world.folder / f"{model}-bfloat16-8")
    for layer in range(weights.config.num_hidden_layers):
        parameters = read_parameters(weights, "layer", layer)
        for stage, name in (("attn_out", "o_proj"), ("ffn_out", "down_proj")):
            x = opened.read(*(any_stage(stage).inputs[0], layer)).astype(np.float64)
            exact = x @ parameters[name].astype(bf16).astype(np.float64).T
            same = exact.astype(bf16) == opened.read(stage, layer).astype(bf16)
            assert same.mean() > 0.99, f"{stage}, layer {layer}: {same.mean():.1%}"


@pytest.mark.parametrize(("model", "dtype", "size"), MESHES)
def test_a_mesh_agrees_with_one_device(world: World, model: str, dtype: str, size: int) -> None:
    """float32: sums in another order, carried through all layers. bfloat16: the next number, here
    and there."""
    traces = [open_trace(world.folder / f"{model}-{dtype}-{n}") for n in (size, None)]
    split, alone = ({key: trace.read(*key) for key in trace.entries} for trace in traces)
    bound = {"float32": 1e-5, "bfloat16": 0.05}[dtype]
    check_stages(world.model(model).config, split, alone, bound)


def test_a_mesh_of_one_device_changes_no_byte(world: World) -> None:
    one, none = (content(world.folder / f"heads-float32-{n}") for n in (1, None))
    assert one == none


def test_what_is_captured_changes_no_byte(world: World) -> None:
    everything = content(world.folder / "heads-bfloat16-8")
    for name, count in {"few": 2, "none": 1}.items():
        captured = content(world.folder / name)
        assert len(captured) == count and "lm_head.bin" in captured
        assert captured.items() <= everything.items()


def test_two_layers_of_weights_at_a_time(world: World) -> None:
    for name, noted in world.notes.items():
        if not name.startswith("decode"):  # which reads them once, and keeps them
            assert noted["alive"] <= 2, name


def test_a_mesh_decodes_through_a_cache_that_is_split(world: World) -> None:
    split, alone = (open_trace(world.folder / f"decode-{size}") for size in (4, None))
    assert split.tokens == alone.tokens and split.steps == alone.steps == (8, 8, 3, 1, 1, 1)
    assert world.notes["decode-4"]["lies"]["k_cache"] == [None, None, "tp", None]
    for key in alone.entries:
        if "cache" in key[0]:  # a value may lie between two of float16
            error = relative_l2(split.read(*key), alone.read(*key))
            assert error <= 1e-4, key
    both = ({k: t.read(*k) for k in t.entries if "cache" not in k[0]} for t in (split, alone))
    check_stages(world.model("heads").config, *both, 1e-4)


def test_the_manifest_says_which_mesh(world: World) -> None:
    made = open_trace(world.folder / "heads-float32-8").manifest
    assert made.producer["mesh"] == {"tp": 8, "devices": 8, "processes": 1}
    alone = open_trace(world.folder / "heads-float32-None").manifest
    assert "mesh" not in alone.producer
    assert made.model == alone.model


# --- several processes


@pytest.fixture
def port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return server.getsockname()[1]


# A process with a fault: something happens when it is to gather the third value.
FAULT = """
import os, signal
from qwen_jax import cli, mesh, trace
seen = []
def host(self, stage, value):
    seen.append(stage)
    if len(seen) == 3: {happens}
    return MeshEngine_host(self, stage, value)
MeshEngine_host, mesh.MeshEngine._host = mesh.MeshEngine._host, host
cli.run(trace.main)
"""
DYING = FAULT.format(happens="os._exit(7)")
KILLED = FAULT.format(happens="os.kill(os.getpid(), signal.SIGKILL)")
HUNG = FAULT.format(happens="os.kill(os.getpid(), signal.SIGSTOP)")
INTERRUPTED = FAULT.format(happens="raise KeyboardInterrupt")
BUG = FAULT.format(happens="raise RuntimeError('boom')")
# Process 0 with a fault: its disk is full in layer 2.
FULL = """
from qwen_jax import cli, trace
from stages import writer
from stages.errors import UserError
write = writer.TraceWriter._write
def full(self, key, value, rows):
    if key[1] == 2: raise OSError(28, "No space left on device")
    write(self, key, value, rows)
writer.TraceWriter._write = full
cli.run(trace.main)
"""
# Process 0 cannot write the last file, the manifest, when the others have computed all.
UNFINISHED = """
from qwen_jax import cli, trace
from stages import writer
from stages.errors import UserError
def finish(self, *args): raise UserError("no manifest today")
writer.TraceWriter.finish = finish
cli.run(trace.main)
"""
COMMAND = "from qwen_jax import cli, trace; cli.run(trace.main)"


def together(
    cwd: Path, port: int, *lines: list[str], programs: dict[int, str] | None = None
) -> Iterator[tuple[int, str, str]]:
    """Start a process for each command line; yield exit code, stdout and stderr of each."""
    where = f"--coordinator 127.0.0.1:{port} --num-processes {len(lines)}"
    shared = [f"{where} --process-id {number}".split() for number in range(len(lines))]
    started = [
        subprocess.Popen(
            [sys.executable, "-c", (programs or {}).get(number, COMMAND), *line, *shared[number]],
            cwd=cwd,
            env=user_environment(),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            encoding="utf-8",
        )
        for number, line in enumerate(lines)
    ]
    try:
        for process in started:
            out, err = process.communicate(timeout=1800)
            yield process.returncode, out, err
    finally:
        for process in started:
            with process:  # which closes what it has open
                process.kill()


def test_two_processes_write_what_one_writes(world: World, port: int) -> None:
    line = [*arguments("heads", "float32", 8), "--json", "-", "--out", "two"]
    first, second = together(world.folder, port, line, line)
    assert (first[0], second) == (0, (0, "", ""))
    assert json.loads(first[1])["files"] == 17 * 4 + 3, "and nothing else on stdout"
    assert content(world.folder / "two") == content(world.folder / "heads-float32-8")
    made = open_trace(world.folder / "two").manifest
    assert made.producer["mesh"] == {"tp": 8, "devices": 8, "processes": 2}


def test_a_disk_that_is_full_ends_both_and_resume_goes_on(world: World, port: int) -> None:
    line = [*arguments("heads", "float32", 8), "--out", "full"]
    first, second = together(world.folder, port, line, line, programs={0: FULL})
    assert first[0] == second[0] == 2
    assert "No space left" in first[2] and first[2].count("\n") == 1
    assert second[2] == "error: process 0 failed; it says why\n"
    again = [*line, "--resume"]
    first, second = together(world.folder, port, again, again)
    assert (first[0], second[0]) == (0, 0), first[2] + second[2]
    assert content(world.folder / "full") == content(world.folder / "heads-float32-8")


def test_a_failure_after_the_computation_is_told(world: World, port: int) -> None:
    line = [*arguments("heads", "float32", 8), "--out", "unfinished"]
    first, second = together(world.folder, port, line, line, programs={0: UNFINISHED})
    assert first == (2, "", "error: no manifest today\n")
    assert second == (2, "", "error: process 0 failed; it says why\n")
    assert not (world.folder / "unfinished" / "manifest.json").exists()


def test_a_failure_before_the_computation_is_told(world: World, port: int) -> None:
    """Process 0 alone knows what is in --out, and looks when all are there."""
    line = [*arguments("heads", "float32", 8), "--out", "begun"]
    for _ in together(world.folder, port, line, line, programs={0: FULL}):
        pass
    other = [*line, "--tokens", "1,2,3", "--resume"]
    first, second = together(world.folder, port, other, other)
    assert first[0] == 2 and "begun" in first[2] and first[2].count("\n") == 1
    assert second == (2, "", "error: process 0 failed; it says why\n")


@pytest.mark.parametrize(
    ("fault", "code"), [(DYING, 7), (KILLED, -9), (INTERRUPTED, 130), (BUG, 4)]
)
def test_a_process_that_dies_ends_process_0(world: World, port: int, fault: str, code: int) -> None:
    out = f"dead{code}"
    line = [*arguments("heads", "float32", 8), "--out", out]
    began = time.monotonic()
    first, second = together(world.folder, port, line, line, programs={1: fault})
    assert time.monotonic() - began < 60
    assert second[0] == code
    line = "error: another process ended before the trace was whole; it says why\n"
    assert (first[0], first[2]) == (2, line)
    assert not (world.folder / out / "manifest.json").exists()


@pytest.mark.parametrize(("fault", "code"), [(KILLED, -9), (INTERRUPTED, 130)])
def test_process_0_that_dies_ends_the_other(world: World, port: int, fault: str, code: int) -> None:
    """JAX's service goes with it, and JAX then aborts; what is there already goes on."""
    out = f"headless{code}"
    line = [*arguments("heads", "float32", 8), "--out", out]
    began = time.monotonic()
    first, second = together(world.folder, port, line, line, programs={0: fault})
    assert time.monotonic() - began < 60
    assert first[0] == code
    assert second[0] in (2, -signal.SIGABRT)
    assert "another process ended" in second[2] or "JAX distributed service" in second[2]
    assert not (world.folder / out / "manifest.json").exists()
    again = [*line, "--resume"]
    first, second = together(world.folder, port, again, again)
    assert (first[0], second[0]) == (0, 0), first[2] + second[2]
    assert content(world.folder / out) == content(world.folder / "heads-float32-8")


def test_a_process_that_hangs_ends_process_0(world: World, port: int) -> None:
    """As a machine that is cut off: nothing is closed, but no sign comes of it any more."""
    line = [*arguments("heads", "float32", 8), "--out", "hung"]
    began = time.monotonic()
    with closing(together(world.folder, port, line, line, programs={1: HUNG})) as ended:
        code, _, said = next(ended)
    assert time.monotonic() - began < 60
    assert code == -signal.SIGABRT
    assert "stopped sending heartbeats" in said
    assert not (world.folder / "hung" / "manifest.json").exists()


def test_processes_with_other_weights_are_told(world: World, port: int) -> None:
    write_checkpoint(world.folder / "heads2", seed=1, **HEADS)
    lines = [arguments(model, "float32", 8, "--stages", "lm_head") for model in ("heads", "heads2")]
    lines = [[*line, "--out", "other"] for line in lines]
    first, second = together(world.folder, port, *lines)
    assert first[0] == second[0] == 2
    for said in (first[2], second[2]):
        assert "error: process 1 has other weights than process 0: model.layers.0." in said
        assert said.count("\n") == 1
    assert not (world.folder / "other" / "manifest.json").exists()


@pytest.mark.parametrize(
    ("more", "name"),
    [
        (["--dtype", "bfloat16"], "--dtype"),
        (["--mesh", "tp=4"], "--mesh"),  # another number of CPU devices too
        (["--tokens", "1,2"], "tokens"),
        (["--model", "demo", "--mesh", "tp=2"], "--mesh, config.json"),
    ],
)
def test_processes_with_other_arguments_are_told(
    world: World, port: int, more: list[str], name: str
) -> None:
    line = arguments("heads", "float32", 8)
    told = f"error: process 1 has other arguments than process 0: {name}\n"
    for process in together(world.folder, port, line, [*line, *more]):
        assert process == (2, "", told)
    assert not (world.folder / "heads-trace").exists()


def alone(cwd: Path, where: str, number: int) -> tuple[int, str, str]:
    """One of two processes, of which the other never comes."""
    line = arguments("heads", "float32", 8, "--join-timeout", "1", "--num-processes", "2")
    done = subprocess.run(
        [sys.executable, "-c", COMMAND, *line, "--coordinator", where, "--process-id", f"{number}"],
        cwd=cwd,
        env=user_environment(),
        capture_output=True,
        encoding="utf-8",
        timeout=1800,
    )
    return done.returncode, done.stdout, done.stderr


@pytest.mark.parametrize("number", [0, 1])
def test_a_process_that_never_comes(world: World, port: int, number: int) -> None:
    """One line and exit code 2 on either side, where JAX itself would abort with a stack dump."""
    where = f"127.0.0.1:{port}"
    said = f"error: not all of 2 processes came to --coordinator {where} within 1 s; start every "
    said += "--process-id from 0 to 1\n"
    assert alone(world.folder, where, number) == (2, "", said)


@pytest.mark.parametrize(
    ("where", "why"),
    [
        ("192.0.2.1:9911", "Cannot assign requested address"),
        ("nowhere.invalid:9911", ""),  # the system's words
        ("127.0.0.1:{taken}", "Address already in use"),
    ],
)
def test_an_address_of_no_use(world: World, where: str, why: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        where = where.format(taken=server.getsockname()[1])
        code, out, err = alone(world.folder, where, 0)
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert err.startswith(f"error: --coordinator {where}: {why}")
    assert err.endswith("; it must be a free port of the machine of process 0\n")


# --- wrong use

GROUP = ["--coordinator", "127.0.0.1:9", "--process-id", "0", "--num-processes", "2"]
REFUSED = {
    "--mesh 8": "'8' is no mesh; write tp=N for N devices: tp=8",
    "--mesh tp=0": "'tp=0' is no mesh",
    "--mesh dp=2": "'dp=2' is no mesh",
    "--mesh tp=2,dp=2": "'tp=2,dp=2' is no mesh",
    "--mesh tp=2 --backend eager": "--backend eager runs un-jitted on one device; drop --mesh",
    "--mesh tp=4": "tp=4 does not divide 14 query heads, 2 key/value heads; use tp=1 or 2",
    "--mesh tp=7": "608 intermediate channels, 2048 vocabulary entries; use tp=1 or 2",
    "--mesh tp=2": "JAX finds 1 cpu device here; use tp=1, or JAX_NUM_CPU_DEVICES and XLA_FLAGS",
    "--coordinator here:1": "--coordinator, --process-id and --num-processes go together",
    "--mesh tp=2 --process-id 0 --num-processes 2": "go together: give all three",
    "--coordinator 7 --mesh tp=2": "'7' is no address; expected HOST:PORT",
    "--coordinator h:99999 --mesh tp=2": "'h:99999' is no address",
    " ".join(GROUP): "--num-processes 2 share a mesh: add --mesh tp=N",
    " ".join([*GROUP[:2], "--process-id 2 --num-processes 2 --mesh tp=2"]): "they go from 0 to 1",
    " ".join([*GROUP, "--mesh tp=2 --join-timeout 0"]): "--join-timeout 0: expected seconds",
    " ".join([*GROUP, "--mesh tp=1"]): "--mesh tp=1: 2 processes have no equal part; use tp=2",
}


@pytest.mark.parametrize("line", REFUSED)
def test_refused_in_one_line(line: str, tmp_path: Path) -> None:
    with pytest.raises(UserError) as refused:
        trace.main([*line.split(), "--out", str(tmp_path / "out")])
    assert REFUSED[line] in str(refused.value)
    assert "\n" not in str(refused.value)
    assert not (tmp_path / "out").exists()


# --- without devices


def plan_of_transformers(config: dict) -> dict[str, P]:
    """Tensor name -> how transformers splits it: colwise the outputs, bias included; rowwise the
    inputs."""
    parsed = from_hf(config)
    theirs = CONFIG_MAPPING[parsed.architecture].base_model_tp_plan
    plan = {f"model.{name}": style for name, style in theirs.items()}
    plan |= getattr(modeling(parsed.arch), parsed.arch.hf_class)._tp_plan
    found = {}
    for name, shape in parsed.shapes.items():
        module, kind = name.rsplit(".", 1)
        if config["tie_word_embeddings"] and module == "model.embed_tokens":
            module = "lm_head"  # one tensor, used as both
        style = plan.get(".".join("*" if part.isdecimal() else part for part in module.split(".")))
        if style and style.startswith("replicated"):
            style = None
        split = {None: None, "colwise": 0, "colwise_gather_output": 0, "rowwise": 1}[style]
        assert kind == "weight" or style == "colwise"
        found[name] = P(*("tp" if axis == split else None for axis in range(len(shape))))
    return found


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_the_plan_is_that_of_transformers(architecture: str, tied: bool) -> None:
    config = hf_config(model_type=architecture, **HEADS, tie_word_embeddings=tied)
    assert mesh.tensor_specs(from_hf(config)) == plan_of_transformers(config)


@pytest.mark.parametrize("arch", ARCHITECTURES.values(), ids=ARCHITECTURES)
def test_a_part_of_a_parameter_is_one_of_the_smaller_model(arch: Architecture) -> None:
    """What a device holds has the shape that the stage functions expect of a model of its size."""
    config, size = from_hf(hf_config(model_type=arch.name, **HEADS)), 8
    devices = AbstractMesh((size,), ("tp",), axis_types=(AxisType.Explicit,))
    weights, own = abstract(config, "float32"), abstract(mesh.local(config, size), "float32")
    counted = 0
    for part, smaller in zip(
        (weights.layers[0], weights.end), (own.layers[0], own.end), strict=True
    ):
        for name, where in mesh.parameter_specs(arch, part).items():
            split = NamedSharding(devices, where).shard_shape(part[name].shape)
            assert split == smaller[name].shape, name
            counted += 1
    assert counted == len(arch.parameters) - 1
    # Of the embedding every device has the rows in use.
    assert mesh.parameter_specs(arch, weights.start) == {"embed_tokens": P(None, None)}


@pytest.mark.parametrize(
    ("name", "part"),  # part: N, K, F and V of one device
    [("Qwen2.5-72B", (8, 1, 3696, 19008)), ("Qwen3-32B", (8, 1, 3200, 18992))],
)
def test_the_largest_over_eight_devices(name: str, part: tuple[int, ...]) -> None:
    """Types alone: what every stage of the largest models is on each of eight devices."""
    config, length, size = from_hf((PUBLISHED | PUBLISHED_3)[name]), 5, 8
    arch = config.arch
    devices = AbstractMesh((size,), ("tp",), axis_types=(AxisType.Explicit,))
    weights = abstract(config, "bfloat16")

    def on(value: object, spec: P) -> jax.ShapeDtypeStruct:
        sharding = NamedSharding(devices, spec)
        return jax.ShapeDtypeStruct(value.shape, value.dtype, sharding=sharding)

    pos = positional_by_layer(config, np.arange(length)[None])[False]
    pos = jax.tree.map(lambda value: on(value, P()), pos)
    hidden = on(jax.ShapeDtypeStruct((1, length, config.hidden_size), "bfloat16"), P())
    tokens = on(jax.ShapeDtypeStruct((1, length), "int32"), P())
    found = {}
    for rows, parameters, given in (
        (arch.start_stages, weights.start, {TOKENS: tokens}),
        (arch.layer_stages, weights.layers[-1], {LAYER_INPUT: hidden}),
        (arch.end_stages, weights.end, {"post_ffn_residual": hidden}),
    ):
        parameters = jax.tree.map(on, parameters, mesh.parameter_specs(arch, parameters))
        run = mesh.program(devices, rows, config, numpy_dtype("bfloat16"))
        found |= jax.eval_shape(run, parameters, pos, given)
    assert set(found) == set(arch.names)
    own = mesh.local(config, size).dims(length)
    assert (own["N"], own["K"], own["F"], own["V"]) == part
    for stage in arch.stages:
        value = found[stage.name]
        assert value.shape == (1, *stage.shape(config.dims(length)))
        assert tuple(value.sharding.spec) == placed(stage.name)
        assert value.sharding.shard_shape(value.shape) == (1, *stage.shape(own))
        assert QKV not in stage.axes or value.sharding.shard_shape(value.shape)[2] == 10 * 128


@pytest.mark.parametrize("name", [*PUBLISHED, *PUBLISHED_3])
def test_sizes_of_published_models(name: str) -> None:
    """Key/value heads are what limits every one of them."""
    config = from_hf((PUBLISHED | PUBLISHED_3)[name])
    heads = config.num_key_value_heads
    assert mesh.sizes(config) == [n for n in (1, 2, 4, 8, 16, 32) if heads % n == 0]
    mesh.check(config, heads)
    with pytest.raises(UserError, match=f"does not divide .*{heads} key/value heads"):
        mesh.check(config, 2 * heads)
