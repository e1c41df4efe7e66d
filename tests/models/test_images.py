"""The models of images: ResNet, VGG, ViT, U-Net, and those that make images, VAE and DCGAN."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxmp.errors import InputError
from jaxmp.models.dcgan import DCGAN
from jaxmp.models.resnet import BasicBlock, CifarResNet, ResNet
from jaxmp.models.unet import UNet
from jaxmp.models.vae import VAE
from jaxmp.models.vgg import VGG
from jaxmp.models.vit import ViT
from jaxmp.modules.linen import with_policy

IMAGE = jax.random.normal(jax.random.key(0), (2, 8, 8, 2))


@pytest.mark.slow
@pytest.mark.parametrize(("strided", "expected"), [("3x3", {1: (1, 1), 3: (2, 1)}), ("1x1", {1: (2, 1), 3: (1, 1)})])
def test_a_bottleneck_has_its_stride_where_it_is_said(strided, expected):
    model = ResNet((1, 1), channels=4, classes=3, strided=strided)
    jaxpr = jax.make_jaxpr(lambda image: model.init(jax.random.key(0), image))(jnp.ones((1, 64, 64, 3)))
    found = {}
    for e in jaxpr.jaxpr.eqns:
        if e.primitive.name == "conv_general_dilated":
            size, _, inputs, outputs = e.invars[1].aval.shape
            found[size, inputs, outputs] = e.params["window_strides"][0]
    assert found[1, 16, 8] == expected[1][0]  # the first of stage 2
    assert found[3, 8, 8] == expected[3][0]
    assert found[1, 16, 32] == 2  # its shortcut


@pytest.mark.slow
def test_a_shortcut_of_zeros_has_no_parameters_and_keeps_the_image():
    block, x = BasicBlock(6, stride=2, shortcut="zeros"), jnp.abs(IMAGE)
    variables = jax.jit(block.init)(jax.random.key(0), x)
    assert set(variables["params"]) == {"Conv_0", "Conv_1", "BatchNorm_0", "BatchNorm_1"}
    zeros = jax.tree.map(jnp.zeros_like, variables["params"])
    y = block.apply({**variables, "params": zeros}, x)
    np.testing.assert_array_equal(y[..., 2:4], x[:, ::2, ::2])
    assert y.shape == (2, 4, 4, 6) and not y[..., :2].any() and not y[..., 4:].any()


@pytest.mark.slow
def test_a_vae_draws_its_sample_in_float32_from_the_key_and_in_evaluation_too():
    model = VAE((8, 8, 2), (16,), 4)
    variables = jax.jit(model.init)(jax.random.key(0), IMAGE)

    def apply(seed, policy):
        return jax.jit(with_policy(model.apply, policy))(variables, IMAGE, rngs={"params": jax.random.key(seed)})

    one, same, other = (apply(seed, "float32") for seed in (1, 1, 2))
    np.testing.assert_array_equal(one.logits, same.logits)
    assert (one.logits != other.logits).any() and one.logits.shape == IMAGE.shape
    np.testing.assert_array_equal(one.mean, other.mean)
    half = apply(1, "mixed_bfloat16")
    np.testing.assert_allclose(half.logits, one.logits, atol=0.1)


@pytest.mark.slow
def test_the_latent_variables_of_a_vae_have_the_mean_and_variance_that_it_says():
    model = VAE((1, 1, 1), (1,), 1)
    image = jnp.zeros((20_000, 1, 1, 1))
    params = jax.tree.map(jnp.zeros_like, jax.jit(model.init)(jax.random.key(0), image[:1])["params"])
    params["mean"]["bias"] += 3.0
    params["log_variance"]["bias"] += 2 * jnp.log(0.01)
    # The decoder as good as linear: its logits are the latent variables.
    params["decoder_0"]["kernel"] += 1e-3
    params["pixels"]["kernel"] += 1e3
    out = jax.jit(lambda key: model.apply({"params": params}, image, rngs={"noise": key}))(jax.random.key(1))
    assert float(out.logits.mean()) == pytest.approx(3, abs=1e-3)
    assert float(out.logits.std()) == pytest.approx(0.01, rel=0.05)


@pytest.mark.slow
def test_a_dcgan_makes_images_from_noise_and_judges_both():
    model = DCGAN((8, 8, 2), (8, 4), 5, 3)
    variables = jax.jit(model.init)(jax.random.key(0), IMAGE)
    assert set(variables["params"]) == {"generator", "discriminator"}

    @jax.jit
    def apply(key):
        return model.apply(variables, IMAGE, train=True, rngs={"params": key}, mutable=["batch_stats"])

    judged, state = apply(jax.random.key(1))
    assert judged.images.shape == IMAGE.shape and float(jnp.abs(judged.images).max()) <= 1
    assert judged.real.shape == judged.generated.shape == (2,)
    assert (judged.images != apply(jax.random.key(2))[0].images).any()
    assert jax.tree.structure(state["batch_stats"]) == jax.tree.structure(variables["batch_stats"])
    images = jax.jit(lambda noise: model.apply(variables, noise, method="generate"))(jnp.zeros((2, 5)))
    assert images.shape == IMAGE.shape
    np.testing.assert_array_equal(images[0], images[1])


@pytest.mark.slow
def test_a_pixel_of_a_unet_sees_as_far_as_its_levels_reach_and_keeps_its_place():
    model = UNet((2, 4), classes=3)
    image = jnp.zeros((1, 32, 32, 1))
    variables = jax.jit(model.init)(jax.random.key(0), image)
    apply = jax.jit(model.apply)
    changed = apply(variables, image.at[0, 16, 16].set(9.0)) != apply(variables, image)
    where = np.argwhere(np.asarray(changed.any(-1)[0]))
    assert changed.shape == (1, 32, 32, 3) and len(where)
    assert (abs(where.mean(0) - 16) < 3).all() and abs(where - 16).max() <= 10


@pytest.mark.slow
@pytest.mark.parametrize(
    ("make", "names"),
    [
        (lambda: ResNet(blocks=(1, 0)), "ResNet: blocks=(1, 0): expected 1 or more"),
        (lambda: ResNet(block="wide"), "block='wide': expected basic or bottleneck"),
        (lambda: ResNet(strided="5x5"), "strided='5x5': expected 1x1 or 3x3"),
        (lambda: ResNet(stem="5x5"), "stem='5x5': expected 7x7 or 3x3"),
        (lambda: CifarResNet(21), "depth=21: expected 6 n + 2"),
        (lambda: CifarResNet(shortcut="A"), "shortcut='A': expected projection or zeros"),
        (lambda: VGG((1, 1), (64,)), "VGG: blocks=(1, 1) beside channels=(64,)"),
        (lambda: init(VGG(), (8, 9)), "halve an image of (8, 9) 5 times; expected at most 3"),
        (lambda: init(ViT(), (24, 32)), "ViT: an image of (24, 32): expected multiples of patch=16"),
        (lambda: ViT(width=100), "width=100: expected a multiple of heads=12"),
        (lambda: VAE(latent=0), "VAE: latent=0"),
        (lambda: DCGAN((28, 28, 1)), "image=(28, 28, 1): expected height and width in multiples of 16"),
        (lambda: init(UNet(), (24, 32)), "UNet: an image of (24, 32): expected multiples of 16"),
    ],
)
def test_a_model_of_images_that_cannot_be_is_refused_by_name(make, names):
    with pytest.raises(InputError) as error:
        make()
    assert names in str(error.value)


def init(model, size):
    return jax.eval_shape(model.init, jax.random.key(0), jax.ShapeDtypeStruct((1, *size, 3), jnp.float32))
