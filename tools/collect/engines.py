"""The engines that can be run: a name, the module that runs it, what it is installed by."""

import importlib
import importlib.util
from typing import NamedTuple, cast

from stages.errors import UserError
from tools.collect.session import Adapter


class Engine(NamedTuple):
    """One engine.

    Attributes:
        module: of ``tools.collect``.
        extra: of pyproject.toml, that installs it.
        packages: what must be importable.
    """

    module: str
    extra: str
    packages: tuple[str, ...]


ENGINES = {
    "llama.cpp": Engine("llama_cpp", "llama-cpp", ("xllamacpp", "gguf")),
    "transformers": Engine("huggingface", "oracle", ("torch", "transformers")),
    "onnxruntime": Engine(
        "onnx_runtime", "onnxruntime", ("torch", "transformers", "onnxscript", "onnxruntime")
    ),
    "openvino": Engine(
        "open_vino", "openvino", ("torch", "transformers", "onnxscript", "openvino")
    ),
    "mlx-lm": Engine("mlx_lm_models", "mlx", ("mlx", "mlx_lm")),
    "tunix": Engine("tunix_models", "tunix", ("tunix",)),
}


def adapter(name: str) -> Adapter:
    """The module that runs an engine.

    Raises:
        UserError: no such engine, or its package is not installed.
    """
    if name not in ENGINES:
        raise UserError(f"no engine {name!r}; choose one of {', '.join([*ENGINES, 'files'])}")
    engine = ENGINES[name]
    if absent := [package for package in engine.packages if not importlib.util.find_spec(package)]:
        raise UserError(
            f"{name}: {absent[0]} is not installed: pip install 'qwen-jax-stages[{engine.extra}]'"
        )
    return cast(Adapter, importlib.import_module(f"tools.collect.{engine.module}"))
