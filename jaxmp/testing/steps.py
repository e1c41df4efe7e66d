"""Laws of a train step: which steps it applies, which it skips, and how its loss scale moves."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from hypothesis import strategies as st

from jaxmp.errors import InputError
from jaxmp.jaxprs import COLLECTIVE_SUMS, equations
from jaxmp.testing import faults
from jaxmp.testing.chosen_gradients import (
    complex_parameters_descend,
    dropped_window_is_empty,
    finite_is_applied,
    generic_gradients,
    gradients_keep_their_bits,
    growth_step_is_right,
    loss_in_float32,
    moments_in_float32,
    norms_in_float32,
    scale_does_not_matter,
    scale_moves_as_claimed,
    scale_stands_in_a_window,
    scale_stays_in_its_range,
    second_moments_decay,
    small_gradients_take_small_steps,
    tiny_gradients_are_felt,
    updates_in_float32,
)
from jaxmp.testing.faults import BadBatch, BadGradient, Clean, Fault
from jaxmp.testing.laws import Broken, Law, Laws, Skipped, calling, require, require_methods
from jaxmp.testing.objectives import (
    ObjectiveTrial,
    not_due_stays,
    objectives_of,
    others_do_not_matter,
    skipped_beside_others,
    skipped_statistics_are_dropped,
)
from jaxmp.testing.private import PRIVATE_LAWS, PrivateClaim
from jaxmp.testing.scalers import is_sound_scale
from jaxmp.testing.snapshots import Snapshot, first_difference, place_difference, restored, snapshot, type_difference
from jaxmp.testing.sums import SUMS, terms
from jaxmp.testing.trial import (
    NO_GRADIENT,
    Trial,
    compiles,
    copies,
    gross_difference,
    one_copy,
    words,
)
from jaxmp.trees import HALF, is_castable, is_floating

REFERENCE_BOUND = {np.dtype(np.float32): 2.0**-14, np.dtype(np.float16): 2.0**-5, np.dtype(jnp.bfloat16): 2.0**-2}
"""the same between two programs: 1024 unit roundoffs of float32, 64 of a half"""
MODEL_TERMS = 64
"""as many numbers may be added up in half inside of the loss function"""


@dataclasses.dataclass(frozen=True)
class StepAdapter:
    """The train step that `step_laws` tests. Any object with these attributes can stand in for it.

    Of a step with several objectives, each with a loss scale of its own, most laws are checked for each. What is
    claimed of its scale, and what `loss`, `skipped_steps` and `consecutive_skips` return, may then be a mapping by
    objective: by the last name in the path of its scaler, such as "generator" for `.opt_state['generator']`.
    """

    init: Callable[[], Any]
    """`init()`: a fresh state, a pytree, the same at each call"""
    step: Callable[[Any, Any], Any]
    """`step(state, batch)`: the new state, or a tuple that begins with it. Compiled, as in training; it may donate"""
    batch: Any
    """a batch as the step takes it; all its rows count"""
    kept: Callable[[Any], Any] | None = None
    """`kept(state)`: all that a skipped step leaves as it was: parameters, moments, counts, statistics, EMA. By
    default, for a state with `jaxmp.loss_scaling` in it: all but the scaler's own state, and leaves called `step`"""
    loss_scale: Callable[[Any], Any] | None = None
    """`loss_scale(state)`: the scale of the next loss, or a pytree of them; by default those of `jaxmp.loss_scaling`"""
    loss: Callable[[Any], Any] | None = None
    """`loss(out)`: the unscaled loss, from all that `step` returned"""
    stacked: bool = False
    """whether every leaf of the state has a leading axis over replicas, as under `pmap`"""
    microbatches: int = 1
    """how many steps make one update; `kept` then leaves out what sums the gradients of a window"""
    min_scale: float | Mapping[str, float] | None = None
    """floor of the scale; None if the step claims none"""
    max_scale: float | Mapping[str, float] | None = None
    """cap of the scale; None if the step claims none"""
    growth_factor: float | Mapping[str, float] | None = None
    """factor by which the scale grows; None if the step claims none"""
    backoff_factor: float | Mapping[str, float] | None = None
    """factor by which the scale falls; None if the step claims none"""
    growth_interval: int | Mapping[str, int] | None = None
    """applied updates in a row before the scale grows; None if the step claims no number"""
    hysteresis: int | Mapping[str, int] | None = None
    """number of overflows in a row from which on the scale is lowered; None if the step claims none"""
    skipped_steps: Callable[[Any], Any] | None = None
    """`skipped_steps(state)`: number of skipped steps so far; by default that of `jaxmp.loss_scaling`"""
    consecutive_skips: Callable[[Any], Any] | None = None
    """`consecutive_skips(state)`: number of skipped steps in a row; by default that of `jaxmp.loss_scaling`"""
    private: PrivateClaim | None = None
    """what a private step (DP-SGD) claims; its laws are then those of `OF_A_PRIVATE_STEP`, and of its rows and noise"""
    trace: Callable[[Any, Any], Any] | None = None
    """`trace(state, batch)`: the jaxpr of the step; needed only if `step` itself cannot be traced"""


