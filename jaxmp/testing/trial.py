"""`Trial`: runs a train step for the laws, injects faults, and compares the states."""

from __future__ import annotations

import functools
import math
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from hypothesis import strategies as st

from jaxmp.jaxprs import equations
from jaxmp.scaling.transform import LossScalingState, consecutive_skips, skipped_steps
from jaxmp.testing import faults
from jaxmp.testing.draws import draws_from_state
from jaxmp.testing.faults import BadBatch, BadGradient, Clean, Fault, GradientLeaf, Observed
from jaxmp.testing.laws import Broken, Skipped, calling, thorough
from jaxmp.testing.snapshots import Snapshot, describe, first_difference, snapshot
from jaxmp.trees import is_castable, is_floating, is_key, same_structure

GROWTH_STEPS, GROWTH_SECONDS = 2500, 15.0
"""Limits on how long a law waits for the scale to grow."""
WAIT = 128
"""Number of steps within which each of several objectives has to be due once."""
SOME = 8
"""Number of parameters on which a law that needs steps for each of them is tested, unless thoroughly."""
WRONG_SHARE = 0.25
"""A share of the distance moved that rounding does not explain, in most leaves of one kind."""
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
        if not scaler_states(state):
            raise Broken(
                "the adapter does not say what a skipped step has to keep; give it kept=, such as "
                "kept=lambda state: (state.params, state.opt_state)"
            )
        return _without_scaler(state)

    @property
    def has_scale(self) -> bool:
        """True if the loss scale can be read."""
        return self.read("loss_scale") is not None or bool(scaler_states(self._start))

    def scale_leaves(self, state: Any) -> dict[str, Any]:
        """Returns the loss scale of each scaler as the state holds it, of the first replica, by the scaler's name.

        Raises Skipped if there is none.
        """
        found = self._scale_leaves(state)
        return {name: x[0] if self.read("stacked") and jnp.ndim(x) else x for name, x in found.items()}

    def _scale_leaves(self, state: Any) -> dict[str, Any]:
        reader = self.read("loss_scale")
        if reader is not None:
            read = calling("the adapter's loss_scale", reader, state)
            return {jax.tree_util.keystr(path): x for path, x in jax.tree_util.tree_leaves_with_path(read)}
        found = {name: scaler.scaler.scale for name, scaler in scaler_states(state).items()}
        if not found:
            raise Skipped("the adapter has no loss_scale: nothing to say about the scale")
        return found

    @functools.cached_property
    def scalers(self) -> list[str]:
        """The names of the scalers in the state; usually of one."""
        return list(self.scale_leaves(self._start))

    def scale(self, state: Any, scaler: int = 0) -> float:
        """Returns the loss scale of one of the scalers."""
        return float(list(self.scale_leaves(state).values())[scaler])

    def scale_or_one(self, state: Any) -> float:
        """Returns the loss scale; 1 if the state has none."""
        return self.scale(state) if self.has_scale else 1.0

    @functools.cached_property
    def _scale_places(self) -> list[int | None]:
        """For each scaler, which leaf of the state is its scale: the one whose change changes what is read."""
        leaves, structure = jax.tree.flatten(self._start)
        found: list[int | None] = []
        for i in range(len(self.scalers)):
            scale, place = self.scale(self._start, i), None
            for at, leaf in enumerate(leaves):
                if isinstance(leaf, (bool, str)) or not (isinstance(leaf, float) or is_floating(leaf)):
                    continue
                if np.size(leaf) and np.all(np.asarray(leaf, np.float64) == scale):
                    changed = jax.tree.unflatten(structure, [*leaves[:at], leaf / 2, *leaves[at + 1 :]])
                    if self.scale(changed, i) == scale / 2:
                        place = at
                        break
            found.append(place)
        return found

    def at_scale(self, state: Any, scale: float, scaler: int = 0) -> Any:
        """Returns the state with another loss scale. Raises Skipped if the state does not hold the scale as it is."""
        place = self._scale_places[scaler]
        if place is None:
            raise Skipped("no leaf of the state is the loss scale: the laws cannot set it")
        leaves, structure = jax.tree.flatten(state)
        old = leaves[place]
        new = type(old)(scale) if isinstance(old, float) else jnp.full_like(old, scale)
        if isinstance(old, jax.Array) and old.committed:  # where it is not, committing it would compile the step anew
            new = jax.device_put(new, old.sharding)
        return jax.tree.unflatten(structure, [*leaves[:place], new, *leaves[place + 1 :]])

    @functools.cached_property
    def moves(self) -> bool:
        """Whether overflows lower the scale: whether it is a dynamic one."""
        state = self.fresh()
        first = self.scale(state)
        for _ in range(8 * self.window):
            state = self.step(state, self.any_fault)
            if self.scale(state) < first:
                return True
        return False

    @functools.cached_property
    def scales(self) -> list[float]:
        """Scales to test at: the first one, and of a scale that moves, some up to 2**24 or the cap that is claimed."""
        first = self.scale(self.fresh())
        if not self.moves:
            return [first]
        least = self.read("min_scale") or min(first, 1.0)
        most = self.read("max_scale") or max(first, 2.0**24)
        wanted = [first, first / 4, least, 2.0**16, 2.0**20, most]
        return list(dict.fromkeys(x for x in wanted if least <= x <= most and x == 2.0 ** round(math.log2(x))))

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
            return self._injected(state, batch, given, bad=fault)[0]
        return calling("the adapter's step", self.adapter.step, state, batch, given=given)

    def _injected(
        self,
        state: Any,
        batch: Any,
        given: str,
        chosen: faults.Chosen | None = None,
        bad: BadGradient | None = None,
    ) -> tuple[Any, Observed]:
        with faults.injected(chosen, bad) as observed:
            out = calling("the adapter's step", self.adapter.step, state, batch, given=given)
            jax.block_until_ready(out)
        return out, observed

    def with_gradients(
        self, state: Any, chosen: Callable[[GradientLeaf], Any] | None, batch: Any = None
    ) -> tuple[Any, Observed]:
        """Returns what a step returns for gradients that the law chooses, and what was seen. May donate the state.

        Args:
          state: the state before.
          chosen: the gradient of a leaf, without the loss scale; None for the step's own, as for `chosen=None`.
          batch: the batch; the adapter's by default.
        """

        def scaled(leaf: GradientLeaf) -> Any:
            value = None if chosen is None else chosen(leaf)
            return None if value is None else np.asarray(value, _wide(leaf.dtype)) * scales[leaf.call]

        scales = self._scale_of_call(state) if self.has_scale else dict.fromkeys((x.call for x in self.leaves), 1.0)
        batch = self.adapter.batch if batch is None else batch
        return self._injected(state, batch, "gradients chosen by the law", chosen=scaled)

    def _scale_of_call(self, state: Any) -> dict[int, float]:
        scaler = dict.fromkeys((leaf.call for leaf in self.leaves), 0)
        if len(self.scalers) > 1:
            scaler |= self.calls_and_scalers[1]
        return {call: self.scale(state, i) for call, i in scaler.items()}

    @functools.cached_property
    def calls_and_scalers(self) -> tuple[list[int], dict[int, int]]:
        """The calls of `jax.grad` that run, and for each the scaler whose change changes its loss.

        Every gradient overflows meanwhile, so that no loss depends on what another one has changed.
        """
        state, scaled, ran = self.fresh(), dict[int, int](), list[int]()
        for _ in range(WAIT):
            after, usual = self.overflow(copied(state))
            new = [call for call in usual if call not in ran]
            ran += new
            for i in range(len(self.scalers)) if new else ():
                try:
                    other = self.at_scale(copied(state), self.scale(state, i) / 2, i)
                except Skipped:
                    continue
                losses = self.overflow(other)[1]
                for call in new:
                    one, half = (np.sort(np.ravel(np.asarray(x[call], np.float64))) for x in (usual, losses))
                    if np.all(np.isfinite(one)) and np.any(one) and np.array_equal(one, 2 * half):
                        scaled[call] = i
            if len(set(scaled.values())) == len(self.scalers):
                break
            state = after
        return ran, scaled

    def overflow(self, state: Any) -> tuple[Any, dict[int, list[np.ndarray]]]:
        """Returns the state after a step in which every gradient overflows, and the scaled losses by calls."""
        out, seen = self._injected(state, self.adapter.batch, "an overflow", chosen=inf_for)
        return self._state(out, self._start), seen.losses

    def chosen(self, state: Any, *choices: Callable[[GradientLeaf], Any]) -> Any:
        """Returns the state after one step for each choice of gradients; with clean steps if none can be put in."""
        for choice in choices:
            if self.leaves:
                state = self._state(self.with_gradients(state, choice)[0], self._start)
            else:
                state = self.step(state)
        return state

    @property
    def counts_skips(self) -> bool:
        """True if the state counts skipped steps where the laws can read it."""
        return any(self.counted(name, self._start) is not None for name in ("skipped_steps", "consecutive_skips"))

    def counted(self, name: str, state: Any) -> int | None:
        """Returns what the state counts under a name of the adapter's, of the first replica; None if it does not."""
        reader = self.read(name)
        found = {"skipped_steps": skipped_steps, "consecutive_skips": consecutive_skips}
        if reader is None and len(scaler_states(state)) != 1:
            return None
        count = calling(f"the adapter's {name}", reader or found[name], state)
        return int(np.ravel(count)[0])

    @property
    def window(self) -> int:
        """How many steps make one update."""
        return self.read("microbatches") or 1

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
        return self.growth_of(0)

    def growth_of(self, scaler: int) -> int | None:
        """The same for one of several scalers."""
        state, started = self.fresh(), time.monotonic()
        before = self.scale(state, scaler)
        for count in range(1, GROWTH_STEPS + 1):
            state = self.step(state)
            scale = self.scale(state, scaler)
            if scale > before:
                return count
            before = scale
            if time.monotonic() - started > GROWTH_SECONDS:
                break
        return None

    @functools.cached_property
    def growth_factor(self) -> float | None:
        """By how much the scale grows at first; None if that takes longer than a law waits."""
        if self.growth is None:
            return None
        state = self.run([Clean()] * (self.growth - 1))
        before = self.scale(state)
        return self.scale(self.step(state)) / before

    # --- faults

    @functools.cached_property
    def leaves(self) -> list[GradientLeaf]:
        """The parameters whose gradients can be replaced."""
        return calling("the adapter's step", faults.differentiated, self.adapter.step, self.fresh(), self.adapter.batch)

    @functools.cached_property
    def some_leaves(self) -> list[GradientLeaf]:
        """At most `SOME` of the parameters, the first and the last among them; all under the thorough profile."""
        leaves = [leaf for leaf in self.leaves if math.prod(leaf.shape)]
        if thorough() or len(leaves) <= SOME:
            return leaves
        return [leaves[round(i * (len(leaves) - 1) / (SOME - 1))] for i in range(SOME)]

    @functools.cached_property
    def bad_gradients(self) -> Sequence[Fault]:
        """Faults in gradients: an inf or a NaN for each parameter; for some of them, all that is not finite."""
        found: list[Fault] = []
        some = {leaf.path for leaf in self.some_leaves}
        for i, leaf in enumerate({leaf.path: leaf for leaf in self.leaves if math.prod(leaf.shape)}.values()):
            values: list[complex] = [math.inf, math.nan] if i % 2 == 0 else [math.nan, math.inf]
            if leaf.path in some:
                values.append(-math.inf)
                if np.issubdtype(leaf.dtype, np.complexfloating):
                    values += [complex(0, math.inf), complex(0, math.nan)]
            found += [BadGradient(leaf.path, value) for value in (values if leaf.path in some else values[:1])]
        return found

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

    def reaches(self, fault: Fault) -> bool:
        """Whether a fault is one of what this trial looks at: of a step with one objective, any is."""
        return True

    @property
    def large_batches(self) -> list[BadBatch]:
        """Batches with one large number, in the first leaves that hold floats."""
        leaves = jax.tree_util.tree_leaves_with_path(self.adapter.batch)
        floats = [(jax.tree_util.keystr(path), x.size) for path, x in leaves if is_castable(x) and x.size]
        return [BadBatch(path, size - 1, value) for path, size in floats[:SOME] for value in (2.0**4, 2.0**8, 2.0**12)]

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

    @functools.cached_property
    def draws(self) -> bool:
        """True if the step draws random numbers that depend on its state or batch; constants of a model do not."""
        return self.jaxpr is not None and draws_from_state(self.jaxpr)

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


