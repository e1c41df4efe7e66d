"""Value ranges: how large the numbers of a computation are, and what each float format would lose of them.

    counts = jax.jit(count)(x)       # on the device: a histogram of exponents, the smallest and the largest magnitude
    Range.read(counts).underflow     # {"float16": 0.031, ...}: share of the non-zero numbers that would become 0

Numbers are compared by their float32 bits, as integers. So float32 subnormals are counted as such, though XLA's
arithmetic flushes them (trap T10), and a cast to half that was done is visible (T6). Counts are exact, also those of
more than 2^31 numbers. Counting changes no result, and does not wait for the device.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxmp.modules.observe import observed_modules
from jaxmp.precision.formats import Format, float32_bits, parse_format
from jaxmp.precision.rounding import apply_updates
from jaxmp.scaling.transform import loss_scale
from jaxmp.training.batch import LossFn
from jaxmp.training.gradients import Measured, make_gradients
from jaxmp.training.objective import EVERYTHING, Objective, fill, objective_key, trained_view
from jaxmp.training.state import TrainState
from jaxmp.trees import by_path, is_floating

FORMATS = ("float16", "bfloat16", "e4m3", "e5m2")
"""Formats whose under- and overflow is counted."""

LOWEST = -149
"""Base 2 logarithm of the smallest number in float32."""

_INFINITY = 0x7F800000
_LARGE = 2**13
"""Arrays with at least so many elements are counted in a loop."""
_PART = 2**30
"""Most elements that are counted at once, as int32."""
_LOW = 12
"""Bits of the low part of a count: counts are pairs of int32, low + 2^12 high, as JAX without x64 has no int64."""


class Counts(NamedTuple):
    """The magnitudes of the elements of one or more arrays, on the device."""

    counts: jax.Array
    """number of elements in each bin, in two parts, see `whole`; bin i begins at `EDGES[i]`; int32 (2, len(EDGES))"""
    smallest: jax.Array
    """smallest non-zero magnitude, float32 scalar; infinity if there is none"""
    largest: jax.Array
    """largest finite magnitude, float32 scalar"""
    uses: jax.Array
    """number of arrays counted, float32 scalar; if it is not 1, `smallest` and `largest` mean nothing"""


class _Losses(NamedTuple):
    """Bits of magnitudes in float32: what a format loses, rounding to nearest, ties to even."""

    kept: int
    """the least that does not become 0"""
    normal: int
    """the least that keeps a full mantissa"""
    overflowing: int
    """the least that is beyond the largest number once it is rounded"""


def _losses(format: Format) -> _Losses:
    half_step = 2.0 ** (format.max_exponent - format.mantissa_bits - 1)
    # Halfway to the number that would come after the largest: a tie goes to the even one of the two.
    largest_is_even = format.max / (2 * half_step) % 2 == 0
    return _Losses(
        kept=_bits(format.smallest_subnormal / 2) + 1,  # half of the smallest is a tie, and goes to 0
        normal=_bits(format.smallest_normal),
        overflowing=_bits(format.max + half_step) + largest_is_even,
    )


def _bits(magnitude: float) -> int:
    value = np.float32(magnitude)
    assert value == magnitude, f"{magnitude} is no float32"
    return int(value.view(np.uint32))


_LOSSES = {name: _losses(parse_format(name)) for name in FORMATS}
_POWERS = [0, *(1 << k for k in range(23)), *(k << 23 for k in range(1, 256))]  # 0, 2^-149, ..., 2^127, infinity
_OTHERS = sorted({_INFINITY + 1, *itertools.chain(*_LOSSES.values())} - set(_POWERS))  # NaN, and where formats end
EDGES = np.array(sorted([*_POWERS, *_OTHERS]), np.uint32)
"""Bits of the float32 magnitudes at which a bin of `Counts.counts` begins, ascending."""


def _place(bits: int) -> int:
    return int(np.searchsorted(EDGES, bits))


_INFINITE = _place(_INFINITY)
_POWER_PLACES = [_place(bits) for bits in _POWERS[1:]]
_BETWEEN = {
    "underflow": {name: (1, _place(losses.kept)) for name, losses in _LOSSES.items()},
    "subnormal": {name: (_place(losses.kept), _place(losses.normal)) for name, losses in _LOSSES.items()},
    "overflow": {name: (_place(losses.overflowing), _INFINITE) for name, losses in _LOSSES.items()},
}
"""The places of the edges between which numbers are lost, by kind and format."""


def count(x: Any) -> Counts:
    """Counts the magnitudes of all float leaves of the pytree `x` together; works inside and outside of jit.

    float64 is rounded to float32 first. Leaves of other dtypes are ignored.
    """
    return _together([_count(leaf) for leaf in jax.tree.leaves(x) if is_floating(leaf)])


def count_each(tree: Any) -> dict[str, Counts]:
    """Counts each float leaf of a pytree apart. Keys are paths such as `encoder/kernel`."""
    return {name: count(leaf) for name, leaf in by_path(tree).items() if is_floating(leaf)}


def count_lost_updates(params: Any, updates: Any) -> dict[str, jax.Array]:
    """Counts the updates that are lost: not zero, and yet `p + u == p` to the bit.

    The sum is rounded to the nearest number in the dtype of p, as `apply_updates` does.

    Returns:
      int32 (2,) by the path of the parameter: the number in two parts, see `whole`.
    """

    def lost_updates(param: jax.Array, update: jax.Array, new: jax.Array) -> jax.Array:
        same = float32_bits(new) == float32_bits(param)
        return number_of(same & (_magnitudes(update) != 0))

    trees = params, updates, apply_updates(params, updates)
    found = jax.tree.map(lambda p, *rest: lost_updates(p, *rest) if is_floating(p) else None, *trees)
    return by_path(found)


def number_of(flags: jax.Array) -> jax.Array:
    """Counts the flags that are set, of fewer than 2^31 along any axis: int32 (2,), in two parts, see `whole`."""
    low = flags.astype(jnp.int32)
    high = jnp.zeros_like(low)
    while low.ndim:
        low, high = low.sum(-1), high.sum(-1)
        low, high = low & (2**_LOW - 1), high + (low >> _LOW)
    return jnp.stack([low, high])


def whole(counts: np.ndarray, *, axis: int = -1) -> np.ndarray:
    """Returns the counts, int64, whose two parts lie along an axis: low + 2^12 high."""
    low, high = np.moveaxis(np.asarray(counts, np.int64), axis, 0)
    return low + (high << _LOW)


class ModuleCounts(NamedTuple):
    """The magnitudes of a module's outputs, and of the gradients of these outputs, times the loss scale."""

    outputs: Counts
    gradients: Counts


