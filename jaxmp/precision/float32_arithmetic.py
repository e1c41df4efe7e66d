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
    # The float quotient is off by a few units; integer arithmetic modulo 2^32 gives the remainder, which corrects it.
    estimate = a_significand.astype(jnp.int32).astype(jnp.float32) / b_significand.astype(jnp.int32).astype(jnp.float32)
    quotient = (estimate * np.float32(2.0**25)).astype(jnp.int32).astype(jnp.uint32)
    remainder = bitcast_convert_type((a_significand << 25) - quotient * b_significand, jnp.int32)
    off = jnp.floor_divide(remainder, b_significand.astype(jnp.int32))
    quotient += off.astype(jnp.uint32)
    remainder -= off * b_significand.astype(jnp.int32)
    result = _compose((quotient << 1) | (remainder > 0).astype(jnp.uint32), a_exponent - b_exponent - 26)
    result = jnp.where((a >= INFINITY) | (b == 0), jnp.uint32(INFINITY), result)
    return jnp.where((a == 0) & (b > 0) | (b >= INFINITY), jnp.uint32(0), result)


def significand_and_exponent(bits: Bits) -> tuple[jax.Array, jax.Array]:
    """Returns a positive finite number as float32 in [1, 2), and int32 exponent of 2 to be multiplied with it."""
    significand, exponent = _normalised(bits)
    return bitcast_convert_type((significand & MANTISSA) | np.uint32(127 << 23), jnp.float32), exponent


def times_power_of_two(magnitude: jax.Array, exponent: jax.Array) -> jax.Array:
    """Returns `magnitude * 2^exponent`, for a magnitude that is 0 or a normal number; `exponent` is int32."""
    stored = (magnitude >> 23).astype(jnp.int32) + exponent
    significand = (magnitude & MANTISSA) | LEADING
    normal = magnitude + (exponent.astype(jnp.uint32) << 23)
    subnormal = _drop(significand, jnp.clip(1 - stored, 0, 31).astype(jnp.uint32))
    result = jnp.where(stored >= 1, jnp.where(stored >= 255, jnp.uint32(INFINITY), normal), subnormal)
    return jnp.where(magnitude == 0, jnp.uint32(0), result)


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
