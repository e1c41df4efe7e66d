"""Layers under a recipe: how the products of unmodified Flax layers become those of `jaxmp.precision.product`.

Rounded are the products of Dense, DenseGeneral, Einsum, Conv, ConvTranspose and ConvLocal with their kernels, also
within attention and recurrent cells, and that of `Embed.attend`. Not rounded are depthwise convolutions, whose products
sum over no channels, products of activations with each other (attention's two), and what a module multiplies without
one of these layers.
"""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from jaxmp.errors import InputError
from jaxmp.jaxprs import bind, called, interpret, opened
from jaxmp.modules.interventions import attributes
from jaxmp.modules.products import (
    ObservedProduct,
    is_observing,
    observe,
    product_of_convolution,
    product_of_matrices,
)
from jaxmp.precision.formats import DelayedScalingState
from jaxmp.precision.policy import Policy
from jaxmp.precision.product import Delay, Draws, conv_general_dilated, dot_general, largest_magnitude
from jaxmp.precision.recipe import GRADIENT_AMAX, HISTORIES, ROLES, Delayed, Recipe
from jaxmp.trees import FLOAT32, cast_floats

PRODUCT_LAYERS = (nn.Dense, nn.DenseGeneral, nn.Einsum, nn.Conv, nn.ConvTranspose, nn.ConvLocal)
"""layers whose product with their kernel is rounded"""

STREAM = "recipe"
"""name of the random stream of stochastic rounding, in which `nn.RNN` has a key of its own for each time step"""

_WITH_HOOK: tuple[Any, ...] = (nn.Dense, nn.DenseGeneral, nn.Conv)


@dataclasses.dataclass(frozen=True)
class Spread:
    """How the examples of a call are spread over replicas and microbatches."""

    index: jax.Array | None = None
    """indices of the rows in the whole batch, int32 (rows,); None: the batch is the whole"""
    rows: int | None = None
    """number of rows; None: it is not known"""
    axis_name: str | None = None
    """mapped axis of the replicas; None: there is one"""


class RecipeCall:
    """The products of one call of a model that recipes round.

    Args:
      spread: how the examples are spread.
      starting: whether the state of delayed scaling is made where there is none.
    """

    def __init__(self, spread: Spread, *, starting: bool = False):
        self.spread, self.starting = spread, starting
        self.calls: collections.Counter[str] = collections.Counter()
        """number of products that each module has made, by its path"""

    def surroundings(self, module: nn.Module, recipe: Recipe, x: jax.Array, w: jax.Array) -> dict[str, Any]:
        """The keyword arguments of a product beside its operands: random draws, scales, and the axis of replicas."""
        path, spread = "/".join(module.path), self.spread
        number = self.calls[path]
        self.calls[path] += 1
        draws = Draws()
        if recipe.is_stochastic and (key := _key(module, recipe, x)) is not None:
            draws = Draws(jax.random.fold_in(key, number), spread.index, spread.rows)
        delay = self._delay(module, path, number, recipe, x, w) if recipe.is_delayed else None
        return {"recipe": recipe, "draws": draws, "delay": delay, "axis_name": spread.axis_name}

    def _delay(self, module: Any, path: str, number: int, recipe: Recipe, x: jax.Array, w: jax.Array) -> Delay:
        """The scales of one product, from the model state, which learns of the magnitudes of this step."""
        tap = module.get_variable(GRADIENT_AMAX, f"product_{number}")
        if tap is None:
            self._start(module, path, number, recipe)
            tap = module.get_variable(GRADIENT_AMAX, f"product_{number}")
        axis_name, scales = self.spread.axis_name, {}
        for role, delayed in delayed_formats(recipe).items():
            scaling, name = delayed.scaling, f"{role}_{number}"
            kept = module.get_variable(HISTORIES, name)
            state = DelayedScalingState(kept["scale"], kept["amax_history"])
            learns = module.is_mutable_collection(HISTORIES) and not self.starting
            if role == "gradients":
                # That of the last step: this step's is known in the backward pass, which uses this scale.
                new = state = scaling.update(state, jax.lax.stop_gradient(tap)) if learns else state
            else:
                operand, over = (x, axis_name) if role == "activations" else (w, None)
                amax = jax.lax.stop_gradient(largest_magnitude(operand, over)) if learns else None
                new = scaling.update(state, amax) if amax is not None else state
            scales[role] = scaling.scale(state)
            if learns:
                module.put_variable(HISTORIES, name, new._asdict())
        return Delay(scales, tap)

    def _start(self, module: Any, path: str, number: int, recipe: Recipe) -> None:
        if not self.starting or not module.is_mutable_collection(HISTORIES):
            raise InputError(
                f"recipe {recipe}: {path or 'the model'} has no state of delayed scaling. Expected a model state with "
                "that of jaxmp.modules.linen.init_delayed_scaling; a layer inside nn.scan or nn.vmap has none, and "
                f"needs a rule of its own, such as {path or '*'}=fp8_current"
            )
        module.put_variable(GRADIENT_AMAX, f"product_{number}", jnp.float32(0))
        for role, delayed in delayed_formats(recipe).items():
            module.put_variable(HISTORIES, f"{role}_{number}", delayed.scaling.init()._asdict())