def step_laws(adapter: Any, *, reference: Any = None) -> Laws:
    """Returns the laws of a train step: a table when printed, tests when pytest collects them.

    Args:
      adapter: a `StepAdapter`, or any object with its attributes.
      reference: the adapter of a step that must do the same in another way: on one device, in float32, or on one batch
        instead of several microbatches.

    Raises:
      InputError: the adapter lacks `init`, `step` or `batch`.
    """
    trial = Trial(adapter)

    def as_the_reference(trial: Trial) -> None:
        """The step does what the reference does."""
        _as_reference(reference, trial)

    if trial.read("private") is not None:
        laws = [Law.of(check, trial) for check in (*OF_A_PRIVATE_STEP, as_the_reference, *PRIVATE_LAWS)]
        require_methods("step_laws", adapter, ("init", "step"), laws)
        return Laws("the private step" if isinstance(adapter, StepAdapter) else type(adapter).__name__, laws)
    views = functools.cache(lambda: objectives_of(trial))
    checks = [_of_each(check, views) if check in OF_AN_OBJECTIVE else check for check in LAWS]
    checks += [as_the_reference, *(_between(check, views) for check in BETWEEN_OBJECTIVES)]
    laws = [Law.of(check, trial) for check in checks]
    require_methods("step_laws", adapter, ("init", "step"), laws)
    if getattr(adapter, "batch", None) is None:
        raise InputError(f"step_laws: the adapter {type(adapter).__name__} has no batch, which every law steps on")
    return Laws("the step" if isinstance(adapter, StepAdapter) else type(adapter).__name__, laws)


# --- laws


def repeatable(trial: Trial) -> None:
    """The same state and the same batches give the same bits.

    Keys, counters and data positions are in the state, and nowhere else.
    """

    def counterexample(count: int) -> str | None:
        first = snapshot(trial.run([Clean()] * count))
        again = calling("the adapter's init", trial.adapter.init)
        for _ in range(count):
            again = trial.step(again)
        different = first_difference(first, snapshot(again))
        return f"the second time after init and {words([Clean()] * count)}, {different}" if different else None

    require(st.integers(0, 3), counterexample)


def types_stay(trial: Trial) -> None:
    """The state keeps its structure, shapes, dtypes and weak types.

    Traps T7 and T17, defect B11.
    """
    for trace in ([Clean()], [Clean()] * 2, [trial.any_fault]):
        if different := type_difference(trial.fresh(), trial.run(trace)):
            raise Broken(f"after {words(trace)}: {different}")


def one_compile(trial: Trial) -> None:
    """The step compiles once in a run.

    Trap T7: a state that is weakly typed at first, or counted in Python, compiles again.
    """
    with faults.compiled_anew():
        state = trial.step(trial.fresh())
        placed = place_difference(trial.fresh(), state)
        for count in (2, 3, 4):
            before = compiles()
            state = trial.step(state)
            new = compiles() - before
            if new:
                said = f"step {count} compiled {new} program{'s' * (new > 1)}, after what step 1 had compiled"
                raise Broken(f"{said}: {placed}" if placed and count == 2 else said)


def trains(trial: Trial) -> None:
    """Steps on a good batch are applied, and what they commit is finite.

    A step that skips everything would obey all the other laws.
    """
    state = trial.fresh()
    before = snapshot(trial.kept(state))
    patience = 24 * (trial.read("microbatches") or 1)
    for count in range(1, patience + 1):
        state = trial.step(state)
        after = snapshot(trial.kept(state))
        for path, leaf in zip(after.paths, after.leaves, strict=True):
            if is_floating(leaf) and not np.all(np.isfinite(leaf.astype(np.float64))):
                raise Broken(f"after {words([Clean()] * count)} on the adapter's batch, leaf {path} is not finite")
        if first_difference(before, after):
            return
    raise Broken(f"after {patience} steps on the adapter's batch nothing has changed")


