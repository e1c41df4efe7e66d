"""Faults that numerics.md names and that the laws once missed, each in a copy of a train step or scaler: all are found.

The step is written out, with a scalar parameter, clipping, Adam, a schedule, an average and a window of microbatches.
"""

from __future__ import annotations

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxmp.scaling.scalers import DynamicScaler, HeadroomScaler, NoScaler, Scaling, StaticScaler
from jaxmp.testing import ScalerAdapter, StepAdapter, policy_laws, scaler_laws, step_laws
from jaxmp.trees import tree_where

tree_map = jax.tree.map
F16, BF16, F32 = jnp.float16, jnp.bfloat16, jnp.float32
KEPT = ("params", "mu", "nu", "count", "ema", "stats")


def rounded(tree, dtype):
    info = jnp.finfo(dtype)
    return tree_map(lambda x: jax.lax.reduce_precision(x, info.nexp, info.nmant), tree)


def rows(count=8):
    r = np.random.default_rng(3)
    return {"x": jnp.asarray(r.normal(size=(count, 4)), F32), "y": jnp.asarray(r.normal(size=(count, 3)), F32)}


def step(
    fault=None,
    *,
    window=1,
    compute=F16,
    init_scale=2.0**10,
    interval=3,
    floor=2.0**-4,
    cap=2.0**24,
    hysteresis=1,
    optimizer="adam",
    clip=1.0,
):
    def is_(*names):
        return fault in names

    def init():
        r = np.random.default_rng(4)
        params = {
            "first": {"kernel": jnp.asarray(r.normal(size=(4, 5)) / 2, F32), "bias": jnp.zeros(5)},
            "gain": jnp.float32(1.25),
            "head": {"kernel": jnp.asarray(r.normal(size=(5, 3)) / 2, F32), "bias": jnp.zeros(3)},
        }
        moments = functools.partial(jnp.zeros_like, dtype=F16 if is_("moments in half") else F32)
        return {
            "params": params,
            "mu": tree_map(moments, params),
            "nu": tree_map(moments, params),
            "count": jnp.int32(0),
            "ema": tree_map(lambda p: p + 0, params),
            "stats": jnp.zeros(4),
            "scale": jnp.float32(init_scale),
            "good": jnp.int32(0),
            "bad": jnp.int32(0),
            "sum": tree_map(jnp.zeros_like, params),
            "seen": jnp.int32(0),
            "ok": jnp.bool_(True),
        }

    def train_step(state, batch):
        S, params = state["scale"], state["params"]

        def scaled(params):
            p = tree_map(lambda x: x.astype(compute), params)
            h = jax.nn.relu(batch["x"].astype(compute) @ p["first"]["kernel"] + p["first"]["bias"]) * p["gain"]
            out = (h @ p["head"]["kernel"] + p["head"]["bias"]).astype(F32)
            loss = jnp.mean((out - batch["y"]) ** 2)
            return loss * S, loss

        grads, loss = jax.grad(scaled, has_aux=True)(params)
        return finish(state, batch, grads, loss)

    def flag_of(grads, loss):
        leaves = jax.tree.leaves(grads)
        finite = jnp.all(jnp.stack([jnp.all(jnp.isfinite(g)) for g in leaves])) & jnp.isfinite(loss)
        if is_("finite above 2^15 taken for an overflow at the largest scales"):
            return finite & jnp.all(jnp.stack([jnp.all(jnp.abs(g) < 2.0**15) for g in leaves]))
        if is_("flag of the squared norm in float32 of what is scaled"):
            return jnp.isfinite(sum(jnp.sum((g * 2.0**40) ** 2) for g in leaves)) & jnp.isfinite(loss)
        return finite

    def finish(state, batch, grads, loss):
        S = state["scale"]
        finite = flag_of(grads, loss)
        # scaler
        good, bad = state["good"], state["bad"]
        closes = state["seen"] + 1 == window
        update = closes if window > 1 else jnp.bool_(True)
        if is_("backs off inside a window"):
            update = update | ~finite
        whole = finite & (state["ok"] if window > 1 else True)
        due = good + 1 == interval
        up = S * (2.0001 if is_("growth by 2.0001") else 2.0)
        grown = jnp.where(due & (up <= cap), up, S)
        over = bad + 1
        down = S * (0.9 if is_("backoff 0.9") else 0.5)
        fl = init_scale if is_("never below its first scale") else floor
        lowered = jnp.maximum(down, fl)
        if is_("zero at the floor"):
            lowered = jnp.where(down < floor, 0.0, down)
        if is_("no float at the floor"):
            lowered = jnp.where(down < floor, jnp.nan, down)
        lowered = jnp.where(over >= hysteresis, lowered, S)
        newS = jnp.where(whole, grown, lowered)
        newgood = jnp.where(whole & ~due, good + 1, 0)
        newbad = jnp.where(whole, 0, jnp.minimum(over, hysteresis))
        newS, newgood, newbad = (jnp.where(update, a, b) for a, b in ((newS, S), (newgood, good), (newbad, bad)))
        grows = newS > S

        # unscale
        def unscale(path, g):
            d = S
            if is_("unscaled by 1000 for 1024"):
                d = jnp.where(S == 1024, 1000.0, S)
            if is_("unscaled by at most 65504"):
                d = jnp.minimum(S, 65504.0)
            if is_("unscaled by at least 1"):
                d = jnp.maximum(S, 1.0)
            out = g / d
            if is_("head small gradients to zero") and "head" in jax.tree_util.keystr(path):
                out = jnp.where(jnp.abs(out) < 2.0**-24, 0, out)
            return out

        def clipped(grads, dtype=F32):
            if clip is None:
                return grads
            norm = jnp.sqrt(sum(jnp.sum(g.astype(dtype) ** 2) for g in jax.tree.leaves(grads))).astype(F32)
            return tree_map(lambda g: jnp.where(norm > clip, g / norm * clip, g), grads)

        if is_("norm summed in half"):
            squares = [jnp.ravel(g.astype(F16) ** 2) for g in jax.tree.leaves(grads)]
            clip_norm = sum(jax.lax.reduce(x, np.float16(0), jax.lax.add, (0,)) for x in squares).astype(F32)
            grads = tree_map(lambda g: g / jnp.maximum(clip_norm, 1), grads)
        dtype = F16 if is_("norm in half") else BF16 if is_("norm in bfloat16") else F32
        grads = jax.tree_util.tree_map_with_path(unscale, grads)
        if window == 1:
            grads = clipped(grads, dtype)
        # window
        new = dict(state)
        commit = finite
        if window > 1:
            total = tree_map(jnp.add, state["sum"], grads)
            if is_("accumulated in bfloat16"):
                total = rounded(total, BF16)
            grads = clipped(tree_map(lambda g: g / window, total), dtype)
            commit = closes & whole
            keep_sum = ~closes
            new["sum"] = tree_map(lambda t: jnp.where(keep_sum, t, 0.0), total)
            if is_("emptied by multiplying"):
                new["sum"] = tree_map(lambda t: t * keep_sum, total)
            new["seen"] = jnp.where(closes, 0, state["seen"] + 1)
            new["ok"] = jnp.where(closes, True, whole)
            if is_("flag of the window not reset"):
                new["ok"] = jnp.where(closes & whole, True, whole)
        if is_("growth step committed though bad"):
            commit |= good + 1 == interval
        mu = tree_map(lambda m, g: 0.9 * m + (0.1 * g).astype(m.dtype), state["mu"], grads)
        if is_("second moment in half"):
            nu = tree_map(lambda n, g: 0.999 * n + 0.001 * (g.astype(F16) ** 2).astype(F32), state["nu"], grads)
        else:
            nu = tree_map(lambda n, g: 0.999 * n + (0.001 * g**2).astype(n.dtype), state["nu"], grads)
        if is_("second moment decays in bfloat16"):
            b2 = jnp.bfloat16(0.999).astype(F32)
            nu = tree_map(lambda n, g: b2 * n + 0.001 * g**2, state["nu"], grads)
        count = state["count"] + 1
        t = count.astype(F32)
        rate = 0.01 / (1 + 0.1 * t)

        def step_of(m, n):
            m, n = m.astype(F32), n.astype(F32)
            if optimizer == "sgd":
                return -rate * m
            if optimizer == "lion":
                return -rate * jnp.sign(m)
            eps = jnp.float16(1e-8).astype(F32) if is_("eps in half") else 1e-8
            return -rate * (m / (1 - 0.9**t)) / (jnp.sqrt(n / (1 - 0.999**t)) + eps)

        upd = tree_map(step_of, mu, nu)
        if is_("updates in half"):
            upd = rounded(upd, F16)
        p = tree_map(jnp.add, state["params"], upd)
        ema = tree_map(lambda e, q: 0.99 * e + 0.01 * q, state["ema"], p)
        if is_("average in bfloat16"):
            ema = rounded(ema, BF16)
        stats = 0.9 * state["stats"] + 0.1 * jnp.mean(batch["x"], 0)
        if is_("statistics in half"):
            stats = rounded(stats, F16)
        keep = functools.partial(tree_where, commit)
        new.update(
            params=keep(p, state["params"]),
            mu=keep(mu, state["mu"]),
            nu=keep(nu, state["nu"]),
            count=keep(count, state["count"]),
            ema=keep(ema, state["ema"]),
            stats=keep(stats, state["stats"]),
            scale=newS,
            good=newgood,
            bad=newbad,
        )
        if is_("moments forgotten on the growth step"):
            new["mu"] = tree_map(lambda a: jnp.where(grows, 0, a), new["mu"])
        return new, loss

    return init, train_step


