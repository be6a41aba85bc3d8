"""tunix: Qwen2 and Qwen3 as Flax NNX modules, compiled by XLA as tunix's own sampler does.

The modules are wrapped while the model is traced, and what they see is returned beside the logits.
Biases are added outside of the projections, v's where nothing can be seen of it.
"""

import importlib
import importlib.metadata
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Annotated, Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from msgspec import Meta

from qwen_jax.weights.base import Weights
from qwen_jax.weights.huggingface import HuggingFaceWeights
from stages.errors import UserError
from tools.collect.options import Options
from tools.collect.recorder import Recorder
from tools.collect.session import Calls, Session

DTYPES = {"float32": jnp.float32, "bfloat16": jnp.bfloat16, "float16": jnp.float16}
NAMES = {"attn": "self_attn"}  # tunix's name of a module -> Hugging Face's
ROTATION = {"qwen2": "apply_rotary_embedding", "qwen3": "apply_rope"}  # called for q, then for k
INSIDE = "computed in the middle of a method, where no module ends"
See = Callable[[str, str, Any], None]


class Settings(Options, frozen=True):
    dtype: Annotated[
        Literal["float32", "bfloat16", "float16"], Meta(description="default: float32")
    ] = "float32"
    jit: Annotated[bool, Meta(description="operation by operation")] = True


class Watched:
    """A module, and somebody who sees what goes in and out of it."""

    def __init__(self, module: Any, path: str, see: See) -> None:
        self._module, self._path, self._see = module, path, see

    def __getattr__(self, name: str) -> Any:
        return getattr(self._module, name)

    def __call__(self, *values: Any, **more: Any) -> Any:
        self._see(self._path, "in", values[0])
        result = self._module(*values, **more)
        # a layer and its attention give a pair: the cache and the value
        self._see(self._path, "out", result[-1] if isinstance(result, tuple) else result)
        return result

    def encode(self, ids: Any) -> Any:
        result = self._module.encode(ids)
        self._see("model.embed_tokens", "out", result)
        return result

    def decode(self, value: Any) -> Any:
        result = self._module.decode(value)
        self._see("lm_head", "out", result)
        return result


def wrap(model: Any, see: See) -> None:
    """Every module that is a stage by its Hugging Face name."""
    model.embedder = Watched(model.embedder, "", see)
    model.final_norm = Watched(model.final_norm, "model.norm", see)
    if hasattr(model, "lm_head"):
        model.lm_head = Watched(model.lm_head, "lm_head", see)
    layers = []
    for number, layer in enumerate(model.layers):
        path = f"model.layers.{number}"
        for inner in (layer, layer.attn, layer.mlp):
            for name, module in list(vars(inner).items()):
                if isinstance(module, nnx.Module) and module not in (layer.attn, layer.mlp):
                    where = {layer: "", layer.attn: ".self_attn", layer.mlp: ".mlp"}[inner]
                    setattr(inner, name, Watched(module, f"{path}{where}.{name}", see))
        layers.append(Watched(layer, path, see))
    model.layers = layers


