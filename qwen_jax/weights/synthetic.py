"""Random models of published sizes, made up as they are read: for memory and speed.

Value number i of a tensor is 16 bits of a random stream of that tensor's own, looked up in a table
of normal quantiles in bfloat16. So any rows can be made alone, always the same, without a download
and as fast as a disk reads. Imports neither jax nor torch.

What the numbers are like, and why:

- Projections have a standard deviation of 1/sqrt(inputs) (LeCun et al. 1998, "Efficient BackProp",
  section 4.6): every stage has the size of its input, whatever the model's size. For 0.5B to 72B
  that is 0.005 to 0.033, around the ``initializer_range`` of 0.02 in the published configs, which
  the embedding and the head have.
- K biases as in Qwen2.5-7B: norm 605 at the first layer, 921 at the last, 22 elsewhere over 512
  channels (https://github.com/ggml-org/llama.cpp/issues/21385). Of the other biases, and of the
  norms' weights, nothing published was found; theirs are chosen so that the scores have a standard
  deviation of a few, and the logits too.
- A few residual channels are tens of times the rest in every layer and at most tokens, and the
  norms' weights at these channels are small (arXiv 2601.22966, 2402.17762): there the rows of
  ``down_proj`` are 32 times as large, the norms' weights a sixteenth.
- One more model, ``7b-overflow``, overflows in float16 where Qwen2-7B does: q.k before the scale in
  the first and the last layer (llama.cpp#7805, transformers#33312), of which nothing is published
  but that it does, and the SwiGLU of an early layer (llama.cpp#26044, layer 2 of the 7B). There the
  bias of q is large too, and three channels of gate and up are, while the columns of ``down_proj``
  that read them are as much smaller. All else is as in the 7B, number by number.
"""

import json
import re
from functools import cache
from statistics import NormalDist
from typing import Any

import ml_dtypes
import numpy as np

from qwen_jax.config import from_hf
from qwen_jax.weights.base import Weights
from stages.architecture import NORM, Architecture, Parameter
from stages.architectures import ARCHITECTURES, QWEN2
from stages.errors import UserError

PREFIX = "synthetic:"
DTYPE = np.dtype(ml_dtypes.bfloat16)

EMBEDDING_STD = 0.02
BIASES = {"q_bias": 1.0, "k_bias": 1.0, "v_bias": 0.1}
K_BIAS_FIRST, K_BIAS_LAST = 27.0, 41.0  # 605 and 921 over sqrt(512); elsewhere it is 22
LAYER_NORM, FINAL_NORM, NORM_SPREAD = 2.0, 4.0, 1 / 8
MASSIVE = 3  # channels
MASSIVE_GAIN, MASSIVE_DAMP = 32.0, 1 / 16  # powers of two: exact in bfloat16
OVERFLOW = "-overflow"  # after the size that it can be had of
OVERFLOWING = "7b"
Q_BIAS_ENDS = 120.0  # with a K bias of 27 and 41 and 128 channels, q.k has a deviation of 37,000
SWIGLU_LAYER, SWIGLU_GAIN = 2, 256.0  # of gate and up; a power of two
STEP = 1 << 16  # values that are looked up at once: numbers, indices and table stay in the cache


class SyntheticWeights(Weights):
    """A model of a published size whose weights are random.

    Arguments:
        arch: the architecture.
        size: of its published sizes.
        layers: only the first so many of its layers; all by default.
        overflows: as Qwen2-7B does in float16.
    """

    directory = None

    def __init__(
        self, arch: Architecture, size: str, layers: int | None = None, overflows: bool = False
    ) -> None:
        super().__init__()
        # Streams are named after the size; what Qwen2's are named after dates from before Qwen3.
        self.size = size if arch is QWEN2 else f"{arch.name} {size}"
        self.published_layers = arch.published[size]["num_hidden_layers"]
        called = size if arch is QWEN2 else f"{arch.name}-{size}"
        called += OVERFLOW if overflows else ""
        self.name = f"synthetic-{called}" + (f"-{layers}" if layers else "")
        self.hf_config = hf_config(arch, size, layers or self.published_layers)
        self.config = from_hf(self.hf_config)
        self.tensors = arch.tensors(self.config.num_hidden_layers, self.config.tie_word_embeddings)
        self.massive = self._channels("massive channels", self.config.hidden_size)
        self.overflowing = (
            self._channels("overflowing channels", self.config.intermediate_size)
            if overflows
            else np.array([], int)
        )

    def _channels(self, name: str, size: int) -> np.ndarray:
        """A few of ``size`` channels."""
        bits = np.random.PCG64DXSM(_seed(self.size, name)).random_raw(MASSIVE)
        return np.unique(bits % np.uint64(size)).astype(int)

    def companions(self) -> dict[str, bytes]:
        return {"config.json": (json.dumps(self.hf_config, indent=2) + "\n").encode()}

    def dtype(self, name: str) -> np.dtype:
        return DTYPE

    def fill(self, name: str, start: int, out: np.ndarray) -> None:
        parameter, layer = self.tensors[name]
        columns = int(np.prod(out.shape[1:]))
        stream = _seed(self.size, name)
        table = _quantiles(*self._statistics(parameter, layer))
        _fill(out.reshape(-1), stream, int(start) * columns, table)
        if layer == SWIGLU_LAYER and parameter.axes[0] == "F":
            large = self.overflowing - start
            out[large[(large >= 0) & (large < len(out))]] *= DTYPE.type(SWIGLU_GAIN)
        if layer == SWIGLU_LAYER and parameter.axes[-1] == "F":
            out[:, self.overflowing] *= DTYPE.type(SWIGLU_GAIN**-2)
        if parameter.axes[0] != "D":
            return
        # What a massive channel gains where it is written, norms take away where it is read.
        massive = self.massive[(start <= self.massive) & (self.massive < start + len(out))] - start
        if parameter.name == "down_proj":
            out[massive] *= DTYPE.type(MASSIVE_GAIN)
        elif parameter.axes == ("D",):
            out[massive] *= DTYPE.type(MASSIVE_DAMP)

    def _statistics(self, parameter: Parameter, layer: int | None) -> tuple[float, float]:
        """Mean and standard deviation of a tensor."""
        arch = self.config.arch
        if arch.used_by(parameter.name).kind is NORM:
            mean = FINAL_NORM if layer is None else LAYER_NORM
            return mean, mean * NORM_SPREAD
        if parameter.axes[0] == "V":
            return 0.0, EMBEDDING_STD
        if parameter.name in BIASES:
            usual = BIASES[parameter.name]
            first, last = {
                "k_bias": (K_BIAS_FIRST, K_BIAS_LAST),
                "q_bias": (Q_BIAS_ENDS, Q_BIAS_ENDS) if self.overflowing.size else (usual, usual),
            }.get(parameter.name, (usual, usual))
            return 0.0, {0: first, self.published_layers - 1: last}.get(layer, usual)
        return 0.0, arch.parameter_shape(parameter.name, self.config.dims(1))[1] ** -0.5


