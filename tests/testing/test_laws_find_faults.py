"""Deliberate faults in a copy of the loss scaling, of the step and of the casts: each is found by a law."""

from __future__ import annotations

import functools
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxmp.testing import ScalerAdapter, StepAdapter, policy_laws, replicated, scaler_laws, step_laws

pytestmark = pytest.mark.slow

tree_map = jax.tree.map

# --- a scaler


class State(NamedTuple):
    scale: jax.Array
    good: jax.Array
    floor: jax.Array


def scaler(fault=None, interval=3, floor=2.0**-6, cap=2.0**10):
    """A dynamic loss scaler, written out, with one fault."""
    kept_in_python = [0]

    def init():
        scale = 8.0 if fault == "scale as a Python float" else jnp.float32(8)
        if fault == "scale in float16":
            scale = jnp.float16(8)
        return State(scale, jnp.int32(0), jnp.float32(floor))

    def scale(state, loss):
        if fault == "loss scaled in its own dtype":
            return loss * state.scale.astype(loss.dtype)
        return loss * state.scale if fault == "scale as a Python float" else loss.astype(jnp.float32) * state.scale

    def unscale(state, grads):
        def one(g):
            if fault == "fp8 unscaled" and g.dtype == jnp.float8_e5m2:
                return (g.astype(jnp.float32) / state.scale).astype(g.dtype)
            if fault == "integers unscaled" and jnp.issubdtype(g.dtype, jnp.integer):
                return g / state.scale
            if jnp.iscomplexobj(g):
                return g / state.scale
            if not (jnp.issubdtype(g.dtype, jnp.floating) and g.dtype.itemsize > 1):
                return g
            if fault == "unscaled in half":
                return g * (1 / state.scale).astype(g.dtype)
            if fault == "unscaled twice after an overflow" and state.good == 0:
                return g.astype(jnp.float32) / state.scale**2
            return g.astype(jnp.float32) * (1 / state.scale)

        return tree_map(one, grads)

    def adjust(state, finite):
        due = state.good + 1 == (interval + 1 if fault == "growth off by one" else interval)
        growing = due & finite
        grown = state.scale * 2
        if fault == "cap that is no power of two":
            grown = jnp.minimum(grown, 1000)
        elif fault != "no cap":
            grown = jnp.where(grown <= (2 * cap if fault == "cap twice too high" else cap), grown, state.scale)
        lowered = state.scale / 2
        if fault == "overflow ignored":
            lowered = state.scale
        elif fault == "overflow raises":
            lowered = jnp.minimum(state.scale * 2, cap)
        elif fault == "floor lost in jit":
            lowered = jnp.maximum(lowered, 1.0 if isinstance(state.scale, jax.core.Tracer) else state.floor)
        elif fault != "no floor":
            lowered = jnp.maximum(lowered, state.floor)
        good = jnp.where(finite & ~growing, state.good + 1, 0)
        if fault == "count not reset by an overflow":
            good = jnp.where(growing, 0, state.good + finite)
        if fault == "count not reset by a growth":
            good = jnp.where(finite, state.good + 1, 0)
        if fault == "count in float32":
            good = good.astype(jnp.float32)
        if fault == "count in Python" and not isinstance(finite, jax.core.Tracer):
            kept_in_python[0] += 1
            growing, good = jnp.bool_(kept_in_python[0] % 3 == 0), state.good
        new = jnp.where(finite, jnp.where(growing, grown, state.scale), lowered)
        if fault == "finite steps lower":
            new = jnp.where(finite & (state.good == 1), state.scale / 2, new)
        if fault == "scale in float16":
            new = jnp.maximum(new, state.floor)
        return State(new, good, state.floor)

    return ScalerAdapter(
        init,
        scale,
        unscale,
        adjust,
        growth_interval=interval,
        min_scale=floor,
        max_scale=cap,
        hysteresis=1,
        growth_factor=2.0,
    )


