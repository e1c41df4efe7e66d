"""Rematerialisation by module path: the same numbers, and less that is kept for the backward pass."""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxmp.errors import InputError
from jaxmp.jaxprs import equations
from jaxmp.modules.nnx import from_nnx
from jaxmp.modules.remat import POLICIES
from jaxmp.tasks.classification import Classification
from jaxmp.tasks.loss import init_model, make_loss


class Block(nn.Module):
    @nn.compact
    def __call__(self, x, train):
        x = nn.BatchNorm(use_running_average=not train)(jnp.tanh(nn.Dense(8)(x)))
        return nn.Dropout(0.5, deterministic=not train)(jnp.tanh(nn.Dense(8)(x)))


class Encoder(nn.Module):
    @nn.compact
    def __call__(self, x, train):
        for i in range(2):
            x = Block(name=f"block_{i}")(x, train)
        return x


class Model(nn.Module):
    @nn.compact
    def __call__(self, x, *, train):
        return nn.Dense(3)(Encoder(name="encoder")(x.reshape(x.shape[0], -1), train))


class Step(nn.Module):
    @nn.compact
    def __call__(self, x, train):
        return Block(name="block")(x, train), None


class Scanned(nn.Module):
    @nn.compact
    def __call__(self, x, *, train):
        axes = {"params": 0, "batch_stats": 0}
        step = nn.scan(Step, variable_axes=axes, split_rngs={"params": True}, in_axes=nn.broadcast, length=2)
        return nn.Dense(3)(step(name="steps")(nn.Dense(8)(x.reshape(x.shape[0], -1)), train)[0])


ROWS = {"image": np.ones((4, 2, 2, 2), np.float32), "label": np.arange(4) % 3, "weight": np.ones(4, np.float32)}


def gradient(model, remat=(), policy="float32", **kwargs):
    """(the gradient as a function, the shapes of its arguments)."""
    loss_fn = make_loss(model, Classification(), policy, remat=remat, **kwargs)
    grads = jax.grad(lambda p, s: loss_fn(p, s, ROWS, jax.random.key(1))[0:2], has_aux=True)
    return grads, jax.eval_shape(lambda key: init_model(model, Classification(), ROWS, key), jax.random.key(0))


def count(primitive, function, args):
    return sum(e.primitive.name == primitive for e, _ in equations(jax.make_jaxpr(function)(*args)))


def residuals(**kwargs):
    """Bytes of what is kept between the forward and the backward pass."""
    _, (params, model_state) = gradient(Model())
    loss_fn = make_loss(Model(), Classification(), "float32", **kwargs)

    def backward(params, model_state):
        return jax.vjp(lambda p: loss_fn(p, model_state, ROWS, jax.random.key(1))[0], params)[1]

    kept = jax.tree.leaves(jax.eval_shape(backward, params, model_state))
    return sum(x.size * x.dtype.itemsize for x in kept)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("model", "remat", "policy"),
    [
        (Model(), ("encoder/*",), "encoder/block_0=float32; mixed_bfloat16"),
        pytest.param(Scanned(), ("@Block",), "float32", marks=pytest.mark.slow),
    ],
)
def test_the_gradient_is_the_same(model, remat, policy):
    """With dropout and batch statistics, in a scan, under rules by module; arguments that are no arrays stay so."""
    plain, _ = gradient(model, policy=policy)
    again, _ = gradient(model, remat, policy=policy)
    args = jax.jit(lambda key: init_model(model, Classification(), ROWS, key))(jax.random.key(0))
    expected, found = (jax.jit(f)(*args) for f in (plain, again))
    tolerance = 1e-5 if policy == "float32" else 2e-2  # XLA rounds in half where it likes (trap T6)
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, rtol=tolerance, atol=tolerance)
    assert count("dot_general", again, args) > count("dot_general", plain, args)


def test_only_the_modules_that_are_named_are_computed_again():
    of = {
        remat: count("dot_general", *gradient(Model(), remat))
        for remat in ((), ("encoder/block_0",), ("encoder/*",), ("encoder",), ("encoder", "**"))
    }
    plain = of[()]
    assert of["encoder/block_0",] == plain + 2 and of["encoder/*",] == of["encoder",] == plain + 4
    assert of["encoder", "**"] == plain + 4  # nothing twice; and what the last layer gives, nothing asks for


def test_a_policy_keeps_the_products():
    plain = count("dot_general", *gradient(Model()))
    for policy in POLICIES:
        again = count("dot_general", *gradient(Model(), ("encoder/*",), remat_policy=policy))
        assert again == (plain + 4 if policy == "nothing_saveable" else plain)
    kept = [residuals(remat=("encoder",), remat_policy=policy) for policy in POLICIES]
    assert kept[0] < kept[1] < residuals()


def test_a_pattern_that_names_nothing_is_refused_with_the_nearest():
    for remat, words in (("encoder/blok_0", "did you mean 'encoder/block_0'"), ("@Blok", "did you mean '@Block'")):
        with pytest.raises(InputError, match=f"parallel.remat '{remat}' names no module; there are .*{words}"):
            function, args = gradient(Model(), (remat,))
            jax.eval_shape(function, *args)
    with pytest.raises(InputError, match="no modules to name"):
        make_loss(from_nnx(lambda rngs: None), Classification(), "float32", remat=("encoder",))
