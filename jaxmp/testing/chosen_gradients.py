"""Laws of a train step with gradients that the law chooses: how they are unscaled, kept, and turned into an update.

The gradients are put in at run time, in place of the step's own. A step in float16 can then be compared to the bit,
under any optimizer: what its forward and backward pass round does not matter.
"""

from __future__ import annotations

import functools
import math
import zlib
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from jaxmp.jaxprs import COLLECTIVE_SUMS, equations
from jaxmp.testing.faults import Clean, GradientLeaf
from jaxmp.testing.laws import Broken, Skipped, calling
from jaxmp.testing.snapshots import Snapshot, first_difference, snapshot, value
from jaxmp.testing.trial import GROWTH_SECONDS, GROWTH_STEPS, NO_GRADIENT, Trial, copied
from jaxmp.trees import HALF

Choice = Callable[[GradientLeaf], np.ndarray]

NORM = 2.0**-4
"""norm of the gradients that are chosen: usual clips leave them alone"""
TINY = 2.0**-26
"""a gradient that float16 unscales to 0"""
FALLS = 320
"""overflows after which a scale has to be at its floor: from 2**126 to 2**-126, each of them a halving"""


# --- laws


def scale_does_not_matter(trial: Trial) -> None:
    """The update by given gradients is the same at every loss scale, to the bit.

    Rule 5, defects B3 and B7.
    """
    _require_leaves(trial)
    start = trial.fresh()
    choices = [_generic(trial, seed, TINY if seed == 1 else NORM) for seed in range(2 * trial.window)]
    expected = None
    for scale in _scales(trial):
        state = trial.at_scale(copied(start), scale) if scale != trial.scale(start) else copied(start)
        kept = snapshot(trial.kept(trial.chosen(state, *choices)))
        if expected is None:
            first, expected = scale, kept
        elif different := first_difference(expected, kept):
            raise Broken(f"the same gradients under the scale {scale:g} and under {first:g}: {different}")


def finite_is_applied(trial: Trial) -> None:
    """A step with a finite loss and finite gradients is applied, at every loss scale.

    Rule 4: large is not an overflow. Gradients of the step's own, and given ones up to 2**60 when scaled; and given
    gradients beside a large loss, from large numbers in the batch.
    """
    _require_leaves(trial)
    start = snapshot(trial.kept(trial.fresh()))

    def applied(scale: float, choice: Choice | None, batch: Any = None) -> bool:
        """Whether a window is applied; True if its loss is not finite, or its gradients where they are its own."""
        state = trial.fresh()
        if scale != trial.scale_or_one(state):
            state = trial.at_scale(state, scale)
        fits = True
        for _ in range(trial.window):
            out, seen = trial.with_gradients(state, choice, batch)
            state = trial._state(out, trial._start)
            fits &= choice is not None or all(all(flags) for flags in seen.finite.values())
            fits &= all(np.all(np.isfinite(_f64(x))) for found in seen.losses.values() for x in found)
            reader = trial.read("loss")
            fits &= reader is None or bool(np.all(np.isfinite(_f64(calling("the adapter's loss", reader, out)))))
        return not fits or bool(first_difference(start, snapshot(trial.kept(state))))

    for scale in _scales(trial):
        under = f"under the scale {scale:g}, a step with"
        if not applied(scale, None):
            raise Broken(f"{under} its own gradients, all finite, is not applied")
        for top in (2.0**15, 2.0**20, 2.0**40, 2.0**60):
            if not applied(scale, functools.partial(_largest, top=top, scale=scale)):
                raise Broken(f"{under} gradients that are {top:g} when scaled, is not applied")
    first = trial.scale_or_one(trial.fresh())
    for fault in trial.large_batches:
        if not applied(first, _generic(trial, 0, NORM), fault.apply(trial.adapter.batch)):
            raise Broken(f"{fault}, whose loss is finite, and with small gradients, is not applied")


def gradients_keep_their_bits(trial: Trial) -> None:
    """A float32 gradient is not rounded to half precision on its way to parameters and moments.

    A relative change by 2**-13 is felt in the gradient's leaf or in what the optimizer keeps for it.
    """
    if any(v.aval.dtype in HALF for v in _reduced(trial)):
        raise Skipped("the step sums gradients over replicas in half precision, as its policy may say")
    small = 2.0**-13
    _require_felt(
        trial, lambda x: x, lambda x: x * (1 + small), lambda x: x * 1.5, small * 2, "changed by 2**-13 of it"
    )


def tiny_gradients_are_felt(trial: Trial) -> None:
    """A gradient of 2**-26 is felt in its leaf or in what the optimizer keeps for it; a gradient of 0 gives no NaN.

    Defect B3, trap T14.
    """
    tiny = lambda x: np.full_like(x, TINY)  # noqa: E731
    _require_felt(trial, np.zeros_like, tiny, lambda x: np.full_like(x, NORM), TINY / NORM, f"{TINY:g} instead of 0")