def delayed_formats(recipe: Recipe) -> Mapping[str, Delayed]:
    """Returns the delayed format of each role that has one, in the order of `ROLES`."""
    found = {each.role: each.format for each in recipe.operands() if isinstance(each.format, Delayed)}
    return {role: found[role] for role in ROLES if role in found}


def with_stream(rngs: Any) -> Any:
    """The `rngs` of a call of `apply`, with a stream for stochastic rounding; None if there are none."""
    if rngs is None or (isinstance(rngs, Mapping) and (not rngs or STREAM in rngs)):
        return rngs
    if not isinstance(rngs, Mapping):
        rngs = {"params": rngs}
    source = "params" if "params" in rngs else min(rngs)
    return {**rngs, STREAM: jax.random.fold_in(rngs[source], _STREAM_KEY)}


_STREAM_KEY = 0x7265636  # "rec": apart from what the model draws with the same key


def _key(module: nn.Module, recipe: Recipe, x: Any) -> jax.Array | None:
    """The key of the products of a module; it leaves the model's own draws as they are.

    Raises: InputError if the module is in an `nn.scan` or `nn.vmap` that hands each turn the same key.
    """
    rngs = {} if module.scope is None else module.scope.rngs
    if STREAM in rngs:
        return rngs[STREAM].as_jax_rng()
    # Inside nn.scan there are the streams that it names: split by the turn, where the model says so.
    if "params" in rngs:
        # What is split comes into the body with its inputs; what is not is a value from outside.
        of_key, of_input = (getattr(each, "_trace", None) for each in (rngs["params"].rng, x))
        if of_input is not None and of_key is not of_input:
            path = "/".join(module.path)
            raise InputError(
                f"recipe {recipe}: {path} is in an nn.scan or nn.vmap of the model's own that hands each turn the same "
                "random key, so that all would round alike. Expected the stream of the recipe among its streams: "
                f"split_rngs={{..., {STREAM!r}: True}}"
            )
        return jax.random.fold_in(rngs["params"].as_jax_rng(), _STREAM_KEY)
    return None


def has_product(module: nn.Module, method: str, args: Any) -> bool:
    """Whether a method of a module is a product that a recipe rounds."""
    if isinstance(module, nn.Embed):
        return method == "attend"
    if method != "__call__" or not isinstance(module, PRODUCT_LAYERS):
        return False
    groups = getattr(module, "feature_group_count", 1)
    return groups == 1 or groups != args[0].shape[-1]  # with one channel in each group there is nothing to sum over


