"""`audit` of layers under a recipe, beside counts made by hand."""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp
import pytest

from jaxmp.instruments.audit import audit
from jaxmp.modules.linen import with_policy
from jaxmp.precision.policy import parse_policy
from jaxmp.precision.recipe import PRODUCTS, RECIPES

ROWS, K, N = 64, 64, 32  # whole blocks of all Hadamard transforms, which are filled up with zeros


class Shared(nn.Module):
    """Two layers that read the same activations, so that two gradients of them add up, and a third."""

    @nn.compact
    def __call__(self, x):
        x = nn.Dense(K, name="first")(x)
        return nn.Dense(N, name="left")(x) * nn.Dense(N, name="right")(x)


def gradient_of(policy):
    apply = with_policy(Shared().apply, policy)
    return jax.grad(lambda variables, x, key: apply(variables, x, rngs={"params": key}).astype(jnp.float32).sum())


def audited(policy):
    x, key = jax.ShapeDtypeStruct((ROWS, K), jnp.float32), jax.eval_shape(lambda: jax.random.key(0))
    variables = jax.eval_shape(Shared().init, key, x)
    return audit(gradient_of(policy), variables, x, key, policy=policy)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "carrier"),
    [("mxfp4", "f32"), *((n, "bf16") for n, recipe in RECIPES.items() if not recipe.is_delayed), ("mxfp8", "f16")],
)
def test_products_of_a_recipe_are_counted_by_their_formats_and_raise_no_alarm(name, carrier):
    found = audited(f"p=f32,c={carrier},recipe={name}")
    assert found.findings == ()
    assert {dot.path for dot in found.dots} == {"Shared/first", "Shared/left", "Shared/right"}
    assert found.dot_flops_by_dtype == {"float32": sum(found.flops_by_format.values())}
    recipe, wide, narrow = parse_policy(name).recipe, 2 * ROWS * K * K, 2 * ROWS * K * N
    for product, roles in PRODUCTS.items():
        formats = [str(recipe.operand(product, role).format) for role in roles]
        # The first layer's input has no gradient.
        flops = 2 * narrow + (0 if product == "dgrad" else wide)
        assert found.flops_by_format[product, *formats] == flops
    assert f"fprop  {recipe.operand('fprop', 'activations').format}" in str(found)


@pytest.mark.slow
def test_a_float32_product_outside_of_the_recipe_is_still_found():
    """Without the mark of the recipe, its products are float32 products under a policy in half."""
    apply = with_policy(Shared().apply, "p=f32,c=bf16,recipe=mxfp8")
    w = jnp.ones((N, N))

    def forward(variables, x):
        return jnp.dot(apply(variables, x).astype(jnp.float32), w)

    x = jnp.ones((ROWS, K))
    found = audit(forward, Shared().init(jax.random.key(0), x), x, policy="p=f32,c=bf16,recipe=mxfp8")
    assert [finding.rule for finding in found.findings] == ["float32 dot"]


def test_formats_of_a_policy_without_a_recipe_are_counted_too():
    found = audited("c=e4m3")
    assert {key[1:] for key in found.flops_by_format if key[0] == ""} >= {("e4m3", "e4m3")}
