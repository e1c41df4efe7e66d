"""`audit`: the dtypes of a step, of any function or of an experiment's train step."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

from jaxmp.experiment.experiment import Experiment
from jaxmp.instruments import audit as instrument
from jaxmp.instruments.audit import Audit
from jaxmp.instruments.target import Target
from jaxmp.runs.trainer import Trainer


def audit(subject: Callable[..., Any] | Experiment, *args: Any, target: Target | None = None, **how: Any) -> Audit:
    """Which dtypes a function computes in, and what is wrong with that; nothing runs.

    Args:
      subject: a function, or an Experiment, whose train step is audited under its own policy.
      args: arguments of the function, arrays or `jax.ShapeDtypeStruct`s; none for an Experiment.
      target: GPUs to compile for as well.
      how: `policy` and `modules`, for a function; see `jaxmp.instruments.audit.audit`.

    Returns:
      The report: `.findings`, `.dot_flops_by_dtype`, `.assert_clean(policy)`.
    """
    if not isinstance(subject, Experiment):
        return instrument.audit(subject, *args, target=target, **how)
    # pmap runs the same step, and wants its arrays stacked.
    parallel = dataclasses.replace(subject.parallel, mode="jit")
    trainer = Trainer(dataclasses.replace(subject, parallel=parallel), mesh=None if target is None else target.mesh())
    step, arguments = trainer.program()
    return instrument.audit(step, *arguments, policy=subject.policy, modules=trainer.explain(), target=target)