def adapter(fault=None, **options):
    init, train_step = step(fault, **options)
    return StepAdapter(
        init,
        jax.jit(train_step, compiler_options={"xla_backend_optimization_level": 0}),
        rows(),
        kept=lambda state: {name: state[name] for name in KEPT},
        loss_scale=lambda state: state["scale"],
        loss=lambda out: out[1],
        microbatches=options.get("window", 1),
        min_scale=options.get("floor", 2.0**-4),
        max_scale=options.get("cap", 2.0**24),
    )


# Each fault, and a law that finds it.
FOUND = {
    "flag of the squared norm in float32 of what is scaled": "finite_is_applied",
    "finite above 2^15 taken for an overflow at the largest scales": "finite_is_applied",
    "growth by 2.0001": "scale_stays_in_its_range",
    "backoff 0.9": "scale_stays_in_its_range",
    "zero at the floor": "scale_stays_in_its_range",
    "no float at the floor": "scale_stays_in_its_range",
    "never below its first scale": "scale_stays_in_its_range",
    "norm in bfloat16": "norms_in_float32",
    "norm in half": "norms_in_float32",
    "norm summed in half": "sums_in_float32",
    "growth step committed though bad": "growth_step_is_right",
    "moments forgotten on the growth step": "growth_step_is_right",
    "moments in half": "small_gradients_take_small_steps",
    "second moment in half": "small_gradients_take_small_steps",
    "second moment decays in bfloat16": "second_moments_decay",
    "eps in half": "tiny_gradients_are_felt",
    "head small gradients to zero": "tiny_gradients_are_felt",
    "unscaled by 1000 for 1024": "scale_does_not_matter",
    "unscaled by at most 65504": "scale_does_not_matter",
    "unscaled by at least 1": "scale_does_not_matter",
    "average in bfloat16": "moments_in_float32",
    "statistics in half": "moments_in_float32",
    "updates in half": "updates_in_float32",
}
IN_A_WINDOW = {
    "backs off inside a window": "scale_stands_in_a_window",
    "accumulated in bfloat16": "gradients_keep_their_bits",
    "emptied by multiplying": "dropped_window_is_empty",
    "flag of the window not reset": "dropped_window_is_empty",
}