def small_gradients_take_small_steps(trial: Trial) -> None:
    """Smaller gradients do not move a parameter further.

    Trap T14: a second moment in half precision is 0 for gradients below 2**-12, and the step is divided by its root.
    Where it is always 0, the step is thousands of times as long as the gradient.
    """
    _require_leaves(trial)
    runs = [_run(trial, _sized(trial, size)) for size in (0.0, 2.0**-3, 2.0**-13)]
    for leaf in trial.leaves:
        if _too_small(trial, leaf, 2.0**-13):
            continue
        for at in _own(leaf, runs[0]):
            none, large, little = (_f64(run.leaves[at]) for run in runs)
            if not np.all(np.isfinite(little)):
                raise Broken(f"with gradients of 2**-13, leaf {runs[0].paths[at]} is not finite")
            moved, allowed = np.linalg.norm(little - none), 1.5 * np.linalg.norm(large - none)
            if allowed > 2.0**10:
                raise Broken(f"leaf {runs[0].paths[at]} moves by {allowed / 1.5:.3g} for gradients of 2**-3")
            rounding = 16 * np.linalg.norm(np.abs(none)) * float(np.finfo(np.float32).eps)
            if runs[0].leaves[at].dtype.itemsize > 2 and moved > allowed + rounding:
                raise Broken(
                    f"leaf {runs[0].paths[at]} moves by {moved:.3g} for gradients of 2**-13, and by "
                    f"{allowed / 1.5:.3g} for gradients of 2**-3"
                )


def norms_in_float32(trial: Trial) -> None:
    """What divides gradients by their size does so in float32, for large gradients too.

    Trap T5. Where gradients twice as large give the same leaf to the bit, those 1.375 times as large give it to 2**-13.
    """
    _require_leaves(trial)
    sizes = 2.0**10, 2.0**11, 1.375 * 2.0**10
    scale = trial.scale_or_one(trial.fresh())
    if any(leaf.dtype == np.float16 and scale * 2.0**11 > 2.0**15 for leaf in trial.leaves):
        raise Skipped("float16 gradients of the size that the law needs overflow under this scale")
    start = snapshot(trial.kept(trial.fresh()))
    none, *runs = [_run(trial, _sized(trial, size, powers=True)) for size in (0.0, *sizes)]
    for leaf in trial.leaves:
        felt = False
        for at in _own(leaf, start):
            old, one, two, other = (_f64(s.leaves[at]) for s in (start, *runs))
            felt |= bool(np.any(one != _f64(none.leaves[at])))
            wide = start.leaves[at].dtype.itemsize > 2
            if wide and np.any(one != old) and np.array_equal(one, two):
                error = np.abs(other - one)
                bound = 2.0**-13 * np.abs(one - old) + 4 * float(np.finfo(np.float32).eps) * np.abs(one)
                if not np.all(error <= bound):
                    i = int(np.argmax(np.nan_to_num(error, nan=np.inf)))
                    raise Broken(
                        f"leaf {start.paths[at]} is the same for gradients of 2**10 and 2**11, {one.ravel()[i]:.9g}, "
                        f"but {other.ravel()[i]:.9g} for 1.375 * 2**10"
                    )
        if _own(leaf, start) and not felt:
            raise Broken(f"a gradient of 2**10 for {leaf.path}, like one of 0, changes nothing that is kept for it")


def moments_in_float32(trial: Trial) -> None:
    """Float32 parameters, moments and averages are not rounded to half precision.

    After steps with given gradients, they do not all lie on the grid of bfloat16 or float16.
    """
    _require_leaves(trial)
    start = snapshot(trial.kept(trial.fresh()))
    count = 3 * trial.window
    # Where float16 gradients do not overflow, some are so large that half precision does not lose their squares.
    norms = NORM, NORM if any(leaf.dtype == np.float16 for leaf in trial.leaves) else 2.0**3
    choices = [[_generic(trial, seed + 100 * run, norm) for seed in range(count)] for run, norm in enumerate(norms)]
    one, other = (snapshot(trial.kept(trial.chosen(trial.fresh(), *some))) for some in choices)
    gradient = {at for leaf in trial.leaves for at in _own(leaf, start)}
    for at, (path, leaf) in enumerate(zip(one.paths, one.leaves, strict=True)):
        if leaf.dtype not in (np.float32, np.complex64):
            continue
        x, y, old = _reals(leaf), _reals(other.leaves[at]), _reals(start.leaves[at])
        if at in gradient:
            # An optimizer that takes signs moves by once or three times its rate in 3 steps, whatever the gradients.
            moving = np.unique(np.abs(np.concatenate([x, y])[np.concatenate([x != old, y != old])]))
            if _steps(x, old) + _steps(y, old) <= 4 or len(moving) < 2:
                continue
        else:
            moving = np.unique(x[x != old])
            if len(moving) < 4 or np.all(moving * 256 == np.round(moving * 256)):
                continue
        # A leaf that began as zeros is the sum of a few updates: from 11 bits each, it rarely gets over 14.
        summed = at in gradient and not np.any(old) and len(moving) > 3
        for bits, name in ((8, "bfloat16"), (11, "float16")):
            if np.all(_on_grid(moving, bits)) or (summed and np.mean(_on_grid(moving, bits + 3)) >= 0.5):
                raise Broken(
                    f"what changes in the float32 leaf {path} is rounded to {name}: {value(leaf, 0)}, for example"
                )


