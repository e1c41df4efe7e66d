"""Hooks: functions of your own that `fit` calls between steps, for samples, plots, trackers and own stops.

    def to_mlflow(evaluated: jaxmp.Evaluated):
        values = {f"{evaluated.split}/{name}": value for name, value in evaluated.metrics.items()}
        mlflow.log_metrics(values, step=evaluated.step)

    def stop_in_time(info: jaxmp.StepInfo):
        if time.time() > deadline:
            return jaxmp.Stop("the allocation ends")

    jaxmp.fit(experiment, hooks=(to_mlflow, stop_in_time))

The annotation of its first parameter says what a hook is called with: `StepInfo` after each dispatch of steps,
`Evaluated` after each evaluation, `StepInfo | Evaluated` (or no annotation) after both. Hooks run on the host, in the
order in which they are given, never inside a compiled step; where in the loop, `jaxmp.runs.fit` says. Each of several
processes calls them: write files and print where `jax.process_index() == 0`.
"""

from __future__ import annotations

import inspect
import re
import types
import typing
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax

from jaxmp.data.dataset import Split
from jaxmp.data.transforms import function_name
from jaxmp.distributed import processes
from jaxmp.errors import InputError
from jaxmp.training.feed import is_hidden
from jaxmp.training.metrics import Metrics, compute
from jaxmp.training.state import TrainState


class StepInfo(NamedTuple):
    """Where training stands after a dispatch of one or many steps."""

    step: int
    """steps attempted so far"""
    state: TrainState
    """the state after them; donated to the next dispatch, so copy what you keep"""
    metrics: Metrics
    """what was measured since the last line that is due, on the device; `values()` fetches it"""

    def values(self) -> dict[str, float]:
        """The metrics as floats by name, each the mean since the last line. Waits for the device."""
        return compute({name: mean for name, mean in self.metrics.items() if not is_hidden(name)})


class Evaluated(NamedTuple):
    """An evaluation that `fit` made."""

    step: int
    """steps attempted so far"""
    state: TrainState
    """the state that was evaluated, by its `averaged_params`; donated to the next dispatch, so copy what you keep"""
    split: Split
    """the split that it was evaluated on: validation, and test at the end of the run"""
    metrics: dict[str, float]
    """the metrics of the whole split, by name"""
    path: Path
    """the run folder; a hook may write files of its own there"""


class Stop(NamedTuple):
    """What a hook returns to end the run: it is evaluated, saved and summarised, as at its last step."""

    why: str
    """the reason, kept in summary.json as `stopped_because`"""


class Pause(NamedTuple):
    """What a hook returns to end this session of the run, as a signal does: the state is saved, without a summary.

    The same call of `fit` goes on from there, and the run ends with the same bits as one that was never paused.
    """

    why: str
    """the reason, for the message"""


Hook = Callable[[Any], Stop | Pause | None]
"""a function of a `StepInfo`, of an `Evaluated`, or of either"""


class HookFailed(Exception):
    """A hook raised; the message names it. `__cause__` is what it raised, in the process where it did."""


class StateLost(HookFailed):
    """A hook deleted arrays of the state, which cannot be saved any more."""


