"""Programs that were compiled for a GPU, executed on the CPU: XLA's plan of a program, and each of
its kernels by the interpreter."""

import re
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from jax.tree_util import keystr, tree_leaves_with_path

from qwen_jax import runtime
from qwen_jax.forward import read_parameters, run_stages
from qwen_jax.models.ops import positional_by_layer
from qwen_jax.padded import Padded
from qwen_jax.weights.base import Weights
from stages.architecture import LAYER_INPUT, TOKENS, Stage
from stages.trace import numpy_dtype
from tools.parity.gpu import hlo
from tools.parity.gpu.check import sanitised
from tools.parity.gpu.compile import Compiled
from tools.parity.gpu.interpreter import Memory, Unsupported, run
from tools.parity.programs import Part, Values
from tools.parity.variants import Variant

ARGUMENTS = ("parameters", "pos", "given")  # of ``forward.run_stages``


def execute(
    compiled: Compiled, arguments: Mapping[str, np.ndarray], **how: Any
) -> list[np.ndarray]:
    """What a program returns.

    Arguments:
        arguments: by the name that XLA keeps of them, as "given['layer_input']".
        how: ``noise`` and ``chop`` of ``interpreter.run``.

    Raises:
        Unsupported: a step that is no kernel of the program's own.
    """
    module, memory = compiled.module, Memory(compiled.allocations)
    launches = iter(compiled.launches)
    at: dict[str, list[int]] = {}  # the addresses of an instruction's arrays
    for each in module.computations[module.entry]:
        shapes = hlo.shapes(each.shape)
        if each.opcode == "bitcast":
            at[each.name] = at[each.operands[0]]
        elif each.opcode == "get-tuple-element":
            at[each.name] = [at[each.operands[0]][each.number]]
        elif each.opcode == "tuple":
            at[each.name] = [address for name in each.operands for address in at[name]]
        else:
            several = each.shape.startswith("(")
            names = [f"{each.name}{{{n}}}" if several else each.name for n in range(len(shapes))]
            at[each.name] = [memory.at(*compiled.buffers[name]) for name in names]
        if each.opcode == "parameter":
            memory.write(at[each.name][0], arguments[each.traced])
        elif each.opcode in ("fusion", "copy"):
            launch, own = next(launches), sanitised(each.name)
            kernel = compiled.kernels.get(launch.kernel)
            if kernel is None or (launch.kernel != own and own in compiled.kernels):
                raise Unsupported(f"{each.opcode} {each.name}: {launch.kind} {launch.kernel}")
            given = [address for name in (*each.operands, each.name) for address in at[name]]
            run(kernel, launch, given, memory, **how)
        elif each.opcode == "constant":
            memory.write(at[each.name][0], _constant(each.argument, shapes[0]))
        elif each.opcode not in ("bitcast", "get-tuple-element", "tuple"):
            raise Unsupported(f"{each.opcode} {each.name}")
        if each.root:
            return [
                memory.read(address, shape.dtype, shape.sizes)
                for address, shape in zip(at[each.name], shapes, strict=True)
            ]
    raise Unsupported("no instruction is the root")


def _constant(text: str, shape: hlo.Shape) -> np.ndarray:
    """The numbers of an HLO constant."""
    if "..." in text:
        raise Unsupported("a constant that XLA does not print")
    words = {"true": "1", "false": "0"}
    numbers = [words.get(word, word) for word in re.findall(r"[\w.+-]+", text)]
    return np.array(numbers, np.float64).astype(shape.dtype).reshape(shape.sizes)


def values(
    parts: Mapping[str, tuple[Part, Compiled]], model: Weights, batch: Padded, **how: Any
) -> Values:
    """Every stage of a model, from its layer-wise programs: ``{(stage, layer): [B, ...]}``.

    ``parts`` are by name, as of ``programs.Layers.programs``.
    """
    config, arch = model.config, model.config.arch
    pos = positional_by_layer(config, batch.positions, batch.valid)

    def program(name: str, *arguments: Any) -> dict[str, np.ndarray]:
        part, compiled = parts[name]
        found = execute(compiled, named(arguments), **how)
        names = [path[-1].key for path, _ in part.returns]
        return dict(zip(names, found, strict=True))

    rows, index = np.unique(batch.tokens, return_inverse=True)
    ids = {TOKENS: index.reshape(batch.tokens.shape).astype(np.int32)}
    table = {arch.embedding.name: model.gather(arch.embedding.tensor, rows)}
    found = {(name, 0): value for name, value in program("start", table, pos[False], ids).items()}
    x = found[arch.first.name, 0]
    for layer, sliding in enumerate(config.sliding_layers):
        weights = read_parameters(model, "layer", layer)
        name = "layer, sliding" if sliding else "layer"
        stages = program(name, weights, pos[sliding], {LAYER_INPUT: x})
        x = stages[arch.layer_output.name]
        found |= {(s.name, layer): stages[s.name] for s in arch.layer_stages if s.name in stages}
    end, given = read_parameters(model, "end"), {arch.layer_output.name: x}
    norm = program("norm", end, pos[False], given)
    head = program("head", end, pos[False], {arch.head.inputs[0]: norm[arch.head.inputs[0]]})
    return found | {(name, None): value for name, value in (norm | head).items()}


def created(found: Values, variant: Variant, model: Weights, batch: Padded, dtype: str) -> int:
    """How many values of all stages differ from what the un-jitted stage on the CPU makes of the
    same inputs: what a program adds to the difference, without what arrived from before."""
    config, arch = model.config, model.config.arch
    pos = positional_by_layer(config, batch.positions, batch.valid)
    cpu, count = jax.devices("cpu")[0], 0

    def stage(row: Stage, layer: int | None, before: dict[str, Any]) -> int:
        parameters = read_parameters(model, "end" if layer is None else "layer", layer)
        sliding = layer is not None and config.sliding_layers[layer]
        rows = [r for r in variant.rows if r.name in row.unrounded] + [row]
        made = run_stages(
            rows, config, parameters, pos[sliding], before, numpy_dtype(dtype), variant.functions
        )
        return int((np.asarray(made[row.name]) != found[row.name, layer]).sum())

    with runtime.numerics("highest"), jax.default_device(cpu):
        for layer in range(config.num_hidden_layers):
            held: dict[str, Any] = {s.name: found[s.name, layer] for s in variant.rows}
            source = (arch.first.name, 0) if not layer else (arch.layer_output.name, layer - 1)
            held[LAYER_INPUT] = found[source]
            count += sum(stage(row, layer, held) for row in variant.rows)
        last: dict[str, Any] = {}
        last[arch.layer_output.name] = found[arch.layer_output.name, layer]
        last |= {s.name: found[s.name, None] for s in arch.end_stages}
        return count + sum(stage(row, None, last) for row in arch.end_stages)


def named(arguments: tuple[Any, ...]) -> dict[str, Any]:
    """Arrays by the names that XLA keeps of the arguments of ``forward.run_stages``."""
    return {
        name + keystr(path): leaf
        for name, tree in zip(ARGUMENTS, arguments, strict=True)
        for path, leaf in tree_leaves_with_path(tree)
    }
