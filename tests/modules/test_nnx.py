"""NNX modules and plain functions under a policy: by their operations."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import jaxmp
import jaxmp.testing
from jaxmp.data.arrays import Arrays
from jaxmp.errors import InputError
from jaxmp.experiment.experiment import Experiment
from jaxmp.experiment.settings import Loop
from jaxmp.modules.functions import apply_policy
from jaxmp.modules.linen import explain, with_policy
from jaxmp.modules.nnx import from_nnx
from jaxmp.precision.policy import parse_policy
from jaxmp.precision.policy_tree import PolicyTree
from jaxmp.runs.fit import fit, steps
from jaxmp.training.optimizers import Adam

HALF = [("mixed_bfloat16", "bfloat16"), ("mixed_float16", "float16")]


class Net(nnx.Module):
    """Batch statistics and dropout."""

    def __init__(self, *, rngs: nnx.Rngs):
        self.first = nnx.Linear(5, 8, rngs=rngs)
        self.norm = nnx.BatchNorm(8, rngs=rngs)
        self.dropout = nnx.Dropout(0.2, rngs=rngs)
        self.second = nnx.Linear(8, 2, rngs=rngs)

    def __call__(self, x):
        return self.second(self.dropout(jax.nn.relu(self.norm(self.first(x)))))


def make(rngs):
    return Net(rngs=rngs)


X = jnp.linspace(-1, 1, 20).reshape(4, 5)
MODEL = from_nnx(make)


def products(function, *args):
    def walk(jaxpr):
        for equation in jaxpr.eqns:
            if equation.primitive.name == "dot_general":
                yield from (v.aval.dtype.name for v in equation.invars)
            for inner in jax.tree.leaves(equation.params, is_leaf=lambda p: hasattr(p, "eqns") or hasattr(p, "jaxpr")):
                inner = getattr(inner, "jaxpr", inner)
                if hasattr(inner, "eqns"):
                    yield from walk(inner)

    return set(walk(jax.make_jaxpr(function)(*args).jaxpr))


@pytest.mark.slow
def test_init_and_apply_are_pure_and_do_what_the_module_does():
    key = jax.random.key(0)
    variables = jax.jit(MODEL.init)(key, X)
    assert jax.tree.map(jnp.shape, variables) == jax.tree.map(jnp.shape, jax.eval_shape(MODEL.init, key, X))
    module = make(nnx.Rngs(key))
    module.eval()
    np.testing.assert_allclose(MODEL.apply(variables, X), module(X), rtol=1e-6)

    def train(key):
        return jax.jit(lambda v, x: MODEL.apply(v, x, train=True, rngs={"params": key}, mutable=True))(variables, X)

    (out, state), (again, _), (other, _) = train(key), train(key), train(jax.random.key(1))
    assert np.array_equal(out, again) and not np.array_equal(out, other)
    assert not np.array_equal(state["state"]["norm"]["mean"], variables["state"]["norm"]["mean"])
    assert jax.tree.structure(state["state"]) == jax.tree.structure(variables["state"])


@pytest.mark.slow
@pytest.mark.parametrize(("policy", "half"), [pytest.param(*HALF[0], marks=pytest.mark.slow), *HALF[1:]])
def test_every_product_is_half_forward_and_backward_and_gradients_are_float32(policy, half):
    variables = MODEL.init(jax.random.key(0), X)
    apply = with_policy(MODEL.apply, parse_policy(policy))

    def loss(params):
        return apply({**variables, "params": params}, X).sum()

    assert apply(variables, X).dtype == jnp.float32
    assert products(jax.grad(loss), variables["params"]) == {half}
    grads = jax.grad(loss)(variables["params"])
    assert {g.dtype.name for g in jax.tree.leaves(grads)} == {"float32"}


def rows(split):
    rng = np.random.default_rng(len(split))
    label = rng.integers(0, 2, 64)
    return {"image": (rng.normal(size=(64, 5)) + 2 * label[:, None]).astype(np.float32), "label": label}


@pytest.mark.slow
def test_an_nnx_module_is_a_model_of_an_experiment(tmp_path):
    data = Arrays(rows, batch_size=16, images=())
    experiment = Experiment(
        model=MODEL,
        data=data,
        optimizer=Adam(0.05),
        precision="mixed_float16",
        loop=Loop(steps=100, eval_every=50, ema_decay=0.9),
    )
    summary = fit(experiment, workdir=tmp_path, log=lambda text: None).summary
    assert summary["test"]["accuracy"] > 0.9 and summary["parameters"] == 5 * 8 + 8 + 16 + 8 * 2 + 2
    assert [(row["module"], row["type"], row["policy"]) for row in summary["policy"]] == [
        ("", "FromNNX", "p=f32,c=f16,o=f32")
    ]
    *_, last = steps(experiment)
    run = jaxmp.Run(tmp_path, experiment)
    assert run.evaluate("test") == pytest.approx(summary["test"])
    jax.tree.map(np.testing.assert_array_equal, run.state().params, last.state.params)


@pytest.mark.slow
def test_an_nnx_module_without_state_is_trained(tmp_path):
    data = Arrays(rows, batch_size=16, images=())
    loop = Loop(steps=2, eval_every=1)
    experiment = Experiment(model=from_nnx(make_sequence), data=data, precision="mixed_float16", loop=loop)
    first, last = steps(experiment)
    assert last.state.model_state == {}
    before, after = (jax.tree.leaves(info.state.params) for info in (first, last))
    assert not any(np.array_equal(a, b) for a, b in zip(before, after, strict=True))
    summary = fit(experiment, workdir=tmp_path, log=lambda text: None).summary
    assert math.isfinite(summary["test"]["loss"])


def test_a_plain_function_is_trained_under_a_policy():
    def predict(params, x):
        return jnp.tanh(x @ params["w"] + params["b"])

    under = apply_policy(predict, parse_policy("mixed_float16"))
    tx = jaxmp.loss_scaling(optax.adam(0.1))
    params = {"w": jnp.zeros((5, 1)), "b": jnp.zeros(1)}
    opt_state, target = tx.init(params), jnp.sign(X[:, :1])

    @jax.jit
    def step(params, opt_state):
        def loss(params):
            return jaxmp.scale_loss(jnp.mean((under(params, X) - target) ** 2), opt_state)

        updates, opt_state = tx.update(jax.grad(loss)(params), opt_state, params)
        return optax.apply_updates(params, updates), opt_state

    assert products(under, params, X) == {"float16"}
    for _ in range(100):
        params, opt_state = step(params, opt_state)
    assert jnp.mean((under(params, X) - target) ** 2) < 0.05


def test_float32_is_true_float32_and_outputs_have_their_dtype():
    function = apply_policy(lambda x: x @ x.T, parse_policy("float32"))
    assert "HIGHEST" in str(jax.make_jaxpr(function)(X))
    assert apply_policy(lambda x: x @ x.T, parse_policy("p=f32,c=bf16,o=bf16"))(X).dtype == jnp.bfloat16


def test_a_function_takes_a_policy_as_text_and_refuses_what_is_none():
    under = apply_policy(lambda x: x @ x.T, "p=f32,c=f16,o=f16")
    assert under(X).dtype == jnp.float16
    with pytest.raises(InputError, match=r"policy None: expected a jaxmp\.Policy, or text"):
        apply_policy(lambda x: x, None)


@pytest.mark.parametrize("text", ["first=float32; mixed_float16", "c=e4m3", "mixed_bfloat16,grad=bf16"])
def test_what_only_layers_can_do_is_refused(text):
    with pytest.raises(InputError, match="Flax Linen"):
        with_policy(MODEL.apply, PolicyTree.parse(text))(MODEL.init(jax.random.key(0), X), X)


def test_a_constructor_of_something_else_is_refused():
    with pytest.raises(InputError, match=r"returned a int; expected an nnx\.Module"):
        from_nnx(lambda rngs: 3).init(jax.random.key(0), X)
    with pytest.raises(InputError, match=r"given a Linear; expected a function that makes one: .*Linear\(\.\.\., rngs"):
        from_nnx(nnx.Linear(2, 3, rngs=nnx.Rngs(0)))


def test_explain_shows_the_model_as_one():
    assert [(row.type, row.parameters) for row in explain(MODEL, parse_policy("mixed_float16"), X)] == [("FromNNX", 82)]


def make_sequence(rngs):
    return nnx.Sequential(nnx.Linear(5, 4, rngs=rngs), jax.nn.relu, nnx.Linear(4, 2, rngs=rngs))


BATCH = {"image": X, "label": jnp.arange(4) % 2, "weight": jnp.ones(4)}


@pytest.mark.slow
def test_an_nnx_module_obeys_the_laws_of_policies():
    laws = jaxmp.testing.policy_laws(from_nnx(make_sequence), "mixed_bfloat16", BATCH)
    assert not laws.broken, str(laws)


class WithStatistics(nnx.Module):
    def __init__(self, rngs):
        self.norm, self.head = nnx.BatchNorm(4, rngs=rngs), nnx.Linear(4, 3, rngs=rngs)

    def __call__(self, x):
        return self.head(self.norm(x))


@pytest.mark.slow
def test_state_keeps_its_dtype_whatever_the_output_dtype_is():
    model = from_nnx(lambda rngs: WithStatistics(rngs))
    variables = model.init(jax.random.key(0))
    x = 300 * jax.random.normal(jax.random.key(1), (64, 4))
    out, new = with_policy(model.apply, "p=f32,c=bf16,o=bf16")(variables, x, train=True, mutable=True)
    assert out.dtype == jnp.bfloat16
    assert {leaf.dtype for leaf in jax.tree.leaves(new)} == {np.dtype(np.float32)}
    assert not (np.asarray(new["state"]["norm"]["var"]).view(np.uint32) & 0xFFFF == 0).any()  # not rounded to bfloat16