def gradients_and_module_counts(
    loss_fn: LossFn, *, accumulate_steps: int = 1, trains: tuple[str, ...] = EVERYTHING
) -> Callable[..., tuple[Any, Measured, dict[str, ModuleCounts]]]:
    """Makes a function like `make_gradients(loss_fn)` that also counts the outputs of every Flax module.

    Args:
      loss_fn: a loss function that runs Linen modules under `jaxmp.with_policy`. Scan, remat and vmap are supported.
      accumulate_steps: number of microbatches of a batch. All of them are counted, even if one overflows.
      trains: the parameters that are differentiated, see `jaxmp.Objective`.

    Returns:
      `(params, model_state, scale, batch, key) -> (gradients, Measured, modules)`. `modules` maps the path of each
      module whose `__call__` runs ("" is the outermost) to its `ModuleCounts`. All uses of a module that runs several
      times (in a scan, or with tied weights) are counted together; their extremes are then known to a power of two.
    """

    def counted(params: Any, model_state: Any, scale: Any, batch: Any, key: Any) -> Any:
        met: dict[str, None] = {}

        def note(path: str, outputs: Any) -> Any:
            met[path] = None
            return outputs

        def noted(*args: Any) -> Any:  # a function of its own: of `loss_fn`, JAX may know the shapes
            return loss_fn(*args)

        with observed_modules(note):
            jax.eval_shape(noted, params, model_state, batch, key)
        # What is counted comes out as the gradient of an input that changes nothing, and so out of any transformation:
        # a scan adds up the gradients of its turns, and counts want to be added up.
        sinks = {path: jnp.zeros((2, encoded_size()), jnp.float32) for path in met}

        def observed(both: Any, model_state: Any, batch: Any, key: Any) -> Any:
            own, sinks = both
            with observed_modules(lambda path, outputs: _through(outputs, sinks[path])):
                return loss_fn(fill(own, params), model_state, batch, key)

        gradients = make_gradients(observed, accumulate_steps=accumulate_steps)
        (grads, found), measured, _ = gradients((trained_view(params, trains), sinks), model_state, scale, batch, key)
        return grads, measured, {path: ModuleCounts(decoded(x[0]), decoded(x[1])) for path, x in found.items()}

    return counted


