"""Observation of the products of layers: their operands, where they are multiplied."""

from __future__ import annotations

import contextlib
import contextvars
import math
from collections.abc import Callable, Hashable, Iterator, Mapping
from typing import Any, ClassVar, NamedTuple

import flax.linen as nn
import jax
from jax import lax

from jaxmp.modules.interventions import Context, Order, Run, attributes, intervening
from jaxmp.modules.observe import Observation
from jaxmp.precision.product import Convolution, Matrices
from jaxmp.precision.recipe import Recipe


class ObservedProduct(NamedTuple):
    """A product of a layer, where it is made."""

    contraction: Any
    """the `Contraction`, by which the axes of the operands are known"""
    activations: jax.Array
    weights: jax.Array
    result: jax.Array
    recipe: Recipe | None = None
    """the recipe that rounds the operands"""
    scales: Mapping[str, jax.Array] = {}
    """what `Delayed` operands are multiplied by before they are rounded, float32 scalars by role"""

    def operand(self, role: str, gradient: Any) -> Any:
        """Returns the operand by role, given the gradient of the result."""
        return {"activations": self.activations, "weights": self.weights, "gradients": gradient}[role]


ProductObserver = Callable[[str, ObservedProduct], jax.Array]
"""`(path, product) -> result`: called for each product of the layer at `path`; what it returns takes the place of the
result"""

OBSERVED = (nn.Dense, nn.DenseGeneral, nn.Conv)
"""Layers whose product is observed, also within attention and recurrent cells; under a recipe, all whose product it
rounds. Not observed without a recipe are grouped convolutions, and layers that offer no place for another product
(Einsum, ConvTranspose, ConvLocal, Embed.attend)."""

_observers: contextvars.ContextVar[tuple[ProductObserver, ...]] = contextvars.ContextVar("observers", default=())


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

        token = _observers.set((*_observers.get(), self._observe))
        try:
            return run(intercept, variables, args, kwargs)
        finally:
            _observers.reset(token)

    def trace_key(self) -> Hashable:
        """See `Observation`."""
        return super().trace_key()

    def _hooks(self, module: Any) -> dict[str, Any]:
        """The attributes of a layer by which its product is observed; {} if a recipe's own product is."""
        path = "/".join(module.path)
        if not isinstance(module, nn.Conv):
            dot = _chosen(module, "dot_general", lax.dot_general)
            return {} if _is_observed(dot) else {"dot_general": self._dot(path, dot), "dot_general_cls": None}
        conv = _chosen(module, "conv_general_dilated", lax.conv_general_dilated)
        if module.feature_group_count != 1 or _is_observed(conv):
            return {}
        return {"conv_general_dilated": self._conv(path, conv), "conv_general_dilated_cls": None}

    def _dot(self, path: str, dot: Callable[..., jax.Array]) -> Callable[..., jax.Array]:
        def observed(x: jax.Array, w: jax.Array, numbers: Any, *args: Any, **how: Any) -> jax.Array:
            y = dot(x, w, numbers, *args, **how)
            return self._observe(path, product_of_matrices(x, w, y, numbers)).reshape(y.shape)

        return observed

    def _conv(self, path: str, conv: Callable[..., jax.Array]) -> Callable[..., jax.Array]:
        def observed(x: jax.Array, w: jax.Array, *args: Any, **how: Any) -> jax.Array:
            y = conv(x, w, *args, **how)
            return self._observe(path, product_of_convolution(x, w, y, *args, **how))

        return observed


def product_of_matrices(x: jax.Array, w: jax.Array, y: jax.Array, numbers: Any) -> ObservedProduct:
    """Returns a `lax.dot_general` as an observed product, its arrays as `Matrices` has them."""
    (x_sum, w_sum), (x_batch, w_batch) = numbers
    x_free = [i for i in range(x.ndim) if i not in (*x_sum, *x_batch)]
    w_free = [i for i in range(w.ndim) if i not in (*w_sum, *w_batch)]
    batch = tuple(x.shape[i] for i in x_batch)
    rows = math.prod(x.shape[i] for i in x_free)
    left = lax.transpose(x, [*x_batch, *x_free, *x_sum]).reshape(*batch, rows, -1)
    right = lax.transpose(w, [*w_batch, *w_sum, *w_free]).reshape(*batch, math.prod(w.shape[i] for i in w_sum), -1)
    return ObservedProduct(Matrices(len(batch)), left, right, y.reshape(*batch, rows, -1))


def product_of_convolution(
    x: jax.Array,
    w: jax.Array,
    y: jax.Array,
    strides: Any,
    padding: Any,
    lhs_dilation: Any = None,
    rhs_dilation: Any = None,
    dimension_numbers: Any = None,
    feature_group_count: int = 1,
    **_: Any,
) -> ObservedProduct:
    """Returns a `lax.conv_general_dilated` as an observed product."""
    contraction = Convolution(
        tuple(strides),
        padding if isinstance(padding, str) else tuple(map(tuple, padding)),
        None if lhs_dilation is None else tuple(lhs_dilation),
        None if rhs_dilation is None else tuple(rhs_dilation),
        lax.conv_dimension_numbers(x.shape, w.shape, dimension_numbers),
        feature_group_count,
    )
    return ObservedProduct(contraction, x, w, y)


def is_observing() -> bool:
    """Whether products are observed in this call of a model."""
    return bool(_observers.get())


def observe(path: str, product: ObservedProduct) -> jax.Array:
    """Returns the result of a product after all observers of the call of the model."""
    for observer in _observers.get():
        product = product._replace(result=observer(path, product))
    return product.result


@contextlib.contextmanager
def observed_products(observer: ProductObserver) -> Iterator[None]:
    """Context manager: the result of each product of a layer goes through `observer`, when it is traced.

    It reaches models that are called under a policy or another intervention, and the layers `OBSERVED`.
    """
    with intervening(ProductObservation(observer)):
        yield


def _is_observed(function: Any) -> bool:
    return getattr(function, "is_observed", False)


def _chosen(module: Any, name: str, default: Callable[..., jax.Array]) -> Callable[..., jax.Array]:
    """The product that a layer uses: its own `NAME_cls`, its own `NAME`, or JAX's."""
    made_by = getattr(module, f"{name}_cls", None)
    return made_by() if made_by is not None else getattr(module, name, None) or default
