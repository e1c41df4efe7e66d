"""`SequenceClassifier` and `SequenceLabeller`: a simple recurrent network, an LSTM or a GRU over sequences.

Sources: J. Elman, Finding structure in time, Cognitive Science 14, 1990 (simple); S. Hochreiter and J. Schmidhuber,
Long short-term memory, Neural Computation 9, 1997, with the forget gate of F. Gers et al., 2000 (LSTM); K. Cho et al.,
2014, https://arxiv.org/abs/1406.1078, with the reset gate after the product, as in cuDNN (GRU).
"""

from __future__ import annotations

from typing import Any, Literal

import flax.linen as nn
import jax
import jax.experimental.rnn
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
    kernel: Literal["scan", "cudnn"] = "scan"
    """Implementation of the layers: a scan over time, or cuDNN's, of NVIDIA GPUs: an LSTM in float32."""

    def __post_init__(self) -> None:
        check_fields(self)
        super().__post_init__()

    @nn.compact
    def __call__(self, sequence: jax.Array, length: jax.Array | None = None, *, train: bool = False) -> jax.Array:
        """Maps sequences to logits (batch, classes).

        Args:
          sequence: features (batch, time, ...), the later axes flattened: an image is a sequence of its rows. With a
            `vocabulary`, tokens, int (batch, time).
          length: number of steps that count of each sequence, int (batch,); the rest is padding, which changes nothing.
            One of no steps has the hidden state 0. None: all steps count; so they do where it is more than there are.
          train: whether dropout drops.
        """
        x = features(self, sequence, train=train)
        count = steps_that_count(x, length)
        x = recurrent_layers(self, x, count, train=train)
        # The last step of each direction, or zeros: one term of each sum is not zero, so that it is exact.
        step = jnp.arange(x.shape[1])
        is_last, is_first = step == count[:, None] - 1, (step == 0) & (count[:, None] > 0)
        split = jnp.split(x, 2, axis=-1) if self.bidirectional else [x]
        ends = [
            jnp.sum(jnp.where(at[..., None], each, 0), axis=1)
            for at, each in zip((is_last, is_first), split, strict=False)
        ]
        return nn.Dense(self.classes, name="head")(jnp.concatenate(ends, axis=-1))


