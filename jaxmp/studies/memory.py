"""`memory`: what a step holds in memory, of any loss or of an experiment's train step."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from jaxmp.errors import InputError
from jaxmp.experiment.experiment import Experiment
from jaxmp.instruments import memory as instrument
from jaxmp.instruments.memory import Memory
from jaxmp.runs.trainer import Trainer
from jaxmp.studies.subject import OF_FUNCTION, require_call, require_none
from jaxmp.training.gradients import scaled_mean_loss
from jaxmp.training.objective import EVERYTHING, Objective


def memory(
    subject: Callable[..., Any] | Experiment,
    *args: Any,
    opt_state: Any = None,
    state: Any = None,
    trains: tuple[str, ...] | None = None,
) -> Memory:
    """What a step that differentiates a loss holds in memory, predicted from shapes; nothing is compiled or run.

    Args:
      subject: a loss `loss(params, *args) -> scalar`, or an Experiment: of its step, what lies on each device.
      args: for a loss, `params` and its further arguments, arrays or `jax.ShapeDtypeStruct`s; none for an Experiment.
      opt_state: the optimizer's state beside a loss. Float arrays count as moments, all else as other state.
      state: what else persists between steps beside a loss, such as batch statistics or an average of the weights.
      trains: the parameters that a loss is differentiated by, see `jaxmp.Objective`; by default all.

    Returns:
      The items, in the order in which a step uses them, in bytes and shown in MiB; `.nbytes(*names)`. An array with a
      sharding counts with one device's share.

    Raises:
      InputError: the subject is neither; or the loss does not take these arguments, or cannot be differentiated.

    Of several objectives, which run one after the other, the gradients and activations are those of the one that holds
    most. Activations of an experiment are those of one microbatch. The float32 sum of several microbatches' gradients
    is not among the gradients: what the compiler makes of it is in its temporaries.
    """
    if not isinstance(subject, Experiment):
        loss = require_call("memory", "an Experiment", subject, args, {})
        if not args:
            raise InputError("memory: expected the parameters after the loss, memory(loss, params, *args)")
        trained = EVERYTHING if trains is None else trains
        return instrument.memory(loss, *args, opt_state=opt_state, state=state, trains=trained)
    require_none(
        "memory", {"arguments": args or None, "opt_state": opt_state, "state": state, "trains": trains}, OF_FUNCTION
    )
    trainer = Trainer(subject)
    _, (train_state, *_) = trainer.program()
    devices, parts = trainer.devices, subject.loop.accumulate_steps
    if devices.mode == "pmap":  # stacked, one a device
        train_state = trainer.state_spec
    part = {
        name: jax.ShapeDtypeStruct((x.shape[0] // devices.count, *x.shape[1:]), x.dtype)
        for name, x in trainer.batch_spec.items()
    }
    fields = {field.name: getattr(train_state, field.name) for field in dataclasses.fields(train_state)}
    params, moments = fields.pop("params"), fields.pop("opt_state")

    def of(objective: Objective) -> Memory:
        mean_loss = scaled_mean_loss(objective.loss_fn)

        def loss(params: Any, batch: Any) -> Any:
            model_state = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), train_state.model_state)
            batch = batch if parts == 1 else {name: x[: x.shape[0] // parts] for name, x in batch.items()}
            return mean_loss(params, model_state, jnp.float32(1), batch, jax.random.key(0))[0]

        return instrument.memory(loss, params, part, opt_state=moments, state=fields, trains=objective.trains)

    return max(map(of, trainer.replayed.values()), key=Memory.nbytes)
