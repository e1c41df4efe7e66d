"""Laws of a train step with several objectives, each of which has a loss scale of its own, as a GAN's two.

Each objective is looked at by itself: an overflow in the gradients of the others holds them where they are, so that the
laws of a step with one objective apply. The laws in this file say what objectives may not do to each other.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxmp.testing.chosen_gradients import generic_gradients
from jaxmp.testing.faults import BadBatch, BadGradient, Clean, Fault, GradientLeaf, Observed
from jaxmp.testing.laws import Broken, Skipped, calling
from jaxmp.testing.snapshots import Snapshot, first_difference, snapshot
from jaxmp.testing.trial import GROWTH_STEPS, WAIT, Trial, copied, inf_for, scaler_states
from jaxmp.trees import is_floating

Choice = Callable[[GradientLeaf], Any]

START = 2.0**15
"""A larger scale is lowered to this before the laws look at it: at its cap it could not grow."""
CLAIMS = ("min_scale", "max_scale", "growth_factor", "backoff_factor", "growth_interval", "hysteresis")
"""attributes of an adapter that may be mappings by the names of the objectives"""
ONE = "the step has a single objective"


class ObjectiveTrial(Trial):
    """One of several objectives, run as if it were alone: in each step, an overflow holds the others where they are.

    A step of this trial is as many steps as it takes until the objective is due.
    """

    def __init__(self, whole: Trial, number: int, name: str, calls: frozenset[int]):
        """Makes the trial of an objective.

        Args:
          whole: the trial of the step.
          number: the number of its scaler in `whole.scalers`.
          name: what messages and the adapter's mappings call it.
          calls: the calls of `jax.grad` that take its gradient.
        """
        super().__init__(whole.adapter)
        self.whole, self.number, self.name, self.calls = whole, number, name, calls
        self.scaler = whole.scalers[number]

    def read(self, name: str) -> Any:
        """Returns an optional attribute of the adapter; of a mapping by objectives, what it has for this one."""
        value = self.whole.read(name)
        if name in CLAIMS and isinstance(value, Mapping):
            return value.get(self.name)
        if name == "loss" and value is not None:
            return (lambda out: value(out)[self.name]) if self._loss_by_name else None
        return value

    @functools.cached_property
    def _loss_by_name(self) -> bool:
        out = self.whole.out(self.whole.fresh(), Clean())
        return _has(calling("the adapter's loss", self.whole.read("loss"), out), self.name)

    # --- states

    @functools.cached_property
    def _start(self) -> Any:
        start = self.whole._start
        if self.moves and self.scale(start) > START:
            try:
                return self.at_scale(copied(start), START)
            except Skipped:  # no leaf of the state is the scale
                pass
        return start

    @functools.cached_property
    def moves(self) -> bool:
        """Whether overflows lower the scale: whether it is a dynamic one."""
        state = copied(self.whole._start)
        first = self.scale(state)
        for _ in range(8 * self.window):
            state = self.beside(state, inf_for, None)
            if self.scale(state) < first:
                return True
        return False

    def _scale_leaves(self, state: Any) -> dict[str, Any]:
        return {self.scaler: self.whole._scale_leaves(state)[self.scaler]}

    @functools.cached_property
    def _scale_places(self) -> list[int | None]:
        return [self.whole._scale_places[self.number]]

    def counted(self, name: str, state: Any) -> int | None:
        """Returns what the state counts for this objective; None if it does not."""
        reader, states = self.whole.read(name), scaler_states(state)
        if reader is not None:
            found = calling(f"the adapter's {name}", reader, state)
            return int(np.ravel(found[self.name])[0]) if _has(found, self.name) else None
        if self.scaler not in states:
            return None
        state = states[self.scaler]
        return int(np.ravel(state.skipped if name == "skipped_steps" else state.consecutive_skips)[0])

    # --- steps

    def out(self, state: Any, fault: Fault, batch: Any = None) -> Any:
        """Returns all that the adapter's `step` returns for the step in which the objective is due."""
        batch = self.adapter.batch if batch is None else batch
        batch = fault.apply(batch) if isinstance(fault, BadBatch) else batch
        bad = fault if isinstance(fault, BadGradient) else None
        return self._injected(state, batch, str(fault), bad=bad)[0]

    def _injected(
        self, state: Any, batch: Any, given: str, chosen: Choice | None = None, bad: BadGradient | None = None
    ) -> tuple[Any, Observed]:
        return self._until_due(state, batch, given, lambda state: chosen or _own, lambda state: inf_for, bad)

    def _until_due(
        self,
        state: Any,
        batch: Any,
        given: str,
        own: Callable[[Any], Choice],
        others: Callable[[Any], Choice],
        bad: BadGradient | None = None,
    ) -> tuple[Any, Observed]:
        """Steps until the objective is due, with scaled gradients that are chosen for each state."""
        for _ in range(WAIT):
            due, out, seen = self.once(state, batch, given, own(state), others(state), bad)
            if due:
                losses, finite = ({call: found.get(call, []) for call in self.calls} for found in seen)
                return out, Observed(losses, finite)  # type: ignore[arg-type]
            state = self._state(out, self.whole._start)
        raise Broken(
            f"with {given}, it is not attempted in {WAIT} steps; give the laws a step in which it is due sooner"
        )

    def once(
        self, state: Any, batch: Any, given: str, own: Choice, others: Choice, bad: BadGradient | None = None
    ) -> tuple[bool, Any, Observed]:
        """Runs one step. Returns whether the objective was due, what the step returned, and what was seen."""
        due = self._reacts(state) if self.selects else True
        choose = lambda leaf: (own if leaf.call in self.calls else others)(leaf)  # noqa: E731
        out, seen = self.whole._injected(state, batch, given, chosen=choose, bad=bad)
        return due and any(call in seen.losses for call in self.calls), out, seen

    def beside(self, state: Any, own: Choice, others: Choice | None) -> Any:
        """Returns the state after a step, with gradients chosen for this objective and for the others.

        Args:
          state: the state before; it may be donated.
          own: the gradient of a leaf, without the loss scale.
          others: the same for the other objectives; None for an overflow of each.
        """
        scaled = lambda choice: lambda state: self._scaled(state, choice)  # noqa: E731
        given = "gradients chosen by the law"
        out, _ = self._until_due(state, self.adapter.batch, given, scaled(own), scaled(others or inf_for))
        return self._state(out, self.whole._start)

    def _scaled(self, state: Any, choice: Choice) -> Choice:
        """A choice of gradients, times the scale of each."""
        scales = self.whole._scale_of_call(state)
        return lambda leaf: np.asarray(choice(leaf), np.result_type(leaf.dtype, np.float64)) * scales[leaf.call]

    def _scale_of_call(self, state: Any) -> dict[int, float]:
        return self.whole._scale_of_call(state)

    @functools.cached_property
    def selects(self) -> bool:
        """Whether the step takes the gradient even where the objective is not due, and then drops it."""
        if self.scaler not in scaler_states(self.whole._start):
            return False
        state = copied(self.whole._start)
        for _ in range(8):
            after, losses = self.whole.overflow(copied(state))
            if any(call in losses for call in self.calls) and not self._has_reacted(state, after):
                return True
            state = after
        return False

    def _reacts(self, state: Any) -> bool:
        return self._has_reacted(state, self.whole.overflow(copied(state))[0])

    def _has_reacted(self, before: Any, after: Any) -> bool:
        """Whether a step has told the scaler anything. A count of the optimizer's alone is no reaction."""
        old, new = (scaler_states(state)[self.scaler] for state in (before, after))
        floats = [
            [x for x in jax.tree.leaves(state.inner_state) if is_floating(x)]
            + [state.scaler, state.skipped, state.consecutive_skips]
            for state in (old, new)
        ]
        return first_difference(*map(snapshot, floats)) is not None

    def growth_of(self, scaler: int) -> int | None:
        """The number of steps with chosen gradients until the scale grows; None if that takes too long."""
        return self._growth

    @functools.cached_property
    def _growth(self) -> int | None:
        state = self.fresh()
        first, limit = self.scale(state), self.read("growth_interval") or GROWTH_STEPS // 10
        for count in range(1, min(limit, GROWTH_STEPS) * self.window + 2):
            state = self.beside(state, _small, None)
            if self.scale(state) > first:
                return count
        return None

    @functools.cached_property
    def growth_factor(self) -> float | None:
        """By how much the scale grows at first; None if that takes longer than a law waits."""
        if self._growth is None:
            return None
        state = self.fresh()
        for _ in range(self._growth - 1):
            state = self.beside(state, _small, None)
        before = self.scale(state)
        return self.scale(self.beside(state, _small, None)) / before

    # --- what is its own

    @functools.cached_property
    def leaves(self) -> list[GradientLeaf]:
        """The parameters that the objective trains."""
        return [leaf for leaf in self.whole.leaves if leaf.call in self.calls]

    def reaches(self, fault: Fault) -> bool:
        """Whether a fault in the batch makes this objective's loss or gradients infinite or NaN."""
        if not isinstance(fault, BadBatch):
            return True
        if fault not in self._reached:
            _, seen = self._injected(self.fresh(), fault.apply(self.adapter.batch), str(fault))
            finite = all(all(flags) for flags in seen.finite.values())
            finite &= all(np.all(np.isfinite(np.asarray(x))) for found in seen.losses.values() for x in found)
            self._reached[fault] = not finite
        return self._reached[fault]

    @functools.cached_property
    def _reached(self) -> dict[Fault, bool]:
        return {}

    @functools.cached_property
    def moved_by_gradients(self) -> set[int]:
        """The places, in what a skipped step keeps, of leaves that this objective's gradients change."""
        choice = generic_gradients(self, 1)[0]
        return self._different(choice, lambda leaf: -2 * choice(leaf))

    @functools.cached_property
    def moved(self) -> set[int]:
        """The places of leaves that a step of this objective changes."""
        after = snapshot(self.kept(self._window(self.fresh(), generic_gradients(self, 1)[0])))
        return _differing(snapshot(self.kept(self.fresh())), after)

    def _different(self, *choices: Choice) -> set[int]:
        return _differing(*(snapshot(self.kept(self._window(self.fresh(), choice))) for choice in choices))

    def _window(self, state: Any, own: Choice, others: Choice | None = None) -> Any:
        for _ in range(self.window):
            state = self.beside(state, own, others)
        return state

    @functools.cached_property
    def in_its_optimizer(self) -> set[int]:
        """The places of what the optimizer of this objective keeps."""
        state = scaler_states(self.whole._start).get(self.scaler)
        inside = set() if state is None else {id(x) for x in jax.tree.leaves(state.inner_state)}
        return {i for i, x in enumerate(jax.tree.leaves(self.kept(self.whole._start))) if id(x) in inside}

    def own_part(self, state: Any, others: list[ObjectiveTrial], *, with_scaler: bool) -> Snapshot:
        """What this objective alone changes: its parameters, averages and moments; and the state of its scaler."""
        shared = set[int]().union(*(other.moved_by_gradients | other.in_its_optimizer for other in others))
        whole = snapshot(self.kept(state))
        places = sorted(self.in_its_optimizer | (self.moved_by_gradients - shared))
        found = Snapshot([whole.paths[i] for i in places], [whole.leaves[i] for i in places])
        if with_scaler:
            own = scaler_states(state).get(self.scaler)
            scaler = self.scale_leaves(state) if own is None else own._replace(inner_state=())
            more = snapshot(scaler)
            found = Snapshot([*found.paths, *more.paths], [*found.leaves, *more.leaves])
        return found


