"""The train step, the only code that trains: a pure function of (state, batch)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import jax
import optax

from jaxmp.errors import InputError
from jaxmp.scaling.transform import LossScalingState, find_state, last_step_finite, loss_scale
from jaxmp.training.batch import Batch, LossFn
from jaxmp.training.gradients import make_gradients
from jaxmp.training.metrics import Metrics
from jaxmp.training.parallel import Replicas, single
from jaxmp.training.state import TrainState

TrainStep = Callable[[TrainState, Batch], tuple[TrainState, Metrics]]


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
    """Makes the pure step `(state, batch) -> (state, metrics)`. Jit it, and donate the state.

    The order of operations is that of mixed-precision training with dynamic loss scaling (Micikevicius et al. 2018,
    section 3.2): loss in float32, times the scale; gradients with respect to the master weights; summed over replicas;
    one finite flag, from the reduced, still scaled gradients and the loss; unscaled by the scale that the loss was
    multiplied by; optimizer; commit by selection; new scale.

    Args:
      loss_fn: `(params, model_state, batch, key) -> (loss_sum, (weight, metrics, model_state))`, see `make_loss`.
      tx: `loss_scaling(...)`, around everything that changes gradients. Without it no step is skipped.
      ema_decay: decay of the moving average of the parameters, if the state keeps one.
      rounding: how updates are added to parameters in half precision, see `jaxmp.apply_updates`; "kahan" needs a state
        that was created for it.
      accumulate_steps: number of microbatches that a batch is split into (each replica splits its share): less memory
        for the same update, up to rounding. The model state is handed from one microbatch to the next.
      accumulate_overflow: what is dropped if the gradient of a microbatch is not finite: the whole "window", which
        skips the step; or only that "microbatch" (on that replica), and the gradient is divided by the weight of the
        others. The scaler is told of the overflow either way. A NaN loss always skips the step.
      replicas: how the examples of a batch are spread; `single` (default) leaves them together.

    Returns:
      The step. Its metrics are those of the loss function and `loss`, summed over replicas.

    Raises:
      InputError: a transformation stands outside `loss_scaling`, or the accumulation arguments are not valid. When the
        step is traced: the batch does not divide into its microbatches.
    """
    _refuse_outside_of_probe(tx)
    tx = optax.with_extra_args_support(tx)

    gradients = replicas.shard_map(
        make_gradients(
            loss_fn,
            accumulate_steps=accumulate_steps,
            accumulate_overflow=accumulate_overflow,
            replicas=replicas,
        )
    )

    def train_step(state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
        _refuse_outside(state.opt_state)
        key = jax.random.fold_in(state.key, state.step)
        grads, measured, model_state = gradients(
            state.params, state.model_state, loss_scale(state.opt_state), batch, key
        )
        extra = {} if measured.overflowed is None else {"overflowed": measured.overflowed}
        updates, opt_state = tx.update(grads, state.opt_state, state.params, value=measured.loss, **extra)
        state = state.commit(
            last_step_finite(opt_state),
            updates=updates,
            model_state=model_state,
            opt_state=opt_state,
            ema_decay=ema_decay,
            rounding=rounding,
        )
        return replicas.place(state), measured.metrics

    return train_step


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
