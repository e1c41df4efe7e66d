from __future__ import annotations

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxmp.errors import InputError
from jaxmp.models.vae import VAE, Reconstruction
from jaxmp.modules.linen import with_policy
from jaxmp.tasks.loss import init_model, make_loss
from jaxmp.tasks.samples import Sampling, Trained
from jaxmp.tasks.task import sample
from jaxmp.tasks.variational import EvidenceBound
from jaxmp.training.metrics import compute


def example(dtype=jnp.float32):
    rng = np.random.default_rng(0)
    logits, mean, log_variance = rng.normal(size=(3, 2, 2, 1)), rng.normal(size=(3, 4)), rng.normal(size=(3, 4))
    outputs = Reconstruction(*(jnp.asarray(x, dtype) for x in (logits, mean, log_variance)))
    return outputs, {"image": jnp.asarray(rng.random((3, 2, 2, 1)), jnp.float32), "weight": jnp.array([1.0, 2.0, 0.0])}


@pytest.mark.slow
def test_the_parts_of_the_bound_are_those_of_their_formulas_in_float64():
    outputs, batch = example()
    loss, parts = jax.jit(EvidenceBound())(outputs, batch)
    found = compute(parts)
    logits, mean, log_variance, image = (np.asarray(x, np.float64) for x in (*outputs, batch["image"]))
    p = 1 / (1 + np.exp(-logits))
    cross_entropy = -(image * np.log(p) + (1 - image) * np.log(1 - p)).reshape(3, -1).sum(1)
    divergence = -0.5 * (1 + log_variance - mean**2 - np.exp(log_variance)).sum(1)
    weight = np.array([1.0, 2.0, 0.0]) / 3
    assert found["cross_entropy"] == pytest.approx(weight @ cross_entropy, rel=1e-6)
    assert found["divergence"] == pytest.approx(weight @ divergence, rel=1e-6)
    assert float(loss.compute()) == pytest.approx(weight @ (cross_entropy + divergence), rel=1e-6)


@pytest.mark.slow
def test_half_outputs_far_from_the_image_have_a_finite_loss_and_gradient_t23():
    image = jnp.zeros((1, 1, 1, 1))
    batch = {"image": image, "weight": jnp.ones(1)}

    def loss(logit):
        outputs = Reconstruction(jnp.full((1, 1, 1, 1), logit), jnp.zeros((1, 2)), jnp.zeros((1, 2)))
        return EvidenceBound()(outputs, batch)[0].total

    for dtype in (jnp.float16, jnp.bfloat16):
        value, gradient = jax.value_and_grad(loss)(dtype(16))
        assert float(value) == pytest.approx(16 + math.log1p(math.exp(-16)), rel=1e-6)
        assert float(gradient) == pytest.approx(1, rel=1e-2)


@pytest.mark.slow
def test_a_prior_of_its_own_has_no_divergence_and_the_loss_of_a_vae_trains():
    outputs, batch = example()
    outputs = outputs._replace(mean=jnp.zeros((3, 4)), log_variance=jnp.zeros((3, 4)))
    assert compute(EvidenceBound()(outputs, batch)[1])["divergence"] == 0
    model = VAE((2, 2, 1), (8,), 2)
    params, state = init_model(model, EvidenceBound(), batch, jax.random.key(0))
    loss_fn = make_loss(model, EvidenceBound(), "mixed_float16")
    total, (weight, metrics, _) = jax.jit(loss_fn)(params, state, batch, jax.random.key(1))
    assert np.isfinite(total) and weight == 3 and set(metrics) == {"cross_entropy", "divergence"}


@pytest.mark.slow
def test_pictures_of_a_vae_are_the_means_of_pixels_of_latent_variables_from_the_prior():
    model = VAE((2, 2, 1), (3,), 2)
    params = jax.jit(model.init)(jax.random.key(0), jnp.zeros((1, 2, 2, 1)))["params"]
    trained = Trained(model, with_policy(model.apply, "mixed_float16"), {"params": params}, None)
    found = sample(EvidenceBound(), trained, jax.random.key(1), Sampling(300)).pictures
    assert found.shape == (300, 2, 2, 1) and found.dtype == np.float32
    # The decoder in float64, of the latent variables of the first part of the pictures.
    key = {"noise": jax.random.fold_in(jax.random.key(1), 0)}
    latent = np.asarray(model.apply({"params": params}, 256, method=lambda m, n: m.noise(n), rngs=key), np.float64)
    of = jax.tree.map(lambda x: np.asarray(x, np.float64), params)
    hidden = np.tanh(latent @ of["decoder_0"]["kernel"] + of["decoder_0"]["bias"])
    means = 1 / (1 + np.exp(-(hidden @ of["pixels"]["kernel"] + of["pixels"]["bias"])))
    np.testing.assert_allclose(found[:256].reshape(256, 4), means, atol=16 * 2.0**-11)
    again = sample(EvidenceBound(), trained, jax.random.key(1), Sampling(3)).pictures
    np.testing.assert_allclose(again, found[:3], atol=16 * 2.0**-11)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("change", "names"),
    [
        (lambda o, b: (o.logits, b), "outputs are of type ArrayImpl; expected (logits, mean, log_variance)"),
        (lambda o, b: (o._replace(logits=o.logits[:, :1]), b), "'image' is float32[3, 2, 2, 1] beside outputs of"),
        (lambda o, b: (o._replace(mean=o.mean[:, :1]), b), "a mean and a log_variance of (rows, latent)"),
        (lambda o, b: (o, {**b, "image": b["image"].astype(jnp.uint8)}), "'image' is uint8; expected floats"),
    ],
)
def test_outputs_that_are_no_reconstruction_are_refused(change, names):
    with pytest.raises(InputError) as error:
        EvidenceBound().check(*change(*example()))
    assert names in str(error.value)