class TunixSession(Session):
    """One model, compiled with what is seen among its results."""

    def __init__(
        self, model: HuggingFaceWeights, settings: Settings, recorder: Recorder, calls: Calls
    ) -> None:
        self.settings, self.model, self.recorder = settings, model, recorder
        self.length = calls.length
        recorder.biased = False
        self.dtype = self.cache = settings.dtype
        self.why = dict.fromkeys(("qkv_bias", "attn_scores", "attn_softmax", "ffn_silu"), INSIDE)
        self._code, network = _load(model, settings)
        self._graph, self._state = nnx.split(network)
        self._seen: list[tuple[str, str]] = []
        self._run = jax.jit(self._compute) if settings.jit else self._compute
        config = model.config
        shape = (1, calls.length, config.num_key_value_heads, config.head_dim)
        empty = {name: jnp.zeros(shape, DTYPES[settings.dtype]) for name in "kv"}
        empty["end_index"] = jnp.zeros((1,), jnp.int32)
        self._past: Any = {f"layer_{n}": empty for n in range(config.num_hidden_layers)}

    def _compute(self, state: Any, ids: Any, places: Any, past: Any, mask: Any) -> Any:
        """(logits, the cache, what was seen)."""
        network = nnx.merge(self._graph, state)
        self._seen.clear()
        found = []

        def see(path: str, side: str, value: Any) -> None:
            self._seen.append((path, side))
            found.append(value)

        wrap(network, see)
        name = ROTATION[self.model.config.architecture]
        stock = getattr(self._code, name)

        def rotate(*values: Any, **more: Any) -> Any:
            result = stock(*values, **more)
            see("rope", "out", result)
            return result

        setattr(self._code, name, rotate)  # while the model is traced
        try:
            logits, past = network(ids, places, past, mask)
        finally:
            setattr(self._code, name, stock)
        return logits, past, found

    def step(self, tokens: Sequence[int], positions: Sequence[int]) -> np.ndarray:
        before = len(self.recorder.positions)
        self.recorder.begin(positions)
        ids, places = jnp.array([list(tokens)]), jnp.array([list(positions)])
        rows = before + jnp.arange(len(tokens))
        mask = (jnp.arange(self.length)[None] <= rows[:, None])[None]
        logits, self._past, found = self._run(self._state, ids, places, self._past, mask)
        rotated = 0
        for (path, side), value in zip(self._seen, found, strict=True):
            if path == "rope":
                layer, second = divmod(rotated, 2)
                rotated += 1
                self.recorder.named(layer, "k_post_rope" if second else "q_post_rope", value)
            else:
                self.recorder.tap(path, side, value)
        for layer in range(self.model.config.num_hidden_layers):
            kept = self._past[f"layer_{layer}"]
            for name in "kv":
                seen = kept[name][0, : before + len(tokens)]
                self.recorder.cached(layer, name.upper(), seen)
        return np.asarray(logits[0, -1], np.float32)

    def describe(self) -> dict[str, Any]:
        packages = ("google-tunix", "jax", "jaxlib", "flax")
        versions = {name: importlib.metadata.version(name) for name in packages}
        return {
            "name": "tunix",
            "version": versions["google-tunix"],
            "backend": "xla" if self.settings.jit else "eager",
            "device": str(jax.devices()[0]),
            "versions": versions,
        }


def _load(model: HuggingFaceWeights, settings: Settings) -> tuple[ModuleType, Any]:
    config, dtype = model.config, DTYPES[settings.dtype]
    where = f"tunix.models.{config.architecture}"
    code = importlib.import_module(f"{where}.model")
    params = importlib.import_module(f"{where}.params")
    settings = code.ModelConfig(
        num_layers=config.num_hidden_layers,
        vocab_size=config.vocab_size,
        embed_dim=config.hidden_size,
        hidden_dim=config.intermediate_size,
        num_heads=config.num_attention_heads,
        head_dim=config.head_dim,
        num_kv_heads=config.num_key_value_heads,
        rope_theta=config.rope_theta,
        norm_eps=config.rms_norm_eps,
        use_tied_embedding=config.tie_word_embeddings,
        dtype=dtype,
        param_dtype=dtype,
    )
    try:
        directory = str(model.directory)
        return code, params.create_model_from_safe_tensors(directory, settings, dtype=dtype)
    except (KeyError, ValueError, RuntimeError, TypeError, OSError) as error:
        why = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(f"tunix cannot load {model.name}: {why}") from None


def open(model: Weights, settings: Settings, recorder: Recorder, calls: Calls) -> Session:
    if not isinstance(model, HuggingFaceWeights):
        raise UserError(f"{model.name}: tunix reads Hugging Face directories only")
    if model.config.yarn or model.config.sliding_window:
        raise UserError(f"{model.name}: tunix knows neither YaRN nor sliding windows")
    return TunixSession(model, settings, recorder, calls)
