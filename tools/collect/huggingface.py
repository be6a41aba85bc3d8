"""transformers: any attention, cache and dtype, torch.compile, dynamic int8, GGUF files.

The model is transformers' own. Modules are hooked, and the registered attention function is
wrapped; both only keep tensors, which are read when the call is over, so that torch.compile sees
one graph.
"""

import importlib.metadata
import inspect
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from typing import Annotated, Any, Literal

import numpy as np
import torch
import transformers
from msgspec import Meta
from transformers import AutoModelForCausalLM, DynamicCache, StaticCache
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from oracle.recorder import DTYPES, modeling
from qwen_jax.weights.base import Weights
from qwen_jax.weights.gguf import GgufWeights
from qwen_jax.weights.huggingface import HuggingFaceWeights
from stages.errors import UserError
from tools.collect.options import Options
from tools.collect.recorder import Recorder, to_numpy
from tools.collect.session import Calls, Session

INSIDE = "attention is one function, which shows its weights at most"
BIASED = "each projection adds its bias itself"
COMPILED = "bits may differ from those unwatched: what is shown cannot be fused away"


class Settings(Options, frozen=True):
    attention: Annotated[str, Meta(description="attn_implementation; default: eager")] = "eager"
    cache: Annotated[Literal["none", "dynamic", "static"], Meta(description="default: dynamic")] = (
        "dynamic"
    )
    dtype: Annotated[
        Literal["float32", "bfloat16", "float16", "float64"], Meta(description="default: float32")
    ] = "float32"
    compile: Annotated[bool, Meta(description="torch.compile")] = False
    quantize: Annotated[
        Literal["int8"] | None, Meta(description="dynamic int8 of torch.ao.quantization")
    ] = None


