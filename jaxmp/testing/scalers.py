"""Laws of a loss scaler: how it scales a loss, unscales gradients and moves its scale."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from hypothesis import strategies as st

from jaxmp.precision.policy_tree import PolicyTree
from jaxmp.scaling.historical import DeepSpeedScaler, FairseqScaler, FlaxScaler, MegatronScaler
from jaxmp.scaling.scalers import LARGEST, SMALLEST, Scaling
from jaxmp.scaling.transform import loss_scaling, scale_loss
from jaxmp.testing.laws import Broken, Law, Laws, Skipped, calling, require, require_methods
from jaxmp.testing.snapshots import describe, first_difference, restored, snapshot, type_difference
from jaxmp.testing.strategies import Steps, float_bits, leaves_without_gradient, overflow_traces
from jaxmp.trees import is_floating, same_structure

METHODS = ("init", "scale", "unscale", "adjust")
MANY = 2**18
"""finite steps in which a scale has to show its cap: 130 growths at an interval of 2000"""


@dataclasses.dataclass(frozen=True)
class ScalerAdapter:
    """The functions of a scaler that `scaler_laws` calls. Any object with these attributes can stand in for it."""

    init: Callable[[], Any]
    """the state before the first step, a pytree"""
    scale: Callable[[Any, jax.Array], jax.Array]
    """`scale(state, loss)`: the loss, a scalar, times the scale"""
    unscale: Callable[[Any, Any], Any]
    """`unscale(state, grads)`: a pytree of scaled gradients divided by the scale"""
    adjust: Callable[[Any, jax.Array], Any]
    """`adjust(state, finite)`: the state after a step whose gradients were all finite, or not (bool scalar)"""
    growth_interval: int | None = None
    """finite steps in a row before the scale grows; None if the scaler claims no number"""
    min_scale: float | None = None
    """floor of the scale; None if the scaler claims none"""
    max_scale: float | None = None
    """cap of the scale; None if the scaler claims none"""
    hysteresis: int | None = None
    """number of overflows in a row from which on the scale is lowered; None if the scaler claims none"""
    growth_factor: float | None = None
    """factor by which the scale grows; None if the scaler claims none"""
    backoff_factor: float | None = None
    """factor by which the scale falls; None if the scaler claims none"""


def scaler_laws(adapter: Any) -> Laws:
    """Returns the laws of a loss scaler: a table when printed, tests when pytest collects them.

    Args:
      adapter: a `ScalerAdapter`, or any object with its methods and, if it claims them, `growth_interval`, `min_scale`,
        `max_scale`, `hysteresis`, `growth_factor` and `backoff_factor`. `from_value_and_grad` makes one for a library
        that has all of it in one function.
        Or what `Experiment(scaler=)` takes: a scaler such as `DynamicScaler()`, or `Scaling("dynamic")`, of which
        "auto" means the scaler of a float16 policy; or a mapping of several by name. Each is tested as `loss_scaling`
        uses it, and claims what its fields say.

    Raises:
      InputError: the adapter lacks a method.

    >>> import jmp
    >>> from jaxmp.testing import ScalerAdapter, scaler_laws
    >>> laws = scaler_laws(
    ...     ScalerAdapter(
    ...         init=lambda: jmp.DynamicLossScale(jnp.float32(2.0**15)),
    ...         scale=lambda state, loss: state.scale(loss),
    ...         unscale=lambda state, grads: state.unscale(grads),
    ...         adjust=lambda state, finite: state.adjust(finite),
    ...     )
    ... )
    >>> laws["leaves_without_gradient_stay"].words
    "unscale turned {'w': float32[1], 'x': int32[]} into {'w': float32[1], 'x': float32[]}: leaf ['x'] was int32[]"
    """
    if isinstance(adapter, Mapping):
        each = {name: scaler_laws(scaler) for name, scaler in adapter.items()}
        all_laws = [(name, law) for name in each for law in each[name].laws.values()]
        laws = [dataclasses.replace(law, name=f"{name}/{law.name}") for name, law in all_laws]
        return Laws(f"the scalers {', '.join(each)}", laws)
    name = "the scaler" if isinstance(adapter, ScalerAdapter) else type(adapter).__name__
    if isinstance(adapter, Scaling):
        adapter = adapter.make(PolicyTree.parse("mixed_float16"))
        name = f"{name}, a {type(adapter).__name__}"
    if callable(getattr(adapter, "update", None)) and not callable(getattr(adapter, "adjust", None)):
        adapter = _in_loss_scaling(adapter)
    subject = _Subject(adapter)
    checks = (
        types_stay,
        same_in_jit_and_scan,
        survives_saving,
        power_of_two,
        within_bounds,
        right_direction,
        falls_and_recovers,
        growth_interval,
        bounds_are_reached,
        hysteresis,
        factors,
        loss_in_float32,
        unscaling_is_exact,
        unscales_in_float32,
        scalars_and_complex_are_unscaled,
        leaves_without_gradient_stay,
        fp8_leaves_stay,
    )
    laws = [Law.of(check, subject) for check in checks]
    require_methods("scaler_laws", adapter, METHODS, laws)
    return Laws(name, laws)


def _in_loss_scaling(scaler: Any) -> ScalerAdapter:
    """Makes the adapter of one of jaxmp's scalers, or of a scaler with its two methods, inside `loss_scaling`."""
    tx = loss_scaling(optax.identity(), scaler)

    def claim(name: str, *unless: type) -> Any:
        return None if isinstance(scaler, unless) else getattr(scaler, name, None)

    return ScalerAdapter(
        init=lambda: tx.init({}),
        scale=lambda state, loss: scale_loss(loss, state),
        unscale=lambda state, grads: tx.update(grads, state, grads)[0],
        # A gradient so small that a scaler which looks at its size may grow.
        adjust=lambda state, finite: tx.update(jnp.where(finite, jnp.float32(2.0**-100), jnp.inf), state)[1],
        # What these count is not in a row, or one step more: see their docstrings.
        growth_interval=claim("growth_interval", FlaxScaler, DeepSpeedScaler, FairseqScaler),
        min_scale=claim("min_scale"),
        max_scale=claim("max_scale"),
        hysteresis=claim("hysteresis", MegatronScaler, DeepSpeedScaler),
        growth_factor=claim("growth_factor"),
        backoff_factor=claim("backoff_factor"),
    )