def make_step_ranges(
    objective: Objective,
    *,
    name: str | None = None,
    accumulate_steps: int = 1,
    blocks: Callable[..., Any] | None = None,
) -> Callable[[TrainState, Any], StepRanges]:
    """Makes a function that counts the magnitudes in a train step, without taking the step.

    Args:
      objective: the loss of a whole batch, and the optimizer inside its loss scaling.
      name: of the objective, where the state is that of several; None for a single one.
      accumulate_steps: microbatches of a batch.
      blocks: what `jaxmp.instruments.block_ranges.make_block_ranges` returns; adds the kinds `block_amax` and
        `block_scales`, by `LAYER PRODUCT ROLE`.

    Returns:
      `(state, batch) -> StepRanges` of the step from that state: `parameters` (those that are trained), `gradients`,
      `scaled_gradients` and `updates` by the parameter's path, `outputs` and `output_gradients` (scaled) by the
      module's; and how many updates are lost in rounding the parameter to nearest. The state is not changed. Of several
      objectives, it is the state that this one sees, see `jaxmp.training.step.make_state_seen`. With `private`, the
      gradients are clipped row by row and have their noise, and `output_gradients` are those of each row's own loss.
    """
    tx, private = optax.with_extra_args_support(objective.tx), objective.private
    how: dict[str, Any] = {"accumulate_steps": accumulate_steps, "trains": objective.trains}
    loss_fn = objective.loss_fn if private is None else _sum_of_rows(objective.loss_fn, accumulate_steps)
    counted = gradients_and_module_counts(loss_fn, **how)
    of_rows = None if private is None else make_gradients(objective.loss_fn, **how, private=private)

    def step_ranges(state: TrainState, batch: Any) -> StepRanges:
        opt_state, key = state.opt_state, jax.random.fold_in(state.key, state.step)
        if name is not None:
            opt_state, key = opt_state[name], objective_key(key, name)
        scale, trained = loss_scale(opt_state), trained_view(state.params, objective.trains)
        arguments = state.params, state.model_state, scale, batch, key
        grads, measured, modules = counted(*arguments)
        extra = {"value": measured.loss}
        if private is not None and of_rows is not None:  # as the step does
            grads, extra = private.add_noise(of_rows(*arguments)[0], scale, key), {}
        updates, _ = tx.update(grads, opt_state, trained, **extra)
        unscaled = jax.tree.map(lambda g: g / scale if jnp.issubdtype(g.dtype, jnp.floating) else g, grads)
        counts = {
            "parameters": count_each(trained),
            "scaled_gradients": count_each(grads),
            "gradients": count_each(unscaled),
            "updates": count_each(updates),
            "outputs": {path: counts.outputs for path, counts in modules.items()},
            "output_gradients": {path: counts.gradients for path, counts in modules.items()},
        }
        if blocks is not None:
            counts |= blocks(state.params, state.model_state, scale, batch, key).counts()
        return StepRanges.of(counts, count_lost_updates(trained, updates))

    return step_ranges


def _sum_of_rows(loss_fn: LossFn, accumulate_steps: int) -> LossFn:
    """The loss whose gradients by the outputs of a row are those of the row's own loss: no weight divides it."""

    def of_rows(*args: Any) -> Any:
        total, (_, *rest) = loss_fn(*args)
        return total, (jnp.float32(1 / accumulate_steps), *rest)  # weights are summed over microbatches

    return of_rows


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class StepRanges:
    """All that was counted of a step, in few arrays: fetching many small ones takes longer than counting."""

    counts: Counts
    """with a leading axis, one row for each of `names`"""
    lost_updates: jax.Array
    """of each of `updates`, int32 (updates, 2), see `whole`"""
    names: tuple[tuple[str, str], ...] = dataclasses.field(metadata={"static": True})
    """kind (gradients, say) and name of each row"""
    updates: tuple[str, ...] = dataclasses.field(metadata={"static": True})

    @classmethod
    def of(cls, counted: Mapping[str, Mapping[str, Counts]], lost_updates: Mapping[str, jax.Array]) -> StepRanges:
        """From counts by kind and name, and the number of lost updates by name; to be traced."""
        names = tuple((kind, name) for kind, of in counted.items() for name in of)
        rows = [counted[kind][name] for kind, name in names]
        return cls(
            jax.tree.map(lambda *x: jnp.stack(x), *rows), jnp.stack([*lost_updates.values()]), names, (*lost_updates,)
        )

    def read(self) -> dict[str, dict[str, dict[str, Any]]]:
        """Fetches the counts, as JSON by kind and name: `Range.to_json`, and for updates `lost_updates`."""
        counts, lost_updates = jax.device_get((self.counts, self.lost_updates))
        found: dict[str, dict[str, dict[str, Any]]] = {}
        for (kind, name), range in zip(self.names, _ranges(*counts), strict=True):
            found.setdefault(kind, {})[name] = range.to_json()
        for name, number in zip(self.updates, whole(lost_updates).tolist(), strict=True):
            found["updates"][name]["lost_updates"] = number
        return found


