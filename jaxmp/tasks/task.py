"""`Task`: how a batch feeds a model, and how the model's outputs become a loss and metrics."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterable, Mapping
from typing import Any, ClassVar, Literal, NamedTuple

import jax

from jaxmp.errors import InputError, nearest
from jaxmp.tasks.samples import Samples, Sampling, Trained
from jaxmp.training.batch import Batch
from jaxmp.training.feed import HIDDEN_METRICS
from jaxmp.training.metrics import BOOKKEEPING, LOSS, WATCHABLE, Mean, Metrics, MetricSpec
from jaxmp.training.objective import ObjectiveSpec, check_name, check_objective_name
from jaxmp.training.step import ORDERS
from jaxmp.trees import by_path


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

    A task with several objectives (a GAN; an actor and a critic) names them in `objectives`, with the parameters that
    each trains, and takes the name of one as a third argument:

        @dataclasses.dataclass(frozen=True)
        class Adversarial(jaxmp.Task):
            inputs: tuple[str, ...] = ("image", "noise")
            objectives = {
                "discriminator": jaxmp.ObjectiveSpec(("discriminator",)),
                "generator": jaxmp.ObjectiveSpec(("generator",), every=2),
            }
            monitor = "generator/loss"

            def __call__(self, outputs, batch, objective):
                real, fake = outputs
                if objective == "generator":
                    return jaxmp.Mean.of(-log_sigmoid(fake), batch["weight"]), {}
                return jaxmp.Mean.of(-log_sigmoid(real) - log_sigmoid(-fake), batch["weight"]), {}

    Their metrics are called `generator/loss` and so on, in `metrics` and `monitor` too. An objective may call another
    method of the model, `ObjectiveSpec(..., method="judge_generated")`, so that it computes only what it needs and
    changes no batch statistics of the rest.
    """

    inputs: tuple[str, ...]
    """keys of the batch that the model is called with, in order"""
    metrics: ClassVar[Mapping[str, MetricSpec]] = {}
    """spec of each metric that `__call__` returns; of "loss" too, where it has a unit. A metric without one is shown
    with four decimals, and cannot be monitored"""
    monitor: ClassVar[str] = "loss"
    """validation metric by which the best weights are chosen, unless `loop.monitor` names another"""
    objectives: ClassVar[Mapping[str, ObjectiveSpec]] = {}
    """several objectives by name, in the order in which they run in a step; {}: the one that `__call__` returns"""
    order: ClassVar[Literal["in_turn", "at_once"]] = "in_turn"
    """what each of several objectives sees: "in_turn", the parameters that the one before left; "at_once", those of the
    step's beginning"""

    def __call__(self, outputs: Any, batch: Batch) -> tuple[Mean, Metrics]:
        """Computes the loss and the metrics of a batch, in float32 whatever dtype the outputs have.

        Args:
          outputs: what the model gives for `inputs`, in the output dtype of the policy.
          batch: arrays with a leading axis of examples; `batch["weight"]` is float32 (examples,), 0 for padding.

        Returns:
          The loss, which is what the step makes small, and further metrics by name.
        """
        raise NotImplementedError(f"{type(self).__name__}.__call__(outputs, batch)")

    def change(self, batch: Batch, key: jax.Array, *, train: bool) -> Batch:
        """The batch that the model and `__call__` see, a pure function of the batch and a key; here the batch itself.

        Args:
          batch: the rows of a replica and microbatch; `batch.get(jaxmp.training.batch.EXAMPLE_INDEX)`, int32
            (examples,), is the place of each in the whole batch, in evaluation in the whole split, None if this is the
            whole. What is drawn for a row should depend on the key and on that place alone.
          key: the same for all parts of a batch, and for all batches of an evaluation; in evaluation perhaps None.
          train: whether it is for training.
        """
        return batch

    def predictions(self, outputs: Any) -> dict[str, Any]:
        """What `jaxmp predict` writes for a batch, by name: arrays of shape (examples, ...). Here: `output`.

        Args:
          outputs: what the model gives for a batch, in the output dtype of the policy.
        """
        if hasattr(outputs, "shape"):
            return {"output": outputs}
        return {f"output/{path}": leaf for path, leaf in by_path(outputs).items()}

    def sample(self, trained: Trained, key: jax.Array, sampling: Sampling) -> Samples:
        """What `jaxmp sample` draws from a trained model: texts or pictures.

        Raises: InputError, here always: most tasks have nothing to draw.
        """
        raise InputError(
            f"{type(self).__name__} has nothing to sample; expected a task with a method `sample`, such as NextToken"
        )

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
          columns: the columns of the split as the task sees them, arrays by name, each read when it is looked up: whole
            if it is in memory or small, else perhaps at a sample of the rows.
          split: "train", "validation" or "test", for the message.
        """


def objectives_of(task: Any) -> dict[str, ObjectiveSpec]:
    """The several objectives of a task by name, in their order; {} for a task with a single one.

    Raises: InputError if they are no mapping from names to `ObjectiveSpec`s, or the task's `order` is none.
    """
    kind, objectives = type(task).__name__, getattr(task, "objectives", {})
    if not isinstance(objectives, Mapping):
        raise InputError(f"{kind}.objectives = {objectives!r:.60}: expected a mapping from a name to an ObjectiveSpec")
    for name, spec in objectives.items():
        check_objective_name(name)
        if name in (*BOOKKEEPING, *HIDDEN_METRICS, *WATCHABLE, "loss"):
            raise InputError(f"{kind}.objectives: {name!r} is a field of metrics.jsonl; expected another name")
        if not isinstance(spec, ObjectiveSpec):
            raise InputError(f"{kind}.objectives[{name!r}] = {spec!r:.60}: expected an ObjectiveSpec(trains)")
    order = getattr(task, "order", ORDERS[0])
    if objectives and order not in ORDERS:
        raise InputError(f"{kind}.order = {order!r}: expected {' or '.join(ORDERS)}{nearest(str(order), ORDERS)}")
    return dict(objectives)


def task_of(task: Any, objective: str) -> Any:
    """The task of one of the several objectives of `task`, as a task with a single one.

    Raises: InputError if there is no such objective.
    """
    check_name(objective, objectives_of(task), f"{type(task).__name__}.objectives")
    return _OfObjective(task, objective)


@dataclasses.dataclass(frozen=True)
class _OfObjective(Task):
    """One objective of a task with several."""

    task: Any
    objective: str

    @property
    def inputs(self) -> tuple[str, ...]:  # type: ignore[override]
        return self.task.inputs

    def __call__(self, outputs: Any, batch: Batch) -> tuple[Mean, Metrics]:
        return self.task(outputs, batch, self.objective)

    def change(self, batch: Batch, key: jax.Array, *, train: bool) -> Batch:
        return change_batch(self.task, batch, key, train=train)


def refuse_several(task: Any, what: str) -> None:
    """Raises InputError if a task has several objectives, which `what`, the beginning of the message, cannot do."""
    if names := objectives_of(task):
        raise InputError(f"{what} takes a single objective; {type(task).__name__} has {len(names)}: {', '.join(names)}")


def require_objective(task: Any, objective: str | None, option: str) -> None:
    """Raises InputError unless `objective` is one of the task's several objectives, or None for a single one.

    Args:
      task: the task.
      objective: what is named; None if nothing is.
      option: what names it, for the message: `--objective`.
    """
    names, kind = list(objectives_of(task)), type(task).__name__
    if not names and objective is not None:
        raise InputError(f"{option} {objective}: {kind} has a single objective; expected no {option}")
    if names and objective is None:
        raise InputError(f"{kind} has several objectives; expected {option}, one of {', '.join(names)}")
    if objective is not None:
        check_name(objective, names, option)


class Monitor(NamedTuple):
    """The validation metric by which the best weights are chosen."""

    name: str
    best: Literal["max", "min"]
    """whether more or less of it is better"""


def check_outputs(task: Any, outputs: Any, batch: Any) -> None:
    """Calls `task.check`, if the task has one, and refuses what would be broadcast.

    Raises: InputError if (rows, 1) outputs and a (rows,) target meet in an array of (rows, rows), or the other way.
    """
    if hasattr(task, "check"):
        task.check(outputs, batch)
    target = batch.get(getattr(task, "target", None))
    if target is None or not isinstance(outputs, jax.ShapeDtypeStruct):
        return
    rows, shapes = len(batch["weight"]), sorted([outputs.shape, target.shape], key=len)
    if shapes != [(rows,), (rows, 1)]:
        return
    odd = 1009  # no other axis has this length
    names = objectives_of(task)

    def returned(*args: Any) -> Any:
        return [task(*args, name) for name in names] if names else task(*args)

    def of_odd(x: Any) -> Any:
        return jax.ShapeDtypeStruct((odd, *x.shape[1:]), x.dtype) if x.shape[:1] == (rows,) else x

    try:
        jaxpr = jax.make_jaxpr(returned)(of_odd(outputs), jax.tree.map(of_odd, batch))
    except InputError as error:
        raise InputError(str(error).replace(str(odd), "rows")) from error
    if f"[{odd},{odd}]" in str(jaxpr):
        name = type(task).__name__
        raise InputError(
            f"{name} combines outputs of shape {outputs.shape} with {task.target!r} of shape {target.shape}, which "
            "makes one number of each pair of rows; expected equal shapes: take outputs[:, 0], or target[:, None]"
        )


def check_returned(task: Any, returned: Any) -> None:
    """Raises InputError unless `returned`, what a task's `__call__` gave, is a loss and a dict of metrics."""
    kind = f"{task_name(task)}.__call__"
    expected = "expected (Mean.of(losses, batch['weight']), {name: Mean.of(values, batch['weight'])})"
    if isinstance(returned, Mean) or not isinstance(returned, tuple) or len(returned) != 2:
        what = f"{len(returned)} values" if type(returned) is tuple else f"one {type(returned).__name__}"
        raise InputError(f"{kind} returned {what}; {expected}")
    loss, metrics = returned
    if not isinstance(metrics, Mapping):
        raise InputError(f"{kind} returned metrics of type {type(metrics).__name__}; {expected}")
    for name, mean in {"the loss": loss, **metrics}.items():
        if not isinstance(name, str) or not name:
            raise InputError(f"{kind} returned a metric called {name!r}; expected a name, a string")
        if not isinstance(mean, Mean):
            what = "an array" if hasattr(mean, "shape") else f"a {type(mean).__name__}"
            raise InputError(
                f"{kind} returned {what} as {name}; expected a jaxmp.Mean, whose weight says how many examples it "
                "stands for: Mean.of(values, batch['weight'])"
            )


