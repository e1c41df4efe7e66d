"""`in_float64`: each operation in float64, random numbers as in float32."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxmp.errors import InputError
from jaxmp.instruments.float64 import draws, in_float64

KEY = jax.random.key(3)
X = np.linspace(-2, 2, 5).astype(np.float32)
WIDE = X.astype(np.float64)
U = np.asarray(jax.random.uniform(KEY, (5,))).astype(np.float64)


@jax.custom_jvp
def tripled(x):
    return 3 * x


tripled.defjvp(lambda primals, tangents: (tripled(*primals), 5 * tangents[0]))

CASES = {
    "noise": (lambda x: x + jax.random.uniform(KEY, x.shape), WIDE + U),
    "mask": (lambda x: jnp.where(jax.random.bernoulli(KEY, 0.5, x.shape), x, 0), np.where(U < 0.5, WIDE, 0)),
    "scan": (lambda x: jax.lax.scan(lambda c, y: (c + jnp.exp(y), c), jnp.float32(0), x)[0], np.exp(WIDE).sum()),
    "while": (
        lambda x: jax.lax.while_loop(lambda c: c[0] < 3, lambda c: (c[0] + 1, jnp.sin(c[1])), (0, x))[1],
        np.sin(np.sin(np.sin(WIDE))),
    ),
    "cond": (lambda x: jax.lax.cond(x[0] < 0, jnp.cos, jnp.sin, x), np.cos(WIDE)),
    "scatter": (
        lambda x: jnp.zeros(2).at[jnp.array([0, 1, 1, 0, 1])].add(x / 3),
        np.bincount([0, 1, 1, 0, 1], WIDE / 3),
    ),
    "casts": (lambda x: (x.astype(jnp.bfloat16) * 1.0).astype(jnp.float32) ** 3, WIDE**3),
    "complex": (lambda x: jnp.abs(jnp.fft.fft(x)), np.abs(np.fft.fft(WIDE))),
    "custom derivative": (jax.grad(lambda x: jnp.sum(jnp.exp(tripled(x)))), 5 * np.exp(3 * WIDE)),
}


@pytest.mark.parametrize("name", CASES)
def test_a_function_is_evaluated_in_float64_with_the_draws_of_float32(name):
    fn, exact = CASES[name]
    found = in_float64(fn)(X)
    assert found.dtype == np.float64
    np.testing.assert_allclose(found, exact, rtol=1e-13, atol=1e-15)
    assert draws(fn, X) == (name in ("noise", "mask"))


def test_an_operation_that_holds_functions_and_is_not_known_is_one_message():
    def solved(x):
        return jax.lax.custom_linear_solve(lambda y: 2 * y, x, lambda _, b: b / 2, symmetric=True)

    with pytest.raises(InputError, match="linear_solve holds functions of its own"):
        in_float64(solved)(X)
