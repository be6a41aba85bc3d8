"""One model over several devices: tensor parallelism after transformers' plan for Qwen2 and Qwen3.

The projections into heads and into the intermediate size are split by output (q, k, v, gate, up:
"colwise"), those back to the hidden size by input (o, down: "rowwise"), the head by vocabulary; all
else is on every device. Each device runs the stage functions on a model of its own size, ``local``.
The split products are added up in the compute dtype and rounded once, after that.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from functools import partial, reduce
from math import gcd
from typing import Any

import jax
import numpy as np
from jax import lax
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from qwen_jax import runtime
from qwen_jax.cache import whole
from qwen_jax.config import Config
from qwen_jax.engine import JaxEngine
from qwen_jax.estimate import head_tensor
from qwen_jax.forward import run_stages
from qwen_jax.models import FUNCTIONS, StageFunction
from qwen_jax.padded import Emit, EmitRows, Padded, Resume, Want
from qwen_jax.processes import Group
from qwen_jax.weights.base import Weights
from stages.architecture import CACHE, QKV, Architecture, Stage
from stages.errors import UserError

AXIS = "tp"
SPLIT = {"N", "K", "N*H", "K*H", QKV, "F", "V"}  # the axes that are split over the devices


def spec(axes: tuple[str, ...]) -> P:
    """How a value with these axes lies on the devices."""
    return P(*(AXIS if axis in SPLIT else None for axis in axes))


def stage_spec(stage: Stage) -> P:
    """How a stage, with a batch axis in front, lies on the devices."""
    return spec(("B", *stage.axes))


def tensor_specs(config: Config) -> dict[str, P]:
    """Hugging Face tensor name -> how it lies on the devices, for all tensors of a model.

    A tied head is the embedding itself, which is then split by vocabulary: the lookup needs no
    more than the rows in use.
    """
    arch, head = config.arch, head_tensor(config)
    tensors = arch.tensors(config.num_hidden_layers, config.tie_word_embeddings)
    return {
        name: spec(parameter.axes if name == head else parameter_axes(arch, parameter.name))
        for name, (parameter, _) in tensors.items()
    }


def parameter_axes(arch: Architecture, name: str) -> tuple[str, ...]:
    """The axes of a parameter as an engine holds it: of the embedding, the rows in use alone."""
    axes = arch.parameter[name].axes
    return ("rows", *axes[1:]) if arch.parameter[name] is arch.embedding else axes


def parameter_specs(arch: Architecture, names: Iterable[str]) -> dict[str, P]:
    """How parameters lie on the devices."""
    return {name: spec(parameter_axes(arch, name)) for name in names}


def sizes(config: Config, processes: int = 1) -> list[int]:
    """The mesh sizes that divide a model, ascending; a multiple of the number of processes."""
    common = gcd(config.num_key_value_heads, config.intermediate_size, config.vocab_size)
    return [n for n in range(1, common + 1) if common % n == 0 and n % processes == 0]


def check(config: Config, size: int, processes: int = 1) -> None:
    """Refuse a mesh that cannot divide the model evenly.

    Raises:
        UserError: with the sizes that can.
    """
    possible = sizes(config, processes)
    if size in possible:
        return
    counted = {
        "query heads": config.num_attention_heads,
        "key/value heads": config.num_key_value_heads,
        "intermediate channels": config.intermediate_size,
        "vocabulary entries": config.vocab_size,
    }
    odd = [f"{count} {name}" for name, count in counted.items() if count % size]
    if odd:
        raise UserError(f"--mesh tp={size} does not divide {', '.join(odd)}; {_use(possible)}")
    raise UserError(f"--mesh tp={size}: {processes} processes have no equal part; {_use(possible)}")


def _use(possible: list[int]) -> str:
    if not possible:
        return "use fewer processes"
    *most, last = map(str, possible)
    return f"use tp={', '.join(most)} or {last}" if most else f"use tp={last}"


def local(config: Config, size: int) -> Config:
    """The part of the model that one of ``size`` devices computes."""
    return replace(
        config,
        num_attention_heads=config.num_attention_heads // size,
        num_key_value_heads=config.num_key_value_heads // size,
        intermediate_size=config.intermediate_size // size,
        vocab_size=config.vocab_size // size,
    )


def _summed(function: StageFunction, size: int) -> StageFunction:
    """The sum of what the devices have, still unrounded, in the order of the devices.

    Not ``psum``: in which order that adds depends on which devices share a process (and on a GPU
    on how they are linked), and with the order the last bits.
    """

    def total(*args: Any) -> jax.Array:
        parts = lax.all_gather(function(*args), AXIS, to="invarying")
        return reduce(lax.add, (parts[i] for i in range(size)))

    return total


def _functions(arch: Architecture, size: int) -> dict[str, StageFunction]:
    """The stage functions, with a sum where a product is over an axis that is split."""

    arch = arch.cached

    def contracts(stage: Stage) -> bool:
        split = any(AXIS in spec(arch.axes_of(name)) for name in stage.inputs)
        return stage.linear and split and AXIS not in spec(stage.axes)

    return {
        name: _summed(function, size) if contracts(arch.stage[name]) else function
        for name, function in FUNCTIONS[arch.name].items()
    }


def program(
    mesh: Mesh | AbstractMesh,
    stages: tuple[Stage, ...],
    config: Config,
    dtype: Any,
    how: Callable[..., Any] = run_stages,
) -> Callable[..., Any]:
    """``how`` of these stages over a mesh: called as ``(parameters, pos, given)``, all of them
    global arrays."""
    size, arch = mesh.size, config.arch
    functions = _functions(arch, size)
    own = partial(how, stages, local(config, size), dtype=dtype, functions=functions)
    cache = {stage.name: stage_spec(stage) for stage in arch.cache}
    out = {stage.name: stage_spec(stage) for stage in stages}
    out |= {whole(stage.name): out[stage.name] for stage in stages if stage.kind is CACHE}

    def run(parameters: Any, pos: Any, given: Mapping[str, Any]) -> dict[str, jax.Array]:
        return jax.shard_map(
            own,
            mesh=mesh,
            in_specs=(
                parameter_specs(arch, parameters),
                P(),
                {name: cache.get(name, P()) for name in given},
            ),
            out_specs=out,
        )(parameters, pos, given)

    return run


class MeshEngine(JaxEngine):
    """A ``JaxEngine`` over the devices of a mesh.

    Memory on the host is that of ``JaxEngine`` in every process: each reads the tensors whole and
    gives its devices their parts.

    Arguments:
        devices: of ``open_devices``.
        group: the processes that compute together; None where this is the only one.
    """

    def __init__(
        self,
        model: Weights,
        dtype: str,
        devices: list[jax.Device],
        group: Group | None = None,
        keep: bool = False,
    ) -> None:
        self.mesh = Mesh(np.array(devices), (AXIS,), axis_types=(AxisType.Explicit,))
        self.group = group
        self.parts = len(devices)
        super().__init__(model, dtype, "xla", devices[0], keep)

    def _compiled(
        self, stages: tuple[Stage, ...], how: Callable[..., Any] = run_stages
    ) -> Callable[..., Any]:
        own = program(self.mesh, stages, self.model.config, self.dtype, how)
        return jax.jit(own, compiler_options=runtime.compiler_options())

    def describe(self) -> dict[str, Any]:
        processes = len({device.process_index for device in self.mesh.devices.flat})
        mesh = {AXIS: self.mesh.size, "devices": self.mesh.size, "processes": processes}
        return super().describe() | {"mesh": mesh}

    def run_batch(
        self,
        batch: Padded,
        logits: str,
        want: Want,
        emit: Emit,
        resume: Resume = None,
    ) -> None:
        group = self.group
        if group is None:
            return super().run_batch(batch, logits, want, emit, resume)
        with group.computing(emit) as emit:
            shape = (*batch.tokens.shape, self.model.config.hidden_size)
            resume = self._same_start(group, resume, shape)
            super().run_batch(batch, logits, want, emit, resume)
            hashes = self._hashes(resume[0] if resume else 0)
        group.compare("weights", hashes)

    def run_calls(
        self,
        batch: Padded,
        steps: tuple[int, ...],
        cache: str,
        logits: str,
        want: Want,
        emit: EmitRows,
    ) -> np.ndarray:
        group = self.group
        if group is None:
            return super().run_calls(batch, steps, cache, logits, want, emit)
        with group.computing(emit) as emit:
            picked = super().run_calls(batch, steps, cache, logits, want, emit)
            hashes = self._hashes(0)
        group.compare("weights", hashes)
        return picked

    def _hashes(self, first: int) -> dict[str, str]:
        """Hashes of the weights read from layer ``first`` on; process 0 alone checks what a resumed
        run read before that."""
        config = self.model.config
        numbers = range(first, config.num_hidden_layers)
        names = [n for layer in numbers for n in config.tensor_names("layer", layer).values()]
        return {n: self.model.hash(n).xxh3 for n in [*names, head_tensor(config)]}

    def _same_start(self, group: Group, resume: Resume, shape: tuple[int, ...]) -> Resume:
        """The layer and its input from which process 0 resumes, given to every process."""
        first = int(group.gather(np.array(resume[0] if resume else 0))[0])
        if first == 0:
            return None
        given = resume[1] if resume else np.zeros(shape, self.dtype)
        return first, group.gather(given)[0]

    def _put(self, values: Any) -> Any:
        return jax.tree.map(partial(self._split, where=P()), values)

    def _place(self, parameters: dict[str, np.ndarray]) -> dict[str, jax.Array]:
        with runtime.numerics(None):  # a thread that reads ahead has settings of its own
            specs = parameter_specs(self.arch, parameters)
            return {name: self._split(value, specs[name]) for name, value in parameters.items()}

    def _put_stage(self, stage: Stage, value: np.ndarray) -> jax.Array:
        return self._split(value, stage_spec(stage))

    def _split(self, value: np.ndarray, where: P) -> jax.Array:
        return jax.make_array_from_callback(
            value.shape, NamedSharding(self.mesh, where), lambda index: value[index]
        )

    def _host(self, stage: str, value: jax.Array) -> np.ndarray:
        """The whole value, in the order of the stage's axes; a collective over the processes."""
        if not value.is_fully_addressable:
            value = jax.reshard(value, NamedSharding(self.mesh, P())).addressable_data(0)
        whole = np.asarray(value)
        if QKV not in self.arch.cached.stage[stage].axes:
            return whole
        # Each device has its own q, k and v side by side.
        part = local(self.model.config, self.mesh.size)
        n, k = (
            part.head_dim * heads for heads in (part.num_attention_heads, part.num_key_value_heads)
        )
        split = whole.reshape(*whole.shape[:-1], self.mesh.size, n + 2 * k)
        parts = np.split(split, (n, n + k), axis=-1)
        return np.concatenate([x.reshape(*whole.shape[:-1], -1) for x in parts], axis=-1)


