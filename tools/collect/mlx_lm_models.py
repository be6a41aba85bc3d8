"""mlx-lm: float32, float16, bfloat16 or quantised weights, plain or quantised caches.

Every module of the model is wrapped by one that hands on what goes in and out. MLX computes when a
value is asked for, and not before the call is over. Gate and product are one compiled function.
"""

import importlib.metadata
from collections.abc import Callable, Iterator, Sequence
from typing import Annotated, Any, Literal

import ml_dtypes
import mlx.core as mx
import numpy as np
from mlx import nn
from mlx.utils import tree_unflatten
from mlx_lm.models.cache import KVCache, QuantizedKVCache
from mlx_lm.utils import load_model
from msgspec import Meta

from qwen_jax.weights.base import Weights
from qwen_jax.weights.huggingface import HuggingFaceWeights
from stages.errors import UserError
from tools.collect.options import Options
from tools.collect.recorder import Recorder
from tools.collect.session import Calls, Session

DTYPES = {"float32": mx.float32, "float16": mx.float16, "bfloat16": mx.bfloat16}
INSIDE = "attention is one function, which shows nothing of its inside"
BIASED = "each projection adds its bias itself"
FUSED = "silu and product are one operation here"
See = Callable[[str, str, Any], None]


Bits = Literal[2, 3, 4, 5, 6, 8] | None


class Settings(Options, frozen=True):
    dtype: Annotated[
        Literal["float32", "float16", "bfloat16"], Meta(description="default: float32")
    ] = "float32"
    bits: Annotated[Bits, Meta(description="quantise weights to so many bits")] = None
    group: Annotated[Literal[32, 64, 128], Meta(description="values of one scale")] = 64
    cache_bits: Annotated[Bits, Meta(description="quantise the cache as well")] = None


class Watched(nn.Module):
    """A module, and somebody who sees what goes in and out of it."""

    def __init__(self, module: Any, path: str, see: See) -> None:
        super().__init__()
        self.module, self.path, self.see = module, path, see

    def __call__(self, value: Any, *more: Any, **rest: Any) -> Any:
        self.see(self.path, "in", value)
        result = self.module(value, *more, **rest)
        self.see(self.path, "out", result)
        return result

    def as_linear(self, value: Any) -> Any:
        """An embedding that is the head too."""
        result = self.module.as_linear(value)
        self.see("lm_head", "out", result)
        return result