def objectives_of(trial: Trial) -> list[ObjectiveTrial]:
    """Returns a trial for each objective of a step; none if it has a single one, or if its gradients cannot be told."""
    try:
        if not trial.has_scale or len(trial.scalers) < 2 or not trial.leaves:
            return []
    except Broken:  # of an adapter that raises, for the laws that it concerns
        return []
    last = [re.findall(r"\w+", scaler)[-1] for scaler in trial.scalers]
    names = last if len(set(last)) == len(last) else trial.scalers
    calls = _calls_of_scalers(trial)
    return [ObjectiveTrial(trial, i, name, calls[i]) for i, name in enumerate(names)]


def _calls_of_scalers(trial: Trial) -> list[frozenset[int]]:
    """For each scaler, the calls of `jax.grad` whose gradient it unscales.

    Those whose loss is scaled by it; for a scaler that scales no loss, those to whose overflow it reacts.
    """
    count = len(trial.scalers)
    ran, scaled = trial.calls_and_scalers
    found = [{call for call, i in scaled.items() if i == scaler} for scaler in range(count)]
    for scaler in range(count):
        if not found[scaler]:
            found[scaler] = {call for call in ran if _has_say(trial, call, scaler)} or set(ran)
    # Of a loss that is scaled by another's scale, the other one has no say.
    taken = [set(calls) for calls in found]
    for scaler in range(count):
        lost = set().union(*(taken[i] for i in range(count) if i != scaler and taken[i] < taken[scaler]))
        found[scaler] -= lost
    return [frozenset(calls) for calls in found]