def from_value_and_grad(
    init: Callable[[], Any],
    value_and_grad: Callable[[Any, Callable[[Any], jax.Array], Any], tuple[Any, Any, Any]],
    **claims: Any,
) -> ScalerAdapter:
    """Makes an adapter for a library that scales, unscales and adjusts in one function.

    Args:
      init: `init()` returns the state before the first step.
      value_and_grad: `value_and_grad(state, loss_fn, params)` returns the unscaled loss, the unscaled gradients and the
        next state.
      claims: `growth_interval`, `min_scale` and so on, as in `ScalerAdapter`.
    """

    @jax.custom_vjp
    def chosen(params: Any, loss: Any, grads: Any) -> Any:
        return loss

    # Whatever cotangent arrives, these are the gradients; "cotangent" among them stands for what arrived.
    def backward(grads: Any, cotangent: Any) -> Any:
        if grads is None:
            grads = {"cotangent": cotangent.astype(jnp.float32), "one": jnp.ones((), jnp.float32)}
        return grads, None, None

    chosen.defvjp(lambda params, loss, grads: (loss, grads), backward)

    def scale(state: Any, loss: Any) -> Any:
        params = {"cotangent": jnp.float32(0), "one": jnp.float32(0)}
        _, grads, _ = value_and_grad(state, lambda p: chosen(p, loss, None), params)
        # What was divided by the scale on the way is in both; XLA must not cancel it, where one alone would overflow.
        cotangent, one = jax.lax.optimization_barrier((grads["cotangent"], grads["one"]))
        return loss.astype(jnp.float32) * (cotangent / one)

    def unscale(state: Any, grads: Any) -> Any:
        params = jax.tree.map(jnp.zeros_like, grads)
        return value_and_grad(state, lambda p: chosen(p, jnp.float32(1), grads), params)[1]

    def adjust(state: Any, finite: Any) -> Any:
        grad = jnp.where(finite, jnp.float32(1), jnp.inf)
        return value_and_grad(state, lambda p: chosen(p, jnp.float32(1), grad), jnp.float32(0))[2]

    return ScalerAdapter(init, scale, unscale, adjust, **claims)


