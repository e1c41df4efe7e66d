"""`blame`: what overflowed in a step of a run, and what would have prevented it.

The step is repeated as it was (see runs/replay.py), with the gradient that training takes; if a batch was spread over
devices, the replicas are repeated side by side on one.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple, overload

import jax
import jax.numpy as jnp
import numpy as np

from jaxmp.errors import InputError
from jaxmp.html.elements import cell_of
from jaxmp.instruments import nonfinite
from jaxmp.instruments.block_ranges import OperandBlocks
from jaxmp.instruments.gradient_error import relative_error
from jaxmp.instruments.nonfinite import AS_WRITTEN, Blame, Replay
from jaxmp.modules.linen import ModulePolicy, UnderPolicy
from jaxmp.modules.model import as_model
from jaxmp.precision.blocks import BlockFormat, quantize
from jaxmp.precision.formats import Format, parse_format
from jaxmp.precision.policy import Policy
from jaxmp.precision.recipe import Delayed
from jaxmp.runs.replay import Past, PastStep
from jaxmp.runs.run import Run
from jaxmp.runs.trainer import Trainer
from jaxmp.studies.subject import require_call
from jaxmp.text_table import table
from jaxmp.training.gradients import make_gradients
from jaxmp.training.objective import objective_key
from jaxmp.training.parallel import AXIS, Replicas, single
from jaxmp.trees import is_castable, path_name

SMALLEST_SCALE = -24
"""base 2 logarithm of the smallest loss scale that is tried"""
MOST_RULES = 12
"""largest number of rules that are tried; each costs a replay of the step"""
MOST_CLIPPED = 3
"""largest number of operands with clipped blocks that are shown"""
UNDERFLOW = 0.01
"""A gradient is reported if at least this share of it is 0 here and not in float32. Underflow loses the same numbers in
every step, unlike rounding errors, which change sign."""
DRAWS = 4
EXCESS = 8
"""A value is reported if its error is above `EXCESS` times a reference error: the largest in `DRAWS` float32 runs whose
weights and inputs were rounded once, stochastically.