@dataclasses.dataclass(frozen=True)
class Range:
    """The magnitudes of the elements of one or more arrays, read back from the device."""

    size: int
    """number of elements"""
    zeros: int
    infinite: int
    nan: int
    smallest: float | None
    """smallest non-zero magnitude; None if there is none; see `exact`"""
    largest: float | None
    """largest finite magnitude"""
    exact: bool
    """False if `smallest` and `largest` are rounded down to powers of two"""
    lowest_exponent: int
    """base 2 logarithm of the smallest magnitude, rounded down"""
    counts: tuple[int, ...]
    """number of elements with a magnitude in [2^e, 2^(e+1)), for e = lowest_exponent, lowest_exponent + 1, ..."""
    underflow: Mapping[str, float | None]
    """by format, the share of finite non-zero elements that it would round to 0; None if there are none"""
    subnormal: Mapping[str, float | None]
    """by format, the share that would become subnormal and so lose bits"""
    overflow: Mapping[str, float | None]
    """by format, the share beyond its largest number"""

    @classmethod
    def read(cls, counts: Counts) -> Range:
        """Fetches counts from the device."""
        bins, *rest = jax.device_get(counts)
        (range,) = _ranges(bins[None], *(np.asarray(part)[None] for part in rest))
        return range

    @property
    def exponents(self) -> dict[int, int]:
        """The non-zero `counts`, by exponent."""
        return {self.lowest_exponent + i: n for i, n in enumerate(self.counts) if n}

    def to_json(self) -> dict[str, Any]:
        """Returns the fields as dicts, lists and numbers."""
        return {**vars(self), "counts": list(self.counts)}


def _ranges(counts: np.ndarray, smallest: np.ndarray, largest: np.ndarray, uses: np.ndarray) -> Iterator[Range]:
    """One for each row; by all rows at once, as far as may be."""
    counts = whole(counts, axis=1)
    # As many numbers as there are below each edge, and all in the end.
    below = np.concatenate([np.zeros((len(counts), 1), np.int64), np.cumsum(counts, axis=1)], axis=1)
    finite = below[:, _INFINITE] - below[:, 1]
    shares = {
        kind: {name: _share(below[:, end] - below[:, start], finite) for name, (start, end) in of.items()}
        for kind, of in _BETWEEN.items()
    }
    exponents = np.diff(below[:, _POWER_PLACES], axis=1)
    for i, row in enumerate(exponents):
        there = np.flatnonzero(row)
        low, high = (int(there[0]), int(there[-1])) if len(there) else (-LOWEST, -LOWEST - 1)
        exact = bool(uses[i] == 1)
        extremes = (float(smallest[i]), float(largest[i])) if exact else (2.0 ** (low + LOWEST), 2.0 ** (high + LOWEST))
        yield Range(
            size=int(below[i, -1]),
            zeros=int(counts[i, 0]),
            infinite=int(counts[i, _INFINITE]),
            nan=int(below[i, -1] - below[i, _INFINITE + 1]),
            smallest=extremes[0] if len(there) else None,
            largest=extremes[1] if len(there) else None,
            exact=exact,
            lowest_exponent=low + LOWEST,
            counts=tuple(row[low : high + 1].tolist()),
            **{kind: {name: share[i] for name, share in of.items()} for kind, of in shares.items()},
        )


def _share(some: np.ndarray, of: np.ndarray) -> list[float | None]:
    return [a / b if b else None for a, b in zip(some.tolist(), of.tolist(), strict=True)]


def _magnitudes(x: jax.Array) -> jax.Array:
    """The bits of |x| in float32, uint32."""
    x = jnp.asarray(x)
    if x.dtype not in (jnp.float32, jnp.bfloat16, jnp.float16):
        x = x.astype(jnp.float32)
    return float32_bits(x) & 0x7FFFFFFF


