"""A policy applied to a function that is no Linen module, by its operations."""

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

    Its arguments, parameters among them, are cast where they are used and nowhere else; its float results come out in
    the output dtype.

    Args:
      function: any JAX function.
      policy: one policy, or its text; without rules, for there are no modules that they could name.
      lists: which operations run in the compute dtype and which in float32.

    A policy that computes in float32 or wider leaves every operation in the dtype that `function` gives it.

    Raises: InputError for what is no policy, and for what only layers can do: rules, emulated formats, and gradients
    that add up in half.
    """
    policy, inner = by_operations(function, policy, lists)

    @functools.wraps(function)
    def under_policy(*args: Any, **kwargs: Any) -> Any:
        return policy.cast_to_output(inner(*args, **kwargs))

    return under_policy


def by_operations(
    function: Callable[..., Any], policy: Policy | PolicyTree | str, lists: OperationLists = TORCH
) -> tuple[Policy, Callable[..., Any]]:
    """The one policy, and `function` under it but for the cast of its results; see `apply_policy`."""
    if isinstance(policy, str):
        policy = PolicyTree.parse(policy)
    if isinstance(policy, PolicyTree):
        if policy.rules:
            raise InputError(f"precision {policy}: rules name modules of a Flax Linen model; a function has none")
        policy = policy.default
    if not isinstance(policy, Policy):
        raise InputError(f"policy {policy!r}: expected a jaxmp.Policy, or text such as 'mixed_float16'")
    if policy.operands is not None:
        raise InputError(f"precision {policy}: formats are emulated in the layers of a Flax Linen model only")
    if policy.grad != FLOAT32:
        raise InputError(f"precision {policy}: grad= is for Flax Linen models; here gradients add up in float32")
    half = policy.compute_dtype.itemsize == 2
    inner = autocast(function, lists, dtype=policy.compute_dtype) if half else function

    def run(*args: Any, **kwargs: Any) -> Any:
        with jax.default_matmul_precision(policy.matmul_precision):
            return inner(*args, **kwargs)

    return policy, run