def scale_is_sound(trial: Trial) -> None:
    """The loss scale is a strong float32, a power of two with a normal inverse.

    Rule 1 of a step; defects B9, B10 and B11, trap T10.
    """

    def counterexample(faulty: list[bool]) -> str | None:
        trace: Sequence[Fault] = [trial.any_fault if bad else Clean() for bad in faulty]
        for name, leaf in trial.scale_leaves(trial.run(trace)).items():
            if different := wrong(leaf):
                return f"after {words(trace)} the loss scale{f' of {name}' * (len(trial.scalers) > 1)} is {different}"
        return None

    def wrong(leaf: Any) -> str | None:
        if not hasattr(leaf, "dtype"):
            return f"a Python number, {leaf}: weakly typed, it multiplies a float16 loss in float16"
        if leaf.dtype != jnp.float32 or getattr(leaf, "weak_type", False):
            return f"{leaf.dtype.name}{', weakly typed' * bool(getattr(leaf, 'weak_type', False))}"
        scale = float(leaf)
        if not is_sound_scale(scale):
            return f"{scale:g}, no power of two between 2**-126 and 2**126"
        return None

    trial.scale_leaves(trial.fresh())
    require(st.lists(st.booleans(), max_size=4), counterexample)


def bad_gradient_is_skipped(trial: Trial) -> None:
    """A step with an inf or NaN in any gradient leaves parameters, optimizer and model state as they were.

    Rules 4 and 7 of a step; defects B13, B15, B16 and B17.
    """
    if not trial.bad_gradients:
        raise Skipped(NO_GRADIENT)
    for fault in trial.bad_gradients:
        if different := _changed(trial, 0, fault, 1, False):
            raise Broken(different)
    _require_kept(trial, st.sampled_from(trial.bad_gradients))


def bad_batch_is_skipped(trial: Trial) -> None:
    """A step with an inf or NaN anywhere in the batch leaves parameters, optimizer and model state as they were.

    An overflow in the forward pass, on any row, and so on any replica.
    """
    if trial.bad_batches is None:
        raise Skipped("the batch has no floats to put an inf into")
    _require_kept(trial, trial.bad_batches)


def bad_loss_is_skipped(trial: Trial) -> None:
    """A step whose loss is not finite leaves parameters, optimizer and model state as they were.

    Rule 4: the loss is part of the flag, even if all gradients are finite.
    """
    reader = trial.read("loss")
    if reader is None:
        raise Skipped("the adapter has no loss, so that it is not known when it is finite")
    paths = [
        (jax.tree_util.keystr(path), leaf.size)
        for path, leaf in jax.tree_util.tree_leaves_with_path(trial.adapter.batch)
        if is_castable(leaf) and leaf.size
    ]
    for path, size in paths:
        for value in (1e18, 1e25, 1e38):
            fault = BadBatch(path, size - 1, value)
            for given in (False, *[True] * bool(trial.leaves)):
                state = trial.fresh()
                before = snapshot(trial.kept(state))
                if not given:
                    out = trial.out(state, fault)
                else:  # the gradients are finite whatever the loss is
                    choice = lambda leaf: np.full(leaf.shape, 2.0**-10)  # noqa: E731
                    out = trial.with_gradients(state, choice, fault.apply(trial.adapter.batch))[0]
                loss = np.asarray(calling("the adapter's loss", reader, out), np.float64)
                different = first_difference(before, snapshot(trial.kept(trial._state(out, trial._start))))
                if different and not np.all(np.isfinite(loss)):
                    which = f"{fault}{', and finite gradients' * given}"
                    raise Broken(f"after {which}, the loss is {loss.ravel()[0]}, and yet {different}")


def scale_falls(trial: Trial) -> None:
    """A skipped step lowers the loss scale, if it is above the floor that is claimed, and an applied one does not.

    Rule 8 of a step.
    """
    fault = trial.any_fault
    for scaler in range(len(trial.scalers)):
        state = trial.fresh()
        first = trial.scale(state, scaler)
        for count in range(1, 8 * trial.window + 1):
            before, state = trial.scale(state, scaler), trial.step(state, fault)
            now = trial.scale(state, scaler)
            if now > before:
                raise Broken(f"after {words([fault] * count)} the scale rose from {before:g} to {now:g}")
        low = trial.scale(state, scaler)
        for _ in range(trial.window):
            state = trial.step(state)
        now = trial.scale(state, scaler)
        if now < low:
            raise Broken(f"after a step that could be applied the scale fell from {low:g} to {now:g}")
        if low == first and first not in (1, trial.read("min_scale")) and (growth := trial.growth_of(scaler)):
            raise Broken(
                f"{8 * trial.window} overflows in a row leave the scale at {first:g}; {growth} finite steps raise it"
            )