def updates_in_float32(trial: Trial) -> None:
    """An update is not rounded to half precision on its way to a float32 parameter.

    Trap T14. A small change of the gradients moves most numbers of a leaf for which larger changes show that there is
    room. Leaves of which the optimizer keeps anything in half are left out.
    """
    _require_leaves(trial)

    def run(change: float) -> Snapshot:
        """After three updates, with the gradients of the last one changed."""
        choices = [_generic(trial, seed, NORM) for seed in (0, 1)]
        last = _generic(trial, 2, NORM)
        choices.append(lambda leaf: last(leaf) * (1 + change))
        state = trial.fresh()
        for choice in choices:
            state = trial.chosen(state, *[choice] * trial.window)
        return snapshot(trial.kept(state))

    large, less = 2.0**-4, 2.0**-5
    usual, most, half = run(0), run(large), run(less)
    changes = [2.0**-n for n in (14, 12, 10, 8)]
    small = functools.cache(run)
    for leaf in trial.leaves:
        places = _own(leaf, usual)
        if leaf.dtype in HALF or any(usual.leaves[at].dtype not in (np.float32, np.complex64) for at in places):
            continue
        for at in places:
            a, b, c = (_f64(s.leaves[at]) for s in (usual, most, half))
            linear = np.abs((b - a) - 2 * (c - a)) <= 0.25 * np.abs(b - a)
            unit = np.spacing(np.maximum(np.abs(a), 2.0**-100).astype(np.float32)).astype(np.float64)
            for change in changes:
                room = linear & (np.abs(b - a) * (change / large) > 8 * unit)
                if np.count_nonzero(room) < 4:
                    continue
                if np.mean((_f64(small(change).leaves[at]) == a)[room]) > 0.5:
                    raise Broken(
                        f"gradients changed by {change:g} of themselves leave most of leaf {usual.paths[at]} as it is, "
                        f"though a change by {large:g} moves it by {np.max(np.abs(b - a)):.3g}"
                    )
                break


def second_moments_decay(trial: Trial) -> None:
    """An average of squared gradients forgets them.

    Trap T14: b2 = .999 is 1 in bfloat16. Of what begins at 0 and takes a share below one half of each squared gradient,
    two equal gradients leave less than twice what one leaves. A sum of squares, as Adagrad's, takes all of it.
    """
    _require_leaves(trial)
    size = _generic(trial, 4, NORM)
    choose = lambda factor: lambda leaf: size(leaf) * factor  # noqa: E731
    start = snapshot(trial.kept(trial.fresh()))
    once, larger = (_kept(trial)(trial.chosen(trial.fresh(), *[choose(f)] * trial.window)) for f in (1.0, 2.0))
    twice = _kept(trial)(trial.chosen(trial.fresh(), *[choose(1.0)] * (2 * trial.window)))
    for leaf in trial.leaves:
        for at in _own(leaf, start):
            old, one, four, two = (_f64(s.leaves[at]) for s in (start, once, larger, twice))
            if np.any(old) or not np.all(one) or not np.allclose(four, 4 * one, rtol=1e-3):
                continue
            shares = one / np.abs(size(leaf)) ** 2 if one.shape == leaf.shape else np.ones(1)
            if np.all(np.abs(shares) < 0.5) and np.all(two >= 2 * one * (1 - 2.0**-20)):
                raise Broken(
                    f"leaf {start.paths[at]} takes {np.abs(shares).ravel()[0]:.3g} of a squared gradient and forgets "
                    f"none of it: {value(once.leaves[at], 0)} after one, {value(twice.leaves[at], 0)} after two"
                )


