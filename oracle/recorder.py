"""The stages of a Hugging Face model, through transformers' public extension points.

Module hooks and the attention interface; no fork of the model's source. What runs is the stock
eager model: the recorder only reads, so the logits are the stock model's bit for bit. Where a stage
is captured is derived from the architecture: see ``Recorder``.
"""

import importlib
import importlib.metadata
import inspect
import os
import platform
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from types import ModuleType
from typing import Any

import ml_dtypes
import numpy as np
import torch
import transformers
from torch.nn import functional
from transformers import Cache
from transformers.masking_utils import AttentionMaskInterface, eager_mask
from transformers.modeling_utils import AttentionInterface, PreTrainedModel

from oracle.cache import make
from qwen_jax.padded import Emit, EmitRows, Padded, Resume, Want
from qwen_jax.weights.base import Weights
from qwen_jax.weights.huggingface import HuggingFaceWeights
from stages.architecture import Architecture, Key, Stage
from stages.errors import UserError, called
from stages.places import Place, parts, place
from stages.version import NAME, version

ATTENTION = "eager_recorded"
DTYPES = {name: getattr(torch, name) for name in ("float32", "bfloat16", "float16", "float64")}


def to_numpy(tensor: torch.Tensor) -> np.ndarray:
    """A tensor's values in NumPy, bit for bit, bfloat16 included."""
    tensor = tensor.detach().cpu().contiguous()
    if tensor.dtype == torch.bfloat16:
        return tensor.view(torch.uint16).numpy().view(ml_dtypes.bfloat16)
    return tensor.numpy()


class Recorder(ExitStack):
    """Hooks on one model until the ``with`` block ends. ``record(stage, layer, tensor)`` is called
    as each stage is computed; tensors have a batch axis before those of the stage.

    ``call`` is where there is a cache: the first row that the model computes now, and the one after
    the last. Scores have a column for every row by then.

    Where a stage is found follows from its parameters and readers, see ``stages.places``. What lies
    between q, k, v and ``attention`` goes through the attention interface.
    """

    def __init__(
        self, model: PreTrainedModel, arch: Architecture, record: Callable[..., None]
    ) -> None:
        super().__init__()
        self.record = record
        self.call: tuple[int, int] | None = None
        self.code = modeling(arch)
        self._parts: dict[Key, dict[str, torch.Tensor]] = {}  # q, k, v on their way to one tensor
        for path, module in model.named_modules():
            for side in ("in", "out"):
                found = place(arch, path, side)
                if found and not _elsewhere(arch.stage[found.stage], arch):
                    self._hook(module, side, found, list(parts(arch, found.stage)))
        for layer in model.get_submodule("model.layers"):
            layer.self_attn.recorder = self  # found by ``_attention`` through its module
            self.callback(delattr, layer.self_attn, "recorder")

    def _hook(self, module: torch.nn.Module, side: str, found: Place, parts: list[str]) -> None:
        if found.part:
            self._projection(module, found.part, parts, found.layer)
        elif side == "in":
            self._input(module, found.stage, found.layer)
        else:
            self._output(module, found.stage, found.layer)

    def _output(self, module: torch.nn.Module, stage: str, layer: int | None) -> None:
        def hook(module: Any, args: Any, output: Any) -> None:
            tensor = output[0] if isinstance(output, tuple) else output
            self.record(stage, layer, tensor)

        self.enter_context(module.register_forward_hook(hook))

    def _input(self, module: torch.nn.Module, stage: str, layer: int | None) -> None:
        def hook(module: Any, args: Any) -> None:
            self.record(stage, layer, args[0])

        self.enter_context(module.register_forward_pre_hook(hook))

    def _projection(
        self, linear: torch.nn.Module, part: str, parts: list[str], layer: int | None
    ) -> None:
        """q, k and v side by side, without the bias (the product alone, never output - bias) and,
        where there is one, with it."""

        def hook(module: Any, args: Any, output: torch.Tensor) -> None:
            values = {"qkv_matmul": output}
            if module.bias is not None:
                product = functional.linear(args[0], module.weight)
                values = {"qkv_matmul": product, "qkv_bias": output}
            for stage, value in values.items():
                found = self._parts.setdefault((stage, layer), {})
                found[part] = value
                if len(found) == len(parts):
                    self.record(stage, layer, torch.cat([found[name] for name in parts], -1))
                    del self._parts[stage, layer]

        self.enter_context(linear.register_forward_hook(hook))


def _elsewhere(stage: Stage, arch: Architecture) -> bool:
    """Whether a stage is recorded by ``_attention``, or is the logits."""
    return stage is arch.head or (stage.kind.sums_products and not stage.parameters)


