"""`apply_policy`: a policy for any JAX function, applied to its operations."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax

from jaxmp.errors import InputError
from jaxmp.precision.autocast import TORCH, OperationLists, autocast
from jaxmp.precision.policy import Policy
from jaxmp.precision.policy_tree import PolicyTree
from jaxmp.trees import FLOAT32


def apply_policy(
    function: Callable[..., Any], policy: Policy | PolicyTree | str, lists: OperationLists = TORCH
) -> Callable[..., Any]:
    """`function` under `policy`: products in its compute dtype, sums and exponentials in float32 (see `autocast`).

    Its arguments, parameters included, are cast where they are used and nowhere else. Its float results are cast to
    the output dtype. A policy that computes in float32 or wider leaves every operation in the dtype that `function`
    gives it.

    Args:
      function: any JAX function.
      policy: one policy, or its text, without rules: a function has no modules.
      lists: which operations run in the compute dtype and which in float32.

    Raises:
      InputError: `policy` is not a Policy, or uses what only Flax layers support: rules, emulated formats,
        half-precision grad=.
    """
    policy, inner = by_operations(function, policy, lists)

    @functools.wraps(function)
    def under_policy(*args: Any, **kwargs: Any) -> Any:
        return policy.cast_to_output(inner(*args, **kwargs))

    return under_policy


def by_operations(
    function: Callable[..., Any], policy: Policy | PolicyTree | str, lists: OperationLists = TORCH
) -> tuple[Policy, Callable[..., Any]]:
    """The policy, and `function` under it without the cast of its results; see `apply_policy`."""
    if isinstance(policy, str):
        policy = PolicyTree.parse(policy)
    if isinstance(policy, PolicyTree):
        if policy.rules:
            raise InputError(f"precision {policy}: rules name modules of a Flax Linen model; a function has none")
        policy = policy.default
    if not isinstance(policy, Policy):
        raise InputError(f"policy {policy!r}: expected a jaxmp.Policy, or text such as 'mixed_float16'")
    if policy.operands is not None or policy.recipe is not None:
        raise InputError(f"precision {policy}: formats are emulated in the layers of a Flax Linen model only")
    if policy.grad != FLOAT32:
        raise InputError(f"precision {policy}: grad= is for Flax Linen models; here gradients add up in float32")
    half = policy.compute_dtype.itemsize == 2
    inner = autocast(function, lists, dtype=policy.compute_dtype) if half else function

    def run(*args: Any, **kwargs: Any) -> Any:
        with jax.default_matmul_precision(policy.matmul_precision):
            return inner(*args, **kwargs)

    return policy, run
