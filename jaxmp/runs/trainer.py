"""`Trainer`: the pieces of an experiment put together."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from jaxmp.data.dataset import Split
from jaxmp.data.fingerprint import fingerprint
from jaxmp.data.pipeline import Batches, batch_shapes, nbytes
from jaxmp.data.source import Source
from jaxmp.errors import InputError, nearest
from jaxmp.experiment.experiment import Experiment
from jaxmp.instruments.ranges import StepRanges, make_step_ranges
from jaxmp.modules.linen import Explanation, UnderPolicy, cast_to_param, explain
from jaxmp.modules.model import as_model
from jaxmp.scaling.transform import loss_scaling
from jaxmp.tasks.loss import init_model, make_loss
from jaxmp.tasks.task import Monitor, check_outputs, find_monitor, metric_specs
from jaxmp.training.batch import LossFn
from jaxmp.training.evaluation import Evaluation
from jaxmp.training.feed import HIDDEN_METRICS, Feed, Resident, Streamed, should_fuse_steps
from jaxmp.training.gradients import Gradients, make_gradients
from jaxmp.training.metrics import Mean, Metrics, MetricSpec, zeros_like
from jaxmp.training.parallel import AXIS, Devices
from jaxmp.training.state import TrainState
from jaxmp.training.step import TrainStep, make_train_step

SPLITS: tuple[Split, ...] = ("train", "validation", "test")
"""all splits that a dataset may have"""


@dataclasses.dataclass(frozen=True)
class Trainer:
    """The pieces that an experiment trains with. Each is made at its first use, and is usable alone."""

    experiment: Experiment
    mesh: Mesh | None = None
    """devices to build for, along one axis `data`; by default all that JAX has. They need not exist to compile."""
    _sources: dict[Split, Source | None] = dataclasses.field(
        default_factory=dict, init=False, repr=False, compare=False
    )

    # Data.

    def source(self, split: Split = "train") -> Source:
        """The rows of a split after the host transforms, opened once. Raises InputError if there is no such split."""
        source = self._source(split)
        if source is None:
            raise InputError(f"this data has no {split} split; there is {', '.join(self.splits)}")
        return source

    @property
    def splits(self) -> tuple[Split, ...]:
        """The splits that the data has: train, and those of validation and test that there are."""
        return tuple(split for split in SPLITS if self._source(split) is not None)

    def _source(self, split: Split) -> Source | None:
        if split not in self._sources:
            self._sources[split] = self.experiment.data.read(split)
        return self._sources[split]

    def fingerprints(self, *, workers: int = 0) -> dict[str, Any]:
        """What the rows of each split are, as JSON; see `jaxmp.data.fingerprint`. `workers` processes read train."""
        readers = {"train": workers}
        return {split: fingerprint(self.source(split), workers=readers.get(split, 0)) for split in self.splits}

    @functools.cached_property
    def batches(self) -> Batches:
        """Which rows each step sees."""
        data = self.experiment.data
        return Batches(examples=len(self.source()), batch_size=data.batch_size, seed=self.experiment.seed)

    @functools.cached_property
    def steps(self) -> int:
        """The number of steps of the whole run."""
        loop = self.experiment.loop
        return loop.epochs * self.batches.per_epoch if loop.steps is None else loop.steps

    @functools.cached_property
    def batch_spec(self) -> dict[str, jax.ShapeDtypeStruct]:
        """Shapes and dtypes of a prepared training batch, of the whole batch size.

        Raises:
          InputError: the task names a column that the data does not have, or one that holds no numbers.
        """
        spec = batch_shapes(self.experiment.data, self.source(), self.batches.batch_size, train=True)
        for name in self.columns:
            if name not in spec:
                raise InputError(self._no_numbers(name, self.source()[np.arange(1)].get(name), sorted(spec)))
        return spec

    @property
    def columns(self) -> list[str]:
        """The columns of the data that the task reads."""
        task = self.experiment.task
        return [*task.inputs, *filter(None, [getattr(task, "target", None)])]

    def _no_numbers(self, name: str, column: np.ndarray | None, columns: list[str]) -> str:
        field, expected = ("inputs", "numbers") if name in self.experiment.task.inputs else ("target", "whole numbers")
        if column is None and name in getattr(self.source(), "left_out", {}):
            what = getattr(self.source(), "left_out", {})[name]
            return f"task.{field} names {name!r}, which is {what}; expected {expected}, an array with a row each"
        if column is None:
            return f"task.{field} names {name!r}; the data has {', '.join(columns)}{nearest(name, columns)}"
        first = column.ravel()[0] if column.dtype != object else column.ravel().tolist()[0]
        holds = "strings" if isinstance(first, str | bytes) else "objects that are no numbers"
        holds = holds if column.dtype.kind in "OSU" else f"{column.dtype.name}, which JAX does not have"
        return (
            f"task.{field} names {name!r}, which holds {holds} ({first!r:.40}, say); expected {expected}, which a host "
            "transform can make of it (data.host_transforms)"
        )

    # Model, optimizer and step.

    @functools.cached_property
    def devices(self) -> Devices:
        """The devices to train on, those of all processes."""
        experiment, mesh = self.experiment, self.mesh
        return experiment.parallel.make(
            experiment.data.batch_size,
            experiment.loop.accumulate_steps,
            devices=None if mesh is None else list(mesh.devices.flat),
        )

    @functools.cached_property
    def tx(self) -> optax.GradientTransformationExtraArgs:
        """The optimizer inside its loss scaling."""
        return loss_scaling(self.experiment.optimizer.make(self.steps), self.experiment.make_scaler())

    def make_loss(self, **kwargs: Any) -> LossFn:
        """The loss of this model, task and precision; for `kwargs` see `jaxmp.make_loss`."""
        experiment, parallel = self.experiment, self.experiment.parallel
        remat = {"remat": parallel.remat, "remat_policy": parallel.remat_policy}
        return make_loss(experiment.model, experiment.task, experiment.policy, **{**remat, **kwargs})

    @functools.cached_property
    def loss_fn(self) -> LossFn:
        """The training loss on one replica's share of a batch."""
        devices, together = self.devices, self.experiment.loop.batch_norm == "global"
        return self.make_loss(
            axis_name=devices.replicas().axis_name if together else None,
            rows=NamedSharding(devices.mesh, P(AXIS)) if devices.shard == "fsdp" else None,
        )

    @functools.cached_property
    def train_step(self) -> TrainStep:
        """The pure train step, on one replica's share of a batch."""
        experiment = self.experiment
        return make_train_step(
            self.loss_fn,
            self.tx,
            ema_decay=experiment.loop.ema_decay,
            rounding=experiment.policy.rounding,
            accumulate_steps=experiment.loop.accumulate_steps,
            accumulate_overflow=experiment.loop.accumulate_overflow,
            replicas=self.devices.replicas(experiment.policy.reduce),
        )

    @functools.cached_property
    def gradients(self) -> Gradients:
        """The gradients of a step, on the whole batch in one program, compiled. For looking at a step again."""
        return jax.jit(make_gradients(self.make_loss(), accumulate_steps=self.experiment.loop.accumulate_steps))

    @functools.cached_property
    def step_ranges(self) -> Callable[[TrainState, Any], StepRanges]:
        """`(state, batch) -> StepRanges` of the step from that state on a whole batch, compiled."""
        return jax.jit(
            make_step_ranges(self.make_loss(), self.tx, accumulate_steps=self.experiment.loop.accumulate_steps)
        )

    @functools.cached_property
    def evaluation(self) -> Evaluation:
        """Evaluates states: `evaluation(state, source)`."""
        nothing = {name: mean for name, mean in self.no_metrics.items() if name not in HIDDEN_METRICS}
        experiment = self.experiment
        loss_fn = make_loss(experiment.model, experiment.task, experiment.policy, train=False)
        return Evaluation(loss_fn, experiment.data, self.devices, nothing)

    def feed(self, *, fuse: bool) -> Feed:
        """What brings batches to the step: from the device, or streamed if the training set is too large for it.

        Args:
          fuse: whether one dispatch may run many steps, see `fuse_steps`.
        """
        data, source, limit = self.experiment.data, self.source(), self.experiment.loop.max_consecutive_skips
        if nbytes(source) > data.device_limit * 2**20:
            return Streamed(self.train_step, data, source, self.batches, self.devices, self.steps, skip_limit=limit)
        return Resident(self.train_step, data, source, self.batches, self.devices, fuse=fuse, skip_limit=limit)

    # State.

    def init(self) -> TrainState:
        """A fresh state, from the seed alone. Each device makes its own share of what is split."""
        experiment, devices = self.experiment, self.devices

        def init(key: jax.Array) -> TrainState:
            params_key, step_key = jax.random.split(key)
            params, model_state = init_model(experiment.model, experiment.task, self.batch_spec, params_key)
            params = cast_to_param(experiment.model, experiment.policy, params, *self.inputs)
            return TrainState.create(
                params,
                self.tx,
                key=step_key,
                model_state=model_state,
                ema=experiment.loop.ema_decay is not None,
                rounding=experiment.policy.rounding,
            )

        key = jax.random.key(experiment.seed)
        if devices.shard == "replicated" and not devices.several_processes:
            return jax.jit(init)(key)
        return jax.jit(init, out_shardings=devices.shardings(jax.eval_shape(init, key)))(key)

    @functools.cached_property
    def state_spec(self) -> TrainState:
        """Shapes and dtypes of the state."""
        return jax.eval_shape(self.init)

    # What can be known without running a step.

    @functools.cached_property
    def outputs(self) -> Any:
        """Shapes and dtypes of what the model returns for a whole batch, in evaluation."""
        model, state = as_model(self.experiment.model).under(UnderPolicy(self.experiment.policy)), self.state_spec
        apply = functools.partial(jax.eval_shape, lambda key, *args: model.apply(*args, key=key)[0])
        return apply(state.key, state.params, state.model_state, *self.inputs)

    @functools.cached_property
    def metric_specs(self) -> dict[str, MetricSpec]:
        """The spec of each metric, the loss first. Raises InputError if what the task declares does not fit."""
        return metric_specs(self.experiment.task, self._forward[1])

    @functools.cached_property
    def monitor(self) -> Monitor:
        """The metric by which the best weights are chosen, and whether more or less of it is better."""
        loop = self.experiment.loop
        return find_monitor(self.experiment.task, self.metric_specs, loop.monitor, loop.mode)

    @functools.cached_property
    def _forward(self) -> tuple[Any, Metrics]:
        """The loss as a jaxpr, and the shapes of its metrics, traced once for both."""
        check_outputs(self.experiment.task, self.outputs, self.batch_spec)
        state, loss_fn = self.state_spec, self.make_loss()
        trace = jax.make_jaxpr(loss_fn, return_shape=True)
        jaxpr, (_, (_, metrics, _)) = trace(state.params, state.model_state, self.batch_spec, state.key)
        return jaxpr, metrics

    @property
    def no_metrics(self) -> Metrics:
        """Training metrics that have counted nothing."""
        scalar: Any = jax.ShapeDtypeStruct((), jnp.float32)
        mean = Mean(scalar, scalar)
        return zeros_like({"loss": mean, **dict.fromkeys(HIDDEN_METRICS, mean), **self._forward[1]})

    @property
    def fuse_steps(self) -> bool:
        """Whether one dispatch should run many steps."""
        return should_fuse_steps(self._forward[0])

    def explain(self) -> Explanation:
        """Which policy each module of the model runs under. Raises InputError if a rule matches none."""
        return explain(self.experiment.model, self.experiment.policy, tuple(self.inputs))

    @property
    def inputs(self) -> list[jax.ShapeDtypeStruct]:
        """Shapes and dtypes of the model's inputs, in a whole batch."""
        return [self.batch_spec[name] for name in self.experiment.task.inputs]

    def program(self) -> tuple[Any, tuple[Any, Any]]:
        """The jitted train step, and its abstract arguments (state and batch) as they lie on the devices.

        `step.lower(*arguments)` compiles it without data, for devices that need not exist.
        """
        step: Any = self.devices.compile(self.train_step, (0, 0))
        if self.devices.mode == "pmap":
            count = self.devices.count
            state = _reshaped(self.state_spec, lambda shape: (count, *shape))
            return step, (state, _reshaped(self.batch_spec, lambda shape: (count, shape[0] // count, *shape[1:])))
        rows = NamedSharding(self.devices.mesh, P(AXIS))
        state = jax.tree.map(_placed, self.state_spec, self.devices.shardings(self.state_spec))
        return step, (state, jax.tree.map(lambda x: _placed(x, rows), self.batch_spec))


def _reshaped(tree: Any, shape: Callable[[tuple[int, ...]], tuple[int, ...]]) -> Any:
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(shape(x.shape), x.dtype), tree)


def _placed(x: Any, sharding: NamedSharding) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)
