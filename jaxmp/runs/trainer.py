"""`Trainer`: the pieces of an experiment put together."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from jaxmp.data.dataset import Split
from jaxmp.data.fingerprint import fingerprint
from jaxmp.data.pipeline import Batches, batch_shapes, nbytes, prepared_ahead
from jaxmp.data.poisson import PoissonBatches
from jaxmp.data.source import Rows, Source
from jaxmp.distributed import processes
from jaxmp.errors import InputError, nearest
from jaxmp.experiment.experiment import Experiment
from jaxmp.instruments.block_ranges import BlockRanges, block_operands, make_block_ranges
from jaxmp.instruments.flops import BACKWARD, product_flops
from jaxmp.instruments.ranges import StepRanges, make_step_ranges
from jaxmp.modules.linen import (
    Explanation,
    UnderPolicy,
    cast_to_param,
    explain,
    init_delayed_scaling,
    module_classes,
    with_policy,
)
from jaxmp.modules.model import as_model
from jaxmp.scaling.transform import loss_scaling
from jaxmp.tasks.loss import init_model, make_loss
from jaxmp.tasks.samples import Samples, Sampling, Trained
from jaxmp.tasks.task import (
    Monitor,
    check_outputs,
    find_monitor,
    metric_specs,
    objective_metric_specs,
    objectives_of,
    sample,
)
from jaxmp.training.accountant import PrivateSteps
from jaxmp.training.batch import LossFn
from jaxmp.training.evaluation import Evaluation
from jaxmp.training.feed import HIDDEN_METRICS, DueSteps, Feed, Resident, Streamed, is_hidden, should_fuse_steps
from jaxmp.training.gradients import Gradients, make_gradients
from jaxmp.training.metrics import DROPPED_EXAMPLES, Mean, Metrics, MetricSpec, is_watched, zeros_like
from jaxmp.training.objective import Objective, ObjectiveSpec, due_at, trained_by_any, trained_view
from jaxmp.training.optimizers import Numbers, Optimizer, Private, decay_mask, make_optimizer, optimizer_numbers
from jaxmp.training.parallel import AXIS, Devices
from jaxmp.training.pruning import magnitude_pruning, pruned_weights, why_dense
from jaxmp.training.state import TrainState
from jaxmp.training.step import TrainStep, make_state_seen, make_train_step
from jaxmp.trees import by_path

SHOWN = 5
"""the most frozen parameters that are named"""

FAST_COMPILE = {"xla_backend_optimization_level": 1}
"""XLA's options for a program that runs once: a half to a third of the time to compile it, and the same bits"""

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
    _programs: dict[str, Any] = dataclasses.field(default_factory=dict, init=False, repr=False, compare=False)

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
            self._sources[split] = self._repeated() if self._overfits(split) else self.experiment.data.read(split)
        return self._sources[split]

    def _overfits(self, split: Split) -> bool:
        return split == "validation" and self.experiment.loop.overfit_batches is not None

    def _repeated(self) -> Rows:
        """The rows of `loop.overfit_batches`: those that every epoch trains on."""
        rows = self.batches.epoch_rows(0).ravel()[: self.batches.examples]
        return Rows(self.source(), np.unique(rows))

    def evaluated(self, split: Split) -> Source:
        """The rows of a split that are evaluated: all, or those of `loop.limit_batches`, spread evenly over the split.

        They are counted in training batches, so that `data.eval_batch_size` changes no metric but by rounding. Raises
        InputError as `source` does.
        """
        source, limit = self.source(split), self.experiment.loop.limit_batches
        most = len(source) if limit is None else limit * self.experiment.data.batch_size
        if most >= len(source):
            return source
        return Rows(source, np.arange(most, dtype=np.int64) * len(source) // most)

    def fingerprints(self, *, workers: int = 0) -> dict[str, Any]:
        """What the rows of each split are, as JSON; see `jaxmp.data.fingerprint`. `workers` processes read train."""
        readers = {"train": workers}
        return {split: fingerprint(self.source(split), workers=readers.get(split, 0)) for split in self.splits}

    @functools.cached_property
    def is_streamed(self) -> bool:
        """Whether the training split, as it would lie on the device, is larger than `data.device_limit`."""
        data = self.experiment.data
        return nbytes(self.source(), data.prepare_ahead) > data.device_limit * 2**20

    @functools.cached_property
    def batches(self) -> Batches:
        """Which rows each step sees."""
        data, loop, optimizer = self.experiment.data, self.experiment.loop, self.experiment.optimizer
        is_poisson = isinstance(optimizer, Private) and optimizer.sampling == "poisson"
        own = getattr(data, "batches", None)  # of a dataset that says which rows a step sees
        if own is not None and isinstance(optimizer, Private):
            raise InputError(
                f"{type(optimizer).__name__}: {type(data).__name__} says itself which rows a step sees, which the "
                "accountant does not know; expected an optimizer that is not private"
            )
        return (PoissonBatches if is_poisson else own or Batches)(
            examples=len(self.source()),
            batch_size=data.batch_size,
            seed=self.experiment.seed,
            limit=loop.limit_batches if loop.overfit_batches is None else loop.overfit_batches,
            repeat=loop.overfit_batches is not None,
        )

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
    def objectives(self) -> dict[str, ObjectiveSpec]:
        """What the task says of its several objectives, by name, in their order; {} if it has a single one."""
        return objectives_of(self.experiment.task)

    @functools.cached_property
    def objective(self) -> Objective | dict[str, Objective]:
        """What is trained, on one replica's share of a batch: one objective, or several by name."""
        experiment = self.experiment
        if not self.objectives:
            own, ema_decay = experiment.optimizer, experiment.loop.ema_decay
            private = own.privacy(self.batches.expected_rows) if isinstance(own, Private) else None
            tx = self._tx(None)
            return Objective(self.loss_fn(), tx, trains=experiment.trained, ema_decay=ema_decay, private=private)
        return {
            name: Objective(
                self.loss_fn(name),
                self._tx(name),
                trains=spec.trains,
                every=spec.every,
                ema_decay=experiment.loop.ema_decay if spec.ema_decay is None else spec.ema_decay,
            )
            for name, spec in self.objectives.items()
        }

    @functools.cached_property
    def module_classes(self) -> dict[str, frozenset[str]]:
        """The names of the class of each module and of its bases, by path."""
        return module_classes(self.experiment.adapted_model, *self.inputs)

    def _tx(self, name: str | None, numbers: Numbers | None = None) -> optax.GradientTransformation:
        """The optimizer of an objective inside its loss scaling, with `numbers` in place of its own."""
        experiment = self.experiment
        if name is None:
            optimizer, pruning = make_optimizer(experiment.optimizer, self.steps, numbers), experiment.pruning
            if pruning.share:
                optimizer = magnitude_pruning(optimizer, pruning, steps=self.steps, classes=self.module_classes)
            return loss_scaling(optimizer, experiment.make_scaler())
        optimizer = make_optimizer(experiment.optimizer_of(name), self._attempts(name), numbers)
        return loss_scaling(optimizer, experiment.make_scalers()[name])

    def _attempts(self, name: str | None) -> int:
        """How often an objective runs in the whole run."""
        return self.steps if name is None else -(-self.steps // self.objectives[name].every)

    @property
    def numbers(self) -> dict[str, dict[str, Any]]:
        """The third argument of `train_step` in training: for each objective, its optimizer's numbers and `ema_decay`.

        The single objective's name is "". Runs that differ in these values alone share one compiled program. XLA may
        round an argument otherwise than a constant, so that all that repeats a step of training passes them as it does.
        They are float32, also where parameters are float64: they then differ from the given ones by up to 1 in 2**24.
        """
        found = {}
        for name, of in self.by_name.items():
            own = self.experiment.optimizer if name is None else self.experiment.optimizer_of(name)
            average = {} if of.ema_decay is None else {"ema_decay": of.ema_decay}
            found[name or ""] = {**optimizer_numbers(own, self._attempts(name)), **average}
        return jax.tree.map(np.float32, found)

    def with_numbers(self, name: str | None, of: Objective, numbers: Any) -> Objective:
        """An objective with `numbers`, a tree like `self.numbers`, in place of its own; itself if that is None."""
        if numbers is None:
            return of
        own = dict(numbers[name or ""])
        ema_decay = own.pop("ema_decay", None)
        return dataclasses.replace(of, tx=self._tx(name, own) if own else of.tx, ema_decay=ema_decay)

    @property
    def by_name(self) -> dict[str | None, Objective]:
        """The objectives by name; that of a task with a single one has the name None."""
        if isinstance(self.objective, Objective):
            return {None: self.objective}
        return dict(self.objective.items())

    @functools.cached_property
    def replayed(self) -> dict[str | None, Objective]:
        """`by_name` on the whole batch in one program: for looking at a step again."""
        return {
            name: dataclasses.replace(of, loss_fn=self.make_loss(objective=name)) for name, of in self.by_name.items()
        }

    @property
    def is_private(self) -> bool:
        """Whether the optimizer hides each row of a batch."""
        return isinstance(self.experiment.optimizer, Private)

    def private_steps(self, steps: int, *, first: int = 0) -> PrivateSteps | None:
        """How the rows enter `steps` steps after the first `first`, for the accountant; None without privacy."""
        optimizer, batches = self.experiment.optimizer, self.batches
        if not isinstance(optimizer, Private):
            return None
        rate = batches.rate if isinstance(batches, PoissonBatches) else 0.0
        how = {"rate": rate, "per_epoch": batches.per_epoch, "first": first}
        return PrivateSteps(optimizer.sampling, optimizer.noise_multiplier, steps, **how)  # type: ignore[arg-type]

    def make_loss(self, **kwargs: Any) -> LossFn:
        """The loss of this model, task and precision; for `kwargs`, such as `objective`, see `jaxmp.make_loss`."""
        experiment, parallel = self.experiment, self.experiment.parallel
        remat = {"remat": parallel.remat, "remat_policy": parallel.remat_policy}
        return make_loss(experiment.adapted_model, experiment.task, experiment.policy, **{**remat, **kwargs})

    def loss_fn(self, objective: str | None = None) -> LossFn:
        """The training loss on one replica's share of a batch; of several objectives, that of one."""
        devices, together = self.devices, self.experiment.loop.batch_norm == "global"
        return self.make_loss(
            objective=objective,
            axis_name=devices.replicas().axis_name if together else None,
            replicas=devices.replicas().axis_name,
            # Of a private step, the loss sees one row at a time.
            rows=NamedSharding(devices.mesh, P(AXIS)) if devices.shard == "fsdp" and not self.is_private else None,
            zero_losses="zero_losses" in self.experiment.loop.watch,
        )

    @functools.cached_property
    def train_step(self) -> TrainStep:
        """The pure train step, on one replica's share of a batch: `(state, batch, numbers=None) -> (state, metrics)`.

        Training passes `self.numbers`, as arguments of its program. Without, they are constants.
        """
        return self._make_step(None)

    def _make_step(self, due: tuple[str, ...] | None) -> TrainStep:
        """The train step that runs the objectives `due`; None: those that are due by the state's own step."""
        experiment, several = self.experiment, {"order": self.order, "due": due} if self.objectives else {}

        def make(objectives: Any) -> TrainStep:
            return make_train_step(
                objectives,
                rounding=experiment.policy.rounding,
                accumulate_steps=experiment.loop.accumulate_steps,
                accumulate_overflow=experiment.loop.accumulate_overflow,
                replicas=self.devices.replicas(experiment.policy.reduce),
                norms=[name for name in experiment.loop.watch if name.endswith("_norm")],
                **several,  # type: ignore[arg-type]
            )

        with_constants = make(self.objective)

        def train_step(state: TrainState, batch: Any, numbers: Any = None) -> tuple[TrainState, Metrics]:
            if numbers is None:
                return with_constants(state, batch)
            own = {name: self.with_numbers(name, of, numbers) for name, of in self.by_name.items()}
            return make(own[None] if None in own else own)(state, batch)

        return train_step

    @property
    def order(self) -> str:
        """What each of several objectives sees, see `make_train_step`."""
        return getattr(self.experiment.task, "order", "in_turn")

    @functools.cached_property
    def due_steps(self) -> DueSteps | None:
        """The train steps of several objectives, for steps that are dispatched singly; None if there is a single one.

        Those that run in each step need no choice.
        """
        if all(spec.every == 1 for spec in self.objectives.values()):
            return None
        return DueSteps(functools.partial(due_at, self.objectives), self._make_step)

    def sample(self, state: TrainState, sampling: Sampling, *, seed: int = 0) -> Samples:
        """Draws texts or pictures from the weights that are evaluated, under the policy, as `task.sample` does.

        Args:
          state: whose weights; it is not changed.
          sampling: what is to be drawn.
          seed: seed of the draws, which depend on nothing else but the weights.

        Raises:
          InputError: the task has no `sample`, or it cannot draw that.
        """
        experiment, params = self.experiment, state.averaged_params
        if experiment.lora.rank:
            params = experiment.lora.merge(params)
        variables = {"params": params, **state.model_state}
        if processes.several() and self.devices.shard != "replicated":  # each of them reads all of what is drawn
            variables = jax.jit(lambda tree: tree, out_shardings=NamedSharding(self.devices.mesh, P()))(variables)
        trained = Trained(experiment.model, self._apply, variables, experiment.data)
        return sample(experiment.task, trained, jax.random.key(seed), sampling)

    @functools.cached_property
    def _apply(self) -> Callable[..., Any]:
        """`model.apply` under the policy: one function, so that what samples by it is compiled once."""
        return with_policy(self.experiment.model.apply, self.experiment.policy)

    def gradients(self, objective: str | None = None) -> Gradients:
        """The gradients of a step, on the whole batch in one program, compiled. For looking at a step again."""
        of, parts = self.replayed[objective], self.experiment.loop.accumulate_steps
        return self._compiled(
            f"gradients/{objective}",
            lambda: make_gradients(of.loss_fn, accumulate_steps=parts, trains=of.trains, private=of.private),
        )

    def state_seen(self, objective: str | None = None) -> Callable[[TrainState, Any], TrainState]:
        """`(state, batch) -> state` on a whole batch, compiled: the state that an objective sees in a step from there.

        That of a single one is the state itself.
        """
        if objective is None:
            return lambda state, batch: state
        several = {name: of for name, of in self.replayed.items() if name is not None}
        loop = self.experiment.loop

        def state_seen(state: TrainState, batch: Any, numbers: Any) -> TrainState:
            seen = make_state_seen(
                {name: self.with_numbers(name, of, numbers) for name, of in several.items()},
                objective,
                order=self.order,
                rounding=self.experiment.policy.rounding,
                accumulate_steps=loop.accumulate_steps,
                accumulate_overflow=loop.accumulate_overflow,
            )
            return seen(state, batch)

        compiled = self._compiled(f"state_seen/{objective}", lambda: state_seen)
        return functools.partial(compiled, numbers=self.numbers)

    def step_ranges(self, objective: str | None = None) -> Callable[[TrainState, Any], StepRanges]:
        """`(state, batch) -> StepRanges` of the step from that state on a whole batch, compiled.

        Of several objectives, those of one, from the state that `state_seen` gives.
        """
        of, parts = self.replayed[objective], self.experiment.loop.accumulate_steps

        def step_ranges(state: TrainState, batch: Any, numbers: Any) -> StepRanges:
            own, blocks = self.with_numbers(objective, of, numbers), self.block_ranges(objective)
            return make_step_ranges(own, name=objective, accumulate_steps=parts, blocks=blocks)(state, batch)

        compiled = self._compiled(f"ranges/{objective}", lambda: step_ranges)
        return functools.partial(compiled, numbers=self.numbers)

    def block_ranges(self, objective: str | None = None) -> Callable[..., BlockRanges] | None:
        """The function of `make_block_ranges`; None if the policy rounds nothing with scales."""
        if not any(block_operands(policy.recipe) for policy in self.experiment.policy.policies):
            return None
        of, parts = self.replayed[objective], self.experiment.loop.accumulate_steps
        return make_block_ranges(of.loss_fn, accumulate_steps=parts, trains=of.trains)

    def _compiled(self, name: str, make: Callable[[], Callable[..., Any]]) -> Any:
        """What `make` makes, jitted; made at the first call with this name."""
        if name not in self._programs:
            self._programs[name] = jax.jit(make())
        return self._programs[name]

    def due(self, step: int) -> tuple[str | None, ...]:
        """The names of the objectives that run at a step, counted from 0; (None,) of a single one."""
        return due_at(self.objectives, step) if self.objectives else (None,)

    @functools.cached_property
    def evaluation(self) -> Evaluation:
        """Evaluates states: `evaluation(state, source)`."""
        of_training = lambda name: is_hidden(name) or is_watched(name) or name == DROPPED_EXAMPLES  # noqa: E731
        own = {name: mean for name, mean in self.no_metrics.items() if not of_training(name)}
        experiment = self.experiment
        make = functools.partial(make_loss, experiment.adapted_model, experiment.task, experiment.policy, train=False)
        loss_fn = {name: make(objective=name) for name in self.objectives} or make()
        return Evaluation(loss_fn, experiment.data, self.devices, own)

    def feed(self, *, fuse: bool) -> Feed:
        """What brings batches to the step: from the device, or streamed if the training set is too large for it.

        Args:
          fuse: whether one dispatch may run many steps, see `fuse_steps`.
        """
        data, source = self.experiment.data, prepared_ahead(self.experiment.data, self.source())
        how: dict[str, Any] = {
            "skip_limit": self.experiment.loop.max_consecutive_skips,
            "numbers": self.numbers,
            "due_steps": self.due_steps,
        }
        if self.is_streamed:
            return Streamed(self.train_step, data, source, self.batches, self.devices, self.steps, **how)
        return Resident(self.train_step, data, source, self.batches, self.devices, fuse=fuse, **how)

    # State.

    def init(self) -> TrainState:
        """A fresh state, from the seed alone. Each device makes its own share of what is split."""
        devices, key = self.devices, jax.random.key(self.experiment.seed)
        is_whole = devices.shard == "replicated" and not devices.several_processes
        how: dict[str, Any] = {} if is_whole else {"out_shardings": devices.shardings(self.state_spec)}
        if not isinstance(key, jax.core.Tracer):  # JAX takes no such options within a trace, as of `jax.eval_shape`
            how["compiler_options"] = FAST_COMPILE
        return jax.jit(self._init, **how)(key)

    def _init(self, key: jax.Array) -> TrainState:
        experiment = self.experiment
        params_key, step_key = jax.random.split(key)
        params, model_state = init_model(experiment.adapted_model, experiment.task, self.batch_spec, params_key)
        params = cast_to_param(experiment.adapted_model, experiment.policy, params, *self.inputs)
        delayed = init_delayed_scaling(experiment.adapted_model, experiment.policy, *self.inputs)
        return TrainState.create(
            params,
            self.objective,
            key=step_key,
            model_state={**model_state, **delayed},
            rounding=experiment.policy.rounding,
        )

    @functools.cached_property
    def state_spec(self) -> TrainState:
        """Shapes and dtypes of the state."""
        return jax.eval_shape(self._init, jax.eval_shape(jax.random.key, 0))

    # What can be known without running a step.

    @functools.cached_property
    def trained_spec(self) -> Any:
        """Shapes and dtypes of the parameters, with None in place of those that nothing trains."""
        return trained_by_any(self.state_spec.params, [of.trains for of in self.by_name.values()])

    @property
    def parameter_counts(self) -> dict[str, int]:
        """The number of `parameters`, and of `trained_parameters` where some are frozen."""
        trees = self.state_spec.params, self.trained_spec
        counts = [sum(leaf.size for leaf in jax.tree.leaves(tree)) for tree in trees]
        return {"parameters": counts[0]} | ({"trained_parameters": counts[1]} if counts[0] != counts[1] else {})

    def frozen(self) -> Iterator[str]:
        """Says which parameters nothing trains, and where weight decay finds nothing trained to shrink."""
        whole, trained = by_path(self.state_spec.params), by_path(self.trained_spec)
        frozen = [path for path in whole if path not in trained]
        if frozen:
            more = f" and {len(frozen) - SHOWN} more" if len(frozen) > SHOWN else ""
            size = sum(whole[path].size for path in frozen)
            yield f"not trained: {size:,} of the parameters, {', '.join(frozen[:SHOWN])}{more}"
        for name, of in self.by_name.items():
            optimizer = self.experiment.optimizer if name is None else self.experiment.optimizer_of(name)
            if not isinstance(optimizer, Optimizer) or not optimizer.weight_decay:
                continue
            own = trained_view(self.state_spec.params, of.trains)
            if not any(jax.tree.leaves(decay_mask(own, patterns=optimizer.decay))):
                whose = "" if name is None else f" of {name}"
                yield f"weight decay{whose}: no trained parameter matches {' or '.join(optimizer.decay)}"

    def pruned(self) -> Iterator[str]:
        """Says which parameters are pruned, and why each of the others stays dense."""
        pruning, view = self.experiment.pruning, self.trained_spec
        if not pruning.share:
            return
        chosen = pruned_weights(pruning, view, self.module_classes)
        size = sum(leaf.size for leaf in chosen.values())
        schedule = pruning.schedule(self.steps)
        when = f"in step {schedule[0][0] + 1:,}" + (f" to {schedule[-1][0] + 1:,}" if len(schedule) > 1 else "")
        yield f"pruned to {pruning.share:.2%} {when}: {size:,} of the parameters, {', '.join(chosen)}"
        trained = by_path(view)
        dense = [
            f"{name} ({why})"
            for name in by_path(self.state_spec.params)
            if (why := why_dense(pruning, name, trained.get(name), self.module_classes))
        ]
        if dense:
            yield f"not pruned: {', '.join(dense)}"

    @functools.cached_property
    def outputs(self) -> Any:
        """Shapes and dtypes of what the model returns for a whole batch, in evaluation."""
        model, state = (
            as_model(self.experiment.adapted_model).under(UnderPolicy(self.experiment.policy)),
            self.state_spec,
        )
        apply = functools.partial(jax.eval_shape, lambda key, *args: model.apply(*args, key=key)[0])
        return apply(state.key, state.params, state.model_state, *self.inputs)

    @functools.cached_property
    def metric_specs(self) -> dict[str, MetricSpec]:
        """The spec of each metric, the loss first. Raises InputError if what the task declares does not fit."""
        returned = {name: traced.metrics for name, traced in self._forward.items()}
        if not self.objectives:
            return metric_specs(self.experiment.task, returned[None])
        return objective_metric_specs(self.experiment.task, {str(name): of for name, of in returned.items()})

    @functools.cached_property
    def monitor(self) -> Monitor:
        """The metric by which the best weights are chosen, and whether more or less of it is better."""
        loop = self.experiment.loop
        return find_monitor(self.experiment.task, self.metric_specs, loop.monitor, loop.mode)

    @functools.cached_property
    def _forward(self) -> dict[str | None, _Traced]:
        """The loss of each objective as a jaxpr, and the shapes of its metrics, traced once for both."""
        check_outputs(self.experiment.task, self.outputs, self.batch_spec)
        state, found = self.state_spec, {}
        for name in self.objectives or (None,):
            trace = jax.make_jaxpr(self.make_loss(objective=name), return_shape=True)
            jaxpr, (_, (_, metrics, _)) = trace(state.params, state.model_state, self.batch_spec, state.key)
            found[name] = _Traced(jaxpr, metrics)
        return found

    @functools.cached_property
    def step_flops(self) -> dict[str, float]:
        """The FLOPs of a step's products and convolutions by `arithmetic`: of the loss, and twice as many backward.

        Of several objectives, the mean of a step. The update, and all that is no product, does not count. {} where not
        every product has a backward pass, so that their number is not known without tracing the gradient: a parameter
        is frozen, an objective trains a part alone, or the task has a teacher.
        """
        whole = len(jax.tree.leaves(self.state_spec.params))
        views = [trained_view(self.state_spec.params, of.trains) for of in self.by_name.values()]
        task = self.experiment.task
        has_teacher = getattr(task, "teacher", None) is not None and getattr(task, "teacher_weight", True)
        if has_teacher or any(len(jax.tree.leaves(view)) < whole for view in views):
            return {}
        found: dict[str, float] = {}
        for name, traced in self._forward.items():
            every = 1 if name is None else self.objectives[name].every
            for kind, flops in product_flops(traced.jaxpr).items():
                found[kind] = found.get(kind, 0.0) + (1 + BACKWARD) * flops / every
        return found

    @property
    def no_metrics(self) -> Metrics:
        """Training metrics that have counted nothing."""
        scalar: Any = jax.ShapeDtypeStruct((), jnp.float32)
        mean = Mean(scalar, scalar)
        found: Metrics = {}
        for name, traced in self._forward.items():
            above, after = ("", "") if name is None else (f"{name}/", f"/{name}")
            found |= {f"{above}{metric}": of for metric, of in {"loss": mean, **traced.metrics}.items()}
            found |= {f"{above}{watched}": mean for watched in self.experiment.loop.watch}
            found |= {DROPPED_EXAMPLES: mean} if self.is_private else {}
            found |= {f"{hidden}{after}": mean for hidden in HIDDEN_METRICS}
        return zeros_like(found)

    @property
    def learning_rates(self) -> dict[str | None, Callable[[Any, Any], Any]]:
        """The learning rate of each objective, where it is known: `(applied steps, its numbers) -> rate`."""
        found: dict[str | None, Callable[[Any, Any], Any]] = {}
        for name in self.objectives or (None,):
            optimizer = self.experiment.optimizer if name is None else self.experiment.optimizer_of(name)
            if isinstance(optimizer, Optimizer):
                found[name] = functools.partial(_rate, optimizer, self._attempts(name))
        return found

    @property
    def fuse_steps(self) -> bool:
        """Whether one dispatch should run many steps."""
        return all(should_fuse_steps(traced.jaxpr) for traced in self._forward.values())

    def explain(self) -> Explanation:
        """Which policy each module of the model runs under. Raises InputError if a rule matches none."""
        return explain(self.experiment.adapted_model, self.experiment.policy, tuple(self.inputs))

    @property
    def inputs(self) -> list[jax.ShapeDtypeStruct]:
        """Shapes and dtypes of the model's inputs, in a whole batch."""
        return [self.batch_spec[name] for name in self.experiment.task.inputs]

    def program(self) -> tuple[Any, tuple[Any, Any, Any]]:
        """The jitted train step, and its abstract arguments (state, batch, numbers) as they lie on the devices.

        `step.lower(*arguments)` compiles it without data, for devices that need not exist.
        """
        step: Any = self.devices.compile(self.train_step, (0, 0, 0))
        numbers = jax.tree.map(lambda x: jax.ShapeDtypeStruct((), x.dtype), self.numbers)
        if self.devices.mode == "pmap":
            count = self.devices.count
            state, numbers = _reshaped((self.state_spec, numbers), lambda shape: (count, *shape))
            batch = _reshaped(self.batch_spec, lambda shape: (count, shape[0] // count, *shape[1:]))
            return step, (state, batch, numbers)
        rows, whole = NamedSharding(self.devices.mesh, P(AXIS)), NamedSharding(self.devices.mesh, P())
        state = jax.tree.map(_placed, self.state_spec, self.devices.shardings(self.state_spec))
        batch = jax.tree.map(lambda x: _placed(x, rows), self.batch_spec)
        return step, (state, batch, jax.tree.map(lambda x: _placed(x, whole), numbers))


def _rate(optimizer: Optimizer, steps: int, applied: Any, numbers: Any) -> Any:
    return optimizer.rate_of(steps, numbers)(applied)


class _Traced(NamedTuple):
    """A loss, as it was traced."""

    jaxpr: Any
    metrics: Metrics
    """shapes of its metrics"""


def _reshaped(tree: Any, shape: Callable[[tuple[int, ...]], tuple[int, ...]]) -> Any:
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(shape(x.shape), x.dtype), tree)


def _placed(x: Any, sharding: NamedSharding) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)
