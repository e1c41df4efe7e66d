"""A catalogue: every defect of a published library (B) and every trap of JAX (T) that jaxmp was built to avoid.

Each test shows what others do, in the installed library or written out in a few lines, and then the same situation with
jaxmp.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys

import flax.linen as nn
import jax
import jax.numpy as jnp
import jmp
import numpy as np
import optax
import pytest
from flax.training import train_state as flax_train_state
from flax.training.dynamic_scale import DynamicScale
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import jaxmp
from jaxmp import Classification, DynamicScaler, NoScaler, StaticScaler, TrainState, loss_scaling, make_train_step
from jaxmp.errors import InputError
from jaxmp.experiment.settings import Parallel
from jaxmp.runs.checkpoint import Checkpoints
from jaxmp.tasks.loss import make_loss
from jaxmp.training.metrics import compute

f16, bf16, f32 = jnp.float16, jnp.bfloat16, jnp.float32


def scales(scaler, flags):
    """The scales after steps that were finite or not, each step a jit boundary."""
    update, state, found = jax.jit(scaler.update), scaler.init(), []
    for finite in flags:
        state = update(state, jnp.bool_(finite), f32(1 if finite else jnp.inf))
        found.append(float(state.scale))
    return found


def bits(tree):
    return [np.asarray(x).tobytes() for x in jax.tree.leaves(tree)]


def linear_loss(params, model_state, batch, key):
    """A loss function as jaxmp's train step wants it: the sum of w * x, and the weight that it is divided by."""
    del key
    half = params["w"].astype(f16) * batch["x"].astype(f16)
    return jnp.sum(half.astype(f32)), (jnp.sum(batch["weight"]), {}, model_state)


def eight_devices(loss_fn, tx, params, batch):
    """(state, step, batch), on eight devices under `jit`."""
    devices = Parallel("jit").make(8)
    step = make_train_step(loss_fn, tx, replicas=devices.replicas())
    state = devices.put(TrainState.create(params, tx, key=jax.random.key(0)))
    return state, jax.jit(step), devices.put_batch(batch)


def products(jaxpr):
    """The operand dtype of each matrix product of a function without inner functions."""
    equations = [equation for equation in jaxpr.eqns if equation.primitive.name == "dot_general"]
    assert all(len({operand.aval.dtype for operand in equation.invars}) == 1 for equation in equations)
    return [equation.invars[0].aval.dtype for equation in equations]


def sums_over_devices(jaxpr, inside=()):
    """(dtype, names of the primitives that it stands in) of every operand of a sum over devices."""
    for equation in jaxpr.eqns:
        if equation.primitive.name.startswith("psum"):
            yield from ((operand.aval.dtype, inside) for operand in equation.invars)
        for parameter in equation.params.values():
            for inner in parameter if isinstance(parameter, tuple | list) else (parameter,):
                inner = getattr(inner, "jaxpr", inner)
                if hasattr(inner, "eqns"):
                    yield from sums_over_devices(inner, (*inside, equation.primitive.name))


# --- B: defects seen in published libraries


def test_b01_the_floor_of_the_scale_survives_jit():
    """jmp.DynamicLossScale: `min_loss_scale` is not in its pytree, and is 1.0 again after every jit boundary."""
    theirs = jmp.DynamicLossScale(f32(64), min_loss_scale=f32(16))
    overflow = jax.jit(lambda scaler: scaler.adjust(jnp.bool_(False)))
    for _ in range(8):
        theirs = overflow(theirs)
    assert theirs.min_loss_scale == 1
    assert theirs.loss_scale == 1, "through its floor of 16"

    ours = DynamicScaler(init_scale=64.0, min_scale=16.0)
    assert scales(ours, [False] * 4) == [32, 16, 16, 16]


def test_b02_a_scale_given_in_float16_works():
    """jmp.DynamicLossScale: the README's `half_dtype()(2 ** 15)` is a TypeError in `adjust`."""
    theirs = jmp.DynamicLossScale(f16(2**15))
    for finite in (True, False):
        with pytest.raises(TypeError, match="float16"):
            theirs.adjust(jnp.bool_(finite))

    ours = DynamicScaler(init_scale=f16(2**15))
    assert ours.init().scale.dtype == f32
    assert scales(ours, [True, False]) == [2**15, 2**14]


def test_b03_gradients_are_unscaled_in_float32():
    """jmp, as in Haiku's ImageNet example: a Python-float scale is weakly typed, so float16 divides in float16."""
    scaled = f16(2.0**-10)  # of a true gradient of 2**-25, half of float16's smallest number
    theirs = jax.jit(lambda scaler, grad: scaler.unscale(grad))(jmp.DynamicLossScale(2.0**15), scaled)
    assert theirs.dtype == f16
    assert theirs == 0

    tx = loss_scaling(optax.sgd(1.0), StaticScaler(2.0**15))
    update, _ = jax.jit(tx.update)(scaled, tx.init(scaled))
    assert update.dtype == f32
    assert update == -(2.0**-25)


def test_b04_leaves_without_a_gradient_are_left_alone():
    """jmp: scaling turns integers into floats, and raises on PRNG keys and on float0, an integer's gradient."""
    theirs = jmp.DynamicLossScale(f32(8))
    assert theirs.scale(jnp.arange(3)).tolist() == [0.0, 8.0, 16.0]
    assert theirs.scale(jnp.arange(3)).dtype == f32
    for leaf in (jax.random.key(0), np.zeros(3, jax.dtypes.float0)):
        with pytest.raises((TypeError, ValueError)):
            theirs.unscale(leaf)

    params = {"w": f32(1), "count": jnp.arange(3), "key": jax.random.key(0)}
    tx = loss_scaling(optax.sgd(1.0), StaticScaler(8.0))
    state = tx.init(params)
    grads = jax.grad(lambda p: jaxmp.scale_loss(p["w"], state), allow_int=True)(params)
    assert grads["count"].dtype == jax.dtypes.float0
    updates, _ = tx.update(grads, state, params)
    after = jaxmp.apply_updates(params, updates)
    assert after["w"] == 0
    assert after["count"].dtype == jnp.int32
    assert after["count"].tolist() == [0, 1, 2]
    assert after["key"] == params["key"]