class _Subject:
    """An adapter with its functions compiled, and states of interest."""

    def __init__(self, adapter: Any):
        self.adapter = adapter
        self._adjust: Any = jax.jit(adapter.adjust) if callable(getattr(adapter, "adjust", None)) else None
        self._scale: Any = jax.jit(adapter.scale) if callable(getattr(adapter, "scale", None)) else None

    def claim(self, name: str) -> Any:
        value = getattr(self.adapter, name, None)
        if value is None:
            raise Skipped(f"the adapter claims no {name}")
        return value

    def init(self) -> Any:
        return calling("the adapter's init", self.adapter.init)

    def adjust(self, state: Any, finite: bool) -> Any:
        return calling("the adapter's adjust", self._adjust, state, jnp.bool_(finite), given=f"finite={finite}")

    def scale_of(self, state: Any) -> np.float32:
        scaled = calling("the adapter's scale", self._scale, state, jnp.float32(1))
        if jnp.shape(scaled) != ():
            raise Broken(f"scale of a scalar loss returned {describe(scaled)}")
        return np.float32(scaled)

    def unscale(self, state: Any, grads: Any) -> Any:
        out = calling("the adapter's unscale", self.adapter.unscale, state, grads, given=describe(grads))
        if not same_structure(out, grads):
            raise Broken(f"unscale returned {describe(out)} for {describe(grads)}")
        return out

    def after(self, steps: Steps) -> Any:
        state = self.init()
        for finite in steps:
            state = self.adjust(state, finite)
        return state

    def finite_run(self, state: Any) -> tuple[Any, np.ndarray]:
        """The state after `MANY` more finite steps, and the scale after each, float32 (MANY,)."""

        def step(state: Any, _: None) -> tuple[Any, jax.Array]:
            state = self.adapter.adjust(state, jnp.bool_(True))
            return state, jnp.float32(self.adapter.scale(state, jnp.float32(1)))

        run = jax.jit(lambda state: jax.lax.scan(step, state, None, length=MANY))
        state = self.adjust(state, True)  # what was weakly typed at first no longer is
        state, scales = calling("the adapter's adjust", run, state, given=f"{MANY} finite steps in a scan")
        return state, np.asarray(scales)

    @functools.cached_property
    def longest_run(self) -> tuple[Any, np.ndarray]:
        return self.finite_run(self.init())

    @functools.cached_property
    def states(self) -> dict[str, Any]:
        """States in which unscaling has gone wrong somewhere."""
        _, scales = self.longest_run
        states = {"at first": self.init(), "after an overflow": self.after(Steps([(False, 1)]))}
        grown = np.flatnonzero(scales[1:] != scales[:-1])
        if len(grown):
            good = int(grown[0]) + 2  # one step before the run, and `scales` begins after its first
            states[f"on the growth step ({good + 1} finite steps)"] = self.after(Steps([(True, good)]))
        states["after 400 overflows"] = self.after(Steps([(False, 400)]))
        states[f"after {MANY} finite steps"] = self.longest_run[0]
        return states


