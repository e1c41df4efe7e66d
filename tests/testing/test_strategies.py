from __future__ import annotations

import contextlib

import hypothesis
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import optax
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxmp.precision.policy import parse_policy
from jaxmp.precision.policy_tree import PolicyTree
from jaxmp.testing import strategies
from jaxmp.testing.strategies import Steps


def drawn(strategy, count=300):
    """Some examples, always the same ones."""
    found = []
    settings = hypothesis.settings(
        max_examples=count, derandomize=True, database=None, phases=[hypothesis.Phase.generate], deadline=None
    )
    settings(given(strategy)(lambda x: found.append(x)))()
    return found


def smallest(strategy, condition=lambda x: True):
    settings = hypothesis.settings(derandomize=True, database=None, deadline=None)
    return hypothesis.find(strategy, condition, settings=settings)


@pytest.mark.parametrize("dtype", strategies.FLOATS, ids=str)
def test_floats_come_in_every_kind(dtype):
    """Zeros, subnormals, the smallest normal, the largest finite, infinities and NaNs, of either sign."""
    info = ml_dtypes.finfo(dtype)
    values = drawn(strategies.float_bits(dtype))
    wide = np.array([float(x) for x in values])
    kinds = {
        "dtype": all(x.dtype == dtype and x.shape == () for x in values),
        "zeros": {str(x) for x in wide if x == 0} == {"0.0", "-0.0"},
        "subnormal": np.any((np.abs(wide) > 0) & (np.abs(wide) < float(info.smallest_normal))),
        "smallest normal": np.any(wide == float(info.smallest_normal)),
        "largest": {float(info.max), -float(info.max)} <= set(wide),
        "one": 1.0 in wide,
        "nan": np.any(np.isnan(wide)),
    }
    if dtype.name != "float8_e4m3fn":  # it has none
        kinds["inf"] = {np.inf, -np.inf} <= set(wide)
    assert all(kinds.values()), kinds


def test_nans_have_payloads_and_signs():
    nans = [x for x in drawn(strategies.float_bits(np.float32)) if np.isnan(x)]
    assert len({int(x.view(np.uint32)) for x in nans}) > 4


def test_float32_has_ties_of_both_halves():
    values = {int(x.view(np.uint32)) for x in drawn(strategies.float_bits(np.float32))}
    one = int(np.float32(1).view(np.uint32))
    assert {one + 2**12, one + 2**15} <= values  # half an ulp of float16, of bfloat16


def test_floats_shrink_to_one():
    assert smallest(strategies.float_bits(np.float16)) == 1
    assert smallest(strategies.float_bits(np.float16), np.isnan).dtype == np.float16


def test_odd_trees_have_everything_that_turns_up_in_a_state():
    wanted = {"None", "key", "float0", "int32", "bool", "float8_e4m3fn", "float8_e5m2", "float32", "float16"}
    wanted |= {"scalar", "empty array", "empty tree"}
    seen = set()

    def are_all_seen(tree):
        leaves = jax.tree.leaves(tree, is_leaf=lambda x: x is None)
        seen.update({"empty tree"} if not leaves else set())
        for leaf in leaves:
            if leaf is None:
                seen.add("None")
                continue
            key = jnp.issubdtype(leaf.dtype, jax.dtypes.extended)
            seen.add("key" if key else "float0" if leaf.dtype == jax.dtypes.float0 else leaf.dtype.name)
            seen.update({"scalar"} if leaf.ndim == 0 else set(), {"empty array"} if leaf.size == 0 else set())
        return wanted <= seen

    # What Hypothesis draws first depends on the constants of the modules that are loaded.
    settings = hypothesis.settings(
        max_examples=5000, derandomize=True, database=None, phases=[hypothesis.Phase.generate], deadline=None
    )
    with contextlib.suppress(hypothesis.errors.NoSuchExample):
        hypothesis.find(strategies.odd_trees(), are_all_seen, settings=settings)
    assert not wanted - seen


def test_steps_count_and_read_well():
    steps = Steps([(True, 2), (False, 1), (True, 1)])
    assert list(steps) == [True, True, False, True] and len(steps) == 4
    assert str(steps) == "2 finite steps and 1 overflow and 1 finite step"
    assert str(steps.upto(3)) == "2 finite steps and 1 overflow" and str(Steps()) == "no step"


def test_overflow_traces_shrink_to_few_steps():
    assert str(smallest(strategies.overflow_traces(), lambda t: sum(not f for f in t) >= 3)) == "3 overflows"
    assert all(len(t) <= 2 * 3 for t in drawn(strategies.overflow_traces(max_runs=2, longest=3), 50))


def test_gradient_trees_overflow_and_underflow_as_asked():
    like = {"w": jnp.zeros((2, 2), jnp.float16), "n": jnp.int32(3), "b": jnp.zeros(3)}

    def bad(tree):
        return sum(int(np.sum(~np.isfinite(np.asarray(x, np.float64)))) for x in jax.tree.leaves(tree))

    for tree in drawn(strategies.gradient_trees(like, overflow=True), 50):
        assert jax.tree.map(jnp.result_type, tree) == jax.tree.map(jnp.result_type, like)
        assert tree["n"] == 3 and bad(tree) == 1
    assert not any(bad(tree) for tree in drawn(strategies.gradient_trees(overflow=False), 50))
    assert {bad(tree) for tree in drawn(strategies.gradient_trees(), 50)} == {0, 1}
    for tree in drawn(strategies.gradient_trees(overflow=False, underflow=True), 50):
        largest = max(float(jnp.max(jnp.abs(x))) for x in jax.tree.leaves(tree))
        assert 0 < largest < 2.0**-18 and float(jnp.float16(largest * 2.0**-12)) == 0


def test_replica_faults_hit_every_replica():
    assert {replica for replica, _ in drawn(strategies.replica_faults(3), 50)} == {0, 1, 2}


@given(strategies.policies())
def test_the_text_of_a_random_policy_is_read_back(policy):
    assert parse_policy(str(policy)) == policy


@given(strategies.policy_trees())
def test_the_text_of_a_random_policy_tree_is_read_back(tree):
    assert PolicyTree.parse(str(tree)) == tree


@given(strategies.odd_trees(), st.sampled_from(["mixed_float16", "bfloat16", "p=f16,c=f32"]))
def test_the_casts_of_a_policy_leave_odd_leaves_alone(tree, text):
    out = parse_policy(text).cast_to_compute(tree)
    assert jax.tree.structure(out) == jax.tree.structure(tree)
    for before, after in zip(jax.tree.leaves(tree), jax.tree.leaves(out), strict=True):
        if not jnp.issubdtype(before.dtype, jnp.floating) or before.dtype.itemsize == 1:
            assert before is after


def test_random_models_run_and_shrink_to_one_layer():
    for model in drawn(strategies.models(), 8):
        out = jax.eval_shape(lambda model=model: model.init_with_output(jax.random.key(0), jnp.ones((2, 3, 4)))[0])
        assert out.shape == (2, 3, model.features)
    assert smallest(strategies.models()).layers == ("dense",)


def test_random_optimizers_have_a_schedule_and_take_a_step():
    params = {"w": jnp.ones(2)}
    for tx in drawn(strategies.optimizers(), 12):
        state = tx.init(params)
        updates, after = tx.update(params, state, params)
        assert np.all(optax.apply_updates(params, updates)["w"] != 1)
        counts = [x for x in jax.tree.leaves(after) if x.dtype == jnp.int32]
        assert counts and all(int(count) == 1 for count in counts)
