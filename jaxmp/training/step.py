"""The train step, the only code that trains: a pure function of (state, batch)."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Collection, Mapping
from typing import Any, Literal

import jax
import jax.numpy as jnp
import optax

from jaxmp.errors import InputError, nearest
from jaxmp.scaling.float32_math import global_norm
from jaxmp.scaling.transform import LossScalingState, find_state, inner_view, last_step_finite, loss_scale
from jaxmp.training.batch import Batch, LossFn
from jaxmp.training.gradients import Measured, make_gradients
from jaxmp.training.metrics import NAN_LOSS, Mean, Metrics
from jaxmp.training.objective import Objective, Objectives, check_name, check_objectives, objective_key, trained_view
from jaxmp.training.parallel import Replicas, single
from jaxmp.training.state import TrainState

ORDERS = ("in_turn", "at_once")
"""values of `order`"""

TrainStep = Callable[..., tuple[TrainState, Metrics]]
"""`(state, batch) -> (state, metrics)`; that of a `Trainer` takes numbers of its optimizers as a third argument"""


def make_train_step(
    loss_fn: LossFn | Objective | Objectives,
    tx: optax.GradientTransformation | None = None,
    *,
    order: Literal["in_turn", "at_once"] = "in_turn",
    due: Collection[str] | None = None,
    ema_decay: float | None = None,
    rounding: str = "nearest",
    accumulate_steps: int = 1,
    accumulate_overflow: Literal["window", "microbatch"] = "window",
    replicas: Replicas = single,
    norms: Collection[str] = (),
) -> TrainStep:
    """Makes the pure step `(state, batch) -> (state, metrics)`. Jit it, and donate the state.

    The order of operations is that of mixed-precision training with dynamic loss scaling (Micikevicius et al. 2018,
    section 3.2): loss in float32, times the scale; gradients with respect to the master weights; summed over replicas;
    one finite flag, from the reduced, still scaled gradients and the loss; unscaled by the scale that the loss was
    multiplied by; optimizer; commit by selection; new scale.

    Several objectives each do this as a step of their own, with their own scale, finite flag and optimizer state.
    Objective `name` draws from `fold_in(key of the step, crc32(name))`.

    Args:
      loss_fn: `(params, model_state, batch, key) -> (loss_sum, (weight, metrics, model_state))`, see `make_loss`; or an
        `Objective`; or several by name, which run in the order of the mapping.
      tx: `loss_scaling(...)`, with all that changes gradients inside it. A `tx` without any is applied as it is: then
        no step is skipped. None with objectives, which have their own.
      order: what several objectives see: "in_turn", each the parameters that the one before left; "at_once", all the
        parameters at the beginning of the step. The model state goes from one to the next either way.
      due: names of the objectives that this step runs, chosen by `jaxmp.training.objective.due_at`: a program for each
        set of them. None (default): each runs where its `every` divides `state.step`, chosen by `lax.cond`.
      ema_decay: decay of the moving average of the parameters, for a state that keeps one. An `Objective` has its own.
      rounding: how updates are added to parameters in half precision, see `jaxmp.apply_updates`; "kahan" wants a state
        that was created for it.
      accumulate_steps: number of microbatches that a batch is split into (each replica splits its share): less memory
        for the same update, up to rounding. The model state is handed from one microbatch to the next.
      accumulate_overflow: what is dropped if the gradient of a microbatch is not finite: the whole "window", which
        skips the step; or only that "microbatch" (on that replica), and the gradient is divided by the weight of the
        others. The scaler is told of the overflow either way. A NaN loss always skips the step.
      replicas: how the examples of a batch are spread; `single` (default) leaves them together.
      norms: metrics to add, "gradient_norm" and "update_norm": the global norm of the unscaled gradients before
        clipping, and that of the update, float32. Without them the step is the same program.

    Returns:
      The step. Its metrics are those of the loss function and `loss`, summed over replicas. Those of several objectives
      are called `name/loss` and so on; they have weight 0 where the objective did not run or was skipped, and
      `nan_loss/name` counts the steps in which its loss was NaN.

    Raises:
      InputError: something that changes gradients or counts steps stands outside `loss_scaling`; there is no such way
        to accumulate; or arguments of several objectives with a single one. When the step is traced: a batch that does
        not divide into its microbatches, or a pattern in `trains` that matches no parameter.
    """
    how: dict[str, Any] = {
        "accumulate_steps": accumulate_steps,
        "accumulate_overflow": accumulate_overflow,
        "replicas": replicas,
        "norms": norms,
    }
    if not isinstance(loss_fn, Objective | Mapping):
        if tx is None:
            raise InputError("make_train_step(loss_fn) without an optimizer: expected make_train_step(loss_fn, tx)")
        loss_fn = Objective(loss_fn, tx, ema_decay=ema_decay)
    elif tx is not None or ema_decay is not None:
        raise InputError("make_train_step: an Objective has a tx and an ema_decay of its own; expected none beside it")
    if isinstance(loss_fn, Mapping):
        return _several(loss_fn, order, due, rounding, **how)
    if due is not None or order != "in_turn" or loss_fn.every != 1:
        raise InputError("make_train_step: due, order and every are for several objectives; expected a mapping of them")
    attempt = _attempt(loss_fn, **how)

    def train_step(state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
        _refuse_outside(state.opt_state)
        key = jax.random.fold_in(state.key, state.step)
        finite, result, measured = attempt(state.params, state.model_state, state.opt_state, batch, key)
        state = state.commit(finite, **result, ema_decay=loss_fn.ema_decay, rounding=rounding)
        return replicas.place(state), measured.metrics

    return train_step


def make_state_seen(objectives: Objectives, name: str, *, order: str = "in_turn", **how: Any) -> Any:
    """Makes `(state, batch) -> state`: the state that one of several objectives sees in the step from `state`.

    Those that come before it and are due have run. `step` is that of the state given, so that the key is that of the
    step. Of `at_once`, the parameters too are those given.

    Args:
      objectives: as for `make_train_step`.
      name: of the objective.
      order: as for `make_train_step`.
      how: further arguments of `make_train_step`.

    Raises: InputError if there is no such objective, and as `make_train_step` does.
    """
    check_name(name, objectives, "objective")
    names = list(objectives)
    earlier = {each: objectives[each] for each in names[: names.index(name)]}
    if not earlier:
        return lambda state, batch: state
    step = make_train_step(earlier, order=order, **how)  # type: ignore[arg-type]

    def state_seen(state: TrainState, batch: Batch) -> TrainState:
        seen, _ = step(state, batch)
        params = state.params if order == "at_once" else seen.params
        return dataclasses.replace(seen, step=state.step, params=params)

    return state_seen


def _attempt(
    objective: Objective,
    *,
    accumulate_steps: int,
    accumulate_overflow: Literal["window", "microbatch"],
    replicas: Replicas,
    norms: Collection[str],
) -> Callable[..., tuple[jax.Array, dict[str, Any], Measured]]:
    """`(params, model_state, opt_state, batch, key) -> (finite, what to commit, Measured)` of one objective."""
    _refuse_outside_of_probe(objective.tx)
    tx = optax.with_extra_args_support(objective.tx)
    gradients = replicas.shard_map(
        make_gradients(
            objective.loss_fn,
            accumulate_steps=accumulate_steps,
            accumulate_overflow=accumulate_overflow,
            replicas=replicas,
            trains=objective.trains,
            private=objective.private,
        )
    )
    private = objective.private

    def attempt(params: Any, model_state: Any, opt_state: Any, batch: Batch, key: jax.Array) -> Any:
        scale = loss_scale(opt_state)
        grads, measured, model_state = gradients(params, model_state, scale, batch, key)
        extra = {} if measured.overflowed is None else {"overflowed": measured.overflowed}
        if private is None:
            extra["value"] = measured.loss
        else:  # what is decided by the loss, which has no noise, would tell of single rows
            grads = private.add_noise(grads, scale, key)
        trained = trained_view(params, objective.trains)
        given = grads, opt_state, trained
        updates, opt_state = tx.update(*given, **extra)
        if norms:
            found = {"gradient_norm": global_norm(inner_view(grads)) / scale}
            if "update_norm" in norms:
                # Of updates that are made again: a second reader of the step's own would change how XLA rounds them
                # on their way to the parameters (multiply and add in one, or not).
                found["update_norm"] = global_norm(tx.update(*jax.lax.optimization_barrier(given), **extra)[0])
            asked = {name: Mean(found[name].astype(jnp.float32), jnp.float32(1)) for name in norms}
            measured = measured._replace(metrics={**measured.metrics, **asked})
        result = {"updates": updates, "model_state": model_state, "opt_state": opt_state}
        return last_step_finite(opt_state), result, measured

    return attempt


def _several(objectives: Objectives, order: str, due: Collection[str] | None, rounding: str, **how: Any) -> TrainStep:
    """The step of several objectives, see `make_train_step`."""
    check_objectives(objectives)
    if order not in ORDERS:
        raise InputError(f"order={order!r}: expected {' or '.join(ORDERS)}{nearest(str(order), ORDERS)}")
    for name in () if due is None else due:
        check_name(name, objectives, "due")
    attempts = {name: _attempt(objective, **how) for name, objective in objectives.items()}

    def train_step(state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
        before = state
        metrics: Metrics = {}

        def run(name: str, state: TrainState) -> tuple[TrainState, Metrics, jax.Array]:
            _refuse_outside(state.opt_state[name])
            objective, key = objectives[name], jax.random.fold_in(state.key, state.step)
            params = before.params if order == "at_once" else state.params
            key = objective_key(key, name)
            finite, result, measured = attempts[name](params, state.model_state, state.opt_state[name], batch, key)
            state = state.commit_objective(
                name,
                finite,
                **result,
                attempts=(state.step + objective.every - 1) // objective.every,
                key=key,
                ema_decay=objective.ema_decay,
                rounding=rounding,
            )
            kept = jax.tree.map(lambda x: jnp.where(finite, x, jnp.zeros_like(x)), measured.metrics)
            return how["replicas"].place(state), kept, jnp.isnan(measured.loss)

        def leave(name: str, state: TrainState) -> tuple[TrainState, Metrics, jax.Array]:
            _, nothing, _ = jax.eval_shape(functools.partial(run, name), state)
            return state, jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), nothing), jnp.bool_(False)

        for name, objective in objectives.items():
            ways = functools.partial(run, name), functools.partial(leave, name)
            if due is not None:
                state, measured, is_nan = ways[0 if name in due else 1](state)
            elif objective.every == 1:
                state, measured, is_nan = ways[0](state)
            else:
                state, measured, is_nan = jax.lax.cond(before.step % objective.every == 0, *ways, state)
            metrics |= {f"{name}/{metric}": mean for metric, mean in measured.items()}
            metrics[f"{NAN_LOSS}/{name}"] = Mean(is_nan.astype(jnp.float32), jnp.float32(1))
        return dataclasses.replace(state, step=state.step + 1), metrics

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
