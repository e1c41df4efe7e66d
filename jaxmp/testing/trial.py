"""`Trial`: runs a train step for the laws, injects faults, and compares the states."""

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
"""Limits on how long a law waits for the scale to grow."""
FLOAT16_BOUND = 0.1
"""If float16 gradients can underflow, half of the leaves may differ by this share of the distance they have moved. A
wrong scale is wrong by a factor of two."""


class Trial:
    """A train step, given by its adapter, as the laws run it."""

    def __init__(self, adapter: Any):
        self.adapter = adapter

    def read(self, name: str) -> Any:
        """Returns an optional attribute of the adapter; None if it has none."""
        return getattr(self.adapter, name, None)

    # --- states

    @functools.cached_property
    def _start(self) -> Any:
        return calling("the adapter's init", self.adapter.init)

    def fresh(self, negative_zeros: bool = False) -> Any:
        """Returns a copy of the first state, which a step may donate. `negative_zeros` turns every 0.0 into -0.0."""
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
        """Returns all that a skipped step must leave as it was. Raises Broken if the adapter does not say."""
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
        """True if the loss scale can be read."""
        return self.read("loss_scale") is not None or find_state(self._start) is not None

    def scale_leaf(self, state: Any) -> Any:
        """Returns the loss scale as the state holds it, of the first replica. Raises Skipped if there is none."""
        reader = self.read("loss_scale")
        if reader is None and find_state(state) is None:
            raise Skipped("the adapter has no loss_scale: nothing to say about the scale")
        leaf = calling("the adapter's loss_scale", reader, state) if reader else find_state(state).scaler.scale  # type: ignore[union-attr]
        return leaf[0] if self.read("stacked") and jnp.ndim(leaf) else leaf

    def scale(self, state: Any) -> float:
        """Returns the loss scale."""
        return float(self.scale_leaf(state))

    # --- steps

    def step(self, state: Any, fault: Fault = Clean()) -> Any:  # noqa: B008 (an immutable)
        """Returns the state after a step. The state before may be donated."""
        return self._state(self.out(state, fault), state)

    def out(self, state: Any, fault: Fault, batch: Any = None) -> Any:
        """Returns all that the adapter's `step` returns. The state may be donated."""
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
        """Returns the state after the steps of `trace`, from a fresh one."""
        return functools.reduce(self.step, trace, self.fresh(negative_zeros))

    @functools.cached_property
    def growth(self) -> int | None:
        """The number of finite steps until the scale grows; None if that takes longer than a law waits."""
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
        """The paths of the parameters into whose gradients faults can be injected."""
        return calling("the adapter's step", faults.differentiated, self.adapter.step, self.fresh(), self.adapter.batch)

    @functools.cached_property
    def bad_gradients(self) -> Sequence[Fault]:
        """Faults in gradients. Each costs a compilation, so they are few unless the thorough profile is in force."""
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
        """A strategy for faults in the batch; None if the batch has no floats."""
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
        """The simplest possible fault. Raises Skipped if none is possible."""
        if self.bad_gradients:
            return self.bad_gradients[0]
        if self.bad_batches is None:
            raise Skipped(f"{NO_GRADIENT}, and the batch has no floats to put an inf into")
        leaves = jax.tree_util.tree_leaves_with_path(self.adapter.batch)
        return BadBatch(next(jax.tree_util.keystr(path) for path, x in leaves if is_castable(x)), 0, math.nan)

    # --- what the program says

    @functools.cached_property
    def jaxpr(self) -> Any:
        """The jaxpr of the step; None if it cannot be traced."""
        trace = self.read("trace") or functools.partial(faults.traced, self.adapter.step)
        try:
            return trace(self.fresh(), self.adapter.batch)
        except Exception:  # a step that looks at numbers
            return None

    @functools.cached_property
    def float_dtypes(self) -> set[Any]:
        """The dtypes of all floats in the jaxpr of the step; float16 if it cannot be traced."""
        if self.jaxpr is None:
            return {np.dtype(np.float16)}
        operands = (v.aval for eqn, _ in equations(self.jaxpr) for v in eqn.invars)
        return {np.dtype(aval.dtype) for aval in operands if is_floating(aval)}

    @property
    def draws(self) -> bool:
        """True if the step draws random numbers; deriving keys alone does not count."""
        return self.jaxpr is not None and any(e.primitive.name == "random_bits" for e, _ in equations(self.jaxpr))

    def compare(self, expected: Any, found: Any, start: Any) -> str | None:
        """Says where two states that should be equal differ: by a bit, or grossly if float16 is in the step."""
        return self.compare_kept(*(snapshot(self.kept(s)) for s in (expected, found, start)))

    def compare_kept(self, expected: Snapshot, found: Snapshot, start: Snapshot) -> str | None:
        """Says the same for snapshots of what the states keep."""
        if np.dtype(np.float16) not in self.float_dtypes:
            return first_difference(expected, found)
        return gross_difference(expected, found, start, FLOAT16_BOUND)


NO_GRADIENT = (
    "the step takes its gradient neither with jax.grad nor with jax.value_and_grad, called as such inside the step"
)


def copied(state: Any) -> Any:
    """Returns a copy with buffers of its own, and with the same weak types and devices."""
    return jax.tree.map(lambda x: x.copy() if isinstance(x, (jax.Array, np.ndarray)) else x, state)


def gross_difference(expected: Snapshot, found: Snapshot, start: Snapshot, bound: float) -> str | None:
    """Says where integers differ, or half of the leaves by more than `bound` times the distance they have moved.

    Half of the leaves, because an optimizer that normalises turns rounding errors into steps of full length, for a
    parameter whose true gradient is 0.
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
    """Returns a trace of steps in words, with equal steps in a row counted."""
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
    """Returns one snapshot of the state for each replica; of sharded state, only the leaves that all devices hold."""
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
    """Returns a snapshot of what the first replica holds."""
    whole = snapshot(tree)
    return Snapshot(whole.paths, [x[0] for x in whole.leaves]) if trial.read("stacked") else whole


_compiled: list[str] = []


def compiles() -> int:
    """Returns how many programs XLA has compiled in this process since the first call, plus one."""
    if not _compiled:
        _compiled.append("")  # listening from now on
        jax.monitoring.register_event_duration_secs_listener(_note_compile)
    return len(_compiled)


def _note_compile(event: str, duration_secs: float, **kwargs: str | int) -> None:
    if event == "/jax/core/compile/backend_compile_duration":
        _compiled.append(event)
