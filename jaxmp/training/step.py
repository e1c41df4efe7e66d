"""The train step and the evaluation step: the only code that trains, pure functions of (state, batch)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxmp.errors import InputError
from jaxmp.scaling.transform import LossScalingState, all_finite, find_state, inner_view, last_step_finite, loss_scale
from jaxmp.training.batch import EXAMPLE_INDEX, Batch, LossFn
from jaxmp.training.metrics import Mean, Metrics
from jaxmp.training.parallel import Replicas, single
from jaxmp.training.state import TrainState
from jaxmp.trees import has_gradient, tree_where

TrainStep = Callable[[TrainState, Batch], tuple[TrainState, Metrics]]
EvalStep = Callable[[Any, Any, Batch], Metrics]

OVERFLOWS = ("window", "microbatch")
"""what `accumulate_overflow` may be"""


class _Measured(NamedTuple):
    """What comes with the gradients of a part of a batch."""

    loss: jax.Array
    """its share of the mean loss"""
    metrics: Metrics
    model_state: Any


def make_train_step(
    loss_fn: LossFn,
    tx: optax.GradientTransformation,
    *,
    ema_decay: float | None = None,
    rounding: str = "nearest",
    accumulate_steps: int = 1,
    accumulate_overflow: Literal["window", "microbatch"] = "window",
    replicas: Replicas = single,
) -> TrainStep:
    """The pure step `(state, batch) -> (state, metrics)`, to be jitted (and donated its state) by whoever runs it.

    The order of operations is that of mixed-precision training with dynamic loss scaling (Micikevicius et al. 2018,
    section 3.2): loss in float32, times the scale; gradients with respect to the master weights; summed over replicas;
    one finite flag, from the reduced, still scaled gradients and the loss; unscaled by the scale that the loss was
    multiplied by; optimizer; commit by selection; new scale.

    Args:
      loss_fn: `(params, model_state, batch, key) -> (loss_sum, (weight, metrics, model_state))`, see `make_loss`.
      tx: `loss_scaling(...)`, with all that changes gradients inside it. A `tx` without any is applied as it is: then
        no step is skipped.
      ema_decay: decay of the moving average of the parameters, for a state that keeps one.
      rounding: how updates are added to parameters in half precision, see `jaxmp.apply_updates`; "kahan" wants a state
        that was created for it.
      accumulate_steps: into how many microbatches, one after the other, a batch is split (on each replica, its share):
        less memory for the same update, to rounding. The model state goes from one to the next.
      accumulate_overflow: what is dropped where the gradient of a microbatch is not finite: the whole "window", which
        skips the step; or only that "microbatch" (on that replica), and the gradient is divided by the weight of those
        that were kept. The scaler hears of the overflow either way. A NaN loss always skips the step.
      replicas: how the examples of a batch are spread; `single` (default) leaves them together.

    Returns:
      The step. Its metrics are those of the loss function and `loss`, summed over replicas.

    Raises:
      InputError: something that changes gradients or counts steps stands outside `loss_scaling`; or there is no such
        way to accumulate. When the step is traced: a batch that does not divide into its microbatches.
    """
    if accumulate_steps < 1:
        raise InputError(f"accumulate_steps={accumulate_steps}: expected a whole number of at least 1")
    if accumulate_overflow not in OVERFLOWS:
        raise InputError(f"accumulate_overflow={accumulate_overflow!r}: expected {' or '.join(OVERFLOWS)}")
    _refuse_outside_of_probe(tx)
    tx = optax.with_extra_args_support(tx)

    gradients = replicas.shard_map(
        scaled_gradients(
            loss_fn,
            accumulate_steps=accumulate_steps,
            accumulate_overflow=accumulate_overflow,
            replicas=replicas,
        )
    )

    def train_step(state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
        _refuse_outside(state.opt_state)
        key = jax.random.fold_in(state.key, state.step)
        grads, (loss, metrics, overflowed), model_state = gradients(
            state.params, state.model_state, loss_scale(state.opt_state), batch, key
        )
        extra = {} if overflowed is None else {"overflowed": overflowed}
        updates, opt_state = tx.update(grads, state.opt_state, state.params, value=loss, **extra)
        state = state.commit(
            last_step_finite(opt_state),
            updates=updates,
            model_state=model_state,
            opt_state=opt_state,
            ema_decay=ema_decay,
            rounding=rounding,
        )
        return replicas.place(state), metrics

    return train_step


def scaled_gradients(
    loss_fn: LossFn,
    *,
    accumulate_steps: int = 1,
    accumulate_overflow: Literal["window", "microbatch"] = "window",
    replicas: Replicas = single,
) -> Callable[..., Any]:
    """The first half of a step, on one replica, to be spread over all: for arguments see `make_train_step`.

    Returns:
      `(params, model_state, scale, batch, key) -> (grads, (loss, metrics, overflowed), model_state)`: gradients of the
      loss times `scale`, the loss itself, and whether a microbatch was dropped (None where none can be); summed over
      replicas, the model state averaged.
    """

    def differentiate(
        params: Any, model_state: Any, scale: jax.Array, batch: Batch, key: jax.Array, all_weight: Any = None
    ) -> tuple[Any, _Measured]:
        """The scaled gradients of a part of a batch, of the loss divided by the weight of all of it."""

        def scaled_loss(params: Any) -> Any:
            total, (weight, metrics, new_model_state) = loss_fn(params, model_state, batch, key)
            total, weight = total.astype(jnp.float32), weight.astype(jnp.float32)
            whole = replicas.sum(weight) if all_weight is None else all_weight
            # A batch without a single counted example has no gradient, rather than 0/0.
            loss = total / jnp.where(whole == 0, 1, whole)
            with jax.named_scope("loss_scale"):  # the name that `blame` knows it by
                scaled = loss * scale
            return scaled, _Measured(loss, {"loss": Mean(total, weight), **metrics}, new_model_state)

        return jax.grad(scaled_loss, has_aux=True, allow_int=True)(params)

    def of_batch(params: Any, model_state: Any, scale: jax.Array, batch: Batch, key: jax.Array) -> Any:
        if replicas.several:
            batch = {**batch, EXAMPLE_INDEX: replicas.global_index(_rows(batch), 1)[0]}
        grads, measured = differentiate(params, model_state, scale, batch, key)
        loss, metrics = replicas.sum((measured.loss, measured.metrics))
        return replicas.sum_gradients(grads), (loss, metrics, None), replicas.mean(measured.model_state)

    def of_microbatches(params: Any, model_state: Any, scale: jax.Array, batch: Batch, key: jax.Array) -> Any:
        rows = _rows(batch)
        if rows % accumulate_steps:
            raise InputError(f"accumulate_steps={accumulate_steps}: a batch of {rows} rows has no so many equal parts")
        global_index = replicas.global_index(rows, accumulate_steps)
        parts = {**replicas.microbatches(batch, accumulate_steps), EXAMPLE_INDEX: global_index}

        def weigh(part: Batch) -> jax.Array:
            # Of all that this computes, XLA keeps what the weight is made from: in general, nothing of the model.
            return loss_fn(params, model_state, part, key)[1][0].astype(jnp.float32)

        # Before the first gradient: no collective inside the loop, and gradients as large as those of one batch.
        all_weight = replicas.sum(jnp.sum(jax.lax.map(weigh, parts)))

        def add(carry: tuple[list[jax.Array], Any], part: Batch) -> Any:
            sums, model_state = carry
            grads, measured = differentiate(params, model_state, scale, part, key, all_weight)
            # Still scaled: S stands still meanwhile and is a power of two, so that unscaling the sum gives the same
            # bits as unscaling each, but for those that float32 would flush to zero (trap T10).
            new = [s + g.astype(s.dtype) for s, g in zip(sums, _with_gradient(params, grads), strict=True)]
            carry_on, kept = (new, measured.model_state), jnp.bool_(True)
            if accumulate_overflow == "microbatch":
                kept = all_finite(inner_view(grads)) | jnp.isnan(measured.loss)
                carry_on = tree_where(kept, carry_on, carry)
            return carry_on, (kept, measured.loss, measured.metrics)

        masters = _with_gradient(params, params)
        nothing = [jnp.zeros(p.shape, jnp.promote_types(p.dtype, jnp.float32)) for p in masters]
        if replicas.axis_name is None:
            nothing = replicas.in_shares(nothing)
        (sums, model_state), (kept, losses, metrics) = jax.lax.scan(add, (nothing, model_state), parts)
        loss, metrics = jax.tree.map(lambda x: jnp.sum(jnp.where(kept, x, 0)), (losses, metrics))
        loss, metrics, dropped = replicas.sum((loss, metrics, jnp.sum(~kept, dtype=jnp.float32)))
        grads, model_state = replicas.sum_gradients(_rebuild(params, sums)), replicas.mean(model_state)
        if accumulate_overflow == "window":
            return grads, (loss, metrics, None), model_state
        # Exactly 1 where all were kept. Where nothing was that counts, there is no step to take.
        weight = metrics["loss"].weight
        of_kept = jnp.where(weight == 0, 1, all_weight / weight)
        grads = jax.tree.map(lambda g: g * of_kept if has_gradient(g) else g, grads)
        loss = jnp.where((weight == 0) & (dropped > 0), jnp.inf, loss * of_kept)
        return grads, (loss, metrics, dropped > 0), model_state

    return of_batch if accumulate_steps == 1 else of_microbatches


def _rows(batch: Batch) -> int:
    return len(jax.tree.leaves(batch)[0])


def _with_gradient(params: Any, tree: Any) -> list[Any]:
    """The leaves of `tree` at the places of the parameters that have a gradient."""
    leaves = zip(jax.tree.leaves(params), jax.tree.leaves(tree), strict=True)
    return [x for param, x in leaves if has_gradient(param)]


def _rebuild(params: Any, grads: list[jax.Array]) -> Any:
    """The gradients as a tree like the parameters, with JAX's own zeros where there are none."""
    rest = iter(grads)

    def leaf(param: Any) -> Any:
        return next(rest) if has_gradient(param) else np.zeros(param.shape, jax.dtypes.float0)

    return jax.tree.map(leaf, params)