def _has_say(trial: Trial, call: int, scaler: int) -> bool:
    """Whether an overflow of one call of `jax.grad` lowers a scale, or counts as a skipped step."""
    name = trial.scalers[scaler]

    def after(choice: Choice) -> Snapshot:
        state = trial.fresh()
        for _ in range(4):
            state = trial._state(trial._injected(state, trial.adapter.batch, "a step", chosen=choice)[0], trial._start)
        own = scaler_states(state).get(name)
        return snapshot(trial._scale_leaves(state)[name] if own is None else own._replace(inner_state=()))

    bad = after(lambda leaf: (inf_for if leaf.call == call else _small)(leaf))
    return first_difference(after(_small), bad) is not None


# --- laws


def others_do_not_matter(trial: Trial, others: list[ObjectiveTrial]) -> None:
    """What an objective trains and keeps depends neither on the gradients of another, nor on whether that overflows.

    With gradients that the law chooses, to the bit. Skipped where the update depends on the loss, which another
    objective may change.
    """
    view = _objective(trial)
    own = generic_gradients(view, 3 * view.window)
    choice = generic_gradients(view, 5)[4]
    part = functools.partial(view.own_part, others=others, with_scaler=True)

    def after(beside: Choice | None) -> Snapshot:
        state = view.fresh()
        for each in own:
            state = view.beside(state, each, beside)
        return part(state)

    held = after(None)
    halved = jax.tree.map(lambda x: x / 2 if is_floating(x) else x, trial.adapter.batch)
    changed, usual = (view.with_gradients(view.fresh(), own[0], batch)[0] for batch in (halved, None))
    if first_difference(*(part(view._state(out, view._start)) for out in (changed, usual))):
        raise Skipped("the update depends on the loss, which another objective may change")
    for beside, words in ((choice, "are applied"), (lambda leaf: -8 * choice(leaf), "have other gradients")):
        if different := first_difference(held, after(beside)):
            raise Broken(f"after {len(own)} steps in which the others {words}, unlike after overflows: {different}")