def test_b05_fp8_leaves_are_not_cast():
    """jmp: a policy's casts take fp8, which is quantised and has a scale elsewhere, for a float like any other."""
    leaf = jnp.array([0.5, 448], jnp.float8_e4m3fn)
    assert jmp.get_policy("p=f32,c=f16,o=f32").cast_to_compute(leaf).dtype == f16

    ours = jaxmp.parse_policy("p=f32,c=f16,o=f32")
    for cast in (ours.cast_to_param, ours.cast_to_compute, ours.cast_to_output):
        assert cast(leaf) is leaf


def test_b06_a_policy_is_read_with_spaces_and_printed_with_any_dtype():
    """jmp: a space after the comma is an unknown key; `str` of a policy of NumPy dtypes is a KeyError."""
    with pytest.raises(ValueError, match="Unknown key ' c'"):
        jmp.get_policy("p=f32, c=f16")
    with pytest.raises(KeyError):
        str(jmp.Policy(np.dtype("float32"), np.dtype("float16"), np.dtype("float32")))

    ours = jaxmp.Policy(np.dtype("float32"), "float16", jnp.float32)
    assert str(ours) == "p=f32,c=f16,o=f32"
    assert jaxmp.parse_policy("p=f32, c=f16, o=f32") == jaxmp.parse_policy(str(ours)) == ours


def test_b07_the_growth_step_unscales_with_the_scale_that_it_scaled_with():
    """mpx: unscales with the new scale, so that on every growth step loss and gradients are half of what they are."""

    def theirs(scale, w, *, grows):  # mpx.filter_value_and_grad
        scaled_loss, scaled_grad = jax.value_and_grad(lambda w: w * scale)(w)
        new_scale = scale * 2 if grows else scale
        return scaled_loss / new_scale, scaled_grad / new_scale

    assert theirs(8.0, 10.0, grows=False) == (10, 1)
    assert theirs(8.0, 10.0, grows=True) == (5, 0.5)

    tx = loss_scaling(optax.sgd(1.0), DynamicScaler(init_scale=8.0, growth_interval=3))
    state = TrainState.create({"w": f32(10)}, tx, key=jax.random.key(0))
    step = jax.jit(make_train_step(linear_loss, tx))
    seen = []
    for _ in range(6):
        state, metrics = step(state, {"x": jnp.ones(1), "weight": jnp.ones(1)})
        seen.append((compute(metrics)["loss"], float(state.params["w"]), float(jaxmp.loss_scale(state.opt_state))))
    assert seen == [(10, 9, 8), (9, 8, 8), (8, 7, 16), (7, 6, 16), (6, 5, 16), (5, 4, 32)]


def test_b08_the_setting_bfloat16_is_obeyed():
    """mpx.set_half_precision_datatype: a name is turned into a dtype, which is then thrown away."""
    setting = {"half": f16}

    def set_half(dtype):
        if isinstance(dtype, str):
            dtype = {"float16": f16, "bfloat16": bf16}[dtype]
        else:
            setting["half"] = dtype

    set_half("bfloat16")
    assert setting["half"] == f16

    for name in ("bfloat16", "mixed_bfloat16"):
        ours = jaxmp.with_policy(nn.Dense(2).apply, jaxmp.parse_policy(name))
        jaxpr = jax.make_jaxpr(ours)({"params": {"kernel": jnp.ones((3, 2)), "bias": jnp.ones(2)}}, jnp.ones((1, 3)))
        assert products(jaxpr) == [bf16]


def test_b09_scaling_and_unscaling_changes_no_bit():
    """mpx: the cap of the scale, 65504, is no power of two, and changes 0.16 % of all float32 gradients."""
    grads = jnp.asarray(np.random.RandomState(0).randn(100_000) * 1e-3, f32)
    cap = f32(65504)
    changed = np.mean(np.asarray((grads * cap) * (1 / cap) != grads))
    assert round(100 * changed, 2) == 0.16

    for make in (lambda: StaticScaler(65504.0), lambda: DynamicScaler(max_scale=65504.0)):
        with pytest.raises(InputError, match="power of two, such as 32768"):
            make()
    for scale in (2.0**15, 2.0**24):
        tx = loss_scaling(optax.sgd(1.0), StaticScaler(scale))
        updates, _ = tx.update(grads * scale, tx.init(grads))
        assert bits(updates) == bits(-grads)


def test_b10_the_scale_has_a_cap_and_a_floor_and_comes_back_from_both():
    """jaxamp and Keras: no cap, so that the scale reaches inf and stays; Keras has no floor, and stays at 0."""

    def repeat(change, scale):
        return jax.lax.fori_loop(0, 200, lambda _, scale: change(scale), f32(scale))

    grown = repeat(lambda scale: scale * 2, 2.0**15)  # jaxamp.increment_state, Keras' upscale
    assert grown == jnp.inf
    assert repeat(lambda scale: scale / 2, grown) == jnp.inf
    lowered = repeat(lambda scale: scale / 2, 2.0**15)  # Keras' _stateful_handle_non_finite_grads
    assert lowered == 0
    assert repeat(lambda scale: scale * 2, lowered) == 0

    ours = scales(DynamicScaler(growth_interval=1), [True] * 200 + [False] * 200 + [True] * 200)
    assert ours[199] == 2.0**24
    assert ours[399] == 2.0**-14
    assert ours[599] == 2.0**24


