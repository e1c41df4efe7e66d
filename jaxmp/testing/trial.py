"""A train step on trial: how the laws run it, put faults into it, and compare what comes out."""

from __future__ import annotations

import functools
import math
import statistics
import time
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from hypothesis import strategies as st

from jaxmp.jaxprs import equations
from jaxmp.scaling.transform import LossScalingState, find_state
from jaxmp.testing import faults
from jaxmp.testing.faults import BadBatch, BadGradient, Clean, Fault
from jaxmp.testing.laws import Broken, Skipped, calling, thorough
from jaxmp.testing.snapshots import Snapshot, describe, first_difference, snapshot
from jaxmp.trees import is_castable, is_floating, is_key, same_structure

GROWTH_STEPS, GROWTH_SECONDS = 2500, 15.0
"""how long a law waits for the scale to grow"""
FLOAT16_BOUND = 0.1
"""share of its movement by which half of the leaves may differ where float16 gradients can underflow; a wrong scale is
wrong by a factor of two"""


class Trial:
    """A train step on trial: the adapter, and how the laws run it."""

    def __init__(self, adapter: Any):
        self.adapter = adapter

    def read(self, name: str) -> Any:
        """What the adapter has under a name that it may leave out; None where it does."""
        return getattr(self.adapter, name, None)

    # --- states

    @functools.cached_property
    def _start(self) -> Any:
        return calling("the adapter's init", self.adapter.init)

    def fresh(self, negative_zeros: bool = False) -> Any:
        """A copy of the first state, which a step may donate; with every 0.0 in it turned into -0.0, or not."""
        state = copied(self._start)
        if not negative_zeros:
            return state
        kept = {id(x) for x in jax.tree.leaves(self.kept(self._start))}
        places = [id(x) in kept for x in jax.tree.leaves(self._start)]
        leaves, structure = jax.tree.flatten(state)
        leaves = [
            jnp.where(x == 0, jnp.asarray(-0.0, x.dtype), x) if here and is_castable(x) else x
            for x, here in zip(leaves, places, strict=True)
        ]
        return jax.tree.unflatten(structure, leaves)

    def kept(self, state: Any) -> Any:
        """What a skipped step has to leave as it was. Raises Broken where that is not known."""
        reader = self.read("kept")
        if reader is not None:
            return calling("the adapter's kept", reader, state)
        if find_state(state) is None:
            raise Broken(
                "the adapter does not say what a skipped step has to keep; give it kept=, such as "
                "kept=lambda state: (state.params, state.opt_state)"
            )
        return _without_scaler(state)

    @property
    def has_scale(self) -> bool:
        """Whether there is a loss scale to read."""
        return self.read("loss_scale") is not None or find_state(self._start) is not None

    def scale_leaf(self, state: Any) -> Any:
        """The loss scale as it is kept; the first replica's. Raises Skipped where there is none."""
        reader = self.read("loss_scale")
        if reader is None and find_state(state) is None:
            raise Skipped("the adapter has no loss_scale: nothing to say about the scale")
        leaf = calling("the adapter's loss_scale", reader, state) if reader else find_state(state).scaler.scale  # type: ignore[union-attr]
        return leaf[0] if self.read("stacked") and jnp.ndim(leaf) else leaf

    def scale(self, state: Any) -> float:
        """The loss scale."""
        return float(self.scale_leaf(state))

    # --- steps

    def step(self, state: Any, fault: Fault = Clean()) -> Any:  # noqa: B008 (an immutable)
        """The state after a step; the one before is used up."""
        return self._state(self.out(state, fault), state)

    def out(self, state: Any, fault: Fault, batch: Any = None) -> Any:
        """All that `step` returns; the state is used up."""
        batch = self.adapter.batch if batch is None else batch
        given = str(fault)
        if isinstance(fault, BadBatch):
            batch = fault.apply(batch)
        if isinstance(fault, BadGradient):
            with faults.bad_gradient(fault):
                return calling("the adapter's step", self.adapter.step, state, batch, given=given)
        return calling("the adapter's step", self.adapter.step, state, batch, given=given)

    def _state(self, out: Any, before: Any) -> Any:
        if same_structure(out, before):
            return out
        if isinstance(out, tuple) and out and same_structure(out[0], before):
            return out[0]
        begins = out[0] if isinstance(out, tuple) and out else out
        raise Broken(
            f"the adapter's step returned {describe(begins)[:300]}; expected a state such as init's, or a tuple that "
            f"begins with one: {describe(before)[:300]}"
        )

    def run(self, trace: Sequence[Fault], negative_zeros: bool = False) -> Any:
        """The state after some steps from a fresh one."""
        return functools.reduce(self.step, trace, self.fresh(negative_zeros))

    @functools.cached_property
    def growth(self) -> int | None:
        """Finite steps until the scale grows; None where they are more than a law waits for."""
        state, started = self.fresh(), time.monotonic()
        before = self.scale(state)
        for count in range(1, GROWTH_STEPS + 1):
            state = self.step(state)
            scale = self.scale(state)
            if scale > before:
                return count
            before = scale
            if time.monotonic() - started > GROWTH_SECONDS:
                break
        return None

    # --- faults

    @functools.cached_property
    def gradient_paths(self) -> list[str]:
        """The parameters whose gradients faults can be put into."""
        return calling("the adapter's step", faults.differentiated, self.adapter.step, self.fresh(), self.adapter.batch)

    @functools.cached_property
    def bad_gradients(self) -> Sequence[Fault]:
        """Faults in gradients: each is one more compile, so few unless the thorough profile is in force."""
        paths = self.gradient_paths
        if not thorough() and len(paths) > 4:
            paths = [paths[round(i * (len(paths) - 1) / 3)] for i in range(4)]
        values = (math.inf, math.nan)
        if thorough():
            return [BadGradient(path, value) for path in paths for value in (*values, -math.inf)]
        # Each parameter with one of the two, the first one with both.
        found = [BadGradient(path, values[i % 2]) for i, path in enumerate(paths)]
        return [*found, BadGradient(paths[0], math.nan)] if paths else []

    @functools.cached_property
    def bad_batches(self) -> st.SearchStrategy[Fault] | None:
        """Faults in the batch; None where it has no floats."""
        sizes = {
            jax.tree_util.keystr(path): leaf.size
            for path, leaf in jax.tree_util.tree_leaves_with_path(self.adapter.batch)
            if is_castable(leaf) and leaf.size
        }
        if not sizes:
            return None
        return st.sampled_from(list(sizes)).flatmap(
            lambda path: st.builds(
                BadBatch, st.just(path), st.integers(0, sizes[path] - 1), st.sampled_from([math.nan, math.inf])
            )
        )

    @property
    def any_fault(self) -> Fault:
        """The simplest fault that there is. Raises Skipped where there is none."""
        if self.bad_gradients:
            return self.bad_gradients[0]
        if self.bad_batches is None:
            raise Skipped(f"{NO_GRADIENT}, and the batch has no floats to put an inf into")
        leaves = jax.tree_util.tree_leaves_with_path(self.adapter.batch)
        return BadBatch(next(jax.tree_util.keystr(path) for path, x in leaves if is_castable(x)), 0, math.nan)

    # --- what the program says

    @functools.cached_property
    def jaxpr(self) -> Any:
        """The traced step; None where it cannot be traced."""
        trace = self.read("trace") or functools.partial(faults.traced, self.adapter.step)
        try:
            return trace(self.fresh(), self.adapter.batch)
        except Exception:  # a step that looks at numbers
            return None

    @functools.cached_property
    def float_dtypes(self) -> set[Any]:
        """The dtypes of the floats in the traced step; float16 where it cannot be traced."""
        if self.jaxpr is None:
            return {np.dtype(np.float16)}
        operands = (v.aval for eqn, _ in equations(self.jaxpr) for v in eqn.invars)
        return {np.dtype(aval.dtype) for aval in operands if is_floating(aval)}

    @property
    def draws(self) -> bool:
        """Whether the step draws random numbers (deriving keys alone does not count)."""
        return self.jaxpr is not None and any(e.primitive.name == "random_bits" for e, _ in equations(self.jaxpr))

    def compare(self, expected: Any, found: Any, start: Any) -> str | None:
        """Where two states differ that should be equal: by a bit, or, with float16 in the step, grossly."""
        return self.compare_kept(*(snapshot(self.kept(s)) for s in (expected, found, start)))

    def compare_kept(self, expected: Snapshot, found: Snapshot, start: Snapshot) -> str | None:
        """The same for what two states keep."""
        if np.dtype(np.float16) not in self.float_dtypes:
            return first_difference(expected, found)
        return gross_difference(expected, found, start, FLOAT16_BOUND)


