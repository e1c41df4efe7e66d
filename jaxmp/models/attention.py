"""`Attention`: the one attention module of the transformers, with rotary positions, a cache, and grouped keys.

Source: A. Vaswani et al., Attention Is All You Need, NeurIPS 2017, https://arxiv.org/abs/1706.03762, section 3.2.
"""

from __future__ import annotations

import functools
import math
import re
from typing import Any, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp

from jaxmp.errors import InputError
from jaxmp.models.sizes import check_choice, check_rates, check_sizes


class Attention(nn.Module):
    """Multi-head self-attention, softmax in float32 whatever the dtype of its products (trap T4).

    Raises:
      InputError: a size is below 1, `dropout` is not in [0, 1), `kernel` is none of its values, or `heads` are no
        multiple of `kv_heads`; when called, `width` is no multiple of `heads`, or tokens are decoded beyond `context`.
    """

    heads: int
    """number of heads"""
    kv_heads: int | None = None
    """number of heads of keys and values, each shared by `heads / kv_heads` queries (Ainslie et al. 2023,
    https://arxiv.org/abs/2305.13245); None: as many as `heads`"""
    causal: bool = False
    """whether a position sees only itself and those before it"""
    bias: bool = True
    """whether the four Dense layers have a bias"""
    dropout: float = 0.0
    """dropout rate of the attention weights, during training"""
    rope: float | None = None
    """base of the rotary position embedding, 10,000 say; None: no rotation"""
    qk_norm: bool = False
    """whether queries and keys pass an RMSNorm over a head (Henry et al. 2020, https://arxiv.org/abs/2010.04245)"""
    epsilon: float = 1e-6
    """epsilon of these RMSNorms"""
    context: int = 1024
    """number of positions that the cache of decoding has room for"""
    kernel: Literal["auto", "einsum", "cudnn"] = "auto"
    """implementation: "einsum"; "cudnn", of NVIDIA GPUs, in half precision and without dropout; or "auto": where there
    is such a GPU, "cudnn" for what it supports, else "einsum". Decoding is always by "einsum" """
    kernel_init: Any = nn.initializers.lecun_normal()
    """initialiser of the kernels of query, key and value"""
    out_kernel_init: Any = nn.initializers.lecun_normal()
    """initialiser of the kernel of the last Dense layer"""

    def __post_init__(self) -> None:
        check_sizes(self, "heads", "context", *(["kv_heads"] if self.kv_heads is not None else []))
        check_rates(self, "dropout")
        check_choice(self, "kernel", ("auto", "einsum", "cudnn"))
        if self.heads % (self.kv_heads or self.heads):
            raise InputError(f"Attention: heads={self.heads}: expected a multiple of kv_heads={self.kv_heads}")
        super().__post_init__()

    @nn.compact
    def __call__(
        self, x: jax.Array, mask: jax.Array | None = None, *, start: jax.Array | None = None, train: bool = False
    ) -> jax.Array:
        """Maps x (batch, length, width) to (batch, length, width).

        Args:
          x: the tokens' vectors.
          mask: (batch, length), bool or whole numbers: False or 0 for tokens that none may see, padding; None: all are
            seen. With other numbers, of several texts in a row, a token sees those with its own number alone.
          start: of decoding with a cache: position of the first token, an int32 scalar. Keys and values go to the
            collection "cache", and the tokens see what is there up to their own positions. There is no `mask` then.
            Tokens beyond `context` are refused; under jit, which does not know `start`, such a call returns NaN.
          train: whether dropout drops.
        """
        batch, length, width = x.shape
        if width % self.heads:
            raise InputError(f"Attention: a width of {width}: expected a multiple of heads={self.heads}")
        if mask is not None and mask.shape != (batch, length):
            raise InputError(f"Attention: a mask of {list(mask.shape)}; expected (batch, length), {[batch, length]}")
        if start is not None and mask is not None:
            raise InputError("Attention: a mask beside start: expected none in decoding")
        if start is not None:
            check_room(self, start, length)
        head_width, kv_heads = width // self.heads, self.kv_heads or self.heads

        def project(name: str, heads: int) -> jax.Array:
            y = nn.Dense(heads * head_width, use_bias=self.bias, kernel_init=self.kernel_init, name=name)(x)
            return y.reshape(batch, length, heads, head_width)

        query, key, value = project("query", self.heads), project("key", kv_heads), project("value", kv_heads)
        if self.qk_norm:
            norm = functools.partial(nn.RMSNorm, epsilon=self.epsilon)
            query, key = norm(name="query_norm")(query), norm(name="key_norm")(key)
        if self.rope is not None:
            positions = jnp.arange(length) + (0 if start is None else start)
            query, key = (rotate(each, positions, base=self.rope) for each in (query, key))
        causal, seen = self.causal, None if mask is None else _seen(mask)
        if start is not None:
            key, value = self._cached("keys", key, start), self._cached("values", value, start)
            at = start + jnp.arange(length)
            causal, seen = False, (jnp.arange(self.context) <= at[:, None])[None, None]
        drops = train and self.dropout > 0
        if start is None and self._is_cudnn(query, masked=seen is not None, drops=drops):
            # A mask becomes a bias of the logits there, which has to have both of their axes.
            seen = None if seen is None else jnp.broadcast_to(seen, (batch, 1, length, length))
            y = jax.nn.dot_product_attention(query, key, value, mask=seen, is_causal=causal, implementation="cudnn")
        else:
            weights = attention_weights(query, key, mask=seen, causal=causal).astype(value.dtype)
            weights = nn.Dropout(self.dropout, deterministic=not drops)(weights)
            y = weighted_values(weights, value)
        if start is not None:
            # What does not fit into the cache has overwritten the last positions: let it be seen.
            y = jnp.where(start + length <= self.context, y, jnp.nan)
        return nn.Dense(width, use_bias=self.bias, kernel_init=self.out_kernel_init, name="out")(y.reshape(x.shape))

    def _cached(self, name: str, new: jax.Array, start: jax.Array) -> jax.Array:
        """All keys or values in the cache, (batch, context, heads, width), with the new ones from `start` on."""
        shape = (new.shape[0], self.context, *new.shape[2:])
        cache: Any = self.variable("cache", name, jnp.zeros, shape, new.dtype)
        # The cache keeps the dtype that it was made in (trap T21).
        value = jax.lax.dynamic_update_slice_in_dim(cache.value, new.astype(cache.value.dtype), start, axis=1)
        if not self.is_initializing():
            cache.value = value
        return value.astype(new.dtype)

    def _is_cudnn(self, query: jax.Array, *, masked: bool, drops: bool) -> bool:
        """Whether cuDNN's kernel computes it; raises InputError where it is asked for and cannot."""
        width = query.shape[-1]
        supported = query.dtype in (jnp.float16, jnp.bfloat16) and width % 8 == 0 and width <= 128 and not drops
        supported = supported and not (masked and query.shape[1] % 2)
        if self.kernel == "cudnn" and not supported:
            raise InputError(
                f"Attention: kernel='cudnn': {query.shape[1]} tokens, heads of {width} {query.dtype}s"
                f"{', a mask' if masked else ''}{', dropout' if drops else ''}; expected float16 or bfloat16, at most "
                "128 in a head, a multiple of 8, no dropout in attention, and with a mask an even number of tokens"
            )
        return self.kernel == "cudnn" or (self.kernel == "auto" and supported and has_cudnn_attention())


