"""The gradient of a loss, formed in one place: scaled, weighted, over microbatches and replicas.

The train step, ranges, blame, find_policy, memory and comparisons all differentiate the same function.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxmp.errors import InputError
from jaxmp.precision.recipe import GRADIENT_AMAX
from jaxmp.scaling.transform import all_finite, inner_view
from jaxmp.training.batch import EXAMPLE_INDEX, Batch, LossFn
from jaxmp.training.metrics import DROPPED_EXAMPLES, Mean, Metrics, with_loss
from jaxmp.training.objective import EVERYTHING, fill, trained_view
from jaxmp.training.parallel import Replicas, single
from jaxmp.training.privacy import Privacy, refuse_model_state
from jaxmp.trees import has_gradient, tree_where

OVERFLOWS = ("window", "microbatch")
"""values of `accumulate_overflow`"""


class Measured(NamedTuple):
    """What is known of a batch beside the gradients of its loss."""

    loss: jax.Array
    """mean loss over the examples, without the loss scale; float32 scalar"""
    metrics: Metrics
    """those of the loss function, and `loss`"""
    overflowed: jax.Array | None = None
    """whether the gradients of a microbatch were left out, bool scalar; None if none can be"""


Gradients = Callable[..., tuple[Any, Measured, Any]]
"""`(params, model_state, scale, batch, key) -> (scaled gradients, Measured, model_state)`"""


def differentiate(loss: Callable[[Any], tuple[jax.Array, Any]], params: Any) -> tuple[Any, Any]:
    """The gradients of a scalar loss, and what it returns beside it.

    The gradient of a complex leaf is the direction of ascent: the conjugate of what `jax.grad` returns (trap T24).

    Args:
      loss: `params -> (scalar, aux)`.
      params: what to differentiate by; a leaf that is not a float gets a gradient of dtype float0.
    """
    grads, aux = jax.grad(loss, has_aux=True, allow_int=True)(params)
    return jax.tree.map(lambda g: jnp.conj(g) if jnp.iscomplexobj(g) else g, grads), aux


def _differentiate(
    scaled_mean: Callable[..., tuple[jax.Array, Any]], params: Any, trained: Any, model_state: Any, *args: Any
) -> tuple[Any, Any]:
    """The gradients of the scaled mean loss by what is trained, and what it returns beside it.

    Where the model state has magnitudes of gradients (`GRADIENT_AMAX`), the new ones are the gradients by these inputs
    (the convention of Flax's fp8 layers, "overwrite with gradient").
    """
    if not isinstance(model_state, Mapping) or GRADIENT_AMAX not in model_state:
        return differentiate(lambda trained: scaled_mean(fill(trained, params), model_state, *args), trained)

    def loss(both: tuple[Any, Any]) -> tuple[jax.Array, Any]:
        trained, amax = both
        return scaled_mean(fill(trained, params), {**model_state, GRADIENT_AMAX: amax}, *args)

    (grads, amax), (loss_, metrics, new) = differentiate(loss, (trained, model_state[GRADIENT_AMAX]))
    return grads, (loss_, metrics, {**new, GRADIENT_AMAX: amax})


def scaled_mean_loss(loss_fn: LossFn, replicas: Replicas = single) -> Callable[..., tuple[jax.Array, Any]]:
    """The function that is differentiated: the mean loss over all replicas, times the loss scale.

    Returns:
      `(params, model_state, scale, batch, key, weight=None) -> (scaled, (loss, metrics, model_state))`. The loss of
      the batch is divided by `weight`, by default that of the batch on all replicas, and then scaled, in float32 (or
      wider, if the loss function returns a wider sum). A batch of weight zero has loss 0.
    """

    def scaled_mean(
        params: Any, model_state: Any, scale: jax.Array, batch: Batch, key: Any, weight: Any = None
    ) -> tuple[jax.Array, Any]:
        total, (own_weight, metrics, model_state) = loss_fn(params, model_state, batch, key)
        total, own_weight = _at_least_float32(total), _at_least_float32(own_weight)
        whole = replicas.sum(own_weight) if weight is None else weight
        # A batch without a single counted example has no gradient, rather than 0/0.
        loss = total / jnp.where(whole == 0, 1, whole)
        with jax.named_scope("loss_scale"):  # the name that `blame` knows it by
            scaled = loss * scale
        return scaled, (loss, with_loss(Mean(total, own_weight), metrics), model_state)

    return scaled_mean


def make_gradients(
    loss_fn: LossFn,
    *,
    accumulate_steps: int = 1,
    accumulate_overflow: Literal["window", "microbatch"] = "window",
    replicas: Replicas = single,
    trains: tuple[str, ...] = EVERYTHING,
    private: Privacy | None = None,
) -> Gradients:
    """The first half of a train step, on one replica's share of a batch. For the arguments see `make_train_step`.

    Returns:
      `(params, model_state, scale, batch, key) -> (gradients, Measured, model_state)`. The gradients are those of the
      mean loss times `scale`, summed over replicas, as are the metrics; the model state is averaged over replicas.
      What `trains` (see `Objective`) leaves out is not differentiated: in the gradients it is None.

      With `private`, the gradients are those of each row's loss alone, clipped, summed and divided by `private.rows`,
      still without noise (`Privacy.add_noise`). Each row is a batch of its own to the loss function, so that no row
      sees another, and draws from a key of its own. Rows that are not finite are left out of the metrics, too, and the
      metric `dropped_examples` is their share.

    Raises:
      InputError: no such way to accumulate. When traced: a batch that does not divide into its microbatches, a
        pattern in `trains` that matches no parameter, a metric `loss` of the loss function's own, or, with `private`, a
        model that keeps a state.
    """
    if accumulate_steps < 1:
        raise InputError(f"accumulate_steps={accumulate_steps}: expected a whole number of at least 1")
    if accumulate_overflow not in OVERFLOWS:
        raise InputError(f"accumulate_overflow={accumulate_overflow!r}: expected {' or '.join(OVERFLOWS)}")
    scaled_mean = scaled_mean_loss(loss_fn, replicas)

    def of_batch(params: Any, model_state: Any, scale: jax.Array, batch: Batch, key: jax.Array) -> Any:
        if replicas.several:
            batch = {**batch, EXAMPLE_INDEX: replicas.global_index(_rows(batch), 1)[0]}
        grads, (loss, metrics, model_state) = _differentiate(
            scaled_mean, params, trained_view(params, trains), model_state, scale, batch, key
        )
        loss, metrics = replicas.sum((loss, metrics))
        return replicas.sum_gradients(grads), Measured(loss, metrics), replicas.mean(model_state)

    def of_microbatches(params: Any, model_state: Any, scale: jax.Array, batch: Batch, key: jax.Array) -> Any:
        rows, own = _rows(batch), trained_view(params, trains)
        if rows % accumulate_steps:
            raise InputError(
                f"accumulate_steps={accumulate_steps}: a batch of {rows} rows has no so many equal microbatches"
            )
        index = replicas.global_index(rows, accumulate_steps)
        parts = {**replicas.microbatches(batch, accumulate_steps), EXAMPLE_INDEX: index}

        def weigh(part: Batch) -> jax.Array:
            # Of all that this computes, XLA keeps what the weight is made from: in general, nothing of the model.
            return _at_least_float32(loss_fn(params, model_state, part, key)[1][0])

        # Before the first gradient: no collective inside the loop, and gradients as large as those of one batch.
        all_weight = replicas.sum(jnp.sum(jax.lax.map(weigh, parts)))

        def add(carry: tuple[list[jax.Array], Any], part: Batch) -> Any:
            sums, model_state = carry
            grads, (loss, metrics, new_model_state) = _differentiate(
                scaled_mean, params, own, model_state, scale, part, key, all_weight
            )
            # Still scaled: S stands still meanwhile and is a power of two, so that unscaling the sum gives the same
            # bits as unscaling each, but for those that float32 would flush to zero (trap T10).
            new = [s + g.astype(s.dtype) for s, g in zip(sums, _with_gradient(own, grads), strict=True)]
            # As `commit` does with that of one batch.
            new_model_state = jax.tree.map(
                lambda x, old: x if x.dtype == old.dtype else x.astype(old.dtype), new_model_state, model_state
            )
            carry_on, kept = (new, new_model_state), jnp.bool_(True)
            if accumulate_overflow == "microbatch":
                kept = all_finite(inner_view(grads)) | jnp.isnan(loss)
                carry_on = tree_where(kept, carry_on, carry)
            return carry_on, (kept, loss, metrics)

        masters = _with_gradient(own, own)
        nothing = [jnp.zeros(p.shape, jnp.promote_types(p.dtype, jnp.float32)) for p in masters]
        if replicas.axis_name is None:
            nothing = replicas.in_shares(nothing)
        (sums, model_state), (kept, losses, metrics) = jax.lax.scan(add, (nothing, model_state), parts)
        loss, metrics = jax.tree.map(lambda x: jnp.sum(jnp.where(kept, x, 0)), (losses, metrics))
        loss, metrics, dropped = replicas.sum((loss, metrics, jnp.sum(~kept, dtype=jnp.float32)))
        grads, model_state = replicas.sum_gradients(_rebuild(own, sums)), replicas.mean(model_state)
        if accumulate_overflow == "window":
            return grads, Measured(loss, metrics), model_state
        # Exactly 1 where all were kept. Where nothing was that counts, there is no step to take.
        weight = metrics["loss"].weight
        of_kept = jnp.where(weight == 0, 1, all_weight / weight)
        grads = jax.tree.map(lambda g: g * of_kept if has_gradient(g) else g, grads)
        loss = jnp.where((weight == 0) & (dropped > 0), jnp.inf, loss * of_kept)
        return grads, Measured(loss, metrics, dropped > 0), model_state

    def of_rows(params: Any, model_state: Any, scale: jax.Array, batch: Batch, key: jax.Array) -> Any:
        assert private is not None
        refuse_model_state(model_state)
        rows, own = _rows(batch), trained_view(params, trains)
        if rows % accumulate_steps:
            raise InputError(
                f"accumulate_steps={accumulate_steps}: a batch of {rows} rows has no so many equal microbatches"
            )
        index = replicas.global_index(rows, accumulate_steps)
        parts = {**replicas.microbatches(batch, accumulate_steps), EXAMPLE_INDEX: index}

        def of_row(row: Batch) -> tuple[list[jax.Array], jax.Array, jax.Array, Any]:
            alone = jax.tree.map(lambda x: x[None], row)
            row_key = jax.random.fold_in(key, row[EXAMPLE_INDEX])
            grads, (loss, metrics, _) = _differentiate(
                scaled_mean, params, own, model_state, scale, alone, row_key, jnp.float32(1)
            )
            clipped, finite = private.clip(_with_gradient(own, grads), scale)
            counts = row["weight"] > 0
            kept = counts & finite & jnp.isfinite(loss)
            # By selection: a row that only fills the batch may be NaN on its way through the model.
            return [jnp.where(kept, g, 0) for g in clipped], counts, kept, tree_where(kept, metrics, _zeros(metrics))

        def of_part(part: Batch) -> Any:
            return jax.tree.map(lambda x: jnp.sum(x, axis=0, dtype=_sum_dtype(x)), jax.vmap(of_row)(part))

        if accumulate_steps == 1:
            found = of_part(jax.tree.map(lambda x: x[0], parts))
        else:
            nothing = jax.eval_shape(of_part, jax.tree.map(lambda x: x[0], parts))
            add = lambda sums, part: (jax.tree.map(jnp.add, sums, of_part(part)), None)  # noqa: E731
            found, _ = jax.lax.scan(add, _zeros(nothing), parts)
        sums, counted, kept, metrics = found
        counted, kept, metrics = replicas.sum((counted, kept, metrics))
        # The policy's reduce dtype would round what one row adds to the sum.
        in_float32 = dataclasses.replace(replicas, reduce_dtype=jnp.float32)
        sums = _with_gradient(own, in_float32.sum_gradients(_rebuild(own, sums)))
        grads = _rebuild(own, [private.mean(g, scale) for g in sums])
        total, weight = metrics["loss"]
        nothing_left = (counted > 0) & (kept == 0)
        metrics = {
            **metrics,
            "loss": Mean(jnp.where(nothing_left, jnp.nan, total), weight),
            DROPPED_EXAMPLES: Mean(counted - kept, counted),
        }
        return grads, Measured(total / jnp.where(weight == 0, 1, weight), metrics), model_state

    if private is not None:
        return of_rows
    return of_batch if accumulate_steps == 1 else of_microbatches


def _sum_dtype(x: jax.Array) -> Any:
    return jnp.float32 if x.dtype == jnp.bool_ else x.dtype


def _zeros(tree: Any) -> Any:
    return jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), tree)


def _at_least_float32(x: Any) -> jax.Array:
    return jnp.asarray(x, jnp.promote_types(jnp.result_type(x), jnp.float32))


def _rows(batch: Batch) -> int:
    return len(jax.tree.leaves(batch)[0])


def _with_gradient(params: Any, tree: Any) -> list[Any]:
    """The leaves of `tree` at the places of the parameters that have a gradient."""
    leaves = zip(jax.tree.leaves(params), jax.tree.leaves(tree), strict=True)
    return [x for param, x in leaves if has_gradient(param)]


def _rebuild(params: Any, grads: list[jax.Array]) -> Any:
    """The gradients as a tree like the parameters, with JAX's own zeros for leaves that have none."""
    rest = iter(grads)

    def leaf(param: Any) -> Any:
        return next(rest) if has_gradient(param) else np.zeros(param.shape, jax.dtypes.float0)

    return jax.tree.map(leaf, params)