def loss_in_float32(trial: Trial) -> None:
    """The loss is formed and scaled in float32.

    Rule 1: what is differentiated is the scale times one float32 loss, at every scale; neither it nor the reported loss
    lies on the grid of bfloat16 or float16.
    """
    _require_leaves(trial)
    state, reported, differentiated = trial.fresh(), [], []
    for seed in range(4):
        state = trial.chosen(state, *[_generic(trial, seed, NORM)] * trial.window)
        out, seen = trial.with_gradients(copied(state), None)
        differentiated += [x for found in seen.losses.values() for x in found]
        if (reader := trial.read("loss")) is not None:
            reported.append(np.asarray(calling("the adapter's loss", reader, out)))
    for what, losses in (("the loss that is differentiated", differentiated), ("the reported loss", reported)):
        for x in losses:
            if x.dtype in HALF:
                raise Broken(f"{what} is {x.dtype.name}")
        seen_values = np.unique(np.concatenate([_f64(x).ravel() for x in losses]) if losses else np.zeros(0))
        seen_values = seen_values[np.isfinite(seen_values) & (seen_values != 0)]
        for bits, name in ((8, "bfloat16"), (11, "float16")):
            if len(seen_values) < 3:
                continue
            if np.all(_on_grid(seen_values, bits)):
                raise Broken(f"{what} is a number of {name} in every step: {seen_values[0]:.9g}, {seen_values[1]:.9g}")
            for weight in _weights(trial):
                if np.all(_near_grid(seen_values * weight, bits)):
                    raise Broken(
                        f"{what}, times {weight:g}, is a number of {name} in every step: "
                        f"{seen_values[0] * weight:.9g}, {seen_values[1] * weight:.9g}. A sum was rounded"
                    )
    if trial.has_scale and len(trial.scalers) == 1:
        _require_scaled(trial, state)


def _require_scaled(trial: Trial, state: Any) -> None:
    """Requires that the loss is multiplied by the scale, exactly, wherever it is multiplied at all."""
    losses = {}
    for scale in _scales(trial):
        seen = trial.with_gradients(trial.at_scale(copied(state), scale), None)[1].losses
        # Replicas report in any order.
        losses[scale] = {
            call: np.sort(np.concatenate([_f64(x).ravel() for x in found])) for call, found in seen.items()
        }
    first, usual = next(iter(losses.items()))
    for scale, found in losses.items():
        for call, seen_losses in found.items():
            for loss, other in zip(seen_losses, usual[call], strict=False):
                expected = other * (scale / first)
                if loss not in (expected, other) and abs(expected) < 2.0**127:
                    raise Broken(
                        f"the scaled loss is {other:.9g} under the scale {first:g}, and {loss:.9g} under {scale:g} "
                        f"instead of {expected:.9g}"
                    )


def growth_step_is_right(trial: Trial) -> None:
    """The step on which the scale grows does what any other step does, and is skipped like any other.

    Defect B7: unscaled with the new scale, gradients are half of what they should be. It is compared with the same step
    after an overflow of a whole window, on which the scale does not grow. Skipped if the step draws random numbers.
    """
    if trial.draws:
        raise Skipped("the step draws random numbers, and a skipped step uses up its own")
    if not trial.has_scale:
        raise Skipped("the adapter has no loss_scale: nothing to say about the scale")
    for scaler in range(len(trial.scalers)):
        count = trial.growth_of(scaler)
        if count is None:
            raise Skipped(f"the scale does not grow within {GROWTH_STEPS} steps or {GROWTH_SECONDS:g} s on this batch")
        window = trial.window
        if count <= window:
            raise Skipped("the scale grows on every update; give the laws a step that grows on every second one")
        before = (count - 1) // window * window
        choices = [_generic(trial, seed % 5, NORM) for seed in range(before + window)]
        state = trial.chosen(trial.fresh(), *choices[:before])
        start, fault = copied(state), trial.any_fault
        usual = copied(state)
        for _ in range(window):
            usual = trial.step(usual, fault)
        usual = trial.chosen(usual, *choices[before:])
        grown = trial.chosen(state, *choices[before:])
        compare = trial.compare if not trial.leaves else lambda a, b, _: first_difference(*map(_kept(trial), (a, b)))
        if different := compare(usual, grown, start):
            raise Broken(f"on the step on which the scale grows, step {count}: {different}")
        if window == 1:
            kept = _kept(trial)(start)
            if different := first_difference(kept, _kept(trial)(trial.step(copied(start), fault))):
                raise Broken(f"{fault}, as step {count}, on which the scale would grow: {different}")


def scale_stays_in_its_range(trial: Trial) -> None:
    """A loss scale falls to its floor and grows to its cap: always a power of two, and never beyond what is claimed.

    Rule 8, defect B10, trap T10. At floor and cap, overflows are skipped and finite steps applied as anywhere.
    """
    if not trial.has_scale:
        raise Skipped("the adapter has no loss_scale: nothing to say about the scale")
    least, most = trial.read("min_scale"), trial.read("max_scale")
    for scaler in range(len(trial.scalers)):
        state, fault, same = trial.fresh(), trial.any_fault, 0
        before = trial.scale(state, scaler)
        for count in range(1, FALLS * trial.window):
            state = trial.step(state, fault)
            scale = trial.scale(state, scaler)
            if words := _wrong(scale, least, most):
                raise Broken(f"after {count} overflows in a row the scale is {scale:g}, {words}")
            if scale > before:
                raise Broken(f"overflow {count} in a row raises the scale from {before:g} to {scale:g}")
            same = same + 1 if scale == before else 0
            before = scale
            if same > 16 * trial.window and count % trial.window == 0:
                break
        if least is not None and len(trial.scalers) == 1 and before > least:
            raise Broken(f"the scale stays at {before:g}, where overflows have brought it; claimed: down to {least:g}")
        if len(trial.scalers) == 1:
            _require_obeyed(trial, state, f"under the scale {before:g}, where overflows have brought it")
        if trial.moves:
            _require_growth(trial, state, scaler, "from its floor of")
    if most is not None and len(trial.scalers) == 1 and trial.moves:
        _require_obeyed(trial, trial.at_scale(trial.fresh(), most), f"under the scale {most:g}, its cap")
        _require_growth(trial, trial.at_scale(trial.fresh(), most), 0, "")
        factor = trial.growth_factor
        if factor is not None and _wrong(most / factor, least, most) is None:
            last = _require_growth(trial, trial.at_scale(trial.fresh(), most / factor), 0, "to its cap from")
            if last is not None and last != most:
                raise Broken(f"the scale grows from {most / factor:g} to {last:g}; claimed: up to {most:g}")


