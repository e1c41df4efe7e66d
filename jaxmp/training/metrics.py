"""Metrics as states that merge by addition, and `MetricSpec`, which says how each is read and shown."""

from __future__ import annotations

import contextlib
import contextvars
import dataclasses
import math
from collections.abc import Iterator, Mapping
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxmp.errors import InputError

BOOKKEEPING = (
    *("step", "applied_steps", "epoch", "split", "loss_scale", "skipped_steps", "learning_rate", "epsilon"),
    *("sparsity", "examples_per_second", "steps_per_second", "tflops_per_second", "mfu"),
    *("device_peak_bytes", "wall_seconds", "ranges"),
)
"""fields of a line of metrics.jsonl that are no metrics; of several objectives, `loss_scale/NAME` and so on"""

OF_OBJECTIVES = ("applied_steps", "loss_scale", "skipped_steps", "learning_rate")
"""those of them that each of several objectives has"""


def is_bookkeeping(field: str) -> bool:
    """Whether a field of a line of metrics.jsonl is no metric.

    >>> is_bookkeeping("loss_scale/generator"), is_bookkeeping("generator/loss")
    (True, False)
    """
    return field in BOOKKEEPING or field.partition("/")[0] in OF_OBJECTIVES


WATCHABLE = ("gradient_norm", "update_norm", "zero_losses")
"""names of the metrics of training that `Loop.watch` can ask for; of several objectives, `NAME/gradient_norm`"""


def is_watched(metric: str) -> bool:
    """Whether a metric is one of `WATCHABLE`.

    >>> is_watched("generator/gradient_norm"), is_watched("loss")
    (True, False)
    """
    return metric.rpartition("/")[2] in WATCHABLE


DROPPED_EXAMPLES = "dropped_examples"
"""name of a metric of private training: the share of examples whose loss or gradient was not finite, left out"""

NAN_LOSS = "nan_loss"
"""name of a metric of training: the share of steps, including skipped ones, in which the loss was NaN; that of one of
several objectives is `nan_loss/NAME`"""


@dataclasses.dataclass(frozen=True)
class MetricSpec:
    """How a metric is read and shown.

    Raises: InputError if `best`, `unit` or `digits` is not one of the values below.

    >>> MetricSpec("max", "%").label("accuracy"), MetricSpec("max", "%").text(0.9851)
    ('accuracy, %', '98.51')
    >>> MetricSpec("min", "nats").label("loss"), MetricSpec("min", "nats").text(0.0582)
    ('loss, nats', '0.0582')
    """

    best: Literal["max", "min"] | None = None
    """whether more ("max") or less ("min") is better; None: no direction, so it cannot be monitored"""
    unit: str = ""
    """unit, shown on axes and in tables; "%" is for a share from 0 to 1, which reports show times 100"""
    digits: int = 4
    """decimals of the value on the console and in reports; reports show a percentage with two fewer"""

    def __post_init__(self) -> None:
        if self.best not in ("max", "min", None):
            raise InputError(f"MetricSpec(best={self.best!r}): expected 'max', 'min' or None")
        if not isinstance(self.unit, str):
            raise InputError(f"MetricSpec(unit={self.unit!r}): expected a string, such as '%' or 'nats'")
        if isinstance(self.digits, bool) or not isinstance(self.digits, int) or self.digits < 0:
            raise InputError(f"MetricSpec(digits={self.digits!r}): expected a whole number of at least 0")

    @property
    def factor(self) -> float:
        """What a value is multiplied by in reports: 100 for "%", else 1."""
        return 100.0 if self.unit == "%" else 1.0

    def label(self, name: str) -> str:
        """The metric's name with its unit, for an axis or the head of a column."""
        return f"{name.replace('_', ' ')}{f', {self.unit}' if self.unit else ''}"

    def text(self, value: float, *, sign: str = "") -> str:
        """A value, or a difference of two, as reports show it, without the unit; `sign` is "+" to show a plus too."""
        decimals = max(self.digits - 2, 0) if self.unit == "%" else self.digits
        return format(self.factor * value, f"{sign}.{decimals}f")


LOSS = MetricSpec("min")
"""the spec of a loss that the task declares nothing about"""


def specs_to_json(specs: Mapping[str, MetricSpec]) -> dict[str, Any]:
    """Specs by name as JSON: `{name: {"best": ..., "unit": ..., "digits": ...}}`."""
    return {name: dataclasses.asdict(spec) for name, spec in specs.items()}


