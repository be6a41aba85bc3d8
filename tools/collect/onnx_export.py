"""A Hugging Face model as ONNX, and which of its values are stages.

PyTorch's exporter notes with every node in which module it was computed. So a module's output is
the last value that leaves its nodes, its input the first that enters them, and no name is written
by hand. What lies inside attention is found around its softmax.
"""

import ast
import contextlib
import io
import logging
import tempfile
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import onnx
import torch

from qwen_jax.weights.base import Weights
from stages import places
from stages.architecture import Architecture
from stages.errors import UserError
from tools.collect import huggingface
from tools.collect.recorder import Recorder
from tools.collect.session import Calls, Session

SCOPES = "pkg.torch.onnx.name_scopes"
MOVES = ("Transpose", "Reshape", "Unsqueeze", "Expand", "Identity", "Cast")  # no arithmetic


class Tap(NamedTuple):
    """A value of the graph that is a stage. ``heads_lead``: it is [1, heads, T, H] there."""

    value: str
    layer: int | None
    stage: str
    part: str = ""
    heads_lead: bool = False


class Exported:
    """A model's graph for one sequence of a fixed length, on disk as long as this lives.

    Attributes:
        path: the ONNX file.
        taps: the values that are stages.
        logits: the name of the graph's output.
        linear: module -> the constant that it multiplies by, [in, out].

    Raises:
        UserError: transformers or the exporter cannot do it.
    """

    def __init__(self, model: Weights, length: int) -> None:
        network = huggingface.load(model, huggingface.Settings())
        self._folder = tempfile.TemporaryDirectory(prefix="onnx-")
        self.path = Path(self._folder.name) / "model.onnx"
        export(network, length, self.path)
        graph = onnx.load(str(self.path), load_external_data=False).graph
        self.logits = graph.output[0].name
        self._nodes = [node for node in graph.node if node.op_type != "Constant"]
        self._constants = {each.name for each in graph.initializer}
        self._makers = {name: node for node in self._nodes for name in node.output}
        self._from_tokens = self._depending("input_ids")
        self.linear: dict[str, str] = {}
        found = {(tap.stage, tap.layer, tap.part): tap for tap in self._find(model.config.arch)}
        self.taps = list(found.values())

    def close(self) -> None:
        self._folder.cleanup()

    def _depending(self, name: str) -> set[str]:
        found = {name}
        for node in self._nodes:
            if found & set(node.input):
                found.update(node.output)
        return found

    def _find(self, arch: Architecture) -> Iterator[Tap]:
        modules: dict[str, list[Any]] = {}
        for node in self._nodes:
            for path in scopes(node)[:-1]:
                modules.setdefault(path, []).append(node)
        for path, nodes in modules.items():
            for side, value in (("in", self._entering(nodes)), ("out", self._leaving(nodes))):
                place = places.place(arch, path, side)
                if place and value:
                    yield Tap(value, place.layer, place.stage, place.part)
                    if place.part or len(nodes) == 1:
                        yield from self._product(arch, path, nodes, place)
            if path.endswith(".self_attn"):
                own = [node for node in nodes if scopes(node)[-2] == path]
                yield from self._attention(int(path.split(".")[-2]), own)

    def _entering(self, nodes: Sequence[Any]) -> str | None:
        inside = {name for node in nodes for name in node.output}
        given = [name for node in nodes for name in node.input if name in self._from_tokens]
        return next((name for name in given if name not in inside), None)

    def _leaving(self, nodes: Sequence[Any]) -> str | None:
        inside = {name for node in nodes for name in node.output if name in self._from_tokens}
        kept = {id(node) for node in nodes}
        read = {name for node in self._nodes if id(node) not in kept for name in node.input}
        out = [name for node in nodes for name in node.output if name in inside]
        return next((name for name in reversed(out) if name in read | {self.logits}), None)

    def _product(
        self, arch: Architecture, path: str, nodes: Sequence[Any], place: places.Place
    ) -> Iterator[Tap]:
        """A projection's product, before its bias; and the constant in it."""
        for node in nodes:
            if node.op_type == "MatMul" and node.input[1] in self._constants:
                self.linear[path] = node.input[1]
                before = arch.stage[place.stage].inputs[0]
                if place.part and places.parts(arch, before):
                    yield Tap(node.output[0], place.layer, before, place.part)

    def _attention(self, layer: int, nodes: Sequence[Any]) -> Iterator[Tap]:
        for node in nodes:
            if node.op_type == "Softmax":
                yield Tap(node.output[0], layer, "attn_softmax")
                scores = node.input[0]
                maker = self._makers[scores]
                if maker.op_type == "Add":  # of the mask, which does not come from the tokens
                    scores = next(name for name in maker.input if name in self._from_tokens)
                yield Tap(scores, layer, "attn_scores")
                product = self._above(scores, "MatMul")
                for stage, factor in zip(("q", "k"), product.input, strict=True):
                    rotated = self._unmoved(factor)
                    yield Tap(rotated, layer, f"{stage}_post_rope", heads_lead=True)

    def _above(self, name: str, op: str) -> Any:
        node = self._makers[name]
        while node.op_type != op:
            node = self._makers[next(each for each in node.input if each in self._from_tokens)]
        return node

    def _unmoved(self, name: str) -> str:
        """The value that was only moved to become this one."""
        while (node := self._makers[name]).op_type in MOVES:
            name = node.input[0]
        return name


