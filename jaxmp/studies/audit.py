"""`audit`: the dtypes of a step, of any function or of an experiment's train step."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable
from typing import Any

from jaxmp.experiment.experiment import Experiment
from jaxmp.instruments import audit as instrument
from jaxmp.instruments.audit import Audit
from jaxmp.instruments.target import Target
from jaxmp.modules.linen import ModulePolicy
from jaxmp.precision.policy import Policy
from jaxmp.precision.policy_tree import PolicyTree
from jaxmp.runs.trainer import Trainer
from jaxmp.studies.subject import OF_FUNCTION, require_call, require_none


def audit(
    subject: Callable[..., Any] | Experiment,
    *args: Any,
    policy: Policy | PolicyTree | str | None = None,
    modules: Iterable[ModulePolicy] | None = None,
    target: Target | str | None = None,
    **kwargs: Any,
) -> Audit:
    """Finds in which dtypes a function or an experiment's train step runs, and where that goes wrong; nothing runs.

    The rules; each is the `rule` of its findings (`half`: float16 or bfloat16):

    - half accumulation: a sum, cumulative sum, scatter-add, carry of a loop, or sum of a weight's gradients in half
    - half collective: a sum over devices in float16, or in bfloat16 unless the policy's `reduce` says so
    - half exponential: exp, softmax or log in half over 256 terms or more
    - half unscaling: a gradient in float16 multiplied or divided by one number, such as 1 / loss scale
    - half loss: a differentiated loss narrower than float32
    - float32 dot: a product in float32 where the policy computes in half
    - half position: positions, or other whole numbers, in half above those that it can count
    - half count: the number of elements of a mask in half, above those that it can count
    - half angle: the sine of an angle that is too large for the half that it was rounded to
    - half whole number: whole numbers made of what was rounded to half
    - half probability: log(p) or log(1 - p) of a sigmoid or softmax p that was rounded to half, and its kin
    - half random draw: random numbers drawn in half
    - vanished constant: a constant that is 0 in half and guards a divisor (eps) or is a factor, a bound or a decay that
      is 1, or a constant that vanishes beside another
    - weakly typed: an argument or result whose dtype is that of a Python number
    - compiles twice: a state that comes out with another dtype or weak type than it went in
    - not donated: a state that a jitted function replaces but does not donate
    - unguarded state: a float of the state that is replaced even if a gradient is not finite, when the rest is kept
    - host callback: an operation that waits for Python

    A weight that is made of others by a product, such as W + A B of LoRA, is not told from an activation: a sum of its
    gradients in half is not found.

    Args:
      subject: any function that JAX traces, of which a jitted one keeps its static and donated arguments; or an
        Experiment, whose train step is audited under its own policy.
      args: the function's arguments, arrays or `jax.ShapeDtypeStruct`s; none for an Experiment.
      policy: the policy to check a function against; see `Audit.under`. Modules are found by their Flax paths.
      modules: the rows of `jaxmp.explain(model, policy, batch)`, for policies with rules by class, and a function.
        Without them, float32 dots are not reported if a rule by class computes in float32.
      target: GPUs to compile for as well, such as "h100" or "h100x8", which need not be there; see
        `jaxmp.instruments.target.Target`. Each of them holds all arguments whole, except a `jax.ShapeDtypeStruct` with
        a sharding over `Target.mesh`. The program is in `Audit.program`, and its faults are among the findings.
      kwargs: further arguments of the function.

    Returns:
      The report: `.findings`, `.dot_flops_by_dtype`, `.assert_clean(policy)`. The body of a scan counts as often as it
      is long, the body of a while loop once. Of a conditional, the branch with most FLOPs counts (of one between
      platforms, that of the target or of the local devices). A function mapped over devices counts once for each.

    Raises:
      InputError: the subject is neither; the function does not take these arguments, or does not trace with them; or
        this JAX cannot compile for the target.
    """
    own = {"policy": policy, "modules": modules}
    if not isinstance(subject, Experiment):
        function = require_call("audit", "an Experiment", subject, args, kwargs, (*own, "target"))
        return instrument.audit(function, *args, policy=policy, modules=modules, target=target, **kwargs)
    require_none("audit", {"arguments": args or None, **own, **kwargs}, OF_FUNCTION)
    # pmap runs the same step, and wants its arrays stacked.
    parallel = dataclasses.replace(subject.parallel, mode="jit")
    target = Target.parse(target) if isinstance(target, str) else target
    trainer = Trainer(dataclasses.replace(subject, parallel=parallel), mesh=None if target is None else target.mesh())
    step, arguments = trainer.program()
    return instrument.audit(step, *arguments, policy=subject.policy, modules=trainer.explain(), target=target)
