"""`NextToken` and `MaskedLM`: language modelling, with perplexity, bits a byte, and accuracy."""

from __future__ import annotations

import dataclasses
import functools
import inspect
import math
from collections.abc import Mapping
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from jaxmp.errors import InputError
from jaxmp.models.generate import generate
from jaxmp.tasks.samples import TEXTS, Samples, Sampling, Trained
from jaxmp.tasks.tokens import PerToken
from jaxmp.training.batch import Batch
from jaxmp.training.metrics import ExpOfMean, Mean, Metrics, MetricSpec


@dataclasses.dataclass(frozen=True)
class LanguageModel(PerToken):
    """The base of both: targets are tokens, of the same vocabulary as the first of `inputs`."""

    def check_rows(self, outputs: Any, columns: Mapping[str, Any], split: str) -> None:
        """Raises InputError if a target or an input token is outside [0, vocabulary); no loss would show it."""
        for name in (self.target, self.inputs[0]):
            self.check_range(name, outputs.shape[-1], columns, split)


@dataclasses.dataclass(frozen=True)
class NextToken(LanguageModel):
    """Softmax cross-entropy of the next token, from logits (rows, length, vocabulary).

    All means are over the targets that count, so that neither padding nor how rows make up batches changes them.
    """

    inputs: tuple[str, ...] = ("tokens",)
    """keys of the batch that the model is called with, the tokens first"""
    target: str = "next_tokens"
    """key of the tokens that follow, int (rows, length), from 0 on"""
    byte_counts: str | None = None
    """key of the number of bytes of each target, int (rows, length), `next_bytes` of `TextWindows`; None: each is one
    byte"""

    metrics: ClassVar[Mapping[str, MetricSpec]] = {
        "loss": MetricSpec("min", "nats"),
        "perplexity": MetricSpec("min", digits=2),
        "bits_per_byte": MetricSpec("min", "bits", digits=3),
    }

    def __call__(self, outputs: jax.Array, batch: Batch) -> tuple[Mean, Metrics]:
        """Mean cross-entropy a token in nats; `perplexity`, its exponential; `bits_per_byte` of the targets' text."""
        losses, weight, targets = self.losses(outputs, batch)
        loss = Mean.of(losses, weight)
        byte_counts = jnp.ones_like(targets) if self.byte_counts is None else batch[self.byte_counts]
        of_bytes = jnp.sum(weight * jnp.where(weight != 0, byte_counts, 0))
        bits = Mean(loss.total / math.log(2), of_bytes)
        return loss, {"perplexity": ExpOfMean(*loss), "bits_per_byte": bits}

    def sample(self, trained: Trained, key: jax.Array, sampling: Sampling) -> Samples:
        """Texts, drawn token by token from a decoder with a cache, `GPT2` or `Llama`; see `generate`.

        Raises: InputError if the model is no decoder, the prompt has no token, or the context is too small.
        """
        model, vocabulary = trained.model, trained.vocabulary
        if "decode" not in inspect.signature(type(model).__call__).parameters:
            raise InputError(
                f"{type(model).__name__} decodes without a cache; expected a decoder, such as GPT2 or Llama, whose "
                "__call__ takes decode="
            )
        prompt = sampling.prompt
        if prompt is None and "end" in vocabulary.special:
            prompt, tokens = "", np.array([vocabulary.special["end"]], np.int32)
        else:
            prompt = "\n" if prompt is None else prompt
            (tokens,) = vocabulary.encode([prompt])
        if not len(tokens):
            raise InputError(f"prompt = {prompt!r} has no token of the vocabulary; expected a text")
        length = model.context - len(tokens) if sampling.length is None else sampling.length
        count = TEXTS if sampling.count is None else sampling.count

        @jax.jit
        def draw(variables: Any, prompts: jax.Array, key: jax.Array) -> jax.Array:
            how = functools.partial(generate, temperature=sampling.temperature, apply=trained.apply)
            return how(model, variables, prompts, length, key=key, vocabulary=vocabulary.size)

        drawn = draw(trained.variables, jnp.tile(tokens, (count, 1)), key)
        return Samples(texts=tuple(vocabulary.decode([*tokens, *row]) for row in np.asarray(drawn)))


@dataclasses.dataclass(frozen=True)
class MaskedLM(LanguageModel):
    """Softmax cross-entropy of hidden tokens, from logits (rows, length, vocabulary).

    The data hide them, by a `jaxmp.data.masking.Masking`. All means are over the tokens to predict, so that neither
    padding nor how rows make up batches changes them.

    Source: J. Devlin et al., BERT, 2019, https://arxiv.org/abs/1810.04805, section 3.1, task 1.
    """

    metrics: ClassVar[Mapping[str, MetricSpec]] = {
        "loss": MetricSpec("min", "nats"),
        "perplexity": MetricSpec("min", digits=2),
        "accuracy": MetricSpec("max", "%"),
    }

    def __call__(self, outputs: jax.Array, batch: Batch) -> tuple[Mean, Metrics]:
        """Mean cross-entropy a token in nats; `perplexity`, its exponential; `accuracy`, a share from 0 to 1."""
        losses, weight, targets = self.losses(outputs, batch)
        loss, correct = Mean.of(losses, weight), jnp.argmax(outputs, axis=-1) == targets
        return loss, {"perplexity": ExpOfMean(*loss), "accuracy": Mean.of(correct, weight)}
