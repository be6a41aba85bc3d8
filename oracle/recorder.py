"""The 20 stages of a Hugging Face Qwen2, through transformers' public extension points.

Module hooks and the attention interface; no fork of the model's source. What runs is the stock
eager model: the recorder only reads, so the logits are the stock model's bit for bit.
"""

import importlib.metadata
import os
import platform
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import ml_dtypes
import numpy as np
import torch
import transformers
from torch.nn import functional
from transformers.masking_utils import AttentionMaskInterface, eager_mask
from transformers.modeling_utils import AttentionInterface
from transformers.models.qwen2 import modeling_qwen2

from qwen_jax.checkpoint import Checkpoint
from qwen_jax.weights import expected_shapes
from stages.errors import UserError
from stages.table import computation_order

Want = Callable[[str, int | None], bool]
Emit = Callable[[str, int | None, np.ndarray], None]
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
    as each stage is computed; tensors come as one sequence, without the batch axis, in the axes of
    the stage table."""

    def __init__(self, model: modeling_qwen2.Qwen2ForCausalLM, record: Callable[..., None]) -> None:
        super().__init__()
        self.record = record
        self._parts: dict[str, torch.Tensor] = {}  # q, k, v on their way to one tensor
        core = model.model
        self._output(core.embed_tokens, "embedding", 0)
        for index, layer in enumerate(core.layers):
            attention, mlp = layer.self_attn, layer.mlp
            self._output(layer.input_layernorm, "attn_norm", index)
            for part in "qkv":
                self._projection(getattr(attention, f"{part}_proj"), part, index)
            attention.recorder = self  # found by ``_attention`` through the module it is given
            self.callback(delattr, attention, "recorder")
            self._output(attention.o_proj, "attn_out", index)
            self._input(layer.post_attention_layernorm, "post_attn_residual", index)
            self._output(layer.post_attention_layernorm, "ffn_norm", index)
            self._output(mlp.gate_proj, "ffn_gate", index)
            self._output(mlp.up_proj, "ffn_up", index)
            self._output(mlp.act_fn, "ffn_silu", index)
            self._input(mlp.down_proj, "ffn_swigl", index)
            self._output(mlp.down_proj, "ffn_out", index)
            self._output(layer, "post_ffn_residual", index)
        self._output(core.norm, "final_norm", None)

    def _output(self, module: torch.nn.Module, stage: str, layer: int | None) -> None:
        def hook(module: Any, args: Any, output: Any) -> None:
            tensor = output[0] if isinstance(output, tuple) else output
            self.record(stage, layer, tensor[0])

        self.enter_context(module.register_forward_hook(hook))

    def _input(self, module: torch.nn.Module, stage: str, layer: int) -> None:
        def hook(module: Any, args: Any) -> None:
            self.record(stage, layer, args[0][0])

        self.enter_context(module.register_forward_pre_hook(hook))

    def _projection(self, linear: torch.nn.Linear, part: str, layer: int) -> None:
        """q, k and v side by side, without the bias (the product alone, never output - bias)
        and with it."""

        def hook(module: Any, args: Any, output: torch.Tensor) -> None:
            self._parts["product " + part] = functional.linear(args[0], linear.weight)[0]
            self._parts["sum " + part] = output[0]
            if len(self._parts) == 6:
                for stage, name in (("qkv_matmul", "product "), ("qkv_bias", "sum ")):
                    joined = torch.cat([self._parts.pop(name + p) for p in "qkv"], -1)
                    self.record(stage, layer, joined)

        self.enter_context(linear.register_forward_hook(hook))


def _attention(
    module: Any, query: Any, key: Any, value: Any, mask: Any, scaling: float, **rest: Any
) -> tuple[torch.Tensor, torch.Tensor]:
    """The stock eager attention, with its arguments and results recorded.

    query, key: [B, heads, T, H] after RoPE. The scores before the mask exist only inside the
    stock function, so they are computed once more by its own expression.
    """
    record, layer = module.recorder.record, module.layer_idx
    record("q_post_rope", layer, query[0].transpose(0, 1))
    record("k_post_rope", layer, key[0].transpose(0, 1))
    keys = modeling_qwen2.repeat_kv(key, module.num_key_value_groups)
    record("attn_scores", layer, (torch.matmul(query, keys.transpose(2, 3)) * scaling)[0])
    output, weights = modeling_qwen2.eager_attention_forward(
        module, query, key, value, mask, scaling=scaling, **rest
    )
    record("attn_softmax", layer, weights[0])
    record("attention", layer, output[0].flatten(1))
    return output, weights


AttentionInterface.register(ATTENTION, _attention)
# Without a mask function of the same name transformers passes no mask at all: attention would
# look into the future, without a word.
AttentionMaskInterface.register(ATTENTION, eager_mask)


class TorchEngine:
    """The Hugging Face forward over a checkpoint, with the interface of ``JaxEngine``."""

    def __init__(self, model: Checkpoint, dtype: str, device: str | None) -> None:
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
        self.network = load(model, dtype, ATTENTION).to(self.device)

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
            | {"python": platform.python_version()},
        }

    def run(
        self, tokens: tuple[int, ...], logits: str, want: Want, emit: Emit, resume: None = None
    ) -> None:
        """Compute one sequence and ``emit`` the wanted stages; ``lm_head`` always.

        ``resume`` is there for the interface: Hugging Face runs a model from its start.

        Raises:
            UserError: a capture point did not fire, so this transformers works differently.
        """
        fired = set()

        def record(stage: str, layer: int | None, tensor: torch.Tensor) -> None:
            fired.add((stage, layer))
            if stage == "lm_head" or want(stage, layer):
                emit(stage, layer, to_numpy(tensor))

        ids = torch.tensor([tokens], device=self.device)
        keep = 1 if logits == "last" else 0
        with Recorder(self.network, record), torch.inference_mode():
            result = self.network(input_ids=ids, use_cache=False, logits_to_keep=keep)
        layers = self.model.config.num_hidden_layers
        expected = [(s.name, layer) for s, layer in computation_order(layers)]
        if silent := [each for each in expected if each not in fired and each[0] != "lm_head"]:
            stage, layer = silent[0]
            raise UserError(
                f"{len(silent)} capture points never fired, first {stage} of layer {layer}; "
                f"transformers {transformers.__version__} is not understood, nothing was kept"
            )
        record("lm_head", None, result.logits[0, -1] if logits == "last" else result.logits[0])
        for name in expected_shapes(self.model.config):
            self.model.hash(name)  # for the manifest


def load(model: Checkpoint, dtype: str, attention: str) -> modeling_qwen2.Qwen2ForCausalLM:
    """The stock Hugging Face model, in evaluation mode."""
    return modeling_qwen2.Qwen2ForCausalLM.from_pretrained(
        model.directory,
        dtype=DTYPES[dtype],
        attn_implementation=attention,
        local_files_only=True,
    ).eval()
