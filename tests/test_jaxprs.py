"""Jaxprs: every equation is met, at its place, and evaluated to the same numbers, under both versions of JAX."""

from __future__ import annotations

import operator
import weakref

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxmp.errors import InputError
from jaxmp.jaxprs import (
    Place,
    bare,
    bind,
    called,
    closed_like,
    equations,
    interpret,
    opened,
    scan_counts,
    traced_at,
    tracing,
)

TABLE = np.arange(3, dtype=np.float32)


def nested(x):
    """sin inside jit, remat, a conditional, a scan, a custom derivative and a linear solve."""

    @jax.custom_jvp
    def custom(x):
        return jnp.sin(x)

    custom.defjvp(lambda x, t: (jnp.sin(x[0]), jnp.cos(x[0]) * t[0]))
    x = jax.jit(jnp.sin)(x)
    x = jax.checkpoint(jnp.sin)(x)
    x = jax.lax.cond(jnp.sum(x) > 0, jnp.sin, jnp.cos, x)
    x, _ = jax.lax.scan(lambda c, _: (jnp.sin(c), None), x, None, length=3)
    x = custom(x)
    x = jax.lax.custom_linear_solve(lambda y: jnp.sin(1.0) * y, x, lambda _, b: b / jnp.sin(1.0), symmetric=True)
    return jnp.sum(x)


def test_equations_go_into_every_nested_function():
    found = [eqn.primitive.name for eqn, _ in equations(jax.make_jaxpr(nested)(TABLE))]
    assert found.count("sin") >= 5 and "cos" in found and "scan" in found
    assert "sin" in [eqn.primitive.name for eqn, _ in equations(bare(jax.make_jaxpr(jnp.sin)(TABLE)))]


def test_the_names_of_a_nested_equation_begin_with_those_around_it():
    def loss(x):
        with jax.named_scope("outer"):
            return jnp.sum(
                jax.lax.scan(lambda c, _: (jax.named_scope("inner")(jnp.sin)(c), None), x, None, length=2)[0]
            )

    (names,) = (names for eqn, names in equations(jax.make_jaxpr(loss)(TABLE)) if eqn.primitive.name == "sin")
    assert names.split("/")[0] == "outer" and names.split("/")[-1] == "inner"


def test_interpret_evaluates_a_jaxpr_with_constants():
    jaxpr, consts = opened(jax.make_jaxpr(lambda x: nested(x + TABLE) * 2)(TABLE))
    (found,) = interpret(jaxpr, [*consts, TABLE], bind, lambda literal: literal.val)
    np.testing.assert_allclose(found, nested(TABLE + TABLE) * 2, rtol=1e-5)


def test_interpret_carries_values_of_any_kind():
    jaxpr = bare(jax.make_jaxpr(lambda x, y: (jnp.sin(x) * y + 1, y))(1.0, 2.0))

    def used(eqn, operands):
        return [frozenset().union(*operands)] * len(eqn.outvars)

    assert interpret(jaxpr, [{"x"}, {"y"}], used, lambda _: frozenset()) == [{"x", "y"}, {"y"}]


def test_interpret_drops_a_value_after_its_last_use():
    class Number:
        def __init__(self, value):
            self.value = value

    jaxpr = bare(jax.make_jaxpr(lambda x: jnp.exp(jnp.cos(jnp.sin(x))))(1.0))
    made, alive = [], []

    def equation(eqn, operands):
        alive.append(sum(each() is not None for each in made))
        result = Number(operands[0].value + 1)
        made.append(weakref.ref(result))
        return [result]

    (last,) = interpret(jaxpr, [Number(0)], equation, operator.attrgetter("val"))
    assert last.value == 3 and alive == [0, 1, 1]


def test_bind_takes_other_parameters():
    (eqn,) = bare(jax.make_jaxpr(lambda x: jax.lax.reduce_precision(x, 8, 7))(jnp.float32(1 + 2**-8))).eqns
    assert bind(eqn, [jnp.float32(1 + 2**-8)]) == [1]
    assert bind(eqn, [jnp.float32(1 + 2**-8)], {**eqn.params, "mantissa_bits": 23}) == [1 + 2**-8]


def test_what_is_traced_at_an_equation_keeps_its_line_and_scope():
    def function(x):
        with jax.named_scope("scope"):
            return jnp.sin(x)

    (old,) = bare(jax.make_jaxpr(function)(1.0)).eqns

    def again(x):
        with traced_at(old):
            return bind(old, [x])[0]

    (new,) = bare(jax.make_jaxpr(again)(1.0)).eqns
    assert Place().at(new) == Place().at(old)
    assert Place().at(new).names == "scope" and Place().at(new).source.startswith(__file__)


def test_a_place_keeps_the_line_around_an_equation_that_has_none():
    (eqn,) = bare(jax.make_jaxpr(jnp.sin)(1.0)).eqns
    unknown = eqn.replace(source_info=type(eqn.source_info)(None, eqn.source_info.name_stack))
    assert Place("Net", "net.py:3").at(unknown) == Place("Net", "net.py:3")


def test_called_finds_the_function_that_an_equation_only_calls():
    found = {
        eqn.primitive.name: called(eqn) is not None for eqn, _ in equations(jax.make_jaxpr(jax.grad(nested))(TABLE))
    }
    assert found["jit"] and not found["scan"] and not found["cond"] and not found["cos"]
    assert any(called(eqn) is not None for eqn, _ in equations(jax.make_jaxpr(jax.checkpoint(jnp.sin))(TABLE)))


def test_scan_counts_constants_and_carries():
    def function(x, y):
        return jax.lax.scan(lambda c, e: ((c[0] + y, c[1] + e), c[0]), (x, x), jnp.zeros(4))

    (scan,) = (e for e, _ in equations(jax.make_jaxpr(function)(1.0, 2.0)) if e.primitive.name == "scan")
    assert scan_counts(scan.params) == (1, 2)


def test_a_jaxpr_is_closed_like_the_parameter_that_it_replaces():
    closed = jax.make_jaxpr(jnp.sin)(1.0)
    (jit,) = (e for e, _ in equations(jax.make_jaxpr(jax.jit(jnp.sin))(1.0)) if e.primitive.name == "jit")
    (remat,) = (e for e, _ in equations(jax.make_jaxpr(jax.checkpoint(jnp.sin))(1.0)) if e.primitive.name == "remat2")
    for eqn in (jit, remat):
        assert type(closed_like(closed, eqn.params["jaxpr"])) is type(eqn.params["jaxpr"])
        bind(eqn, [1.0], {**eqn.params, "jaxpr": closed_like(closed, eqn.params["jaxpr"])})


def test_a_failure_to_trace_is_one_message_with_its_cause():
    with pytest.raises(
        InputError, match=r"audit: f does not trace with these arguments \(ValueError: no\); expected x"
    ):
        with tracing("audit: f does not trace", "x"):
            raise ValueError("no\nmore")
    with pytest.raises(InputError, match=r"with these arguments \(KeyError: KeyError\)$"):
        with tracing("it fails"):
            raise KeyError()
