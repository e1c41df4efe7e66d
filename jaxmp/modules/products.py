"""Observation of the products of layers: their operands, where they are multiplied."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Hashable, Iterator
from typing import Any, ClassVar

import flax.linen as nn
import jax
from jax import lax

from jaxmp.modules.interventions import Context, Order, Run, attributes, intervening
from jaxmp.modules.observe import Observation
from jaxmp.precision.product import Contraction, Convolution, Matrices

ProductObserver = Callable[[str, Contraction, jax.Array, jax.Array, jax.Array], jax.Array]
"""`(path, contraction, activations, weights, result) -> result`: called for each product of the layer at `path`; what
it returns takes the place of the result. The axes of the operands are those of `contraction`."""

OBSERVED = (nn.Dense, nn.DenseGeneral, nn.Conv)
"""Layers whose product is observed, also within attention and recurrent cells. Not observed are depthwise and grouped
convolutions, and layers that offer no place for another product (Einsum, ConvTranspose, ConvLocal, Embed.attend)."""


class ProductObservation(Observation):
    """An observer of the products of layers, for the length of one trace.

    It stands inside the policy, and so sees operands in the dtype in which they are multiplied.
    """

    order: ClassVar[Order] = Order.RANDOM_DRAWS

    def __init__(self, observer: ProductObserver):
        self._observe = observer

    def call(self, run: Run, model: Any, variables: Any, args: Any, kwargs: Any) -> Any:
        """One call of the model, its products observed."""

        def intercept(next_fun: Callable[..., Any], args: Any, kwargs: Any, context: Context) -> Any:
            module: Any = context.module
            if context.method_name != "__call__" or not isinstance(module, OBSERVED):
                return next_fun(*args, **kwargs)
            with attributes(module, **self._hooks(module)):
                return next_fun(*args, **kwargs)

        return run(intercept, variables, args, kwargs)

    def trace_key(self) -> Hashable:
        """See `Observation`."""
        return super().trace_key()

    def _hooks(self, module: Any) -> dict[str, Any]:
        """The attributes of a layer by which its product is observed."""
        path = "/".join(module.path)
        if not isinstance(module, nn.Conv):
            dot = _chosen(module, "dot_general", lax.dot_general)
            return {"dot_general": self._dot(path, dot), "dot_general_cls": None}
        if module.feature_group_count != 1:
            return {}
        conv = _chosen(module, "conv_general_dilated", lax.conv_general_dilated)
        return {"conv_general_dilated": self._conv(path, conv), "conv_general_dilated_cls": None}

    def _dot(self, path: str, dot: Callable[..., jax.Array]) -> Callable[..., jax.Array]:
        def observed(x: jax.Array, w: jax.Array, numbers: Any, *args: Any, **how: Any) -> jax.Array:
            y = dot(x, w, numbers, *args, **how)
            (x_sum, w_sum), (x_batch, w_batch) = numbers
            x_free = [i for i in range(x.ndim) if i not in (*x_sum, *x_batch)]
            w_free = [i for i in range(w.ndim) if i not in (*w_sum, *w_batch)]
            batch = tuple(x.shape[i] for i in x_batch)
            rows = _size(x, x_free)
            left = lax.transpose(x, [*x_batch, *x_free, *x_sum]).reshape(*batch, rows, -1)
            right = lax.transpose(w, [*w_batch, *w_sum, *w_free]).reshape(*batch, _size(w, w_sum), -1)
            result = y.reshape(*batch, rows, -1)
            return self._observe(path, Matrices(len(batch)), left, right, result).reshape(y.shape)

        return observed

    def _conv(self, path: str, conv: Callable[..., jax.Array]) -> Callable[..., jax.Array]:
        def observed(
            x: jax.Array,
            w: jax.Array,
            strides: Any,
            padding: Any,
            lhs_dilation: Any = None,
            rhs_dilation: Any = None,
            dimension_numbers: Any = None,
            **how: Any,
        ) -> jax.Array:
            y = conv(x, w, strides, padding, lhs_dilation, rhs_dilation, dimension_numbers, **how)
            contraction = Convolution(
                tuple(strides),
                padding if isinstance(padding, str) else tuple(map(tuple, padding)),
                None if lhs_dilation is None else tuple(lhs_dilation),
                None if rhs_dilation is None else tuple(rhs_dilation),
                lax.conv_dimension_numbers(x.shape, w.shape, dimension_numbers),
            )
            return self._observe(path, contraction, x, w, y)

        return observed


@contextlib.contextmanager
def observed_products(observer: ProductObserver) -> Iterator[None]:
    """Context manager: the result of each product of a layer goes through `observer`, when it is traced.

    It reaches models that are called under a policy or another intervention, and the layers `OBSERVED`.
    """
    with intervening(ProductObservation(observer)):
        yield


def _chosen(module: Any, name: str, default: Callable[..., jax.Array]) -> Callable[..., jax.Array]:
    """The product that a layer uses: its own `NAME_cls`, its own `NAME`, or JAX's."""
    made_by = getattr(module, f"{name}_cls", None)
    return made_by() if made_by is not None else getattr(module, name, None) or default


def _size(x: jax.Array, axes: Any) -> int:
    size = 1
    for axis in axes:
        size *= x.shape[axis]
    return size