def make_eval_step(loss_fn: LossFn) -> EvalStep:
    """The pure `(params, model_state, batch) -> metrics`, `loss` included, from `make_loss(..., train=False)`."""

    def eval_step(params: Any, model_state: Any, batch: Batch) -> Metrics:
        total, (weight, metrics, _) = loss_fn(params, model_state, batch, None)
        return {"loss": Mean(total.astype(jnp.float32), weight.astype(jnp.float32)), **metrics}

    return eval_step


def _refuse_outside_of_probe(tx: Any) -> None:
    """The check of `_refuse_outside` before there are parameters, where `tx` can be initialised without any."""
    try:
        opt_state = jax.eval_shape(tx.init, {})
    except Exception:  # a mask or label tree of particular parameters: the first trace of the step checks it
        return
    _refuse_outside(opt_state)


def _refuse_outside(opt_state: Any) -> None:
    """Refuses an optimizer whose `loss_scaling` is not the outermost transformation (defect B16).

    What stands before it would act on scaled gradients (a clip); what stands after it would act on skipped steps as
    well (weight decay shrinks the weights, a schedule counts).
    """
    if not isinstance(opt_state, LossScalingState) and find_state(opt_state) is not None:
        raise InputError(
            f"loss_scaling stands inside another transformation (its state is a {type(opt_state).__name__}); what is "
            "outside of it would act on scaled gradients or on skipped steps. Put all of it inside: "
            "loss_scaling(optax.chain(...), scaler)"
        )
