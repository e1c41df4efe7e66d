"""The laws on jaxmp itself, on one device and on eight virtual ones; as tables and as tests; and on a user's files."""

from __future__ import annotations

import dataclasses
import os
import subprocess
import sys
import textwrap
import unittest
from pathlib import Path

import flax.linen as nn
import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxmp
import jaxmp.testing
from jaxmp.errors import InputError
from jaxmp.experiment.settings import Parallel
from jaxmp.scaling.historical import ApexScaler, DeepSpeedScaler, JmpScaler, MegatronScaler, TorchScaler
from jaxmp.scaling.scalers import DynamicScaler, HeadroomScaler, NoScaler, StaticScaler
from jaxmp.scaling.transform import loss_scaling, scale_loss
from jaxmp.tasks.classification import Classification
from jaxmp.tasks.loss import init_model, make_loss
from jaxmp.testing import ScalerAdapter, StepAdapter, policy_laws, scaler_laws, step_laws
from jaxmp.training.state import TrainState
from jaxmp.training.step import make_train_step

pytest_plugins = ["pytester"]


class Net(nn.Module):
    @nn.compact
    def __call__(self, x, *, train=False):
        x = nn.relu(nn.BatchNorm(use_running_average=not train)(nn.Dense(8)(x)))
        return nn.Dense(3, name="head")(x)


class Dropping(nn.Module):
    @nn.compact
    def __call__(self, x, *, train=False):
        return nn.Dense(3)(nn.Dropout(0.5, deterministic=not train)(nn.Dense(8)(x)))


class Attending(nn.Module):
    @nn.compact
    def __call__(self, tokens):
        x = nn.Embed(16, 8, name="embed")(tokens)
        x = x + nn.remat(nn.MultiHeadDotProductAttention)(num_heads=2)(nn.LayerNorm()(x))
        x = nn.RNN(nn.GRUCell(8), name="rnn")(x)
        return nn.Dense(4, name="head")(x.mean(1))


def batch(count=16):
    random = np.random.default_rng(0)
    return {
        "image": random.normal(size=(count, 5)).astype(np.float32),
        "label": random.integers(0, 3, count),
        "weight": np.ones(count, np.float32),
    }


def scaler(scaler, **claims):
    """jaxmp's own adapter: a scaler as `loss_scaling` uses it."""
    tx = loss_scaling(optax.identity(), scaler)
    return ScalerAdapter(
        init=lambda: tx.init({}),
        scale=lambda state, loss: scale_loss(loss, state),
        unscale=lambda state, grads: tx.update(grads, state, grads)[0],
        adjust=lambda state, finite: tx.update(jnp.where(finite, 1.0, jnp.inf), state)[1],
        **claims,
    )


def step(policy="float32", *, mode=None, model=None, tx=None, ema=True):
    """jaxmp's own adapter: its train step on one device, or on all in a mode."""
    model, task = model or Net(), Classification()
    inner = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(lambda n: 0.1 / (1 + n))) if tx is None else tx
    tx = loss_scaling(inner, DynamicScaler(growth_interval=3))
    devices = Parallel(mode).make(16) if mode else None
    replicas = {"replicas": devices.replicas()} if devices else {}
    loss = make_loss(model, task, policy, axis_name=replicas["replicas"].axis_name if replicas else None)
    train_step = make_train_step(loss, tx, ema_decay=0.9 if ema else None, **replicas)

    @jax.jit
    def create():
        params, model_state = init_model(model, task, batch(), jax.random.key(1))
        return TrainState.create(params, tx, key=jax.random.key(2), model_state=model_state, ema=ema)

    if devices is None:
        return StepAdapter(create, jax.jit(train_step, donate_argnums=0), batch(), loss=loss_of)
    return StepAdapter(
        init=lambda: devices.put(create()),
        step=devices.compile(train_step, (0, 0)),
        batch=devices.put_batch(batch()),
        stacked=mode == "pmap",
        loss=loss_of,
    )


