"""Sums over the operands of layers' products, measured in a step whose results they leave as they are.

    gather = make_product_sums(loss_fn, lambda path, product: Sizes(...))
    sums = gather(params, model_state, jnp.float32(1), batch, key)["Dense_0"]

What is measured comes out as the gradient of an input without an effect, and so out of scan, remat, vmap and
microbatches, in which the sums of all turns are added.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, Protocol

import jax
import jax.numpy as jnp

from jaxmp.modules.products import ObservedProduct, observed_products
from jaxmp.training.batch import LossFn
from jaxmp.training.gradients import make_gradients
from jaxmp.training.objective import EVERYTHING, fill, trained_view


class Measure(Protocol):
    """A function of one product and of the gradient of its result. It is hashable, and equal ones measure the same."""

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the sums."""
        ...

    def __call__(self, product: ObservedProduct, gradient: jax.Array) -> jax.Array:
        """Returns the sums, float32; sums of several products of a layer are added."""
        ...


Measures = Callable[[str, ObservedProduct], Measure | None]
"""`(path, product) -> measure`: what is measured at a product of the layer at `path`; None: nothing"""


def make_product_sums(
    loss_fn: LossFn,
    measures: Measures,
    *,
    accumulate_steps: int = 1,
    trains: tuple[str, ...] = EVERYTHING,
) -> Callable[..., dict[str, jax.Array]]:
    """Makes a function that measures the products of layers in one step.

    Args:
      loss_fn: a loss function that runs Linen modules under `jaxmp.with_policy`.
      measures: what is measured at each product; called whenever the loss is traced, the first time to find the shapes.
      accumulate_steps: number of microbatches of a batch.
      trains: the parameters that are differentiated, see `jaxmp.Objective`.

    Returns:
      `(params, model_state, scale, batch, key) -> sums by the path of the layer`; works under jit. Gradients are those
      of the mean loss times `scale`. The sums are empty if nothing is measured.
    """

    def gather(params: Any, model_state: Any, scale: Any, batch: Any, key: Any) -> dict[str, jax.Array]:
        shapes: dict[str, tuple[int, ...]] = {}

        def note(path: str, product: ObservedProduct) -> jax.Array:
            measure = measures(path, product)
            if measure is not None:
                shapes[path] = measure.shape
            return product.result

        def noted(*args: Any) -> Any:  # a function of its own: of `loss_fn`, JAX may know the shapes
            return loss_fn(*args)

        with observed_products(note):
            jax.eval_shape(noted, params, model_state, batch, key)
        if not shapes:
            return {}
        sinks = {path: jnp.zeros(shape, jnp.float32) for path, shape in shapes.items()}

        def observed(both: Any, model_state: Any, batch: Any, key: Any) -> Any:
            own, sinks = both

            def tapped(path: str, product: ObservedProduct) -> jax.Array:
                measure = measures(path, product)
                if measure is None:
                    return product.result
                known = measure, product.contraction, product.recipe
                return _tap(known, product._replace(contraction=None, recipe=None), sinks[path])

            with observed_products(tapped):
                return loss_fn(fill(own, params), model_state, batch, key)

        gradients = make_gradients(observed, accumulate_steps=accumulate_steps)
        (_, found), _, _ = gradients((trained_view(params, trains), sinks), model_state, scale, batch, key)
        return found

    return gather


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _tap(plan: Any, product: ObservedProduct, sink: jax.Array) -> jax.Array:
    return product.result


def _tap_forward(plan: Any, product: ObservedProduct, sink: jax.Array) -> Any:
    return product.result, product


def _tap_backward(plan: Any, product: ObservedProduct, gradient: jax.Array) -> Any:
    measure, contraction, recipe = plan
    nothing = jax.tree.map(jnp.zeros_like, product)
    sums = measure(product._replace(contraction=contraction, recipe=recipe), gradient)
    return nothing._replace(result=gradient), sums


_tap.defvjp(_tap_forward, _tap_backward)