That one rounding is the least that a format does, and its effect says how well conditioned the value is: how much of it
cancels, and how near activations are to where a ReLU or a maximum switches. A policy rounds results and cotangents
too, about six errors of that size where there were two, independent of each other: 1.7 times as much together. Where
a few of them switch a maximum the error is larger: 5.8 times at most, in three steps of our configs (a bias of
digits_cnn, in a batch of 28)."""


class Deviation(NamedTuple):
    """How far a value of a step is from its value in float32 on the same batch."""

    module: str
    """path of the module; "" for the model itself"""
    what: str
    """`output`, or `gradient of kernel`"""
    error: float
    """norm of the difference over the norm in float32"""
    threshold: float
    """the error above which it is reported"""
    underflow: float
    """share of the numbers that are not 0 in float32 and are 0 here"""

    @property
    def excess(self) -> bool:
        """Whether the error is larger than rounding explains."""
        return not self.error <= self.threshold or self.underflow > UNDERFLOW

    def __str__(self) -> str:
        lost = f", {self.underflow:.2%} of it underflow to 0" if self.underflow else ""
        return f"{self.what} of {self.module or 'the model'}: relative error {self.error:.2g} (expected up to " + (
            f"{self.threshold:.2g}){lost}"
        )


@dataclasses.dataclass(frozen=True)
class StepBlame:
    """What went wrong in one step of a run. `str()` gives a table, `to_json` the same for programs."""

    run: str
    """the run folder"""
    step: int
    """the step, counted from 1"""
    precision: str
    """the run's precision"""
    scale: float
    """the loss scale of the step"""
    found: Blame | None
    """the first non-finite value; None if all values are finite"""
    module: str = ""
    """path of the module that computed `found`; "" if it is the model's own code"""
    passing_scale: float | None = None
    """the largest power of two that keeps the step finite as loss scale; None if there is none, or none was tried"""
    rule: str | None = None
    """the run's precision with one more rule, which prevents it; None if no single rule does"""
    float32_helps: bool | None = None
    """whether float32 for the whole model prevents it; None if that was not tried"""
    objective: str | None = None
    """which of several objectives the step is of; None for a single one"""
    deviations: tuple[Deviation, ...] = ()
    """if all values are finite: outputs from the first module on, then gradients from the last module back"""
    blocks: tuple[OperandBlocks, ...] = ()
    """under a recipe, the operands with a block that is clipped, or that holds an infinity or NaN: of the forward
    products from the first layer on, then of the gradients from the last layer back"""

    @property
    def worst(self) -> Deviation | None:
        """The first value whose error is larger than rounding explains."""
        return next((each for each in self.deviations if each.excess), None)

    def to_json(self) -> dict[str, Any]:
        """Returns the fields as dicts, lists, strings and numbers."""
        fields = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        found = None if self.found is None else self.found.to_json()
        return fields | {
            "found": found,
            "deviations": [each._asdict() | {"excess": each.excess} for each in self.deviations],
            "blocks": [each.to_json() for each in self.blocks],
        }

    def __str__(self) -> str:
        return table(self._rows(), widths=(10,))

    def _repr_html_(self) -> str:
        """Shows the same in a notebook."""
        return cell_of([str(self)])

    def _rows(self) -> Iterator[tuple[str, str]]:
        yield "step", f"{self.step} of {self.run}"
        if self.objective is not None:
            yield "objective", self.objective
        yield "precision", f"{self.precision}, loss scale {self.scale:g}"
        if self.found is None:
            yield from self._finite_rows()
            yield from self._block_rows()
            return
        yield from self.found.rows()
        if self.found.backward and self.scale != 1:
            yield (
                "scaled",
                f"in the backward pass, all values are {self.scale:g} times as large: the loss scale is jaxmp's",
            )
        if self.found.primitive != "argument":
            yield "module", self.module or "none: the model's own code, or the cast of its input or output"
            yield "scale", self._scale_says()
        yield "rule", self._rule_says()
        yield from self._block_rows()

    def _block_rows(self) -> Iterator[tuple[str, str]]:
        """The first block that is not finite, and the operands of which most is clipped."""
        bad = next((each for each in self.blocks if each.scales.nan), None)
        if bad is not None:
            where = "" if bad.first_nonfinite is None else f", the first is {bad.first_nonfinite}"
            count = f"{bad.scales.nan:,} of {bad.blocks:,} blocks of {bad.format} hold inf or NaN"
            yield "block", f"{bad.name}: {count}{where}"
        clipped = sorted((each for each in self.blocks if each.clipped), key=lambda each: -each.clipped / each.numbers)
        for each in clipped[:MOST_CLIPPED]:
            where = "" if each.first_clipped is None else f", the first is {each.first_clipped}"
            yield "clipped", f"{each.name}: {each.clipped / each.numbers:.2%} of {each.format}{where}"

    def _scale_says(self) -> str:
        if self.passing_scale is not None:
            return f"the step is finite with a loss scale of {self.passing_scale:g} at most (replayed)"
        if self.found and not self.found.backward and not self.found.note:
            return "no loss scale prevents it: this is before the loss is scaled"
        return f"no loss scale down to 2^{SMALLEST_SCALE} prevents it (replayed)"

    def _rule_says(self) -> str:
        if self.rule is not None:
            return f'--precision "{self.rule}" prevents it (replayed)'
        if self.float32_helps is None:
            return "none was looked for: the value was given, not computed"
        if self.float32_helps:
            return "no single rule prevents it; --precision float32 does (replayed)"
        return (
            "none: with --precision float32 the step is not finite either (replayed), so it is no matter of precision"
        )

    def _finite_rows(self) -> Iterator[tuple[str, str]]:
        yield "first", "all values that reach the loss and the gradients are finite"
        if not self.deviations:
            return
        if self.worst:
            yield "float32", f"beside float32 on the same batch, the first that is worse than rounding: {self.worst}"
        else:
            largest = max(self.deviations, key=lambda each: each.error / each.threshold)
            yield "float32", f"beside float32 on the same batch, nothing is worse than rounding; most is the {largest}"