@pytest.mark.slow
@pytest.mark.parametrize("fault", FOUND)
def test_a_fault_is_found_with_gradients_that_the_law_chooses(fault):
    result = step_laws(adapter(fault))[FOUND[fault]]
    assert result.verdict == "broken" and result.words


@pytest.mark.slow
@pytest.mark.parametrize("fault", IN_A_WINDOW)
def test_a_fault_in_a_window_of_microbatches_is_found(fault):
    result = step_laws(adapter(fault, window=2))[IN_A_WINDOW[fault]]
    assert result.verdict == "broken" and result.words


# --- correct steps are not accused


@pytest.mark.slow
@pytest.mark.parametrize("options", [{}, {"window": 3, "optimizer": "lion"}], ids=str)
def test_the_step_without_a_fault_obeys_every_law(options):
    laws = step_laws(adapter(**options))
    assert not laws.broken, str(laws)
    skipped = {result.law for result in laws if result.verdict == "skipped"}
    assert skipped >= {"random_numbers_advance", "replicas_agree", "complex_parameters_descend"}
    assert ("dropped_window_is_empty" in skipped) == ("window" not in options)


class Net(nn.Module):
    @nn.compact
    def __call__(self, x, *, train=False):
        x = nn.relu(nn.BatchNorm(use_running_average=not train)(nn.Dense(8)(x)))
        return nn.Dense(3, name="head")(x)