IN_THE_SCALER = {
    "scale as a Python float": "loss_in_float32",
    "scale in float16": "types_stay",
    "count in float32": "types_stay",
    "loss scaled in its own dtype": "loss_in_float32",
    "unscaled in half": "unscales_in_float32",
    "unscaled twice after an overflow": "unscaling_is_exact",
    "fp8 unscaled": "fp8_leaves_stay",
    "integers unscaled": "leaves_without_gradient_stay",
    "growth off by one": "growth_interval",
    "count not reset by an overflow": "growth_interval",
    "count not reset by a growth": "growth_interval",
    "cap that is no power of two": "power_of_two",
    "no cap": "power_of_two",
    "no floor": "power_of_two",
    "cap twice too high": "within_bounds",
    "overflow ignored": "falls_and_recovers",
    "overflow raises": "right_direction",
    "finite steps lower": "right_direction",
    "floor lost in jit": "same_in_jit_and_scan",
    "count in Python": "same_in_jit_and_scan",
}


@pytest.mark.parametrize("fault", IN_THE_SCALER)
def test_a_fault_in_the_scaler_is_found(fault):
    result = scaler_laws(scaler(fault))[IN_THE_SCALER[fault]]
    assert result.verdict == "broken" and result.words


def test_the_scaler_without_a_fault_obeys_every_law():
    laws = scaler_laws(scaler())
    assert not laws.broken and all(result.verdict == "holds" for result in laws), str(laws)


# --- a step


def rows(count=8):
    random = np.random.default_rng(0)
    return {
        "x": jnp.asarray(random.normal(size=(count, 4)), jnp.float32),
        "y": jnp.asarray(random.normal(size=(count, 3)), jnp.float32),
    }


