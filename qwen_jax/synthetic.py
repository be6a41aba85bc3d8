"""Random models of every published Qwen2.5 size, made up as they are read: for memory and speed.

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
"""

import re
from functools import cache
from statistics import NormalDist
from typing import Any

import ml_dtypes
import numpy as np

from qwen_jax.config import from_hf
from qwen_jax.weights import EMBEDDING, HEAD, NORM, Weights
from stages.errors import UserError

PREFIX = "synthetic:"
DTYPE = np.dtype(ml_dtypes.bfloat16)

# hidden, layers, query heads, key/value heads, intermediate, vocabulary, tied, eps, positions: of
# the base models' config.json. Heads have 64 channels in 0.5b and 128 in the others.
SIZES = {
    "0.5b": (896, 24, 14, 2, 4864, 151936, True, 1e-6, 32768),
    "1.5b": (1536, 28, 12, 2, 8960, 151936, True, 1e-6, 131072),
    "3b": (2048, 36, 16, 2, 11008, 151936, True, 1e-6, 32768),
    "7b": (3584, 28, 28, 4, 18944, 152064, False, 1e-6, 131072),
    "14b": (5120, 48, 40, 8, 13824, 152064, False, 1e-5, 131072),
    "32b": (5120, 64, 40, 8, 27648, 152064, False, 1e-5, 131072),
    "72b": (8192, 80, 64, 8, 29568, 152064, False, 1e-5, 131072),
}

EMBEDDING_STD = 0.02
Q_BIAS, V_BIAS = 1.0, 0.1
K_BIAS, K_BIAS_FIRST, K_BIAS_LAST = 1.0, 27.0, 41.0  # 22, 605 and 921 over sqrt(512)
LAYER_NORM, FINAL_NORM, NORM_SPREAD = 2.0, 4.0, 1 / 8
MASSIVE = 3  # channels
MASSIVE_GAIN, MASSIVE_DAMP = 32.0, 1 / 16  # powers of two: exact in bfloat16
STEP = 1 << 16  # values that are looked up at once: numbers, indices and table stay in the cache


class Synthetic(Weights):
    """A model of a published size whose weights are random.

    Arguments:
        size: of ``SIZES``.
        layers: only the first so many of its layers; all by default.
    """

    directory = None

    def __init__(self, size: str, layers: int | None = None) -> None:
        super().__init__()
        self.size, self.published_layers = size, SIZES[size][1]
        self.name = f"synthetic-{size}" + (f"-{layers}" if layers else "")
        self.hf_config = hf_config(size, layers or self.published_layers)
        self.config = from_hf(self.hf_config)
        bits = np.random.PCG64DXSM(_seed(size, "massive channels")).random_raw(MASSIVE)
        self.massive = np.unique(bits % np.uint64(self.config.hidden_size)).astype(int)

    def dtype(self, name: str) -> np.dtype:
        return DTYPE

    def fill(self, name: str, start: int, out: np.ndarray) -> None:
        columns = int(np.prod(out.shape[1:]))
        stream = _seed(self.size, name)
        _fill(out.reshape(-1), stream, int(start) * columns, _quantiles(*self._statistics(name)))
        massive = self.massive[(start <= self.massive) & (self.massive < start + len(out))] - start
        if name.endswith("down_proj.weight"):
            out[massive] *= DTYPE.type(MASSIVE_GAIN)
        elif name.endswith("norm.weight"):
            out[massive] *= DTYPE.type(MASSIVE_DAMP)

    def _statistics(self, name: str) -> tuple[float, float]:
        """Mean and standard deviation of a tensor."""
        if name in (EMBEDDING, HEAD):
            return 0.0, EMBEDDING_STD
        if name.endswith("norm.weight"):
            mean = FINAL_NORM if name == NORM else LAYER_NORM
            return mean, mean * NORM_SPREAD
        if name.endswith("q_proj.bias"):
            return 0.0, Q_BIAS
        if name.endswith("v_proj.bias"):
            return 0.0, V_BIAS
        if name.endswith("k_proj.bias"):
            layer = int(name.split(".")[2])
            ends = {0: K_BIAS_FIRST, self.published_layers - 1: K_BIAS_LAST}
            return 0.0, ends.get(layer, K_BIAS)
        return 0.0, self.shapes[name][1] ** -0.5


def open_synthetic(spec: str) -> Synthetic:
    """The model that ``synthetic:<size>`` or ``synthetic:<size>:<layers>`` names.

    Raises:
        UserError: no such size, or not so many layers.
    """
    size, _, layers = spec.removeprefix(PREFIX).partition(":")
    if size.lower() not in SIZES:
        raise UserError(f"{spec}: no size {size!r}; choose one of {', '.join(SIZES)}")
    size = size.lower()
    most = SIZES[size][1]
    if ":" not in spec.removeprefix(PREFIX):
        return Synthetic(size)
    if not re.fullmatch("[0-9]{1,3}", layers) or not 1 <= int(layers) <= most:
        raise UserError(f"{spec}: {layers!r} layers; {size} can be cut to 1 up to {most}")
    return Synthetic(size, int(layers))


def hf_config(size: str, layers: int) -> dict[str, Any]:
    """The ``config.json`` of a size, as it is published but for the number of layers."""
    hidden, _, heads, kv_heads, intermediate, vocabulary, tied, eps, positions = SIZES[size]
    return {
        "architectures": ["Qwen2ForCausalLM"],
        "attention_dropout": 0.0,
        "hidden_act": "silu",
        "hidden_size": hidden,
        "initializer_range": 0.02,
        "intermediate_size": intermediate,
        "max_position_embeddings": positions,
        "max_window_layers": layers,
        "model_type": "qwen2",
        "num_attention_heads": heads,
        "num_hidden_layers": layers,
        "num_key_value_heads": kv_heads,
        "rms_norm_eps": eps,
        "rope_theta": 1000000.0,
        "sliding_window": positions,
        "tie_word_embeddings": tied,
        "torch_dtype": "bfloat16",
        "use_cache": True,
        "use_sliding_window": False,
        "vocab_size": vocabulary,
    }


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
