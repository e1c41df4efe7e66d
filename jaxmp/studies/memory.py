"""`memory`: what a step holds in memory, of any loss or of an experiment's train step."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from jaxmp.experiment.experiment import Experiment
from jaxmp.instruments import memory as instrument
from jaxmp.instruments.memory import Memory
from jaxmp.runs.trainer import Trainer
from jaxmp.training.gradients import scaled_mean_loss
from jaxmp.training.objective import Objective


def memory(subject: Callable[..., Any] | Experiment, *args: Any, **how: Any) -> Memory:
    """What a step that differentiates a loss holds in memory, predicted from shapes; nothing is compiled or run.

    Args:
      subject: a loss `loss(params, *args) -> scalar`, or an Experiment: of its step, what lies on each device.
      args: for a loss, `params` and its further arguments; none for an Experiment.
      how: `opt_state` and `state`, for a loss; see `jaxmp.instruments.memory.memory`.

    Of several objectives, which run one after the other, the gradients and activations are those of the one that holds
    most. Activations of an experiment are those of one microbatch. The float32 sum of several microbatches' gradients
    is not among the gradients: what the compiler makes of it is in its temporaries.
    """
    if not isinstance(subject, Experiment):
        return instrument.memory(subject, *args, **how)
    trainer = Trainer(subject)
    _, (state, *_) = trainer.program()
    devices, parts = trainer.devices, subject.loop.accumulate_steps
    if devices.mode == "pmap":  # stacked, one a device
        state = trainer.state_spec
    part = {
        name: jax.ShapeDtypeStruct((x.shape[0] // devices.count, *x.shape[1:]), x.dtype)
        for name, x in trainer.batch_spec.items()
    }
    fields = {field.name: getattr(state, field.name) for field in dataclasses.fields(state)}
    params, opt_state = fields.pop("params"), fields.pop("opt_state")

    def of(objective: Objective) -> Memory:
        mean_loss = scaled_mean_loss(objective.loss_fn)

        def loss(params: Any, batch: Any) -> Any:
            model_state = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), state.model_state)
            batch = batch if parts == 1 else {name: x[: x.shape[0] // parts] for name, x in batch.items()}
            return mean_loss(params, model_state, jnp.float32(1), batch, jax.random.key(0))[0]

        return instrument.memory(loss, params, part, opt_state=opt_state, state=fields, trains=objective.trains)

    return max(map(of, trainer.replayed.values()), key=Memory.nbytes)
