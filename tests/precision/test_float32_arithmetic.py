from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxmp.precision.float32_arithmetic import divide, multiply, times_power_of_two


def positive(count, seed):
    """Bits of positive numbers of every size: any, subnormal, and powers of two with a few units more."""
    random = np.random.default_rng(seed)
    anywhere = random.integers(0, 0x7F800001, count, dtype=np.uint32)
    small = random.integers(0, 1 << 20, count, dtype=np.uint32)
    powers = np.exp2(random.integers(-149, 127, count)).astype(np.float32).view(np.uint32)
    kinds = np.stack([anywhere, anywhere, small, powers + random.integers(0, 3, count, dtype=np.uint32)])
    return np.choose(random.integers(0, 4, count), kinds)


def both(count):
    a, b = positive(count, 0), positive(count, 1)
    a[:5], b[:5] = [0, 0x7F800000, 5, 0, 0x7F800000], [5, 1, 0, 1, 3]
    return a, b


@pytest.mark.parametrize(("operation", "ufunc"), [(multiply, np.multiply), (divide, np.divide)])
def test_products_and_quotients_are_numpys_to_the_bit_subnormals_and_infinities_too_t10(operation, ufunc):
    a, b = both(200_000)
    with np.errstate(all="ignore"):
        want = ufunc(a.view(np.float32), b.view(np.float32))
    got = np.asarray(jax.jit(operation)(a, b))
    keep = ~np.isnan(want)
    np.testing.assert_array_equal(got[keep], want.view(np.uint32)[keep])


@pytest.mark.slow
def test_dividing_by_a_constant_is_no_multiplication_by_its_rounded_reciprocal_in_jit():
    a = positive(10_000, 2)
    a = a[(a > 0x00800000) & (a < 0x7F000000)]
    got = jax.jit(lambda a: divide(a, np.float32(448).view(np.uint32)))(a)
    np.testing.assert_array_equal(np.asarray(got), (a.view(np.float32) / np.float32(448)).view(np.uint32))


@pytest.mark.slow
def test_multiplying_by_a_power_of_two_rounds_what_becomes_subnormal():
    x = np.abs(np.random.default_rng(0).normal(size=10_000)).astype(np.float32)
    for exponent in (-149, -140, -127, -20, 0, 100, 127, 130):
        with np.errstate(over="ignore", under="ignore"):
            want = (x.astype(np.float64) * 2.0**exponent).astype(np.float32)
        got = times_power_of_two(jnp.asarray(x.view(np.uint32)), jnp.int32(exponent))
        np.testing.assert_array_equal(np.asarray(got), want.view(np.uint32))