class FourierFeatures(nn.Module):
    """Multiplies by constants that are drawn from a fixed key in each call."""

    @nn.compact
    def __call__(self, x, *, train=False):
        return nn.Dense(3)(jnp.sin(x @ jax.random.normal(jax.random.key(5), (x.shape[-1], 8))))


def shipped(policy, inner, *, model=None, ema=False, microbatches=1, accumulate_steps=1):
    """jaxmp's own step."""
    from jaxmp.scaling.transform import loss_scaling
    from jaxmp.tasks.classification import Classification
    from jaxmp.tasks.loss import init_model, make_loss
    from jaxmp.training.state import TrainState
    from jaxmp.training.step import make_train_step

    random = np.random.default_rng(0)
    batch = {
        "image": random.normal(size=(16, 5)).astype(np.float32),
        "label": random.integers(0, 3, 16),
        "weight": np.ones(16, np.float32),
    }
    model, task, tx = model or Net(), Classification(), loss_scaling(inner, DynamicScaler(growth_interval=3))

    @jax.jit
    def create():
        params, model_state = init_model(model, task, batch, jax.random.key(1))
        return TrainState.create(params, tx, key=jax.random.key(2), model_state=model_state, ema=ema)

    options = {"ema_decay": 0.9 if ema else None, "accumulate_steps": accumulate_steps}
    train_step = jax.jit(make_train_step(make_loss(model, task, policy), tx, **options))
    kept = (lambda state: state.params) if microbatches > 1 else None
    loss = lambda out: out[1]["loss"].total  # noqa: E731
    return StepAdapter(create, train_step, batch, kept, loss=loss, microbatches=microbatches)


