"""RoPE tables, computed once per run on the host in NumPy.

The tables are the one place where a model's numbers depend on ``pow``, ``cos`` and ``sin``, which
differ between libraries and devices. Making them here gives the compiled, the un-jitted and the
GPU forward the same bytes.

Source: transformers ``Qwen2RotaryEmbedding`` and ``modeling_rope_utils`` (YaRN: Peng et al. 2023).
"""

import math
from typing import Any

import numpy as np

from qwen_jax.config import Config, Yarn


def inverse_frequencies(config: Config) -> tuple[np.ndarray, float]:
    """The H/2 inverse frequencies (float32, radians per position) and the factor on cos and sin.

    Every step is rounded to float32 where PyTorch rounds it, those inside ``pow`` included.
    """
    exponent = np.arange(0, config.head_dim, 2, dtype=np.float32) / np.float32(config.head_dim)
    wavelength = _pow(config.rope_theta, exponent)
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


# SLEEF's float32 polynomials (sleefsimdsp.c: logkf, expkf), highest power first, and its two
# splittings of log(2).
_LOG = (0.240320354700088500976562, 0.285112679004669189453125, 0.400007992982864379882812)
_LOG_LAST = (0.66666662693023681640625, 3.69183861259614332084311e-09)
_LOG_2 = (0.69314718246459960938, -1.904654323148236017e-09)
_EXP = (0.00136324646882712841033936, 0.00836596917361021041870117, 0.0416710823774337768554688,
        0.166665524244308471679688, 0.499999850988388061523438)  # fmt: skip
_EXP_2 = (0.693145751953125, 1.428606765330187045e-06)


def _pow(base: float, exponent: np.ndarray) -> np.ndarray:
    """``base ** exponent`` with the rounding errors of PyTorch's vectorised float32 ``pow``.

    base > 1; exponent [n] float32 in 0..1; result [n] float32.

    On a CPU that is SLEEF's ``powf_u10``. Its short polynomials leave 1 result in 55 one ULP from
    the correctly rounded one, of Qwen2.5's 64 frequencies (theta 1e6, head size 128) one. They
    are repeated here step by step; what SLEEF carries in pairs of float32 is a float64 here, which
    changes one result in a million.

    PyTorch hands what is left over from whole blocks (of 32 with AVX-512, 16 with AVX2) to the C
    library's ``powf``, which differs from SLEEF's as often. Head sizes 64 and 128 leave nothing.
    """

    def single(x: Any) -> Any:
        """Round to float32 and hold as float64, where products of two such are exact."""
        return np.float64(np.float32(x))

    def polynomial(coefficients: tuple[float, ...], x: Any) -> Any:
        value = np.float64(0)
        for coefficient in coefficients:
            value = single(value * x + single(coefficient))  # a fused multiply-add
        return value

    # base = 2**e m with m in 0.75..1.5; log m = 2 atanh x
    base = single(base)
    e = math.frexp(single(base * single(1 / 0.75)))[1] - 1
    m = base / 2.0**e
    x = (m - 1) / (m + 1)
    x_single = single(single(m - 1) * single(1 / single(m + 1)))
    tail = x * x * polynomial(_LOG, single(x_single * x_single)) + sum(map(single, _LOG_LAST))
    log = e * sum(map(single, _LOG_2)) + 2 * x + x**3 * tail
    # exp y = 2**q exp s
    y = log * np.float64(exponent)
    q = np.rint(single(single(y) * single(1 / math.log(2))))
    s = y - q * _EXP_2[0] - q * single(_EXP_2[1])
    return np.ldexp(np.float32(1 + s + s * s * polynomial(_EXP, single(s))), q.astype(int))


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
    scale = np.float32(factor)
    return np.cos(angles).astype(np.float32) * scale, np.sin(angles).astype(np.float32) * scale
