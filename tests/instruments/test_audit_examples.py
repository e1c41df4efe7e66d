"""`audit` on train steps as the Flax and Haiku ImageNet examples write them: their published faults are found (B3, B11,
B13 of the numerics contract), at their place, and nothing else is said of them. Written against the libraries."""

import functools
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import jmp
import optax
import pytest
from flax.training import train_state
from flax.training.dynamic_scale import DynamicScale

from jaxmp.instruments.audit import audit

F16, F32 = jnp.float16, jnp.float32


def of(shape, dtype=F32):
    return jax.ShapeDtypeStruct(shape, dtype)


def found(report):
    return {(finding.rule, finding.path) for finding in report.findings}


class Net(nn.Module):
    axis_name: str | None = None

    @nn.compact
    def __call__(self, x):
        x = nn.Conv(8, (3, 3), dtype=F16)(x)
        x = nn.relu(nn.BatchNorm(use_running_average=False, dtype=F16, axis_name=self.axis_name)(x))
        return nn.Dense(10, dtype=F16)(jnp.mean(x, axis=(1, 2))).astype(F32)


class State(train_state.TrainState):
    batch_stats: Any
    dynamic_scale: DynamicScale


def flax_step(state, batch, axis_name=None):
    """The Flax ImageNet example's: what the optimizer changed is rolled back on an overflow, and nothing else."""

    def loss_fn(params):
        variables = {"params": params, "batch_stats": state.batch_stats}
        logits, model_state = state.apply_fn(variables, batch["image"], mutable=["batch_stats"])
        return jnp.mean(optax.softmax_cross_entropy_with_integer_labels(logits, batch["label"])), model_state

    gradient = state.dynamic_scale.value_and_grad(loss_fn, has_aux=True, axis_name=axis_name)
    dynamic_scale, finite, (loss, model_state), grads = gradient(state.params)
    new = state.apply_gradients(grads=grads, batch_stats=model_state["batch_stats"])
    restore = functools.partial(jnp.where, finite)
    new = new.replace(
        opt_state=jax.tree.map(restore, new.opt_state, state.opt_state),
        params=jax.tree.map(restore, new.params, state.params),
        dynamic_scale=dynamic_scale,
    )
    return new, {"loss": loss}


def flax_state(axis_name=None):
    model = Net(axis_name)

    def create(key):
        variables = jax.jit(Net().init)(key, jnp.zeros((1, 8, 8, 3)))
        return State.create(
            apply_fn=model.apply,
            params=variables["params"],
            tx=optax.sgd(0.1, momentum=0.9),
            batch_stats=variables["batch_stats"],
            dynamic_scale=DynamicScale(),
        )

    return jax.eval_shape(create, jax.random.key(0))


BATCH = {"image": of((4, 8, 8, 3), F16), "label": of((4,), jnp.int32)}
BIASES = {("half accumulation", f"Net/{layer}") for layer in ("Conv_0", "Dense_0")}  # T2
STATISTICS = {("unguarded state", f"argument 0/batch_stats/BatchNorm_0/{name}") for name in ("mean", "var")}


def test_flaxs_example_under_jit_has_a_weak_scale_and_unguarded_statistics():  # B11, B13
    seen = found(audit(jax.jit(flax_step, donate_argnums=0), flax_state(), BATCH))
    assert ("weakly typed", "argument 0/dynamic_scale/scale") in seen
    assert ("compiles twice", "argument 0/dynamic_scale/scale") in seen
    assert seen >= STATISTICS
    # The counters of the state and of the scale are Python numbers too.
    weak = {path for rule, path in seen if rule in ("weakly typed", "compiles twice")}
    assert all("dynamic_scale" in path or path.endswith("step") for path in weak)
    assert {each for each in seen if each[0] not in ("weakly typed", "compiles twice")} == STATISTICS | BIASES


def test_flaxs_example_under_pmap_has_unguarded_statistics_and_no_half_collective():  # B13
    stacked = functools.partial(jax.tree.map, lambda x: of((1, *x.shape), x.dtype))
    step = jax.pmap(functools.partial(flax_step, axis_name="batch"), axis_name="batch", donate_argnums=0)
    report = audit(step, stacked(flax_state("batch")), stacked(BATCH))
    assert found(report) == STATISTICS | BIASES


