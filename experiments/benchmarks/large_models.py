"""The models of performance.md's table of GPUs, full size or as toys, each with random rows: never zeros."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxmp import Classification, Task
from jaxmp.models.cnn import CNN
from jaxmp.models.resnet import ResNet, resnet18, resnet50
from jaxmp.models.rnn import SequenceClassifier
from jaxmp.models.transformer import GPT2, BERTMaskedLM
from jaxmp.models.vit import ViT, vit_base
from jaxmp.tasks.language import MaskedLM, NextToken
from jaxmp.tasks.loss import init_model, make_loss


@dataclass(frozen=True)
class Workload:
    """A model, its task, and what a row is."""

    model: nn.Module
    task: Task
    row: tuple[int, ...]
    """shape of one row of inputs: an image, a sequence, or tokens"""
    rows: int
    """rows in a batch"""
    classes: int
    """classes, or the vocabulary"""
    unit: str = "images"
    per_row: int = 1
    """how many of `unit` a row has"""
    predicted: int = 0
    """of a masked language model: predicted tokens of a row"""

    @property
    def is_tokens(self) -> bool:
        """Whether rows are of tokens."""
        return self.unit == "tokens"

    def batch(self) -> dict[str, np.ndarray]:
        """Returns random rows, with weights of 1."""
        rng, shape = np.random.default_rng(0), (self.rows, *self.row)
        weight = np.ones(self.rows, np.float32)
        if not self.is_tokens:
            image = rng.standard_normal(shape, np.float32)
            return {
                "image": image,
                "label": rng.integers(self.classes, size=self.rows, dtype=np.int32),
                "weight": weight,
            }
        tokens = rng.integers(self.classes, size=(2, *shape), dtype=np.int32)
        if not self.predicted:
            return {"tokens": tokens[0], "next_tokens": tokens[1], "weight": weight}
        places = np.stack([rng.permutation(self.row[0])[: self.predicted] for _ in range(self.rows)]).astype(np.int32)
        return {
            "tokens": tokens[0],
            "mask": np.ones(shape, np.int32),
            "segments": np.zeros(shape, np.int32),
            "positions": np.tile(np.arange(self.row[0], dtype=np.int32), (self.rows, 1)),
            "predicted": places,
            "targets": np.take_along_axis(tokens[1], places, 1),
            "weight": weight,
        }

    def loss(self, precision: str) -> Any:
        """Returns the loss function under a precision."""
        return make_loss(self.model, self.task, precision)

    def init(self, key: jax.Array) -> tuple[Any, Any]:
        """Returns `(params, model_state)`; shapes and dtypes alone under `jax.eval_shape`."""
        spec = {name: jax.ShapeDtypeStruct(column.shape, column.dtype) for name, column in self.batch().items()}
        return init_model(self.model, self.task, spec, key)

    def optimizer(self) -> optax.GradientTransformation:
        """Returns AdamW of token models, and SGD with momentum of the others."""
        return optax.adamw(1e-4) if self.is_tokens else optax.sgd(1e-2, momentum=0.9)


IMAGES, TOKENS = Classification(), NextToken()
MASKED = MaskedLM(inputs=("tokens", "mask", "segments", "positions", "predicted"))
LARGE = {
    "digits CNN": Workload(CNN((32, 64)), IMAGES, (8, 8, 1), 64, 10),
    "LSTM": Workload(SequenceClassifier("lstm", 1024), IMAGES, (128, 128), 128, 10, "steps of time", 128),
    "ResNet-18": Workload(resnet18(), IMAGES, (224, 224, 3), 128, 1000),
    "ResNet-50": Workload(resnet50(), IMAGES, (224, 224, 3), 256, 1000),
    "ViT-B/16": Workload(vit_base(), IMAGES, (224, 224, 3), 128, 1000),
    "GPT-2 124M": Workload(GPT2(dropout=0.0), TOKENS, (1024,), 16, 50257, "tokens", 1024),
    "BERT-base": Workload(BERTMaskedLM(dropout=0.0), MASKED, (512,), 32, 30522, "tokens", 512, predicted=80),
}
_SMALL_BERT = {"vocabulary": 32, "context": 8, "layers": 1, "heads": 2, "width": 8, "hidden": 16, "dropout": 0.0}
TOYS = {
    "digits CNN": dataclasses.replace(LARGE["digits CNN"], model=CNN((2, 2)), rows=4),
    "LSTM": Workload(SequenceClassifier("lstm", 8), IMAGES, (4, 6), 4, 10, "steps of time", 4),
    "ResNet-18": Workload(ResNet((1, 1), "basic", 4, 10, stem="3x3"), IMAGES, (8, 8, 3), 4, 10),
    "ResNet-50": Workload(ResNet((1, 1), "bottleneck", 4, 10, stem="3x3"), IMAGES, (8, 8, 3), 4, 10),
    "ViT-B/16": Workload(ViT(4, 1, 2, 8, 10), IMAGES, (8, 8, 3), 4, 10),
    "GPT-2 124M": Workload(GPT2(32, 8, 1, 2, 8, 0.0), TOKENS, (8,), 4, 32, "tokens", 8),
    "BERT-base": Workload(BERTMaskedLM(**_SMALL_BERT), MASKED, (8,), 4, 32, "tokens", 8, predicted=2),
}
"""the same kinds of models as small as they can be: what runs of these runs of the large ones"""


def workloads(*, toys: bool) -> dict[str, Workload]:
    """Returns all of them by name."""
    return TOYS if toys else LARGE


def spec_of(tree: Any) -> Any:
    """The shapes and dtypes of a tree of arrays."""
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(jnp.shape(x), jnp.result_type(x)), tree)