def step(fault=None, *, axis=None, noise=False):
    """A train step, written out, with one fault: momentum, clipping, decay, a schedule, EMA, running statistics."""
    in_python = [0]

    def init():
        params = {"b": jnp.zeros(3), "w": jnp.linspace(-1, 1, 12).reshape(4, 3)}
        return {
            "params": params,
            "momentum": tree_map(jnp.zeros_like, params),
            "average": tree_map(lambda p: p + 0, params),
            "statistics": jnp.zeros(4),
            "count": jnp.int32(0),
            "scale": 16.0 if fault == "scale as a Python float" else jnp.float32(16),
            "good": jnp.int32(0),
            "key": jax.random.key(0),
        }

    def mean(tree):
        if axis is None or fault == "no mean over replicas":
            return tree
        if fault == "mean in float16":
            return tree_map(lambda g: jax.lax.pmean(g.astype(jnp.float16), axis).astype(jnp.float32), tree)
        if fault == "sum for mean":
            return jax.lax.psum(tree, axis)
        return jax.lax.pmean(tree, axis)

    def train_step(state, batch):
        scale, params = state["scale"], state["params"]
        key, draw = jax.random.split(state["key"])
        x = batch["x"] + 0.1 * jax.random.normal(draw, batch["x"].shape) if noise else batch["x"]

        def loss_fn(params):
            loss = jnp.mean((x @ params["w"] + params["b"] - batch["y"]) ** 2)
            return loss * scale, loss

        grads, loss = jax.grad(loss_fn, has_aux=True)(params)
        own, own_loss = grads, loss
        grads, loss = mean(grads), mean(loss)
        flagged, flagged_loss = (own, own_loss) if fault == "flag of each replica" else (grads, loss)
        leaves = jax.tree.leaves(flagged)
        leaves = {"flag of the first leaf": leaves[:1], "flag of the last leaf": leaves[-1:]}.get(fault, leaves)
        ok = {"flag blind to NaN": lambda g: ~jnp.isinf(g), "flag blind to inf": lambda g: ~jnp.isnan(g)}.get(
            fault, jnp.isfinite
        )
        finite = jnp.all(jnp.stack([jnp.all(ok(g)) for g in leaves]))
        if fault == "flag of the loss alone":
            finite = jnp.isfinite(loss)
        elif fault != "flag without the loss":
            finite &= jnp.isfinite(flagged_loss)
        if fault == "no flag":
            finite = jnp.bool_(True)

        grow = finite & (state["good"] == 2)
        factor = {"overflow ignored": 1.0, "overflow raises": 2.0, "a third": 1 / 3}.get(fault, 0.5)
        lowered = jnp.maximum(scale * factor, 2.0**-14)
        new_scale = jnp.where(finite, jnp.where(grow, scale * 2, scale), lowered)
        divisor = {"unscaled by the new scale": new_scale, "not unscaled": 1.0}.get(fault, scale)

        def clip(grads):
            norm = jnp.sqrt(sum(jnp.sum(g**2) for g in jax.tree.leaves(grads)))
            return tree_map(lambda g: g * jnp.minimum(1, 5 / norm), grads)

        if fault == "clipped before unscaling":
            grads = tree_map(lambda g: g / divisor, clip(grads))
        else:
            grads = clip(tree_map(lambda g: g / divisor, grads))
        if fault == "not unscaled":
            grads = tree_map(lambda g: g * 16, grads)

        def keep(name, new, old):
            return (
                new if fault == f"{name} not rolled back" else tree_map(functools.partial(jnp.where, finite), new, old)
            )

        rate = 0.1 / (1 + state["count"])
        momentum = tree_map(lambda m, g: 0.9 * m + g, state["momentum"], grads)
        update = tree_map(lambda m: -rate * m, momentum)
        if fault == "decay on a skip":
            params = tree_map(lambda p: p * 0.999, params)
        if fault == "commit by adding zero":
            params = tree_map(lambda p, u: p + jnp.where(finite, u, 0), params, update)
        elif fault == "commit by multiplying":
            params = tree_map(lambda p, u: p + finite * u, params, update)
        else:
            params = keep("parameters", tree_map(jnp.add, params, update), params)
        average = tree_map(lambda a, p: 0.9 * a + 0.1 * p, state["average"], params)
        statistics = 0.9 * state["statistics"] + 0.1 * mean(jnp.mean(x, 0))
        if fault == "momentum in half":
            momentum = tree_map(lambda m: m.astype(jnp.bfloat16), momentum)
        if fault == "statistics of each replica":
            statistics = 0.9 * state["statistics"] + 0.1 * jnp.mean(x, 0)
        new = {
            "params": params,
            "momentum": keep("momentum", momentum, state["momentum"]) if fault != "momentum in half" else momentum,
            "average": keep("average", average, state["average"]),
            "statistics": keep("statistics", statistics, state["statistics"]),
            "count": keep("count", state["count"] + 1, state["count"]),
            "scale": new_scale,
            "good": jnp.where(finite & ~grow, state["good"] + 1, 0),
            "key": {"key never advanced": state["key"], "key rolled back": keep("key", key, state["key"])}.get(
                fault, key
            ),
        }
        return new, loss

    # Compiling is most of what a law takes here, so without optimisation.
    options = {"xla_backend_optimization_level": 0}
    compiled = train_step if axis else jax.jit(train_step, compiler_options=options)
    if fault == "a new program for each step":

        def compiled(state, batch):
            in_python[0] += 1
            return jax.jit(lambda s, b, n=in_python[0]: train_step(s, b))(state, batch)

    return StepAdapter(
        init,
        compiled,
        rows(),
        kept=lambda s: {name: leaf for name, leaf in s.items() if name not in ("scale", "good", "key")},
        loss_scale=lambda s: s["scale"],
        loss=lambda out: out[1],
    )


