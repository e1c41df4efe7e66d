"""Interventions: one interceptor, one order."""

from __future__ import annotations

import dataclasses
import functools
import itertools
from typing import ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxmp.modules.dropout import DropoutByExample
from jaxmp.modules.interventions import Intervention, Order, intervene, intervening
from jaxmp.modules.linen import UnderPolicy, with_policy
from jaxmp.modules.nnx import from_nnx
from jaxmp.modules.observe import observed_modules
from jaxmp.modules.remat import Remat

X = jnp.ones((4, 3))
MODEL = nn.Dense(2)
VARIABLES = MODEL.init(jax.random.key(0), X)


def noting(order, log):
    """An intervention that notes its order in `log` for each call of a module."""

    class Noting(Intervention):
        def call(self, run, model, variables, args, kwargs):
            def intercept(next_fun, args, kwargs, context):
                if context.method_name == "__call__":
                    log.append(order.name)
                return next_fun(*args, **kwargs)

            return run(intercept, variables, args, kwargs)

    Noting.order = order
    return Noting()


@pytest.mark.parametrize("given", [list(Order), list(reversed(Order))], ids=["in order", "reversed"])
@pytest.mark.parametrize("nested", [False, True], ids=["together", "one by one"])
def test_interventions_run_in_the_one_order_however_they_are_given(given, nested):
    log = []
    interventions = [noting(order, log) for order in given]
    if nested:
        apply = functools.reduce(intervene, interventions, MODEL.apply)
    else:
        apply = intervene(MODEL.apply, *interventions)
    apply(VARIABLES, X)
    assert log == ["REMAT", "SHARDING", "OBSERVATION", "POLICY", "ADAPTERS", "RANDOM_DRAWS"]


def test_one_interceptor_runs_all_interventions(monkeypatch):
    opened, intercept_methods = [], nn.intercept_methods

    def counted(interceptor):
        opened.append(interceptor)
        return intercept_methods(interceptor)

    model = nn.Sequential([MODEL])
    variables = model.init(jax.random.key(0), X)
    apply = intervene(with_policy(model.apply, "mixed_float16"), DropoutByExample(None, 4), Remat(("**",)))
    monkeypatch.setattr(nn, "intercept_methods", counted)
    with observed_modules(lambda path, out: out):
        jax.eval_shape(apply, variables, X)
    # Before it, the policy alone looks at what the model does.
    assert [interceptor.__qualname__ for interceptor in opened] == ["in_turn.<locals>.intercept"] * 2


class Called(nn.Module):
    """A layer, called by position or by name."""

    layer: nn.Module
    method: str
    names: tuple[str, ...] = ()

    @nn.compact
    def __call__(self, *args):
        method = getattr(self.layer, self.method)
        return method(**dict(zip(self.names, args, strict=True))) if self.names else method(*args)


ROW = jax.ShapeDtypeStruct((4, 8), jnp.float32)
IMAGE = jax.ShapeDtypeStruct((4, 8, 8), jnp.float32)
LAYERS = {
    "complex": (nn.Dense(3), "__call__", {"inputs": jax.ShapeDtypeStruct((4, 8), jnp.complex64)}, "mixed_bfloat16"),
    "cell": (nn.GRUCell(8), "__call__", {"carry": ROW, "inputs": ROW}, "mixed_bfloat16"),
    "cell of a rule": (nn.GRUCell(8), "__call__", {"carry": ROW, "inputs": ROW}, "layer=mixed_float16; float32"),
    "dropout": (nn.Dropout(0.5, deterministic=False), "__call__", {"inputs": ROW}, "mixed_bfloat16"),
    "attend": (nn.Embed(5, 8), "attend", {"query": ROW}, "nvfp4"),
    "transposed": (nn.ConvTranspose(3, (3,)), "__call__", {"inputs": IMAGE}, "nvfp4"),
    "grouped": (nn.Conv(8, (3,), feature_group_count=2), "__call__", {"inputs": IMAGE}, "nvfp4"),
}