def types_stay(subject: _Subject) -> None:
    """The state keeps its structure, dtypes and weak types, so that a run compiles once.

    Trap T7, defect B11.
    """

    def counterexample(steps: Steps) -> str | None:
        different = type_difference(subject.init(), subject.after(steps))
        return f"after {steps}: {different}" if different else None

    require(overflow_traces(max_runs=2, longest=3, min_runs=1), counterexample)


def same_in_jit_and_scan(subject: _Subject) -> None:
    """The scale moves alike eagerly, in jit, in scan and in pmap.

    Defect B1.
    """
    adapter = subject.adapter

    def scales(steps: Steps, adjust: Any) -> list[float]:
        state, seen = subject.init(), []
        for finite in steps:
            state = calling(
                "the adapter's adjust", adjust, state, jnp.bool_(finite), given=f"finite={finite}, after {steps}"
            )
            seen.append(float(calling("the adapter's scale", adapter.scale, state, jnp.float32(1))))
        return seen

    def scan(steps: Steps) -> list[float]:
        def step(state: Any, finite: jax.Array) -> Any:
            state = adapter.adjust(state, finite)
            return state, adapter.scale(state, jnp.float32(1))

        flags = jnp.array([bool(f) for f in steps])
        return calling("the adapter's adjust", jax.lax.scan, step, subject.init(), flags, given="a scan")[1].tolist()

    mapped = jax.pmap(lambda state, finite: adapter.adjust(state, finite))

    def on_all_devices(state: Any, finite: Any) -> Any:
        count = jax.local_device_count()
        out = mapped(*jax.tree.map(lambda x: np.stack([np.asarray(x)] * count), (state, finite)))
        return jax.tree.map(lambda x: x[-1], out)

    def counterexample(steps: Steps) -> str | None:
        eager = scales(steps, adapter.adjust)
        others = {"jit": lambda: scales(steps, subject._adjust), "scan": lambda: scan(steps)}
        if len(steps) <= 8:
            others["pmap"] = lambda: scales(steps, on_all_devices)
        for name, run in others.items():
            found = run()
            if found != eager:
                i = next(i for i in range(len(eager)) if found[i] != eager[i])
                return f"after {steps.upto(i + 1)} the scale is {eager[i]:g}, but in {name} it is {found[i]:g}"
        return None

    require(overflow_traces(max_runs=2, longest=40, min_runs=1), counterexample)


def survives_saving(subject: _Subject) -> None:
    """A state that was saved and restored goes on with the same bits.

    Defect B18.
    """

    def counterexample(pair: tuple[Steps, Steps]) -> str | None:
        before, after = pair
        state = subject.after(before)
        saved = snapshot(state)
        through = functools.reduce(subject.adjust, after, state)
        # What happens in between, in some other run, is not to matter.
        for finite in (True, False):
            subject.adjust(subject.init(), finite)
        again = functools.reduce(subject.adjust, after, restored(saved, state))
        different = first_difference(snapshot(through), snapshot(again))
        if different:
            return f"after {before}, saved, restored, and then {after}: {different}"
        return None

    traces = overflow_traces(max_runs=2, longest=5)
    require(st.tuples(traces, traces), counterexample)


def power_of_two(subject: _Subject) -> None:
    """The scale is a power of two, and it and its inverse are normal float32 numbers.

    Defects B9 and B10, trap T10.
    """

    def wrong(scale: Any) -> str | None:
        if is_sound_scale(scale := float(scale)):
            return None
        why = "no power of two" if math.isfinite(scale) and SMALLEST <= scale <= LARGEST else "beyond 2**-126 to 2**126"
        return f"the scale is {scale:g}, {why}"

    def counterexample(steps: Steps) -> str | None:
        words = wrong(subject.scale_of(subject.after(steps)))
        return f"after {steps} {words}" if words else None

    require(overflow_traces(max_runs=3, longest=20), counterexample)
    state = subject.init()
    for i in range(400):
        state = subject.adjust(state, False)
        if words := wrong(subject.scale_of(state)):
            raise Broken(f"after {Steps([(False, i + 1)])} {words}")
    for at in _changes(subject.longest_run[1]):
        if words := wrong(subject.longest_run[1][at]):
            raise Broken(f"after {Steps([(True, at + 2)])} {words}")