def skips_are_counted(trial: Trial) -> None:
    """Skipped steps are counted, in all and in a row.

    Rule 8 of a step: an applied step ends the row.
    """
    if not trial.counts_skips:
        raise Skipped("the adapter has neither skipped_steps nor consecutive_skips")
    if trial.window > 1:
        raise Skipped("several microbatches make an update, and either may be counted")
    fault = trial.any_fault
    trace = [Clean(), fault, fault, Clean(), fault, Clean()]
    # The scale may have to fall until a clean step is applied, so that what is applied is read from what is kept.
    state, total, row = trial.fresh(), 0, 0
    for count, given in enumerate(trace, 1):
        before = snapshot(trial.kept(state))
        state = trial.step(state, given)
        skipped = isinstance(given, Clean) is False or (
            trial.window == 1 and not first_difference(before, snapshot(trial.kept(state)))
        )
        total, row = total + skipped, row + 1 if skipped else 0
        for name, expected in (("skipped_steps", total), ("consecutive_skips", row)):
            found = trial.counted(name, state)
            if found is not None and found != expected:
                raise Broken(f"after {words(trace[:count])} {name} is {found}; expected: {expected}")


def skips_leave_no_trace(trial: Trial) -> None:
    """After skipped steps, training goes on as without them.

    Rules 5 and 6: a scale lower by a power of two changes nothing; nor do schedules, decay or clipping move on. To the
    bit, with gradients that the law chooses. Skipped if the step draws random numbers, which a skipped step uses up.
    """
    if trial.draws:
        raise Skipped("the step draws random numbers, and a skipped step uses up its own")
    fault = trial.any_fault
    many = trial.read("microbatches") or 1
    if many > 1:
        raise Skipped("an overflow among several microbatches may drop what they have summed")

    choices = generic_gradients(trial, 5)

    def run(before: int, bad: int, after: int) -> Snapshot:
        state = trial.chosen(trial.fresh(), *choices[:before])
        for _ in range(bad):
            state = trial.step(state, fault)
        return snapshot(trial.kept(trial.chosen(state, *choices[before : before + after])))

    without = functools.cache(lambda count: run(count, 0, 0))

    def counterexample(counts: tuple[int, int, int]) -> str | None:
        before, bad, after = counts
        trace = [Clean()] * before + [fault] * bad + [Clean()] * after
        compare = first_difference if trial.leaves else functools.partial(trial.compare_kept, start=without(0))
        different = compare(without(before + after), run(before, bad, after))
        if not different:
            return None
        return f"after {words(trace)}, unlike without what was skipped: {different}"

    require(st.tuples(st.integers(0, 2), st.integers(1, 3), st.integers(1, 3)), counterexample)


def random_numbers_advance(trial: Trial) -> None:
    """A skipped step uses up its random numbers.

    Rule 7: the key stream always advances, so that a step that overflowed is not repeated as it was.
    """
    if not trial.draws:
        raise Skipped("the step draws no random numbers")
    fault = trial.any_fault
    plain = [snapshot(trial.kept(trial.run([Clean()] * n))) for n in (0, 1)]
    if not first_difference(*plain):
        raise Skipped("the first step is not applied")
    after_skip = snapshot(trial.kept(trial.run([fault, Clean()])))
    if not first_difference(plain[1], after_skip):
        raise Broken(f"after {words([fault])}, a step draws the same random numbers as without it")


def survives_saving(trial: Trial) -> None:
    """A state that was saved and restored goes on with the same bits.

    Defect B18: N steps, saved, restored, M steps are N + M steps to the bit.
    """

    def counterexample(counts: tuple[int, int, bool]) -> str | None:
        before, after, bad = counts
        first: Sequence[Fault] = [Clean()] * before + [trial.any_fault] * bad
        state = trial.run(first)
        saved = snapshot(state)
        again = restored(saved, state)
        trial.run([Clean(), trial.any_fault])  # what happens in another run is not to matter
        through, again = (functools.reduce(trial.step, [Clean()] * after, s) for s in (state, again))
        different = first_difference(snapshot(through), snapshot(again))
        return f"after {words(first)}, saved, restored, and {after} steps: {different}" if different else None

    require(st.tuples(st.integers(0, 2), st.integers(1, 2), st.booleans()), counterexample)