NO_GRADIENT = (
    "the step takes its gradient neither with jax.grad nor with jax.value_and_grad, called as such inside the step"
)


def copied(state: Any) -> Any:
    """A copy whose buffers are its own, weak types and devices as they were."""
    return jax.tree.map(lambda x: x.copy() if isinstance(x, (jax.Array, np.ndarray)) else x, state)


def gross_difference(expected: Snapshot, found: Snapshot, start: Snapshot, bound: float) -> str | None:
    """Whether integers differ, or half of the leaves by more than `bound` times the distance that they have moved.

    Half of the leaves: an optimizer that normalises turns the rounding errors of a parameter whose true gradient is 0
    into steps of full length.
    """
    errors = []
    for path, a, b, s in zip(expected.paths, expected.leaves, found.leaves, start.leaves, strict=True):
        if not is_floating(a):
            if not np.array_equal(a, b):
                return f"leaf {path} is {b}, and ought to be {a}"
            continue
        x, y, z = (np.asarray(v, np.float64) for v in (a, b, s))
        if not np.all(np.isfinite(y)):
            return f"leaf {path} is not finite"
        moved = np.linalg.norm(x - z)
        if moved and np.isfinite(moved):
            errors.append((float(np.linalg.norm(y - x) / moved), path))
    if not errors or statistics.median(e for e, _ in errors) <= bound:
        return None
    worst, path = max(errors)
    return f"leaf {path} is off by {worst:.3g} of the distance that it has moved (half of the leaves by over {bound:g})"