def within_bounds(subject: _Subject) -> None:
    """The scale stays within the floor and the cap that the scaler claims."""
    if getattr(subject.adapter, "min_scale", None) is None:
        subject.claim("max_scale")
    least = getattr(subject.adapter, "min_scale", None) or 0.0
    most = getattr(subject.adapter, "max_scale", None) or math.inf

    def counterexample(steps: Steps) -> str | None:
        scale = subject.scale_of(subject.after(steps))
        if least <= scale <= most:
            return None
        return f"after {steps} the scale is {scale:g}; claimed: from {least:g} to {most:g}"

    require(overflow_traces(max_runs=2, longest=80), counterexample)
    scales = subject.longest_run[1]
    for at in _changes(scales):
        if not least <= scales[at] <= most:
            raise Broken(
                f"after {at + 2} finite steps the scale is {scales[at]:g}; claimed: from {least:g} to {most:g}"
            )


def right_direction(subject: _Subject) -> None:
    """An overflow never raises the scale, and a finite step never lowers it."""

    def counterexample(steps: Steps) -> str | None:
        state = subject.init()
        for i, finite in enumerate(steps):
            before, state = subject.scale_of(state), subject.adjust(state, finite)
            after = subject.scale_of(state)
            if after < before if finite else after > before:
                kind = "a finite step" if finite else "an overflow"
                return f"after {steps.upto(i)}, {kind} turned the scale {before:g} into {after:g}"
        return None

    require(overflow_traces(max_runs=3, longest=10), counterexample)
    scales = subject.longest_run[1]
    lowered = np.flatnonzero(scales[1:] < scales[:-1])
    if len(lowered):
        at = int(lowered[0])
        raise Broken(f"after {at + 2} finite steps, one more turned the scale {scales[at]:g} into {scales[at + 1]:g}")


def falls_and_recovers(subject: _Subject) -> None:
    """A scale that grows also falls, and grows again.

    Defect B10: a scale that reaches 0 or inf stays there.
    """
    top, scales = subject.longest_run
    first = subject.scale_of(subject.init())
    if scales[-1] <= first:
        raise Skipped(f"the scale does not grow in {MANY} finite steps")
    state = top
    for _ in range(64):
        state = subject.adjust(state, False)
    low = subject.scale_of(state)
    if not low < scales[-1]:
        raise Broken(f"after {MANY} finite steps the scale is {scales[-1]:g}; after 64 overflows more, still {low:g}")
    _, again = subject.finite_run(state)
    if not again[-1] > low:
        raise Broken(f"at {low:g}, where 64 overflows have brought it, the scale stays for {MANY} finite steps")