def scale_moves_as_claimed(trial: Trial) -> None:
    """The scale grows after as many applied updates in a row, falls after as many overflows, and by as much as claimed.

    torch's rule: both counts begin anew after an overflow, and after an applied update. A growth that would exceed the
    cap is left out, and a fall ends at the floor.
    """
    if not trial.has_scale:
        raise Skipped("the adapter has no loss_scale: nothing to say about the scale")
    interval, hysteresis = trial.read("growth_interval"), trial.read("hysteresis")
    if interval is None and hysteresis is None:
        raise Skipped("the adapter claims neither growth_interval nor hysteresis")
    up, down = trial.read("growth_factor"), trial.read("backoff_factor")
    least, most = trial.read("min_scale"), trial.read("max_scale")
    row = hysteresis or 1

    def require_moves(before: str, after: str, expected: int) -> None:
        """Requires that the last of the updates `after`, and none before, moves the scale: up, not at all, or down."""
        state = _updates(trial, trial.fresh(), before)
        for at in range(len(after)):
            scale, state = trial.scale(state), _updates(trial, state, after[at])
            found = int(np.sign(trial.scale(state) - scale))
            wanted = expected if at == len(after) - 1 else 0
            if (wanted > 0 and most is not None and scale * (up or 2.0) > most) or (wanted < 0 and scale == least):
                wanted = 0
            if found != wanted:
                words = {1: "rises", 0: "stays", -1: "falls"}
                raise Broken(
                    f"after the updates {before + after[: at + 1]!r} (g: applied, o: overflow) the scale "
                    f"{words[found]} from {scale:g} to {trial.scale(state):g}; claimed: it {words[wanted]}"
                )
            factor = up if found > 0 else down if found < 0 else None
            if factor is not None and trial.scale(state) != max(scale * factor, least or 0.0):
                raise Broken(f"the scale moves from {scale:g} to {trial.scale(state):g}; claimed: {factor:g} times it")

    if interval is not None and interval <= 200:
        fall = "o" * row
        for before in ("", fall, "g" * interval, fall + "g" * interval, "g" * (interval - 1) + "o"):
            require_moves(before, "g" * interval, 1)
    if hysteresis is not None:
        for before in ("", "g", "o" * row + "g", *["o" * (row - 1) + "g"] * (row > 1)):
            require_moves(before, "o" * row, -1)
        if row > 1 and (interval is None or interval > 1):
            require_moves("", "o" * (row - 1) + "g" + "o" * (row - 1), 0)


def complex_parameters_descend(trial: Trial) -> None:
    """A complex parameter moves by both parts of its gradient in the same direction.

    Trap T24: JAX's gradient of a real loss is the conjugate of the direction in which the loss rises, so that a step
    that does not conjugate it descends in the real part and ascends in the imaginary one.
    """
    leaves = [leaf for leaf in trial.some_leaves if np.issubdtype(leaf.dtype, np.complexfloating)]
    if not leaves:
        raise Skipped("the step trains no complex parameter")
    generic = _generic(trial, 11, NORM)
    for leaf in leaves:

        def only(factor: complex, leaf: GradientLeaf = leaf) -> Snapshot:
            same = lambda other: (other.call, other.path) == (leaf.call, leaf.path)  # noqa: E731
            return _run(trial, lambda other: generic(other).real * (factor if same(other) else 0))

        none, real, imaginary = only(0), only(1), only(1j)
        grads = generic(leaf).real
        for at in _own(leaf, none):
            if none.leaves[at].dtype.kind == "c":
                along = [
                    float(np.sum(factor * grads * (run.leaves[at] - none.leaves[at])).real)
                    for factor, run in ((1, real), (1j, imaginary))
                ]
                if along[0] and not along[1]:
                    raise Broken(f"leaf {none.paths[at]} moves by a real gradient, and by an imaginary one it does not")
                if along[0] * along[1] < 0:
                    raise Broken(
                        f"leaf {none.paths[at]} moves {'with' if along[0] > 0 else 'against'} a real gradient and "
                        f"{'with' if along[1] > 0 else 'against'} an imaginary one: the gradient is not conjugated"
                    )