def test_b11_the_first_float16_step_is_applied_and_one_program_is_compiled():
    """flax DynamicScale: the default scale is a Python float, weakly typed: inf in float16, and one compile more."""

    def loss(p):
        return p.astype(f16)

    theirs = jax.jit(lambda scale, p: scale.value_and_grad(loss)(p))
    scale, finite = DynamicScale(), []
    assert scale.scale * f16(1) == jnp.inf
    for _ in range(3):
        scale, is_finite, *_ = theirs(scale, f32(1))
        finite.append(bool(is_finite))
    assert finite == [False, True, True]
    assert theirs._cache_size() == 2

    tx = loss_scaling(optax.sgd(0.1))

    @jax.jit
    def ours(state, p):
        return tx.update(jax.grad(lambda p: jaxmp.scale_loss(loss(p), state))(p), state, p)

    state, finite = tx.init(f32(1)), []
    for _ in range(3):
        _, state = ours(state, f32(1))
        finite.append(bool(jaxmp.last_step_finite(state)))
    assert finite == [True, True, True]
    assert ours._cache_size() == 1


@pytest.mark.slow
def test_b12_fp8_metadata_is_not_divided_by_the_scale():
    """flax DynamicScale: the "gradient" of fp8 metadata is its new value, and is divided by the loss scale.

    `loss_scaling` leaves gradients as they are, and Flax's TrainState hands the metadata past the optimizer.
    """
    model, x = nn.Dense(4, dot_general_cls=nn.Fp8DirectDotGeneralOp), jnp.full((8, 4), 2.0)
    variables = jax.jit(model.init)(jax.random.key(0), x)

    @jax.jit
    def loss(variables):
        return jnp.mean(model.apply(variables, x) ** 2)

    def metadata(variables):
        found = variables["_overwrite_with_gradient"]["Fp8DirectDotGeneralOp_0"]
        return found["input_scale"][0], found["input_amax_history"][0]

    assert metadata(jax.grad(loss)(variables)) == (1, 2), "the scale of x, and its largest value"
    *_, theirs = DynamicScale(scale=f32(1024)).value_and_grad(loss)(variables)
    assert metadata(theirs) == (1 / 1024, 2 / 1024)

    tx = loss_scaling(optax.sgd(0.1), StaticScaler(1024.0))
    state = flax_train_state.TrainState.create(apply_fn=model.apply, params=variables, tx=tx)
    grads = jax.grad(lambda variables: jaxmp.scale_loss(loss(variables), state.opt_state))(variables)
    ours = state.apply_gradients(grads=grads)
    assert metadata(ours.params) == (1, 2)
    assert jaxmp.last_step_finite(ours.opt_state)
    assert bits(ours.params["params"]) != bits(variables["params"])

    # The same where metadata stands among the parameters, and its "gradient" is not even finite.
    grads["_overwrite_with_gradient"] = jax.tree.map(lambda g: g * jnp.inf, grads["_overwrite_with_gradient"])
    for inner in (optax.sgd(0.1, momentum=0.9), optax.adamw(0.1, weight_decay=0.1)):
        tx = loss_scaling(inner, StaticScaler(1024.0))
        opt_state = jax.jit(tx.init)(variables)
        updates, opt_state = jax.jit(tx.update)(grads, opt_state, variables)
        assert jaxmp.last_step_finite(opt_state)
        after = optax.apply_updates(variables, updates)
        name = "_overwrite_with_gradient"
        assert bits(after[name]) == bits(variables[name]) and bits(after["params"]) != bits(variables["params"])


class WithBatchNorm(nn.Module):
    @nn.compact
    def __call__(self, x, *, train):
        return nn.Dense(2)(nn.BatchNorm(use_running_average=not train)(x))


@pytest.mark.slow
def test_b13_an_overflow_leaves_schedule_and_batch_statistics_as_they_were():
    """flax's ImageNet and WMT examples: parameters and moments are selected, batch statistics and step are not.

    Keras counts the step as well, and so does torch's learning rate schedule, which is stepped beside the optimizer.
    """
    model, x = WithBatchNorm(), jnp.full((8, 4), 1e30)
    variables = model.init(jax.random.key(0), x, train=False)
    params, statistics = variables["params"], {"batch_stats": variables["batch_stats"]}

    def theirs(params):  # examples/imagenet/train.py
        half = jax.tree.map(lambda p: p.astype(f16), params)
        logits, new = model.apply({"params": half, **statistics}, x.astype(f16), train=True, mutable=["batch_stats"])
        return jnp.mean(logits.astype(f32)), new

    _, finite, (_, new), grads = jax.jit(DynamicScale(scale=f32(1024)).value_and_grad(theirs, has_aux=True))(params)
    state = flax_train_state.TrainState.create(apply_fn=model.apply, params=params, tx=optax.sgd(0.1))
    after = state.apply_gradients(grads=grads)
    after = after.replace(params=jax.tree.map(lambda a, b: jnp.where(finite, a, b), after.params, params))
    assert not finite
    assert bits(after.params) == bits(params)
    assert after.step == 1, "and the learning rate is a function of it"
    assert not np.all(np.isfinite(new["batch_stats"]["BatchNorm_0"]["mean"]))

    tx = loss_scaling(optax.adam(optax.linear_schedule(0.1, 0.0, 10)), DynamicScaler(init_scale=1024.0))
    state = TrainState.create(params, tx, key=jax.random.key(0), model_state=statistics)
    step = jax.jit(make_train_step(make_loss(model, Classification(), "mixed_float16"), tx))
    after, _ = step(state, {"image": x, "label": jnp.zeros(8, int), "weight": jnp.ones(8)})
    assert jaxmp.skipped_steps(after.opt_state) == 1
    assert bits((after.params, after.model_state)) == bits((params, statistics))
    counts = optax.tree.get_all_with_path(after.opt_state, "count")
    assert [int(count) for _, count in counts] == [0, 0], "of Adam and of the schedule"
    assert after.step == 1, "attempts are counted, but no schedule reads them"


