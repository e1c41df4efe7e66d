"""`Experiment`: everything that a run is made from, as one value."""

from __future__ import annotations

import dataclasses
import functools
import numbers
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import jax
import optax

from jaxmp.data.dataset import Dataset
from jaxmp.data.splits import Balanced
from jaxmp.data.tfds import TFDS
from jaxmp.data.transforms import function_name
from jaxmp.errors import InputError, nearest
from jaxmp.experiment.canonical import canonical
from jaxmp.experiment.identity import identity_hash
from jaxmp.experiment.settings import Loop, Parallel
from jaxmp.html.elements import Elements, shortened
from jaxmp.modules.lora import ADAPTERS, LoRA
from jaxmp.modules.model import as_model
from jaxmp.precision.policy_tree import PolicyTree
from jaxmp.scaling.scalers import NoScaler, Scaler, Scaling, StaticScaler
from jaxmp.tasks.classification import Classification
from jaxmp.tasks.function import as_task
from jaxmp.tasks.task import objectives_of, refuse_several
from jaxmp.training.objective import EVERYTHING, check_trains
from jaxmp.training.optimizers import Adam, Private, is_optimizer
from jaxmp.training.privacy import PRIVATE_SCALE
from jaxmp.training.pruning import Pruning


@dataclass(frozen=True)
class Experiment:
    """A run before it runs: the model, its data, how it is trained, and in which precision.

    It holds the objects themselves (a Flax module, frozen dataclasses), not their names. What can be known to be wrong
    without data or devices is refused here, with an InputError.
    """

    model: Any
    """Flax Linen module to train."""
    data: Any = TFDS()
    """Dataset: TFDS, Arrays or your own, with its batch size and how its rows are prepared."""
    task: Any = Classification()
    """How a batch is fed to the model, and how its outputs become a loss and metrics: a Task, or a function of
    (outputs, batch)."""
    optimizer: Any = Adam()
    """Optimizer: SGD, Adam, AdamW, LAMB, Lion, DPSGD, DPAdam, or any optax transformation; of several objectives, a
    mapping by name, or one for all of them."""
    precision: str = "mixed_float16"
    """Dtypes of weights, computation and outputs: float32, mixed_bfloat16, mixed_float16 or p=f32,c=bf16,o=f32.
    Rules for single modules go before one of these: head=float32; @LayerNorm=float32; mixed_float16."""
    scaler: Any = Scaling()
    """Loss scaling, which keeps small gradients from becoming 0 in float16; by objective, where it differs."""
    trains: tuple[str, ...] = EVERYTHING
    """Parameters to train, the others are frozen: patterns of paths, such as head or **/bias, or of modules. With LoRA,
    those to train beside the adapters; by default none."""
    lora: LoRA = LoRA()
    """Adapters of low rank, which are trained in place of the model's weights."""
    pruning: Pruning = Pruning()
    """Magnitude pruning: which weights become zero while the others train, and when."""
    parallel: Parallel = Parallel()
    """How a step is distributed over devices: it changes the last digits, and no run's hash."""
    loop: Loop = Loop()
    """How long to train, and when to evaluate, save and stop."""
    seed: int = dataclasses.field(default=0, metadata={"identity": "apart"})
    """Seed of the initial weights, the order of the data and all random draws; no part of the run's hash."""

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if isinstance(value, type):
                raise InputError(
                    f"{field.name} = {value.__qualname__}: expected an instance, {value.__qualname__}(...)"
                )
        object.__setattr__(self, "task", as_task(self.task))
        in_32_bits = isinstance(self.seed, numbers.Integral) and 0 <= self.seed < 2**32
        self._require("model", _has(self.model, "init", "apply"), "a Flax Linen module; of NNX, jaxmp.from_nnx(make)")
        self._require("data", isinstance(self.data, Dataset), "TFDS(name=...), Arrays(load), or a Dataset of your own")
        self._require(
            "task",
            _has(self.task, "__call__") and hasattr(self.task, "inputs"),
            "Classification(), say, or a function of (outputs, batch)",
        )
        names = list(objectives_of(self.task))
        check_trains(self.trains, "trains")
        if names and self.trains != EVERYTHING:
            raise InputError(
                f"trains = {self.trains!r}: the objectives of {type(self.task).__name__} say what each of them trains; "
                "expected no trains beside them"
            )
        expected = (
            "Adam(1e-3) or another of jaxmp's, an optax transformation, a function of the number of steps that returns "
            "one, or a frozen dataclass of your own with such a make(steps)"
        )
        self._require("lora", isinstance(self.lora, LoRA), "LoRA(rank=8), say")
        if self.lora.rank and names:
            raise InputError(
                f"lora.rank = {self.lora.rank}: the objectives of {type(self.task).__name__} say what each of them "
                "trains; expected 0, no adapters"
            )
        self._require("pruning", isinstance(self.pruning, Pruning), "Pruning(0.9), say")
        for beside, there in (("the task has several objectives", bool(names)), ("lora.rank is set", self.lora.rank)):
            if self.pruning.share and there:
                raise InputError(
                    f"pruning.sparsity = {self.pruning.share:g}: {beside}, and pruning is of a model that one "
                    "objective trains as a whole; expected 0, nothing pruned"
                )
        _ = self.adapted_model  # refuses a model without modules
        for part, optimizer in self._by_objective("optimizer", names):
            _require_part(part, optimizer, is_optimizer(optimizer), expected)
        self._require("precision", isinstance(self.precision, str), "a string; of a policy, str(policy)")
        for part, scaler in self._by_objective("scaler", names):
            is_scaler = isinstance(scaler, Scaling) or _has(scaler, "init", "update")
            _require_part(part, scaler, is_scaler, "Scaling('dynamic'), say, or a scaler such as DynamicScaler()")
        self._require("parallel", isinstance(self.parallel, Parallel), "Parallel('jit'), say")
        self._require("loop", isinstance(self.loop, Loop), "Loop(epochs=3), say")
        self._require("seed", in_32_bits, "a whole number, 0 or more and below 2**32")
        object.__setattr__(self, "seed", int(self.seed))  # of NumPy's integers too
        if self.parallel.shard == "fsdp" and self.loop.batch_norm == "replica":
            raise InputError("loop.batch_norm=replica: with parallel.shard=fsdp there is one program for all devices")
        for policy in self.policy.policies:
            dtypes = (policy.param_dtype, policy.compute_dtype, policy.output_dtype)
            if any(jax.dtypes.canonicalize_dtype(dtype) != dtype for dtype in dtypes):
                raise InputError(
                    f"precision {policy}: JAX has float64 only where JAX_ENABLE_X64=1 is in the environment"
                )

        self._check_private(names)

    def _check_private(self, names: list[str]) -> None:
        """Refuses what would let a row enter a private step without clipping and noise."""
        private = [part for part, optimizer in self._by_objective("optimizer", names) if isinstance(optimizer, Private)]
        if not private:
            return
        what = f"{private[0]} = {type(self.optimizer).__name__}"
        if names:
            raise InputError(
                f"{private[0]}: {type(self.task).__name__} has several objectives, each of which would have to be "
                "accounted for; expected an optimizer that is not private, or a task with one objective"
            )
        teacher, weight = getattr(self.task, "teacher", None), getattr(self.task, "teacher_weight", 1.0)
        if teacher is not None and weight:
            raise InputError(
                f"{what} with task.teacher: what the teacher tells of its own training rows is not accounted for; "
                "expected a task without a teacher, or task.teacher_weight 0"
            )
        if mixup := getattr(self.task, "mixup", 0):
            raise InputError(
                f"{what} with task.mixup = {mixup}: mixup makes one row of two, which are then clipped as one; "
                "expected 0"
            )
        if any(isinstance(cut, Balanced) for cut in _cuts(self.data)):
            raise InputError(
                f"{what} with jaxmp.balanced data: copies of a row would count as rows of their own, and epsilon would "
                "be too small; expected data that are not balanced"
            )
        made = self.make_scaler()
        if not isinstance(made, NoScaler | StaticScaler):
            raise InputError(
                f"{what} with a {type(made).__name__}: a loss scale that reacts to overflows remembers single rows "
                "without noise; expected scaler.kind auto (static in float16), static or none"
            )
        if any(policy.recipe is not None for policy in self.policy.policies):
            raise InputError(
                f"{what} with precision {self.precision}: the scales of a recipe's formats are taken over all rows of "
                "a batch, which mixes them without noise; expected a precision without a recipe"
            )
        if self.loop.accumulate_overflow != "window":
            raise InputError(
                f"{what} with loop.accumulate_overflow={self.loop.accumulate_overflow}: a private step leaves out the "
                "rows that overflow, never a microbatch; expected window"
            )

    def _require(self, name: str, holds: bool, expected: str) -> None:
        _require_part(name, getattr(self, name), holds, expected)

    def _by_objective(self, field: str, names: list[str]) -> list[tuple[str, Any]]:
        """The values of `optimizer` or `scaler`, each with its path. Raises InputError for one of no objective."""
        value, kind = getattr(self, field), type(self.task).__name__
        if not isinstance(value, Mapping):
            return [(field, value)]
        if not names:
            raise InputError(
                f"{field} has values for {', '.join(map(str, value))}: {kind} has a single objective; expected one "
                f"{field}, or a task that names its `objectives`"
            )
        for name in value:
            if name not in names:
                raise InputError(
                    f"{field}[{name!r}]: {kind} has no such objective; there are {', '.join(names)}"
                    f"{nearest(str(name), names)}"
                )
        for name in names:
            if name not in value:
                raise InputError(f"{field} has nothing for the objective {name!r}; expected {', '.join(names)}")
        return [(f"{field}[{name!r}]", of) for name, of in value.items()]

    @functools.cached_property
    def policy(self) -> PolicyTree:
        """The policies that `precision` names: one, or a tree of rules."""
        return PolicyTree.parse(self.precision)

    @property
    def adapted_model(self) -> Any:
        """The model that is trained: with the adapters of `lora`; `model` itself where there are none."""
        return as_model(self.model).under(self.lora) if self.lora.rank else self.model

    @property
    def trained(self) -> tuple[str, ...]:
        """Patterns of the parameters that are trained: `trains`; with LoRA the adapters, and what that names beside."""
        if not self.lora.rank:
            return self.trains
        return ADAPTERS if self.trains == EVERYTHING else (*ADAPTERS, *self.trains)

    def optimizer_of(self, objective: str) -> Any:
        """The optimizer of one of several objectives."""
        return self.optimizer[objective] if isinstance(self.optimizer, Mapping) else self.optimizer

    def make_scaler(self) -> Scaler:
        """The scaler that `scaler` says, for this precision; or `scaler` itself where it is one.

        Raises: InputError if the task has several objectives, which have a scaler each: `make_scalers`.
        """
        refuse_several(self.task, "Experiment.make_scaler")
        return self._make_scaler(self.scaler)

    def make_scalers(self) -> dict[str, Scaler]:
        """The scaler of each of several objectives, by name; {} if there is a single one."""
        names, scaler = objectives_of(self.task), self.scaler
        return {name: self._make_scaler(scaler[name] if isinstance(scaler, Mapping) else scaler) for name in names}

    def scaler_of(self, objective: str | None) -> Scaler:
        """The scaler of one of several objectives; None names the single one."""
        return self.make_scaler() if objective is None else self.make_scalers()[objective]

    def _make_scaler(self, scaler: Any) -> Scaler:
        if not isinstance(scaler, Scaling):
            return scaler
        if scaler.kind == "auto" and isinstance(self.optimizer, Private) and self.policy.wants_scaling:
            given = scaler.init_scale != Scaling.init_scale
            return StaticScaler(scaler.init_scale if given else PRIVATE_SCALE)
        return scaler.make(self.policy)

    def to_json(self) -> dict[str, Any]:
        """The experiment as JSON, the same in every process; see `jaxmp.experiment.canonical`.

        Of several objectives, `objectives` says what the task names, in their order.

        Raises: InputError for a value without an identity of its own, with its path.
        """
        fields = {field.name: canonical(getattr(self, field.name), field.name) for field in dataclasses.fields(self)}
        objectives = objectives_of(self.task)
        if not objectives:
            return fields
        specs = [
            {"name": name, "trains": list(spec.trains), "every": spec.every}
            | ({} if spec.ema_decay is None else {"ema_decay": spec.ema_decay})
            | ({} if spec.method is None else {"method": spec.method})
            for name, spec in objectives.items()
        ]
        return fields | {"objectives": {"order": getattr(self.task, "order", "in_turn"), "of": specs}}

    def _repr_html_(self) -> str:
        """Shows the parts in a notebook, each with what differs from its defaults."""
        rows = [(field.name, in_words(getattr(self, field.name))) for field in dataclasses.fields(self)]
        found = Elements()
        found.table(("part", "what differs from its defaults"), rows)
        return found.cell()

    @property
    def hash(self) -> str:
        """12 hexadecimal digits that name the run's folder: of the fields that decide and choose, see `identity`."""
        return identity_hash(self)


