"""A policy applied to an unmodified Flax Linen module, casting at each use.

Parameters stay in their own dtype (float32 master weights) until the very operation that uses them. The cast therefore
sits inside the body of a scan, of a rematerialised block and of each use of a tied weight, and the gradients of all
uses meet in float32 (trap T1 of the numerics contract: cast once outside, a bfloat16 weight used 1000 times gets 256
for a gradient of 1000). Two gradients would still be summed in half inside one layer, so these layers get help: a bias
is broadcast in float32 and then cast (T2), an embedding is gathered in float32 and its rows are cast (T15).
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import flax.linen as nn
import flax.traverse_util
import jax
import jax.numpy as jnp

from jaxmp.precision.policy import FLOAT32, Policy, cast_floats

AFFINE = (nn.Dense, nn.DenseGeneral, nn.Conv, nn.ConvTranspose, nn.ConvLocal)
"""Layers that compute `f(x, kernel) + bias`."""

# A module under nn.jit is traced once for all calls that jax.jit takes to be equal. As a part of jit's cache key, the
# policy makes calls under different policies different.
_policy_in_force = jax.make_user_context(None)


def with_policy(apply: Callable[..., Any], policy: Policy, *, axis_name: str | None = None) -> Callable[..., Any]:
    """`module.apply` under `policy`: same arguments, same results, other dtypes.

    Float inputs are cast to the compute dtype and float outputs to the output dtype; normalisation layers compute
    statistics and affine in float32 and hand on the compute dtype; a `dtype` given in the model's code gives way.
    Mutable collections (batch statistics) keep their dtypes. The result goes into jit, grad, scan, vmap and remat like
    `apply`.

    Args:
      apply: a bound `apply` of a Linen module, `model.apply`.
      policy: the policy; its `matmul` is in force for every dot and convolution without a precision of its own.
      axis_name: mapped axis over which BatchNorm layers that name none take their statistics.

    >>> model = nn.Dense(3)
    >>> variables = model.init(jax.random.key(0), jnp.ones((1, 2)))
    >>> half = Policy(jnp.float32, jnp.float16, jnp.float16)
    >>> with_policy(model.apply, half)(variables, jnp.ones((1, 2))).dtype
    dtype('float16')
    """

    def applied(variables: Any, *args: Any, mutable: Any = False, **kwargs: Any) -> Any:
        args, kwargs = policy.cast_to_compute((args, kwargs))
        with (
            _policy_in_force(str(policy)),
            _matmul_precision(policy),
            nn.intercept_methods(_interceptor(policy, axis_name)),
        ):
            out = apply(variables, *args, mutable=mutable, **kwargs)
        if mutable is False:
            return policy.cast_to_output(out)
        return policy.cast_to_output(out[0]), out[1]

    return applied


class Row(NamedTuple):
    """One module of a model, and the policy that it runs under."""

    module: str
    """path of the module, "" for the model itself"""
    type: str
    """name of its class"""
    parameters: int
    """numbers in the parameters that it declares itself"""
    policy: str
    """the policy in force"""


def explain(model: nn.Module, policy: Policy, *inputs: Any, **kwargs: Any) -> list[Row]:
    """The modules of a model in the order in which they are first called, found by an abstract `init`: nothing runs.

    Args:
      model: the module.
      policy: the policy to apply.
      inputs: its inputs, arrays or `jax.ShapeDtypeStruct`s.
      kwargs: further arguments of its `__call__`, such as `train=False`.
    """
    found: dict[str, str] = {}

    def note(next_fun: Callable[..., Any], args: Any, kwargs: Any, context: nn.module.InterceptorContext) -> Any:
        if context.method_name not in ("<lambda>", "setup"):
            found.setdefault("/".join(context.module.path), type(context.module).__name__)
        return next_fun(*args, **kwargs)

    with nn.intercept_methods(note):
        params = jax.eval_shape(functools.partial(model.init, **kwargs), jax.random.key(0), *inputs).get("params", {})
    sizes = {path: 0 for path in found}
    for path, leaf in flax.traverse_util.flatten_dict(params, sep="/").items():
        owner = path.rpartition("/")[0]
        sizes[owner] = sizes.get(owner, 0) + leaf.size
    return [Row(path, name, sizes[path], str(policy)) for path, name in found.items()]


def _matmul_precision(policy: Policy) -> Any:
    precision = policy.matmul_precision
    return contextlib.nullcontext() if precision is None else jax.default_matmul_precision(precision)


def _interceptor(policy: Policy, axis_name: str | None) -> Callable[..., Any]:
    """The policy as a Linen method interceptor: it runs wherever Flax runs the method, lifted transforms included."""
    dtype = policy.compute_dtype
    wide = jnp.promote_types(FLOAT32, policy.param_dtype)
    sum_in_half = policy.grad != FLOAT32

    def intercept(next_fun: Callable[..., Any], args: Any, kwargs: Any, context: nn.module.InterceptorContext) -> Any:
        module, method = context.module, context.method_name
        if method == "<lambda>":  # Flax's own, around a transformed class: no module of the user's
            return next_fun(*args, **kwargs)
        if not hasattr(module, "dtype"):
            # A module that declares parameters and knows of no dtype: hand them out in the compute dtype.
            def param(*args: Any, **kwargs: Any) -> Any:
                return cast_floats(type(module).param(module, *args, **kwargs), dtype)

            with _attributes(module, param=param):
                return next_fun(*args, **kwargs)
        if method == "setup":
            return next_fun(*args, **kwargs)

        values: dict[str, Any] = {"dtype": dtype}
        if hasattr(module, "force_fp32_for_softmax") and not sum_in_half:
            values["force_fp32_for_softmax"] = True
        if isinstance(module, nn.BatchNorm) and module.axis_name is None:
            values["axis_name"] = axis_name
        if not sum_in_half and isinstance(module, nn.Embed) and method == "__call__":
            with _attributes(module, dtype=wide):
                return cast_floats(next_fun(*args, **kwargs), dtype)
        if not sum_in_half and isinstance(module, AFFINE) and method == "__call__":
            bias = module.get_variable("params", "bias") if module.use_bias else None
            if bias is not None and not getattr(module, "batch_dims", ()):
                with _attributes(module, **values, use_bias=False):
                    y = next_fun(*args, **kwargs)
                return y + jnp.broadcast_to(bias.astype(wide), y.shape).astype(y.dtype)
        with _attributes(module, **values):
            y = next_fun(*args, **kwargs)
        if isinstance(module, nn.RNNCellBase) and method == "__call__":
            # The carry of a scan keeps its dtype: that of the initial carry, float32 in Flax's RNN.
            return jax.tree.map(lambda new, old: new.astype(old.dtype), y[0], args[0]), y[1]
        return y

    return intercept


@contextlib.contextmanager
def _attributes(module: nn.Module, **values: Any) -> Iterator[None]:
    """Sets attributes of one bound module for the length of a call."""
    old = {name: module.__dict__[name] for name in values if name in module.__dict__}
    for name, value in values.items():
        object.__setattr__(module, name, value)
    try:
        yield
    finally:
        for name in values:
            if name in old:
                object.__setattr__(module, name, old[name])
            else:
                object.__delattr__(module, name)
