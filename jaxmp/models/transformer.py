"""`BERT`, `GPT2` and `Llama`: transformers of text, with the layouts that were published.

Their parameters can be converted from files of the published weights: `jaxmp.models.pretrained`.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp

from jaxmp.errors import InputError
from jaxmp.models.attention import Attention, check_room
from jaxmp.models.broadcast import Broadcast
from jaxmp.models.sizes import check_heads, check_rates, check_sizes

NORMAL = nn.initializers.normal(0.02)
"""initialiser of GPT-2's weights (its code), and of Llama's"""
TRUNCATED = nn.initializers.truncated_normal(0.02)
"""initialiser of BERT's weights (its code)"""


class Block(nn.Module):
    """A transformer block: attention and two Dense layers, each with a LayerNorm and a residual connection."""

    attention: Callable[..., Attention]
    """makes its attention: `Attention` with all fields but the name"""
    hidden: int
    """width between the two Dense layers"""
    norm: Literal["before", "after"] = "before"
    """whether each LayerNorm stands "before" its layers (GPT-2, ViT) or "after" the residual connection (BERT)"""
    epsilon: float = 1e-5
    """epsilon of the LayerNorms"""
    exact_gelu: bool = False
    """whether GELU is computed by erf (BERT, ViT) or by tanh (GPT-2)"""
    bias: bool = True
    """whether Dense layers and LayerNorms have a bias"""
    dropout: float = 0.0
    """dropout rate of what is added to the residual connection, during training"""
    kernel_init: Any = nn.initializers.lecun_normal()
    """initialiser of the kernel of the first Dense layer"""
    out_kernel_init: Any = nn.initializers.lecun_normal()
    """initialiser of the kernel of the second Dense layer"""

    @nn.compact
    def __call__(
        self, x: jax.Array, mask: jax.Array | None = None, *, start: jax.Array | None = None, train: bool = False
    ) -> jax.Array:
        """Maps x (batch, length, width) to the same shape; for the arguments see `Attention`."""
        attention = self.attention(name="attention")

        def attend(x: jax.Array) -> jax.Array:
            return attention(x, mask, start=start, train=train)

        def feed_forward(x: jax.Array) -> jax.Array:
            y = nn.Dense(self.hidden, use_bias=self.bias, kernel_init=self.kernel_init, name="up")(x)
            y = nn.gelu(y, approximate=not self.exact_gelu)
            return nn.Dense(x.shape[-1], use_bias=self.bias, kernel_init=self.out_kernel_init, name="down")(y)

        def norm(name: str) -> nn.LayerNorm:
            return nn.LayerNorm(epsilon=self.epsilon, use_bias=self.bias, name=name)

        for layers, name in ((attend, "attention_norm"), (feed_forward, "mlp_norm")):
            y = layers(norm(name)(x)) if self.norm == "before" else layers(x)
            x = x + nn.Dropout(self.dropout, deterministic=not train)(y)
            x = norm(name)(x) if self.norm == "after" else x
        return x