IN_THE_STEP = {
    "not unscaled": "skips_leave_no_trace",
    "unscaled by the new scale": "growth_step_is_right",
    "clipped before unscaling": "scale_does_not_matter",
    "a third": "scale_is_sound",
    "parameters not rolled back": "bad_gradient_is_skipped",
    "statistics not rolled back": "bad_gradient_is_skipped",
    "momentum not rolled back": "bad_gradient_is_skipped",
    "average not rolled back": "bad_gradient_is_skipped",
    "count not rolled back": "bad_gradient_is_skipped",
    "decay on a skip": "bad_gradient_is_skipped",
    "commit by adding zero": "bad_gradient_is_skipped",
    "commit by multiplying": "bad_gradient_is_skipped",
    "flag of the first leaf": "bad_gradient_is_skipped",
    "flag of the last leaf": "bad_gradient_is_skipped",
    "flag blind to NaN": "bad_gradient_is_skipped",
    "flag blind to inf": "bad_gradient_is_skipped",
    "flag of the loss alone": "bad_gradient_is_skipped",
    "flag without the loss": "bad_loss_is_skipped",
    "no flag": "bad_batch_is_skipped",
    "scale as a Python float": "scale_is_sound",
    "momentum in half": "types_stay",
    "overflow ignored": "scale_falls",
    "overflow raises": "scale_falls",
    "a new program for each step": "one_compile",
}
WITH_NOISE = {"key never advanced": "random_numbers_advance", "key rolled back": "random_numbers_advance"}
OVER_REPLICAS = {
    "flag of each replica": "replicas_agree",
    "no mean over replicas": "replicas_agree",
    "statistics of each replica": "replicas_agree",
    "mean in float16": "reduced_in_float32",
    "sum for mean": "as_the_reference",
}


# One of each kind is tried each time; all of them with the slow tests.
OFTEN = ("not unscaled", "unscaled by the new scale", "count not rolled back", "flag of the first leaf", "no flag")


@pytest.mark.parametrize(
    "fault", [fault if fault in OFTEN else pytest.param(fault, marks=pytest.mark.slow) for fault in IN_THE_STEP]
)
def test_a_fault_in_the_step_is_found(fault):
    result = step_laws(step(fault))[IN_THE_STEP[fault]]
    assert result.verdict == "broken" and result.words


@pytest.mark.slow
@pytest.mark.parametrize("fault", WITH_NOISE)
def test_a_fault_in_the_random_numbers_is_found(fault):
    assert step_laws(step(fault, noise=True))[WITH_NOISE[fault]].verdict == "broken"


@pytest.mark.parametrize("fault", OVER_REPLICAS)
def test_a_fault_in_the_reduction_is_found(fault):
    laws = step_laws(replicated(step(fault, axis="data"), "data"), reference=step())
    assert laws[OVER_REPLICAS[fault]].verdict == "broken"


@pytest.mark.slow
def test_the_step_without_a_fault_obeys_every_law():
    laws = step_laws(step())
    assert not laws.broken, str(laws)
    assert {result.law for result in laws if result.verdict == "skipped"} >= {
        "random_numbers_advance",
        "replicas_agree",
        "reduced_in_float32",
        "as_the_reference",
    }
    assert not step_laws(step(noise=True)).broken


@pytest.mark.slow
def test_the_step_without_a_fault_obeys_every_law_over_replicas():
    laws = step_laws(replicated(step(axis="data"), "data"), reference=step())
    assert not laws.broken, str(laws)
    assert "random_numbers_advance" in {result.law for result in laws if result.verdict == "skipped"}


@pytest.mark.slow
def test_a_flag_made_of_the_largest_gradient_is_found_where_xla_loses_a_nan():
    """Of 2**12 float32 and more, XLA:CPU's maximum takes no notice of a NaN (jaxlib 0.10 to 0.12)."""
    if np.isnan(jax.jit(jnp.max)(jnp.ones(2**12).at[0].set(jnp.nan))):
        pytest.skip("this XLA does not")

    def adapter(size):
        def sgd(state, batch):
            def loss_fn(weights):
                return jnp.mean(weights**2) * batch["x"] * state["scale"]

            grads = jax.grad(loss_fn)(state["weights"])
            finite = jnp.isfinite(jnp.max(jnp.abs(grads)))
            weights = jnp.where(finite, state["weights"] - grads / state["scale"], state["weights"])
            return {"weights": weights, "scale": jnp.where(finite, state["scale"], state["scale"] / 2)}

        first = {"weights": jnp.ones(size), "scale": jnp.float32(8)}
        kept, scale = (lambda state: state["weights"]), (lambda state: state["scale"])
        return StepAdapter(lambda: first, jax.jit(sgd), {"x": jnp.float32(1)}, kept=kept, loss_scale=scale)

    verdicts = [step_laws(adapter(size))["bad_gradient_is_skipped"].verdict for size in (2**12 - 1, 2**13 + 1)]
    assert verdicts == ["holds", "broken"]