def loss_of(out):
    return out[1]["loss"].total


# --- every law holds on jaxmp

CLAIMS = {"growth_interval": 3, "min_scale": 2.0**-14, "max_scale": 2.0**24}
SCALERS = {
    "dynamic": scaler(DynamicScaler(growth_interval=3), **CLAIMS),
    "default": scaler(DynamicScaler()),
    "hysteresis": scaler(DynamicScaler(hysteresis=2, growth_interval=3), **CLAIMS),
    "static": scaler(StaticScaler(2.0**10)),
    "none": scaler(NoScaler()),
    "headroom": scaler(HeadroomScaler(half_life=3)),
    "torch": scaler(TorchScaler(growth_interval=3)),
    "jmp": scaler(JmpScaler(growth_interval=3), min_scale=1.0),
    "apex": scaler(ApexScaler(growth_interval=3)),
    "megatron": scaler(MegatronScaler(growth_interval=3)),
    "deepspeed": scaler(DeepSpeedScaler(growth_interval=3)),
}
test_scaler = scaler_laws(SCALERS["dynamic"])
test_policy = policy_laws(Net(), "head=float32; mixed_float16", batch()["image"])


@pytest.mark.slow
def test_every_law_of_a_step_holds():
    laws = step_laws(step("mixed_bfloat16", tx=optax.sgd(0.1, momentum=0.9), ema=False))
    assert not laws.broken and len(laws) > 30, str(laws)


@pytest.mark.slow
@pytest.mark.parametrize("name", SCALERS)
def test_every_law_holds_on_every_scaler(name):
    laws = scaler_laws(SCALERS[name])
    assert not laws.broken, str(laws)


def test_no_move_beyond_its_cap_or_floor_is_asked_of_a_scale():
    capped = scaler_laws(scaler(DynamicScaler(init_scale=2.0**24, growth_interval=3), growth_factor=2.0, **CLAIMS))
    floored = scaler_laws(scaler(DynamicScaler(init_scale=1.0, min_scale=1.0), hysteresis=1, min_scale=1.0))
    assert capped["growth_interval"].verdict == "holds", capped["growth_interval"].words
    assert floored["hysteresis"].verdict == "holds", floored["hysteresis"].words


def test_no_fall_below_its_claimed_floor_is_asked_of_a_steps_scale():
    def weights_and_scale(least):
        tx = loss_scaling(optax.sgd(0.1), DynamicScaler(init_scale=8.0, min_scale=least, growth_interval=3))

        def sgd(state, batch):
            grads = jax.grad(lambda w: scale_loss(jnp.sum((w - batch["x"]) ** 2), state[1]))(state[0])
            updates, opt_state = tx.update(grads, state[1], state[0])
            return optax.apply_updates(state[0], updates), opt_state

        return lambda: (jnp.ones(3), tx.init(jnp.ones(3))), jax.jit(sgd), {"x": jnp.zeros(3)}

    floored = step_laws(StepAdapter(*weights_and_scale(8.0), min_scale=8.0))
    assert floored["scale_falls"].verdict == "holds", floored["scale_falls"].words
    for claimed in (None, 1.0):
        stuck = step_laws(StepAdapter(*weights_and_scale(8.0), min_scale=claimed))["scale_falls"]
        assert stuck.verdict == "broken" and "8 overflows in a row leave the scale at 8" in stuck.words


STEPS = {
    "mixed_float16": {"policy": "mixed_float16", "ema": False},
    "mixed_bfloat16": {"policy": "mixed_bfloat16", "ema": False},
    "float32": {},
    "dropout": {"model": Dropping()},
}


@pytest.mark.slow
@pytest.mark.parametrize("name", STEPS)
def test_every_law_holds_on_every_step(name):
    laws = step_laws(step(**STEPS[name]))
    assert not laws.broken, str(laws)


