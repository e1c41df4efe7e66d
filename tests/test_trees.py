"""Pytrees: which leaves are which kind, what they are called, and the patterns of their paths."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxmp.errors import InputError
from jaxmp.trees import Pattern, by_path, has_gradient, is_castable, is_floating, is_inexact, is_key, same_structure

KINDS = (is_castable, is_floating, is_inexact, has_gradient, is_key)
FLOATS = {is_castable, is_floating, is_inexact, has_gradient}


@pytest.mark.parametrize(
    ("leaf", "kinds"),
    [
        (jnp.ones(2), FLOATS),
        (jnp.ones(2, jnp.float16), FLOATS),
        (jnp.ones(2, jnp.bfloat16), FLOATS),
        (np.ones(2), FLOATS),
        (np.float32(1), FLOATS),
        (jnp.ones(2, jnp.float8_e4m3fn), {is_floating, is_inexact}),
        (jnp.ones(2, jnp.float4_e2m1fn), {is_floating, is_inexact}),
        (jnp.ones(2, jnp.complex64), {is_inexact, has_gradient}),
        (jnp.ones(2, int), set()),
        (jnp.ones(2, bool), set()),
        (np.zeros(2, jax.dtypes.float0), set()),
        (jax.random.key(0), {is_key}),
        (jax.random.split(jax.random.key(0)), {is_key}),
        (jax.random.PRNGKey(0), set()),
        (jax.ShapeDtypeStruct((), jnp.float16), FLOATS - {is_castable}),
        (1.0, {has_gradient}),
        (1, set()),
        (jnp.float16, FLOATS - {is_castable}),
    ],
    ids=lambda value: "" if isinstance(value, set) else str(getattr(value, "dtype", value)),
)
def test_each_kind_of_leaf_is_what_the_table_says(leaf, kinds):
    assert {kind for kind in KINDS if kind(leaf)} == kinds


def test_kinds_are_told_while_tracing():
    found = []
    jax.eval_shape(lambda x: found.append([kind(x) for kind in KINDS]), jnp.ones(2, jnp.float16))
    assert found == [[True, True, True, True, False]]


def test_same_structure_looks_at_nodes_and_not_at_leaves():
    assert same_structure({"a": [1, 2]}, {"a": [jnp.ones(2), "b"]})
    assert not same_structure({"a": [1, 2]}, {"a": (1, 2)})
    assert not same_structure({"a": 1}, {"b": 1})


def test_leaves_go_by_their_path():
    assert by_path({"layers": [1, {"kernel": 2}]}) == {"layers/0": 1, "layers/1/kernel": 2}
    assert by_path(3) == {"": 3}


CLASSES = {"": {"Net"}, "head": {"Dense"}, "encoder": {"Encoder"}, "encoder/norm": {"Mine", "LayerNorm"}}


@pytest.mark.parametrize(
    ("pattern", "path", "matches", "covers"),
    [
        ("encoder", "encoder", True, True),
        ("encoder", "encoder/norm", False, True),
        ("encoder/*", "encoder", False, False),
        ("*/norm", "encoder/norm", True, True),
        ("*norm", "encoder/norm", False, False),
        ("**/norm", "encoder/norm", True, True),
        ("**/encoder", "encoder", True, True),
        ("**/kernel", "kernel", True, True),
        ("**/*kernel", "a/b/query_kernel", True, True),
        ("**", "", False, False),
        ("@LayerNorm", "encoder/norm", True, True),
        ("@Encoder", "encoder/norm", False, True),
        ("@Net", "", True, True),
        ("@Net", "head", False, True),
    ],
)
def test_a_pattern_matches_what_it_names_and_covers_all_below(pattern, path, matches, covers):
    assert Pattern(pattern).matches(path, CLASSES) is matches
    assert Pattern(pattern).covers(path, CLASSES) is covers


@pytest.mark.parametrize("text", ["", "/a", "a/", "a//b", "a b", "@", "@a/b"])
def test_a_pattern_that_can_match_nothing_is_refused(text):
    with pytest.raises(InputError, match=r"is no pattern; expected|is not the name of a class"):
        Pattern(text)


@pytest.mark.parametrize(
    ("pattern", "end"),
    [
        ("haed", "there are encoder, encoder/norm, head; did you mean 'head'?"),
        ("**/nrom", "there are encoder, encoder/norm, head; did you mean '**/norm'?"),
        ("@LayerNrom", "there are @Dense, @Encoder, @LayerNorm, @Mine, @Net; did you mean '@LayerNorm'?"),
    ],
)
def test_a_pattern_that_matches_nothing_is_told_what_there_is(pattern, end):
    assert Pattern(pattern).what_there_is(CLASSES) == end
