"""`ViT`: a vision transformer for image classification.

Source: A. Dosovitskiy et al., An Image is Worth 16x16 Words, ICLR 2021, https://arxiv.org/abs/2010.11929, section 3.1;
Ti and S: H. Touvron et al., Training data-efficient image transformers, ICML 2021, https://arxiv.org/abs/2012.12877.
"""

from __future__ import annotations

import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from jaxmp.errors import InputError
from jaxmp.models.attention import Attention
from jaxmp.models.broadcast import Broadcast
from jaxmp.models.sizes import check_heads, check_rates, check_sizes
from jaxmp.models.transformer import Block


class ViT(nn.Module):
    """A vision transformer with a class token and learned positions: `ViT()` is ViT-B/16.

    Raises:
      InputError: a size is below 1, `dropout` is not in [0, 1), `width` is no multiple of `heads`, or, when called,
        height or width of the image is no multiple of `patch`.
    """

    patch: int = 16
    """Height and width of a patch, in pixels."""
    layers: int = 12
    """Number of blocks."""
    heads: int = 12
    """Number of attention heads."""
    width: int = 768
    """Width of a patch's vector; a block's hidden Dense layer is 4 times as wide."""
    classes: int = 1000
    """Number of logits."""
    dropout: float = 0.0
    """Dropout rate of embeddings and residual connections, during training."""
    qk_norm: bool = False
    """Whether queries and keys pass an RMSNorm."""

    def __post_init__(self) -> None:
        check_sizes(self, "patch", "layers", "heads", "width", "classes")
        check_rates(self, "dropout")
        check_heads(self)
        super().__post_init__()

    @nn.compact
    def __call__(self, image: jax.Array, *, train: bool = False) -> jax.Array:
        """Maps images (batch, height, width, channels) to logits (batch, classes)."""
        if image.shape[1] % self.patch or image.shape[2] % self.patch:
            raise InputError(f"ViT: an image of {image.shape[1:3]}: expected multiples of patch={self.patch}")
        size, batch = (self.patch, self.patch), image.shape[0]
        x = nn.Conv(self.width, size, size, padding="VALID", name="patches")(image).reshape(batch, -1, self.width)
        token = Broadcast((1, self.width), name="class_token")((batch, 1, self.width), x.dtype)
        x = jnp.concatenate([token, x], axis=1)
        x = x + Broadcast(x.shape[1:], nn.initializers.normal(0.02), name="positions")(x.shape, x.dtype)
        x = nn.Dropout(self.dropout, deterministic=not train)(x)
        xavier = nn.initializers.xavier_uniform()
        init: dict[str, Any] = {"kernel_init": xavier, "out_kernel_init": xavier}
        attention = functools.partial(Attention, heads=self.heads, qk_norm=self.qk_norm, **init)
        for index in range(self.layers):
            x = Block(
                attention,
                4 * self.width,
                epsilon=1e-6,
                exact_gelu=True,
                dropout=self.dropout,
                name=f"blocks_{index}",
                **init,
            )(x, train=train)
        x = nn.LayerNorm(epsilon=1e-6, name="norm")(x)
        return nn.Dense(self.classes, kernel_init=nn.initializers.zeros, name="head")(x[:, 0])


def vit_tiny(*, patch: int = 16, classes: int = 1000) -> ViT:
    """ViT-Ti: 5,717,416 parameters for 224x224 pixels, patches of 16 and 1,000 classes."""
    return ViT(patch=patch, width=192, heads=3, classes=classes)


def vit_small(*, patch: int = 16, classes: int = 1000) -> ViT:
    """ViT-S: 22,050,664 parameters for 224x224 pixels, patches of 16 and 1,000 classes."""
    return ViT(patch=patch, width=384, heads=6, classes=classes)


def vit_base(*, patch: int = 16, classes: int = 1000) -> ViT:
    """ViT-B: 86,567,656 parameters for 224x224 pixels, patches of 16 and 1,000 classes."""
    return ViT(patch=patch, classes=classes)
