"""transformers' key/value caches, with rows that go through a number format on their way in."""

from collections.abc import Callable
from typing import Any

import torch
from transformers import Cache, DynamicCache, StaticCache
from transformers.configuration_utils import PreTrainedConfig

FORMATS = {
    name: getattr(torch, name)
    for name in ("float32", "bfloat16", "float16", "float64", "float8_e4m3fn", "float8_e5m2")
}


def through(x: torch.Tensor, format: torch.dtype) -> torch.Tensor:
    """``x`` rounded to ``format`` and back to its own dtype, as a cache does. float8 has a scale of
    1 and saturates at its largest finite value."""
    if format.itemsize == 1:
        x = x.clamp(torch.finfo(format).min, torch.finfo(format).max)
    return x.to(format).to(x.dtype)


class _Kept(Cache):
    """
    Attributes:
        format: what the rows are put away in.
        show: is called as (layer, keys [B, K, rows, H]) with those that come in.
    """

    format: torch.dtype
    show: Callable[[int, torch.Tensor], None]

    def update(
        self,
        key_states: torch.Tensor,
        value_states: torch.Tensor,
        layer_idx: int,
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        self.show(layer_idx, key_states)
        kept = (through(x, self.format) for x in (key_states, value_states))
        return super().update(*kept, layer_idx, *args, **kwargs)


class Dynamic(_Kept, DynamicCache):
    """It grows, and in layers with a sliding window keeps the window."""


class Static(_Kept, StaticCache):
    """It is as long as the sequence from the start, or as the window."""


def make(config: PreTrainedConfig, format: str, length: int, static: bool) -> _Kept:
    """An empty cache for ``length`` rows of a model."""
    made = Static(config=config, max_cache_len=length) if static else Dynamic(config=config)
    made.format = FORMATS[format]
    return made
