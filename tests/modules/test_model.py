"""The protocol Model: modules of any kind as the same pure functions."""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxmp.errors import InputError
from jaxmp.modules.dropout import DropoutByExample
from jaxmp.modules.linen import UnderPolicy
from jaxmp.modules.model import Model, as_model
from jaxmp.modules.nnx import from_nnx
from jaxmp.modules.remat import Remat

X = jnp.linspace(-1, 1, 20).reshape(4, 5)
KEY = jax.random.key(3)


class Net(nn.Module):
    """Batch statistics, dropout and a sown value."""

    @nn.compact
    def __call__(self, x, *, train):
        x = nn.BatchNorm(use_running_average=not train)(nn.Dense(4)(x))
        self.sow("intermediates", "x", x)
        return nn.Dropout(0.5, deterministic=not train)(x)


class NnxNet(nnx.Module):
    def __init__(self, rngs):
        self.norm, self.dropout = nnx.BatchNorm(5, rngs=rngs), nnx.Dropout(0.5, rngs=rngs)

    def __call__(self, x):
        return self.dropout(self.norm(x))


class ByHand:
    """An object with Linen's `init` and `apply`."""

    def init(self, key, x):
        return {"params": {"w": jax.random.normal(key, (x.shape[-1], 2))}, "sums": {"x": jnp.zeros(())}}

    def apply(self, variables, x, *, rngs=None, mutable=False, training=False):
        out = x @ variables["params"]["w"] * (2.0 if training else 1.0)
        return (out, {"sums": {"x": variables["sums"]["x"] + (x**2).sum()}}) if mutable is not False else out


MODELS = [Net(), from_nnx(lambda rngs: NnxNet(rngs)), ByHand()]


@pytest.mark.few_variants
@pytest.mark.parametrize("module", MODELS, ids=lambda m: type(m).__name__)
@pytest.mark.parametrize("policy", [None, "mixed_bfloat16"])
def test_training_returns_new_state_and_evaluation_the_state_that_it_was_given(module, policy):
    model = as_model(module)
    model = model if policy is None else model.under(UnderPolicy(policy))
    params, state = jax.jit(model.init)(KEY, X)
    assert jax.tree.leaves(params) and jax.tree.leaves(state) and "intermediates" not in state
    out, new = jax.jit(lambda p, s, x: model.apply(p, s, x, train=True, key=KEY))(params, state, X)
    assert jax.tree.structure(new) == jax.tree.structure(state)
    assert [x.dtype for x in jax.tree.leaves(new)] == [x.dtype for x in jax.tree.leaves(state)]
    assert any(not np.array_equal(a, b) for a, b in zip(jax.tree.leaves(new), jax.tree.leaves(state), strict=True))
    plain, same = model.apply(params, state, X)
    assert same is state and not np.array_equal(plain, out)


def test_a_model_is_taken_as_it_is():
    model = as_model(Net())
    assert isinstance(model, Model) and as_model(model) is model
    assert not isinstance(Net(), Model) and not isinstance(MODELS[1], Model)


def test_a_module_without_state_has_an_empty_one():
    for module in (nn.Dense(2), from_nnx(lambda rngs: nnx.Linear(5, 2, rngs=rngs))):
        model = as_model(module)
        params, state = model.init(KEY, X)
        out, new = model.apply(params, state, X, train=True, key=KEY)
        assert state == {} == new and out.shape == (4, 2)


@nn.jit
class Sower(nn.Module):
    @nn.compact
    def __call__(self, x):
        self.sow("memory", "sown", x)
        return x


class Remembering(nn.Module):
    """An LSTM whose carry, a tuple, is state, beside values that are sown into the same collection."""

    @nn.compact
    def __call__(self, x):
        cell = nn.LSTMCell(5)
        carry = self.variable("memory", "carry", lambda: cell.initialize_carry(KEY, x.shape))
        carry.value, y = cell(carry.value, x)
        self.sow("memory", "sown", y)
        return Sower()(y)


class NnxRemembering(nnx.Module):
    def __init__(self, rngs):
        self.cell = nnx.LSTMCell(5, 5, rngs=rngs)
        self.carry = nnx.Variable((jnp.zeros((4, 5)), jnp.zeros((4, 5))))

    def __call__(self, x):
        carry, y = self.cell(self.carry.get_value(), x)
        self.carry.set_value(carry)
        self.seen = nnx.Intermediate(y)  # as `sow` leaves it
        return y


@pytest.mark.parametrize("module", [Remembering(), from_nnx(NnxRemembering)], ids=["linen", "nnx"])
def test_a_tuple_is_state_and_what_is_sown_is_not(module):
    model = as_model(module)
    for _ in range(2):  # of which the second finds what nn.jit has traced
        params, state = jax.eval_shape(model.init, KEY, X)
        assert [x.shape for x in jax.tree.leaves(state)] == [(4, 5)] * 2
    _, new = jax.eval_shape(lambda *args: model.apply(*args, train=True, key=KEY), params, state, X)
    assert jax.tree.structure(new) == jax.tree.structure(state)


@pytest.mark.slow
def test_module_outputs_are_those_of_each_module_in_training():
    class Twice(nn.Module):
        @nn.compact
        def __call__(self, x, *, train):
            dense = nn.Dense(5, name="dense")
            self.sow("intermediates", "sown", x)
            return dense(dense(x)) * (2.0 if train else 1.0)

    model = as_model(Twice())
    params, state = model.init(KEY, X)
    outputs = jax.jit(lambda p, s: model.module_outputs(p, s, X, key=KEY))(params, state)
    assert {path: len(leaves) for path, leaves in outputs.items()} == {"": 1, "dense": 2}
    np.testing.assert_allclose(outputs[""][0], 2 * outputs["dense"][1], rtol=1e-6)
    half = model.under(UnderPolicy("mixed_float16")).module_outputs(params, state, X, key=KEY)
    assert half["dense"][0].dtype == jnp.float16
    assert as_model(MODELS[1]).module_outputs(*as_model(MODELS[1]).init(KEY, X), X, key=KEY) == {}


@pytest.mark.slow
def test_replicas_of_an_nnx_module_draw_from_keys_of_their_own():
    model = as_model(MODELS[1])
    params, state = model.init(KEY, X)

    def masks(first):
        under = model.under(DropoutByExample(None if first is None else jnp.arange(first, first + 4), 4))
        return under.apply(params, state, X, train=True, key=KEY)[0] == 0

    assert np.array_equal(masks(0), masks(0)) and not np.array_equal(masks(0), masks(4))
    assert np.array_equal(masks(None), model.apply(params, state, X, train=True, key=KEY)[0] == 0)


def test_an_intervention_that_takes_modules_is_refused_at_once_for_an_nnx_module():
    with pytest.raises(InputError, match="no modules to name"):
        as_model(MODELS[1]).under(Remat(("encoder",)))