def linear(tx, microbatches=1):
    adapter = step(model=nn.Dense(3), tx=tx, ema=False)
    return dataclasses.replace(adapter, kept=lambda state: state.params, microbatches=microbatches)


@pytest.mark.slow
@pytest.mark.parametrize("mean", [pytest.param(True, marks=pytest.mark.slow), False])
def test_microbatches_are_compared_with_the_batch_that_they_make(mean):
    accumulating = linear(optax.MultiSteps(optax.sgd(0.1), 2, use_grad_mean=mean), microbatches=2)
    result = step_laws(accumulating, reference=linear(optax.sgd(0.1)))["as_the_reference"]
    assert result.verdict == ("holds" if mean else "broken"), result.words


POLICIES = [
    *((Net(), text) for text in ("float32", "mixed_bfloat16", "bfloat16", "c=e4m3/e5m2", "@BatchNorm=float32; f16")),
    (Attending(), "head=float32; mixed_float16"),
    (Attending(), "@LayerNorm=float32; rnn=mixed_float16; mixed_bfloat16"),
    (Dropping(), "mixed_float16"),
]


@pytest.mark.slow
@pytest.mark.parametrize(("model", "policy"), POLICIES)
def test_every_law_holds_on_every_policy(model, policy):
    tokens = jnp.arange(40).reshape(4, 10) % 16
    laws = policy_laws(model, policy, tokens if isinstance(model, Attending) else batch()["image"])
    assert not laws.broken, str(laws)


# --- tables and tests


def test_the_table_names_each_law_its_verdict_and_the_counterexample():
    laws = scaler_laws(scaler(DynamicScaler(growth_interval=3), growth_interval=4))
    laws = jaxmp.testing.Laws("mine", [laws.laws[name] for name in ("types_stay", "growth_interval", "within_bounds")])
    assert laws.broken == ["growth_interval"]
    lines = str(laws).splitlines()
    assert lines[0] == "mine" and lines[-1] == "  1 hold, 1 broken, 1 skipped"
    statement = "The state keeps its structure, dtypes and weak types, so that a run compiles once."
    assert f"  types_stay       holds    {statement}" in lines
    assert "      after no step the scale grew after 3 finite steps; claimed: 4" in lines
    assert "      the adapter claims no max_scale" in lines
    assert [result.verdict for result in laws] == ["holds", "broken", "skipped"]
    with pytest.raises(jaxmp.testing.Broken, match="grew after 3 finite steps"):
        laws("growth_interval")
    with pytest.raises(unittest.SkipTest, match="claims no max_scale"):
        laws("within_bounds")
    with pytest.raises(InputError, match="did you mean 'growth_interval'"):
        laws["growth_intervals"]


def test_laws_run_when_they_are_asked_for_and_once():
    calls = []

    def check():
        calls.append(1)

    laws = jaxmp.testing.Laws("mine", [jaxmp.testing.laws.Law("one", "It holds.", check)])
    assert not calls and "1 laws" in repr(laws) and not calls
    assert laws["one"].verdict == laws["one"].verdict == "holds" and len(calls) == 1


def test_the_thorough_profile_is_one_of_hypothesis():
    assert not jaxmp.testing.laws.thorough()
    assert (
        hypothesis.settings.get_profile("jaxmp-thorough").max_examples
        > 10 * jaxmp.testing.laws._settings().max_examples
    )
    before = hypothesis.settings.get_current_profile_name()
    try:
        hypothesis.settings.load_profile("jaxmp-thorough")
        assert jaxmp.testing.laws.thorough()
    finally:
        hypothesis.settings.load_profile(before)


def test_without_hypothesis_the_import_says_how_to_install_it():
    code = "import sys; sys.modules['hypothesis'] = None; import jaxmp.testing"
    process = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment())
    assert process.returncode == 1
    last = (
        "ModuleNotFoundError: jaxmp.testing needs hypothesis, which is not installed: `uv sync --extra testing`, "
        "or `pip install 'jaxmp[testing]'`"
    )
    assert process.stderr.splitlines()[-1] == last