class TransformersSession(Session):
    """One model with hooks on it, and its cache."""

    def __init__(
        self, model: Weights, settings: Settings, recorder: Recorder, calls: Calls
    ) -> None:
        self.settings, self.recorder, self.arch = settings, recorder, model.config.arch
        self.dtype, self.own_weights = settings.dtype, bool(settings.quantize)
        self.seen: list[tuple[Callable[..., None], tuple[Any, ...]]] = []
        self._hooks = ExitStack()
        self.network = load(model, settings)
        self.cache = None if settings.cache == "none" else f"{settings.cache} {settings.dtype}"
        self.why = {"qkv_matmul": BIASED, "attn_scores": INSIDE, "attn_softmax": INSIDE}
        self._past: Any = None
        if settings.cache == "dynamic":
            self._past = DynamicCache(config=self.network.config)
        elif settings.cache == "static":
            self._past = StaticCache(config=self.network.config, max_cache_len=calls.length)
        self._watch()
        self._run = torch.compile(self.network) if settings.compile else self.network
        names = inspect.signature(self.network.forward).parameters
        self._cache_name = "cache" if "cache" in names else "past_key_values"  # before 5.20

    def _watch(self) -> None:
        """Keep what goes in and out of every module, and what the attention function is given."""
        for path, module in self.network.named_modules():
            if path:
                self._hooks.enter_context(module.register_forward_pre_hook(self._entering(path)))
                self._hooks.enter_context(module.register_forward_hook(self._leaving(path)))
        name = self.settings.attention
        stock = ALL_ATTENTION_FUNCTIONS.get_interface(
            name, modeling(self.arch).eager_attention_forward
        )
        before = ALL_ATTENTION_FUNCTIONS.get(name)

        def attention(
            module: Any, query: Any, key: Any, value: Any, *more: Any, **rest: Any
        ) -> Any:
            output, weights = stock(module, query, key, value, *more, **rest)
            self.seen.append((self._attention, (module.layer_idx, query, key, value, weights)))
            return output, weights

        ALL_ATTENTION_FUNCTIONS[name] = attention  # of this process, until the session ends

        def restore() -> None:
            del ALL_ATTENTION_FUNCTIONS[name]
            if before is not None and ALL_ATTENTION_FUNCTIONS.get(name) is not before:
                ALL_ATTENTION_FUNCTIONS[name] = before

        self._hooks.callback(restore)

    def _entering(self, path: str) -> Callable[..., None]:
        def hook(module: Any, args: Any) -> None:
            if args and isinstance(args[0], torch.Tensor):
                self.seen.append((self.recorder.tap, (path, "in", args[0])))

        return hook

    def _leaving(self, path: str) -> Callable[..., None]:
        def hook(module: Any, args: Any, output: Any) -> None:
            tensor = output[0] if isinstance(output, tuple) else output
            if isinstance(tensor, torch.Tensor):
                self.seen.append((self.recorder.tap, (path, "out", tensor)))

        return hook

    def _attention(self, layer: int, query: Any, key: Any, value: Any, weights: Any) -> None:
        """query: [1, N, T, H]; key, value: [1, K, S, H], of a static cache with rows to come."""
        rows, seen = self.recorder.steps[-1], len(self.recorder.positions)
        self.recorder.named(layer, "q_post_rope", query[0].transpose(0, 1))
        if self.settings.cache != "static":
            seen = key.shape[2]  # a window keeps the last rows only
        keys = key[0, :, :seen].transpose(0, 1)
        self.recorder.named(layer, "k_post_rope", keys[-rows:])
        if seen == len(self.recorder.positions):
            self.recorder.cached(layer, "K", keys)
            self.recorder.cached(layer, "V", value[0, :, :seen].transpose(0, 1))
        if weights is not None:
            self.recorder.named(layer, "attn_softmax", weights[0])

    def step(self, tokens: Sequence[int], positions: Sequence[int]) -> np.ndarray:
        self.recorder.begin(positions)
        self.seen.clear()
        ids, places = torch.tensor([list(tokens)]), torch.tensor([list(positions)])
        past = {self._cache_name: self._past} if self._past is not None else {}
        with torch.inference_mode(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                result = self._run(input_ids=ids, position_ids=places, use_cache=bool(past), **past)
            except Exception as error:  # its own kinds, torch's and the compiler's
                raise UserError(f"transformers cannot compute this: {_line(error)}") from None
        for record, what in self.seen:
            record(*what)
        return to_numpy(result.logits[0, -1]).astype(np.float32)

    def weights(self) -> Iterator[tuple[str, np.ndarray]]:
        for path, module in self.network.named_modules():
            if hasattr(module, "weight"):
                dynamic = callable(module.weight)  # a quantised module has functions
                weight = module.weight().dequantize() if dynamic else module.weight
                yield f"{path}.weight", to_numpy(weight)
                bias = getattr(module, "bias", None)
                bias = bias() if callable(bias) else bias
                if bias is not None:
                    yield f"{path}.bias", to_numpy(bias)

    def describe(self) -> dict[str, Any]:
        packages = ("torch", "transformers", "numpy")
        told = {"watched": COMPILED} if self.settings.compile else {}
        return told | {
            "name": "transformers",
            "version": transformers.__version__,
            "backend": self.settings.attention,
            "threads": torch.get_num_threads(),
            "matmul_precision": torch.get_float32_matmul_precision(),
            "versions": {name: importlib.metadata.version(name) for name in packages},
        }

    def close(self) -> None:
        self._hooks.close()


def load(model: Weights, settings: Settings) -> Any:
    """The stock model, in evaluation mode, quantised if that is asked for.

    Raises:
        UserError: transformers cannot load it.
    """
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    if isinstance(model, GgufWeights):
        where, more = model.path.parent, {"gguf_file": model.path.name}
    elif isinstance(model, HuggingFaceWeights):
        where, more = model.directory, {}
    else:
        raise UserError(
            f"{model.name}: transformers reads Hugging Face directories and GGUF files only"
        )
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            network = AutoModelForCausalLM.from_pretrained(
                where,
                dtype=DTYPES[settings.dtype],
                attn_implementation=settings.attention,
                local_files_only=True,
                **more,
            ).eval()
            if settings.quantize:
                network = torch.ao.quantization.quantize_dynamic(
                    network, {torch.nn.Linear}, torch.qint8
                )
    except Exception as error:  # of transformers, of the file system, of a missing kernel
        raise UserError(f"transformers cannot load {model.name}: {_line(error)}") from None
    return network


def _line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def open(model: Weights, settings: Settings, recorder: Recorder, calls: Calls) -> Session:
    if settings.cache == "none" and calls.several:
        raise UserError("--cache none: without a cache there is one call: no --steps, --generate")
    return TransformersSession(model, settings, recorder, calls)
