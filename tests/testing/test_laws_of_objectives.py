"""The laws of a step hold objective by objective: no alarm on correct steps with two, and each of many faults is found.

The step is written out: two nets with batch statistics, clipping, AdamW and averages, and two scalers.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxmp.scaling.scalers import DynamicScaler, NoScaler
from jaxmp.scaling.transform import loss_scaling
from jaxmp.testing import StepAdapter, step_laws
from jaxmp.trees import tree_where

pytestmark = pytest.mark.xdist_group("laws of objectives")  # one worker: the right step is compiled once

F16, BF16, F32 = jnp.float16, jnp.bfloat16, jnp.float32
NAMES = CRITIC, ACTOR = "critic", "actor"
SCALERS = {
    CRITIC: DynamicScaler(init_scale=2.0**10, growth_interval=5),
    ACTOR: DynamicScaler(init_scale=2.0**17, growth_interval=3, backoff_factor=0.25, min_scale=2.0**-4),
}
CLAIMS = {
    "min_scale": {CRITIC: 2.0**-14, ACTOR: 2.0**-4},
    "max_scale": 2.0**24,
    "growth_factor": 2.0,
    "backoff_factor": {CRITIC: 0.5, ACTOR: 0.25},
    "growth_interval": {CRITIC: 5, ACTOR: 3},
    "hysteresis": 1,
}


def rows():
    r = np.random.default_rng(3)
    return {"x": jnp.asarray(r.normal(size=(8, 4)) + 0.5, F32), "y": jnp.asarray(r.normal(size=8), F32)}


def net(params, x):
    """A layer, normalised by the batch, and another layer; and the mean that its statistics average."""
    h = (x @ params["first"].astype(x.dtype)).astype(F32)
    mean = jnp.mean(h, 0)
    h = jax.nn.relu((h - mean) * jax.lax.rsqrt(jnp.var(h, 0) + 1e-3) * params["gain"])
    return (h.astype(x.dtype) @ params["head"].astype(x.dtype)).astype(F32)[:, 0], mean


def step(fault=None, *, order="in_turn", every=2, compute=F16, scalers=SCALERS, selects=False):
    """The step of two objectives: `init` and `step`.

    `selects`: the gradient of an objective that is not due is taken all the same, and dropped.
    """

    def is_(name):
        return fault == name

    tx = {
        name: loss_scaling(optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-2)), scalers[name])
        for name in NAMES
    }

    def init():
        r = np.random.default_rng(4)
        one = lambda: {  # noqa: E731
            "first": jnp.asarray(r.normal(size=(4, 5)) / 2, F32),
            "gain": jnp.ones(5),
            "head": jnp.asarray(r.normal(size=(5, 1)) / 2, F32),
        }
        params = {name: one() for name in NAMES}
        state = {
            "step": jnp.int32(0),
            "params": params,
            "stats": {name: jnp.zeros(5) for name in NAMES},
            "opt": {name: tx[name].init(params[name]) for name in NAMES},
            "ema": params,
        }
        return jax.tree.map(jnp.copy, state)

    def loss_of(name, params, batch):
        x = batch["x"].astype(compute)
        value, mean = net(params[CRITIC], x)
        policy, other = net(params[ACTOR], x)
        error = policy - value if name == ACTOR else value - batch["y"]
        return jnp.mean(error**2), {CRITIC: mean, ACTOR: other}

    def attempt(name, state, before, batch, others):
        """One objective. `others`: whether the one before it was applied, and its gradients."""
        params, own = before["params"] if order == "at_once" else state["params"], state["opt"][name]
        other = ACTOR if name == CRITIC else CRITIC
        S = state["opt"][other if is_("loss scaled by the other's scale") and name == ACTOR else name].scaler.scale

        def scaled(mine):
            loss, means = loss_of(name, {**params, name: mine}, batch)
            return loss * S, (loss, means)

        grads, (loss, means) = jax.grad(scaled, has_aux=True)(params[name])
        if is_("unscaled by the other's scale") and name == ACTOR:
            ratio = own.scaler.scale / state["opt"][CRITIC].scaler.scale
            grads = jax.tree.map(lambda g: g * ratio, grads)
        if is_("clipped together with the other") and others:
            ratio = own.scaler.scale / before["opt"][CRITIC].scaler.scale
            norm = optax.global_norm(others[1]) * ratio
            both = jnp.where(jnp.isfinite(norm), norm, 0)
            grads = jax.tree.map(lambda g: g / jnp.maximum(1, both / own.scaler.scale * 64), grads)
        value = loss
        if is_("the other's overflow skips it") and others:
            value = jnp.where(others[0], loss, jnp.nan)
        updates, new = tx[name].update(grads, own, params[name], value=value)
        finite = new.consecutive_skips == 0
        if is_("scale never falls") and name == ACTOR:
            new = new._replace(scaler=tree_where(finite, new.scaler, own.scaler))
        if is_("skips are not counted") and name == ACTOR:
            new = new._replace(skipped=own.skipped)
        if is_("applied with an overflow") and name == ACTOR:
            updates = jax.tree.map(lambda u: jnp.where(finite, u, 1e-3), updates)
        after = optax.apply_updates(params[name], updates)
        moves = finite
        if others and (is_("average moves where the other is applied") or is_("statistics kept where the other is")):
            moves = finite | others[0]
        count = new.inner_state[1][0].count.astype(F32) - 1
        if is_("average counts steps") and name == ACTOR:
            count = (state["step"] - own.skipped).astype(F32)
        decay = jnp.minimum(0.9, (1 + count) / (10 + count))
        average = jax.tree.map(lambda e, p: e + (1 - decay) * (p - e), state["ema"][name], after)
        stats = jax.tree.map(lambda s, m: 0.75 * s + 0.25 * m, state["stats"], means)
        keep_stats = moves if is_("statistics kept where the other is") else finite
        if is_("statistics of an overflow committed"):
            keep_stats = jnp.bool_(True)
        move_ema = moves if is_("average moves where the other is applied") else finite
        if is_("average of an overflow moves") and name == ACTOR:
            move_ema = jnp.bool_(True)
        state = {
            **state,
            "params": {**state["params"], name: after},
            "ema": {**state["ema"], name: tree_where(move_ema, average, state["ema"][name])},
            "stats": tree_where(keep_stats, stats, state["stats"]),
            "opt": {**state["opt"], name: new},
        }
        if is_("gradients leak into the other's moments") and name == ACTOR:
            adam = state["opt"][CRITIC].inner_state[1][0]
            leak = jnp.where(finite, 0.1 * grads["gain"] / own.scaler.scale, 0)
            adam = adam._replace(mu={**adam.mu, "gain": adam.mu["gain"] + leak})
            inner = state["opt"][CRITIC].inner_state
            inner = (inner[0], (adam, *inner[1][1:]))
            state["opt"] = {**state["opt"], CRITIC: state["opt"][CRITIC]._replace(inner_state=inner)}
        return state, finite, grads

    def left(name, state):
        """The state after a step in which an objective is not due."""
        own = state["opt"][name]
        if is_("growth counts steps"):
            good = own.scaler.good_steps + 1
            own = own._replace(scaler=own.scaler._replace(good_steps=jnp.minimum(good, 2)))
        if is_("count moves where it is not due"):
            inner = own.inner_state
            adam = inner[1][0]._replace(count=inner[1][0].count + 1)
            own = own._replace(inner_state=(inner[0], (adam, *inner[1][1:])))
        if is_("row of skips ends where it is not due"):
            own = own._replace(consecutive_skips=jnp.int32(0))
        state = {**state, "opt": {**state["opt"], name: own}}
        if is_("decays where it is not due"):
            state["params"] = {**state["params"], name: jax.tree.map(lambda p: p * 0.99, state["params"][name])}
        return state

    def train_step(state, batch):
        before = state
        state, finite, grads = attempt(CRITIC, state, before, batch, None)
        run = lambda state: attempt(ACTOR, state, before, batch, (finite, grads))[0]  # noqa: E731
        leave = lambda state: left(ACTOR, state)  # noqa: E731
        due = before["step"] % every == 0
        if every == 1:
            state = run(state)
        elif selects:
            state = tree_where(due, run(state), leave(state))
        else:
            state = jax.lax.cond(due, run, leave, state)
        return {**state, "step": before["step"] + 1}

    return init, train_step


def laws_of(fault=None, claims=CLAIMS, **kwargs):
    init, train_step = step(fault, **kwargs)
    return step_laws(StepAdapter(init, jax.jit(train_step), rows(), **claims))


UNSCALED = {name: NoScaler() for name in NAMES}


def nested_laws_of(fault):
    """The same, where the scalers are inside of other containers."""
    init, train_step = step(fault)

    def put(state):
        return {**state, "opt": {CRITIC: {"tx": (state["opt"][CRITIC],)}, ACTOR: [(jnp.int32(7), state["opt"][ACTOR])]}}

    def taken(state):
        return {**state, "opt": {CRITIC: state["opt"][CRITIC]["tx"][0], ACTOR: state["opt"][ACTOR][0][1]}}

    run = jax.jit(lambda state, batch: put(train_step(taken(state), batch)))
    return step_laws(StepAdapter(lambda: put(init()), run, rows()))


CORRECT = {
    "at once, every 1, float16": {"order": "at_once", "every": 1},
    "in turn, every 3, selected, bfloat16": {"every": 3, "compute": BF16, "selects": True},
    "at once, every 2, float32": {
        "order": "at_once",
        "compute": F32,
        "claims": {},
        "scalers": {n: NoScaler() for n in NAMES},
    },
}


@pytest.mark.slow
@pytest.mark.parametrize(
    "name",
    [name if name.endswith(", float16") else pytest.param(name, marks=pytest.mark.full_size) for name in CORRECT],
)
def test_no_law_accuses_a_correct_step_of_two_objectives(name):
    laws = laws_of(**CORRECT[name])
    assert not laws.broken, str(laws)
    for law in ("others_do_not_matter", "skipped_beside_others", "skipped_statistics_are_dropped", "finite_is_applied"):
        assert laws[law].verdict == "holds", str(laws[law])
    assert (laws["not_due_stays"].verdict == "skipped") == ("every 1" in name)


AT_ONCE = {"order": "at_once", "every": 1}
FAULTS = {
    "loss scaled by the other's scale": ("scale_does_not_matter", {}),
    "unscaled by the other's scale": ("scale_does_not_matter", {}),
    "clipped together with the other": ("others_do_not_matter", AT_ONCE),
    "the other's overflow skips it": ("others_do_not_matter", AT_ONCE),
    "gradients leak into the other's moments": ("others_do_not_matter", {}),
    "scale never falls": ("scale_falls", {}),
    "skips are not counted": ("skips_are_counted", {}),
    "applied with an overflow": ("bad_gradient_is_skipped", {}),
    "statistics of an overflow committed": ("bad_gradient_is_skipped", {}),
    "statistics kept where the other is": ("skipped_statistics_are_dropped", {}),
    "average of an overflow moves": ("bad_gradient_is_skipped", {}),
    "average moves where the other is applied": ("skipped_beside_others", {}),
    "average counts steps": ("skips_leave_no_trace", {}),
    "growth counts steps": ("not_due_stays", {}),
    "count moves where it is not due": ("not_due_stays", {}),
    "row of skips ends where it is not due": ("not_due_stays", {}),
    "decays where it is not due": ("not_due_stays", {}),
}


@functools.cache
def _correct(**kwargs):
    return laws_of(**kwargs)


def marked(fault):
    """The slow suite tries every second fault, `-m full_size` the others."""
    marks = [pytest.mark.slow if list(FAULTS).index(fault) % 2 else pytest.mark.full_size]
    return pytest.param(fault, marks=marks)


@pytest.mark.parametrize("fault", [marked(fault) for fault in FAULTS])
def test_a_fault_between_two_objectives_is_found_by_its_law(fault):
    law, kwargs = FAULTS[fault]
    result = laws_of(fault, **kwargs)[law]
    suffers = "critic" if fault == "gradients leak into the other's moments" else "actor"
    assert result.verdict == "broken" and result.words.startswith(f"objective '{suffers}': "), str(result)
    assert _correct(**kwargs)[law].verdict == "holds"


@pytest.mark.slow
@pytest.mark.parametrize("fault", ["scale never falls", "unscaled by the other's scale"])
def test_the_laws_of_scales_find_each_scaler_wherever_it_is_nested(fault):
    law, _ = FAULTS[fault]
    result = nested_laws_of(fault)[law]
    assert result.verdict == "broken" and result.words.startswith("objective 'actor': "), str(result)