def replicas_agree(trial: Trial) -> None:
    """All replicas hold the same bits, whichever had the fault.

    Defect B14.
    """
    stacked = bool(trial.read("stacked"))
    if len(copies(trial.fresh(), stacked)) < 2:
        raise Skipped("there is one replica; jaxmp.testing.replicated makes several, and so do several devices")
    bad: list[Fault] = [fault._replace(once=True) for fault in trial.bad_gradients if isinstance(fault, BadGradient)]
    kinds = [st.just(Clean()), _faults(trial), *[st.sampled_from(bad)] * bool(bad)]
    strategy = st.lists(st.one_of(*kinds), max_size=2)

    def counterexample(trace: Sequence[Fault]) -> str | None:
        first, *others = copies(trial.run(trace), stacked)
        for i, other in enumerate(others, 1):
            if different := first_difference(first, other):
                return f"after {words(trace)}, between replicas 0 and {i}: {different}"
        return None

    require(strategy, counterexample)


def reduced_in_float32(trial: Trial) -> None:
    """Gradients are not summed over replicas in float16.

    Trap T3: four float16 gradients of 40000 sum to inf.
    """
    if trial.jaxpr is None:
        raise Skipped("the step cannot be traced as a whole")
    sums = [e for e, _ in equations(trial.jaxpr) if e.primitive.name in COLLECTIVE_SUMS]
    if not sums:
        raise Skipped("the step sums nothing over replicas itself")
    for equation in sums:
        for operand in equation.invars:
            if operand.aval.dtype == np.float16:
                raise Broken(f"{equation.primitive.name} sums {operand.aval.str_short()} over replicas in float16")


def sums_in_float32(trial: Trial) -> None:
    """Norms, averages and other sums outside of the loss run in float32; so do sums of over 64 numbers in its gradient.

    Traps T2, T4 and T5. Up to 64 numbers, a sum is within 64 unit roundoffs of the true one; `policy_laws` has more to
    say about sums in a model. Sums over replicas are looked at by themselves. Skipped if the step cannot be traced.
    """
    if trial.jaxpr is None:
        raise Skipped("the step cannot be traced as a whole")
    for equation, names in equations(trial.jaxpr):
        name = equation.primitive.name
        if name not in SUMS or name in COLLECTIVE_SUMS or equation.invars[0].aval.dtype not in HALF:
            continue
        operand, model = equation.invars[0].aval, "jvp(" in names
        if terms(equation) > (MODEL_TERMS if model else 1):
            where = "in the gradient of the loss" if model else "outside of the loss"
            raise Broken(f"{where}, a {name} of {operand.str_short()} adds up {terms(equation)} numbers in half")


def _as_reference(reference: Any, trial: Trial) -> None:
    """One and several devices, jit and pmap, k microbatches and one batch: within the dtype's bound."""
    if reference is None:
        raise Skipped("no reference was given")
    other = Trial(reference)
    if trial.draws or other.draws:
        raise Skipped("the step draws random numbers, which may depend on how it is run")
    split = trial.read("microbatches") or 1
    parts = [
        jax.tree.map(lambda x, i=i: x.reshape(split, -1, *x.shape[1:])[i], trial.adapter.batch) for i in range(split)
    ]
    found, expected = trial.fresh(), other.fresh()
    start = one_copy(other.kept(expected), other)
    for _ in range(3):
        for part in parts if split > 1 else [trial.adapter.batch]:
            found = trial._state(trial.out(found, Clean(), part), found)
        expected = other.step(expected)
    a, b = one_copy(other.kept(expected), other), one_copy(trial.kept(found), trial)
    bound = max(REFERENCE_BOUND.get(d, 0.0) for d in trial.float_dtypes | other.float_dtypes)
    if len(a.leaves) != len(b.leaves):
        raise Broken(f"the reference keeps {len(a.leaves)} leaves, the step {len(b.leaves)}")
    names = [leaf.path for leaf in trial.leaves]
    if different := gross_difference(a, Snapshot(a.paths, b.leaves), start, bound, names):
        raise Broken(f"after 3 steps, unlike in the reference: {different}")


# --- parts of laws


def _faults(trial: Trial) -> st.SearchStrategy[Fault]:
    if trial.bad_batches is not None:
        return trial.bad_batches
    return st.just(trial.any_fault)


