"""Models whose own code, between their layers, needs float32: with_policy runs them, and their numbers are right."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxmp
from jaxmp.modules.sensitive import sensitive


def run(model, policy, x, **kwargs):
    variables = model.init({"params": jax.random.key(0), "sample": jax.random.key(1)}, x)
    return jaxmp.with_policy(model.apply, policy)(variables, x, **kwargs), model.apply(variables, x, **kwargs)


class Own(nn.Module):
    """A dense layer, and a function of what it hands on."""

    function: str

    @nn.compact
    def __call__(self, x):
        y = nn.Dense(4)(x)
        k = self.param("k", nn.initializers.orthogonal(), (4, 4))
        return FUNCTIONS[self.function](y, k)


FUNCTIONS = {
    "select": lambda y, k: jax.lax.select(y > 0, y, jnp.zeros(y.shape)),
    "cond": lambda y, k: jax.lax.cond(True, lambda: y, lambda: jnp.zeros(y.shape)),
    "switch": lambda y, k: jax.lax.switch(1, [lambda: jnp.zeros(y.shape), lambda: y]),
    "update": lambda y, k: jax.lax.dynamic_update_slice(jnp.zeros((5, 4)), y, (1, 0)),
    "while": lambda y, k: jax.lax.fori_loop(0, 3, lambda i, h: y + 0 * h, jnp.zeros(y.shape)),
    "fft": lambda y, k: jnp.abs(jnp.fft.fft(y)),
    "cholesky": lambda y, k: y @ jnp.linalg.cholesky(k @ k.T + jnp.eye(4)),
    "svd": lambda y, k: y * jnp.linalg.svd(k)[1],
}


@pytest.mark.parametrize(
    "name", ["cond", "fft", *(pytest.param(n, marks=pytest.mark.slow) for n in FUNCTIONS if n not in ("cond", "fft"))]
)
@pytest.mark.parametrize("policy", ["mixed_bfloat16", pytest.param("mixed_float16", marks=pytest.mark.slow)])
def test_a_policy_does_not_break_operations_that_want_one_dtype_or_have_no_half(name, policy):
    under, plain = run(Own(name), policy, jnp.linspace(-1, 1, 24).reshape(3, 8))
    assert under.dtype == jnp.float32
    np.testing.assert_allclose(under, plain, atol=0.05)


def test_positions_made_in_the_dtype_of_the_activations_stay_apart():
    class Net(nn.Module):
        @nn.compact
        def __call__(self, x):
            x = nn.Dense(2)(x)
            return x + jnp.sin(jnp.arange(x.shape[1], dtype=x.dtype))[:, None]

    under, _ = run(Net(), "mixed_bfloat16", jnp.zeros((1, 1024, 3)))
    exact = np.sin(np.arange(1024.0, dtype=np.float64))
    np.testing.assert_allclose(under[0, :, 0], exact, atol=1e-6)


def test_counts_of_a_mask_are_not_rounded():
    class Net(nn.Module):
        @nn.compact
        def __call__(self, x):
            y = nn.Dense(1, kernel_init=nn.initializers.ones)(x)
            return jnp.cumsum((y > 0).astype(y.dtype), axis=0)

    under, _ = run(Net(), "mixed_bfloat16", jnp.ones((1001, 1)))
    np.testing.assert_array_equal(under[:, 0], np.arange(1, 1002))


@pytest.mark.slow
@pytest.mark.parametrize("policy", ["mixed_bfloat16", pytest.param("mixed_float16", marks=pytest.mark.slow)])
def test_random_draws_are_those_of_the_plain_model(policy):
    class Sampler(nn.Module):
        @nn.compact
        def __call__(self, x):
            logits = nn.Dense(100, kernel_init=nn.initializers.zeros)(x)
            key = self.make_rng("sample")
            return jax.random.categorical(key, logits), jax.random.uniform(key, logits.shape, logits.dtype)

    under, plain = run(Sampler(), policy, jnp.ones((50, 4)), rngs={"sample": jax.random.key(2)})
    np.testing.assert_array_equal(under[0], plain[0])
    np.testing.assert_array_equal(under[1], plain[1])


class Uniform(nn.Module):
    """Draws in the dtype of its activations, and nothing else."""

    @nn.compact
    def __call__(self, x):
        y = nn.Dense(4)(x)
        return jax.random.uniform(self.make_rng("sample"), y.shape, y.dtype)


@pytest.mark.slow
def test_a_draw_from_8_bits_is_that_of_the_plain_model():
    under, plain = run(Uniform(), "mixed_bfloat16", jnp.ones((50, 4)), rngs={"sample": jax.random.key(2)})
    np.testing.assert_array_equal(under, plain)


@pytest.mark.slow
def test_a_decode_cache_keeps_its_dtype():
    model = nn.MultiHeadDotProductAttention(num_heads=2, qkv_features=8, decode=True)
    x = jax.random.normal(jax.random.key(1), (1, 4, 8))
    variables = model.init(jax.random.key(0), x)
    cache = variables["cache"]
    for t in range(4):
        given = {**variables, "cache": cache}
        y, _ = model.apply(given, x[:, t : t + 1], mutable=["cache"])
        under, new = jaxmp.with_policy(model.apply, "mixed_bfloat16")(given, x[:, t : t + 1], mutable=["cache"])
        cache = new["cache"]
        np.testing.assert_allclose(under, y, atol=0.05)
    assert jax.tree.map(jnp.result_type, cache) == jax.tree.map(jnp.result_type, variables["cache"])


@pytest.mark.slow
@pytest.mark.parametrize("policy", ["mixed_bfloat16", "Dense_0=float32; mixed_bfloat16"])
def test_a_carry_made_in_float32_goes_through_nn_scan(policy):
    class Cell(nn.Module):
        @nn.compact
        def __call__(self, h, x):
            h = nn.tanh(nn.Dense(4)(jnp.concatenate([h, x], -1)))
            return h, h

    class Recurrent(nn.Module):
        @nn.compact
        def __call__(self, x):
            scan = nn.scan(Cell, variable_broadcast="params", split_rngs={"params": False}, in_axes=1, out_axes=1)
            return nn.Dense(2)(scan(name="cell")(jnp.zeros((x.shape[0], 4)), x)[0])

    under, plain = run(Recurrent(), policy, jnp.ones((2, 5, 3)))
    np.testing.assert_allclose(under, plain, atol=0.05)


@pytest.mark.parametrize("how", ["t * 1000", "concatenate", pytest.param("reshape", marks=pytest.mark.slow)])
def test_what_reaches_a_float32_rule_is_not_rounded_on_the_way(how):
    class Time(nn.Module):
        @nn.compact
        def __call__(self, t):
            return jnp.sum(jnp.remainder(t, 4.0) + 0 * t)

    class Net(nn.Module):
        @nn.compact
        def __call__(self, x):
            t = jnp.array([937.0, 833.0, 501.0, 999.0]) / 1000 + 0 * x
            t = {"t * 1000": t * 1000, "concatenate": jnp.concatenate([t, t])[:4] * 1000, "reshape": t[:, None] * 1000}[
                how
            ]
            return nn.Dense(2)(x) + Time(name="time")(t)

    under, plain = run(Net(), "time=float32; mixed_bfloat16", jnp.zeros(4))
    np.testing.assert_array_equal(under, plain)


@pytest.mark.few_variants
@pytest.mark.parametrize("policy", ["float32", "mixed_bfloat16", "mixed_float16", "z=float32; mixed_bfloat16"])
def test_complex_layers_keep_their_imaginary_part(policy):
    class Net(nn.Module):
        @nn.compact
        def __call__(self, x):
            z = nn.Dense(1, use_bias=False, dtype=jnp.complex64, param_dtype=jnp.complex64, name="z")
            return jnp.abs(z(x.astype(jnp.complex64)))

    variables = {"params": {"z": {"kernel": jnp.array([[3 + 4j]], jnp.complex64)}}}
    assert jaxmp.with_policy(Net().apply, policy)(variables, jnp.ones((1, 1))) == 5
    layer = nn.Conv(1, (1,), param_dtype=jnp.complex64)
    variables = {"params": {"kernel": jnp.full((1, 1, 1), 2j), "bias": jnp.array([1j])}}
    assert jaxmp.with_policy(layer.apply, policy.split("; ")[-1])(variables, jnp.ones((1, 1, 1))) == 3j
    embed = nn.Embed(2, 1, param_dtype=jnp.complex64)
    variables = {"params": {"embedding": jnp.array([[1j], [2j]])}}
    assert jaxmp.with_policy(embed.apply, policy.split("; ")[-1])(variables, jnp.array([1])) == 2j


def test_models_of_layers_alone_are_not_sensitive():
    def layers(x):
        return jax.nn.relu(x.astype(jnp.bfloat16) * jnp.arange(5, dtype=jnp.bfloat16)) + jnp.bfloat16(1)

    assert not sensitive(jax.make_jaxpr(layers)(jnp.ones(5)).jaxpr)
    assert sensitive(jax.make_jaxpr(lambda x: jnp.sin(x.astype(jnp.bfloat16)))(jnp.ones(5)).jaxpr)