def in_words(value: Any) -> str:
    """A part of an experiment in one line: its class, and the fields that differ from their defaults."""
    if isinstance(value, type) or not dataclasses.is_dataclass(value):
        if isinstance(value, str):
            return value
        if isinstance(value, Mapping):
            return ", ".join(f"{name}: {in_words(of)}" for name, of in value.items())
        if isinstance(value, tuple) and not hasattr(value, "_fields"):
            return f"({', '.join(map(in_words, value))}{',' if len(value) == 1 else ''})"
        if isinstance(value, optax.GradientTransformation):
            made = getattr(value.update, "__qualname__", "update").partition(".")[0]
            return f"optax transformation ({made})"
        named = callable(value) and (hasattr(value, "__qualname__") or hasattr(value, "__wrapped__"))
        return function_name(value) if named else shortened(repr(value), 60)
    changed = []
    for field in dataclasses.fields(value):
        if not field.init or field.name in ("parent", "name"):
            continue
        default = field.default if field.default_factory is dataclasses.MISSING else field.default_factory()
        of = getattr(value, field.name, None)
        if of is not default and not (type(of) is type(default) and of == default):
            changed.append(f"{field.name}={in_words(of)}")
    return f"{type(value).__name__}({', '.join(changed)})"


def _cuts(data: Dataset) -> tuple[Any, ...]:
    """The cuts of a dataset, and of the rows that it is made of."""
    rows = getattr(data, "rows", None)
    return (*data.cuts, *(_cuts(rows) if isinstance(rows, Dataset) else ()))


def _has(part: Any, *methods: str) -> bool:
    return all(callable(getattr(part, name, None)) for name in methods)


def _require_part(path: str, value: Any, holds: bool, expected: str) -> None:
    if not holds:
        text = repr(value)
        raise InputError(f"{path} = {text if len(text) <= 60 else f'{text[:57]}...'}: expected {expected}")