def modeling(arch: Architecture) -> ModuleType:
    """transformers' module of an architecture."""
    return importlib.import_module(f"transformers.models.{arch.name}.modeling_{arch.name}")


def _attention(
    module: Any, query: Any, key: Any, value: Any, mask: Any, scaling: float, **rest: Any
) -> tuple[torch.Tensor, torch.Tensor]:
    """The stock eager attention, with its arguments and results recorded.

    query, key: [B, heads, T or S, H] after RoPE. The scores before the mask exist only inside the
    stock function, so they are computed once more by its own expression.
    """
    recorder, layer = module.recorder, module.layer_idx
    record, code = recorder.record, recorder.code
    first, end = recorder.call or (0, key.shape[2])

    def columns(x: torch.Tensor) -> torch.Tensor:
        """One for each row by now: a cache may have free rows, or have let some go that are
        masked by a sliding window."""
        return functional.pad(x, (max(0, end - x.shape[-1]), 0))[..., :end]

    record("q_post_rope", layer, query.transpose(1, 2))
    if recorder.call:
        gone = max(0, end - key.shape[2])
        for stage, kept in (("k_cache", key), ("v_cache", value)):
            record(stage, layer, kept[:, :, first - gone : end - gone].transpose(1, 2))
    else:
        record("k_post_rope", layer, key.transpose(1, 2))
    keys = code.repeat_kv(key, module.num_key_value_groups)
    record("attn_scores", layer, columns(torch.matmul(query, keys.transpose(2, 3)) * scaling))
    output, weights = code.eager_attention_forward(
        module, query, key, value, mask, scaling=scaling, **rest
    )
    record("attn_softmax", layer, columns(weights))
    record("attention", layer, output.flatten(2))
    return output, weights


AttentionInterface.register(ATTENTION, _attention)
# Without a mask function of the same name transformers passes no mask at all: attention would
# look into the future, without a word.
AttentionMaskInterface.register(ATTENTION, eager_mask)