def _require_growth(trial: Trial, state: Any, scaler: int, where: str) -> float | None:
    """Requires that a scale grows soundly, if it is known how soon, three times in a row. Returns the last scale."""
    least, most = trial.read("min_scale"), trial.read("max_scale")
    count = trial.growth_of(scaler)
    if count is None or count > 100:
        return None
    low = before = trial.scale(state, scaler)
    for _ in range(3 * (count + 1) * trial.window):
        state = trial.chosen(state, _generic(trial, 0, NORM))
        scale = trial.scale(state, scaler)
        if words := _wrong(scale, least, most):
            raise Broken(f"after finite steps the scale grows from {before:g} to {scale:g}, {words}")
        if scale < before:
            raise Broken(f"a finite step lowers the scale from {before:g} to {scale:g}")
        before = scale
    if where and before == low:
        raise Broken(f"the scale does not grow {where} {low:g}, though it grew after {count} steps at first")
    return before


def scale_stands_in_a_window(trial: Trial) -> None:
    """Where an overflow drops a window of microbatches, the loss scale moves between windows only."""
    window = _window(trial)
    if _drops(trial) != "window":
        raise Skipped("an overflow drops a microbatch, not the window")
    fault = trial.any_fault
    for bad in [None, *range(window)]:
        state, before = trial.fresh(), None
        for at in range(4 * window):
            state = trial.step(state, fault if at % window == bad else Clean())
            scale = trial.scale(state)
            if before is not None and at % window and at % window < window - 1 and scale != before:
                raise Broken(f"the scale moves from {before:g} to {scale:g} after microbatch {at % window + 1}")
            if before is not None and at % window == 0 and window > 1 and scale != before:
                raise Broken(f"the scale moves from {before:g} to {scale:g} after the first microbatch of a window")
            before = scale


def dropped_window_is_empty(trial: Trial) -> None:
    """An overflow in a window of microbatches leaves nothing behind, not even what had been summed before."""
    window = _window(trial)
    if trial.draws:
        raise Skipped("the step draws random numbers, and a skipped step uses up its own")
    _require_leaves(trial)
    fault, kept = trial.any_fault, _updated(trial)
    one = lambda leaf: _generic(trial, 1, NORM, bits=8)(leaf)  # noqa: E731
    two = _generic(trial, 2, NORM)
    for bad in range(window):
        state = trial.fresh()
        for at in range(window):
            state = trial.step(state, fault) if at == bad else trial.chosen(state, one)
        found = kept(trial.chosen(state, *[two] * window))
        allowed = {
            "the window is dropped": [two] * window,
            "the microbatch is left out": [one] * (window - 1) + [two] * window,
            "the sum is divided by the number kept": [one] * window + [two] * window,
        }
        differences = [first_difference(kept(trial.chosen(trial.fresh(), *c)), found) for c in allowed.values()]
        if all(differences):
            raise Broken(
                f"an overflow in microbatch {bad + 1} of {window}, and then a good window, differ from all ways "
                f"to drop it: {differences[0]}"
            )


# --- parts of laws


def generic_gradients(trial: Trial, count: int) -> list[Choice]:
    """Returns random gradients for some steps in a row, whose bits do not depend on the loss scale."""
    return [_generic(trial, seed, NORM) for seed in range(count)]


def _updates(trial: Trial, state: Any, kinds: str) -> Any:
    """The state after some updates: a "g" with chosen gradients, an "o" with an overflow in each of its steps."""
    for kind in kinds:
        for _ in range(trial.window):
            state = trial.step(state, trial.any_fault) if kind == "o" else trial.chosen(state, _generic(trial, 0, NORM))
    return state


def _require_obeyed(trial: Trial, state: Any, where: str) -> None:
    """Requires that an overflow is skipped and that finite gradients are applied. The state is kept."""
    start = _kept(trial)(state)
    bad = _updates(trial, copied(state), "o")
    if different := first_difference(start, _kept(trial)(bad)):
        if trial.window == 1:
            raise Broken(f"{where}, an overflow is not skipped: {different}")
    # Where the scaled gradients underflow, what is applied may change nothing.
    half = any(leaf.dtype == np.float16 for leaf in trial.leaves)
    fits = trial.scale_or_one(state) * _element(trial, NORM) > (2.0**-14 if half else 2.0**-120)
    if trial.leaves and fits and not first_difference(start, _kept(trial)(_updates(trial, copied(state), "g"))):
        raise Broken(f"{where}, a step with small finite gradients is not applied")


def _window(trial: Trial) -> int:
    if trial.window == 1:
        raise Skipped("every step is an update: no window of microbatches")
    if not trial.has_scale:
        raise Skipped("the adapter has no loss_scale: nothing to say about the scale")
    return trial.window