def _require_kept(trial: Trial, fault: st.SearchStrategy[Fault]) -> None:
    # Several in a row: some give up skipping after a while.
    cases = st.tuples(st.integers(0, 3), fault, st.integers(1, 6), st.booleans())
    require(cases, lambda case: _changed(trial, *case))


def _changed(trial: Trial, good: int, fault: Fault, times: int, negative_zeros: bool) -> str | None:
    """What the same fault some times in a row changes, after some good steps."""
    if not trial.reaches(fault):
        return None
    state = trial.run([Clean()] * good, negative_zeros)
    kept = snapshot(trial.kept(state))
    for _ in range(times):
        state = trial.step(state, fault)
    different = first_difference(kept, snapshot(trial.kept(state)))
    if not different:
        return None
    zeros = ", from a state whose zeros are -0.0" if negative_zeros else ""
    return f"after {words([Clean()] * good + [fault] * times)}{zeros}: {different}"


# --- which laws are of what

LAWS = (
    repeatable,
    types_stay,
    one_compile,
    trains,
    scale_is_sound,
    bad_gradient_is_skipped,
    bad_batch_is_skipped,
    bad_loss_is_skipped,
    scale_falls,
    skips_are_counted,
    skips_leave_no_trace,
    growth_step_is_right,
    scale_stays_in_its_range,
    scale_moves_as_claimed,
    scale_does_not_matter,
    finite_is_applied,
    loss_in_float32,
    gradients_keep_their_bits,
    tiny_gradients_are_felt,
    small_gradients_take_small_steps,
    norms_in_float32,
    moments_in_float32,
    second_moments_decay,
    updates_in_float32,
    sums_in_float32,
    complex_parameters_descend,
    scale_stands_in_a_window,
    dropped_window_is_empty,
    random_numbers_advance,
    survives_saving,
    replicas_agree,
    reduced_in_float32,
)
"""the laws of a step, in the order of the table"""
OF_THE_WHOLE_STEP = (
    repeatable,
    types_stay,
    one_compile,
    sums_in_float32,
    survives_saving,
    replicas_agree,
    reduced_in_float32,
)
"""laws of all of a step, whatever objectives it has"""
OF_A_PRIVATE_STEP = (repeatable, types_stay, one_compile, trains, scale_is_sound, survives_saving, reduced_in_float32)
"""laws of every step that hold of a private one: it drops the row that is not finite where others skip the step, and
what its optimizer sees is clipped and noised, so that no law can choose it"""
OF_AN_OBJECTIVE = tuple(law for law in LAWS if law not in OF_THE_WHOLE_STEP)
"""laws that hold for each objective of a step, and so for each of its scalers"""
BETWEEN_OBJECTIVES = (others_do_not_matter, skipped_beside_others, not_due_stays, skipped_statistics_are_dropped)
"""laws of what the objectives of a step may not do to each other"""


def _of_each(check: Callable[[Trial], None], views: Callable[[], list[ObjectiveTrial]]) -> Callable[[Trial], None]:
    """The law for each objective of a step; the law itself for a step with one."""

    @functools.wraps(check)
    def of_each(trial: Trial) -> None:
        _check_each(check, views() or [trial])

    return of_each


def _between(
    check: Callable[[Trial, list[ObjectiveTrial]], None], views: Callable[[], list[ObjectiveTrial]]
) -> Callable[[Trial], None]:
    """The law for each objective of a step, beside the others that have gradients of their own."""

    @functools.wraps(check)
    def between(trial: Trial) -> None:
        several = views()
        others = {id(view): [other for other in several if other.calls.isdisjoint(view.calls)] for view in several}
        if not any(others.values()):
            raise Skipped("the step has a single objective")
        _check_each(lambda view: check(view, others[id(view)]), [view for view in several if others[id(view)]])

    return between


def _check_each(check: Callable[[Any], None], trials: Sequence[Any]) -> None:
    """Checks a law for each objective; raises Skipped only if it is skipped for all of them."""
    skipped: list[str] = []
    for trial in trials:
        of = f"objective {trial.name!r}: " if isinstance(trial, ObjectiveTrial) else ""
        try:
            check(trial)
        except Skipped as reason:
            skipped.append(f"{of}{reason}")
        except Broken as broken:
            raise Broken(f"{of}{broken}") from broken
    if len(skipped) == len(trials):
        raise Skipped(skipped[0])