def sample(task: Any, trained: Trained, key: jax.Array, sampling: Sampling) -> Samples:
    """Calls `task.sample`; of a task without one, that of `Task`, which raises InputError."""
    return (task.sample if hasattr(task, "sample") else functools.partial(Task.sample, task))(trained, key, sampling)


CHANGE = 0x6368616E
"""number of the stream of keys by which a task changes batches"""


def change_batch(task: Any, batch: Batch, key: Any, *, train: bool) -> Batch:
    """Calls `task.change`, if the task has one, with a key of its own."""
    if not hasattr(task, "change") or getattr(type(task), "change", None) is Task.change:
        return batch
    return task.change(batch, None if key is None else jax.random.fold_in(key, CHANGE), train=train)


def predictions(task: Any, outputs: Any) -> dict[str, Any]:
    """Calls `task.predictions`; of a task without one, that of `Task`."""
    return (task.predictions if hasattr(task, "predictions") else functools.partial(Task.predictions, task))(outputs)


def task_name(task: Any) -> str:
    """The class of a task, as messages name it."""
    return type(task.task if isinstance(task, _OfObjective) else task).__name__


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
    declared, names = getattr(task, "metrics", {}), sorted(returned)
    kind = task.kind if isinstance(task, _Declared) else type(task).__name__
    if not isinstance(declared, Mapping):
        raise InputError(f"{kind}.metrics = {declared!r:.60}: expected a mapping from a name to a MetricSpec")
    for name in [*declared, *names]:
        if name in (*BOOKKEEPING, *HIDDEN_METRICS, *WATCHABLE) or (name == "loss" and name in names):
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


