"""Magnitude pruning: weights of small magnitude are set to zero, and stay exactly zero while the others train.

    tx = loss_scaling(magnitude_pruning(optax.adam(1e-3), Pruning(0.9), steps=10_000), scaler)

`Pruning` is the config value, `magnitude_pruning` the optax transformation. Its masks are part of the optimizer state:
they are checkpointed with it, and a skipped step leaves them as they are.

Sources: M. Zhu and S. Gupta, To prune, or not to prune, 2017, https://arxiv.org/abs/1710.01878 (the schedule, section
3); A. Mishra et al., Accelerating Sparse Deep Neural Networks, 2021, https://arxiv.org/abs/2104.08378 (2:4).
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxmp.errors import InputError, nearest, number, require, whole_number
from jaxmp.trees import Classes, Pattern, by_path, is_floating, path_name

STRUCTURES = ("unstructured", "2:4")
"""values of `Pruning.structure`"""

SCOPES = ("layer", "global")
"""values of `Pruning.scope`"""

GROUP = 4
"""neighbours along the contraction axis of which 2:4 prunes two"""

SMALLEST = 2
"""least number of axes of a weight that is pruned: biases and the scales of norms stay dense"""


@dataclasses.dataclass(frozen=True)
class Pruning:
    """Magnitude pruning during training, with a sparsity that grows from 0 along the cubic schedule of Zhu and Gupta.

    The share of pruned weights is `sparsity * (1 - (1 - t)**3)`, where t goes from 0 at `begin` to 1 at `end`. A weight
    that was pruned stays pruned.

    Raises:
      InputError: a value is not one of those below.
    """

    sparsity: float = 0.0
    """Share of the weights that are pruned in the end, below 1; 0: none. Structure 2:4 prunes half of them: with it 0.5
    means what 0 does, and becomes 0."""
    _: dataclasses.KW_ONLY
    structure: Literal["unstructured", "2:4"] = "unstructured"
    """unstructured: any weight may be pruned. 2:4: two of every four neighbours along the contraction axis, the pattern
    that sparse tensor cores multiply."""
    scope: Literal["layer", "global"] = "layer"
    """Weights whose magnitudes are compared: those of one layer, or those of all layers together."""
    where: tuple[str, ...] = ("**/*kernel",)
    """Weights to prune: patterns of paths, such as Dense_0 or **/kernel, or of classes, such as @Dense."""
    keep: tuple[str, ...] = ()
    """Weights among them that stay dense, such as the first layer: patterns like those of where."""
    begin: float = 0.0
    """When pruning begins, as a share of the run's steps."""
    end: float = 0.5
    """When the last weights are pruned, as a share of the run's steps, which skipped ones delay; equal to begin: all at
    once."""
    rounds: int = 32
    """How often weights are pruned between begin and end."""

    def __post_init__(self) -> None:
        for name in ("sparsity", "begin", "end"):
            number(f"Pruning.{name}", getattr(self, name))
        for name, known in (("structure", STRUCTURES), ("scope", SCOPES)):
            value = getattr(self, name)
            require(self, name, value in known, f"{' or '.join(known)}{nearest(str(value), known)}")
        require(self, "sparsity", 0 <= self.sparsity < 1, "a share, 0 or more and below 1")
        halves = self.structure != "2:4" or self.sparsity in (0, 0.5)
        require(self, "sparsity", halves, "0.5, since structure 2:4 prunes two weights of four")
        if self.structure == "2:4":  # one experiment, one hash
            object.__setattr__(self, "sparsity", 0.0)
        require(self, "begin", 0 <= self.begin <= 1, "a share of the steps, 0 to 1")
        require(self, "end", self.begin <= self.end <= 1, f"a share of the steps, begin ({self.begin:g}) to 1")
        object.__setattr__(self, "rounds", whole_number("Pruning.rounds", self.rounds, 1))
        for name in ("where", "keep"):
            _check_patterns(f"Pruning.{name}", getattr(self, name))
            object.__setattr__(self, name, tuple(getattr(self, name)))
        require(self, "where", bool(self.where), "at least one pattern, such as '**/kernel'")

    @property
    def share(self) -> float:
        """The share of the weights that are pruned in the end; 0 if nothing is pruned."""
        return 0.5 if self.structure == "2:4" else float(self.sparsity)

    @property
    def by_class(self) -> bool:
        """Whether a pattern names a class, so that `classes` are needed."""
        return any(text.startswith("@") for text in (*self.where, *self.keep))

    def schedule(self, steps: int) -> list[tuple[int, float]]:
        """The steps that prune, counted in applied steps from 0, each with the share that is pruned after it.

        Args:
          steps: number of steps of the run.

        >>> Pruning(0.5, begin=0.25, end=0.75, rounds=2).schedule(8)
        [(4, 0.4375), (6, 0.5)]
        """
        last = min(round(self.end * steps), max(steps - 1, 0))
        first = min(round(self.begin * steps), last)
        found: dict[int, float] = {}
        for index in range(1, self.rounds + 1):
            step = first + round(index * (last - first) / self.rounds)
            done = 1.0 if step == last else (step - first) / (last - first)
            found[step] = self.share * (1 - (1 - done) ** 3)
        return list(found.items())


