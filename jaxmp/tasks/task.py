"""`Task`: how a batch feeds a model, and how the model's outputs become a loss and metrics."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, ClassVar, Literal, NamedTuple

from jaxmp.errors import InputError, nearest
from jaxmp.training.batch import Batch
from jaxmp.training.metrics import BOOKKEEPING, LOSS, NAN_LOSS, Mean, Metrics, MetricSpec


class Task:
    """How a batch feeds a model, and how the model's outputs become a loss and metrics.

    Derive from it, and give `inputs` and `__call__`; all else has a default. (A class that does not derive from it
    needs these two as well, and may have any of the others.) A field `target: str`, if there is one, names the column
    of numbers that the outputs are compared with; it is checked to be there.

        @dataclasses.dataclass(frozen=True)
        class Regression(jaxmp.Task):
            inputs: tuple[str, ...] = ("x",)
            target: str = "y"
            metrics = {"absolute_error": jaxmp.MetricSpec("min", "kg", digits=2)}
            monitor = "absolute_error"

            def __call__(self, outputs, batch):
                error = outputs[:, 0].astype(jnp.float32) - batch[self.target]
                metrics = {"absolute_error": jaxmp.Mean.of(abs(error), batch["weight"])}
                return jaxmp.Mean.of(error**2, batch["weight"]), metrics
    """

    inputs: tuple[str, ...]
    """keys of the batch that the model is called with, in order"""
    metrics: ClassVar[Mapping[str, MetricSpec]] = {}
    """spec of each metric that `__call__` returns; of "loss" too, where it has a unit. A metric without one is shown
    with four decimals, and cannot be monitored"""
    monitor: ClassVar[str] = "loss"
    """validation metric by which the best weights are chosen, unless `loop.monitor` names another"""

    def __call__(self, outputs: Any, batch: Batch) -> tuple[Mean, Metrics]:
        """Computes the loss and the metrics of a batch, in float32 whatever dtype the outputs have.

        Args:
          outputs: what the model gives for `inputs`, in the output dtype of the policy.
          batch: arrays with a leading axis of examples; `batch["weight"]` is float32 (examples,), 0 for padding.

        Returns:
          The loss, which is what the step makes small, and further metrics by name.
        """
        raise NotImplementedError(f"{type(self).__name__}.__call__(outputs, batch)")

    def check(self, outputs: Any, batch: Any) -> None:
        """Raises InputError if the shapes do not fit; called before the first step.

        Args:
          outputs: what the model gives for a batch, as `jax.ShapeDtypeStruct`s.
          batch: the batch, as `jax.ShapeDtypeStruct`s.
        """

    def check_rows(self, outputs: Any, columns: Mapping[str, Any], split: str) -> None:
        """Raises InputError if values in the data do not fit the model; called for each split before the first step.

        Args:
          outputs: what the model gives for a batch, as `jax.ShapeDtypeStruct`s.
          columns: the columns of the split that are at hand, in memory or memory-mapped; empty for other sources. A
            column is read only where it is indexed.
          split: "train", "validation" or "test", for the message.
        """


class Monitor(NamedTuple):
    """The validation metric by which the best weights are chosen."""

    name: str
    best: Literal["max", "min"]
    """whether more or less of it is better"""


def check_outputs(task: Any, outputs: Any, batch: Any) -> None:
    """Calls `task.check`, if the task has one."""
    if hasattr(task, "check"):
        task.check(outputs, batch)


def check_rows(task: Any, outputs: Any, columns: Mapping[str, Any], split: str) -> None:
    """Calls `task.check_rows`, if the task has one."""
    if hasattr(task, "check_rows"):
        task.check_rows(outputs, columns, split)


def metric_specs(task: Any, returned: Iterable[str]) -> dict[str, MetricSpec]:
    """The spec of each metric of a task: the loss first, then the declared ones in their order, then all others.

    Args:
      task: a `Task`, or an object that has `inputs` and `__call__`.
      returned: names of the metrics that its `__call__` returns beside the loss.

    Raises:
      InputError: a metric is called like a field of metrics.jsonl or like the loss, a declared one is not returned, or
        a spec is no `MetricSpec`.
    """
    declared, names, kind = getattr(task, "metrics", {}), sorted(returned), type(task).__name__
    if not isinstance(declared, Mapping):
        raise InputError(f"{kind}.metrics = {declared!r:.60}: expected a mapping from a name to a MetricSpec")
    for name in [*declared, *names]:
        if name in (*BOOKKEEPING, NAN_LOSS) or (name == "loss" and name in names):
            raise InputError(
                f"{kind} has a metric called {name!r}, which is a field that every line of metrics.jsonl has; "
                "expected another name"
            )
    for name, spec in declared.items():
        if not isinstance(spec, MetricSpec):
            raise InputError(f"{kind}.metrics[{name!r}] = {spec!r:.60}: expected a MetricSpec, MetricSpec('min'), say")
        if name != "loss" and name not in names:
            there = ", ".join(names) or "none"
            raise InputError(
                f"{kind}.metrics declares {name!r}, which its __call__ does not return; it returns {there}"
                f"{nearest(name, names)}"
            )
    specs = {"loss": declared.get("loss", LOSS), **declared}
    return specs | {name: MetricSpec() for name in names if name not in specs}


def find_monitor(
    task: Any, specs: Mapping[str, MetricSpec], name: str | None = None, mode: Literal["max", "min"] | None = None
) -> Monitor:
    """The monitored metric and its direction.

    Args:
      task: the task, whose own `monitor` is taken where `name` is None.
      specs: the specs of all metrics, from `metric_specs`.
      name: what `loop.monitor` says.
      mode: what `loop.mode` says; None: the direction of the metric's spec.

    Raises: InputError if nothing of that name is measured, or neither `mode` nor the spec gives a direction.
    """
    kind = type(task).__name__
    where = "loop.monitor"
    if name is None:
        where, name = f"{kind}.monitor", str(getattr(task, "monitor", "loss"))
    if name not in specs:
        raise InputError(
            f"{where}={name!r} is nothing that is measured; expected one of {', '.join(specs)}{nearest(name, specs)}"
        )
    best = mode or specs[name].best
    if best is None:
        raise InputError(
            f"{where}={name!r}: it is not known whether more or less of it is better; expected loop.mode=max or min, "
            f"or a direction in {kind}.metrics, {{{name!r}: MetricSpec('min')}}, say"
        )
    return Monitor(name, best)
