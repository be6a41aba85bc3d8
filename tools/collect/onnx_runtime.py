"""onnxruntime on the CPU: the model exported by PyTorch, in float32 or dynamically quantised.

The stages are added to the graph's outputs. That can keep onnxruntime from fusing operations, so
the graph is run without them too, and the manifest says whether the logits are the same.
"""

import contextlib
import io
import logging
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import onnx
import onnxruntime
from msgspec import Meta

from qwen_jax.weights.base import Weights
from stages.errors import UserError
from tools.collect.onnx_export import OnnxSession
from tools.collect.options import Options
from tools.collect.recorder import Recorder
from tools.collect.session import Calls, Session

OPTIMIZE = {
    "none": onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL,
    "basic": onnxruntime.GraphOptimizationLevel.ORT_ENABLE_BASIC,
    "all": onnxruntime.GraphOptimizationLevel.ORT_ENABLE_ALL,
}


EMBEDDED = 10**9  # bytes of a model in one file: protobuf's limit is 2 GiB


class Settings(Options, frozen=True):
    quantize: Annotated[
        Literal["int8"] | None, Meta(description="onnxruntime.quantization's dynamic int8")
    ] = None
    optimize: Annotated[
        Literal["none", "basic", "all"], Meta(description="of the graph; default: all")
    ] = "all"
    threads: Annotated[int, Meta(ge=1, description="default: 1")] = 1


class OrtSession(OnnxSession):
    def __init__(
        self, model: Weights, settings: Settings, recorder: Recorder, calls: Calls
    ) -> None:
        self.settings, self.own_weights = settings, bool(settings.quantize)
        self._proto: Any = None
        super().__init__(model, recorder, calls)

    def names(self) -> set[str]:
        if self._proto is None:  # large tensors lie in a file beside it
            self._path = self._quantized() if self.settings.quantize else self.graph.path
            self._proto = onnx.load(str(self._path), load_external_data=False)
        return {name for node in self._proto.graph.node for name in node.output}

    def _quantized(self) -> Path:
        from onnxruntime.quantization import QuantType, quantize_dynamic

        out = self.graph.path.with_name("int8.onnx")
        root = logging.getLogger()
        before = root.level
        root.setLevel(logging.ERROR)
        try:
            with contextlib.redirect_stdout(io.StringIO()):
                quantize_dynamic(
                    str(self.graph.path),
                    str(out),
                    weight_type=QuantType.QInt8,
                    use_external_data_format=self.graph.path.stat().st_size > EMBEDDED,
                )
        finally:
            root.setLevel(before)
        return out

    def compute(self, feed: Mapping[str, np.ndarray], watched: bool) -> dict[str, np.ndarray]:
        proto = self._proto
        if watched:
            proto = onnx.ModelProto()
            proto.CopyFrom(self._proto)
            there = {each.name for each in proto.graph.output}
            for name in dict.fromkeys(tap.value for tap in self.taps):
                if name not in there:
                    proto.graph.output.append(onnx.ValueInfoProto(name=name))
        options = onnxruntime.SessionOptions()
        options.graph_optimization_level = OPTIMIZE[self.settings.optimize]
        options.intra_op_num_threads = self.settings.threads
        options.log_severity_level = 3
        try:
            path = self._path.with_name("run.onnx")
            onnx.save(proto, str(path))
            session = onnxruntime.InferenceSession(
                str(path), options, providers=["CPUExecutionProvider"]
            )
            outputs = [each.name for each in session.get_outputs()]
            return dict(zip(outputs, session.run(outputs, dict(feed)), strict=True))
        except Exception as error:  # its own kinds, which have no common base
            raise UserError(f"onnxruntime cannot run this: {str(error).splitlines()[0]}") from None

    def weights(self) -> Iterator[tuple[str, np.ndarray]]:
        whole = onnx.load(str(self._path))
        held = {each.name: each for each in whole.graph.initializer}
        constants = {f"{path}.weight": name for path, name in self.graph.linear.items()}
        for name in self.model.shapes:
            constant = constants.get(name, name)
            if f"{constant}_quantized" in held:
                value, scale, zero = (
                    onnx.numpy_helper.to_array(held[f"{constant}_{part}"])
                    for part in ("quantized", "scale", "zero_point")
                )
                wide = (value.astype(np.float32) - zero.astype(np.float32)) * scale
                yield name, wide.T if name in constants else wide
            else:
                yield name, self.model.read(name)

    def describe(self) -> dict[str, Any]:
        return {
            "name": "onnxruntime",
            "version": onnxruntime.__version__,
            "backend": "CPUExecutionProvider",
            "threads": self.settings.threads,
            "watched": self.watched,
            "versions": {"onnxruntime": onnxruntime.__version__, "onnx": onnx.__version__},
        }


def open(model: Weights, settings: Settings, recorder: Recorder, calls: Calls) -> Session:
    return OrtSession(model, settings, recorder, calls)