def inf_for(leaf: GradientLeaf) -> np.ndarray:
    """Returns a gradient for a leaf that overflows."""
    return np.full(leaf.shape, np.inf)


def copied(state: Any) -> Any:
    """Returns a copy with buffers of its own, and with the same weak types and devices."""
    return jax.tree.map(lambda x: x.copy() if isinstance(x, (jax.Array, np.ndarray)) else x, state)


def gross_difference(
    expected: Snapshot, found: Snapshot, start: Snapshot, bound: float, parameters: Sequence[str] = ()
) -> str | None:
    """Says where integers differ, or half of the leaves by more than `bound` times the distance they have moved.

    Half of the leaves, because an optimizer that normalises turns rounding errors into steps of full length, for a
    parameter whose true gradient is 0. Four times the bound, and at least `WRONG_SHARE`, is allowed to each kind of
    leaves, such as the first moments of all parameters: to all of them together, or to half of them. Kinds of fewer
    than three leaves are not looked at by themselves.

    Args:
      expected: what the leaves ought to be.
      found: what they are.
      start: what they were before the steps.
      bound: the share of the distance.
      parameters: the paths of the parameters, with which the paths of their moments end.
    """
    errors: list[tuple[float, str]] = []
    kinds: dict[str, list[tuple[float, float, str]]] = {}
    for path, a, b, s in zip(expected.paths, expected.leaves, found.leaves, start.leaves, strict=True):
        if a.dtype.kind != "c" and not is_floating(a):
            if not np.array_equal(a, b):
                return f"leaf {path} is {b}, and ought to be {a}"
            continue
        x, y, z = (np.asarray(v, np.complex128 if a.dtype.kind == "c" else np.float64) for v in (a, b, s))
        if not np.all(np.isfinite(y)):
            return f"leaf {path} is not finite"
        moved, off = float(np.linalg.norm(x - z)), float(np.linalg.norm(y - x))
        if moved and math.isfinite(moved):
            errors.append((off / moved, path))
            parameter = max((p for p in parameters if p and path.endswith(p)), key=len, default="")
            kinds.setdefault(path.removesuffix(parameter), []).append((off, moved, path))
    if errors and statistics.median(e for e, _ in errors) > bound:
        worst, path = max(errors)
        share = f"{worst:.3g} of the distance that it has moved"
        return f"leaf {path} is off by {share} (half of the leaves by over {bound:g})"
    for leaves in kinds.values():
        if len(leaves) < 3:  # one of them may be a parameter without a true gradient
            continue
        together = math.hypot(*(off for off, _, _ in leaves)) / math.hypot(*(moved for _, moved, _ in leaves))
        if min(together, statistics.median(off / moved for off, moved, _ in leaves)) > max(4 * bound, WRONG_SHARE):
            worst, path = max((off / moved, path) for off, moved, path in leaves)
            return f"leaf {path}, like the others of its kind, is off by {worst:.3g} of the distance that it has moved"
    return None


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


def scaler_states(state: Any) -> dict[str, LossScalingState]:
    """Finds all states of `loss_scaling` in a state, by their paths."""
    leaves = jax.tree_util.tree_leaves_with_path(state, is_leaf=lambda x: isinstance(x, LossScalingState))
    return {jax.tree_util.keystr(path): x for path, x in leaves if isinstance(x, LossScalingState)}


def _wide(dtype: Any) -> Any:
    return np.complex128 if np.issubdtype(dtype, np.complexfloating) else np.float64


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