@overload
def blame(
    subject: Run, step: int | None = None, *, objective: str | None = None, log: Callable[[str], None] = ...
) -> StepBlame: ...
@overload
def blame(subject: Callable[..., Any], *args: Any, **kwargs: Any) -> Blame | None: ...
def blame(subject: Callable[..., Any] | Run, *args: Any, **kwargs: Any) -> StepBlame | Blame | None:
    """Finds what overflowed in a step of a run, or in a call of any function.

        jaxmp.blame(jaxmp.Run("runs/digits_mlp"), step=None, objective=None, log=print)
        jaxmp.blame(function, *args, **kwargs)

    A step of a run is repeated on one device from the checkpoint before it, with the same batch, key and loss scale,
    operation by operation. The first value that was not finite is named with its line, module, direction and operands;
    then the step is repeated under smaller loss scales, under rules that keep the module or what is around it in
    float32, and under float32, and what makes it finite is said. If the step is finite, its values are compared with
    those of float32, and the first that is worse than rounding is named.

    A function is evaluated once, operation by operation, inside scans, loops, remat and branches too.

    Args:
      subject: a Run; or any function that JAX traces: a loss, `jax.grad` of one, a train step. A Pallas kernel, a
        callback, or a function that is mapped over devices runs as one operation.
      args: of a run, `step`: which step, counted from 1, by default the last that was skipped. Of a function, its
        arguments, arrays and Python numbers.
      kwargs: of a run, `objective`: which of several objectives, by default, without `step`, the one that was skipped
        last; and `log`, which takes each message about progress. Of a function, its further arguments.

    Returns:
      For a run a `StepBlame`, which shows all that was found. For a function the operation or argument that made the
      first inf or NaN of its results, and where it stands; None if all results are finite.

    Raises:
      InputError: the subject is neither; the run has no such step, or, without `step`, has skipped none; its optimizer
        is private; its folder or experiment cannot be read (see `Run`); or the function does not take these arguments,
        or does not trace with them.
    """
    if isinstance(subject, Run):
        return blame_run(subject, *args, **kwargs)
    return nonfinite.blame(require_call("blame", "a Run", subject, args, kwargs), *args, **kwargs)


def blame_run(
    run: Run,
    step: int | None = None,
    *,
    objective: str | None = None,
    log: Callable[[str], None] = lambda text: print(text, file=sys.stderr),
) -> StepBlame:
    """Repeats a step of a run and finds what overflowed in it; if nothing did, compares the step with float32.

    Args:
      run: the run.
      step: which step, counted from 1; by default the last that was skipped.
      objective: which of several objectives; by default, without `step`, the one that was skipped last.
      log: takes each message about progress.

    Raises:
      InputError: the run has no such step, or, without `step`, has skipped none; its optimizer is private; its folder
        or experiment cannot be read (see `Run`).
    """
    if run.trainer.is_private:
        raise InputError(
            f"{run.path}: a private step leaves out the rows that overflow, see dropped_examples; blame repeats steps "
            "of optimizers that are not private"
        )
    past = Past(run, log)
    try:
        at = past.last_skipped(objective) if step is None else past.step(step, objective)
    finally:
        past.feed.close()
    return _Step(past.trainer, at).blame(str(run.path))