@pytest.mark.eight_devices
@pytest.mark.slow
def test_b14_replicas_agree_on_every_step():
    """flax DynamicScale without `axis_name`: each replica looks at its own gradients, and goes its own way."""

    def theirs(scale, w, x):
        scale, finite, _, grad = scale.value_and_grad(lambda w: (w * x).astype(f32))(w)
        return scale.scale, jnp.where(finite, w - 0.5 * grad, w)

    x = jnp.array([1, jnp.inf, 1, 1])
    theirs = jax.pmap(theirs, in_axes=(None, None, 0), devices=jax.devices()[:4])
    scale, w = theirs(DynamicScale(scale=f32(8)), f32(1), x)
    assert scale.tolist() == [8, 4, 8, 8]
    assert w.tolist() == [0.5, 1, 0.5, 0.5]

    tx = loss_scaling(optax.sgd(0.5), DynamicScaler(init_scale=8.0))
    x = jnp.ones(8).at[1].set(jnp.inf)
    state, step, batch = eight_devices(linear_loss, tx, {"w": f32(1)}, {"x": x, "weight": jnp.ones(8)})
    state, _ = step(state, batch)
    for leaf, expected in ((jaxmp.loss_scale(state.opt_state), 4), (state.params["w"], 1)):
        assert [float(shard.data) for shard in leaf.addressable_shards] == [expected] * 8


def test_b15_accumulation_survives_an_inf_and_ends_in_float32():
    """optax.MultiSteps: the accumulator is reset by `0 * inf`, NaN for ever, and cast to the gradients' dtype."""

    def updates(tx, grads):
        update, state, found = jax.jit(tx.update), tx.init(f32(0)), []
        for grad in grads:
            out, state = update(grad, state)
            found.append(float(out))
        return found

    theirs = optax.MultiSteps(optax.sgd(1.0), 2)
    ours = loss_scaling(optax.MultiSteps(optax.sgd(1.0), 2), NoScaler())
    one_inf = [f32(g) for g in (1, jnp.inf, 1, 3, 3, 5)]
    assert np.isnan(updates(theirs, one_inf)[3::2]).all()
    assert updates(ours, one_inf) == [0, 0, -1, 0, -3, 0], "the mean of 1 and 1, of 3 and 3; 5 waits"

    halves = [f16(1), f16(1 + 2.0**-10)]  # neighbours: float16 has no mean of theirs
    assert updates(theirs, halves) == [0, -1]
    assert updates(ours, halves) == [0, -(1 + 2.0**-11)]


def test_b16_nothing_outside_the_transaction_runs_on_a_skipped_step():
    """optax.apply_if_finite: what is chained after it runs all the same; schedules count, weight decay shrinks."""
    w, overflow = jnp.array([1, -0.0]), jnp.array([1, jnp.inf])
    outside = (optax.add_decayed_weights(0.1), optax.scale_by_learning_rate(optax.linear_schedule(1.0, 0.0, 10)))
    theirs = optax.chain(optax.apply_if_finite(optax.scale_by_adam(), 100), *outside)
    update, state = theirs.update(overflow, theirs.init(w), w)
    assert update.tolist() == [-f32(0.1), 0], "for gradients that were thrown away"
    assert state[2].count == 1

    ours = loss_scaling(optax.chain(optax.scale_by_adam(), *outside))
    update, state = ours.update(overflow, ours.init(w), w)
    assert bits(jaxmp.apply_updates(w, update)) == bits(w)
    assert state.inner_state[2].count == 0
    with pytest.raises(InputError, match="Put all of it inside"):
        make_train_step(linear_loss, optax.chain(loss_scaling(optax.scale_by_adam()), *outside))


def test_b17_a_nan_is_not_multiplied_away_and_does_not_outlast_its_step():
    """levanter's SkipStep: `0 * NaN` is NaN; and in a window of 128 losses, a NaN makes every threshold NaN."""

    def theirs(window, loss):  # (losses of late, factor of the update); later versions choose by `lax.cond`
        ok = loss <= jnp.mean(window) + 6 * jnp.std(window)
        return jnp.append(window[1:], loss), jnp.where(ok, 1.0, 0.0)

    window, factor = theirs(jnp.ones(128), f32(jnp.nan))
    assert factor == 0
    assert jnp.isnan(factor * f32(jnp.nan)), "the update of the skipped step"
    skipped = 0
    while factor == 0:
        window, factor = theirs(window, f32(1))
        skipped += factor == 0
    assert skipped == 128

    ours = loss_scaling(optax.sgd(0.5, momentum=0.9))
    w = jnp.array([1, -0.0])
    update, state = ours.update(jnp.array([1, jnp.nan]), ours.init(w), w, value=f32(jnp.nan))
    assert bits(jaxmp.apply_updates(w, update)) == bits(optax.apply_updates(w, update)) == bits(w)
    assert bits(state.inner_state) == bits(ours.init(w).inner_state)
    update, state = ours.update(jaxmp.loss_scale(state) * jnp.ones(2), state, w, value=f32(1))
    assert update.tolist() == [-0.5, -0.5]
    assert jaxmp.skipped_steps(state) == 1


def test_b18_the_scale_does_not_depend_on_when_a_run_was_restarted(tmp_path):
    """fairseq and Hugging Face: the scale is in the checkpoint, the count of good steps is not."""

    def theirs(restart_every):  # fairseq's DynamicLossScaler.update, with a scale_window of 3
        scale = 8.0
        for step in range(6):
            if step % restart_every == 0:
                iteration, last_overflow = 0, -1  # its state_dict is {"loss_scale": scale}
            if (iteration - last_overflow) % 3 == 0:
                scale *= 2
            iteration += 1
        return scale

    assert (theirs(restart_every=6), theirs(restart_every=2)) == (32, 8)

    def ours(restart_every):
        tx = loss_scaling(optax.sgd(0.1), DynamicScaler(init_scale=8.0, growth_interval=3))
        checkpoints = Checkpoints(tmp_path / str(restart_every))
        state = tx.init(f32(1))
        for step in range(6):
            if step % restart_every == 0:
                checkpoints.save(step, state)
                _, state = checkpoints.restore(jax.eval_shape(tx.init, f32(1)))
            _, state = tx.update(f32(1), state)
        checkpoints.close()
        return jaxmp.loss_scale(state)

    assert (ours(restart_every=6), ours(restart_every=2)) == (32, 32)