POLICY = jmp.get_policy("params=float32,compute=float16,output=float32")


def haiku_step(loss_fn, skip_non_finite, params, opt_state, loss_scale, batch):
    """The Haiku ImageNet example's: gradients go to half before they are unscaled and summed over devices."""
    grads = jax.grad(lambda params: loss_scale.scale(loss_fn(params, batch)))(params)
    grads = loss_scale.unscale(POLICY.cast_to_compute(grads))
    grads = POLICY.cast_to_param(jax.lax.pmean(grads, axis_name="i"))
    updates, new_opt_state = optax.sgd(0.1, momentum=0.9).update(grads, opt_state)
    new_params = optax.apply_updates(params, updates)
    if skip_non_finite:
        finite = jmp.all_finite(grads)
        loss_scale = loss_scale.adjust(finite)
        new_params, new_opt_state = jmp.select_tree(finite, (new_params, new_opt_state), (params, opt_state))
    return new_params, new_opt_state, loss_scale


def haiku_rules(loss_fn, params, loss_scale, skip_non_finite=False):
    opt_state = jax.eval_shape(optax.sgd(0.1, momentum=0.9).init, params)
    batch = {"image": of((4, 12), F16), "label": of((4,), jnp.int32)}
    step = functools.partial(haiku_step, loss_fn, skip_non_finite)

    def mapped(params, opt_state, loss_scale, batch):
        return jax.vmap(lambda b: step(params, opt_state, loss_scale, b), axis_name="i")(batch)

    batch = jax.tree.map(lambda x: of((1, *x.shape), x.dtype), batch)
    report = audit(mapped, params, opt_state, loss_scale, batch)
    return report, {finding.rule for finding in report.findings}


def plain_loss(params, batch):
    logits = POLICY.cast_to_output(batch["image"] @ POLICY.cast_to_compute(params["w"]))
    return jnp.mean(optax.softmax_cross_entropy_with_integer_labels(logits, batch["label"]))


SCALES = {
    "Python float": lambda: jmp.StaticLossScale(2.0**15),
    "weak dynamic": lambda: jmp.DynamicLossScale(2.0**15),
    "float32": lambda: jmp.StaticLossScale(jnp.float32(2.0**15)),
    "float32 dynamic": lambda: jmp.DynamicLossScale(jnp.float32(2.0**15)),
}


@pytest.mark.parametrize("kind", SCALES)
def test_the_example_with_jmp_unscales_in_half_where_the_scale_is_a_python_float(kind):  # B3
    # An array of float32 lifts the gradient to float32 and nothing is lost; JAX hands a Python float on as weak.
    dynamic = "dynamic" in kind
    scale = jax.eval_shape(SCALES[kind]) if dynamic else SCALES[kind]()
    report, seen = haiku_rules(plain_loss, {"w": of((12, 10))}, scale, skip_non_finite=dynamic)
    faults = {"half unscaling", "half collective"} | ({"weakly typed"} if dynamic else set())
    assert seen == (set() if kind.startswith("float32") else faults)
    assert all(Path(__file__).name in finding.source for finding in report.findings if finding.rule[:4] == "half")


def test_the_example_with_haiku_itself_unscales_in_half():  # B3
    hk = pytest.importorskip("haiku")

    def forward(image):
        return hk.nets.MLP([16, 10])(image)

    model = hk.without_apply_rng(hk.transform(forward))
    params = jax.eval_shape(model.init, jax.random.key(0), of((4, 12)))

    def loss_fn(params, batch):
        logits = model.apply(POLICY.cast_to_compute(params), batch["image"]).astype(F32)
        return jnp.mean(optax.softmax_cross_entropy_with_integer_labels(logits, batch["label"]))

    _, rules = haiku_rules(loss_fn, params, jax.eval_shape(lambda: jmp.StaticLossScale(2.0**15)))
    assert "half unscaling" in rules
