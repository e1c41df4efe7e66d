"""Observation of what modules return."""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxmp.modules.linen import with_policy
from jaxmp.modules.observe import observed_modules

X = jnp.ones((4, 3))
JittedDense = nn.jit(nn.Dense)  # once: what it has traced, it keeps


class Net(nn.Module):
    @nn.compact
    def __call__(self, x):
        return JittedDense(2, name="jitted")(nn.Dense(3, name="first")(x))


VARIABLES = Net().init(jax.random.key(0), X)


def test_an_observer_sees_what_each_module_hands_on_after_its_policy():
    seen = []
    with observed_modules(lambda path, out: (seen.append((path, out.dtype.name, out.shape)), out)[1]):
        out = with_policy(Net().apply, "first=p=f32,c=f32,o=f32; mixed_float16")(VARIABLES, X)
    assert seen == [("first", "float32", (4, 3)), ("jitted", "float16", (4, 2)), ("", "float16", (4, 2))]
    assert out.dtype == jnp.float32


@pytest.mark.parametrize("factor", [2.0, 3.0])
def test_what_an_observer_returns_takes_the_place_of_the_outputs(factor):
    apply = with_policy(Net().apply, "float32")
    plain = apply(VARIABLES, X)
    with observed_modules(lambda path, out: factor * out if path == "jitted" else out):
        np.testing.assert_allclose(apply(VARIABLES, X), factor * plain)
    np.testing.assert_array_equal(apply(VARIABLES, X), plain)  # it is gone again, under nn.jit too