# --- bad adapters


def test_an_adapter_without_a_method_is_refused_with_the_law_that_wants_it():
    class Mine:
        def init(self):
            return jnp.float32(1)

        def scale(self, state, loss):
            return loss

        def unscaled(self, state, grads):
            return grads

    with pytest.raises(InputError) as error:
        scaler_laws(Mine())
    assert str(error.value) == (
        "scaler_laws: the adapter Mine has no method 'unscale', which the law 'types_stay' calls; it has init, scale, "
        "unscaled; did you mean 'unscaled'?"
    )
    with pytest.raises(
        InputError, match="step_laws: the adapter Mine has no method 'step', which the law 'repeatable'"
    ):
        step_laws(Mine())
    with pytest.raises(InputError, match="has no batch, which every law steps on"):
        step_laws(StepAdapter(init=lambda: 0, step=lambda s, b: s, batch=None))


def test_a_method_that_raises_is_named_with_what_it_was_given():
    def adjust(state, finite):
        raise KeyError("no such thing")

    laws = scaler_laws(ScalerAdapter(lambda: jnp.float32(1), lambda s, x: x, lambda s, g: g, adjust))
    assert laws["types_stay"].words == "the adapter's adjust raised KeyError: 'no such thing' (given finite=False)"
    with pytest.raises(jaxmp.testing.Broken, match="Does not hold for the scaler:\nthe adapter's adjust raised"):
        laws("types_stay")


def test_a_result_of_the_wrong_structure_is_shown():
    laws = scaler_laws(ScalerAdapter(lambda: jnp.float32(1), lambda s, x: x, lambda s, g: list(g), lambda s, f: s))
    assert "unscale returned" in laws["unscales_in_float32"].words
    laws = scaler_laws(ScalerAdapter(lambda: jnp.float32(1), lambda s, x: x[None], lambda s, g: g, lambda s, f: s))
    assert laws["power_of_two"].words == "scale of a scalar loss returned float32[1]"
    laws = step_laws(StepAdapter(lambda: {"w": jnp.ones(2)}, lambda s, b: (b, s), jnp.ones(2), kept=lambda s: s))
    assert laws["trains"].words == (
        "the adapter's step returned float32[2]; expected a state such as init's, or a tuple that begins with one: "
        "{'w': float32[2]}"
    )


def test_a_state_that_cannot_be_read_is_explained():
    laws = step_laws(StepAdapter(lambda: {"w": jnp.ones(2)}, lambda s, b: s, jnp.ones(2)))
    assert "give it kept=" in laws["trains"].words
    assert laws["scale_is_sound"].verdict == "skipped" and "no loss_scale" in laws["scale_is_sound"].words


@pytest.mark.slow
def test_laws_can_be_asked_twice_of_one_compiled_step():
    adapter = linear(optax.sgd(0.1))
    assert [step_laws(adapter)["bad_gradient_is_skipped"].verdict for _ in range(2)] == ["holds", "holds"]


@pytest.mark.slow
def test_a_gradient_that_faults_do_not_reach_is_skipped_with_the_reason():
    gradient = jax.grad(lambda w, x: jnp.sum((x @ w) ** 2))  # made before the laws can put a fault into it
    step = jax.jit(lambda w, x: w - 0.01 * gradient(w, x))
    results = step_laws(StepAdapter(lambda: jnp.ones(2), step, jnp.ones((4, 2)), kept=lambda w: w))
    assert results["bad_gradient_is_skipped"].verdict == "skipped"
    assert "jax.value_and_grad, called as such inside the step" in results["bad_gradient_is_skipped"].words
    assert results["bad_batch_is_skipped"].verdict == "broken"