def test_there_are_enough_faults():
    assert len({*IN_THE_SCALER, *IN_THE_STEP, *WITH_NOISE, *OVER_REPLICAS}) >= 25


# --- a policy applied in another way


class Net(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.LayerNorm()(nn.Dense(8, name="first")(x))
        return nn.Dense(3, name="head")(nn.relu(x))


class Recurrent(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.RNN(Accumulator())(x)


class Accumulator(nn.RNNCellBase):
    """Adds weighted inputs up: one weight, used at each step (trap T1)."""

    @nn.compact
    def __call__(self, carry, x):
        carry = carry + (x * self.param("w", nn.initializers.ones, (1,))).astype(carry.dtype)
        return carry, carry

    @property
    def num_feature_axes(self):
        return 1

    def initialize_carry(self, rng, input_shape):
        return jnp.zeros(input_shape)


def applied(fault):
    """`with_policy` in a few lines, with a fault."""
    from jaxmp import with_policy
    from jaxmp.precision.policy_tree import PolicyTree

    def apply_policy(apply, tree):
        policy = tree.default
        inner = with_policy(apply, tree)

        def run(variables, x, **kwargs):
            if fault == "all cast once, outside":
                return policy.cast_to_output(
                    apply(policy.cast_to_compute(variables), policy.cast_to_compute(x), **kwargs)
                )
            if fault == "float32 instead":
                return with_policy(apply, PolicyTree.parse("float32"))(variables, x, **kwargs)
            if fault == "rules ignored":
                return with_policy(apply, policy)(variables, x, **kwargs)
            if fault == "output not cast":
                return policy.cast_to_compute(inner(variables, x, **kwargs))
            if fault == "gradient stopped":
                variables = {**variables, "params": {**variables["params"]}}
                variables["params"]["head"] = jax.lax.stop_gradient(variables["params"]["head"])
            return inner(variables, x * 1e6 if fault == "input grown" else x, **kwargs)

        return run

    return apply_policy


IN_THE_POLICY = {
    "all cast once, outside": "sums_in_float32",
    "float32 instead": "dots_have_compute_dtype",
    "rules ignored": "dots_have_compute_dtype",
    "output not cast": "outputs_have_dtype",
    "gradient stopped": "gradients_near_float64",
    "input grown": "activations_fit",
}


def features(*shape):
    return jnp.asarray(np.random.default_rng(0).normal(size=shape), jnp.float32)


@pytest.mark.slow
@pytest.mark.parametrize("fault", IN_THE_POLICY)
def test_a_fault_in_applying_a_policy_is_found(fault):
    laws = policy_laws(Net(), "head=float32; mixed_float16", features(8, 4), apply_policy=applied(fault))
    assert laws[IN_THE_POLICY[fault]].verdict == "broken"


def test_a_weight_cast_outside_of_a_scan_is_far_from_float64_t1():
    arguments = Recurrent(), "mixed_bfloat16", jnp.ones((1, 1000, 1))
    loss = lambda out: jnp.sum(out[:, -1].astype(jnp.float32))  # noqa: E731
    cast_outside = policy_laws(*arguments, loss=loss, apply_policy=applied("all cast once, outside"))
    assert "256 instead of 1000" in cast_outside["gradients_near_float64"].words
    assert policy_laws(*arguments, loss=loss)["gradients_near_float64"].verdict == "holds"