class PruningState(NamedTuple):
    """The optimizer state of `magnitude_pruning`."""

    inner_state: Any
    """state of the inner optimizer"""
    masks: Any
    """bool array for each weight that may be pruned, False where it is; None in place of other parameters"""
    sparsity: jax.Array
    """share of the weights that the masks prune, float32 scalar"""
    step: jax.Array
    """number of updates so far, int32 scalar"""


def magnitude_pruning(
    inner: optax.GradientTransformation, pruning: Pruning, *, steps: int, classes: Classes | None = None
) -> optax.GradientTransformationExtraArgs:
    """Wraps an optimizer so that weights of small magnitude become zero and stay zero.

    A step that prunes compares the magnitudes of the parameters that it is given, in float32; of equal ones the first
    in row-major order is pruned. Pruned weights have gradient zero for `inner`: they take no part in clipping or in
    moments. Their update is minus the weight. Put it inside `loss_scaling`, around everything else.

    `TrainState.commit` zeroes what the update cannot: the moving average and the Kahan compensation. A loop of its own
    that keeps an average applies `masked(average, masks_of(opt_state))`.

    Args:
      inner: any optax transformation.
      pruning: which weights are pruned, and when.
      steps: number of steps of the run.
      classes: names of module classes by path of the module, for patterns such as @Dense.

    Returns:
      An optax transformation; its state is a `PruningState`.

    Raises:
      InputError: in `init`, a pattern matches no weight, no weight is left to prune, or 2:4 meets an axis that 4 does
        not divide.
    """
    inner = optax.with_extra_args_support(inner)
    schedule = pruning.schedule(steps)
    at = np.array([step for step, _ in schedule], np.int32)
    shares = np.array([0.0, *(share for _, share in schedule)])

    def init(params: Any) -> PruningState:
        chosen = pruned_weights(pruning, params, classes)
        masks = jax.tree_util.tree_map_with_path(
            lambda path, x: jnp.ones(jnp.shape(x), bool) if path_name(path) in chosen else None, params
        )
        return PruningState(inner.init(params), masks, jnp.float32(0), jnp.int32(0))

    def update(grads: Any, state: PruningState, params: Any = None, **extra: Any) -> tuple[Any, PruningState]:
        if params is None:
            raise ValueError("magnitude_pruning needs the parameters: tx.update(grads, state, params)")
        reached = jnp.sum(jnp.asarray(at) <= state.step)
        share = jnp.asarray(shares, jnp.float32)[reached]
        due = share > state.sparsity
        masks = jax.lax.cond(
            due, lambda: _pruned_further(params, state.masks, shares, reached, pruning), lambda: state.masks
        )
        updates, inner_state = inner.update(masked(grads, masks), state.inner_state, masked(params, masks), **extra)
        updates = jax.tree.map(_to_zero_where_pruned, updates, masks, params)
        return updates, PruningState(inner_state, masks, jnp.where(due, share, state.sparsity), state.step + 1)

    return optax.GradientTransformationExtraArgs(init, update)


