"""Multiplication and division of positive float32 numbers by integer operations.

The results are those of IEEE 754 with rounding to nearest, ties to even, on every device, with and without jit. The
operations of XLA are not: it flushes subnormal numbers to zero (trap T10), replaces the division by a constant with a
multiplication by its rounded reciprocal under jit, and divides approximately on some devices.

Numbers are given and returned as the bits of float32, uint32, of any shapes that broadcast. They must be zero,
positive or infinite; NaN is not handled.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from jax.lax import bitcast_convert_type

INFINITY, MANTISSA, LEADING = 0x7F800000, 0x007FFFFF, 0x00800000


Bits = jax.Array | np.uint32
"""bits of float32 numbers, uint32"""


def to_bits(x: float) -> np.uint32:
    """Returns the bits of a Python float, rounded to float32."""
    return np.float32(x).view(np.uint32)


def multiply(a: Bits, b: Bits) -> jax.Array:
    """Returns `a * b`; 0 if either is 0, infinity if either is infinite and neither is 0."""
    (a_significand, a_exponent), (b_significand, b_exponent) = _normalised(a), _normalised(b)
    # The product has 48 bits: `top` are the upper 24, `low` the lower 24.
    a_high, a_low, b_high, b_low = (
        a_significand >> 12,
        a_significand & 0xFFF,
        b_significand >> 12,
        b_significand & 0xFFF,
    )
    middle = a_high * b_low + a_low * b_high
    low = a_low * b_low + ((middle & 0xFFF) << 12)
    top, low = a_high * b_high + (middle >> 12) + (low >> 24), low & 0xFFFFFF
    sticky = ((low & 0x1FFFFF) > 0).astype(jnp.uint32)
    product = _compose(((top << 3) | (low >> 21)) | sticky, a_exponent + b_exponent - 25)
    product = jnp.where((a >= INFINITY) | (b >= INFINITY), jnp.uint32(INFINITY), product)
    return jnp.where((a == 0) | (b == 0), jnp.uint32(0), product)


def divide(a: Bits, b: Bits) -> jax.Array:
    """Returns `a / b`; infinity if `b` is 0 or `a` is infinite."""
    (a_significand, a_exponent), (b_significand, b_exponent) = _normalised(a), _normalised(b)
    a_int, b_int = (x.astype(jnp.int32) for x in (a_significand, b_significand))
    exponent = a_exponent - b_exponent - (a_int < b_int)  # the quotient is in [2^exponent, 2^(exponent + 1))
    # The quotient is rounded to a whole number of its last place: 24 bits, or fewer if the result is subnormal.
    shift = 23 + (a_int < b_int) - jnp.maximum(-126 - exponent, 0)
    tiny = shift < 0  # less than half of the smallest number, or between that half and the whole of it
    shift = jnp.maximum(shift, 0)
    estimate = a_int.astype(jnp.float32) / b_int.astype(jnp.float32)
    # The float quotient is off by a few units; integer arithmetic modulo 2^32 gives the remainder, which corrects it.
    quotient = (estimate * bitcast_convert_type((shift + 127) << 23, jnp.float32)).astype(jnp.int32)
    remainder = (a_int << shift) - quotient * b_int
    off = jnp.round(remainder.astype(jnp.float32) / b_int.astype(jnp.float32)).astype(jnp.int32)
    quotient, remainder = quotient + off, remainder - off * b_int
    # That division is approximate too; ties go to the even quotient.
    twice, odd = 2 * remainder, quotient & 1
    quotient = quotient + (twice + odd > b_int) - (odd - twice > b_int)
    quotient = jnp.where(tiny, ((exponent == -150) & (a_int > b_int)).astype(jnp.int32), quotient)
    bits = (quotient + (jnp.clip(exponent + 126, 0, 254) << 23)).astype(jnp.uint32)  # a carry goes to the exponent
    bits = jnp.where((a >= INFINITY) | (b == 0), jnp.uint32(INFINITY), jnp.minimum(bits, jnp.uint32(INFINITY)))
    return jnp.where((a == 0) & (b > 0) | (b >= INFINITY), jnp.uint32(0), bits)


def significand_and_exponent(bits: Bits) -> tuple[jax.Array, jax.Array]:
    """Returns a positive finite number as float32 in [1, 2), and int32 exponent of 2 to be multiplied with it."""
    significand, exponent = _normalised(bits)
    return bitcast_convert_type((significand & MANTISSA) | np.uint32(127 << 23), jnp.float32), exponent


def times_power_of_two(magnitude: jax.Array, exponent: jax.Array) -> jax.Array:
    """Returns `magnitude * 2^exponent`, for a magnitude that is 0 or a normal number; `exponent` is int32."""
    stored = (magnitude >> 23).astype(jnp.int32) + exponent
    normal = jnp.minimum(magnitude + (exponent.astype(jnp.uint32) << 23), jnp.uint32(INFINITY))
    # A subnormal number is a whole number of 2^-149, below 2^23: adding 2^23 to it rounds it.
    quanta = jnp.maximum(magnitude.astype(jnp.int32) + ((exponent + 149) << 23), 0)
    quanta = bitcast_convert_type(quanta, jnp.float32) + np.float32(2.0**23)
    subnormal = bitcast_convert_type(quanta, jnp.uint32) - to_bits(2.0**23)
    return jnp.where(magnitude == 0, jnp.uint32(0), jnp.where(stored >= 1, normal, subnormal))


def _normalised(bits: Bits) -> tuple[jax.Array, jax.Array]:
    """Returns (significand of 24 bits, exponent): the number is significand * 2^(exponent - 23)."""
    bits = jnp.asarray(bits, jnp.uint32)
    stored = (bits >> 23).astype(jnp.int32)
    significand = (bits & MANTISSA) | jnp.where(stored > 0, jnp.uint32(LEADING), jnp.uint32(0))
    zeros = jnp.maximum(jax.lax.clz(significand.astype(jnp.int32)) - 8, 0)  # 24 of a zero, which callers set aside
    return significand << zeros.astype(jnp.uint32), jnp.maximum(stored, 1) - 127 - zeros


def _compose(value: jax.Array, exponent: jax.Array) -> jax.Array:
    """Returns the bits of `value * 2^exponent`, rounded. `value` has 26 bits or more; its last bit may be sticky."""
    length = 31 - jax.lax.clz(value.astype(jnp.int32))
    largest = exponent + length
    drop = length - 23 + jnp.maximum(-126 - largest, 0)
    rounded = _drop(value, jnp.clip(drop, 0, 31).astype(jnp.uint32))
    bits = rounded + (jnp.clip(largest + 126, 0, 255).astype(jnp.uint32) << 23)
    return jnp.where(largest > 127, jnp.uint32(INFINITY), jnp.minimum(bits, jnp.uint32(INFINITY)))


def _drop(value: jax.Array, count: jax.Array) -> jax.Array:
    """Rounds `value / 2^count` to the nearest whole number, ties to even."""
    dropped = (jnp.uint32(1) << count) - 1
    return (value + (dropped >> 1) + ((value >> count) & 1 & dropped)) >> count