def growth_interval(subject: _Subject) -> None:
    """The scale grows after as many finite steps in a row as the scaler claims.

    torch's rule: the count begins anew after a growth and after an overflow. At the cap that it claims, it stays.
    """
    interval = subject.claim("growth_interval")
    factor, most = getattr(subject.adapter, "growth_factor", None) or 1, getattr(subject.adapter, "max_scale", None)
    if getattr(subject.adapter, "growth_factor", None) == 1:
        raise Skipped("the scale grows by a factor of 1")
    if interval > 5000:
        raise Skipped(f"an interval of {interval} takes too long; give the laws a scaler with a shorter one")

    def grown(steps: Steps) -> int | None:
        """Finite steps until the scale grows, or None."""
        state = subject.after(steps)
        for count in range(1, interval + 2):
            before, state = subject.scale_of(state), subject.adjust(state, True)
            if subject.scale_of(state) > before:
                return count
        return None

    before = [Steps(), Steps([(False, 1)]), Steps([(True, interval)]), Steps([(True, interval // 2), (False, 1)])]
    for steps in before:
        scale = float(subject.scale_of(subject.after(steps)))
        if most is not None and (scale >= most or scale * factor > most):
            continue
        count = grown(steps)
        if count != interval:
            ended = f"grew after {count} finite steps" if count else f"did not grow within {interval + 1} finite steps"
            raise Broken(f"after {steps} the scale {ended}; claimed: {interval}")


def bounds_are_reached(subject: _Subject) -> None:
    """Overflows bring the scale to the floor that the scaler claims, and finite steps to its cap; there it stays.

    From the floor it grows again, after as many finite steps as it claims.
    """
    least, most = (getattr(subject.adapter, name, None) for name in ("min_scale", "max_scale"))
    if least is None:
        subject.claim("max_scale")
    low = subject.after(Steps([(False, 1)] * 1200))
    floor = float(subject.scale_of(low))
    if least is not None and floor > least and not _next(least, floor):
        raise Broken(f"after 1200 overflows the scale is {floor:g}; claimed: down to {least:g}")
    if subject.scale_of(subject.adjust(low, False)) != floor:
        raise Broken(f"at {floor:g}, where 1200 overflows have brought it, one more moves the scale")
    scales = subject.longest_run[1]
    rises = scales[1:] > scales[:-1]
    if most is None or not np.any(rises):
        return
    factor = float(np.max(scales[1:][rises] / scales[:-1][rises]))
    top = float(scales[-1])
    # A rule that would need more finite steps than these has not been refuted.
    if top * factor <= most and not np.any(rises[-len(rises) // 4 :]):
        raise Broken(f"after {MANY} finite steps the scale is {top:g}, and no longer grows; claimed: up to {most:g}")
    interval = getattr(subject.adapter, "growth_interval", None)
    if interval is not None and interval <= 5000:
        for _ in range(interval):
            low = subject.adjust(low, True)
        if not subject.scale_of(low) > floor:
            raise Broken(f"at its floor of {floor:g} the scale does not grow after {interval} finite steps")


def hysteresis(subject: _Subject) -> None:
    """The scale is lowered from as many overflows in a row on as the scaler claims, and a finite step ends the row.

    At the floor that it claims, it stays.
    """
    claimed, least = subject.claim("hysteresis"), getattr(subject.adapter, "min_scale", None)
    row = Steps([(False, claimed - 1)])

    def require_scale(before: Steps, steps: Steps, lower: bool) -> None:
        first = subject.scale_of(subject.after(before))
        now = subject.scale_of(functools.reduce(subject.adjust, steps, subject.after(before)))
        if lower and least is not None and first <= least:
            return
        if (now < first) != lower:
            words = "does not lower the scale" if lower else "lowers the scale"
            raise Broken(f"after {before}, {steps} {words}: {first:g}, then {now:g}; claimed: {claimed} in a row")

    starts = [Steps(), Steps([(True, 1)]), Steps([(False, claimed), (True, 1)])]
    interval = getattr(subject.adapter, "growth_interval", None)
    if interval is not None and interval <= 5000:
        starts.append(Steps([(True, interval)]))
    for before in starts:
        require_scale(before, row, False)
        require_scale(before, Steps([(False, claimed)]), True)
        require_scale(before, Steps([(False, claimed - 1), (True, 1), (False, claimed - 1)]), False)
    require_scale(Steps([(False, claimed)]), Steps([(False, 1)]), True)


def factors(subject: _Subject) -> None:
    """The scale grows and falls by the factors that the scaler claims, but for its floor and its cap."""
    up, down = (getattr(subject.adapter, name, None) for name in ("growth_factor", "backoff_factor"))
    if up is None and down is None:
        subject.claim("growth_factor")
    least, most = (getattr(subject.adapter, name, None) for name in ("min_scale", "max_scale"))

    def check(scales: Any, factor: float | None, ends: tuple[Any, ...], words: str) -> None:
        for old, new in itertools.pairwise(scales):
            if factor is not None and new != old and new != old * factor and new not in ends:
                raise Broken(f"{words} moves the scale from {old:g} to {new:g}; claimed: {factor:g} times it")

    scales = subject.longest_run[1]
    check([subject.scale_of(subject.init()), *scales[_changes(scales)]], up, (most,), "a finite step")
    state, falling = subject.init(), []
    for _ in range(200):
        falling.append(float(subject.scale_of(state)))
        state = subject.adjust(state, False)
    check(falling, down, (least, SMALLEST), "an overflow")


def loss_in_float32(subject: _Subject) -> None:
    """The loss is scaled in float32, whatever its dtype.

    Defect B11: the product of a float16 loss and the scale would overflow.
    """

    def counterexample(pair: tuple[str, float]) -> str | None:
        name, loss = pair[0], jnp.asarray(pair[1], pair[0])
        state = subject.init()
        scale, scaled = (
            float(subject.scale_of(state)),
            calling("the adapter's scale", subject._scale, state, loss, given=name),
        )
        if scaled.dtype == jnp.float32 and float(scaled) == float(loss) * scale:
            return None
        return f"a {name} loss of {float(loss):g} under the scale {scale:g} became {scaled.dtype} {float(scaled):g}"

    values = st.sampled_from([1.0, 3.0, 0.5, 100.0])
    require(st.tuples(st.sampled_from(["float32", "float16", "bfloat16"]), values), counterexample)


def unscaling_is_exact(subject: _Subject) -> None:
    """Unscaling a scaled float32 gradient gives it back to the bit.

    Defects B7 and B9: under every scale that is reached, on the growth step too.
    """
    random = np.random.default_rng(0)
    many = np.ldexp(random.uniform(1, 2, 4096), random.integers(-20, 4, 4096)).astype(np.float32)

    def check(name: str, state: Any, grads: np.ndarray) -> str | None:
        scale = subject.scale_of(state)
        with np.errstate(all="ignore"):
            scaled = grads * scale
        fits = np.isfinite(scaled) & (np.abs(scaled) >= 2.0**-126) & (np.abs(grads) >= 2.0**-126)
        grads, scaled = grads[fits], scaled[fits]
        out = np.asarray(subject.unscale(state, {"w": jnp.asarray(scaled)})["w"])
        wrong = np.flatnonzero(out.astype(np.float64) != grads)
        if not len(wrong):
            return None
        at = wrong[np.argmin(np.abs(np.log2(np.abs(grads[wrong]))))]
        return (
            f"{name}, under the scale {scale:g}: a gradient of {grads[at]:.9g}, scaled to {scaled[at]:.9g}, "
            f"came back as {out[at]:.9g} ({len(wrong)} of {len(grads)} gradients differ)"
        )

    for name, state in subject.states.items():
        for grads in (np.ones(1, np.float32), many):
            if words := check(name, state, grads):
                raise Broken(words)

    def counterexample(pair: tuple[Steps, np.ndarray]) -> str | None:
        return check(f"after {pair[0]}", subject.after(pair[0]), np.atleast_1d(pair[1]))

    finite = float_bits(jnp.float32).filter(np.isfinite)
    require(st.tuples(overflow_traces(max_runs=2, longest=6), finite), counterexample)


def unscales_in_float32(subject: _Subject) -> None:
    """Half-precision gradients are unscaled in float32.

    Defect B3: unscaled in float16, a true gradient of 2**-25 becomes 0.
    """
    state = subject.init()
    scale = float(subject.scale_of(state))

    def counterexample(grad: Any) -> str | None:
        out = np.asarray(subject.unscale(state, {"w": jnp.asarray(grad).reshape(1)})["w"])
        true = float(grad) / scale
        if not math.isfinite(true) or 0 < abs(true) < 2.0**-126:
            return None
        if out.dtype == np.float32 and float(out[0]) == float(np.float32(true)):
            return None
        return (
            f"a {grad.dtype.name} gradient of {float(grad):g} under the scale {scale:g} became "
            f"{out.dtype.name} {float(out[0]):g}; true: {true:g}"
        )

    for grad in (np.float16(2.0**-10), jnp.bfloat16(1)):
        if words := counterexample(np.asarray(grad)):
            raise Broken(words)
    for dtype in (jnp.float16, jnp.bfloat16):
        require(float_bits(dtype).filter(lambda x: np.isfinite(x.astype(np.float32))), counterexample)


def scalars_and_complex_are_unscaled(subject: _Subject) -> None:
    """Scalars and complex leaves are unscaled like all others, to the bit: both parts of a complex number."""
    values = {
        "scalar": jnp.float32(1.2345678),
        "complex": jnp.array([1.2345678 - 0.7654321j, 3j], jnp.complex64),
        "complex scalar": jnp.complex64(-0.1234567 + 1.2345678j),
        "half scalar": jnp.float16(0.0625),
    }
    for name, state in subject.states.items():
        scale = subject.scale_of(state)
        for kind, true in values.items():
            if kind.startswith("half") and not 2.0**-8 <= scale <= 2.0**15:
                continue
            scaled = true * jnp.asarray(scale, jnp.float16 if kind.startswith("half") else jnp.float32)
            if not np.all(np.isfinite(np.asarray(scaled))) or np.any(np.abs(np.asarray(scaled)) < 2.0**-14):
                continue
            found = subject.unscale(state, {"w": scaled})["w"]
            if not np.array_equal(np.asarray(found), np.asarray(true)):
                raise Broken(f"{name}, under the scale {scale:g}: the {kind} gradient {true} came back as {found}")


def leaves_without_gradient_stay(subject: _Subject) -> None:
    """Unscaling keeps integers, bools, PRNG keys and float0.

    Defect B4. A zero of the same dtype is allowed: the update of such a leaf.
    """
    require(leaves_without_gradient().filter(lambda x: not is_floating(x)), functools.partial(_kept, subject))


def fp8_leaves_stay(subject: _Subject) -> None:
    """Unscaling keeps leaves in fp8, which hold scales and quantised values.

    Defect B12.
    """
    require(leaves_without_gradient().filter(is_floating), functools.partial(_kept, subject))


def _kept(subject: _Subject, leaf: Any) -> str | None:
    tree = {"w": jnp.ones(1, jnp.float32), "x": leaf}
    out = subject.unscale(subject.init(), tree)
    if getattr(out["x"], "dtype", None) != leaf.dtype or jnp.shape(out["x"]) != jnp.shape(leaf):
        return f"unscale turned {describe(tree)} into {describe(out)}: leaf ['x'] was {describe(leaf)}"
    if not first_difference(snapshot(out["x"]), snapshot(leaf)):
        return None
    if not jnp.issubdtype(leaf.dtype, jax.dtypes.extended) and not np.any(np.asarray(out["x"]).astype(bool)):
        return None
    return f"unscale turned the {describe(leaf)} {leaf} into {out['x']}"


def is_sound_scale(scale: float) -> bool:
    """True for a power of two from 2**-126 to 2**126: it and its inverse are normal float32 numbers."""
    return math.isfinite(scale) and SMALLEST <= scale <= LARGEST and math.frexp(scale)[0] == 0.5


def _next(least: float, floor: float) -> bool:
    """Whether a floor is the smallest power of two above the one that is claimed."""
    return floor / 2 < least and math.frexp(floor)[0] == 0.5


def _changes(scales: np.ndarray) -> list[int]:
    """Where a run of scales takes a new value."""
    return [0, *(int(i) + 1 for i in np.flatnonzero(scales[1:] != scales[:-1]))]