def test_b19_a_checkpoint_is_not_cast_when_it_is_restored(tmp_path):
    """Orbax: casts to the template's dtype without a word: a master weight comes back rounded to bfloat16."""
    import orbax.checkpoint as ocp

    saved = {"params": {"w": f32(1 + 2.0**-10)}}
    template = {"params": {"w": jax.ShapeDtypeStruct((), bf16, sharding=saved["params"]["w"].sharding)}}
    with ocp.StandardCheckpointer() as theirs:
        theirs.save(tmp_path / "theirs", saved)
        theirs.wait_until_finished()
        restored = theirs.restore(tmp_path / "theirs", template)
    assert restored["params"]["w"].dtype == bf16
    assert restored["params"]["w"] == 1

    ours = Checkpoints(tmp_path / "ours")
    ours.save(0, saved)
    with pytest.raises(InputError, match=r"params/w: saved float32\[\], expected bfloat16\[\]"):
        ours.restore(template)
    _, restored = ours.restore(saved)
    assert bits(restored) == bits(saved)
    ours.close()


# --- T: traps of JAX


class Scanned(nn.Module):
    """A layer whose one weight is used 1000 times."""

    @nn.compact
    def __call__(self, x):
        scan = nn.scan(
            lambda layer, carry, _: (layer(carry), None),
            variable_broadcast="params",
            split_rngs={"params": False},
            length=1000,
        )
        return scan(nn.Dense(1, use_bias=False), x, None)[0]


@pytest.mark.slow
def test_t01_the_gradients_of_1000_uses_of_a_weight_add_up_in_float32():
    """A weight that is cast outside of a scan: its cotangents add up in bfloat16, where 256 + 1 is 256."""

    def uses(w, cast_before, cast_at_use):
        w = w.astype(cast_before)

        def body(total, _):
            return total + (w.astype(cast_at_use) * bf16(1)).astype(f32), None

        return jax.lax.scan(body, f32(0), length=1000)[0]

    assert jax.grad(uses)(f32(1), cast_before=bf16, cast_at_use=bf16) == 256
    assert jax.grad(uses)(f32(1), cast_before=f32, cast_at_use=bf16) == 1000

    apply = jaxmp.with_policy(Scanned().apply, jaxmp.parse_policy("mixed_bfloat16"))
    params = {"Dense_0": {"kernel": jnp.ones((1, 1))}}
    grads = jax.grad(lambda params: apply({"params": params}, jnp.ones((1, 1)))[0, 0])(params)
    assert grads["Dense_0"]["kernel"] == 1000

    def plain(w):
        return jax.lax.scan(lambda total, _: (total + jnp.dot(jnp.ones(1), w), None), f32(0), length=1000)[0]

    assert jax.grad(jaxmp.autocast(plain))(jnp.ones(1)) == 1000


@pytest.mark.slow
def test_t02_the_gradient_of_a_bias_over_10000_rows_is_10000():
    """The transpose of broadcasting is a sum in the cotangent's dtype: for bfloat16 rows, 8192."""
    x, params = jnp.zeros((10_000, 4)), {"kernel": jnp.ones((4, 4)), "bias": jnp.zeros(4)}

    def bias_gradient(apply):
        return jax.jit(jax.grad(lambda p: jnp.sum(apply({"params": p}, x).astype(f32))))(params)["bias"]

    assert bias_gradient(nn.Dense(4, dtype=bf16).apply).tolist() == [8192] * 4
    ours = jaxmp.with_policy(nn.Dense(4).apply, jaxmp.parse_policy("mixed_bfloat16"))
    assert bias_gradient(ours).tolist() == [10_000] * 4


@pytest.mark.eight_devices
@pytest.mark.slow
def test_t03_gradients_are_reduced_in_float32():
    """`pmean` sums in its operand's dtype: the mean of four float16 40000s is inf."""
    mesh = jax.make_mesh((4,), ("data",), axis_types=(AxisType.Auto,), devices=jax.devices()[:4])
    theirs = jax.shard_map(lambda g: jax.lax.pmean(g, "data"), mesh=mesh, in_specs=P("data"), out_specs=P())
    assert jax.jit(theirs)(jnp.full(4, 40_000, f16)) == jnp.inf

    def ours(grads, reduce_dtype):
        devices = Parallel("jit").make(8)
        reduce = devices.replicas(reduce_dtype).sum_gradients
        return jax.jit(jax.shard_map(reduce, mesh=devices.mesh, in_specs=P("data"), out_specs=P(), check_vma=False))(
            grads
        )

    total = ours(jnp.full(8, 40_000, f16), f32)
    assert total.dtype == f32
    assert total == 320_000
    largest = float(jnp.finfo(bf16).max)  # the sum is divided beforehand, so that no partial sum overflows
    assert ours(jnp.array([largest, largest, largest, 0, 0, -largest, -largest, -largest]), bf16) == 0
    with pytest.raises(InputError, match="float16 sums overflow"):
        jaxmp.parse_policy("mixed_float16,reduce=f16")