class MlxSession(Session):
    """One model whose modules are wrapped, and its cache."""

    def __init__(self, model: HuggingFaceWeights, settings: Settings, recorder: Recorder) -> None:
        self.settings, self.recorder, self.model = settings, recorder, model
        self.dtype, self.own_weights = settings.dtype, bool(settings.bits)
        self.why = {
            "qkv_matmul": BIASED, "attn_scores": INSIDE, "attn_softmax": INSIDE, "ffn_silu": FUSED
        }  # fmt: skip
        self._seen: list[tuple[str, str, Any]] = []
        self.network = _load(model, settings)
        count = model.config.num_hidden_layers
        if settings.cache_bits:
            self.cache = f"{settings.cache_bits}-bit, {settings.group} values a scale"
            group, bits = settings.group, settings.cache_bits
            self._past = [QuantizedKVCache(group, bits) for _ in range(count)]
        else:
            self.cache = settings.dtype
            self._past = [KVCache() for _ in range(count)]
        self._bare = {path: module for path, module in self.network.named_modules() if path}
        self._wrap()

    def _wrap(self) -> None:
        for path, module in self._bare.items():
            if module.children():
                continue  # a list of layers, or what only holds others
            self.network.update_modules(tree_unflatten([(path, Watched(module, path, self._see))]))
        layers = self.network.model.layers
        for number, layer in enumerate(layers):
            layers[number] = Watched(layer, f"model.layers.{number}", self._see)

    def _see(self, path: str, side: str, value: Any) -> None:
        if isinstance(value, mx.array):  # by another name: mlx-lm changes some in place
            self._seen.append((path, side, mx.array(value)))

    def step(self, tokens: Sequence[int], positions: Sequence[int]) -> np.ndarray:
        if positions[0] != len(self.recorder.positions):
            raise UserError("mlx-lm counts positions from 0: drop --first-position")
        self.recorder.begin(positions)
        self._seen.clear()
        try:
            logits = self.network(mx.array([list(tokens)]), cache=self._past)
            mx.eval(logits, [value for _, _, value in self._seen])
        except (ValueError, RuntimeError) as error:
            raise UserError(f"mlx-lm cannot compute this: {str(error).splitlines()[0]}") from None
        ropes: dict[int, int] = {}
        for path, side, value in self._seen:
            if path.endswith(".rope"):
                if side == "out":
                    self._rotated(int(path.split(".")[2]), ropes, value)
            else:
                self.recorder.tap(path, side, values(value))
        for layer, cache in enumerate(self._past):
            for name, kept in (("K", cache.keys), ("V", cache.values)):
                if self.settings.cache_bits:
                    kept = mx.dequantize(*kept, cache.group_size, cache.bits)
                rows = kept[0, :, : cache.offset].swapaxes(0, 1)
                self.recorder.cached(layer, name, values(rows))
        return values(logits[0, -1]).astype(np.float32)

    def _rotated(self, layer: int, ropes: dict[int, int], value: Any) -> None:
        """[1, heads, T, H]: q the first time that a layer's module is called, then k."""
        stage = "k_post_rope" if layer in ropes else "q_post_rope"
        ropes[layer] = 1
        self.recorder.named(layer, stage, values(value)[0].swapaxes(0, 1))

    def weights(self) -> Iterator[tuple[str, np.ndarray]]:
        for path, module in self._bare.items():
            if "scales" in module:
                wide = mx.dequantize(
                    module.weight, module.scales, module.biases, module.group_size, module.bits
                )
                yield f"{path}.weight", values(wide)
            elif "weight" in module:
                yield f"{path}.weight", values(module.weight)
            if isinstance(module.get("bias"), mx.array):
                yield f"{path}.bias", values(module.bias)

    def describe(self) -> dict[str, Any]:
        version = importlib.metadata.version("mlx-lm")
        told: dict[str, Any] = {
            "name": "mlx-lm",
            "version": version,
            "backend": "mlx",
            "device": str(mx.default_device()),
            "versions": {"mlx-lm": version, "mlx": importlib.metadata.version("mlx")},
        }
        theta, ours = self.network.args.rope_theta, self.model.config.rope_theta
        if theta != ours:
            told["rope_theta"] = f"{theta:g}, but the model's config.json has {ours:g}"
        return told


def values(array: Any) -> np.ndarray:
    """An MLX array in NumPy, bit for bit."""
    if array.dtype == mx.bfloat16:
        return np.array(array.astype(mx.float32)).astype(ml_dtypes.bfloat16)
    return np.array(array)


def _load(model: HuggingFaceWeights, settings: Settings) -> Any:
    try:
        network, _ = load_model(model.directory)
        network.set_dtype(DTYPES[settings.dtype])
        if settings.bits:
            chosen = _quantizable(settings.group)
            nn.quantize(network, settings.group, settings.bits, class_predicate=chosen)
        mx.eval(network.parameters())
    except (KeyError, ValueError, RuntimeError, TypeError, OSError) as error:
        why = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(f"mlx-lm cannot load {model.name}: {why}") from None
    return network


def _quantizable(group: int) -> Callable[[str, Any], bool]:
    def choose(path: str, module: Any) -> bool:
        return hasattr(module, "to_quantized") and module.weight.shape[-1] % group == 0

    return choose


def open(model: Weights, settings: Settings, recorder: Recorder, calls: Calls) -> Session:
    if not isinstance(model, HuggingFaceWeights):
        raise UserError(f"{model.name}: mlx-lm reads Hugging Face directories only")
    return MlxSession(model, settings, recorder)