def skipped_beside_others(trial: Trial, others: list[ObjectiveTrial]) -> None:
    """An objective that overflows stays as it was, parameters, moments and average, though another one is applied."""
    view = _objective(trial)
    own, beside = generic_gradients(view, 2)
    for good in (0, 1):
        state = view.fresh()
        for _ in range(good * view.window):
            state = view.beside(state, own, beside)
        before = view.own_part(state, others, with_scaler=False)
        for count in (1, 2, 3):
            state = view.beside(state, inf_for, beside)
            if different := first_difference(before, view.own_part(state, others, with_scaler=False)):
                raise Broken(f"after {good} applied steps and {count} overflows beside applied ones: {different}")


def not_due_stays(trial: Trial, others: list[ObjectiveTrial]) -> None:
    """A step in which an objective is not due leaves its parameters, moments, counts, scale and skips as they were."""
    view = _objective(trial)
    own, beside = generic_gradients(view, 2)
    part = functools.partial(view.own_part, others=others, with_scaler=True)
    waited = 0
    for choice, words in ((own, "applied steps"), (inf_for, "overflows")):
        state, attempts = view.fresh(), 0
        for _ in range(12):
            before = part(state)
            scaled = view._scaled(state, choice), view._scaled(state, beside)
            due, out, _ = view.once(state, view.adapter.batch, "gradients chosen by the law", *scaled)
            state = view._state(out, view.whole._start)
            attempts, waited = attempts + due, waited + (not due)
            if not due and (different := first_difference(before, part(state))):
                raise Broken(f"after {attempts} {words}, in a step in which it is not due: {different}")
    if not waited:
        raise Skipped("every objective is due in each step")