def _drops(trial: Trial) -> str:
    """What an overflow in the first microbatch drops: the "window", or the "microbatch", whose place the next takes."""
    kept, fault = _updated(trial), trial.any_fault
    state = trial.step(trial.fresh(), fault)
    for _ in range(trial.window - 1):
        state = trial.step(state)
    before = kept(state)
    return "window" if not first_difference(before, kept(trial.step(copied(state)))) else "microbatch"


def _kept(trial: Trial) -> Callable[[Any], Snapshot]:
    return lambda state: snapshot(trial.kept(state))


def _updated(trial: Trial) -> Callable[[Any], Snapshot]:
    """What a state keeps, but for what moves with each microbatch of a window: batch statistics and counts."""
    start = snapshot(trial.kept(trial.fresh()))
    inside = snapshot(trial.kept(trial.run([Clean()] * (trial.window - 1))))
    still = [np.array_equal(a, b, equal_nan=True) for a, b in zip(start.leaves, inside.leaves, strict=True)]

    def kept(state: Any) -> Snapshot:
        whole = snapshot(trial.kept(state))
        places = [i for i, here in enumerate(still) if here]
        return Snapshot([whole.paths[i] for i in places], [whole.leaves[i] for i in places])

    return kept


def _require_leaves(trial: Trial) -> None:
    if not trial.leaves:
        raise Skipped(NO_GRADIENT)


def _require_felt(trial: Trial, base: Any, fine: Any, coarse: Any, ratio: float, words: str) -> None:
    """Requires that gradients, all changed a little, change each leaf that a large change shows to have room.

    Args:
      trial: the step.
      base: makes the first gradient of a generic one; `fine` and `coarse` make the two others.
      fine: a small change.
      coarse: a large change.
      ratio: how much smaller the small change is.
      words: the small change in words.
    """
    _require_leaves(trial)
    generic = _generic(trial, 7, NORM)
    usual = _run(trial, lambda leaf: base(generic(leaf)))
    for path, x in zip(usual.paths, usual.leaves, strict=True):
        if x.dtype.kind in "fcV" and not np.all(np.isfinite(_f64(x))):
            raise Broken(f"with finite gradients, some of them 0, leaf {path} is not finite")
    middle = lambda x: (base(x) + coarse(x)) / 2  # noqa: E731

    def run(change: Callable[[np.ndarray], np.ndarray]) -> Snapshot:
        return _run(trial, lambda leaf: change(generic(leaf)))

    large, half, small = run(coarse), run(middle), run(fine)
    for leaf in trial.leaves:
        if (leaf.dtype in HALF and ratio > TINY * 4 / NORM) or _too_small(trial, leaf, TINY):
            continue
        for at in _own(leaf, usual):
            if usual.leaves[at].dtype.itemsize <= 2:
                continue
            a, b, c, d = (_f64(s.leaves[at]) for s in (usual, large, half, small))
            change, less = np.max(np.abs(b - a), initial=0), np.max(np.abs(c - a), initial=0)
            if not less or not change or not np.all(np.isfinite(b)):
                continue
            power = math.log2(change / less)
            unit = np.max(np.abs(a), initial=2.0**-100) * float(np.finfo(np.float32).eps)
            # A leaf has room if what the large change predicts for the small one is above its rounding.
            if 0.5 < power < 2.5 and change * ratio**power > 16 * unit and np.array_equal(a, d):
                raise Broken(f"a gradient for {leaf.path} of {words} leaves {usual.paths[at]} as it is, to the bit")


def _run(trial: Trial, choice: Choice) -> Snapshot:
    """What one update with the same gradients in each microbatch makes of a fresh state."""
    state = trial.fresh()
    if any(leaf.dtype == np.float16 for leaf in trial.leaves) and trial.has_scale and trial.moves:
        state = trial.at_scale(state, max(trial.scale(state), 2.0**14))
    return snapshot(trial.kept(trial.chosen(state, *[choice] * trial.window)))


def _too_small(trial: Trial, leaf: GradientLeaf, size: float) -> bool:
    """Whether a gradient of this size, scaled, is below the normal range of its dtype."""
    if leaf.dtype != np.float16:
        return False
    scale = trial.scale_or_one(trial.fresh())
    return size * (max(scale, 2.0**14) if trial.has_scale and trial.moves else scale) < 2.0**-14


def _element(trial: Trial, norm: float) -> float:
    """The root mean square of the elements of gradients of this norm, over all parameters."""
    return norm / math.sqrt(max(1, sum(math.prod(leaf.shape) for leaf in trial.leaves)))