class BERT(nn.Module):
    """The encoder BERT with its pooler: `BERT()` is BERT-base uncased, 109,482,240 parameters.

    Source: J. Devlin et al., BERT, NAACL 2019, https://arxiv.org/abs/1810.04805, section 3 and appendix A.2.

    Raises:
      InputError: a size is below 1, `dropout` is not in [0, 1), `width` is no multiple of `heads`, or, when called,
        there are more tokens than `context`.
    """

    vocabulary: int = 30522
    """Number of tokens."""
    context: int = 512
    """Largest number of positions."""
    segments: int = 2
    """Number of segments that the tokens of one input may belong to."""
    layers: int = 12
    """Number of blocks."""
    heads: int = 12
    """Number of attention heads."""
    width: int = 768
    """Width of a token's vector."""
    hidden: int = 3072
    """Width of the hidden Dense layer of a block."""
    dropout: float = 0.1
    """Dropout rate of embeddings, residual connections and attention weights, during training."""

    def __post_init__(self) -> None:
        check_sizes(self, "vocabulary", "context", "segments", "layers", "heads", "width", "hidden")
        check_rates(self, "dropout")
        check_heads(self)
        super().__post_init__()

    def setup(self) -> None:
        """The layers; those that a call does not use have no parameters."""
        embed = functools.partial(nn.Embed, features=self.width, embedding_init=TRUNCATED)
        self.tokens, self.positions, self.types = embed(self.vocabulary), embed(self.context), embed(self.segments)
        self.embedding_norm = nn.LayerNorm(epsilon=1e-12)
        self.embedding_dropout = nn.Dropout(self.dropout)
        init: dict[str, Any] = {"kernel_init": TRUNCATED, "out_kernel_init": TRUNCATED}
        attention = functools.partial(Attention, heads=self.heads, dropout=self.dropout, **init)
        self.blocks = [
            Block(attention, self.hidden, norm="after", epsilon=1e-12, exact_gelu=True, dropout=self.dropout, **init)
            for _ in range(self.layers)
        ]
        self.pooler = nn.Dense(self.width, kernel_init=TRUNCATED)

    def encode(
        self, tokens: jax.Array, mask: Any = None, segments: Any = None, positions: Any = None, *, train: bool = False
    ) -> jax.Array:
        """The last hidden states, (batch, length, width); for the arguments see `__call__`."""
        _check_length(self, tokens)
        segments = jnp.zeros_like(tokens) if segments is None else segments
        positions = _positions(tokens) if positions is None else positions
        x = self.tokens(tokens) + self.positions(positions) + self.types(segments)
        x = self.embedding_dropout(self.embedding_norm(x), deterministic=not train)
        for block in self.blocks:
            x = block(x, mask, train=train)
        return x

    def pool(self, hidden: jax.Array) -> jax.Array:
        """The pooled first token (batch, width) of the last hidden states (batch, length, width)."""
        return nn.tanh(self.pooler(hidden[:, 0]))

    def __call__(
        self, tokens: jax.Array, mask: Any = None, segments: Any = None, positions: Any = None, *, train: bool = False
    ) -> Any:
        """Maps tokens, int (batch, length), to the last hidden states (batch, length, width) and their pooled form.

        Args:
          tokens: tokens, from 0 on.
          mask: (batch, length), bool or whole numbers: False or 0 for padding; None: no padding. Of several texts in a
            row, the number of each token's text, from 1 on.
          segments: segment of each token, int (batch, length); None: 0.
          positions: position of each token, int (batch, length); None: its place in the row.
          train: whether dropout drops.
        """
        hidden = self.encode(tokens, mask, segments, positions, train=train)
        return hidden, self.pool(hidden)


class BERTClassifier(BERT):
    """BERT with a Dense layer from the pooled first token to the logits of classes."""

    classes: int = 2
    """Number of logits."""

    def __post_init__(self) -> None:
        check_sizes(self, "classes")
        super().__post_init__()

    def setup(self) -> None:
        """The layers of BERT, and the classifier."""
        super().setup()
        self.head_dropout = nn.Dropout(self.dropout)
        self.classifier = nn.Dense(self.classes, kernel_init=TRUNCATED)

    def __call__(
        self, tokens: jax.Array, mask: Any = None, segments: Any = None, positions: Any = None, *, train: bool = False
    ) -> Any:
        """Maps tokens, int (batch, length), to logits (batch, classes); for the arguments see `BERT`."""
        pooled = self.pool(self.encode(tokens, mask, segments, positions, train=train))
        return self.classifier(self.head_dropout(pooled, deterministic=not train))


class BERTMaskedLM(BERT):
    """BERT without its pooler, with logits of the vocabulary at each position; the output weights are the embedding."""

    def setup(self) -> None:
        """The layers of BERT, and those of the output."""
        super().setup()
        self.transform = nn.Dense(self.width, kernel_init=TRUNCATED)
        self.transform_norm = nn.LayerNorm(epsilon=1e-12)
        self.output_bias = Broadcast((self.vocabulary,))

    def __call__(
        self,
        tokens: jax.Array,
        mask: Any = None,
        segments: Any = None,
        positions: Any = None,
        predicted: Any = None,
        *,
        train: bool = False,
    ) -> Any:
        """Maps tokens, int (batch, length), to logits (batch, length, vocabulary); for the arguments see `BERT`.

        Args:
          predicted: places in the row, int (batch, count), all different: the logits are for these alone, (batch,
            count, vocabulary); None: for all.
        """
        hidden = self.encode(tokens, mask, segments, positions, train=train)
        if predicted is not None:
            # Said to be all different, so that their gradients need not be added up, in half.
            rows = jnp.arange(tokens.shape[0])[:, None]
            hidden = hidden.at[rows, predicted].get(unique_indices=True)
        x = self.transform_norm(nn.gelu(self.transform(hidden), approximate=False))
        logits = self.tokens.attend(x)
        return logits + self.output_bias(logits.shape, logits.dtype)