def check_room(model: Any, start: jax.Array, length: int) -> None:
    """Raises InputError if tokens decoded from position `start` on go beyond `context`; under jit, `start` may be 0."""
    known = 0 if isinstance(start, jax.core.Tracer) else int(start)
    if known + length > model.context:
        name = type(model).__name__
        raise InputError(f"{name}: {length} tokens from position {known} on; expected at most context={model.context}")


def _seen(mask: jax.Array) -> jax.Array:
    """Which tokens are seen, bool (batch, 1, 1, length), or (batch, 1, length, length) of several texts in a row."""
    seen = mask.astype(bool)[:, None, None, :]
    if not jnp.issubdtype(mask.dtype, jnp.integer):
        return seen
    # Padding sees all that is no padding, as with a mask of 0 and 1.
    own = mask[:, None, :, None]
    return seen & ((own == mask[:, None, None, :]) | (own == 0))


def has_cudnn_attention() -> bool:
    """Whether the devices are NVIDIA GPUs that have cuDNN's attention: Ampere, compute capability 8.0, or later."""
    device = jax.devices()[0]
    capability = re.fullmatch(r"(\d+)\.\d+", str(getattr(device, "compute_capability", "")))  # of AMD's: gfx90a
    return device.platform in ("gpu", "cuda") and capability is not None and int(capability[1]) >= 8


