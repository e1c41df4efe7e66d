"""`ResNet` and `CifarResNet`: deep residual networks for image classification.

Source: K. He, X. Zhang, S. Ren and J. Sun, Deep Residual Learning for Image Recognition, CVPR 2016,
https://arxiv.org/abs/1512.03385: table 1 for ImageNet, section 4.2 for CIFAR-10.
"""

from __future__ import annotations

import functools
from typing import Any, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp

from jaxmp.errors import InputError
from jaxmp.models.sizes import check_choice, check_sizes

Conv = functools.partial(nn.Conv, use_bias=False, kernel_init=nn.initializers.he_normal())
"""A convolution before a batch normalisation, initialised after He et al. 2015, https://arxiv.org/abs/1502.01852."""

SAME = ((1, 1), (1, 1))
"""padding of a 3x3 convolution, the same on both sides even where its stride is 2"""


def batch_norm(train: bool, scale: float = 1.0) -> nn.BatchNorm:
    """A batch normalisation with the moving averages of the paper's successors: 0.9 of the old, 0.1 of the new."""
    return nn.BatchNorm(
        use_running_average=not train, momentum=0.9, epsilon=1e-5, scale_init=nn.initializers.constant(scale)
    )


class BasicBlock(nn.Module):
    """Two 3x3 convolutions and a shortcut around them (He et al. 2016, figure 5, left)."""

    channels: int
    """number of channels of the result"""
    stride: int = 1
    """stride of the first convolution"""
    shortcut: Literal["projection", "zeros"] = "projection"
    """where the shape changes: a 1x1 convolution (option B), or zeros for the new channels (option A)"""
    last_scale: float = 1.0
    """initial scale of the last batch normalisation"""

    @nn.compact
    def __call__(self, image: jax.Array, *, train: bool = False) -> jax.Array:
        """Maps (batch, height, width, in) to (batch, height / stride, width / stride, channels)."""
        stride = (self.stride, self.stride)
        x = Conv(self.channels, (3, 3), stride, SAME)(image)
        x = nn.relu(batch_norm(train)(x))
        x = Conv(self.channels, (3, 3), padding=SAME)(x)
        x = batch_norm(train, self.last_scale)(x)
        if image.shape != x.shape:
            if self.shortcut == "projection":
                image = batch_norm(train)(Conv(self.channels, (1, 1), stride, name="projection")(image))
            else:
                new = self.channels - image.shape[-1]
                image = image[:, :: self.stride, :: self.stride]
                image = jnp.pad(image, ((0, 0), (0, 0), (0, 0), (new // 2, new - new // 2)))
        return nn.relu(image + x)


class Bottleneck(nn.Module):
    """1x1, 3x3 and 1x1 convolutions, the last to 4 times the channels, and a shortcut (figure 5, right)."""

    channels: int
    """number of channels inside; the result has 4 times as many"""
    stride: int = 1
    """stride of the block"""
    strided: Literal["1x1", "3x3"] = "3x3"
    """convolution that has the stride: the first, as in the paper, or the second ("v1.5")"""
    last_scale: float = 1.0
    """initial scale of the last batch normalisation"""

    @nn.compact
    def __call__(self, image: jax.Array, *, train: bool = False) -> jax.Array:
        """Maps (batch, height, width, in) to (batch, height / stride, width / stride, 4 * channels)."""
        stride, one = (self.stride, self.stride), (1, 1)
        first, second = (stride, one) if self.strided == "1x1" else (one, stride)
        x = nn.relu(batch_norm(train)(Conv(self.channels, (1, 1), first)(image)))
        x = nn.relu(batch_norm(train)(Conv(self.channels, (3, 3), second, SAME)(x)))
        x = batch_norm(train, self.last_scale)(Conv(4 * self.channels, (1, 1))(x))
        if image.shape != x.shape:
            image = batch_norm(train)(Conv(4 * self.channels, (1, 1), stride, name="projection")(image))
        return nn.relu(image + x)


class ResNet(nn.Module):
    """A residual network for images of about 224x224 pixels: `ResNet()` is ResNet-50.

    Raises:
      InputError: a size is below 1, `block`, `strided` or `stem` is none of its values.
    """

    blocks: tuple[int, ...] = (3, 4, 6, 3)
    """Number of blocks of each stage; a stage has twice the channels and half the size of the one before."""
    block: Literal["basic", "bottleneck"] = "bottleneck"
    """Kind of block."""
    channels: int = 64
    """Number of channels of the first stage."""
    classes: int = 1000
    """Number of logits."""
    strided: Literal["1x1", "3x3"] = "3x3"
    """Convolution of a bottleneck that has its stride: "1x1" as in the paper, "3x3" as in "v1.5" and torchvision."""
    last_scale: float = 1.0
    """Initial scale of the last batch normalisation of each block; 0 in Goyal et al. 2017, 5.1."""
    stem: Literal["7x7", "3x3"] = "7x7"
    """First layers: "7x7", a convolution and a pooling, both of stride 2; "3x3", a convolution, for 32x32 pixels."""

    def __post_init__(self) -> None:
        check_sizes(self, "blocks", "channels", "classes")
        check_choice(self, "block", ("basic", "bottleneck"))
        check_choice(self, "strided", ("1x1", "3x3"))
        check_choice(self, "stem", ("7x7", "3x3"))
        super().__post_init__()

    @nn.compact
    def __call__(self, image: jax.Array, *, train: bool = False) -> jax.Array:
        """Maps images (batch, height, width, channels) to logits (batch, classes)."""
        if self.stem == "7x7":
            x = Conv(self.channels, (7, 7), (2, 2), ((3, 3), (3, 3)), name="stem")(image)
        else:
            x = Conv(self.channels, (3, 3), padding=SAME, name="stem")(image)
        x = nn.relu(batch_norm(train)(x))
        if self.stem == "7x7":
            # The windows overlap: where two have the same maximum, its gradients are added up, in the pooling's dtype.
            wide = x.astype(jnp.promote_types(x.dtype, jnp.float32))
            x = nn.max_pool(wide, (3, 3), strides=(2, 2), padding=SAME).astype(x.dtype)
        for stage, count in enumerate(self.blocks):
            for index in range(count):
                size = {"channels": self.channels * 2**stage, "stride": 2 if stage and not index else 1}
                name = f"stage{stage + 1}_block{index + 1}"
                if self.block == "basic":
                    block: Any = BasicBlock(**size, last_scale=self.last_scale, name=name)
                else:
                    block = Bottleneck(**size, strided=self.strided, last_scale=self.last_scale, name=name)
                x = block(x, train=train)
        return nn.Dense(self.classes, name="head")(jnp.mean(x, axis=(1, 2)))


def resnet18(*, classes: int = 1000) -> ResNet:
    """ResNet-18: 11,689,512 parameters with 1,000 classes."""
    return ResNet(blocks=(2, 2, 2, 2), block="basic", classes=classes)


def resnet34(*, classes: int = 1000) -> ResNet:
    """ResNet-34: 21,797,672 parameters with 1,000 classes."""
    return ResNet(blocks=(3, 4, 6, 3), block="basic", classes=classes)


def resnet50(*, classes: int = 1000) -> ResNet:
    """ResNet-50: 25,557,032 parameters with 1,000 classes."""
    return ResNet(blocks=(3, 4, 6, 3), classes=classes)


def resnet101(*, classes: int = 1000) -> ResNet:
    """ResNet-101: 44,549,160 parameters with 1,000 classes."""
    return ResNet(blocks=(3, 4, 23, 3), classes=classes)


class CifarResNet(nn.Module):
    """A residual network for images of about 32x32 pixels (section 4.2): `CifarResNet()` is ResNet-20.

    Three stages of 16, 32 and 64 channels, each of (depth - 2) / 6 basic blocks.

    Raises:
      InputError: `depth` is not 6 n + 2, a size is below 1, or `shortcut` is none of its values.
    """

    depth: int = 20
    """Number of layers with weights, 6 n + 2: 20, 32, 44, 56 and 110 in the paper."""
    channels: int = 16
    """Number of channels of the first stage."""
    classes: int = 10
    """Number of logits."""
    shortcut: Literal["projection", "zeros"] = "zeros"
    """Shortcut where the shape changes: zeros for the new channels (the paper, option A), or a 1x1 convolution."""

    def __post_init__(self) -> None:
        check_sizes(self, "channels", "classes")
        if self.depth < 8 or self.depth % 6 != 2:
            raise InputError(f"CifarResNet: depth={self.depth}: expected 6 n + 2, such as 20, 32, 44, 56 or 110")
        check_choice(self, "shortcut", ("projection", "zeros"))
        super().__post_init__()

    @nn.compact
    def __call__(self, image: jax.Array, *, train: bool = False) -> jax.Array:
        """Maps images (batch, height, width, channels) to logits (batch, classes)."""
        x = nn.relu(batch_norm(train)(Conv(self.channels, (3, 3), padding=SAME, name="stem")(image)))
        for stage in range(3):
            for index in range((self.depth - 2) // 6):
                x = BasicBlock(
                    self.channels * 2**stage,
                    stride=2 if stage and not index else 1,
                    shortcut=self.shortcut,
                    name=f"stage{stage + 1}_block{index + 1}",
                )(x, train=train)
        return nn.Dense(self.classes, name="head")(jnp.mean(x, axis=(1, 2)))