class SequenceLabeller(nn.Module):
    """Recurrent layers, scanned over time, and a Dense layer at each step: logits of a class for every step.

    Raises:
      InputError: as `SequenceClassifier`.
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
    """Number of logits of a step."""
    dropout: float = 0.0
    """Dropout rate of embeddings and of the result of each layer, during training."""
    kernel: Literal["scan", "cudnn"] = "scan"
    """Implementation of the layers: a scan over time, or cuDNN's, of NVIDIA GPUs: an LSTM in float32."""
    stack: int = 1
    """Number of neighbouring steps that are joined to one before the first layer: the result has fewer steps."""

    def __post_init__(self) -> None:
        check_fields(self)
        check_sizes(self, "stack")
        super().__post_init__()

    @nn.compact
    def __call__(
        self, sequence: jax.Array, length: jax.Array | None = None, *, train: bool = False
    ) -> tuple[jax.Array, jax.Array]:
        """Maps sequences to logits (batch, steps, classes), and how many steps of each count, int32 (batch,).

        There are time / `stack` steps, rounded up; a last one that is not whole is filled up with zeros.

        Args:
          sequence: as for `SequenceClassifier`.
          length: number of steps that count of each sequence, int (batch,); the rest is padding, which changes nothing
            in those that count. None: all steps count.
          train: whether dropout drops.
        """
        x = features(self, sequence, train=train)
        count = steps_that_count(x, length)
        if self.stack > 1:
            x = jnp.where(jnp.arange(x.shape[1])[:, None] < count[:, None, None], x, 0)  # of a step that is not whole
            x = jnp.pad(x, ((0, 0), (0, -x.shape[1] % self.stack), (0, 0)))
            x = x.reshape(x.shape[0], -1, self.stack * x.shape[2])
            count = -(-count // self.stack)
        x = recurrent_layers(self, x, count, train=train)
        return nn.Dense(self.classes, name="head")(x), count


def steps_that_count(x: jax.Array, length: jax.Array | None) -> jax.Array:
    """The number of steps that count of each sequence (batch, time, ...), int32 (batch,), at most `time`."""
    if length is None:
        return jnp.full(x.shape[:1], x.shape[1], jnp.int32)
    return jnp.minimum(length, x.shape[1]).astype(jnp.int32)


def check_fields(model: Any) -> None:
    """Raises InputError for a field of a recurrent model that is out of range."""
    check_sizes(model, "width", "layers", "embedding", "classes")
    check_rates(model, "dropout")
    check_choice(model, "cell", tuple(CELLS))
    check_choice(model, "kernel", ("scan", "cudnn"))
    if model.kernel == "cudnn" and model.cell != "lstm":
        raise InputError(f"{type(model).__name__}: kernel='cudnn' with cell={model.cell!r}; expected 'lstm'")
    if model.vocabulary is not None:
        check_sizes(model, "vocabulary")


def features(model: Any, sequence: jax.Array, *, train: bool) -> jax.Array:
    """The vectors that the first layer of `model` reads, (batch, time, width): embeddings of tokens, or the features.

    Called within a compact method of `model`. Raises InputError if the sequence is not what its `vocabulary` says.
    """
    whole = jnp.issubdtype(sequence.dtype, jnp.integer)
    is_tokens = model.vocabulary is not None
    if whole != is_tokens or (sequence.ndim != 2 if is_tokens else sequence.ndim < 3):
        expected = "features, floats (batch, time, ...), or a vocabulary"
        raise InputError(
            f"{type(model).__name__}: the sequence is {sequence.dtype}{list(sequence.shape)}; expected "
            f"{'tokens, whole numbers (batch, time)' if is_tokens else expected}"
        )
    if not is_tokens:
        return sequence.reshape(*sequence.shape[:2], -1)
    x = nn.Embed(model.vocabulary, model.embedding, name="tokens")(sequence)
    return nn.Dropout(model.dropout, deterministic=not train)(x)


def recurrent_layers(model: Any, x: jax.Array, length: jax.Array, *, train: bool) -> jax.Array:
    """The result of the recurrent layers of `model` at each step, (batch, time, width or, of both directions, 2 width).

    Called within a compact method of `model`.

    Args:
      model: its fields say which layers.
      x: (batch, time, features).
      length: number of steps that count of each sequence, int (batch,).
      train: whether dropout drops.
    """
    for index in range(model.layers):
        names = [f"forward_{index}", *([f"backward_{index}"] if model.bidirectional else [])]
        if model.kernel == "cudnn" and not model.is_initializing():
            directions = [model.get_variable("params", name) for name in names]
            if any(set(gate) - {"kernel", "bias"} for cell in directions for gate in cell.values()):
                raise InputError(
                    f"{type(model).__name__}: kernel='cudnn' has no place for adapters in {names[0]!r}; expected "
                    "kernel='scan', or a LoRA.where that leaves out the recurrent layers"
                )
            x = cudnn_lstm(x, length, *directions)
        else:
            layers: list[Any] = [nn.RNN(CELLS[model.cell](model.width, name=name)) for name in names]
            outputs = [layers[0](x), *(reverse(each(reverse(x, length)), length) for each in layers[1:])]
            x = jnp.concatenate(outputs, axis=-1)
        x = nn.Dropout(model.dropout, deterministic=not train)(x)
    return x


def cudnn_lstm(x: jax.Array, length: jax.Array, *directions: Any) -> jax.Array:
    """One LSTM layer by cuDNN, float32 (batch, time, width of all directions); steps that are padding are zeros.

    Its products are sums of float32 products (without TensorFloat-32). It is one operation: no rule, recipe or
    hook of a policy reaches what is within. Source: `jax.experimental.rnn`, whose kernel has no other dtype.

    Args:
      x: float32 (batch, time, features).
      length: number of steps that count of each sequence, int (batch,).
      *directions: the parameters of `nn.LSTMCell`, of the forward direction, and of the backward one if there is one.

    Raises:
      InputError: x is not float32, or the first device is no NVIDIA GPU.
    """
    if x.dtype != jnp.float32:
        raise InputError(f"kernel='cudnn': the sequence is {x.dtype}; expected float32 (kernel='scan' has all dtypes)")
    if not has_cudnn():
        raise InputError(f"kernel='cudnn': the device is {jax.devices()[0].device_kind}; expected an NVIDIA GPU")
    width = directions[0]["hi"]["bias"].shape[0]
    weights: list[jax.Array] = []
    for cell in directions:
        weights += [cell[f"{of}{gate}"]["kernel"].T for of in "ih" for gate in "ifgo"]
    for cell in directions:  # the products of the input have biases of their own, which a cell of Linen does without
        weights += [jnp.zeros(4 * width), *(cell[f"h{gate}"]["bias"] for gate in "ifgo")]
    state = jnp.zeros((len(directions), x.shape[0], width))
    y, _, _ = jax.experimental.rnn.lstm(
        x, state, state, jnp.concatenate([each.ravel() for each in weights]),
        # cuDNN takes no sequence of no steps: its first step, of padding, is read, and nobody reads the result.
        jnp.maximum(length, 1).astype(jnp.int32),
        x.shape[-1], width, 1, 0.0, len(directions) == 2, jax.lax.Precision.HIGHEST,
    )  # fmt: skip
    return y


def has_cudnn() -> bool:
    """Whether the first device is an NVIDIA GPU."""
    device = jax.devices()[0]
    return device.platform in ("gpu", "cuda") and "." in str(getattr(device, "compute_capability", ""))  # AMD's: gfx90a


def reverse(x: jax.Array, length: jax.Array) -> jax.Array:
    """Turns each sequence round, its padding left at the end. Done twice, it is the sequence again.

    Flax's `nn.RNN(reverse=True)` does not say that no step is read twice, and so adds up gradients, in half.

    Args:
      x: (batch, time, width).
      length: number of steps that count of each sequence, int (batch,).
    """
    step, count = jnp.arange(x.shape[1]), length[:, None]
    step = jnp.where(step < count, count - 1 - step, step)
    return jnp.asarray(x).at[jnp.arange(x.shape[0])[:, None], step].get(unique_indices=True)