class GPT2(nn.Module):
    """The decoder GPT-2, its output weights tied to its embedding: `GPT2()` is the smallest, 124,439,808 parameters.

    Source: A. Radford et al., Language Models are Unsupervised Multitask Learners, OpenAI 2019, section 2.3.

    Decoding with a cache: each call continues where the one before ended.

        logits, state = model.apply({"params": params}, prompt, decode=True, mutable=["cache"])
        logits, state = model.apply({"params": params, **state}, token, decode=True, mutable=["cache"])

    Raises:
      InputError: a size is below 1, `dropout` is not in [0, 1), `width` is no multiple of `heads`, or, when called,
        there are more tokens than `context`, those in the cache included. jit does not know how many these are:
        there, a call that goes beyond `context` returns NaN, and so does each after it.
    """

    vocabulary: int = 50257
    """Number of tokens."""
    context: int = 1024
    """Largest number of positions."""
    layers: int = 12
    """Number of blocks."""
    heads: int = 12
    """Number of attention heads."""
    width: int = 768
    """Width of a token's vector; a block's hidden Dense layer is 4 times as wide."""
    dropout: float = 0.1
    """Dropout rate of embeddings, residual connections and attention weights, during training."""
    bias: bool = True
    """Whether Dense layers and LayerNorms have a bias."""

    def __post_init__(self) -> None:
        check_sizes(self, "vocabulary", "context", "layers", "heads", "width")
        check_rates(self, "dropout")
        check_heads(self)
        super().__post_init__()

    @nn.compact
    def __call__(
        self,
        tokens: jax.Array,
        mask: Any = None,
        positions: Any = None,
        *,
        decode: bool = False,
        train: bool = False,
    ) -> jax.Array:
        """Maps tokens, int (batch, length), to the logits of the next ones, (batch, length, vocabulary).

        Args:
          tokens: tokens, from 0 on.
          mask: as of `BERT`; None in decoding.
          positions: position of each token, int (batch, length); None: its place in the row, or in what is decoded.
          decode: whether to go on from the cache, and to keep keys and values in it.
          train: whether dropout drops.
        """
        _check_length(self, tokens)
        start = _advance(self, tokens) if decode else None
        embed = nn.Embed(self.vocabulary, self.width, embedding_init=NORMAL, name="tokens")
        embed_position = nn.Embed(self.context, self.width, embedding_init=NORMAL, name="positions")
        x = embed(tokens) + embed_position(_positions(tokens, start) if positions is None else positions)
        x = nn.Dropout(self.dropout, deterministic=not train)(x)
        # What is added to the residual stream begins the smaller the more layers add to it (section 2.3).
        init: dict[str, Any] = {
            "kernel_init": NORMAL,
            "out_kernel_init": nn.initializers.normal(0.02 / math.sqrt(2 * self.layers)),
        }
        attention = functools.partial(
            Attention, heads=self.heads, causal=True, bias=self.bias, dropout=self.dropout, context=self.context, **init
        )
        for index in range(self.layers):
            block = Block(
                attention, 4 * self.width, bias=self.bias, dropout=self.dropout, name=f"blocks_{index}", **init
            )
            x = block(x, mask, start=start, train=train)
        return embed.attend(nn.LayerNorm(epsilon=1e-5, use_bias=self.bias, name="norm")(x))


class LlamaBlock(nn.Module):
    """A block of Llama: attention and a gated SiLU, each after an RMSNorm, with residual connections."""

    attention: Callable[..., Attention]
    """makes its attention: `Attention` with all fields but the name"""
    hidden: int
    """width of the gate"""
    epsilon: float
    """epsilon of the RMSNorms"""
    out_kernel_init: Any
    """initialiser of the kernel of the last Dense layer"""

    @nn.compact
    def __call__(self, x: jax.Array, *, start: jax.Array | None = None, train: bool = False) -> jax.Array:
        """Maps x (batch, length, width) to the same shape; for the arguments see `Attention`."""
        attention = self.attention(name="attention")
        dense = functools.partial(nn.Dense, use_bias=False, kernel_init=NORMAL)
        y = nn.RMSNorm(epsilon=self.epsilon, name="attention_norm")(x)
        x = x + attention(y, start=start, train=train)
        y = nn.RMSNorm(epsilon=self.epsilon, name="mlp_norm")(x)
        y = nn.silu(dense(self.hidden, name="gate")(y)) * dense(self.hidden, name="up")(y)
        return x + dense(x.shape[-1], kernel_init=self.out_kernel_init, name="down")(y)