def _count(x: jax.Array) -> Counts:
    x = jnp.ravel(x)
    if x.size < _LARGE or (x.size % 2 and x.size <= _PART):
        return _count_once(x)
    # By halves in a loop, before which XLA has x in memory: else what x comes from (on a CPU the slow casts to half) is
    # computed again where it is counted, barriers notwithstanding.
    parts = max(2, -(-x.size // _PART))
    zeros = -x.size % parts
    each = jax.lax.map(_count_once, jnp.pad(x, (0, zeros)).reshape(parts, -1))
    counts = each.counts.sum(0).at[0, 0].add(-zeros)
    # As integers, in which float32's subnormals are not flushed.
    smallest, largest = (jax.lax.bitcast_convert_type(x, jnp.int32) for x in each[1:3])
    extremes = jax.lax.bitcast_convert_type(jnp.stack([smallest.min(), largest.max()]), jnp.float32)
    return Counts(counts, extremes[0], extremes[1], jnp.float32(1))


def _count_once(x: jax.Array) -> Counts:
    bits = _magnitudes(x)
    stored = (bits >> 23).astype(jnp.int32)
    place = jnp.where(stored > 0, stored + 23, 32 - jax.lax.clz(bits).astype(jnp.int32))
    for edge in _OTHERS:
        place += (bits >= edge).astype(jnp.int32)
    # Additions to one address wait for each other, and most numbers share a few exponents: rows to spread over.
    lanes = 8 if jax.default_backend() == "cpu" else 256
    where = place + len(EDGES) * (jnp.arange(bits.size) % lanes)
    counts = jnp.zeros(lanes * len(EDGES), jnp.int32).at[where].add(1, mode="promise_in_bounds")
    # One reduction for both extremes: on a CPU a third of the time of two.
    magnitude, infinity = bits.astype(jnp.int32), np.int32(_INFINITY)
    finite = magnitude < infinity
    smallest, largest = jax.lax.reduce(
        (jnp.where(finite & (magnitude > 0), magnitude, infinity), jnp.where(finite, magnitude, 0)),
        (infinity, np.int32(0)),
        lambda a, b: (jnp.minimum(a[0], b[0]), jnp.maximum(a[1], b[1])),
        (0,),
    )
    extremes = jax.lax.bitcast_convert_type(jnp.stack([smallest, largest]), jnp.float32)
    counts = counts.reshape(lanes, -1).sum(0)
    return Counts(jnp.stack([counts & (2**_LOW - 1), counts >> _LOW]), extremes[0], extremes[1], jnp.float32(1))


def _together(parts: list[Counts]) -> Counts:
    if len(parts) == 1:
        return parts[0]
    zero = Counts(jnp.zeros((2, len(EDGES)), jnp.int32), jnp.float32(0), jnp.float32(0), jnp.float32(0))
    return jax.tree.map(lambda *leaves: sum(leaves[1:], leaves[0]), zero, *parts)


def _through(outputs: Any, sink: jax.Array) -> Any:
    """`outputs`, whose floats are counted on their way, and their cotangents on the way back, into `sink`'s."""
    leaves, structure = jax.tree.flatten(outputs)
    floats = [i for i, leaf in enumerate(leaves) if is_floating(leaf)]
    for i, leaf in zip(floats, _tap([leaves[i] for i in floats], sink), strict=True):
        leaves[i] = leaf
    return jax.tree.unflatten(structure, leaves)


@jax.custom_vjp
def _tap(x: list[jax.Array], sink: jax.Array) -> list[jax.Array]:
    return x


def _tap_forward(x: list[jax.Array], sink: jax.Array) -> tuple[list[jax.Array], jax.Array]:
    return x, encoded(count(x))


def _tap_backward(outputs: jax.Array, cotangents: list[jax.Array]) -> tuple[list[jax.Array], jax.Array]:
    return cotangents, jnp.stack([outputs, encoded(count(cotangents))])


_tap.defvjp(_tap_forward, _tap_backward)


def encoded_size() -> int:
    """The length of what `encoded` returns."""
    return 2 * len(EDGES) + 3


def encoded(counts: Counts) -> jax.Array:
    """Counts as float32 whose sums over up to 4096 uses, and up to 2^36 numbers a bin, are exact."""
    low, high = counts.counts
    parts = jnp.concatenate([low & (2**_LOW - 1), high + (low >> _LOW)])
    extremes = jnp.stack([counts.smallest, counts.largest, counts.uses])
    return jnp.concatenate([parts.astype(jnp.float32), extremes])


def decoded(both: Any) -> Counts:
    """Undoes `encoded`, of a sum of such arrays."""
    counts = both[: 2 * len(EDGES)].reshape(2, -1).astype(jnp.int32)
    return Counts(counts, *both[2 * len(EDGES) :])