@pytest.mark.parametrize("name", LAYERS)
def test_a_layer_that_is_called_by_name_computes_what_it_does_by_position(name):
    layer, method, arguments, policy = LAYERS[name]

    def traced(names):
        model = Called(layer, method, names)
        variables = jax.eval_shape(model.init, {"params": jax.random.key(0)}, *arguments.values())
        apply = intervene(model.apply, UnderPolicy(policy), DropoutByExample(None, 4))
        return str(
            jax.make_jaxpr(functools.partial(apply, rngs={"params": jax.random.key(0)}))(variables, *arguments.values())
        )

    assert traced(tuple(arguments)) == traced(())


def test_what_a_decorated_method_is_given_by_name_stays_so():
    def named(method):
        @functools.wraps(method)
        def wrapper(self, *args, **kwargs):
            assert not args and set(kwargs) == {"x"}
            return method(self, **kwargs)

        return wrapper

    class Decorated(nn.Module):
        @named
        def __call__(self, x):
            return x

    class Outer(nn.Module):
        @nn.compact
        def __call__(self, x):
            return Decorated()(x=x)

    assert intervene(Outer().apply, DropoutByExample(None, 4))({}, X) is X


def test_a_function_that_wraps_an_intervened_one_keeps_its_own_code():
    inner = intervene(MODEL.apply, noting(Order.POLICY, []))

    @functools.wraps(inner)
    def doubled(*args):
        return 2 * inner(*args)

    out = intervene(doubled, noting(Order.REMAT, []))(VARIABLES, X)
    np.testing.assert_allclose(out, 2 * MODEL.apply(VARIABLES, X))


def test_an_ambient_intervention_reaches_what_is_called_under_another_and_once():
    log = []
    apply = with_policy(MODEL.apply, "float32")
    with intervening(noting(Order.OBSERVATION, log)):
        MODEL.apply(VARIABLES, X)
        assert log == []
        with_policy(lambda *args: apply(*args), "float32")(VARIABLES, X)
    assert log == ["OBSERVATION"]
    apply(VARIABLES, X)
    assert log == ["OBSERVATION"]


JittedDense = nn.jit(nn.Dense)


class Jitted(nn.Module):
    @nn.compact
    def __call__(self, x):
        return JittedDense(2, name="dense")(x)


@dataclasses.dataclass(frozen=True)
class Times(Intervention):
    factor: float
    order: ClassVar[Order] = Order.SHARDING

    def trace_key(self):
        return self

    def call(self, run, model, variables, args, kwargs):
        def intercept(next_fun, args, kwargs, context):
            out = next_fun(*args, **kwargs)
            return out * self.factor if context.method_name == "__call__" and context.module.path else out

        return run(intercept, variables, args, kwargs)


def test_what_nn_jit_has_traced_under_an_intervention_serves_no_other():
    variables = Jitted().init(jax.random.key(0), X)
    plain = Jitted().apply(variables, X)
    for factor in (2.0, 3.0):
        np.testing.assert_allclose(intervene(Jitted().apply, Times(factor))(variables, X), factor * plain)
        inner = intervene(Jitted().apply, DropoutByExample(None, 4))
        outer = intervene(lambda *args, inner=inner: inner(*args), Times(factor))
        np.testing.assert_allclose(outer(variables, X), factor * plain)  # of the outer call as well


def test_a_model_without_modules_to_reach_gets_the_policy_by_operations_in_any_order():
    model = from_nnx(lambda rngs: nnx.Linear(3, 2, rngs=rngs))
    variables = model.init(jax.random.key(0))
    index = jnp.arange(4)
    for interventions in itertools.permutations([UnderPolicy("mixed_float16"), DropoutByExample(index, 4)]):
        apply = functools.reduce(intervene, interventions, model.apply)
        assert "f16" in str(jax.make_jaxpr(apply)(variables, X))
