"""RoPE tables, computed once per run on the host in NumPy.

The tables are the one place where a model's numbers depend on ``pow``, ``cos`` and ``sin``, which
differ between libraries and devices. Making them here gives the compiled, the un-jitted and the
GPU forward the same bytes.

Source: transformers ``Qwen2RotaryEmbedding`` and ``modeling_rope_utils`` (YaRN: Peng et al. 2023).
"""

import math

import numpy as np

from qwen_jax.config import Config, Yarn


def inverse_frequencies(config: Config) -> tuple[np.ndarray, float]:
    """The H/2 inverse frequencies (float32, radians per position) and the factor on cos and sin.

    Every step is rounded to float32 where PyTorch rounds it, but ``pow`` is evaluated in float64
    and rounded once: PyTorch's vectorised float32 ``pow`` is the correctly rounded one for all but
    about 1 in 300 frequencies, NumPy's float32 ``pow`` for far fewer.
    """
    exponent = np.arange(0, config.head_dim, 2, dtype=np.float32) / np.float32(config.head_dim)
    wavelength = np.power(config.rope_theta, exponent.astype(np.float64)).astype(np.float32)
    one = np.float32(1)
    if config.yarn is None:
        return one / wavelength, 1.0
    yarn = config.yarn
    keep = one - _ramp(config, yarn)
    stretched = one / (np.float32(yarn.factor) * wavelength)
    blended = stretched * (one - keep) + (one / wavelength) * keep
    factor = yarn.attention_factor
    if factor is None:
        factor = 0.1 * math.log(yarn.factor) + 1.0 if yarn.factor > 1 else 1.0
    return blended, factor


def _ramp(config: Config, yarn: Yarn) -> np.ndarray:
    """0 for the pairs that turn fast enough to be left alone, 1 for those that are stretched."""

    def pair_with(rotations: float) -> float:
        turns = yarn.original_max_position_embeddings / (rotations * 2 * math.pi)
        return config.head_dim * math.log(turns) / (2 * math.log(config.rope_theta))

    low, high = pair_with(yarn.beta_fast), pair_with(yarn.beta_slow)
    if yarn.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, config.head_dim - 1)
    width = high - low if high != low else 0.001
    pairs = np.arange(config.head_dim // 2, dtype=np.float32)
    return np.clip((pairs - np.float32(low)) / np.float32(width), np.float32(0), np.float32(1))


def cos_sin(config: Config, positions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """cos and sin of every angle, each of shape [..., T, H/2] for ``positions`` [..., T].

    The angle is the float32 product that Hugging Face forms (at position 30000 that alone costs
    ten bits, and an engine that matches the reference must lose the same ones); its cosine is
    rounded once to float32.
    """
    frequencies, factor = inverse_frequencies(config)
    angles = (positions.astype(np.float32)[..., None] * frequencies).astype(np.float64)
    factor = np.float32(factor)
    return np.cos(angles).astype(np.float32) * factor, np.sin(angles).astype(np.float32) * factor