def attention_weights(query: jax.Array, key: jax.Array, *, mask: jax.Array | None, causal: bool) -> jax.Array:
    """The attention weights softmax(q k^T / sqrt(head_width)), float32 (batch, heads, length, keys).

    The logits are summed and kept in float32. Their gradient is rounded to the dtype of the queries, so that the
    products of the backward pass are of half operands too, as in Flash attention's kernels.

    Args:
      query: (batch, length, heads, head_width), with a multiple of `kv_heads` heads.
      key: (batch, keys, kv_heads, head_width).
      mask: bool, of a shape that broadcasts to (batch, 1, length, keys): False for what is not seen; or None.
      causal: whether query t sees only the keys up to t.
    """
    batch, length, heads, width = query.shape
    logits = _logits(_folded(query, key.shape[2]), key).reshape(batch, heads, length, -1) / math.sqrt(width)
    seen = mask
    if causal:
        below = jnp.arange(key.shape[1]) <= jnp.arange(length)[:, None]
        seen = below if seen is None else seen & below
    if seen is not None:
        logits = jnp.where(seen, logits, jnp.finfo(logits.dtype).min)
    return jax.nn.softmax(logits)


def weighted_values(weights: jax.Array, value: jax.Array) -> jax.Array:
    """The sums (batch, length, heads, head_width) of values (batch, keys, kv_heads, head_width) under these weights."""
    batch, heads, length, keys = weights.shape
    kv_heads, width = value.shape[2:]
    y = jnp.einsum("bkqs,bskh->bqkh", weights.reshape(batch, kv_heads, -1, keys), value)
    if heads == kv_heads:
        return y
    return y.reshape(batch, -1, length, kv_heads, width).transpose(0, 2, 3, 1, 4).reshape(batch, length, heads, width)


def _folded(query: jax.Array, kv_heads: int) -> jax.Array:
    """The queries of a group, which share a head of keys, one after the other: (batch, groups * length, kv_heads, ...).

    As an axis of its own the group, be it of one, makes XLA transpose the whole matrix of logits.
    """
    batch, length, heads, width = query.shape
    if heads == kv_heads:
        return query
    return (
        query.reshape(batch, length, kv_heads, -1, width).transpose(0, 3, 1, 2, 4).reshape(batch, -1, kv_heads, width)
    )


def _logits(query: jax.Array, key: jax.Array) -> jax.Array:
    """q k^T of (batch, queries, kv_heads, width) and (batch, keys, kv_heads, width), at least float32."""
    wide = jnp.promote_types(query.dtype, jnp.float32)
    return _half_products(query, key) if query.dtype != wide else jnp.einsum(_PRODUCT, query, key)


_PRODUCT = "bqkh,bskh->bkqs"


@jax.custom_vjp
def _half_products(query: jax.Array, key: jax.Array) -> jax.Array:
    return jnp.einsum(_PRODUCT, query, key, preferred_element_type=jnp.float32)


def _forward(query: jax.Array, key: jax.Array) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    return _half_products(query, key), (query, key)


def _backward(saved: tuple[jax.Array, jax.Array], cotangent: jax.Array) -> tuple[jax.Array, jax.Array]:
    query, key = saved
    cotangent = cotangent.astype(query.dtype)
    return jnp.einsum("bkqs,bskh->bqkh", cotangent, key), jnp.einsum("bkqs,bqkh->bskh", cotangent, query)


_half_products.defvjp(_forward, _backward)


def rotate(x: jax.Array, positions: jax.Array, *, base: float = 10_000.0) -> jax.Array:
    """Rotates each pair (x_i, x_{i + width/2}) of a head by the angle position * base^(-2i/width).

    Angles and rotation are computed in float32 (trap T20), the result has the dtype of `x`.

    Source: J. Su et al., RoFormer, https://arxiv.org/abs/2104.09864, equation 34, with Llama's order of the pairs.

    Args:
      x: queries or keys, (batch, length, heads, width), the width even.
      positions: whole numbers, (length,).
      base: base of the frequencies.
    """
    half = x.shape[-1] // 2
    if x.shape[-1] % 2:
        raise InputError(f"rotate: heads of {x.shape[-1]}: expected an even width")
    frequency = base ** (-jnp.arange(half) / half)
    angle = positions[:, None, None] * frequency
    cos, sin = jnp.cos(angle), jnp.sin(angle)
    first, second = jnp.split(x, 2, axis=-1)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1).astype(x.dtype)