def objective_metric_specs(task: Any, returned: Mapping[str, Iterable[str]]) -> dict[str, MetricSpec]:
    """The spec of each metric of a task with several objectives, as `generator/loss`: by objective, the loss first.

    A spec is declared for `generator/recall`, or for `recall` of each objective that returns it.

    Args:
      task: the task.
      returned: names of the metrics that its `__call__` returns beside the loss, by objective.

    Raises: InputError as `metric_specs` does.
    """
    declared, kind = getattr(task, "metrics", {}), type(task).__name__
    if not isinstance(declared, Mapping):
        raise InputError(f"{kind}.metrics = {declared!r:.60}: expected a mapping from a name to a MetricSpec")
    names = {name: sorted(of) for name, of in returned.items()}
    there = [f"{name}/{metric}" for name, of in names.items() for metric in ("loss", *of)]
    for metric in declared:
        if metric not in (*there, *(name.partition("/")[2] for name in there)):
            raise InputError(
                f"{kind}.metrics declares {metric!r}, which its __call__ does not return; it returns "
                f"{', '.join(there)}{nearest(metric, there)}"
            )
    found: dict[str, MetricSpec] = {}
    for name, of in names.items():
        own = {metric: declared[metric] for metric in ("loss", *of) if metric in declared}
        own |= {m.partition("/")[2]: spec for m, spec in declared.items() if m.partition("/")[0] == name}
        specs = metric_specs(_Declared(kind, own), of)
        found |= {f"{name}/{metric}": spec for metric, spec in specs.items()}
    return found


class _Declared(NamedTuple):
    """What one objective of a task declares, for `metric_specs`."""

    kind: str
    metrics: Mapping[str, MetricSpec]


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