class _Step:
    """One step, as it was: its state and batch."""

    def __init__(self, trainer: Trainer, past: PastStep):
        self.trainer, self.experiment = trainer, trainer.experiment
        self.step, self.scale, self.objective = past.step, past.scale, past.objective
        state = trainer.state_seen(past.objective)(past.state, past.batch)
        key = jax.random.fold_in(state.key, state.step)
        key = key if past.objective is None else objective_key(key, past.objective)
        self.params, self.model_state, self.batch, self.key = state.params, state.model_state, past.batch, key

    def blame(self, run: str) -> StepBlame:
        """See `blame_run`."""
        scale = self.scale
        result = StepBlame(
            run, self.step, self.experiment.precision, scale, None, objective=self.objective, blocks=self._blocks()
        )
        replay = self._replay(self.experiment.precision)
        found = self._blamed(replay, scale)
        if found is None:
            return dataclasses.replace(result, deviations=tuple(self._beside_float32()))
        if found.primitive == "argument":
            return dataclasses.replace(result, found=found)
        rows = list(self.trainer.explain())
        module = _module(found.path, [row.module for row in rows])
        scaled = found.backward or bool(found.note)
        helps = self._prevents("float32")
        return dataclasses.replace(
            result,
            found=found,
            module=module,
            passing_scale=self._passing_scale(replay) if scaled else None,
            rule=next(filter(self._prevents, self._rules(module, rows, found.backward)), None) if helps else None,
            float32_helps=helps,
        )

    def _blocks(self) -> tuple[OperandBlocks, ...]:
        """See `StepBlame.blocks`. On one device: scales of a tensor are those of the whole batch."""
        measure = self.trainer.block_ranges(self.objective)
        if measure is None:
            return ()
        found = jax.jit(measure)(*self._arguments(self.scale)).read()
        forward = [each for each in found if each.product == "fprop"]
        backward = [each for each in reversed(found) if each.product != "fprop"]
        return tuple(each for each in (*forward, *backward) if each.clipped or each.scales.nan)

    def gradients(self, precision: str) -> Callable[..., Any]:
        """`(params, model_state, loss_scale, batch, key)` to scaled gradients and loss, as the step computes them.

        Replicas are mapped by `vmap` on one device. How the state was split is left out: it changes no number.
        """
        trainer = Trainer(dataclasses.replace(self.experiment, precision=precision))
        devices, loop = trainer.devices, self.experiment.loop
        mapped = devices.replicas().axis_name is not None
        step = make_gradients(
            trainer.make_loss(
                objective=self.objective, axis_name=AXIS if mapped and loop.batch_norm == "global" else None
            ),
            accumulate_steps=loop.accumulate_steps,
            accumulate_overflow=loop.accumulate_overflow,
            replicas=Replicas(AXIS, None, trainer.experiment.policy.reduce) if mapped else single,
            trains=trainer.by_name[self.objective].trains,
        )

        def gradients(params: Any, model_state: Any, loss_scale: Any, batch: Any, key: Any) -> Any:
            grads, measured, _ = step(params, model_state, loss_scale, batch, key)
            return {"gradients": grads, "loss": measured.loss}

        def of_all(params: Any, model_state: Any, loss_scale: Any, batch: Any, key: Any) -> Any:
            shares = jax.tree.map(
                lambda x: x.reshape(devices.count, -1, *x.shape[1:]), devices.interleave_microbatches(batch)
            )
            replicas = jax.vmap(gradients, (None, None, None, 0, None), axis_name=AXIS)
            return jax.tree.map(lambda x: x[0], replicas(params, model_state, loss_scale, shares, key))

        return of_all if mapped else gradients

    def _arguments(self, scale: float) -> tuple[Any, ...]:
        return self.params, self.model_state, jnp.float32(scale), self.batch, self.key

    def _replay(self, precision: str) -> Replay:
        return Replay(self.gradients(precision), *self._arguments(1))

    def _blamed(self, replay: Replay, scale: float) -> Blame | None:
        found = replay.blame(*self._arguments(scale))
        if found is None:
            return None
        return dataclasses.replace(found, reaches=tuple(name.removeprefix("result/") for name in found.reaches))

    def _passing_scale(self, replay: Replay) -> float | None:
        """The largest power of two below the step's scale with which it is finite, by bisection."""
        passes, fails = SMALLEST_SCALE, math.ceil(math.log2(self.scale))
        if self._blamed(replay, 2.0**passes):
            return None
        while fails - passes > 1:
            middle = (passes + fails) // 2
            passes, fails = (passes, middle) if self._blamed(replay, 2.0**middle) else (middle, fails)
        return 2.0**passes

    def _prevents(self, precision: str) -> bool:
        """Whether the step is finite under another precision, at the same loss scale."""
        try:
            return self._blamed(self._replay(precision), self.scale) is None
        except InputError:  # a rule that the tree has already, or that never wins
            return False

    def _rules(self, module: str, rows: Sequence[ModulePolicy], backward: bool) -> list[str]:
        """Precisions with one rule more: for the module, then for those around it, its class, and the others."""
        above = [module]
        while above[-1]:
            above.append(above[-1].rpartition("/")[0])
        classes = [f"@{row.type}" for row in rows if row.module == module and module]
        others = [row.module for row in rows if row.parameters and row.module not in above]
        # In the backward pass what is near the loss comes first; so it does for what has just been computed.
        patterns = [*above, *classes, *(reversed(others) if backward or not module else others)]
        return [f"{pattern}=float32; {self.experiment.precision}" for pattern in patterns if pattern][:MOST_RULES]

    def _beside_float32(self) -> Iterator[Deviation]:
        """Outputs from the first module on, then gradients from the last on, beside those of float32."""
        format = _coarsest(self.experiment.policy.policies)
        here = self._values(self.experiment.precision)(self.params, self.batch)
        in_float32 = self._values("float32")
        expected = in_float32(self.params, self.batch)
        draws = [in_float32(*self._rounded(format, draw)) for draw in range(DRAWS)]
        for (module, what), value in here.items():
            true = expected[module, what]
            threshold = EXCESS * max(
                _unit_roundoff(format), *(relative_error(draw[module, what], true) for draw in draws)
            )
            lost = 0.0 if what == "output" else float(np.sum((value == 0) & (true != 0)) / max(np.sum(true != 0), 1))
            yield Deviation(module, what, relative_error(value, true), threshold, lost)

    def _rounded(self, format: Format | BlockFormat, draw: int) -> tuple[Any, Any]:
        """The parameters and the batch, weights and inputs rounded stochastically to a format."""
        keys = itertools.count()

        def rounded(x: Any) -> Any:
            if not is_castable(x):
                return x
            key = jax.random.fold_in(jax.random.key(draw), next(keys))
            saturate = True if isinstance(format, Format) else None  # block formats saturate
            wide = jnp.atleast_1d(x.astype(jnp.float32))
            rounded = quantize(wide, format, rounding="stochastic", key=key, saturate=saturate)
            return rounded.reshape(x.shape).astype(x.dtype)

        inputs = {name: rounded(self.batch[name]) for name in self.experiment.task.inputs}
        return jax.tree.map(rounded, self.params), {**self.batch, **inputs}

    def _values(self, precision: str) -> Callable[[Any, Any], dict[tuple[str, str], np.ndarray]]:
        """A function of parameters and batch to what modules return, in the order of calls, and gradients, last first.

        By the path of the module and what it is. Modules inside scans are left out, whose results Flax does not keep.
        """
        rows = [row.module for row in self.trainer.explain()]
        place = {module: k for k, module in enumerate(rows)}
        outputs, gradients = (
            jax.jit(function, compiler_options=AS_WRITTEN)
            for function in (self._outputs(precision), self.gradients(precision))
        )

        def values(params: Any, batch: Any) -> dict[tuple[str, str], np.ndarray]:
            forward: dict[Any, list[Any]] = {}
            backward: dict[Any, list[Any]] = {}
            for path, leaves in outputs(params, self.model_state, batch, self.key).items():
                inexact = [leaf for leaf in leaves if jnp.issubdtype(leaf.dtype, jnp.inexact)]
                if inexact:
                    forward[path, "output"] = inexact
            step = gradients(params, self.model_state, jnp.float32(self.scale), batch, self.key)
            for key, leaf in jax.tree_util.tree_leaves_with_path(step["gradients"]):
                path = path_name(key)
                owner = _module(f"/{path.rpartition('/')[0]}", rows)
                if jnp.issubdtype(leaf.dtype, jnp.inexact):
                    backward[owner, f"gradient of {path.removeprefix(owner).strip('/')}"] = [leaf]
            ordered = [
                *sorted(forward.items(), key=lambda item: (item[0][0] == "", place.get(item[0][0], 0))),
                *sorted(backward.items(), key=lambda item: -place.get(item[0][0], 0)),
            ]
            return {name: np.concatenate([np.ravel(x).astype(np.float64) for x in leaves]) for name, leaves in ordered}

        return values

    def _outputs(self, precision: str) -> Callable[..., Any]:
        """`(params, model_state, batch, key)` to what each module returns."""
        task = self.experiment.task
        model = as_model(self.experiment.adapted_model).under(UnderPolicy(precision))

        def outputs(params: Any, model_state: Any, batch: Any, key: Any) -> Any:
            return model.module_outputs(params, model_state, *(batch[name] for name in task.inputs), key=key)

        return outputs