def _to_zero_where_pruned(update: jax.Array, keep: Any, param: jax.Array) -> jax.Array:
    return update if keep is None else jnp.where(keep, update, -param.astype(update.dtype))


def masked(tree: Any, masks: Any) -> Any:
    """Returns `tree` with zeros where `masks` is False; leaves of other shapes, and without a mask, as they are.

    Args:
      tree: a tree like the parameters: a moving average, gradients; or None.
      masks: from `masks_of`, or `PruningState.masks`; None: nothing is pruned.

    >>> masked({"bias": 5, "kernel": np.float32([3, 4])}, {"bias": None, "kernel": np.array([True, False])})
    {'bias': 5, 'kernel': Array([3., 0.], dtype=float32)}
    """
    if masks is None or tree is None:
        return tree
    by_name = by_path(masks)

    def of_leaf(path: tuple[Any, ...], x: Any) -> Any:
        keep = by_name.get(path_name(path))
        if keep is None or jnp.shape(x) != jnp.shape(keep):
            return x
        return jnp.where(keep, x, jnp.zeros((), jnp.result_type(x)))

    return jax.tree_util.tree_map_with_path(of_leaf, tree)


def pruning_state(opt_state: Any) -> PruningState | None:
    """Finds the first `PruningState` inside the optimizer state of one objective; None if there is none."""
    leaves = jax.tree.leaves(opt_state, is_leaf=lambda x: isinstance(x, PruningState))
    return next((leaf for leaf in leaves if isinstance(leaf, PruningState)), None)


def masks_of(opt_state: Any) -> dict[str, jax.Array] | None:
    """Returns the masks in the optimizer state of one objective by path of the parameter; None if nothing is pruned.

    Masks of several prunings, as in `optax.multi_transform`, are joined: a weight stays that none of them prunes.
    """
    leaves = jax.tree.leaves(opt_state, is_leaf=lambda x: isinstance(x, PruningState))
    states = [leaf for leaf in leaves if isinstance(leaf, PruningState)]
    found: dict[str, jax.Array] = {}
    for state in states:
        for name, keep in by_path(state.masks).items():
            found[name] = found[name] & keep if name in found else keep
    return found if states else None


def why_dense(pruning: Pruning, name: str, leaf: Any, classes: Classes | None = None) -> str:
    """Why a parameter stays dense: "" for one that is pruned.

    Args:
      pruning: which weights are pruned.
      name: path of the parameter.
      leaf: the parameter, or its shape and dtype; None if it is not trained.
      classes: as in `magnitude_pruning`.
    """
    if leaf is None:
        return "not trained"
    if not is_floating(leaf):
        return "not of floats"
    if len(leaf.shape) < SMALLEST:
        return "1 axis" if len(leaf.shape) == 1 else "no axis"
    if not any(Pattern(text).covers(name, classes) for text in pruning.where):
        return "not in pruning.where"
    return "pruning.keep" if any(Pattern(text).covers(name, classes) for text in pruning.keep) else ""