class Hooks:
    """The hooks of a run.

    Each of several processes calls all hooks, since a hook may compute with arrays that lie on the devices of all. A
    `Stop` or a `Pause` counts in the first process, a `Stop` before a `Pause`; a hook that raises in any of them ends
    the run in all.

    Args:
      hooks: the functions, in the order in which they are called.

    Raises: InputError if `hooks` is no sequence of functions of one parameter, or a parameter is annotated otherwise.
    """

    def __init__(self, hooks: Sequence[Hook] = ()):
        if not isinstance(hooks, Sequence) or isinstance(hooks, str):
            raise InputError(f"hooks = {hooks!r:.60}: expected a tuple of functions, (function,)")
        self._hooks = [(f"hook {function_name(hook)}", hook, _called_with(hook, i)) for i, hook in enumerate(hooks)]

    def call(self, value: StepInfo | Evaluated) -> Stop | Pause | None:
        """Calls the hooks that want `value`. Returns whether and why the run stops or pauses; None if it goes on.

        Raises: HookFailed if a hook raised, returned something else than None, a `Stop` or a `Pause` that could be
        taken for one, or deleted arrays of the state.
        """
        wanted = [(name, hook) for name, hook, kinds in self._hooks if type(value) in kinds]
        if not wanted:
            return None
        found, error = None, None
        try:
            found = self._call(wanted, value)
        except HookFailed as raised:
            error = raised
        if not processes.several():
            if error:
                raise error
            return found
        said = None if found is None else (type(found).__name__, found.why)  # as JSON
        outcomes = processes.from_each([said, str(error) if error else None, isinstance(error, StateLost)])
        failures = [f"{message}, in process {i}" for i, (_, message, _) in enumerate(outcomes) if message]
        if failures:  # of one kind everywhere: all processes save the state, or none does
            failed = StateLost if any(lost for _, _, lost in outcomes) else HookFailed
            raise failed(failures[0]) from (error and error.__cause__)
        if outcomes[0][0] is None:
            return None
        kind, why = outcomes[0][0]
        return Stop(why) if kind == "Stop" else Pause(why)

    def _call(self, wanted: list[tuple[str, Hook]], value: StepInfo | Evaluated) -> Stop | Pause | None:
        found: Stop | Pause | None = None
        for name, hook in wanted:
            try:
                returned = hook(value)
            except Exception as error:
                raise HookFailed(f"{name} raised {type(error).__name__}: {error}") from error
            if isinstance(returned, bool) or returned is Stop or returned is Pause:
                what = f"the class {returned.__name__}" if isinstance(returned, type) else returned
                raise HookFailed(f"{name} returned {what}: expected None, Stop('why') or Pause('why')")
            if any(leaf.is_deleted() for leaf in jax.tree.leaves(value.state) if isinstance(leaf, jax.Array)):
                raise StateLost(f"{name} deleted or donated arrays of the state; expected a copy of what it changes")
            stronger = found is None or (isinstance(found, Pause) and isinstance(returned, Stop))
            if isinstance(returned, Stop | Pause) and stronger:
                found = returned._replace(why=f"{returned.why} ({name})")
        return found


KINDS = (StepInfo, Evaluated)
"""what hooks can be called with"""


def _called_with(hook: Any, index: int) -> tuple[type, ...]:
    """What a hook is called with, by the annotation of its first parameter."""
    where = f"hooks[{index}] = {function_name(hook) if callable(hook) else repr(hook):.60}"
    if not callable(hook) or isinstance(hook, type):
        raise InputError(f"{where}: expected a function of a StepInfo or of an Evaluated")
    try:
        parameters = inspect.signature(hook, eval_str=True).parameters
    except (NameError, AttributeError, SyntaxError, TypeError):  # an annotation that exists for type checkers alone
        parameters = inspect.signature(hook).parameters
    except ValueError:  # a function of C, which has no signature
        return KINDS
    positional = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    first = next(iter(parameters.values()), None)
    required = [p for p in parameters.values() if p.default is p.empty and p.kind in positional]
    if first is None or (first.kind not in positional and first.kind is not inspect.Parameter.VAR_POSITIONAL):
        raise InputError(f"{where}: takes no argument; expected a function of a StepInfo or of an Evaluated")
    if len(required) > 1:
        raise InputError(f"{where}: takes {len(required)} arguments; expected one, a StepInfo or an Evaluated")
    if first.annotation is first.empty or first.annotation is Any:
        return KINDS
    named = _annotated(first.annotation)
    kinds = tuple(kind for kind in KINDS if kind in named or kind.__name__ in named)
    if len(kinds) != len(named):
        raise InputError(
            f"{where}: its parameter {first.name!r} is annotated {_text(first.annotation)}; expected jaxmp.StepInfo, "
            "jaxmp.Evaluated, one | the other, or no annotation"
        )
    return kinds


def _annotated(annotation: Any) -> tuple[Any, ...]:
    """The alternatives of an annotation; of one that could not be evaluated, their last names."""
    if isinstance(annotation, str):
        return tuple(name.strip().rpartition(".")[2] for name in re.split(r"\|", annotation))
    is_union = typing.get_origin(annotation) in (typing.Union, types.UnionType)
    return typing.get_args(annotation) if is_union else (annotation,)


def _text(annotation: Any) -> str:
    return repr(annotation) if isinstance(annotation, str) else getattr(annotation, "__name__", str(annotation))
