"""`policy_laws` on ten kinds of models under four policies: a table each, and the verdicts of a float64 calculation.

The calculation is the plain model, each of its operations in float64 (`in_float64`), without any policy.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import jaxmp
from jaxmp.instruments.float64 import in_float64
from jaxmp.modules.linen import cast_to_param
from jaxmp.modules.model import mode_argument
from jaxmp.testing.policies import MULTIPLE, UNIT_ROUNDOFF, policy_laws

POLICIES = ("float32", "mixed_bfloat16", "mixed_float16", "float16")


class Attend(nn.Module):
    @nn.compact
    def __call__(self, x):
        t = x.shape[1]
        mask = jnp.arange(t)[:, None] >= jnp.arange(t)[None]
        return x + nn.MultiHeadDotProductAttention(num_heads=2)(nn.LayerNorm()(x), mask=mask[None, None])


class Transformer(nn.Module):
    @nn.compact
    def __call__(self, ids):
        x = nn.Embed(11, 8)(ids)
        pos = jnp.arange(ids.shape[1])[:, None] * 0.5 ** jnp.arange(4)
        x = x + jnp.concatenate([jnp.sin(pos), jnp.cos(pos)], -1)
        x = Attend()(x)
        x = x + nn.Dense(8)(nn.gelu(nn.Dense(16)(nn.LayerNorm()(x))))
        return nn.Dense(11)(nn.LayerNorm()(x))


class LSTM(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.Dense(2)(nn.RNN(nn.OptimizedLSTMCell(4))(x)[:, -1])


class VAE(nn.Module):
    @nn.compact
    def __call__(self, x):
        h = nn.relu(nn.Dense(8)(x))
        mean, logvar = nn.Dense(2)(h), nn.Dense(2)(h)
        noise = jax.random.normal(self.make_rng("params"), mean.shape)
        return nn.Dense(6)(nn.relu(nn.Dense(8)(mean + jnp.exp(0.5 * logvar) * noise))), mean, logvar


class BatchNormCNN(nn.Module):
    @nn.compact
    def __call__(self, x, train=False):
        x = nn.relu(nn.BatchNorm(use_running_average=not train)(nn.Conv(4, (3, 3))(x)))
        return nn.Dense(3)(x.mean((1, 2)))


class Decoder(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.Dense(3)(nn.MultiHeadDotProductAttention(num_heads=2, qkv_features=8, decode=True)(x))


class UNet(nn.Module):
    @nn.compact
    def __call__(self, x):
        down = nn.silu(nn.GroupNorm(2)(nn.Conv(4, (3, 3))(x)))
        mid = nn.silu(nn.GroupNorm(2)(nn.Conv(4, (3, 3), strides=2)(down)))
        up = nn.ConvTranspose(4, (2, 2), strides=(2, 2))(mid)
        return nn.Conv(1, (3, 3))(jnp.concatenate([up, down], -1))


class Complex(nn.Module):
    @nn.compact
    def __call__(self, x):
        z = nn.Dense(4, dtype=jnp.complex64, param_dtype=jnp.complex64)(x.astype(jnp.complex64))
        return nn.Dense(2)(jnp.abs(z))


class FFT(nn.Module):
    @nn.compact
    def __call__(self, x):
        y = nn.Dense(8)(x)
        return nn.Dense(2)(x + jnp.real(jnp.fft.fft2(y, axes=(-2, -1))) / 8)


class Discriminator(nn.Module):
    @nn.compact
    def __call__(self, x, train=False):
        x = nn.leaky_relu(nn.SpectralNorm(nn.Conv(4, (3, 3), strides=2))(x, update_stats=train))
        return nn.SpectralNorm(nn.Dense(1))(x.reshape(x.shape[0], -1), update_stats=train)


class Net(nnx.Module):
    def __init__(self, rngs):
        self.first, self.norm = nnx.Linear(6, 8, rngs=rngs), nnx.LayerNorm(8, rngs=rngs)
        self.last = nnx.Linear(8, 2, rngs=rngs)

    def __call__(self, x):
        return self.last(nnx.relu(self.norm(self.first(x))))


def normal(*shape):
    return jnp.asarray(np.random.default_rng(1).standard_normal(shape), jnp.float32)


MODELS = {
    "a causal transformer with positions": (Transformer(), jnp.arange(8).reshape(2, 4) * 3 % 11),
    "an LSTM": (LSTM(), normal(3, 5, 4)),
    "a VAE with noise": (VAE(), normal(4, 6)),
    "a BatchNorm CNN": (BatchNormCNN(), normal(4, 6, 6, 2)),
    "a decode cache": (Decoder(), normal(2, 1, 8)),
    "a GroupNorm UNet": (UNet(), normal(2, 4, 4, 1)),
    "complex layers": (Complex(), normal(3, 4)),
    "an FFT layer": (FFT(), normal(2, 4, 8)),
    "a spectral-norm discriminator": (Discriminator(), normal(2, 6, 6, 1)),
    "an NNX model": (jaxmp.from_nnx(lambda rngs: Net(rngs)), normal(4, 6)),
}


@pytest.mark.slow
@pytest.mark.parametrize(
    "policy",
    [policy if policy == "mixed_float16" else pytest.param(policy, marks=pytest.mark.full_size) for policy in POLICIES],
)
@pytest.mark.parametrize("name", MODELS)
def test_the_laws_hold_on_models_of_ten_kinds_and_float64_says_the_same(name, policy):
    model, x = MODELS[name]
    laws = policy_laws(model, policy, x)
    results = list(laws)
    assert not [law for law in results if law.verdict == "broken"], str(laws)
    assert sum(law.verdict == "holds" for law in results) >= 9, str(laws)

    variables = jax.jit(lambda key: model.init(key, x, **mode_argument(model, False)))(jax.random.key(0))
    mutable = [collection for collection in variables if collection != "params"]

    def run(apply):
        how = {**mode_argument(model, True), "rngs": {"params": jax.random.key(1)}, "mutable": mutable}
        return lambda variables, x: jax.tree.leaves(apply(variables, x, **how)[0])

    exact = in_float64(run(model.apply))(variables, x)
    tree = jaxmp.PolicyTree.parse(policy)
    masters = {**variables, "params": cast_to_param(model, tree, variables["params"], x)}
    for found, true in zip(jax.jit(run(jaxmp.with_policy(model.apply, policy)))(masters, x), exact, strict=True):
        error = np.linalg.norm(np.asarray(found, np.float64) - true) / np.linalg.norm(true)
        unit = UNIT_ROUNDOFF[tree.default.compute_dtype.name]
        assert error <= MULTIPLE * unit
        assert policy == "float32" or error > unit / 16, "half was not used"
