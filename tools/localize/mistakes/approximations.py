"""Cheap stand-ins for exp and tanh that engines use, in float64."""

from collections.abc import Callable, Iterator
from functools import partial

import jax.numpy as jnp
import numpy as np
from jax import Array


def _schraudolph(shift: float, x: Array) -> Array:
    """exp by writing a linear function of its argument into the exponent bits of a float32."""
    linear = np.asarray(x) * (2**23 / np.log(2)) + (127 * 2**23 - shift)
    bits = np.nan_to_num(np.clip(linear, 0, 2**31 - 1))
    return jnp.asarray(bits.astype(np.int32).view(np.float32), jnp.float64)


# The cubic that stands in for 2^fraction in FlashAttention 4.
FLASH_ATTENTION_4 = (1, 0.6951461434364319, 0.22756439447402954, 0.07711908966302872)


def _by_power(n: int, x: Array) -> Array:
    return jnp.maximum(1 + x / n, 0) ** n


def _by_powers_of_2(coefficients: tuple[float, ...], x: Array) -> Array:
    """exp as 2^whole times a polynomial of the fraction, lowest power first."""
    power = x / np.log(2)
    whole = jnp.floor(power)
    fraction = power - whole
    return jnp.exp2(whole) * sum(c * fraction**n for n, c in enumerate(coefficients))


def _series(degree: int, x: Array) -> Array:
    """exp by its series, of what a multiple of ln 2 leaves."""
    whole = jnp.round(x / np.log(2))
    rest, term, total = x - whole * np.log(2), jnp.ones_like(x), jnp.ones_like(x)
    for n in range(1, degree + 1):
        term = term * rest / n
        total = total + term
    return jnp.exp2(whole) * total


def exponentials() -> Iterator[tuple[str, Callable[[Array], Array]]]:
    """Cheap exponentials of [..., any] float64 that engines use: (what it is, function)."""
    for n in (256, 1024, 4096, 65536):
        yield f"(1 + x/{n})^{n}", partial(_by_power, n)
    for shift in (486411.0, 366393.0, 298765.0, 0.0):
        yield "exponent bits", partial(_schraudolph, shift)
    yield "2^n and a line", partial(_by_powers_of_2, (1, 1))
    yield "2^n and a parabola", partial(_by_powers_of_2, (1, 0.6565, 0.3435))
    yield "2^n and a cubic", partial(_by_powers_of_2, FLASH_ATTENTION_4)
    for degree in (2, 3, 4, 5):
        yield f"series of degree {degree}", partial(_series, degree)


def tanh_by_fraction(x: Array) -> Array:
    """tanh as a fraction of cubics."""
    return jnp.clip(x * (27 + x * x) / (27 + 9 * x * x), -1, 1)


def tanh_by_long_fraction(x: Array) -> Array:
    """tanh as a fraction of polynomials of degree 7 and 6."""
    x2 = x * x
    top = x * (135135 + x2 * (17325 + x2 * (378 + x2)))
    return jnp.clip(top / (135135 + x2 * (62370 + x2 * (3150 + x2 * 28))), -1, 1)