def test_a_policy_that_cannot_be_read_is_refused_at_once():
    with pytest.raises(InputError, match="did you mean 'mixed_float16'"):
        policy_laws(Net(), "mixed_flaot16", batch()["image"])
    with pytest.raises(InputError, match="did you mean 'head'"):
        policy_laws(Net(), "heat=float32; mixed_float16", batch()["image"])
    with pytest.raises(InputError, match=r"has no 'image'; it has images; did you mean 'images'.*inputs="):
        policy_laws(Net(), "mixed_float16", {"images": batch()["image"]})


# --- a user's files

TRAINING = {
    "flax": """
        import flax.linen as nn, jax, jax.numpy as jnp, numpy as np, optax
        from flax.training.dynamic_scale import DynamicScale
        from flax.training.train_state import TrainState

        class State(TrainState):
            dynamic_scale: DynamicScale

        batch = {"x": np.linspace(-1, 1, 32, dtype=np.float32).reshape(8, 4), "y": np.ones((8, 2), np.float32)}
        model = nn.Dense(2)

        def create_state():
            params = model.init(jax.random.key(0), batch["x"])["params"]
            scale = DynamicScale(scale=jnp.float32(2.0**10), fin_steps=jnp.int32(0), growth_interval=3)
            return State.create(apply_fn=model.apply, params=params, tx=optax.adam(0.1), dynamic_scale=scale)

        @jax.jit
        def train_step(state, batch):
            def loss_fn(params):
                return jnp.mean((state.apply_fn({"params": params}, batch["x"]) - batch["y"]) ** 2)

            scale, finite, loss, grads = state.dynamic_scale.value_and_grad(loss_fn)(state.params)
            new = state.apply_gradients(grads=grads)
            keep = lambda a, b: jax.tree.map(lambda x, y: jnp.where(finite, x, y), a, b)
            kept = keep((new.params, new.opt_state), (state.params, state.opt_state))
            return new.replace(params=kept[0], opt_state=kept[1], dynamic_scale=scale), loss
        """,
    "equinox": """
        import dataclasses, functools, jax, jax.numpy as jnp, numpy as np, optax
        from jaxmp import loss_scaling, scale_loss

        # As Equinox has it: a module is a pytree of its parameters, and is called.
        @jax.tree_util.register_dataclass
        @dataclasses.dataclass(frozen=True)
        class Linear:
            weight: jax.Array
            bias: jax.Array
            activation: object = dataclasses.field(metadata={"static": True})

            def __call__(self, x):
                return self.activation(x @ self.weight + self.bias)

        batch = {"x": np.linspace(-1, 1, 32, dtype=np.float32).reshape(8, 4), "y": np.ones((8, 2), np.float32)}
        tx = loss_scaling(optax.adam(0.1))

        def create_state():
            model = Linear(jnp.ones((4, 2)), jnp.zeros(2), jnp.tanh)
            return model, tx.init(model)

        @jax.jit
        def train_step(state, batch):
            model, opt_state = state
            loss_fn = lambda m: scale_loss(jnp.mean((m(batch["x"]) - batch["y"]) ** 2), opt_state)
            updates, opt_state = tx.update(jax.grad(loss_fn)(model), opt_state, model)
            return optax.apply_updates(model, updates), opt_state
        """,
    "nnx": """
        import jax, jax.numpy as jnp, numpy as np, optax
        from flax import nnx
        from jaxmp import loss_scaling, scale_loss

        batch = {"x": np.linspace(-1, 1, 32, dtype=np.float32).reshape(8, 4), "y": np.ones((8, 2), np.float32)}
        tx = loss_scaling(optax.adam(0.1))
        graph, _ = nnx.split(nnx.Linear(4, 2, rngs=nnx.Rngs(0)))

        def create_state():
            params = nnx.to_pure_dict(nnx.state(nnx.Linear(4, 2, rngs=nnx.Rngs(0))))
            return params, tx.init(params)

        @jax.jit
        def train_step(state, batch):
            params, opt_state = state

            def loss_fn(params):
                return scale_loss(jnp.mean((nnx.merge(graph, params)(batch["x"]) - batch["y"]) ** 2), opt_state)

            updates, opt_state = tx.update(jax.grad(loss_fn)(params), opt_state, params)
            return optax.apply_updates(params, updates), opt_state
        """,
}
# Without loss=: DynamicScale applies a step whose loss is inf, where the gradients are not.
READ_FLAX = "kept=lambda s: (s.params, s.opt_state), loss_scale=lambda s: s.dynamic_scale.scale"
ADAPTERS = {"flax": READ_FLAX, "equinox": "", "nnx": ""}