def skipped_statistics_are_dropped(trial: Trial, others: list[ObjectiveTrial]) -> None:
    """An objective that overflows leaves the model state as if it had not run, though another one is applied.

    A change of a running average lives on by a share in each step that moves it: by less where two objectives moved it
    than where the other one alone did.
    """
    view = _objective(trial)
    own, beside = generic_gradients(view, 2)
    trained = set[int]().union(*(each.moved_by_gradients | each.in_its_optimizer for each in [view, *others]))
    usual = snapshot(view.kept(view.fresh()))
    places = [i for i in sorted(view.moved - trained) if is_floating(usual.leaves[i])]
    if not places or view.window > 1:
        raise Skipped("it moves no floats of a model state in a step of its own")

    def response(own: Choice, beside: Choice | None, by: float = 1.0) -> list[float]:
        """The share of a change of each leaf that is left after a step."""
        found = [snapshot(view.kept(view.beside(_changed(view, places, by), own, beside))) for by in (0.0, by)]
        return [float(np.mean(np.float64(found[1].leaves[i]) - found[0].leaves[i])) / by for i in places]

    alone, twice = response(own, None), response(own, None, 2.0)
    both, skipped = response(own, beside), response(inf_for, beside)
    for i, one, again, two, other in zip(places, alone, twice, both, skipped, strict=True):
        if abs(again - one) > 0.01 * abs(one):
            continue  # no average, but a vector that is normalised, say
        # With `one` of its own step and `two` of both, the other's alone leaves two / one.
        if 0.05 < one < 0.999 and 0.05 < two < 0.999 and abs(other - two) < 0.1 * (two / one - two):
            raise Broken(
                f"a change of leaf {usual.paths[i]} by 1 leaves {other:.3g} after a step in which it overflows and "
                f"another one is applied, as where both are applied; without it {two / one:.3g} would be left"
            )


def _changed(view: ObjectiveTrial, places: list[int], by: float) -> Any:
    """A fresh state, with some of what a skipped step keeps changed."""
    kept = jax.tree.leaves(view.kept(view._start))
    chosen = {id(kept[i]) for i in places}
    leaves, structure = jax.tree.flatten(view._start)
    fresh = jax.tree.leaves(view.fresh())
    found = [new + jnp.asarray(by, new.dtype) if id(x) in chosen else new for x, new in zip(leaves, fresh, strict=True)]
    return jax.tree.unflatten(structure, found)


def _objective(trial: Trial) -> ObjectiveTrial:
    if not isinstance(trial, ObjectiveTrial):
        raise Skipped(ONE)
    return trial


def _own(leaf: GradientLeaf) -> None:
    """The step's own gradient."""


def _small(leaf: GradientLeaf) -> np.ndarray:
    return np.full(leaf.shape, 2.0**-10)


def _has(found: Any, name: str) -> bool:
    return isinstance(found, Mapping) and name in found


def _differing(a: Snapshot, b: Snapshot) -> set[int]:
    return {i for i, (x, y) in enumerate(zip(a.leaves, b.leaves, strict=True)) if x.tobytes() != y.tobytes()}
