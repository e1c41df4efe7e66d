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

AFFINE = (nn.Dense, nn.DenseGeneral, nn.Conv, nn.ConvTranspose, nn.ConvLocal, nn.Einsum)
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

    def applied(variables: Any, *args: Any, **kwargs: Any) -> Any:
        args, kwargs = policy.cast_to_compute((args, kwargs))
        with (
            _policy_in_force(str(policy)),
            _matmul_precision(policy),
            nn.intercept_methods(_interceptor(policy, axis_name)),
        ):
            out = apply(variables, *args, **kwargs)
        if kwargs.get("mutable", False) is False:
            return policy.cast_to_output(out)
        return policy.cast_to_output(out[0]), _in_dtypes_of(variables, out[1])

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
        variables = jax.eval_shape(functools.partial(model.init, **kwargs), jax.random.key(0), *inputs)
    sizes = {path: 0 for path in found}
    for path, leaf in flax.traverse_util.flatten_dict(nn.unbox(variables).get("params", {}), sep="/").items():
        while path and path not in found:  # up to the module that declares it: a parameter's name may contain slashes
            path = path.rpartition("/")[0]
        sizes[path] = sizes.get(path, 0) + leaf.size
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

        def param(*args: Any, **kwargs: Any) -> Any:
            return cast_floats(type(module).param(module, *args, **kwargs), dtype)

        def call(**values: Any) -> Any:
            with _attributes(module, **values):
                return next_fun(*args, **kwargs)

        knows_dtype = hasattr(module, "dtype") and not isinstance(getattr(type(module), "dtype", None), property)
        if method == "setup":
            # An embedding's own methods get the masters below; what others read of it (`embed.embedding.T`) is cast.
            return call(param=param) if not knows_dtype or isinstance(module, nn.Embed) else call()
        # A module that declares parameters and knows of no dtype: hand them out in the compute dtype.
        values: dict[str, Any] = {"dtype": dtype} if knows_dtype else {"param": param}
        if isinstance(module, nn.MultiHeadDotProductAttention) and not sum_in_half:
            values |= _softmax_in_float32(module, dtype)
        if isinstance(module, nn.BatchNorm) and module.axis_name is None:
            values["axis_name"] = axis_name
        if isinstance(module, nn.Embed) and not sum_in_half:
            values["embedding"] = _stored(module, "embedding").astype(wide)
            if method == "__call__":
                values["dtype"] = wide
            return cast_floats(call(**values), dtype)
        if isinstance(module, AFFINE) and method == "__call__" and module.use_bias and not sum_in_half:
            bias = _stored(module, "bias")
            if isinstance(module, nn.Einsum) or getattr(module, "batch_dims", None):
                # The bias goes through a reshape of the layer's own: have it added in float32.
                def promote(x: Any, kernel: Any, bias: Any, **_: Any) -> Any:
                    return x.astype(dtype), kernel.astype(dtype), bias.astype(wide)

                return cast_floats(call(**values, promote_dtype=promote), dtype)
            if bias is not None:
                y = call(**values, use_bias=False)
                return y + jnp.broadcast_to(bias.astype(wide), y.shape).astype(y.dtype)
        y = call(**values)
        if isinstance(module, nn.RNNCellBase) and method == "__call__":
            # The carry of a scan keeps its dtype: that of the initial carry, float32 in Flax's RNN.
            return jax.tree.map(lambda new, old: new.astype(old.dtype), y[0], args[0]), cast_floats(y[1], dtype)
        return y

    return intercept


def _softmax_in_float32(module: nn.MultiHeadDotProductAttention, dtype: Any) -> dict[str, Any]:
    """Attributes by which attention takes its softmax in float32 (T4) and both its products in the compute dtype."""
    if module.attention_fn is not nn.dot_product_attention or module.attn_weights_value_einsum_cls is not None:
        return {"force_fp32_for_softmax": True}

    @functools.wraps(nn.dot_product_attention)  # Flax reads the signature
    def attention(*args: Any, precision: Any, **kwargs: Any) -> jax.Array:
        einsum = functools.partial(jnp.einsum, precision=precision)
        kwargs["qk_attn_weights_einsum"] = einsum
        # Flax leaves the weights in float32, which would make the second product a float32 one.
        kwargs["attn_weights_value_einsum"] = lambda spec, weights, value: einsum(spec, weights.astype(dtype), value)
        return nn.dot_product_attention(*args, **kwargs)

    return {"force_fp32_for_softmax": True, "attention_fn": attention}


def _stored(module: nn.Module, name: str) -> Any:
    """A parameter as it is kept, without the box of `nn.with_partitioning`; None where there is none yet."""
    return nn.unbox(module.get_variable("params", name))


def _in_dtypes_of(old: Any, new: Any) -> Any:
    """`new` with its floats in the dtypes that they have in `old`, where they are there."""
    dtypes = {path: jnp.result_type(leaf) for path, leaf in jax.tree_util.tree_leaves_with_path(old)}
    return jax.tree_util.tree_map_with_path(lambda path, x: cast_floats(x, dtypes.get(path, x.dtype)), new)


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