def _generic(trial: Trial, seed: int, norm: float, *, bits: int = 24) -> Choice:
    """Chooses random gradients of this norm. Float32 ones have all their bits; at every scale, they have the same."""
    size = _element(trial, norm)

    def choose(leaf: GradientLeaf) -> np.ndarray:
        random = np.random.default_rng([seed, zlib.crc32(leaf.path.encode()), leaf.call])

        def real() -> np.ndarray:
            x = random.uniform(1, 2, leaf.shape) * random.choice([-1, 1], leaf.shape) * size
            return _rounded(x, min(bits, {2: 11 if leaf.dtype == np.float16 else 8}.get(leaf.dtype.itemsize, 24)))

        return real() + 1j * real() if np.issubdtype(leaf.dtype, np.complexfloating) else real()

    return choose


def _sized(trial: Trial, size: float, *, powers: bool = False) -> Choice:
    """Chooses gradients of this norm, in random directions; of equal magnitude with `powers`."""
    if not powers:
        generic = _generic(trial, 3, NORM)
        return lambda leaf: generic(leaf) * (size / NORM)
    signs = _generic(trial, 3, 1.0)
    return lambda leaf: np.sign(signs(leaf).real) * size


def _largest(leaf: GradientLeaf, *, top: float, scale: float) -> np.ndarray:
    """Chooses gradients that are `top` when scaled, or 2**15 where their dtype does not hold that."""
    return np.full(leaf.shape, min(top, 2.0**15 if leaf.dtype == np.float16 else top) / scale)


def _scales(trial: Trial) -> list[float]:
    """The scales at which generic gradients stay normal numbers of their dtypes."""
    if not trial.has_scale:
        return [1.0]
    if len(trial.scalers) > 1:
        return [trial.scale(trial.fresh())]
    size = _element(trial, NORM)
    half = any(leaf.dtype == np.float16 for leaf in trial.leaves)
    return [s for s in trial.scales if not half or (s * size * 2 < 2.0**15 and s * TINY / NORM * size > 2.0**-14)] or [
        trial.scale(trial.fresh())
    ]


def _own(leaf: GradientLeaf, kept: Snapshot) -> list[int]:
    """The places of a parameter and of what the optimizer keeps for it: leaves whose path ends with its own."""
    floats = [i for i, x in enumerate(kept.leaves) if x.dtype.kind in "fcV" and x.size]
    named = [i for i in floats if leaf.path and kept.paths[i].endswith(leaf.path)]
    return named or [i for i in floats if kept.leaves[i].shape[-len(leaf.shape) or None :] == leaf.shape]


def _reduced(trial: Trial) -> list[Any]:
    sums = [] if trial.jaxpr is None else [e for e, _ in equations(trial.jaxpr) if e.primitive.name in COLLECTIVE_SUMS]
    return [operand for equation in sums for operand in equation.invars]


def _wrong(scale: float, least: float | None, most: float | None) -> str | None:
    if not (math.isfinite(scale) and 2.0**-126 <= scale <= 2.0**126 and math.frexp(scale)[0] == 0.5):
        return "no power of two between 2**-126 and 2**126"
    if (least is not None and scale < least) or (most is not None and scale > most):
        return f"outside of what is claimed: {least} to {most}"
    return None


def _f64(x: Any) -> np.ndarray:
    x = np.asarray(x)
    return x.astype(np.complex128 if x.dtype.kind == "c" else np.float64)


def _reals(x: np.ndarray) -> np.ndarray:
    return np.stack([x.real, x.imag]).ravel() if x.dtype.kind == "c" else x.ravel()


def _steps(x: np.ndarray, old: np.ndarray) -> int:
    """The number of distinct lengths by which a leaf has moved."""
    return len(np.unique(np.round(np.abs(x.astype(np.float64) - old) * 2.0**40)))


def _rounded(x: np.ndarray, bits: int) -> np.ndarray:
    mantissa, exponent = np.frexp(x)
    return np.ldexp(np.round(np.ldexp(mantissa, bits)), exponent - bits)


def _weights(trial: Trial) -> list[float]:
    """What a sum over the batch may have been divided by: numbers of rows and of elements, and sums of weights."""
    found: set[float] = set()
    for leaf in jax.tree.leaves(trial.adapter.batch):
        if np.ndim(leaf) and np.size(leaf):
            found |= {float(np.shape(leaf)[0]), float(np.size(leaf))}
            if np.ndim(leaf) == 1 and np.asarray(leaf).dtype.kind in "fiub":
                found.add(float(np.sum(np.asarray(leaf, np.float64))))
    return sorted(weight for weight in found if math.isfinite(weight) and weight > 0)


def _near_grid(x: np.ndarray, bits: int) -> np.ndarray:
    """Which numbers are within the rounding of float32 of one with a significand of at most `bits` bits."""
    return np.asarray(np.abs(_rounded(x, bits) - x) <= 2.0**-23 * np.abs(x))


def _on_grid(x: np.ndarray, bits: int) -> np.ndarray:
    """Which numbers have a significand of at most `bits` bits."""
    x = x.astype(np.float64)
    return np.asarray(_rounded(x, bits) == x)