ADAMW = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(lambda n: 0.1 / (1 + n)))
SHIPPED = {
    "clip, AdamW, schedule, EMA, BatchNorm": lambda: shipped("mixed_float16", ADAMW, ema=True),
    "pure float16": lambda: shipped("float16", ADAMW),
    "Lion": lambda: shipped("mixed_float16", optax.lion(0.01)),
    "MultiSteps": lambda: shipped("mixed_float16", optax.MultiSteps(optax.adam(0.1), 2), microbatches=2),
    "accumulation": lambda: shipped("mixed_float16", ADAMW, accumulate_steps=2),
    "random constants": lambda: shipped("float32", optax.sgd(0.5), model=FourierFeatures()),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", SHIPPED)
def test_no_law_accuses_a_correct_step(name):
    laws = step_laws(SHIPPED[name]())
    assert not laws.broken, str(laws)


@pytest.mark.slow
def test_scale_laws_run_for_each_scaler_in_the_state():
    init, train_step = step()

    def second(state, batch):
        one, two = state
        new, loss = train_step(one, batch)
        finite = new["count"] > one["count"]
        return (new, {"scale": jnp.where(finite, two["scale"], two["scale"] * 0.3)}), loss

    start = lambda: (init(), {"scale": jnp.float32(64)})  # noqa: E731
    both = StepAdapter(
        start,
        jax.jit(second),
        rows(),
        kept=lambda state: {name: state[0][name] for name in KEPT},
        loss_scale=lambda state: {"actor": state[0]["scale"], "critic": state[1]["scale"]},
    )
    result = step_laws(both)["scale_is_sound"]
    assert result.verdict == "broken" and "critic" in result.words


# --- models with integers and pooling


class Counting(nn.Module):
    """Makes positions, one-hot codes and a causal mask, and pools over four positions."""

    @nn.compact
    def __call__(self, x):
        count = x.shape[1]
        mask = jnp.tril(jnp.ones((count, count), bool)) & (jnp.arange(count) >= 0)
        x = jnp.where(mask[None], x[:, :, None] * x[:, None, :], 0)
        x = nn.avg_pool(nn.Dense(4)(x), (4,), (4,))
        return nn.Dense(2)(x) + jax.nn.one_hot(jnp.arange(x.shape[1]) % 2, 2)


@pytest.mark.slow
def test_policy_laws_run_where_no_number_is_a_float_and_find_pooling_in_half():
    laws = policy_laws(Counting(), "mixed_float16", jax.random.normal(jax.random.key(0), (4, 8)))
    assert laws.broken == ["sums_in_float32"], str(laws)
    assert "a reduce_window_sum adds up 4 numbers in float16" in laws["sums_in_float32"].words


# --- scalers


def scaler(fault=None, *, interval=4, floor=2.0**-6, cap=2.0**10, hysteresis=2):
    """A dynamic loss scaler with hysteresis, written out, with one fault: (scale, good steps, overflows in a row)."""

    def init():
        return F32(8.0), jnp.int32(0), jnp.int32(0)

    def unscale(state, grads):
        def one(g):
            if not jnp.issubdtype(g.dtype, jnp.inexact) or g.dtype.itemsize == 1:
                return g
            if jnp.iscomplexobj(g):
                if fault == "complex not unscaled":
                    return g
                return g.real / state[0] if fault == "imaginary part dropped" else g / state[0]
            if fault == "scalars not unscaled" and g.ndim == 0:
                return g
            return g.astype(F32) / state[0]

        return tree_map(one, grads)

    def adjust(state, finite):
        scale, good, bad = state
        due = finite & (good + 1 == interval)
        grown = jnp.where(scale * 2 <= cap / (4 if fault == "cap never reached" else 1), scale * 2, scale)
        grown = jnp.where((scale * 4 <= cap) & (fault == "grows by four"), scale * 4, grown)
        row = bad + 1
        lower = row >= {"one overflow too early": hysteresis - 1, "one too late": hysteresis + 1}.get(fault, hysteresis)
        least = 8.0 if fault == "never below its first scale" else floor
        lowered = jnp.maximum(scale / (4 if fault == "falls by a quarter" else 2), least)
        if fault == "does not grow from its floor":
            due &= scale > floor
        kept = bad if fault == "overflows counted in total" else jnp.int32(0)
        return (
            jnp.where(finite, jnp.where(due, grown, scale), jnp.where(lower, lowered, scale)),
            jnp.where(finite & ~due, good + 1, 0),
            jnp.where(finite, kept, jnp.minimum(row, hysteresis + 1)),
        )

    return ScalerAdapter(
        init,
        lambda state, loss: loss.astype(F32) * state[0],
        unscale,
        adjust,
        growth_interval=interval,
        min_scale=floor,
        max_scale=cap,
        hysteresis=hysteresis,
        growth_factor=2.0,
        backoff_factor=0.5,
    )


IN_THE_SCALER = {
    "never below its first scale": "bounds_are_reached",
    "cap never reached": "bounds_are_reached",
    "does not grow from its floor": "bounds_are_reached",
    "one overflow too early": "hysteresis",
    "one too late": "hysteresis",
    "overflows counted in total": "hysteresis",
    "grows by four": "factors",
    "falls by a quarter": "factors",
    "scalars not unscaled": "scalars_and_complex_are_unscaled",
    "complex not unscaled": "scalars_and_complex_are_unscaled",
    "imaginary part dropped": "scalars_and_complex_are_unscaled",
}


@pytest.mark.slow
@pytest.mark.parametrize("fault", IN_THE_SCALER)
def test_a_fault_in_the_scaler_is_found(fault):
    result = scaler_laws(scaler(fault))[IN_THE_SCALER[fault]]
    assert result.verdict == "broken" and result.words


@pytest.mark.slow
def test_the_scaler_without_a_fault_obeys_every_law():
    laws = scaler_laws(scaler())
    assert all(result.verdict == "holds" for result in laws), str(laws)


@pytest.mark.slow
@pytest.mark.parametrize(
    "given",
    [
        Scaling(),
        Scaling("none"),
        DynamicScaler(growth_interval=3, hysteresis=2),
        HeadroomScaler(half_life=3),
    ],
    ids=str,
)
def test_scaler_laws_take_what_an_experiment_takes(given):
    laws = scaler_laws(given)
    assert not laws.broken, str(laws)
    assert laws.title.startswith(type(given).__name__)


def test_scaler_laws_take_several_scalers_by_name():
    laws = scaler_laws({"actor": NoScaler(), "critic": StaticScaler(2.0**10)})
    assert "actor/types_stay" in laws.laws and laws["critic/loss_in_float32"].verdict == "holds"
