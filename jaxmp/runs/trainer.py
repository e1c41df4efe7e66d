"""`Training`: the pieces of an experiment put together, ready to run."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from jaxmp.data.dataset import Split
from jaxmp.data.pipeline import Batches, evaluation_batches, nbytes, prepare
from jaxmp.data.source import Source
from jaxmp.errors import InputError, nearest
from jaxmp.instruments.memory import Memory, memory
from jaxmp.instruments.ranges import StepRanges, count_each, count_lost_updates, grad_and_module_counts
from jaxmp.modules.linen import Explanation, cast_to_param, explain
from jaxmp.scaling.transform import loss_scale, loss_scaling
from jaxmp.tasks.loss import init_model, make_loss
from jaxmp.training.batch import LossFn
from jaxmp.training.feed import NAN_LOSS, Feed, Resident, Streamed
from jaxmp.training.metrics import Mean, Metrics, merge, zeros_like
from jaxmp.training.parallel import AXIS, Devices
from jaxmp.training.state import TrainState
from jaxmp.training.step import TrainStep, make_eval_step, make_train_step
from jaxmp.trees import path_name

if TYPE_CHECKING:
    from jaxmp.experiment.experiment import Experiment


@dataclasses.dataclass(frozen=True)
class Training:
    """What an experiment trains with; every piece is made on first use, and each is usable alone."""

    experiment: Experiment
    mesh: Mesh | None = None
    """devices to build for, along an axis `data`, which need not be there; by default all there are"""

    @functools.cached_property
    def source(self) -> Source:
        """The training rows."""
        return self.experiment.data.source("train")

    @functools.cached_property
    def batches(self) -> Batches:
        """Which rows a step sees."""
        return Batches(examples=len(self.source), batch_size=self.experiment.data.batch_size, seed=self.experiment.seed)

    @functools.cached_property
    def steps(self) -> int:
        """Steps of the whole run."""
        loop = self.experiment.loop
        return loop.epochs * self.batches.per_epoch if loop.steps is None else loop.steps

    @functools.cached_property
    def devices(self) -> Devices:
        """The devices, those of all processes."""
        experiment, mesh = self.experiment, self.mesh
        return experiment.parallel.make(
            experiment.data.batch_size,
            experiment.loop.accumulate_steps,
            devices=None if mesh is None else list(mesh.devices.flat),
        )

    @functools.cached_property
    def tx(self) -> optax.GradientTransformationExtraArgs:
        """The optimizer under its loss scale."""
        return loss_scaling(self.experiment.optimizer.make(self.steps), self.experiment.make_scaler())

    @functools.cached_property
    def loss_fn(self) -> LossFn:
        """The training loss on one replica's share of a batch."""
        devices, together = self.devices, self.experiment.loop.batch_norm == "global"
        return self.make_loss(
            axis_name=devices.replicas().axis_name if together else None,
            rows=NamedSharding(devices.mesh, P(AXIS)) if devices.shard == "fsdp" else None,
        )

    def make_loss(self, **kwargs: Any) -> LossFn:
        """The loss of this model, task and precision; for `kwargs` see `jaxmp.make_loss`."""
        experiment, parallel = self.experiment, self.experiment.parallel
        return make_loss(
            experiment.model,
            experiment.task,
            experiment.policy,
            remat=parallel.remat,
            remat_policy=parallel.remat_policy,
            **kwargs,
        )

    @functools.cached_property
    def train_step(self) -> TrainStep:
        """The pure train step."""
        experiment = self.experiment
        replicas = self.devices.replicas(experiment.policy.reduce)
        return make_train_step(
            self.loss_fn,
            self.tx,
            ema_decay=experiment.loop.ema_decay,
            rounding=experiment.policy.rounding,
            accumulate_steps=experiment.loop.accumulate_steps,
            accumulate_overflow=experiment.loop.accumulate_overflow,
            replicas=replicas,
        )

    @functools.cached_property
    def example(self) -> dict[str, jax.ShapeDtypeStruct]:
        """Shapes and dtypes of a prepared training batch of the whole batch size."""
        size = self.batches.batch_size
        row = {**self.source[np.arange(1)], "weight": np.ones(1, np.float32)}
        raw = {
            name: jax.ShapeDtypeStruct((size, *column.shape[1:]), jax.dtypes.canonicalize_dtype(column.dtype))
            for name, column in row.items()
            if column.dtype.kind not in "OSU"
        }
        for name in self.columns:
            if name not in raw:
                raise InputError(self._no_numbers(name, row.get(name), sorted(raw)))
        return jax.eval_shape(prepare(self.experiment.data, train=True), raw, jax.random.key(0))

    def _no_numbers(self, name: str, column: np.ndarray | None, columns: list[str]) -> str:
        field, expected = ("inputs", "numbers") if name in self.experiment.task.inputs else ("target", "whole numbers")
        if column is None:
            return f"task.{field} names {name!r}; the data has {', '.join(columns)}{nearest(name, columns)}"
        first = column.ravel().tolist()[0]
        holds = "strings" if isinstance(first, str | bytes) else "objects that are no numbers"
        return f"task.{field} names {name!r}, which holds {holds} ({first!r:.40}, say); expected {expected}"

    @functools.cached_property
    def arguments(self) -> tuple[TrainState, dict[str, jax.ShapeDtypeStruct]]:
        """What the compiled step takes, abstractly: the state and a batch, each where it lies on the devices."""
        state = jax.eval_shape(self.init)
        if self.devices.mode == "pmap":
            count = self.devices.count
            state = _reshaped(state, lambda shape: (count, *shape))
            return state, _reshaped(self.example, lambda shape: (count, shape[0] // count, *shape[1:]))
        rows = NamedSharding(self.devices.mesh, P(AXIS))
        placed = jax.tree.map(_placed, state, self.devices.shardings(state))
        return placed, jax.tree.map(lambda x: _placed(x, rows), self.example)

    def memory(self) -> Memory:
        """What lies on each device during a step, predicted from shapes.

        Activations are those of a microbatch. The float32 sum of several microbatches' gradients is not among the
        gradients: what the compiler makes of it is in its temporaries.
        """
        state, parts = self.arguments[0], self.experiment.loop.accumulate_steps
        if self.devices.mode == "pmap":  # stacked, one a device
            state = _reshaped(state, lambda shape: shape[1:])
        share = _reshaped(self.example, lambda shape: (shape[0] // self.devices.count, *shape[1:]))
        loss_fn = self.make_loss()

        def loss(params: Any, batch: Any) -> Any:
            model_state = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), state.model_state)
            part = batch if parts == 1 else {name: x[: x.shape[0] // parts] for name, x in batch.items()}
            total, (weight, _, _) = loss_fn(params, model_state, part, jax.random.key(0))
            return total / weight

        fields = {field.name: getattr(state, field.name) for field in dataclasses.fields(state)}
        params, opt_state = fields.pop("params"), fields.pop("opt_state")
        return memory(loss, params, share, opt_state=opt_state, state=fields)

    @property
    def columns(self) -> list[str]:
        """The columns of the data that the task asks for."""
        task = self.experiment.task
        return [*task.inputs, *filter(None, [getattr(task, "target", None)])]

    def init(self) -> TrainState:
        """A fresh state, from the seed alone; each device makes its share of what is split."""
        experiment, devices = self.experiment, self.devices

        def init(key: jax.Array) -> TrainState:
            params_key, step_key = jax.random.split(key)
            params, model_state = init_model(experiment.model, experiment.task, self.example, params_key)
            params = cast_to_param(experiment.model, experiment.policy, params, *self._inputs)
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
    def _forward(self) -> tuple[Any, Metrics]:
        """The loss as a jaxpr, and the shapes of its metrics, traced once for both."""
        state = jax.eval_shape(self.init)
        loss_fn = self.make_loss()
        trace = jax.make_jaxpr(loss_fn, return_shape=True)
        jaxpr, (_, (_, metrics, _)) = trace(state.params, state.model_state, self.example, state.key)
        return jaxpr, metrics

    @property
    def no_metrics(self) -> Metrics:
        """Training metrics that have counted nothing."""
        scalar: Any = jax.ShapeDtypeStruct((), jnp.float32)
        mean = Mean(scalar, scalar)
        return zeros_like({"loss": mean, NAN_LOSS: mean, **self._forward[1]})

    @property
    def should_fuse_steps(self) -> bool:
        """Whether to run many steps in one dispatch: not where XLA:CPU would run a convolution's gradient in a loop.

        It does so naively (5 -> 228, 66 -> 915 and 59 -> 1236 ms a step for three small CNNs on 2 cores, JAX 0.12).
        """
        return jax.default_backend() != "cpu" or "conv_general_dilated" not in str(self._forward[0])

    def feed(self, *, many: bool) -> Feed:
        """What brings the batches to the step: from the device, or streamed where the set is too large for it."""
        data = self.experiment.data
        if nbytes(self.source) > data.device_limit * 2**20:
            return Streamed(self.train_step, data, self.source, self.batches, self.devices, self.steps)
        return Resident(self.train_step, data, self.source, self.batches, self.devices, many=many)

    def evaluate(self, state: TrainState, split: Split) -> Metrics:
        """The metrics of a whole split, exact over its smaller last batch; of the averaged weights where they are kept.

        Args:
          state: on these devices, as `Devices.get` gives it.
          split: its rows are taken in order.
        """
        params = state.params if state.ema is None else state.ema
        metrics = self.devices.whole({name: mean for name, mean in self.no_metrics.items() if name != NAN_LOSS})
        size = -(-self.experiment.data.eval_batch_size // self.devices.count) * self.devices.count
        for batch in evaluation_batches(self.experiment.data.source(split), size, self.devices.local_rows(size)):
            metrics = self._evaluation(params, state.model_state, metrics, self.devices.shard_local_rows(batch))
        return metrics

    def not_finite(self, state: TrainState, batch: dict[str, jax.Array], step: int, scale: float) -> str | None:
        """What is not finite in a step, repeated from `state` on its `batch`: the loss, or else gradients, by name.

        Args:
          state: the one before the step; what loss scale it holds does not matter.
          batch: of the step.
          step: its number, from 0.
          scale: the loss scale of the step.
        """
        if self.devices.several_processes:
            batch = self.devices.whole(batch)
        grads, loss = self._repeated(state, batch, step, scale)
        if not jnp.isfinite(loss):
            return f"the loss, which is {float(loss):g}"
        leaves = [
            path_name(path)
            for path, leaf in jax.tree_util.tree_leaves_with_path(grads)
            if jnp.issubdtype(leaf.dtype, jnp.inexact) and not jnp.all(jnp.isfinite(leaf))
        ]
        if not leaves:
            return None
        more = f" and {len(leaves) - 1} more" if leaves[1:] else ""
        return f"the gradient of {leaves[0]}{more} (loss {float(loss):g})"

    @functools.cached_property
    def _repeated(self) -> Any:
        loss_fn = self.make_loss()

        @jax.jit
        def repeated(state: TrainState, batch: dict[str, jax.Array], step: Any, scale: Any) -> Any:
            def scaled(params: Any) -> Any:
                total, (weight, _, _) = loss_fn(params, state.model_state, batch, jax.random.fold_in(state.key, step))
                loss = total / weight
                return loss * scale, loss

            return jax.grad(scaled, has_aux=True, allow_int=True)(state.params)

        return repeated

    def look(self, state: TrainState, batch: dict[str, jax.Array]) -> StepRanges:
        """Magnitudes of what the step from `state` on `batch` is made of, counted on the device and not waited for.

        Args:
          state: on these devices, as `Devices.get` gives it. It is not changed.
          batch: prepared, of the whole batch size.

        Returns:
          `parameters`, `gradients`, `scaled_gradients` and `updates` by the parameter's path, `outputs` and
          `output_gradients` (scaled) by the module's; and how many updates are lost in rounding the parameter to
          nearest.
        """
        return self._looking(state, self.devices.shard_rows(batch))

    @functools.cached_property
    def _looking(self) -> Any:
        loss_fn = self.make_loss()

        @jax.jit
        def looking(state: TrainState, batch: dict[str, jax.Array]) -> StepRanges:
            scale = loss_scale(state.opt_state)
            key = jax.random.fold_in(state.key, state.step)

            def scaled(params: Any) -> Any:
                total, (weight, _, _) = loss_fn(params, state.model_state, batch, key)
                loss = total / jnp.where(weight == 0, 1, weight)
                return loss * scale, loss

            grads, loss, modules = grad_and_module_counts(scaled, state.params)
            updates, _ = self.tx.update(grads, state.opt_state, state.params, value=loss)
            unscaled = jax.tree.map(lambda g: g / scale if jnp.issubdtype(g.dtype, jnp.floating) else g, grads)
            counted = {
                "parameters": count_each(state.params),
                "scaled_gradients": count_each(grads),
                "gradients": count_each(unscaled),
                "updates": count_each(updates),
                "outputs": {path: counts.outputs for path, counts in modules.items()},
                "output_gradients": {path: counts.gradients for path, counts in modules.items()},
            }
            return StepRanges.of(counted, count_lost_updates(state.params, updates))

        return looking

    def explain(self) -> Explanation:
        """Which policy each module of the model runs under. Raises InputError where a rule matches none."""
        return explain(self.experiment.model, self.experiment.policy, tuple(self._inputs))

    @property
    def _inputs(self) -> list[jax.ShapeDtypeStruct]:
        return [self.example[name] for name in self.experiment.task.inputs]

    @functools.cached_property
    def _evaluation(self) -> Any:
        experiment = self.experiment
        step = make_eval_step(make_loss(experiment.model, experiment.task, experiment.policy, train=False))
        prepared = prepare(experiment.data, train=False)

        @jax.jit
        def evaluation(params: Any, model_state: Any, metrics: Metrics, batch: Any) -> Metrics:
            return merge(metrics, step(params, model_state, prepared(batch, None)))

        return evaluation


def _reshaped(tree: Any, shape: Callable[[tuple[int, ...]], tuple[int, ...]]) -> Any:
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(shape(x.shape), x.dtype), tree)


def _placed(x: Any, sharding: NamedSharding) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)
