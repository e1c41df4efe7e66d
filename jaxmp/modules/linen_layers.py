"""What each Flax Linen layer needs under a policy, beside a `dtype` that is set for the length of its call.

A bias is broadcast in float32 and then cast (trap T2), an embedding is gathered in float32 and
its rows are cast (T15), attention takes its softmax in float32 (T4), a recurrent cell keeps the dtype of its carry.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from jaxmp.modules.interventions import attributes
from jaxmp.modules.recipe_layers import STREAM, RecipeCall, has_product, run_product
from jaxmp.precision.formats import fake_quantize, quantize
from jaxmp.precision.policy import Policy
from jaxmp.trees import FLOAT32, cast_floats

AFFINE = (nn.Dense, nn.DenseGeneral, nn.Conv, nn.ConvTranspose, nn.ConvLocal, nn.Einsum)
"""Layers that compute `f(x, kernel) + bias`."""


def run_method(
    policy: Policy,
    axis_name: str | None,
    next_fun: Callable[..., Any],
    args: Any,
    kwargs: Any,
    module: nn.Module,
    method: str,
    products: RecipeCall,
) -> Any:
    """One method of one module under its policy; `products` are those of this call of the model under a recipe."""
    dtype = policy.compute_dtype
    wide = jnp.promote_types(FLOAT32, policy.param_dtype)
    sum_in_half = policy.grad != FLOAT32

    def param(*args: Any, **kwargs: Any) -> Any:
        return cast_floats(type(module).param(module, *args, **kwargs), dtype)

    def call(**values: Any) -> Any:
        with attributes(module, **values):
            return next_fun(*args, **kwargs)

    has_dtype = knows_dtype(module)
    if is_complex(module, (args, kwargs)):
        return next_fun(*args, **kwargs)
    if method == "setup":
        # An embedding's own methods get the masters below; what others read of it (`embed.embedding.T`) is cast.
        return call(param=param) if not has_dtype or isinstance(module, nn.Embed) else call()
    if policy.recipe is not None and has_product(module, method, args):
        return run_product(policy, products, next_fun, args, kwargs, module)
    # A module that declares parameters and knows of no dtype: hand them out in the compute dtype.
    values: dict[str, Any] = {"dtype": dtype} if has_dtype else {"param": param}
    if isinstance(module, nn.MultiHeadDotProductAttention) and not sum_in_half:
        values |= _softmax_in_float32(module, dtype)
    if type(module) is nn.OptimizedLSTMCell and method == "__call__" and not sum_in_half:
        values |= _gates_with_biases(module, wide)
    if isinstance(module, nn.RNN) and module.scope is not None and STREAM in module.scope.rngs:
        values["split_rngs"] = {**module.split_rngs, STREAM: True}
    if isinstance(module, nn.BatchNorm) and module.axis_name is None:
        values["axis_name"] = axis_name
    if isinstance(module, nn.Embed) and not sum_in_half:
        values["embedding"] = _stored(module, "embedding").astype(wide)
        if method == "__call__":
            values["dtype"] = wide
        return cast_floats(call(**values), dtype)
    if isinstance(module, AFFINE) and method == "__call__" and policy.operands is not None:
        return _emulated(policy, module, call, values)
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
    if isinstance(getattr(module.parent, "gate_fn", None), _Gate) and method == "__call__":
        return y[0], None if y[1] is None else jnp.zeros_like(y[1])  # the gates add it
    if isinstance(module, nn.RNNCellBase) and method == "__call__":
        # The carry of a scan keeps its dtype: that of the initial carry, float32 in Flax's RNN.
        return jax.tree.map(lambda new, old: new.astype(old.dtype), y[0], args[0]), cast_floats(y[1], dtype)
    return y


def is_complex(module: nn.Module, args: Any = ()) -> bool:
    """Whether a layer computes in complex numbers: by its dtype, or, where it has none, its parameters or inputs.

    A real dtype set on such a layer would drop the imaginary part of all that it meets (trap T24).
    """
    if not knows_dtype(module):
        return False
    dtypes = [dtype for name in ("dtype", "param_dtype") if (dtype := getattr(module, name, None)) is not None]
    # A real dtype in the model's code would drop it by itself; a complex one decides, and so does no dtype at all.
    return any(jnp.issubdtype(dtype, jnp.complexfloating) for dtype in dtypes) or any(
        jnp.issubdtype(x.dtype, jnp.complexfloating) for x in jax.tree.leaves(args) if hasattr(x, "dtype")
    )


def knows_dtype(module: nn.Module) -> bool:
    """Whether a module computes in its attribute `dtype`, which may be set."""
    return hasattr(module, "dtype") and not isinstance(getattr(type(module), "dtype", None), property)


def _emulated(policy: Policy, module: Any, call: Callable[..., Any], values: dict[str, Any]) -> Any:
    """A layer whose product has its operands, and the gradients of its result, in emulated formats."""

    def promote(x: Any, kernel: Any, bias: Any, **_: Any) -> Any:
        x, kernel = (quantize(v.astype(policy.compute_dtype), operands, saturate=True) for v in (x, kernel))
        return x, kernel, None if bias is None else bias.astype(policy.compute_dtype)

    operands: Any = policy.operands
    bias: Any = _stored(module, "bias") if module.use_bias else None
    apart = bias is not None and not (isinstance(module, nn.Einsum) or getattr(module, "batch_dims", None))
    y = call(**values, promote_dtype=promote, **({"use_bias": False} if apart else {}))
    y = fake_quantize(y, None, policy.cotangents, saturate=False)
    return y + jnp.broadcast_to(bias, y.shape) if apart else y


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


@dataclasses.dataclass
class _Gate:
    """The activation of a recurrent cell's gates; its first calls add a bias each, broadcast in a wide dtype (T2)."""

    function: Callable[..., Any]
    biases: list[Any]
    wide: Any

    def __call__(self, x: Any) -> Any:
        if self.biases:
            x += jnp.broadcast_to(self.biases.pop(0).astype(self.wide), x.shape).astype(x.dtype)
        return self.function(x)


def _gates_with_biases(module: nn.OptimizedLSTMCell, wide: Any) -> dict[str, Any]:
    """Attributes by which a cell that joins its biases adds them in its gates: i, f, o, and g before the new carry."""
    stored = {gate: _stored(module, f"h{gate}") for gate in "ifgo"}
    if any(params is None for params in stored.values()):
        return {}  # there are none yet
    biases = {gate: params["bias"] for gate, params in stored.items()}
    return {
        "gate_fn": _Gate(module.gate_fn, [biases[gate] for gate in "ifo"], wide),
        "activation_fn": _Gate(module.activation_fn, [biases["g"]], wide),
    }


def _stored(module: nn.Module, name: str) -> Any:
    """A parameter as it is kept, without the box of `nn.with_partitioning`; None if there is none yet."""
    return nn.unbox(module.get_variable("params", name))
