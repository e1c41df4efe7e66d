"""Activations that stay with their rows."""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from jaxmp.jaxprs import equations
from jaxmp.modules.activations import RowSharding
from jaxmp.modules.interventions import intervene


class Net(nn.Module):
    """Two modules that return rows, and one that returns a mean over them."""

    @nn.compact
    def __call__(self, x):
        x = nn.Dense(8)(nn.Dense(8)(x))
        return Mean()(x)


class Mean(nn.Module):
    def __call__(self, x):
        return x.mean(0)


def test_only_outputs_with_one_row_an_example_are_constrained():
    mesh = jax.make_mesh((1,), ("data",), axis_types=(AxisType.Auto,))
    sharding = NamedSharding(mesh, PartitionSpec("data"))
    x = jnp.ones((4, 3))
    variables = jax.eval_shape(Net().init, jax.random.key(0), x)
    jaxpr = jax.make_jaxpr(intervene(Net().apply, RowSharding(sharding, 4)))(variables, x)
    found = [e for e, _ in equations(jaxpr) if e.primitive.name == "sharding_constraint"]
    assert [e.outvars[0].aval.shape for e in found] == [(4, 8), (4, 8)]
    assert all(e.params["sharding"].spec == sharding.spec for e in found)