def _coarsest(policies: Sequence[Policy]) -> Format | BlockFormat:
    formats: list[Format | BlockFormat] = []
    for policy in policies:
        formats.append(policy.operands or parse_format(policy.compute_dtype.name))
        for operand in () if policy.recipe is None else policy.recipe.operands():
            format = operand.format
            # For arrays of any number of axes: one scale, which is no finer than those of blocks.
            if isinstance(format, Delayed):
                element = format.format
                format = element if isinstance(element, Format) and element.bits > 8 else BlockFormat(element, "tensor")
            elif isinstance(format, BlockFormat) and len(format.block) != 1:
                format = BlockFormat(format.element, "tensor")
            formats += [] if format is None else [format]
    return max(formats, key=_unit_roundoff)


def _unit_roundoff(format: Format | BlockFormat) -> float:
    """Half of the largest relative distance of neighbours; of integers, that at the largest of a block."""
    if isinstance(format, Format):
        return format.unit_roundoff
    element = format.element
    return element.unit_roundoff if isinstance(element, Format) else 2.0 ** -(element.bits - 1)


def _module(path: str, modules: Sequence[str]) -> str:
    """The module that a path of names belongs to: the longest whose names stand in it in this order.

    A path has more names than the module's: the class of the model first, scopes of the user's own, and those of a
    method that calls a module which stands elsewhere in the model (`rnn/cell` for the module `cell`).
    """
    names = path.split("/")[1:]

    def stands(module: str) -> bool:
        rest = iter(names)
        return all(part in rest for part in module.split("/"))

    return max((module for module in modules if module and stands(module)), key=lambda m: m.count("/") + 1, default="")
