from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxmp.errors import InputError
from jaxmp.jaxprs import RECIPE, equations
from jaxmp.modules.linen import explain, init_delayed_scaling, with_policy
from jaxmp.scaling.scalers import NoScaler
from jaxmp.scaling.transform import loss_scaling
from jaxmp.tasks.classification import Classification
from jaxmp.tasks.loss import make_loss
from jaxmp.training.batch import EXAMPLE_INDEX
from jaxmp.training.state import TrainState
from jaxmp.training.step import make_train_step

KEY = jax.random.key(0)
MIXED = "fprop=mxfp4:rceil,dgrad=mxfp4:rceil,wgrad=mxfp4:rceil,stochastic=gradients"


class Every(nn.Module):
    """A layer of each class, one product each."""

    @nn.compact
    def __call__(self, x):
        x = nn.ConvTranspose(4, (2, 2))(nn.Conv(4, (2, 2))(x))
        x = nn.Conv(4, (2, 2), feature_group_count=4)(x)  # depthwise: not rounded
        x = nn.Einsum((4, 2, 4), "abc,cde->abde")(x.mean(1))
        x = nn.DenseGeneral(4, axis=(-2, -1))(x)
        x = nn.RNN(nn.SimpleCell(4))(x)  # two Dense layers
        return nn.Embed(3, 4).attend(nn.Dense(4)(x[:, -1]))


def products(function, *args):
    """How many products stand in the scope of each product of a recipe, and how many outside."""
    found = dict.fromkeys(("fprop", "dgrad", "wgrad", ""), 0)
    for eqn, names in equations(jax.make_jaxpr(function)(*args)):
        if eqn.primitive.name in ("dot_general", "conv_general_dilated"):
            found[next((name for name in ("fprop", "dgrad", "wgrad") if f"{RECIPE}{name}" in names), "")] += 1
    return found


@pytest.mark.slow
def test_every_layer_with_a_kernel_has_three_products_of_the_recipe():
    x, model = jnp.ones((2, 4, 4, 3)), Every()
    variables = model.init(KEY, x)
    apply = with_policy(model.apply, MIXED)

    def loss(variables, x):
        return apply(variables, x, rngs={"params": KEY}).sum()

    found = products(jax.grad(loss, (0, 1)), variables, x)
    assert found["fprop"] == found["dgrad"] == found["wgrad"] == 8, found
    assert found[""] == 3  # the depthwise convolution
    kept = with_policy(model.apply, f"@Conv=float32; @RNN=float32; {MIXED}")
    assert products(lambda v: kept(v, x, rngs={"params": KEY}), variables)["fprop"] == 5


def batch_of(model_input, rows):
    return {"image": model_input, "label": jnp.arange(rows) % 3, "weight": jnp.ones(rows)}