def words(trace: Sequence[Fault]) -> str:
    """A trace of steps, in words; equal steps in a row counted."""
    counted: list[list[Any]] = []
    for fault in trace:
        if counted and counted[-1][0] == fault:
            counted[-1][1] += 1
        else:
            counted.append([fault, 1])
    shown = [str(f) if n == 1 else f"{n} times {f}" for f, n in counted]
    return ", then ".join(shown) or "no step"


def _without_scaler(state: Any) -> Any:
    """All of a state but what `loss_scaling` keeps for itself, and the count of attempted steps."""
    is_scaler = lambda x: isinstance(x, LossScalingState)  # noqa: E731
    inner = jax.tree.map(lambda x: x.inner_state if is_scaler(x) else x, state, is_leaf=is_scaler)
    leaves = jax.tree_util.tree_leaves_with_path(inner)
    return {
        jax.tree_util.keystr(path): x for path, x in leaves if jax.tree_util.keystr(path) not in (".step", "['step']")
    }


def copies(state: Any, stacked: bool) -> list[Snapshot]:
    """The state as each replica holds it: of what all devices hold a whole, one snapshot a device."""
    if stacked:
        whole = snapshot(state)
        return [Snapshot(whole.paths, [x[i] for x in whole.leaves]) for i in range(len(whole.leaves[0]))]
    found: list[dict[str, np.ndarray]] = []
    for path, leaf in jax.tree_util.tree_leaves_with_path(state):
        leaf = jax.random.key_data(leaf) if is_key(leaf) else leaf
        if not isinstance(leaf, jax.Array) or not leaf.is_fully_replicated:
            continue
        for i, shard in enumerate(leaf.addressable_shards):
            if i == len(found):
                found.append({})
            found[i][jax.tree_util.keystr(path)] = np.asarray(shard.data)
    return [Snapshot(list(copy), list(copy.values())) for copy in found if len(copy) == len(found[0])]


def one_copy(tree: Any, trial: Trial) -> Snapshot:
    """What the first replica holds."""
    whole = snapshot(tree)
    return Snapshot(whole.paths, [x[0] for x in whole.leaves]) if trial.read("stacked") else whole


_compiled: list[str] = []


def compiles() -> int:
    """Programs that XLA has compiled in this process, from the first call on."""
    if not _compiled:
        _compiled.append("")  # listening from now on
        jax.monitoring.register_event_duration_secs_listener(_note_compile)
    return len(_compiled)


def _note_compile(event: str, duration_secs: float, **kwargs: str | int) -> None:
    if event == "/jax/core/compile/backend_compile_duration":
        _compiled.append(event)