def open_devices(
    config: Config,
    size: int,
    device: str | None,
    group: Group | None,
    arguments: dict[str, Any],
) -> list[jax.Device]:
    """The devices of a mesh, as many of each process; where they are CPUs they are made.

    ``device`` is of ``runtime.devices``; ``arguments`` are those in which all processes of a group
    must agree.

    Raises:
        UserError: the mesh cannot divide the model, or there are too few devices.
    """
    processes = group.count if group else 1
    check(config, size, processes)
    runtime.for_a_command(device, cpu_devices=size // processes)
    if group:
        group.join(arguments)
    found: dict[int, list[Any]] = {}
    for each in runtime.devices(device):
        found.setdefault(each.process_index, []).append(each)
    least = min(map(len, found.values()))
    if least < size // processes:
        kind = found[0][0].platform
        here = f"{least} {kind} device{'s' if least > 1 else ''}"
        more = (
            "JAX_NUM_CPU_DEVICES and XLA_FLAGS hold it to that"
            if kind == "cpu"
            else "--device cpu makes as many as are asked for"
        )
        possible = [n for n in sizes(config, processes) if n <= least * processes]
        raise UserError(
            f"--mesh tp={size}: JAX finds {here} {'in each process' if group else 'here'}; "
            f"{_use(possible)}, or {more}"
        )
    return [each for process in sorted(found) for each in found[process][: size // processes]]
