"""Faults planted in the product of a recipe: each is found by a test that passes without it.

The checks compare the product with a plain NumPy implementation of the recipe, or state a law of it. None is told which
fault was planted; the table says which ones find it.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from jaxmp.errors import InputError
from jaxmp.modules import recipe_layers
from jaxmp.modules.linen import with_policy
from jaxmp.precision import product as module
from jaxmp.precision.blocks import BlockFormat
from jaxmp.precision.policy import parse_policy
from jaxmp.precision.product import Draws, matrix_product
from jaxmp.precision.recipe import PRODUCTS

pytestmark = pytest.mark.xdist_group("product mutants")  # one worker: it forgets what it has compiled

KEY = jax.random.key(0)
NEAREST = parse_policy("fprop=mxfp4:rceil,dgrad=mxfp4:rceil,wgrad=mxfp4:rceil").recipe
GRADIENTS = dataclasses.replace(NEAREST, stochastic=("gradients",))
ROTATED = parse_policy("fprop=high,dgrad=high,wgrad=mxfp4:rceil,hadamard=wgrad:16").recipe
ROWS, K, N = 64, 96, 32


def operands():
    rng = np.random.default_rng(0)
    return tuple(np.float32(rng.normal(size=size)) for size in ((ROWS, K), (K, N), (ROWS, N)))


def three(recipe, x, w, g, key=KEY):
    y, back = jax.vjp(lambda x, w: matrix_product(x, w, recipe, draws=Draws(key)), x, w)
    return {"fprop": y, **dict(zip(("dgrad", "wgrad"), back(jnp.asarray(g)), strict=True))}


# Checks. Each passes or fails; none knows of a fault.


def to_mxfp4(x, axis):
    """MXFP4, scales rounded up, in NumPy."""
    x = np.moveaxis(x, axis, -1)
    blocks = x.reshape(*x.shape[:-1], -1, 32)
    amax = np.abs(blocks).max(-1, keepdims=True).astype(np.float64)
    scale = 2.0 ** np.ceil(np.log2(amax / 6))
    rounded = (blocks / scale).astype(np.float32).astype(ml_dtypes.float4_e2m1fn).astype(np.float64) * scale
    return np.moveaxis(rounded.reshape(x.shape), -1, axis)


def products_are_those_of_numpy():
    """To nearest, each product is that of operands rounded along the axis over which it sums."""
    x, w, g = operands()
    found = three(NEAREST, x, w, g)
    expected = {
        "fprop": to_mxfp4(x, 1) @ to_mxfp4(w, 0),
        "dgrad": to_mxfp4(g, 1) @ to_mxfp4(w, 1).T,
        "wgrad": to_mxfp4(x, 0).T @ to_mxfp4(g, 0),
    }
    for name, value in expected.items():
        np.testing.assert_allclose(found[name], value, rtol=1e-5, atol=1e-4, err_msg=name)


def gradients_alone_are_stochastic():
    """Other keys give another gradient, and no other output; operands that are to be rounded to nearest are."""
    x, w, g = operands()
    one, other = (three(GRADIENTS, x, w, g, jax.random.key(i)) for i in (0, 1))
    np.testing.assert_allclose(one["fprop"], to_mxfp4(x, 1) @ to_mxfp4(w, 0), rtol=1e-5, atol=1e-4)
    assert np.array_equal(one["fprop"], other["fprop"])
    for name in ("dgrad", "wgrad"):
        assert np.any(one[name] != other[name]), name
    # With one number in each row of g, the rounded weights stand in dgrad as they are.
    spike = np.zeros_like(g)
    spike[np.arange(N), np.arange(N)] = 1
    np.testing.assert_array_equal(three(GRADIENTS, x, w, spike)["dgrad"][:N], to_mxfp4(w, 1).T)


def stochastic_gradients_are_unbiased():
    """The mean over many keys is the gradient of operands of which the gradient is not rounded."""
    x, w, g = operands()
    draw = jax.jit(jax.vmap(lambda key: three(GRADIENTS, x, w, g, key)))
    found = draw(jax.random.split(KEY, 256))
    exact = {"dgrad": g @ to_mxfp4(w, 1).T, "wgrad": to_mxfp4(x, 0).T @ g}
    for name, value in exact.items():
        errors = np.asarray(found[name], np.float64) - value
        mean, deviation = errors.mean(0), errors.std(0) / 16
        assert abs(np.sum(mean * value) / np.sqrt(np.sum((deviation * value) ** 2))) < 5, name
        assert np.mean((mean / deviation) ** 2) < 1.5, name


def the_hadamard_transform_cancels_out():
    """The product is near the exact one; of a column with outliers, no worse than without the transform."""
    rng = np.random.default_rng(1)
    x, w, g = operands()
    found = three(ROTATED, x, w, g)["wgrad"]
    exact = x.T @ g
    assert np.linalg.norm(found - exact) < 0.3 * np.linalg.norm(exact)
    x[:, 0] = np.where(np.arange(ROWS) % 16 == 0, 100.0, 1e-2 * rng.normal(size=ROWS))
    plain = dataclasses.replace(ROTATED, wgrad=dataclasses.replace(ROTATED.wgrad, hadamard=0))
    errors = [np.linalg.norm(three(recipe, x, w, g)["wgrad"][0] - (x.T @ g)[0]) for recipe in (ROTATED, plain)]
    assert errors[0] < 3 * errors[1]


def products_and_roles_draw_other_bits():
    """The errors of the gradient in dgrad and in wgrad, and those of two operands of one shape, do not go together."""
    square, one = np.float32(1.1 + np.zeros((32, 32))), np.eye(32, dtype=np.float32)
    e5m2 = parse_policy("dgrad=e5m2/high,wgrad=high/e5m2,stochastic=gradients").recipe
    found = three(e5m2, one, one, square)
    assert np.any(found["dgrad"] != found["wgrad"])
    both = parse_policy("wgrad=e5m2/e5m2,stochastic=wgrad").recipe
    of_x, of_g = three(both, square, one, one)["wgrad"], three(both, one, one, square)["wgrad"]
    assert np.any(np.asarray(of_x).T != of_g)


class Layers(nn.Module):
    """Two equal layers, one of them called twice, and a recurrent one."""

    @nn.compact
    def __call__(self, x):
        one, other = (nn.Dense(32, kernel_init=nn.initializers.ones, name=name) for name in ("one", "other"))
        in_time = jnp.broadcast_to(x[:, None], (len(x), 3, x.shape[-1]))
        forgets = nn.RNN(nn.SimpleCell(32, recurrent_kernel_init=nn.initializers.zeros), name="rnn")
        return one(x), one(x), other(x), forgets(in_time)


@functools.cache
def variables_of_layers():
    return Layers().init(KEY, jax.random.normal(KEY, (8, 64)))


def outputs_of(policy):
    return with_policy(Layers().apply, policy)(
        variables_of_layers(), jax.random.normal(KEY, (8, 64)), rngs={"params": KEY}
    )


NOISY = "fprop=mxfp4:rceil/high,dgrad=high,wgrad=high,stochastic=activations"


def layers_and_calls_draw_other_bits():
    """What is the same but for its place in the model is rounded otherwise."""
    one, again, other, _ = outputs_of(NOISY)
    assert np.any(one != again) and np.any(one != other)


def time_steps_draw_other_bits():
    """The same input in each step of time is rounded otherwise in each."""
    in_time = outputs_of(NOISY)[3]
    assert np.any(in_time[:, 0] != in_time[:, 1]) and np.any(in_time[:, 1] != in_time[:, 2])


def layers_kept_high_are_float32s():
    """A layer that a rule keeps in float32 returns what it does without a recipe; the others do not."""
    kept = outputs_of(f"one=float32; {NOISY}")
    plain = outputs_of("float32")
    np.testing.assert_array_equal(kept[0], plain[0])
    assert np.any(kept[2] != plain[2])


CHECKS = [
    products_are_those_of_numpy,
    gradients_alone_are_stochastic,
    stochastic_gradients_are_unbiased,
    the_hadamard_transform_cancels_out,
    products_and_roles_draw_other_bits,
    layers_and_calls_draw_other_bits,
    time_steps_draw_other_bits,
    layers_kept_high_are_float32s,
]


def passes(check):
    jax.clear_caches()  # the traces of the product, in which a fault was or was not
    try:
        check()
    except (AssertionError, InputError):  # a fault may also be refused, with a message
        return False
    return True


@pytest.mark.slow
@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
def test_a_check_passes_without_a_fault(check):
    check()


# Faults.

REAL_OPERAND, REAL_ROUND = module._Plan._operand, module.round_operand
REAL_NOISE, REAL_BACKWARD = module._Plan._noise, module._backward


def weight_gradient_reuses_what_the_forward_product_rounded(patch):
    def operand(self, operand, x, side, *rest):
        if operand.product == "wgrad" and operand.role == "activations":
            operand = self.recipe.operand("fprop", "activations")
        return REAL_OPERAND(self, operand, x, side, *rest)

    patch.setattr(module._Plan, "_operand", operand)


def gradient_of_the_input_reuses_the_forward_weights(patch):
    def operand(self, operand, x, side, *rest):
        if operand.product == "dgrad" and operand.role == "weights":
            operand = self.recipe.operand("fprop", "weights")
        return REAL_OPERAND(self, operand, x, side, *rest)

    patch.setattr(module._Plan, "_operand", operand)


def gradients_are_rounded_to_nearest(patch):
    patch.setattr(module, "round_operand", lambda x, operand, *, noise=None, **how: REAL_ROUND(x, operand, **how))


def forward_is_stochastic_too(patch):
    def operand(self, operand, x, side, *rest):
        if operand.product == "fprop":
            operand = operand._replace(rounding="stochastic")
        return REAL_OPERAND(self, operand, x, side, *rest)

    patch.setattr(module._Plan, "_operand", operand)


def weights_are_stochastic_in_the_backward_pass(patch):
    def operand(self, operand, x, side, *rest):
        if operand.product == "dgrad":
            operand = operand._replace(rounding="stochastic")
        return REAL_OPERAND(self, operand, x, side, *rest)

    patch.setattr(module._Plan, "_operand", operand)


def one_operand_alone_is_transformed(patch):
    def operand(self, operand, x, side, *rest):
        return REAL_OPERAND(self, operand._replace(hadamard=operand.hadamard if side == 0 else 0), x, side, *rest)

    patch.setattr(module._Plan, "_operand", operand)


def transform_runs_along_the_other_axis(patch):
    real = module.hadamard
    patch.setattr(module, "hadamard", lambda x, length, axis, **how: real(x, length, 1 - axis, **how))


def blocks_run_along_the_other_axis(patch):
    patch.setattr(module, "_SUMMED", {key: 1 - axis for key, axis in module._SUMMED.items()})


def blocks_of_the_weight_gradient_run_along_the_features(patch):
    patch.setattr(module, "_SUMMED", {key: 1 if key[0] == "wgrad" else axis for key, axis in module._SUMMED.items()})


def products_share_their_noise(patch):
    def noise(self, operand, shape, key, index):
        product = next(name for name, roles in PRODUCTS.items() if operand.role in roles)
        return REAL_NOISE(self, operand._replace(product=product), shape, key, index)

    patch.setattr(module._Plan, "_noise", noise)


def operands_share_their_noise(patch):
    def noise(self, operand, shape, key, index):
        return module.random_bits(key[None], shape)

    patch.setattr(module._Plan, "_noise", noise)


def layers_share_their_key(patch):
    patch.setattr(recipe_layers, "_key", lambda *_: KEY)


def calls_of_a_layer_share_their_key(patch):
    class Never(dict):
        def __getitem__(self, name):
            return 0

        def __setitem__(self, name, value):
            super().__setitem__(name, 0)

    real = recipe_layers.RecipeCall.__init__

    def init(self, *args, **how):
        real(self, *args, **how)
        self.calls = Never(one=0)

    patch.setattr(recipe_layers.RecipeCall, "__init__", init)


def time_steps_share_their_key(patch):
    from jaxmp.modules import linen_layers

    patch.setattr(linen_layers, "STREAM", "no such stream")


def rules_for_layers_kept_high_are_ignored(patch):
    from jaxmp.precision.policy_tree import PolicyTree

    real = PolicyTree.parse.__func__
    patch.setattr(PolicyTree, "parse", classmethod(lambda cls, text: real(cls, text.rpartition(";")[2])))
    from jaxmp.modules import linen

    patch.setattr(linen, "as_tree", lambda policy: PolicyTree.parse(str(policy)))


def scale_is_in_the_wrong_direction(patch):
    def rounded(x, operand, **how):
        if not isinstance(operand.format, BlockFormat):
            return REAL_ROUND(x, operand, **how)
        return REAL_ROUND(x * 2.0**3, operand, **how) * 2.0**3

    patch.setattr(module, "round_operand", rounded)


def scale_is_rounded_down(patch):
    def rounded(x, operand, **how):
        if isinstance(operand.format, BlockFormat) and operand.format.rule == "rceil":
            operand = operand._replace(format=dataclasses.replace(operand.format, rule="floor"))
        return REAL_ROUND(x, operand, **how)

    patch.setattr(module, "round_operand", rounded)


def the_backward_pass_is_not_rounded_b24(patch):
    def backward(plan, kept, g):
        high = parse_policy("fprop=mxfp4,dgrad=high,wgrad=high").recipe
        return REAL_BACKWARD(dataclasses.replace(plan, recipe=high), kept, g)

    module._product.defvjp(module._forward, backward)


FAULTS = {
    weight_gradient_reuses_what_the_forward_product_rounded: products_are_those_of_numpy,
    gradient_of_the_input_reuses_the_forward_weights: products_are_those_of_numpy,
    gradients_are_rounded_to_nearest: gradients_alone_are_stochastic,
    forward_is_stochastic_too: gradients_alone_are_stochastic,
    weights_are_stochastic_in_the_backward_pass: gradients_alone_are_stochastic,
    one_operand_alone_is_transformed: the_hadamard_transform_cancels_out,
    transform_runs_along_the_other_axis: the_hadamard_transform_cancels_out,
    blocks_run_along_the_other_axis: products_are_those_of_numpy,
    blocks_of_the_weight_gradient_run_along_the_features: products_are_those_of_numpy,
    products_share_their_noise: products_and_roles_draw_other_bits,
    operands_share_their_noise: products_and_roles_draw_other_bits,
    layers_share_their_key: layers_and_calls_draw_other_bits,
    calls_of_a_layer_share_their_key: layers_and_calls_draw_other_bits,
    time_steps_share_their_key: time_steps_draw_other_bits,
    rules_for_layers_kept_high_are_ignored: layers_kept_high_are_float32s,
    scale_is_in_the_wrong_direction: products_are_those_of_numpy,
    scale_is_rounded_down: products_are_those_of_numpy,
    the_backward_pass_is_not_rounded_b24: products_are_those_of_numpy,
}


@contextlib.contextmanager
def planted(fault):
    with pytest.MonkeyPatch.context() as patch:
        try:
            fault(patch)
            yield
        finally:
            module._product.defvjp(module._forward, REAL_BACKWARD)
            jax.clear_caches()


QUICKEST = (products_are_those_of_numpy, layers_and_calls_draw_other_bits)
"""the faults that these find are in the slow suite, for its time"""


@pytest.mark.parametrize(
    "fault",
    [
        pytest.param(fault, marks=pytest.mark.slow if check in QUICKEST else pytest.mark.full_size)
        for fault, check in FAULTS.items()
    ],
    ids=lambda fault: fault.__name__,
)
def test_a_fault_in_the_product_of_a_recipe_is_found(fault):
    with planted(fault):
        assert not passes(FAULTS[fault])