@pytest.mark.slow
def test_draws_are_the_same_through_jit_remat_and_parts_of_the_batch():
    model = nn.Sequential([nn.Dense(32), nn.relu, nn.Dense(3)])
    batch = batch_of(jax.random.normal(KEY, (8, 16)), 8)
    params = model.init(KEY, batch["image"])["params"]
    text = "fprop=high,dgrad=high,wgrad=high/e5m2,stochastic=gradients"  # without blocks rows do not meet
    loss = make_loss(model, Classification(), text)

    def grads(loss, batch):
        return jax.grad(lambda p: loss(p, {}, batch, KEY)[0])(params)

    whole = jax.jit(lambda b: grads(loss, b))(batch)
    again = jax.jit(lambda b: grads(make_loss(model, Classification(), text, remat=("layers_0",)), b))(batch)
    halves = [
        grads(loss, {**jax.tree.map(lambda v, s=s: v[s], batch), EXAMPLE_INDEX: jnp.arange(8)[s]})
        for s in (slice(4), slice(4, 8))
    ]
    summed = jax.tree.map(jnp.add, *halves)
    nearest = grads(make_loss(model, Classification(), text.removesuffix(",stochastic=gradients")), batch)
    kernel = ("layers_2", "kernel")
    for other in (again, summed):
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), whole, other)
    assert np.any(np.abs(whole[kernel[0]][kernel[1]] - nearest[kernel[0]][kernel[1]]) > 1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("parts", [1, 2])
def test_delayed_scales_are_arrays_in_the_model_state_and_follow_the_magnitudes(parts):
    model = nn.Dense(3)
    batch = batch_of(jax.random.normal(KEY, (8, 4)), 8)
    params = model.init(KEY, batch["image"])["params"]
    loss = make_loss(model, Classification(), "fp8_delayed")
    state = TrainState.create(
        params,
        tx := loss_scaling(optax.sgd(0.1), NoScaler()),
        key=KEY,
        model_state=init_delayed_scaling(model, "fp8_delayed", batch["image"]),
    )
    step = jax.jit(make_train_step(loss, tx, accumulate_steps=parts))
    first, _ = step(state, batch)
    second, _ = step(first, batch)
    kept = second.model_state["delayed_scaling"]
    amax = float(jnp.max(jnp.abs(batch["image"])))
    assert float(jnp.max(kept["activations_0"]["amax_history"])) == pytest.approx(amax)
    assert float(kept["activations_0"]["scale"]) == pytest.approx(448 / amax)
    gradient = jax.grad(lambda y: Classification()(y, batch)[0].total / 8)(
        nn.Dense(3).apply({"params": params}, batch["image"])
    )
    known = float(first.model_state["gradient_amax"]["product_0"])
    assert known == pytest.approx(float(jnp.max(jnp.abs(gradient))), rel=0.2)  # of the last microbatch
    assert known in np.asarray(kept["gradients_0"]["amax_history"])
    assert jax.tree.structure(state) == jax.tree.structure(second)
    bad, _ = step(first, {**batch, "image": batch["image"].at[0, 0].set(jnp.nan)})
    jax.tree.map(np.testing.assert_array_equal, bad.model_state, first.model_state)


class Normed(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.LayerNorm()(x)


def test_a_recipe_for_a_model_without_products_is_one_message():
    x = jnp.ones((2, 4))
    with pytest.raises(InputError, match=r"no layer has a product that recipe=nvfp4 rounds.*LayerNorm.*Dense"):
        with_policy(Normed().apply, "nvfp4")(Normed().init(KEY, x), x)


def test_delayed_scaling_without_state_is_one_message_that_names_the_layer():
    x, model = jnp.ones((2, 3, 4)), nn.RNN(nn.SimpleCell(4))
    with pytest.raises(InputError, match=r"no state of delayed scaling.*fp8_current"):
        init_delayed_scaling(model, "fp8_delayed", x)
    assert init_delayed_scaling(model, "nvfp4", x) == {}


def test_explain_says_the_recipe_of_each_module():
    rows = explain(Every(), "@Conv=float32; nvfp4", jnp.ones((2, 4, 4, 3)))
    policies = {row.module: row.policy for row in rows}
    assert policies["Dense_0"].endswith("recipe=nvfp4") and "recipe" not in policies["Conv_0"]


def rounded_to(bits, x):
    """Rounds float64 to a significand of so many bits, ties to even."""
    mantissa, exponent = np.frexp(x)
    return np.ldexp(np.round(np.ldexp(mantissa, bits)), exponent - bits)


def summed(a, b, levels):
    """a b by the levels of an accumulator, innermost first, each (bits of its significand, terms); in float64."""
    if not levels:
        return a @ b
    *inner, (bits, terms) = levels
    total = np.zeros((a.shape[0], b.shape[1]))
    for start in range(0, a.shape[1], terms):
        part = slice(start, start + terms)
        total = rounded_to(bits, total + summed(a[:, part], b[part], inner))
    return total


@pytest.mark.slow
@pytest.mark.parametrize(("carrier", "bits"), [("bf16", 8), ("f16", 11), ("f32", 24)])
@pytest.mark.parametrize(
    ("text", "levels"),
    [("e8m9:32", [(10, 32)]), ("e8m9:16/f32:64", [(10, 16), (24, 64)]), ("f32:128", [(24, 128)]), ("none", [])],
)
def test_carriers_and_accumulators_round_where_and_how_they_say(carrier, bits, text, levels):
    """Whole numbers, whose sums are exact in any order, so that only what is rounded on purpose is seen."""
    rng = np.random.default_rng(0)
    x, w, g = (rng.integers(-1, 8, shape) * 1.0 for shape in ((192, 160), (160, 96), (192, 96)))
    model = nn.Dense(96, use_bias=False)
    apply = with_policy(model.apply, f"p=f32,c={carrier},o=f32,recipe=mxfp8,accumulate={text}")
    y, back = jax.vjp(
        lambda x, w: apply({"params": {"kernel": w}}, x), jnp.asarray(x, jnp.float32), jnp.asarray(w, jnp.float32)
    )
    dx, dw = back(jnp.asarray(g, jnp.float32))
    # The carrier holds activations and gradients between layers; the gradient of the weights is float32.
    np.testing.assert_array_equal(y, rounded_to(bits, summed(x, w, levels)))
    np.testing.assert_array_equal(dx, rounded_to(bits, summed(g, w.T, levels)))
    np.testing.assert_array_equal(dw, summed(x.T, g, levels))
    assert dw.dtype == jnp.float32 and (text != "e8m9:32" or np.any(summed(x, w, levels) != x @ w))
