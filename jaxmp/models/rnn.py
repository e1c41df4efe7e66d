"""`SequenceClassifier`: a simple recurrent network, an LSTM or a GRU that classifies sequences.

Sources: J. Elman, Finding structure in time, Cognitive Science 14, 1990 (simple); S. Hochreiter and J. Schmidhuber,
Long short-term memory, Neural Computation 9, 1997, with the forget gate of F. Gers et al., 2000 (LSTM); K. Cho et al.,
2014, https://arxiv.org/abs/1406.1078, with the reset gate after the product, as in cuDNN (GRU).
"""

from __future__ import annotations

from typing import Any, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp

from jaxmp.errors import InputError
from jaxmp.models.sizes import check_choice, check_rates, check_sizes

CELLS: dict[str, Any] = {"simple": nn.SimpleCell, "lstm": nn.LSTMCell, "gru": nn.GRUCell}
"""the recurrent cells by name"""


class SequenceClassifier(nn.Module):
    """Recurrent layers, scanned over time, and a Dense layer from the last step of each sequence to the logits.

    Raises:
      InputError: a size is below 1, `dropout` is not in [0, 1), `cell` is none of its values, or, when called, the
        sequence is not of features, or, with a `vocabulary`, not of whole numbers.
    """

    cell: Literal["simple", "lstm", "gru"] = "lstm"
    """Kind of recurrent cell."""
    width: int = 128
    """Width of the hidden state, in each direction."""
    layers: int = 1
    """Number of recurrent layers."""
    bidirectional: bool = False
    """Whether each layer also runs over the sequence from its end to its beginning."""
    vocabulary: int | None = None
    """Number of tokens, if the sequences are of whole numbers; None: they are of features."""
    embedding: int = 128
    """Width of a token's vector, with a `vocabulary`."""
    classes: int = 10
    """Number of logits."""
    dropout: float = 0.0
    """Dropout rate of embeddings and of the result of each layer, during training."""

    def __post_init__(self) -> None:
        check_sizes(self, "width", "layers", "embedding", "classes")
        check_rates(self, "dropout")
        check_choice(self, "cell", tuple(CELLS))
        if self.vocabulary is not None:
            check_sizes(self, "vocabulary")
        super().__post_init__()

    @nn.compact
    def __call__(self, sequence: jax.Array, length: jax.Array | None = None, *, train: bool = False) -> jax.Array:
        """Maps sequences to logits (batch, classes).

        Args:
          sequence: features (batch, time, ...), the later axes flattened: an image is a sequence of its rows. With a
            `vocabulary`, tokens, int (batch, time).
          length: number of steps that count of each sequence, int (batch,); the rest is padding, which changes nothing.
            One of no steps has the hidden state 0. None: all steps count.
          train: whether dropout drops.
        """
        whole = jnp.issubdtype(sequence.dtype, jnp.integer)
        if self.vocabulary is None:
            if whole or sequence.ndim < 3:
                raise InputError(self._refused(sequence, "features, floats (batch, time, ...), or a vocabulary"))
            x = sequence.reshape(*sequence.shape[:2], -1)
        else:
            if not whole or sequence.ndim != 2:
                raise InputError(self._refused(sequence, "tokens, whole numbers (batch, time)"))
            x = nn.Embed(self.vocabulary, self.embedding, name="tokens")(sequence)
            x = nn.Dropout(self.dropout, deterministic=not train)(x)
        count = jnp.full(x.shape[:1], x.shape[1]) if length is None else length
        for index in range(self.layers):
            outputs: list[Any] = [nn.RNN(self._cell(f"forward_{index}"))(x)]
            if self.bidirectional:
                backward: Any = nn.RNN(self._cell(f"backward_{index}"))
                outputs.append(reverse(backward(reverse(x, count)), count))
            x = nn.Dropout(self.dropout, deterministic=not train)(jnp.concatenate(outputs, axis=-1))
        # The last step of each direction, or zeros: one term of each sum is not zero, so that it is exact.
        step = jnp.arange(x.shape[1])
        is_last, is_first = step == count[:, None] - 1, (step == 0) & (count[:, None] > 0)
        split = jnp.split(x, 2, axis=-1) if self.bidirectional else [x]
        ends = [
            jnp.sum(jnp.where(at[..., None], each, 0), axis=1)
            for at, each in zip((is_last, is_first), split, strict=False)
        ]
        return nn.Dense(self.classes, name="head")(jnp.concatenate(ends, axis=-1))

    def _cell(self, name: str) -> Any:
        return CELLS[self.cell](self.width, name=name)

    def _refused(self, sequence: jax.Array, expected: str) -> str:
        return f"SequenceClassifier: the sequence is {sequence.dtype}{list(sequence.shape)}; expected {expected}"


def reverse(x: jax.Array, length: jax.Array) -> jax.Array:
    """Turns each sequence round, its padding left at the end. Done twice, it is the sequence again.

    Flax's `nn.RNN(reverse=True)` does not say that no step is read twice, and so adds up gradients, in half.

    Args:
      x: (batch, time, width).
      length: number of steps that count of each sequence, int (batch,).
    """
    step, count = jnp.arange(x.shape[1]), length[:, None]
    step = jnp.where(step < count, count - 1 - step, step)
    return x.at[jnp.arange(x.shape[0])[:, None], step].get(unique_indices=True)
