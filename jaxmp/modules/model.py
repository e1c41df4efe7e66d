"""`Model`: a model as pure functions, which is all that tasks, training and instruments see of it.

    model = as_model(module).under(UnderPolicy("mixed_bfloat16"))
    params, model_state = model.init(jax.random.key(0), image)
    outputs, model_state = model.apply(params, model_state, image, train=True, key=jax.random.key(1))

Here alone is known how a module is initialised, told whether it trains, given its random keys, and what of its
collections is state.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
from collections.abc import Callable, Mapping
from typing import Any, Literal, Protocol, runtime_checkable

import flax.linen as nn
import jax

from jaxmp.errors import InputError, nearest
from jaxmp.modules.interventions import Context, Intervention, attributes, initializing, intervene, trace_apart
from jaxmp.trees import same_structure


@runtime_checkable
class Model(Protocol):
    """A model as pure functions of parameters, model state, inputs and a key. `as_model` makes one of a Flax module."""

    def init(self, key: jax.Array, *inputs: Any) -> tuple[Any, Any]:
        """Fresh `(params, model_state)`, two pytrees, for inputs of these shapes and dtypes."""
        ...

    def apply(
        self,
        params: Any,
        model_state: Any,
        *inputs: Any,
        train: bool = False,
        key: jax.Array | None = None,
        method: str | None = None,
    ) -> tuple[Any, Any]:
        """`(outputs, model_state)`.

        Args:
          params: as `init` makes them.
          model_state: as `init` makes it: batch statistics and the like.
          inputs: the arrays of a batch that the model is called with.
          train: whether dropout drops, and the new model state is returned; else the one that was given is.
          key: of all random draws of this call; in evaluation, of those that the model makes there too.
          method: name of the method to call, which takes the arguments of `__call__`; None: `__call__`.
        """
        ...

    def under(self, *interventions: Intervention) -> Model:
        """This model with its modules under interventions. Those of one order that are given later are inside."""
        ...

    def module_outputs(self, params: Any, model_state: Any, *inputs: Any, key: jax.Array) -> dict[str, list[Any]]:
        """The arrays that each module's `__call__` returns in training, by the path of the module; in and out of jit.

        Those of modules inside a scan are left out. It is empty for a model whose modules cannot be reached.
        """
        ...


def as_model(model: Any) -> Model:
    """A `Model` of a Linen module, of `from_nnx`'s, or of another object with Linen's `init` and `apply`.

    A `Model` is returned as it is.
    """
    return model if isinstance(model, Model) else FlaxModel(model, model.apply)


def module_of(model: Any) -> Any:
    """The Flax module that a `Model` is of; any other object is returned as it is."""
    return model.module if isinstance(model, FlaxModel) else model


@dataclasses.dataclass(frozen=True)
class FlaxModel:
    """A `Model` of an object with Linen's `init(key, *inputs)` and `apply(variables, *inputs, rngs=, mutable=)`.

    Raises: InputError if an intervention takes modules and the object is one of `from_nnx`.
    """

    module: Any
    """the object"""
    run: Callable[..., Any]
    """its `apply`, with the interventions"""

    def init(self, key: jax.Array, *inputs: Any, **kwargs: Any) -> tuple[Any, Any]:
        """See `Model`. Further arguments of the module's `__call__` may be given; by default it does not train."""
        mode = mode_argument(self.module, False, "init")

        def init() -> dict[str, Any]:
            return dict(self.module.init(key, *inputs, **{**mode, **kwargs}))

        with initializing(self.run):
            state = variables = init()
            if any(isinstance(x, tuple) for x in jax.tree.leaves(variables, is_leaf=lambda x: isinstance(x, tuple))):
                with trace_apart(), nn.intercept_methods(_sowing_nothing):
                    state = jax.eval_shape(init)
        params = variables.pop("params", {})
        return params, _without_sown(variables, state)

    def apply(
        self,
        params: Any,
        model_state: Any,
        *inputs: Any,
        train: bool = False,
        key: jax.Array | None = None,
        method: str | None = None,
    ) -> tuple[Any, Any]:
        """See `Model`. Raises InputError if the module has no such method."""
        arguments = self._arguments(train, key)
        if method is not None:
            if not callable(getattr(self.module, method, None)):
                methods = [name for name in vars(type(self.module)) if not name.startswith("_") and name != "setup"]
                raise InputError(
                    f"{type(self.module).__name__} has no method {method!r}; expected a model that has it"
                    f"{nearest(method, methods)}"
                )
            arguments |= {"method": method}
        run = functools.partial(self.run, {"params": params, **model_state}, *inputs, **arguments)
        if not train:
            return run(), model_state
        outputs, new = run(mutable=list(model_state))
        return outputs, _without_sown(new, model_state)

    def under(self, *interventions: Intervention) -> FlaxModel:
        """See `Model`."""
        return dataclasses.replace(self, run=intervene(self.run, *interventions))

    def module_outputs(self, params: Any, model_state: Any, *inputs: Any, key: jax.Array) -> dict[str, list[Any]]:
        """See `Model`."""
        if not isinstance(self.module, nn.Module):
            return {}
        _, collections = self.run(
            {"params": params, **model_state},
            *inputs,
            mutable=[*model_state, "intermediates"],
            capture_intermediates=True,
            **self._arguments(True, key),
        )
        outputs: dict[str, list[Any]] = {}
        for path, leaf in jax.tree_util.tree_leaves_with_path(collections["intermediates"]):
            module, _, rest = jax.tree_util.keystr(path, simple=True, separator="/").partition("__call__")
            if rest:
                outputs.setdefault(module.strip("/"), []).append(leaf)
        return outputs

    def _arguments(self, train: bool, key: jax.Array | None) -> dict[str, Any]:
        # One key for all names: Linen falls back on "params" for a collection that it is given no key for.
        rngs = {} if key is None else {"rngs": {"params": key}}
        return {**rngs, **mode_argument(self.module, train)}


def mode_argument(model: Any, train: bool, method: Literal["init", "apply"] = "apply") -> dict[str, bool]:
    """The argument by which a method of a model is told whether it trains.

    It is `train=`, `training=` or `deterministic=`, whichever the method takes (of a Linen module, its `__call__`); {}
    for one that takes none.
    """
    call = type(model).__call__ if isinstance(model, nn.Module) else getattr(model, method)
    parameters = inspect.signature(call).parameters
    for name, value in (("train", train), ("training", train), ("deterministic", not train)):
        if name in parameters:
            return {name: value}
    return {}


def _sowing_nothing(next_fun: Callable[..., Any], args: Any, kwargs: Any, context: Context) -> Any:
    with attributes(context.module, sow=lambda *_, **__: False):
        return next_fun(*args, **kwargs)


def _without_sown(variables: Any, state: Any) -> dict[str, Any]:
    """The collections without what the model sows, which is no state: the tuples that are not, so long, in `state`."""
    kept = {}
    for name, value in variables.items():
        known = state.get(name) if isinstance(state, Mapping) else None
        if isinstance(value, dict):
            value = _without_sown(value, known)
            if not value:
                continue
        if not isinstance(value, tuple) or same_structure(value, known):
            kept[name] = value
    return kept
