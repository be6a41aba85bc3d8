"""OpenVINO on the CPU: the model exported by PyTorch to ONNX, computed in float32 or bfloat16.

The stages are added to the model's outputs, which can keep OpenVINO from fusing operations, so it
is run without them too, and the manifest says whether the logits are the same.
"""

from collections.abc import Mapping
from typing import Annotated, Any, Literal

import numpy as np
import openvino
from msgspec import Meta

from qwen_jax.weights.base import Weights
from stages.errors import UserError
from tools.collect.onnx_export import OnnxSession
from tools.collect.options import Options
from tools.collect.recorder import Recorder
from tools.collect.session import Calls, Session

PRECISIONS = {"f32": "float32", "bf16": "bfloat16", "f16": "float16"}


class Settings(Options, frozen=True):
    precision: Annotated[
        Literal["f32", "bf16", "f16"],
        Meta(description="INFERENCE_PRECISION_HINT, which a processor may not heed; default: f32"),
    ] = "f32"
    threads: Annotated[int, Meta(ge=1, description="default: 1")] = 1


class OpenVinoSession(OnnxSession):
    def __init__(
        self, model: Weights, settings: Settings, recorder: Recorder, calls: Calls
    ) -> None:
        self.settings, self.used = settings, ""
        self._core = openvino.Core()
        super().__init__(model, recorder, calls)

    def _read(self) -> Any:
        try:
            return self._core.read_model(str(self.graph.path))
        except RuntimeError as error:
            raise UserError(f"OpenVINO cannot read this: {str(error).splitlines()[0]}") from None

    def names(self) -> set[str]:
        outputs = [port for node in self._read().get_ops() for port in node.outputs()]
        return {name for port in outputs for name in port.get_names()}

    def compute(self, feed: Mapping[str, np.ndarray], watched: bool) -> dict[str, np.ndarray]:
        model = self._read()
        if watched:
            there = {name for port in model.outputs for name in port.get_names()}
            wanted = dict.fromkeys(tap.value for tap in self.taps)
            model.add_outputs([name for name in wanted if name not in there])
        hints = {
            "INFERENCE_PRECISION_HINT": self.settings.precision,
            "INFERENCE_NUM_THREADS": self.settings.threads,
        }
        try:
            compiled = self._core.compile_model(model, "CPU", hints)
            result = compiled(dict(feed))
        except RuntimeError as error:
            raise UserError(f"OpenVINO cannot run this: {str(error).splitlines()[0]}") from None
        self.used = compiled.get_property("INFERENCE_PRECISION_HINT").to_string()
        self.dtype = PRECISIONS.get(self.used, "float32")
        return {name: value for port, value in result.items() for name in port.get_names()}

    def describe(self) -> dict[str, Any]:
        version = openvino.get_version()
        return {
            "name": "openvino",
            "version": version,
            "backend": "CPU",
            "device": self._core.get_property("CPU", "FULL_DEVICE_NAME"),
            "threads": self.settings.threads,
            "precision": self.used,
            "watched": self.watched,
            "versions": {"openvino": version},
        }


def open(model: Weights, settings: Settings, recorder: Recorder, calls: Calls) -> Session:
    return OpenVinoSession(model, settings, recorder, calls)