def three_lines(kind):
    return f"""
        from jaxmp.testing import StepAdapter, step_laws
        from training import batch, create_state, train_step
        test_step = step_laws(StepAdapter(create_state, train_step, batch, {ADAPTERS[kind]}))
    """


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["flax", "equinox", "nnx"])
def test_three_lines_check_a_hand_written_step(kind, pytester, monkeypatch):
    result = run_user_tests(pytester, monkeypatch, TRAINING[kind], three_lines(kind))
    outcomes = result.parseoutcomes()
    assert "failed" not in outcomes and outcomes["passed"] >= 11, result.stdout.str()


def test_a_broken_step_gets_the_smallest_counterexample_in_words(pytester, monkeypatch):
    broken = TRAINING["flax"].replace("opt_state=kept[1]", "opt_state=new.opt_state")
    result = run_user_tests(pytester, monkeypatch, broken, three_lines("flax"), "-k", "bad_gradient")
    laws = len(step_laws(StepAdapter(lambda: 0, lambda state, batch: state, 0)))
    assert result.parseoutcomes() == {"failed": 1, "deselected": laws - 1}
    shown = result.stdout.str()
    statement = "A step with an inf or NaN in any gradient leaves parameters, optimizer and model state as they were."
    assert f"{statement}\n    Does not hold for the step:\n" in shown
    assert "after a step with inf in the gradient of ['bias']: leaf [1][0].count has 1 instead of 0\n" in shown


def run_user_tests(pytester, monkeypatch, training, tests, *arguments):
    monkeypatch.syspath_prepend(str(pytester.path))
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    pytester.makepyfile(training=textwrap.dedent(training), test_mine=textwrap.dedent(tests))
    return pytester.runpytest_inprocess("-p", "no:cacheprovider", "-p", "no:xdist", "test_mine.py", *arguments)


# --- eight devices


def environment():
    paths = [str(Path(jaxmp.__file__).parents[1]), os.environ.get("PYTHONPATH", "")]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths))}


ON_EIGHT_DEVICES = {
    "scaler": lambda: scaler_laws(SCALERS["dynamic"]),
    "step_under_jit": lambda: step_laws(step(mode="jit"), reference=step()),
    "step_under_pmap": lambda: step_laws(step(mode="pmap"), reference=step()),
    "policy": lambda: policy_laws(Net(), "head=float32; mixed_float16", batch()["image"]),
}


NOTHING_TO_SAY = {
    "random_numbers_advance",  # the model draws none
    "complex_parameters_descend",  # it has none
    *("scale_stands_in_a_window", "dropped_window_is_empty"),  # every step is an update
    "scale_moves_as_claimed",  # the adapter claims nothing
    *(
        "others_do_not_matter",
        "skipped_beside_others",
        "not_due_stays",
        "skipped_statistics_are_dropped",
    ),  # one objective
}


@pytest.mark.eight_devices
@pytest.mark.slow
@pytest.mark.parametrize("case", ON_EIGHT_DEVICES)
def test_every_law_holds_on_eight_devices(case):
    laws = ON_EIGHT_DEVICES[case]()
    assert not laws.broken, str(laws)
    if case.startswith("step"):
        assert {result.law for result in laws if result.verdict == "skipped"} <= NOTHING_TO_SAY