def open_synthetic(spec: str) -> SyntheticWeights:
    """The model that ``synthetic:<size>`` or ``synthetic:<size>:<layers>`` names.

    A size that two architectures have is that of the first; ``qwen3-14b`` is that of Qwen3.

    Raises:
        UserError: no such size, or not so many layers.
    """
    given, _, layers = spec.removeprefix(PREFIX).partition(":")
    known = _sizes()
    overflows = given.lower() == OVERFLOWING + OVERFLOW
    given = OVERFLOWING if overflows else given
    if given.lower() not in known:
        raise UserError(f"{spec}: no size {given!r}; choose one of {', '.join(size_names())}")
    arch, size = known[given.lower()]
    most = arch.published[size]["num_hidden_layers"]
    if ":" not in spec.removeprefix(PREFIX):
        return SyntheticWeights(arch, size, overflows=overflows)
    if not re.fullmatch("[0-9]{1,3}", layers) or not 1 <= int(layers) <= most:
        raise UserError(f"{spec}: {layers!r} layers; {given} can be cut to 1 up to {most}")
    return SyntheticWeights(arch, size, int(layers), overflows)


@cache
def _sizes() -> dict[str, tuple[Architecture, str]]:
    """Whatever may stand after ``synthetic:`` -> architecture and size."""
    found: dict[str, tuple[Architecture, str]] = {}
    for arch in ARCHITECTURES.values():
        for size in arch.published:
            found.setdefault(size, (arch, size))
            found[f"{arch.name}-{size}"] = arch, size
    return found


def size_names() -> list[str]:
    """One name for every size, the shortest."""
    shortest: dict[tuple[Architecture, str], str] = {}
    for name, what in _sizes().items():
        shortest.setdefault(what, name)
    return [*shortest.values(), OVERFLOWING + OVERFLOW]


def hf_config(arch: Architecture, size: str, layers: int) -> dict[str, Any]:
    """The ``config.json`` of a size, as it is published but for the number of layers."""
    published = {
        "architectures": [arch.hf_class],
        "attention_dropout": 0.0,
        "hidden_act": "silu",
        "initializer_range": 0.02,
        "max_window_layers": layers,
        "model_type": arch.name,
        "rope_theta": 1000000.0,
        "torch_dtype": "bfloat16",
        "use_cache": True,
        "use_sliding_window": False,
        **arch.published[size],
        "num_hidden_layers": layers,
    }
    return dict(sorted(published.items()))


def _seed(size: str, name: str) -> int:
    return int.from_bytes(f"{size} {name}".encode(), "little")


def _fill(values: np.ndarray, seed: int, first: int, table: np.ndarray) -> None:
    """``values`` becomes the values from number ``first`` on of one random stream.

    PCG64DXSM gives 64 bits, and so four values, a step, and can be set to any step.
    """
    stream, skip = np.random.PCG64DXSM(seed).advance(first // 4), first % 4
    done = 0
    while done < len(values):
        part = values[done : done + STEP - skip]
        words = stream.random_raw(-(-(skip + len(part)) // 4))
        bits = words.view(np.uint16)[skip : skip + len(part)]
        table.take(bits, out=part.view(np.uint16), mode="clip")  # no index is outside: no check
        done, skip = done + len(part), 0


@cache
def _quantiles(mean: float, std: float) -> np.ndarray:
    """The bits of 65536 bfloat16 that lie as a normal distribution does, by the 16 random bits."""
    return (mean + std * _standard_quantiles()).astype(DTYPE).view(np.uint16)


@cache
def _standard_quantiles() -> np.ndarray:
    quantile = NormalDist().inv_cdf
    upper = np.array([quantile(0.5 + (i + 0.5) / 65536) for i in range(32768)])
    return np.concatenate([-upper[::-1], upper])
