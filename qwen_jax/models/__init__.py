"""How every stage is computed: a module of pure functions for each architecture."""

from collections.abc import Callable, Mapping
from types import ModuleType

from jax import Array

from qwen_jax.models import qwen2, qwen3
from stages.architecture import Architecture
from stages.architectures import ARCHITECTURES

StageFunction = Callable[..., Array]

# A stage's function is that of the first module that has one of its name.
MODULES: dict[str, tuple[ModuleType, ...]] = {"qwen2": (qwen2,), "qwen3": (qwen3, qwen2)}


def _functions(architecture: Architecture) -> dict[str, StageFunction]:
    modules = MODULES[architecture.name]
    return {
        name: next(vars(module)[name] for module in modules if name in vars(module))
        for name in architecture.cached.names
    }


FUNCTIONS: Mapping[str, Mapping[str, StageFunction]] = {
    name: _functions(each) for name, each in ARCHITECTURES.items()
}