class TorchEngine:
    """The Hugging Face forward over a checkpoint, with the interface of ``JaxEngine``.

    ``static_cache``: a cache is transformers' ``StaticCache``, else its ``DynamicCache``.
    """

    def __init__(
        self, model: Weights, dtype: str, device: str | None, static_cache: bool = False
    ) -> None:
        transformers.logging.set_verbosity_error()
        transformers.logging.disable_progress_bar()
        if device == "gpu" and not torch.cuda.is_available():
            raise UserError("--device gpu: PyTorch finds no CUDA device here")
        self.device = "cuda" if device != "cpu" and torch.cuda.is_available() else "cpu"
        if self.device == "cuda":
            os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
            torch.use_deterministic_algorithms(True)
            torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = False
            torch.backends.cuda.matmul.allow_fp16_reduced_precision_reduction = False
        torch.set_float32_matmul_precision("highest")
        self.model = model
        self.dtype = dtype
        self.static_cache = static_cache
        self.network = load(model, dtype, ATTENTION).to(self.device)
        names = inspect.signature(self.network.forward).parameters
        self._cache_name = "cache" if "cache" in names else "past_key_values"  # before 5.20

    def describe(self) -> dict[str, Any]:
        name = torch.cuda.get_device_name() if self.device == "cuda" else platform.machine()
        packages = ("torch", "transformers", "numpy")
        return {
            "name": "oracle",
            "backend": "eager",
            "device": f"{self.device}: {name}",
            "cpu_count": torch.get_num_threads(),
            "flags": "",
            "matmul_precision": torch.get_float32_matmul_precision(),
            "versions": {name: importlib.metadata.version(name) for name in packages}
            | {"python": platform.python_version(), NAME: version()},
        } | ({"static_cache": True} if self.static_cache else {})

    def run(
        self,
        tokens: tuple[int, ...],
        positions: tuple[int, ...],
        logits: str,
        want: Want,
        emit: Emit,
        resume: Resume = None,
    ) -> None:
        """Compute one sequence and ``emit`` the wanted stages; ``lm_head`` always.

        ``resume`` is there for the interface: Hugging Face runs a model from its start.

        Raises:
            UserError: as of ``run_batch``.
        """
        self.run_batch(
            Padded.of([tokens], [positions]),
            logits,
            want,
            lambda stage, layer, value: emit(stage, layer, value[0]),
        )

    def run_batch(
        self,
        batch: Padded,
        logits: str,
        want: Want,
        emit: Emit,
        resume: Resume = None,
    ) -> None:
        """Compute several sequences at once. Values have a batch axis.

        Raises:
            UserError: a capture point did not fire, so this transformers works differently; or
                positions have gaps, which transformers takes for several sequences in one.
        """
        if batch.valid.all() and (np.diff(batch.positions) != 1).any():
            raise UserError(
                "positions have gaps, and transformers would take each for the start of another "
                "sequence; the JAX trace reads them as one"
            )
        arch = self.model.config.arch
        with self._recording(arch, want, emit) as recorder:
            found = self._forward(batch.tokens, batch.positions, batch.valid, logits == "last")
            recorder.record(arch.head.name, None, found[:, -1] if logits == "last" else found)

    def run_calls(
        self,
        batch: Padded,
        steps: tuple[int, ...],
        cache: str,
        logits: str,
        want: Want,
        emit: EmitRows,
    ) -> np.ndarray:
        """Compute sequences of one length in several calls, through transformers' own cache; see
        ``JaxEngine.run_calls``.

        Raises:
            UserError: a capture point did not fire.
        """
        arch = self.model.config.arch.cached
        kept = make(self.network.config, cache, batch.valid.shape[1], self.static_cache)
        tokens, prompt, end = batch.tokens, batch.tokens.shape[1], 0

        def place(stage: str, layer: int | None, value: np.ndarray) -> None:
            emit(stage, layer, value, end - value.shape[1 + arch.stage[stage].positions_at])

        with self._recording(arch, want, place) as recorder:
            kept.show = lambda layer, keys: recorder.record(
                "k_post_rope", layer, keys.transpose(1, 2)
            )
            for count in steps:
                first, end = end, end + count
                recorder.call = first, end
                picks = end >= prompt
                found = self._forward(
                    tokens[:, first:end],
                    batch.positions[:, first:end],
                    batch.valid[:, :end],
                    logits == "last",
                    kept,
                )
                if picks or logits == "all":
                    recorder.record(arch.head.name, None, found)
                if picks:
                    best = to_numpy(found[:, -1:]).argmax(-1).astype(np.int32)
                    tokens = np.concatenate([tokens, best], 1)
        return tokens[:, prompt:]

    def _forward(
        self,
        tokens: np.ndarray,
        positions: np.ndarray,
        valid: np.ndarray,
        last: bool,
        cache: Cache | None = None,
    ) -> torch.Tensor:
        """The logits, [B, rows, V], of all rows or of the last alone."""
        padded = None if valid.all() else torch.tensor(valid, device=self.device)
        with torch.inference_mode():
            logits: torch.Tensor = self.network(
                input_ids=torch.tensor(tokens, device=self.device, dtype=torch.long),
                position_ids=torch.tensor(positions, device=self.device, dtype=torch.long),
                attention_mask=padded,
                use_cache=cache is not None,
                logits_to_keep=1 if last else 0,
                **{self._cache_name: cache},
            ).logits
        return logits

    @contextmanager
    def _recording(self, arch: Architecture, want: Want, emit: Emit) -> Iterator[Recorder]:
        """Hooks that ``emit`` the wanted stages of ``arch``; all of them must have fired at the
        end."""
        fired: set[Key] = set()
        head = arch.head.name

        def record(stage: str, layer: int | None, tensor: torch.Tensor) -> None:
            fired.add((stage, layer))
            if stage == head or want(stage, layer):
                emit(stage, layer, to_numpy(tensor))

        with Recorder(self.network, arch, record) as recorder:
            yield recorder
        layers = self.model.config.num_hidden_layers
        expected = [(s.name, layer) for s, layer in arch.computation_order(layers)]
        if silent := [each for each in expected if each not in fired]:
            stage, layer = silent[0]
            raise UserError(
                f"{len(silent)} capture points never fired, first {stage} of layer {layer}; "
                f"transformers {transformers.__version__} is not understood, nothing was kept"
            )
        for name in self.model.shapes:
            self.model.hash(name)  # for the manifest


def load(model: Weights, dtype: str, attention: str) -> PreTrainedModel:
    """The stock Hugging Face model, in evaluation mode."""
    if not isinstance(model, HuggingFaceWeights):
        raise UserError(
            f"{model.name}: transformers reads Hugging Face directories only; write one first with "
            f"{called('tools.convert')}"
        )
    network = getattr(modeling(model.config.arch), model.config.arch.hf_class)
    return network.from_pretrained(
        model.directory,
        dtype=DTYPES[dtype],
        attn_implementation=attention,
        local_files_only=True,
    ).eval()