def specs_from_json(value: Mapping[str, Any]) -> dict[str, MetricSpec]:
    """Specs by name from what `specs_to_json` made."""
    return {name: MetricSpec(**fields) for name, fields in value.items()}


def spec_of(specs: Mapping[str, MetricSpec], name: str) -> MetricSpec:
    """The spec of a metric; of one that is not declared, no direction, no unit and four decimals."""
    return specs.get(name, LOSS if name == "loss" else MetricSpec())


class Mean(NamedTuple):
    """A weighted mean that is not divided yet: its sum and its weight, which merge by addition.

    Sums over steps, batches and replicas are exact to rounding, padded rows (weight 0) included.
    """

    total: jax.Array
    """weighted sum of the values, float32 scalar"""
    weight: jax.Array
    """sum of the weights, float32 scalar"""

    @classmethod
    def of(cls, values: jax.Array, weights: jax.Array) -> Mean:
        """The mean of `values` under `weights`; a value of weight 0 is left out, even if it is NaN.

        (Its gradient is not: 0 times the NaN that a row of weight 0 makes on its way through a model is NaN.)

        Args:
          values: any shape and number dtype, computed with in float32.
          weights: of the same shape.

        Raises: InputError if the shapes differ: they would be broadcast, and the mean be one of other numbers.
        """
        if jnp.shape(values) != jnp.shape(weights):
            raise InputError(
                f"Mean.of: values of shape {jnp.shape(values)} beside weights of shape {jnp.shape(weights)}; expected "
                'one value a weight. Of (rows, ...) values under batch["weight"], take the mean of each row first; '
                "outputs (rows, 1) minus a target (rows,) make (rows, rows): take outputs[:, 0]"
            )
        weights = weights.astype(jnp.float32)
        values = jnp.where(weights != 0, values.astype(jnp.float32), 0)
        mean = cls(total=jnp.sum(values * weights), weight=jnp.sum(weights))
        if (made := _made.get()) is not None:
            made.append((mean, values, weights))
        return mean

    def compute(self) -> jax.Array:
        """The mean, float32 scalar; NaN if the weight is 0."""
        return self.total / self.weight

    @staticmethod
    def value(mean: float) -> float:
        """The metric's value, made of its mean."""
        return mean


_made: contextvars.ContextVar[list[tuple[Mean, jax.Array, jax.Array]] | None] = contextvars.ContextVar(
    "made", default=None
)


@contextlib.contextmanager
def recorded_means() -> Iterator[list[tuple[Mean, jax.Array, jax.Array]]]:
    """Context manager: gives a list to which `Mean.of` adds each mean that it makes, with its values and weights."""
    made: list[tuple[Mean, jax.Array, jax.Array]] = []
    token = _made.set(made)
    try:
        yield made
    finally:
        _made.reset(token)


class ExpOfMean(Mean):
    """A mean that is shown as its exponential: the perplexity, of a mean cross-entropy in nats."""

    __slots__ = ()

    def compute(self) -> jax.Array:
        """The exponential of the mean, float32 scalar; NaN if the weight is 0."""
        return jnp.exp(self.total / self.weight)

    @staticmethod
    def value(mean: float) -> float:
        """The exponential of the mean; inf where float64 has no such number."""
        return math.exp(mean) if mean < 709 else math.inf if mean >= 709 else mean


Metrics = dict[str, Mean]
"""Metrics of a step or an evaluation, by name."""


def merge(first: Metrics, second: Metrics) -> Metrics:
    """Merges the metrics of two sets of examples."""
    return jax.tree.map(jnp.add, first, second)


def with_loss(loss: Mean, metrics: Metrics) -> Metrics:
    """The metrics of a loss function, and `loss`. Raises InputError if it has a metric of that name."""
    if "loss" in metrics:
        raise InputError(
            "the loss function returns a metric 'loss', which is the mean of the loss; expected another name"
        )
    return {"loss": loss, **metrics}


def zeros_like(metrics: Any) -> Metrics:
    """Makes metrics of weight 0, as NumPy arrays; `metrics` holds arrays or `jax.ShapeDtypeStruct`s."""
    return jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), metrics)


def compute(metrics: Metrics) -> dict[str, float]:
    """Fetches metrics from the device, and divides in float64; NaN where the weight is 0."""
    values = jax.device_get(metrics)
    return {
        name: mean.value(float(mean.total) / float(mean.weight)) if mean.weight else float("nan")
        for name, mean in values.items()
    }
