"""The train step and the evaluation step: the only code that trains, pure functions of (state, batch)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from jaxmp.errors import InputError
from jaxmp.scaling.transform import LossScalingState, find_state, last_step_finite, loss_scale
from jaxmp.training.metrics import Mean, Metrics
from jaxmp.training.parallel import Replicas, single
from jaxmp.training.state import TrainState
from jaxmp.training.tasks import Batch, LossFn

TrainStep = Callable[[TrainState, Batch], tuple[TrainState, Metrics]]
EvalStep = Callable[[Any, Any, Batch], Metrics]


def make_train_step(
    loss_fn: LossFn,
    tx: optax.GradientTransformation,
    *,
    ema_decay: float | None = None,
    rounding: str = "nearest",
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
      replicas: how the examples of a batch are spread; `single` (default) leaves them together.

    Returns:
      The step. Its metrics are those of the loss function and `loss`, summed over replicas.

    Raises:
      InputError: something that changes gradients or counts steps stands outside `loss_scaling`.
    """
    _refuse_outside_of_probe(tx)
    tx = optax.with_extra_args_support(tx)

    def gradients(params: Any, model_state: Any, scale: jax.Array, batch: Batch, key: jax.Array) -> Any:
        def scaled_loss(params: Any) -> Any:
            total, (weight, metrics, new_model_state) = loss_fn(params, model_state, batch, key)
            total, weight = total.astype(jnp.float32), weight.astype(jnp.float32)
            all_weight = replicas.sum(weight)
            # A batch without a single counted example has no gradient, rather than 0/0.
            loss = total / jnp.where(all_weight == 0, 1, all_weight)
            return loss * scale, (loss, {"loss": Mean(total, weight), **metrics}, new_model_state)

        key = replicas.own_key(key)
        grads, (loss, metrics, model_state) = jax.grad(scaled_loss, has_aux=True, allow_int=True)(params)
        return replicas.sum_gradients(grads), replicas.sum((loss, metrics)), replicas.mean(model_state)

    gradients = replicas.spread(gradients)

    def train_step(state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
        _refuse_outside(state.opt_state)
        key = jax.random.fold_in(state.key, state.step)
        grads, (loss, metrics), model_state = gradients(
            state.params, state.model_state, loss_scale(state.opt_state), batch, key
        )
        updates, opt_state = tx.update(grads, state.opt_state, state.params, value=loss)
        state = state.commit(
            last_step_finite(opt_state),
            updates=updates,
            model_state=model_state,
            opt_state=opt_state,
            ema_decay=ema_decay,
            rounding=rounding,
        )
        return state, metrics

    return train_step


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