@pytest.mark.slow
def test_t04_the_loss_over_a_vocabulary_is_computed_in_float32():
    """`logsumexp`, `softmax` and `log_softmax` sum in float16: 65,536 equal logits are one too many."""
    logits = jnp.zeros((1, 65_536), f16)
    labels, weight = jnp.zeros(1, int), jnp.ones(1)
    assert jax.nn.logsumexp(logits) == jnp.inf
    assert jax.nn.softmax(logits)[0, 0] == 0
    assert jax.nn.log_softmax(logits)[0, 0] == -jnp.inf
    assert optax.softmax_cross_entropy_with_integer_labels(logits, labels) == jnp.inf

    loss, _ = jax.jit(Classification())(logits, {"label": labels, "weight": weight})
    assert compute({"loss": loss})["loss"] == pytest.approx(16 * np.log(2), rel=1e-6)
    softmax = jax.jit(jaxmp.autocast(lambda x, kernel: jax.nn.softmax(x @ kernel), dtype=f16))
    assert softmax(jnp.ones((1, 1)), jnp.zeros((1, 65_536)))[0, 0] == 2.0**-16


@pytest.mark.slow
def test_t05_norms_are_summed_in_float32():
    """`jnp.sum`, `linalg.norm`, `dot` and optax's global norm return, and overflow in, the dtype of their input."""
    grads = jnp.full(4, 300, f16)
    assert jnp.linalg.norm(grads) == jnp.inf
    assert jnp.dot(grads, grads) == jnp.inf
    assert jnp.sum(grads * 100) == jnp.inf
    assert optax.tree.norm(grads) == jnp.inf
    clip = optax.clip_by_global_norm(60.0)
    assert clip.update(grads, clip.init(grads))[0].tolist() == [0] * 4

    assert jaxmp.global_norm(grads) == 600
    clip = jaxmp.clip_by_global_norm(60.0)
    assert clip.update(grads, clip.init(grads))[0].tolist() == [30] * 4
    ones = jnp.ones(999, f16)
    np.testing.assert_allclose(jaxmp.global_norm(ones), np.sqrt(999), rtol=1e-6)


def test_t06_rounding_to_16_bits_is_the_same_in_and_out_of_jit():
    """XLA keeps more precision than 16 bits between two operations of one program: jit and eager differ."""

    def theirs(w):
        return (w * bf16(1) + bf16(2.0**-8) + bf16(2.0**-8)).astype(f32)

    assert theirs(bf16(1)) == 1, "each 2**-8 is half a unit in the last place, and is rounded to even"
    assert jax.jit(theirs)(bf16(1)) != 1

    def emulated(w):
        return jaxmp.quantize(jaxmp.quantize(w + 2.0**-8, "bf16") + 2.0**-8, "bf16")

    def updated(w):
        return jaxmp.apply_updates(jaxmp.apply_updates(w, f32(2.0**-8)), f32(2.0**-8)).astype(f32)

    assert emulated(f32(1)) == jax.jit(emulated)(f32(1)) == 1
    assert updated(bf16(1)) == jax.jit(updated)(bf16(1)) == 1


def test_t07_every_scalar_in_the_state_is_strongly_typed():
    """A Python float in the state is weakly typed: float16 stays float16, and the first step compiles twice."""

    def two_updates(tx):
        update, state = jax.jit(tx.update), tx.init(f16(1))
        first, state = update(f16(1), state)
        update(f16(1), state)
        return first, update._cache_size()

    halving = optax.GradientTransformation(
        lambda params: 2.0**16, lambda grads, rate, params=None: (grads * rate, rate * f32(0.5))
    )
    assert two_updates(halving) == (jnp.inf, 2)
    assert two_updates(loss_scaling(halving, NoScaler())) == (2.0**16, 1)

    tx = loss_scaling(optax.adam(optax.linear_schedule(0.1, 0.0, 10)))
    state = TrainState.create({"w": f32(1)}, tx, key=jax.random.key(0), ema=True)
    step = jax.jit(make_train_step(linear_loss, tx, ema_decay=0.9))
    assert jaxmp.scale_loss(f16(1), state.opt_state).dtype == f32
    for _ in range(3):
        assert not any(jax.typeof(leaf).weak_type for leaf in jax.tree.leaves(state))
        state, _ = step(state, {"x": jnp.ones(1), "weight": jnp.ones(1)})
    assert step._cache_size() == 1