class Llama(nn.Module):
    """A decoder with the layout of Llama, small: RMSNorm, rotary positions, grouped keys, gated SiLU, no bias.

    Source: H. Touvron et al., LLaMA, https://arxiv.org/abs/2302.13971, section 2.2; grouped keys and the defaults'
    proportions: Llama 2, https://arxiv.org/abs/2307.09288. It decodes with a cache as `GPT2` does.

    Raises:
      InputError: a size is below 1, `width` is no multiple of `heads`, `heads` none of `kv_heads`, or, when called,
        there are more tokens than `context`, those in the cache included. jit does not know how many these are:
        there, a call that goes beyond `context` returns NaN, and so does each after it.
    """

    vocabulary: int = 32000
    """Number of tokens."""
    context: int = 1024
    """Largest number of positions."""
    layers: int = 8
    """Number of blocks."""
    heads: int = 8
    """Number of attention heads of the queries."""
    kv_heads: int = 4
    """Number of attention heads of keys and values."""
    width: int = 512
    """Width of a token's vector."""
    hidden: int = 1408
    """Width of the gate of a block."""
    rope: float = 10_000.0
    """Base of the rotary position embedding."""
    qk_norm: bool = False
    """Whether queries and keys pass an RMSNorm."""
    tied: bool = False
    """Whether the output weights are the embedding."""
    epsilon: float = 1e-5
    """Epsilon of the RMSNorms."""

    def __post_init__(self) -> None:
        check_sizes(self, "vocabulary", "context", "layers", "heads", "kv_heads", "width", "hidden")
        check_heads(self)
        if self.heads % self.kv_heads:
            raise InputError(f"Llama: heads={self.heads}: expected a multiple of kv_heads={self.kv_heads}")
        super().__post_init__()

    @nn.compact
    def __call__(self, tokens: jax.Array, *, decode: bool = False, train: bool = False) -> jax.Array:
        """Maps tokens, int (batch, length), to the logits of the next ones, (batch, length, vocabulary)."""
        _check_length(self, tokens)
        start = _advance(self, tokens) if decode else None
        embed = nn.Embed(self.vocabulary, self.width, embedding_init=NORMAL, name="tokens")
        out_init = nn.initializers.normal(0.02 / math.sqrt(2 * self.layers))
        attention = functools.partial(
            Attention,
            heads=self.heads,
            kv_heads=self.kv_heads,
            causal=True,
            bias=False,
            rope=self.rope,
            qk_norm=self.qk_norm,
            epsilon=self.epsilon,
            context=self.context,
            kernel_init=NORMAL,
            out_kernel_init=out_init,
        )
        x = embed(tokens)
        for index in range(self.layers):
            x = LlamaBlock(attention, self.hidden, self.epsilon, out_init, name=f"blocks_{index}")(
                x, start=start, train=train
            )
        x = nn.RMSNorm(epsilon=self.epsilon, name="norm")(x)
        if self.tied:
            return embed.attend(x)
        return nn.Dense(self.vocabulary, use_bias=False, kernel_init=NORMAL, name="head")(x)


def _check_length(model: Any, tokens: jax.Array) -> None:
    """Raises InputError unless tokens are whole numbers (batch, length), of at most `context` positions."""
    name = type(model).__name__
    if not jnp.issubdtype(tokens.dtype, jnp.integer) or tokens.ndim != 2:
        raise InputError(
            f"{name}: tokens are {tokens.dtype}{list(tokens.shape)}; expected whole numbers (batch, length)"
        )
    if tokens.shape[1] > model.context:
        raise InputError(f"{name}: {tokens.shape[1]} tokens; expected at most context={model.context}")


def _positions(tokens: jax.Array, start: jax.Array | None = None) -> jax.Array:
    """The position of each token, int32 (batch, length): for each example, so that its gradient sums in float32."""
    positions = jnp.arange(tokens.shape[1]) + (0 if start is None else start)
    return jnp.broadcast_to(positions, tokens.shape)


def _advance(model: nn.Module, tokens: jax.Array) -> jax.Array:
    """The position of the first token, int32 scalar; the next call's is that of the token after the last.

    `init` makes a cache that is not used yet.

    Raises InputError if there is no room, see `check_room`.
    """
    index: Any = model.variable("cache", "index", lambda: jnp.int32(0))
    start = index.value
    check_room(model, start, tokens.shape[1])
    if not model.is_initializing():
        index.value = start + tokens.shape[1]
    return start
