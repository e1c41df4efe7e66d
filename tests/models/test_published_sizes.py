"""The models have as many trained parameters as was published: those of the collection `params`."""

from __future__ import annotations

import itertools

import jax
import jax.numpy as jnp
import pytest

from jaxmp.models.dcgan import DCGAN
from jaxmp.models.resnet import CifarResNet, resnet18, resnet34, resnet50, resnet101
from jaxmp.models.rnn import SequenceClassifier
from jaxmp.models.transformer import BERT, GPT2, BERTMaskedLM, Llama
from jaxmp.models.unet import UNet
from jaxmp.models.vae import VAE
from jaxmp.models.vgg import VGG
from jaxmp.models.vit import vit_base, vit_small, vit_tiny

IMAGENET, CIFAR = ((1, 224, 224, 3),), ((1, 32, 32, 3),)
TEXT = ((1, 8),)


def parameters(model, shapes):
    dtype = jnp.int32 if len(shapes[0]) == 2 else jnp.float32
    inputs = [jax.ShapeDtypeStruct(shape, dtype) for shape in shapes]
    variables = jax.eval_shape(model.init, jax.random.key(0), *inputs)
    return sum(leaf.size for leaf in jax.tree.leaves(variables["params"]))


def dense(inputs, outputs):
    return inputs * outputs + outputs


def convolutions(kernel, *channels):
    """Parameters of convolutions without a bias, each from the channels of the one before."""
    return sum(kernel * kernel * a * b for a, b in itertools.pairwise(channels))


@pytest.mark.few_variants
@pytest.mark.parametrize(
    ("model", "shapes", "published"),
    [
        # torchvision's numbers
        pytest.param(resnet18(), IMAGENET, 11_689_512, marks=pytest.mark.slow),
        pytest.param(resnet34(), IMAGENET, 21_797_672, marks=pytest.mark.slow),
        (resnet50(), IMAGENET, 25_557_032),
        pytest.param(resnet101(), IMAGENET, 44_549_160, marks=pytest.mark.slow),
        pytest.param(VGG((1, 1, 2, 2, 2)), IMAGENET, 132_863_336, marks=pytest.mark.slow),
        (VGG(), IMAGENET, 138_357_544),
        pytest.param(VGG((2, 2, 4, 4, 4)), IMAGENET, 143_667_240, marks=pytest.mark.slow),
        (vit_base(), IMAGENET, 86_567_656),
        # pytorch-cifar's ResNet18 (github.com/kuangliu), for 32x32 pixels
        pytest.param(resnet18(classes=10).clone(stem="3x3"), CIFAR, 11_173_962, marks=pytest.mark.slow),
        # timm's deit_tiny_patch16_224 and deit_small_patch16_224
        pytest.param(vit_tiny(), IMAGENET, 5_717_416, marks=pytest.mark.slow),
        pytest.param(vit_small(), IMAGENET, 22_050_664, marks=pytest.mark.slow),
        # transformers: GPT2LMHeadModel, the output tied; BertModel, with its pooler; BertForMaskedLM, without it
        (GPT2(), TEXT, 124_439_808),
        (BERT(), TEXT, 109_482_240),
        pytest.param(BERTMaskedLM(), TEXT, 109_514_298, marks=pytest.mark.slow),
        # the U-Net with batch normalisation that is in general use (milesial/Pytorch-UNet), one class
        (UNet(classes=1), CIFAR, 31_037_633),
    ],
)
def test_a_model_has_as_many_parameters_as_was_published(model, shapes, published):
    assert parameters(model, shapes) == published


@pytest.mark.few_variants
@pytest.mark.parametrize(("depth", "millions"), [(20, 0.27), (56, 0.85), (110, 1.7), (44, 0.66), (32, 0.46)])
def test_a_cifar_resnet_has_as_many_parameters_as_the_papers_table_6_says(depth, millions):
    assert round(parameters(CifarResNet(depth), CIFAR) / 1e6, 1 if depth == 110 else 2) == millions


@pytest.mark.slow
@pytest.mark.parametrize(
    ("model", "shapes", "expected"),
    [
        (SequenceClassifier("simple", 8), ((1, 6, 5),), 5 * 8 + 8 * 8 + 8 + dense(8, 10)),
        (SequenceClassifier("lstm", 8), ((1, 6, 5),), 4 * (5 * 8 + 8 * 8 + 8) + dense(8, 10)),
        # a bias more, that of the product with the state inside the reset gate
        (SequenceClassifier("gru", 8), ((1, 6, 5),), 3 * (5 * 8 + 8 * 8 + 8) + 8 + dense(8, 10)),
        (
            SequenceClassifier("lstm", 8, 2, bidirectional=True, vocabulary=9, embedding=5),
            TEXT,
            9 * 5 + 2 * 4 * (5 * 8 + 8 * 8 + 8) + 2 * 4 * (16 * 8 + 8 * 8 + 8) + dense(16, 10),
        ),
        (VAE(), ((1, 28, 28, 1),), dense(784, 500) + 2 * dense(500, 20) + dense(20, 500) + dense(500, 784)),
        (
            DCGAN(),
            ((1, 64, 64, 3),),
            100 * 16 * 1024 + convolutions(5, 1024, 512, 256, 128, 3) + 3 + 2 * (1024 + 512 + 256 + 128)
            # the discriminator
            + convolutions(5, 3, 128, 256, 512, 1024) + 128 + 2 * (256 + 512 + 1024) + dense(16 * 1024, 1),
        ),
        (
            Llama(100, 16, 2, 4, 2, 32, 48),
            TEXT,
            2 * 100 * 32 + 2 * (2 * 32 * 32 + 2 * 32 * 16 + 3 * 32 * 48 + 2 * 32) + 32,
        ),
        (
            Llama(100, 16, 2, 4, 2, 32, 48, tied=True, qk_norm=True),
            TEXT,
            100 * 32 + 2 * (2 * 32 * 32 + 2 * 32 * 16 + 3 * 32 * 48 + 2 * 32 + 2 * 8) + 32,
        ),
    ],
    ids=["simple", "lstm", "gru", "bidirectional", "vae", "dcgan", "llama", "llama_tied"],
)  # fmt: skip
def test_a_model_has_the_parameters_of_its_formula(model, shapes, expected):
    assert parameters(model, shapes) == expected


@pytest.mark.slow
def test_the_last_scale_is_that_of_each_blocks_last_normalisation():
    model = resnet18().clone(blocks=(1,), channels=4, last_scale=0.0)
    params = jax.jit(lambda: model.init(jax.random.key(0), jnp.ones((1, 32, 32, 3)))["params"])()
    assert not params["stage1_block1"]["BatchNorm_1"]["scale"].any()
    assert (params["stage1_block1"]["BatchNorm_0"]["scale"] == 1).all()