def pruned_weights(pruning: Pruning, params: Any, classes: Classes | None = None) -> dict[str, Any]:
    """The parameters that are pruned, by path; for errors see `magnitude_pruning`."""
    with_frozen = jax.tree_util.tree_leaves_with_path(params, is_leaf=lambda leaf: leaf is None)
    leaves = {path_name(path): leaf for path, leaf in with_frozen}
    known: Any = {name: () for name in leaves} | dict(classes or {})
    for field in ("where", "keep"):
        for pattern in map(Pattern, getattr(pruning, field)):
            if not any(pattern.covers(name, classes) for name in leaves):
                raise InputError(
                    f"pruning.{field}: the pattern {str(pattern)!r} matches no parameter; "
                    f"{pattern.what_there_is(known if pattern.by_class else list(leaves))}"
                )
    why = {name: why_dense(pruning, name, leaf, classes) for name, leaf in leaves.items()}
    chosen = {name: leaves[name] for name in leaves if not why[name]}
    if not chosen:
        listed = ", ".join(f"{name} ({reason})" for name, reason in list(why.items())[:8])
        raise InputError(f"pruning: no parameter is pruned: {listed}; expected a trained one of two axes or more")
    for name, leaf in chosen.items() if pruning.structure == "2:4" else ():
        axis = contraction_axis(name, leaf)
        size = leaf.shape[axis]
        if len(leaf.shape) > SMALLEST and "DenseGeneral" in (classes or {}).get(name.rpartition("/")[0], ()):
            raise InputError(
                f"pruning.structure 2:4: {name} of shape {tuple(leaf.shape)} is of a DenseGeneral, which may sum over "
                f"several of its axes; expected pruning.keep {name}, or structure unstructured"
            )
        if size % GROUP:
            raise InputError(
                f"pruning.structure 2:4: {name} of shape {tuple(leaf.shape)} sums over {size} inputs, which are no "
                f"groups of {GROUP}; expected pruning.keep {name}, or a layer whose inputs are a multiple of {GROUP}"
            )
    return chosen


def contraction_axis(name: str, leaf: Any) -> int:
    """The axis of a weight that its product sums over: of a kernel the input channels, of an embedding the features."""
    return len(leaf.shape) - (1 if name.rpartition("/")[2] == "embedding" else 2)


def pruned_count(share: float, size: int) -> int:
    """The number of weights that are pruned of `size`: the nearest whole number, upwards at a half."""
    return math.floor(share * size + 0.5)


def _pruned_further(params: Any, masks: Any, shares: np.ndarray, reached: jax.Array, pruning: Pruning) -> Any:
    """The masks that prune `shares[reached]` of the weights, those that `masks` prunes among them."""
    weights, by_name = by_path(params), by_path(masks)
    keys = {name: _order_keys(name, weights[name], keep, pruning) for name, keep in by_name.items()}
    groups = [list(keys)] if pruning.scope == "global" else [[name] for name in keys]
    found: dict[str, jax.Array] = {}
    for group in groups:
        flat = jnp.concatenate([keys[name].ravel() for name in group])
        counts = jnp.asarray([pruned_count(share, flat.size) for share in shares], jnp.int32)
        order = jnp.argsort(flat, stable=True)
        kept = jnp.zeros(flat.shape, bool).at[order].set(jnp.arange(flat.size) >= counts[reached])
        ends = np.cumsum([by_name[name].size for name in group])[:-1]
        parts = jnp.split(kept, ends)
        found |= {name: part.reshape(by_name[name].shape) for name, part in zip(group, parts, strict=True)}
    return jax.tree_util.tree_map_with_path(lambda path, _: found[path_name(path)], masks)


def _order_keys(name: str, weight: jax.Array, keep: jax.Array, pruning: Pruning) -> jax.Array:
    """The keys by which weights are pruned, smallest first: magnitudes, and -1 for those that are pruned already."""
    magnitude = jnp.where(keep, jnp.abs(weight).astype(jnp.float32), -1.0)
    if pruning.structure != "2:4":
        return magnitude
    axis = contraction_axis(name, weight)
    last = jnp.moveaxis(magnitude, axis, -1)
    groups = last.reshape(*last.shape[:-1], -1, GROUP)
    rank = jnp.argsort(jnp.argsort(groups, stable=True), stable=True)
    chosen = jnp.where(rank < GROUP // 2, groups, jnp.inf)  # the two that are pruned in the end
    return jnp.moveaxis(chosen.reshape(last.shape), -1, axis)


def _check_patterns(where: str, patterns: Any) -> None:
    if isinstance(patterns, str):
        raise InputError(f"{where} = {patterns!r}: expected a tuple, ({patterns!r},)")
    for text in patterns:
        try:
            Pattern(text)
        except InputError as error:
            raise InputError(f"{where}: {error}") from error