def scopes(node: Any) -> list[str]:
    """The modules that a node was computed in, the outermost first; then its own name."""
    told = {entry.key: entry.value for entry in node.metadata_props}
    return [str(each) for each in ast.literal_eval(told.get(SCOPES) or "['']")]


def export(network: Any, length: int, path: Path) -> None:
    """Write a model as ONNX, for one sequence of this length and without a cache.

    Raises:
        UserError: the exporter cannot.
    """
    ids, places = torch.zeros((1, length), dtype=torch.int64), torch.arange(length)[None]
    told = logging.getLogger("torch.onnx")
    before = told.level
    told.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            kwargs = {"input_ids": ids, "position_ids": places, "use_cache": False}
            program = torch.onnx.export(network, (), kwargs=kwargs, dynamo=True, verbose=False)
            assert program is not None
            program.save(str(path))
    except Exception as error:  # of the exporter's many layers
        raise UserError(f"PyTorch cannot export this model to ONNX: {_line(error)}") from None
    finally:
        told.setLevel(before)


def _line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


class OnnxSession(Session):
    """What engines of ONNX graphs have in common: one call, no cache, all values at its end.

    Raises:
        UserError: more than one call is asked for, or the model cannot be exported.
    """

    dtype: str | None = "float32"

    def __init__(self, model: Weights, recorder: Recorder, calls: Calls) -> None:
        if calls.several:
            raise UserError(
                "the exported graph has no cache, so there is one call: no --steps, --generate"
            )
        self.model, self.recorder = model, recorder
        self.graph = Exported(model, calls.length)
        wanted = [tap for tap in self.graph.taps if recorder.want(tap.stage, tap.layer)]
        self.taps = [tap for tap in wanted if tap.value in self.names()]
        self.watched = "not run yet"

    def names(self) -> set[str]:
        """The values that the engine can show."""
        raise NotImplementedError

    def compute(self, feed: Mapping[str, np.ndarray], watched: bool) -> dict[str, np.ndarray]:
        """The logits and, if watched, every tapped value, by name."""
        raise NotImplementedError

    def step(self, tokens: Sequence[int], positions: Sequence[int]) -> np.ndarray:
        self.recorder.begin(positions)
        feed = {"input_ids": np.array([tokens]), "position_ids": np.array([positions])}
        alone = self.compute(feed, watched=False)[self.graph.logits]
        values = self.compute(feed, watched=True)
        logits = values[self.graph.logits]
        self.watched = told(alone, logits)
        for tap in self.taps:
            value = values[tap.value]
            value = value[0].swapaxes(0, 1) if tap.heads_lead else value
            self.recorder.named(tap.layer, tap.stage, value, tap.part)
        return np.asarray(logits[0, -1], np.float32)

    def close(self) -> None:
        self.graph.close()


def told(alone: np.ndarray, watched: np.ndarray) -> str:
    """Whether the engine computed the same when it was watched: values that have to be shown cannot
    be fused away."""
    if alone.tobytes() == watched.tobytes():
        return "same logits, bit for bit, as unwatched"
    far = np.abs(alone.astype(np.float64) - watched).max()
    return f"logits up to {far:.2g} from those unwatched: what is shown cannot be fused away"
