"""The models that peers.py compares, each with the batch that it is trained on."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxmp.models.cnn import CNN
from jaxmp.models.mlp import MLP
from jaxmp.models.rnn import SequenceClassifier
from jaxmp.models.transformer import GPT2

LEARNING_RATE = 1e-2
FIRST_SCALE = 2.0**10
"""the first loss scale of everyone: low enough that no step is skipped"""
DTYPES: dict[str, Any] = {"float32": jnp.float32, "bfloat16": jnp.bfloat16, "float16": jnp.float16}
"""compute dtypes; float16 always with dynamic loss scaling"""
PRECISIONS = {"float32": "float32", "bfloat16": "mixed_bfloat16", "float16": "mixed_float16"}
"""jaxmp's names of them"""


@dataclass(frozen=True)
class Case:
    """A model, and the shape of its batch. Everyone trains it by SGD, on a cross-entropy, and measures the accuracy."""

    model: nn.Module
    """jaxmp's model; the peers read its sizes and build their own"""
    row: tuple[int, ...]
    """shape of one row of inputs"""
    rows: int
    """rows in a batch"""
    classes: int = 10

    @property
    def is_tokens(self) -> bool:
        """Whether the inputs are tokens, each with a label, rather than floats."""
        return isinstance(self.model, GPT2)

    @property
    def convolves(self) -> bool:
        """Whether the model has convolutions, whose gradients XLA:CPU runs naively in loops."""
        return isinstance(self.model, CNN)

    def columns(self, batches: int = 1) -> dict[str, np.ndarray]:
        """Returns random rows for some batches: `x`, float32 or int32 (rows, ...), and `label`, int32."""
        rng, rows = np.random.default_rng(0), self.rows * batches
        if self.is_tokens:
            x = rng.integers(self.classes, size=(rows, *self.row), dtype=np.int32)
            return {"x": x, "label": rng.integers(self.classes, size=x.shape, dtype=np.int32)}
        x = rng.standard_normal((rows, *self.row), np.float32)
        return {"x": x, "label": rng.integers(self.classes, size=rows, dtype=np.int32)}

    def batch(self) -> dict[str, jax.Array]:
        """Returns one batch on the device."""
        return {name: jnp.asarray(column) for name, column in self.columns().items()}

    def params(self) -> Any:
        """Returns new parameters of jaxmp's model, the same each time, in buffers that may be donated."""
        x = jnp.asarray(self.columns()["x"][:1])
        return self.model.init(jax.random.key(0), x)["params"]  # under jit, XLA takes minutes for 1,000 leaves


def cases(size: str = "small") -> dict[str, Case]:
    """Returns the models by name. `size` "tiny" is for tests."""
    if size == "tiny":
        return {
            "MLP": Case(MLP((8, 8)), (8,), 4),
            "CNN": Case(CNN((4, 4)), (8, 8, 3), 4),
            "LSTM": Case(SequenceClassifier("lstm", 8), (4, 6), 4),
            "transformer": Case(GPT2(16, 8, 1, 2, 8, 0.0), (8,), 2, classes=16),
        }
    return {
        "MLP of 64 leaves": Case(MLP((8,) * 31), (8,), 8),
        "MLP 64-256-256-10": Case(MLP((256, 256)), (64,), 32),
        "CNN": Case(CNN((32, 64, 128)), (32, 32, 3), 64),
        "LSTM": Case(SequenceClassifier("lstm", 128), (28, 28), 64),
        "transformer": Case(GPT2(256, 64, 2, 4, 128, 0.0), (64,), 16, classes=256),
    }


def loss_and_accuracy(logits: jax.Array, label: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Returns the mean cross-entropy and the accuracy, float32 scalars, from logits (..., classes)."""
    logits = logits.astype(jnp.float32)
    loss = optax.softmax_cross_entropy_with_integer_labels(logits, label).mean()
    return loss, jnp.mean(jnp.argmax(logits, -1) == label)


def optimizer() -> optax.GradientTransformation:
    """Returns the optimizer of all JAX peers."""
    return optax.sgd(LEARNING_RATE)