class Tempered(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.Dense(2)(x * jnp.array(0.5, f32))


def test_t08_a_float32_scalar_does_not_turn_a_half_product_into_a_float32_one():
    """bfloat16 with float16, or with a float32 scalar *array*, is float32, and nothing says so."""
    assert (bf16(1) + f16(1)).dtype == f32
    assert (bf16(1) * 0.5).dtype == bf16
    assert (bf16(1) * jnp.array(0.5, f32)).dtype == f32
    params, x = {"Dense_0": {"kernel": jnp.ones((3, 2)), "bias": jnp.ones(2)}}, jnp.ones((1, 3))
    policy = jmp.get_policy("p=f32,c=bf16,o=f32")
    theirs = jax.make_jaxpr(lambda p, x: Tempered().apply({"params": p}, x))(*policy.cast_to_compute((params, x)))
    assert products(theirs) == [f32]

    ours = jaxmp.with_policy(Tempered().apply, jaxmp.parse_policy("mixed_bfloat16"))
    assert products(jax.make_jaxpr(ours)({"params": params}, x)) == [bf16]

    def plain(kernel, x):
        return (x * jnp.array(0.5, f32)) @ kernel

    assert products(jax.make_jaxpr(jaxmp.autocast(plain))(jnp.ones((3, 2)), x)) == [bf16]


def test_t09_overflow_to_fp8_saturates():
    """A cast of what is too large gives NaN in e4m3fn, which has no infinity, and inf in e5m2."""
    x = f32(1e6)
    assert jnp.isnan(x.astype(jnp.float8_e4m3fn))
    assert jnp.isinf(x.astype(jnp.float8_e5m2))

    assert jaxmp.quantize(x, "e4m3").astype(jnp.float8_e4m3fn) == 448
    assert jaxmp.quantize(x, "e5m2").astype(jnp.float8_e5m2) == 57_344


def test_t10_no_scale_and_no_inverse_of_one_is_subnormal():
    """Float32's subnormals are flushed: 2**-126 / 2 is 0, and so is 1 / 2**127, by which gradients are unscaled."""
    assert f32(2.0**-126) / 2 == 0
    assert 1 / f32(2.0**127) == 0

    for bad in ({"min_scale": 2.0**-127}, {"max_scale": 2.0**127}):
        with pytest.raises(InputError, match=r"2\*\*-126 to 2\*\*126"):
            DynamicScaler(**bad)
    widest = DynamicScaler(growth_interval=1, min_scale=2.0**-126, max_scale=2.0**126)
    for finite, end in ((False, 2.0**-126), (True, 2.0**126)):
        scale = f32(scales(widest, [finite] * 200)[-1])
        assert scale == end
        assert scale * (1 / scale) == 1


def test_t11_a_step_is_skipped_by_selection_and_in_place():
    """optax.apply_if_finite decides by `lax.cond`, a round trip to the host on a GPU. `where` costs no memory."""
    w = jnp.ones((512, 512))

    def theirs(w, state):
        return optax.apply_if_finite(optax.adam(0.1), 100).update(w, state, w)

    def ours(w, state):
        return loss_scaling(optax.adam(0.1)).update(w, state, w)

    assert " cond[" in str(jax.make_jaxpr(theirs)(w, optax.apply_if_finite(optax.adam(0.1), 100).init(w)))
    assert " cond[" not in str(jax.make_jaxpr(ours)(w, loss_scaling(optax.adam(0.1)).init(w)))

    def memory(tx):
        state = TrainState.create({"w": w}, tx, key=jax.random.key(0))
        batch = {"x": jnp.ones(512), "weight": jnp.ones(512)}
        step = Parallel("jit").make(512).compile(make_train_step(linear_loss, tx), (0, 0))
        size = sum(leaf.nbytes for leaf in jax.tree.leaves((state.params, state.opt_state, state.step)))
        return step.lower(state, batch).compile().memory_analysis(), size + jax.random.key_data(state.key).nbytes

    guarded, size = memory(loss_scaling(optax.adam(0.1)))
    assert guarded.alias_size_in_bytes == size, "all of the donated state"
    unguarded, _ = memory(optax.adam(0.1))
    assert guarded.temp_size_in_bytes - unguarded.temp_size_in_bytes < w.nbytes / 100


def all_reduced(compiled):
    """Dtypes and shapes of what a compiled program sums over devices."""
    return " ".join(re.findall(r"= (.*) all-reduce\(", compiled.as_text()))


@pytest.mark.eight_devices
@pytest.mark.slow
def test_t12_the_gradient_collective_runs_in_the_reduce_dtype():
    """Under plain `jit` the sum over devices sits where the partial product is, in the product's dtype: float16."""

    def product(w, x):  # cast at its use; the transpose of the cast, to float32, comes after the sum
        return jnp.sum((x.astype(f16) @ w.astype(f16)).astype(f32))

    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
    w = jax.device_put(jnp.zeros((4, 4)), NamedSharding(mesh, P()))
    x = jax.device_put(jnp.full((8, 4), 40_000.0), NamedSharding(mesh, P("data")))
    theirs = jax.jit(jax.grad(product)).lower(w, x).compile()
    assert "f16[4,4]" in all_reduced(theirs)
    assert np.isinf(theirs(w, x)).all()

    def loss(params, model_state, batch, key):
        return product(params["w"], batch["x"]), (jnp.sum(batch["weight"]), {}, model_state)

    batch = {"x": x, "weight": jnp.full(8, 1 / 8)}
    state, ours, batch = eight_devices(loss, loss_scaling(optax.sgd(1.0), NoScaler()), {"w": jnp.zeros((4, 4))}, batch)
    reduced = all_reduced(ours.lower(state, batch).compile())
    assert "f32[4,4]" in reduced
    assert "f16[" not in reduced
    state, _ = ours(state, batch)
    assert np.all(np.asarray(state.params["w"]) == -320_000)


DEADLOCK = """
import jax, jax.numpy as jnp
from jax.sharding import AxisType, PartitionSpec as P

mesh = jax.make_mesh((2,), ("data",), axis_types=(AxisType.Auto,))

def reduced_unless_it_overflowed(grad):
    finite = jnp.all(jnp.isfinite(grad))  # of this device
    return jax.lax.cond(finite, lambda g: jax.lax.psum(g, "data"), lambda g: g, grad)

step = jax.jit(jax.shard_map(
    reduced_unless_it_overflowed, mesh=mesh, in_specs=P("data"), out_specs=P("data"), check_vma=False))
print("both finite", step(jnp.ones(2)).tolist(), flush=True)
print("one overflows", step(jnp.array([1, jnp.inf])).tolist(), flush=True)
"""


@pytest.mark.eight_devices
@pytest.mark.slow
def test_t13_whether_to_skip_is_decided_after_the_collective():
    """A collective inside `lax.cond`, in `shard_map`: devices that decide otherwise wait for each other for ever."""
    wait = (
        "--xla_cpu_collective_call_warn_stuck_timeout_seconds=1 --xla_cpu_collective_call_terminate_timeout_seconds=10"
    )
    env = {**os.environ, "JAX_NUM_CPU_DEVICES": "2", "XLA_FLAGS": wait}
    theirs = subprocess.run(
        [sys.executable, "-c", DEADLOCK], capture_output=True, text=True, timeout=120, check=False, env=env
    )
    assert theirs.stdout == "both finite [2.0, 2.0]\n"
    assert theirs.returncode != 0
    assert "only 1 of them arrived" in theirs.stderr

    x = jnp.ones(8).at[1].set(jnp.inf)
    tx = loss_scaling(optax.sgd(1.0))
    state, step, batch = eight_devices(linear_loss, tx, {"w": f32(1)}, {"x": x, "weight": jnp.ones(8)})
    sums = list(sums_over_devices(jax.make_jaxpr(step)(state, batch).jaxpr))
    assert len(sums) > 1
    assert not any("cond" in inside for _, inside in sums)
    state, _ = step(state, batch)
    assert jaxmp.skipped_steps(state.opt_state) == 1


@pytest.mark.slow
def test_t14_optimizers_compute_in_float32_whatever_the_gradients_are():
    """Adam's eps of 1e-8 is 0 in float16: a zero gradient is 0/0. Its b2 of 0.999 is 1 in bfloat16: no decay."""
    zero = {"w": jnp.zeros((4, 4), f16)}
    optimizers = (
        *(optax.adam, optax.adamw, optax.rmsprop, optax.adafactor),
        *(optax.nadam, optax.novograd, optax.adan, optax.contrib.muon),
    )
    for optimizer in optimizers:
        theirs = optimizer(1e-3)
        updates, _ = theirs.update(zero, theirs.init(zero), zero)
        assert jnp.isnan(updates["w"]).all(), optimizer.__name__
        ours = loss_scaling(optimizer(1e-3))
        updates, _ = ours.update(zero, ours.init(zero), zero)
        assert jnp.isfinite(updates["w"]).all(), optimizer.__name__

    def second_moment(tx):  # after a gradient of 1, and a hundred of 0
        def step(state, grad):
            return tx.update(grad, state)[1], None

        state, _ = jax.lax.scan(step, tx.init(bf16(0)), jnp.zeros(101, bf16).at[0].set(1))
        return optax.tree.get(state, "nu")

    assert second_moment(optax.scale_by_adam()) == bf16(0.001)
    for ours in (loss_scaling(optax.scale_by_adam(), NoScaler()), jaxmp.float32_math(optax.scale_by_adam())):
        np.testing.assert_allclose(second_moment(ours), 0.001 * 0.999**100, rtol=1e-5)


@pytest.mark.slow
def test_t15_the_gradient_of_an_embedding_is_summed_in_float32():
    """nn.Embed in half scatters its gradient into half, cast at use or not: 1000 uses of a row give 256, 74 % off."""
    ids, params = jnp.arange(3000) % 3, {"embedding": jnp.ones((3, 2))}

    def gradient(apply):
        return jax.grad(lambda p: jnp.sum(apply({"params": p}, ids).astype(f32)))(params)["embedding"]

    def cast_at_use(variables, ids):
        return variables["params"]["embedding"].astype(bf16)[ids]

    for theirs in (nn.Embed(3, 2, dtype=bf16).apply, cast_at_use):
        assert np.all(np.asarray(gradient(theirs)) == 256)
    ours = jaxmp.with_policy(nn.Embed(3, 2).apply, jaxmp.parse_policy("p=f32,c=bf16,o=bf16"))
    assert ours({"params": params}, ids).dtype == bf16
    assert np.all(np.asarray(gradient(ours)) == 1000)


@pytest.mark.eight_devices
@pytest.mark.slow
def test_t16_gradients_are_reduced_once_after_the_scan():
    """`grad` in a `shard_map` with `check_vma=True`, the default: a psum at each use of a weight, in half."""

    def uses(w, x):  # 100 of them
        def body(total, _):
            return total + (w.astype(f16) * x.astype(f16)).astype(f32), None

        return jnp.sum(jax.lax.scan(body, jnp.zeros_like(x), length=100)[0])

    x = jnp.full(8, 10_000.0)
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
    theirs = jax.shard_map(jax.grad(uses), mesh=mesh, in_specs=(P(), P("data")), out_specs=P())
    ((dtype, inside),) = sums_over_devices(jax.make_jaxpr(theirs)(f32(1), x).jaxpr)
    assert dtype == f16
    assert "scan" in inside
    assert jax.jit(theirs)(f32(1), x) == jnp.inf, "8 * 10000 is more than 65504"

    def ours(params, model_state, batch, key):
        return uses(params["w"], batch["x"]), (jnp.sum(batch["weight"]), {}, model_state)

    batch = {"x": x, "weight": jnp.full(8, 1 / 8)}
    state, step, batch = eight_devices(ours, loss_scaling(optax.sgd(1.0), NoScaler()), {"w": f32(0)}, batch)
    sums = list(sums_over_devices(jax.make_jaxpr(step)(state, batch).jaxpr))
    assert {dtype for dtype, _ in sums} == {np.dtype("float32")}
    assert not any("scan" in inside for _, inside in sums)
    state, _ = step(state, batch)
    assert state.params["w"] == -8_000_000


def test_t17_the_optimizer_state_keeps_its_dtypes_with_bfloat16_parameters():
    """Float32 gradients turn moments that began as bfloat16 into float32: a TypeError in loops, a second compile."""
    w, grads = bf16(1), jnp.ones(3, f32)

    def run(tx):
        return jax.lax.scan(lambda state, grad: (tx.update(grad, state, w)[1], None), tx.init(w), grads)[0]

    with pytest.raises(TypeError, match="carry"):
        run(optax.adam(0.1))
    compiled = jax.jit(optax.adam(0.1).update)
    _, state = compiled(grads[0], optax.adam(0.1).init(w))
    compiled(grads[0], state)
    assert compiled._cache_size() == 2

    for ours in (loss_scaling(optax.adam(0.1), NoScaler()), jaxmp.float32_math(optax.adam(0.1))):
        before, after = jax.eval_shape(ours.init, w), run(ours)
        assert [x.dtype for x in jax.tree.leaves(after)] == [x.dtype for x in jax.tree.leaves(before)]
        assert optax.tree.get(after, "mu").dtype == f32
