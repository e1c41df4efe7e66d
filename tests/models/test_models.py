from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxmp.errors import InputError
from jaxmp.models.cnn import CNN
from jaxmp.models.dcgan import DCGAN
from jaxmp.models.mlp import MLP


def parameters(model, shape):
    variables = jax.eval_shape(model.init, jax.random.key(0), jax.ShapeDtypeStruct(shape, jnp.float32))
    assert set(variables) == {"params"}
    return sum(leaf.size for leaf in jax.tree.leaves(variables))


def dense(inputs, outputs):
    return inputs * outputs + outputs


def conv(kernel, inputs, outputs):
    return kernel * kernel * inputs * outputs + outputs


@pytest.mark.parametrize(
    ("model", "shape", "expected"),
    [
        (MLP(features=()), (3, 8, 8, 1), dense(64, 10)),
        (MLP(features=(1024,)), (3, 28, 28, 1), dense(784, 1024) + dense(1024, 10)),
        (MLP(features=(5, 7), classes=2), (3, 4), dense(4, 5) + dense(5, 7) + dense(7, 2)),
        (
            CNN(channels=(32, 64), kernel=5, dense=(1024,)),
            (3, 28, 28, 1),
            conv(5, 1, 32) + conv(5, 32, 64) + dense(7 * 7 * 64, 1024) + dense(1024, 10),
        ),
        (CNN(), (3, 32, 32, 3), conv(3, 3, 32) + conv(3, 32, 64) + dense(8 * 8 * 64, 10)),
        (CNN(channels=[4], classes=3), (3, 7, 9, 2), conv(3, 2, 4) + dense(3 * 4 * 4, 3)),
    ],
    ids=["linear", "mnist_mlp", "mlp", "mnist_cnn", "cifar10_cnn", "odd_sizes_round_down"],
)
def test_a_model_has_the_parameters_of_its_formula(model, shape, expected):
    assert parameters(model, shape) == expected


@pytest.mark.slow
@pytest.mark.parametrize(
    "model",
    [
        MLP(dropout=0.5),
        pytest.param(CNN(channels=(4,), dense=(16,), dropout=0.5), marks=pytest.mark.slow),
    ],
)
def test_dropout_is_for_training_only_and_follows_its_key(model):
    image = jax.random.normal(jax.random.key(0), (3, 8, 8, 1))
    variables = model.init(jax.random.key(1), image)

    @jax.jit
    def train(key):
        return model.apply(variables, image, train=True, rngs={"dropout": key})

    logits = jax.jit(model.apply)(variables, image)
    assert logits.shape == (3, 10)
    np.testing.assert_array_equal(train(jax.random.key(2)), train(jax.random.key(2)))
    assert (train(jax.random.key(2)) != train(jax.random.key(3))).any()
    assert (train(jax.random.key(2)) != logits).any()


@pytest.mark.parametrize(
    ("make", "names"),
    [
        (lambda: MLP(features=(8, 0)), "features=(8, 0)"),
        (lambda: MLP(classes=0), "classes=0"),
        (lambda: MLP(dropout=1.0), "dropout=1.0"),
        (lambda: CNN(channels=(-1,)), "channels=(-1,)"),
        (lambda: CNN(channels=[8, 0]), "channels=(8, 0)"),
        (lambda: DCGAN(channels=()), "DCGAN: channels=(): expected one or more"),
        (lambda: CNN(kernel=0), "kernel=0"),
        (lambda: CNN(dense=(0,)), "dense=(0,)"),
        (lambda: CNN(dropout=-0.1), "dropout=-0.1"),
        (lambda: parameters(CNN(channels=(2, 2, 2, 2)), (1, 8, 9, 1)), "(8, 9) 4 times; expected at most 3"),
    ],
)
def test_a_model_that_cannot_be_is_refused_by_name(make, names):
    with pytest.raises(InputError) as error:
        make()
    assert names in str(error.value)


def test_a_cnn_halves_an_image_down_to_one_pixel():
    assert parameters(CNN(channels=(2, 2, 2), classes=1), (1, 8, 9, 1)) == conv(3, 1, 2) + 2 * conv(3, 2, 2) + dense(
        2, 1
    )