def run_product(
    policy: Policy,
    products: RecipeCall,
    next_fun: Callable[..., Any],
    args: Any,
    kwargs: Any,
    module: Any,
) -> Any:
    """One call of a layer whose product is under the policy's recipe; its kernel and its bias are its masters."""
    recipe, dtype = policy.recipe, policy.compute_dtype
    assert recipe is not None

    def dot(x: jax.Array, w: jax.Array, numbers: Any, *_: Any, **__: Any) -> jax.Array:
        around = products.surroundings(module, recipe, x, w)
        y = dot_general(x, w, numbers, **around)
        return observed(product_of_matrices, x, w, y, numbers, around=around).reshape(y.shape)

    def conv(x: jax.Array, w: jax.Array, strides: Any, padding: Any, *, precision: Any = None, **how: Any) -> Any:
        around = products.surroundings(module, recipe, x, w)
        y = conv_general_dilated(x, w, strides, padding, **how, **around)
        return observed(product_of_convolution, x, w, y, strides, padding, around=around, **how)

    def observed(make: Callable[..., ObservedProduct], *args: Any, around: Mapping[str, Any], **how: Any) -> jax.Array:
        if not is_observing():
            return args[2]
        scales = {} if around["delay"] is None else around["delay"].scales
        return observe("/".join(module.path), make(*args, **how)._replace(recipe=recipe, scales=scales))

    dot.is_observed = conv.is_observed = True  # type: ignore[attr-defined]
    if isinstance(module, nn.Embed):
        query, table = args[0].astype(dtype), _stored(module, "embedding").astype(FLOAT32)
        return dot(query, table, (((query.ndim - 1,), (1,)), ((), ()))).astype(dtype)
    bias: Any = _stored(module, "bias") if module.use_bias else None
    # The bias of some goes through a reshape of the layer's own: it is added there, in float32.
    apart = bias is not None and not (isinstance(module, nn.Einsum) or getattr(module, "batch_dims", None))
    values: dict[str, Any] = {"dtype": dtype, **({"use_bias": False} if apart else {})}
    if isinstance(module, _WITH_HOOK):

        def promote(x: Any, kernel: Any, bias: Any, **_: Any) -> Any:
            return x.astype(dtype), kernel.astype(FLOAT32), None if bias is None else bias.astype(FLOAT32)

        values["promote_dtype"] = promote
        if isinstance(module, nn.Conv):
            values |= {"conv_general_dilated": conv, "conv_general_dilated_cls": None}
        else:
            values |= {"dot_general": dot, "dot_general_cls": None}
        with attributes(module, **values):
            y = next_fun(*args, **kwargs)
    else:
        y = _by_equations(module, next_fun, args, kwargs, values, dot, conv)
    y = cast_floats(y, dtype)
    return y + jnp.broadcast_to(bias.astype(FLOAT32), y.shape).astype(dtype) if apart else y


def _by_equations(
    module: Any, next_fun: Callable[..., Any], args: Any, kwargs: Any, values: Any, dot: Any, conv: Any
) -> jax.Array:
    """A layer that offers no place for another product: it is traced, and its products are replaced."""
    stored = {name: _stored(module, name) for name in ("kernel", "bias")}
    stored = {name: x.astype(FLOAT32) for name, x in stored.items() if x is not None}
    x, *rest = args

    def traced(x: jax.Array, params: Mapping[str, jax.Array]) -> jax.Array:
        def promote(x: Any, kernel: Any, bias: Any, **_: Any) -> Any:
            return x, kernel, bias

        with attributes(
            module, **{**values, "dtype": FLOAT32}, promote_dtype=promote, param=lambda name, *_, **__: params[name]
        ):
            return next_fun(x, *rest, **kwargs)

    x = x.astype(values["dtype"]).astype(FLOAT32)
    closed = jax.make_jaxpr(traced)(x, stored)
    leaves = [(x, False), *((leaf, True) for leaf in jax.tree.leaves(stored))]

    def evaluate(jaxpr: Any, given: list[Any]) -> list[Any]:
        inner, consts = opened(jaxpr)
        return interpret(inner, [*((c, False) for c in consts), *given], equation, lambda atom: (atom.val, False))

    def equation(eqn: Any, given: list[Any]) -> list[Any]:
        """The results of an equation, each with whether it comes from the parameters alone."""
        if (jaxpr := called(eqn)) is not None:
            return evaluate(jaxpr, given)
        arrays, is_param = [array for array, _ in given], [own for _, own in given]
        name, params = eqn.primitive.name, eqn.params
        if name == "conv_general_dilated" and is_param == [False, True]:
            names = ("lhs_dilation", "rhs_dilation", "dimension_numbers", "feature_group_count")
            how = {each: params[each] for each in names}
            return [(conv(*arrays, params["window_strides"], params["padding"], **how), False)]
        if name == "dot_general" and is_param[0] != is_param[1]:
            (left, right), (left_batch, right_batch) = params["dimension_numbers"]
            if is_param[1]:
                return [(dot(*arrays, params["dimension_numbers"]), False)]
            y = dot(arrays[1], arrays[0], ((right, left), (right_batch, left_batch)))
            first, second = len(left_batch), arrays[1].ndim - len(right)
            order = [*range(first), *range(second, y.ndim), *range(first, second)]
            return [(jnp.transpose(y, order), False)]
        return [(out, all(is_param)) for out in bind(eqn, arrays)]

    return evaluate(closed, leaves)[0][0]


def _stored(module: nn.Module, name: str) -> Any:
    """A parameter as it is kept, without the box of `nn.with_partitioning`; None if there is none yet."""
    return nn.unbox(module.get_variable("params", name))
