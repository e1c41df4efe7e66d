"""LoRA: adapters beside the layers of an unmodified model."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxmp.data.arrays import Arrays
from jaxmp.errors import InputError
from jaxmp.experiment.experiment import Experiment
from jaxmp.experiment.settings import Loop
from jaxmp.jaxprs import equations
from jaxmp.modules.linen import UnderPolicy, explain
from jaxmp.modules.lora import ADAPTERS, LoRA
from jaxmp.modules.model import as_model
from jaxmp.modules.nnx import from_nnx
from jaxmp.tasks.classification import Classification
from jaxmp.training.objective import fill, trained_view
from jaxmp.trees import by_path

VECTOR = Path(__file__).parent / "lora_of_qwix.json"


class Step(nn.Module):
    @nn.compact
    def __call__(self, x, _):
        return nn.tanh(nn.Dense(6)(x)), None


class Layers(nn.Module):
    """One of each kind of layer that can have an adapter."""

    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, image):
        x = nn.Conv(4, (3, 3), strides=2, kernel_dilation=2)(image)
        x = nn.ConvTranspose(5, (3, 3), strides=(2, 2))(x).reshape(len(x), -1, 10)
        x = nn.MultiHeadDotProductAttention(2, name="attention")(x)
        x = nn.Einsum((10, 3, 4), "...c,cde->...de")(x).reshape(*x.shape[:2], -1)
        x = nn.RNN(nn.OptimizedLSTMCell(6, param_dtype=self.dtype))(x)
        x = nn.RNN(nn.GRUCell(6, param_dtype=self.dtype))(x)
        steps = nn.scan(Step, variable_axes={"params": 0}, split_rngs={"params": True}, length=3)
        return nn.Dense(2)(steps(name="steps")(x, None)[0])


IMAGE = np.float32(np.random.RandomState(0).standard_normal((2, 4, 4, 3)))


@pytest.fixture(scope="module")
def layers():
    """The model, with adapters and without, and the parameters of both, of one key."""
    base = as_model(Layers())
    adapted = base.under(LoRA(2, 4.0))
    params = [jax.jit(model.init)(jax.random.key(0), IMAGE)[0] for model in (base, adapted)]
    return base, adapted, *params


def with_products(params, scale=0.3):
    """The parameters with adapters that add something."""
    rng = np.random.RandomState(1)
    return jax.tree_util.tree_map_with_path(
        lambda path, x: np.asarray(scale * rng.standard_normal(x.shape), x.dtype) if "lora_b" in str(path) else x,
        params,
    )


def outputs(model, params, policy="float32"):
    return jax.jit(lambda p: model.under(UnderPolicy(policy)).apply(p, {}, IMAGE)[0])(params)


@pytest.mark.slow
def test_the_base_and_its_first_output_are_those_of_the_plain_model_to_the_bit(layers):
    base, adapted, plain, params = layers
    there, of_plain = by_path(params), by_path(plain)
    assert all(there[path].tobytes() == leaf.tobytes() for path, leaf in of_plain.items())
    kernels = {path.removesuffix("/kernel") for path in of_plain if path.endswith("/kernel")}
    new = {path for path in there if path not in of_plain}
    assert new == {f"{path}/{name}/kernel" for path in kernels for name in ("lora_a", "lora_b")}
    for policy in ("float32", "mixed_bfloat16", "mixed_float16"):
        first = outputs(base, plain, policy)
        assert first.dtype == np.float32 and np.abs(first).max() > 0
        np.testing.assert_array_equal(outputs(adapted, params, policy), first)


@pytest.mark.slow
def test_merged_is_unmerged_in_float64(layers):
    base, adapted, plain, params = layers
    with jax.enable_x64(True):
        exact = jax.tree.map(lambda x: np.asarray(x, np.float64), with_products(params))
        image, model = IMAGE.astype(np.float64), as_model(Layers(jnp.float64))

        def of(model, params):
            return jax.jit(model.apply)(params, {}, image)[0]

        unmerged, merged = of(model.under(LoRA(2, 4.0)), exact), of(model, LoRA(2, 4.0).merge(exact))
        assert merged.dtype == np.float64 and np.abs(unmerged - of(model, plain)).max() > 1e-2
        np.testing.assert_allclose(merged, unmerged, rtol=0, atol=1e-12)
    # Of float32 parameters: the kernels are rounded once.
    merged = LoRA(2, 4.0).merge(with_products(params))
    assert jax.tree.structure(merged) == jax.tree.structure(plain)
    np.testing.assert_allclose(outputs(base, merged), outputs(adapted, with_products(params)), rtol=0, atol=2e-6)


class Few(nn.Module):
    """A convolution, and an LSTM whose kernels are joined."""

    @nn.compact
    def __call__(self, image):
        x = nn.Conv(8, (3, 3), name="conv")(image).reshape(len(image), 4, -1)
        return nn.Dense(2, name="head")(nn.RNN(nn.OptimizedLSTMCell(6, name="cell"))(x))


def gradients_of(model, params, policy):
    def loss(adapters):
        y, _ = model.under(UnderPolicy(policy)).apply(fill(adapters, params), {}, IMAGE)
        return jnp.sum(y.astype(jnp.float32) ** 2)

    return jax.grad(loss), trained_view(params, ADAPTERS)


@pytest.mark.parametrize("policy", ["mixed_bfloat16", pytest.param("mixed_float16", marks=pytest.mark.slow)])
def test_the_products_of_adapters_are_under_the_policy_and_only_they_have_gradients(policy):
    model = as_model(Few()).under(LoRA(2, 4.0))
    shapes, _ = jax.eval_shape(model.init, jax.random.key(0), IMAGE)
    params = jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), shapes)
    grad, adapters = gradients_of(model, params, policy)
    jaxpr = jax.make_jaxpr(grad)(adapters)
    found = [e for e, *_ in equations(jaxpr) if e.primitive.name in ("dot_general", "conv_general_dilated")]
    half = jnp.dtype(policy.removeprefix("mixed_"))
    assert len(found) > 20 and {v.aval.dtype for e in found for v in (*e.invars, *e.outvars)} == {half}
    assert len(jax.tree.leaves(adapters)) == 2 * 10
    if policy == "mixed_bfloat16":
        return
    params, _ = model.init(jax.random.key(0), IMAGE)
    exact = jax.jit(gradients_of(model, with_products(params), "float32")[0])
    (grad, adapters) = gradients_of(model, with_products(params), policy)
    for mine, of in zip(*map(jax.tree.leaves, (jax.jit(grad)(adapters), exact(adapters))), strict=True):
        assert mine.dtype == np.float32
        assert np.linalg.norm(mine - of) < 16 * 2.0**-11 * np.linalg.norm(of)


def test_rules_of_a_policy_reach_adapters_by_name():
    model = as_model(Few()).under(LoRA(2, 4.0, where=("head",)))
    rows = {row.module: row.policy for row in explain(model, "head/lora_a=float32; mixed_bfloat16", IMAGE)}
    assert rows["head/lora_a"].startswith("p=f32,c=f32") and rows["head/lora_b"] == rows["head"] == "p=f32,c=bf16,o=f32"
    assert not any("lora" in path for path in rows if not path.startswith("head"))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("where", "message"),
    [
        (("haed",), r"the pattern 'haed' names no layer that can have an adapter; there are.*did you mean 'head'\?"),
        (("@Embed",), r"'@Embed' names no layer that can have an adapter; there are @Conv"),
        (("conv/x", "head"), "'conv/x' names no layer"),
    ],
)
def test_a_pattern_that_names_no_such_layer_is_refused(where, message):
    with pytest.raises(InputError, match=message):
        as_model(Few()).under(LoRA(2, where=where)).init(jax.random.key(0), IMAGE)


class Normalised(nn.Module):
    """A layer whose kernel is normalised, and one whose is not."""

    @nn.compact
    def __call__(self, x):
        return nn.Dense(2, name="head")(nn.WeightNorm(nn.Dense(3, name="inner"), name="norm")(x))


def test_a_layer_whose_kernel_is_normalised_has_no_adapter_so_that_merged_is_unmerged():
    x, lora = np.random.RandomState(0).standard_normal((4, 5)).astype(np.float32), LoRA(2)
    base = as_model(Normalised())
    params, state = base.under(lora).init(jax.random.key(0), x)
    assert {path for path in by_path(params) if "lora" in path} == {"head/lora_a/kernel", "head/lora_b/kernel"}
    params = with_products(params)
    unmerged, merged = base.under(lora).apply(params, state, x)[0], base.apply(lora.merge(params), state, x)[0]
    np.testing.assert_allclose(merged, unmerged, rtol=0, atol=1e-6)
    with pytest.raises(InputError, match="'inner' names no layer that can have an adapter"):
        base.under(LoRA(2, where=("inner",))).init(jax.random.key(0), x)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"rank": -1}, "LoRA.rank = -1: expected a whole number of at least 0"),
        ({"alpha": 0}, "LoRA.alpha = 0: expected a positive number"),
        ({"where": "head"}, r"LoRA.where = 'head': expected a tuple, \('head',\)"),
        ({"where": ()}, r"LoRA.where = \(\): expected at least one pattern"),
        ({"where": ("a b",)}, "LoRA.where: 'a b' is no pattern"),
    ],
)
def test_values_that_make_no_adapter_are_refused(values, message):
    with pytest.raises(InputError, match=message):
        LoRA(**values)


def test_a_model_without_modules_is_refused():
    with pytest.raises(InputError, match="from_nnx has no modules to name"):
        Experiment(model=from_nnx(lambda rngs: nnx.Linear(2, 2, rngs=rngs)), lora=LoRA(2))


# In an experiment.


def rows(split):
    rng = np.random.default_rng(len(split))
    label = rng.integers(0, 2, 40)
    return {"x": (rng.normal(size=(40, 3)) + label[:, None]).astype(np.float32), "label": label}


class Small(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.Dense(2, name="head")(nn.relu(nn.Dense(16, name="body")(x)))


PLAIN = Experiment(
    model=Small(),
    data=Arrays(rows, batch_size=10, images=()),
    task=Classification(inputs=("x",)),
    precision="mixed_bfloat16",
    loop=Loop(steps=8),
)


@pytest.mark.slow
def test_adapters_are_trained_alone_saved_alone_and_merged(tmp_path):
    from jaxmp.models.pretrained import read_safetensors, write_safetensors
    from jaxmp.runs.fit import fit
    from jaxmp.runs.run import Run

    base = fit(PLAIN, workdir=tmp_path, log=lambda text: None)
    experiment = dataclasses.replace(PLAIN, lora=LoRA(2, where=("body",)), trains=("head/bias",))
    fitted = fit(experiment, workdir=tmp_path, init_from=base.path, log=lambda text: None)
    run, before = Run(fitted.path, experiment), by_path(Run(base.path, PLAIN).state().params)
    weights = run.weights()
    changed = {name for name, x in weights.items() if name not in before or not np.array_equal(x, before[name])}
    assert changed == {"body/lora_a/kernel", "body/lora_b/kernel", "head/bias"}
    assert fitted.summary["parameters"] == 3 * 16 + 16 + 16 * 2 + 2 + 2 * (3 + 16)
    assert fitted.summary["trained_parameters"] == 2 * (3 + 16) + 2

    # Merged, they are weights of the plain model that compute the same.
    write_safetensors(tmp_path / "merged.safetensors", run.weights(merged=True))
    still = dataclasses.replace(PLAIN, loop=Loop(steps=1), trains=("head/bias",), precision="float32")
    still = dataclasses.replace(still, optimizer=dataclasses.replace(still.optimizer, learning_rate=0.0))
    merged = fit(still, workdir=tmp_path, init_from=tmp_path / "merged.safetensors", log=lambda text: None)
    x = {"x": rows("test")["x"]}
    of_merged = Run(merged.path, still).apply(x)
    in_float32 = dataclasses.replace(experiment, precision="float32")
    model = as_model(in_float32.adapted_model)
    np.testing.assert_allclose(of_merged, model.apply(run.state().params, {}, x["x"])[0], atol=1e-6)

    # The adapters alone, into a fresh model of the same base.
    alone = {name: value for name, value in weights.items() if "lora" in name}
    write_safetensors(tmp_path / "adapters.safetensors", alone)
    assert read_safetensors(tmp_path / "adapters.safetensors").keys() == alone.keys()
    again = dataclasses.replace(experiment, loop=Loop(steps=1), optimizer=still.optimizer)
    how = {"init_from": tmp_path / "adapters.safetensors", "init_only": ADAPTERS, "log": lambda text: None}
    state = Run(fit(again, workdir=tmp_path, **how).path, again).state()
    np.testing.assert_array_equal(state.params["body"]["lora_a"]["kernel"], alone["body/lora_a/kernel"])

    # A pattern that names a layer leaves its adapters fresh; one that names adapters alone wants them.
    how["init_from"] = base.path
    Run(fit(again, workdir=tmp_path, **{**how, "init_only": ("body",)}).path, again)
    with pytest.raises(InputError, match=r"body/lora_a/kernel: nothing there, float32\[3, 2\] here"):
        fit(again, workdir=tmp_path, **how)


def test_several_objectives_take_no_adapters():
    from jaxmp.training.objective import ObjectiveSpec

    class Two(Classification):
        objectives = {"a": ObjectiveSpec(("body",)), "b": ObjectiveSpec(("head",))}  # noqa: RUF012

    with pytest.raises(InputError, match=r"lora\.rank = 2: the objectives of Two say what each of them trains"):
        dataclasses.replace(PLAIN, task=Two(inputs=("x",)), lora=LoRA(2))


# The same numbers as qwix.


def arrays(shapes):
    rng = np.random.RandomState(0)
    return {name: np.float32(rng.standard_normal(shape) / np.sqrt(shape[0])) for name, shape in shapes.items()}


SHAPES = {
    "x": (4, 6),
    **{"Dense_0/kernel": (6, 8), "Dense_0/bias": (8,), "Dense_0/a": (6, 2), "Dense_0/b": (2, 8)},
    **{"Dense_1/kernel": (8, 3), "Dense_1/bias": (3,), "Dense_1/a": (8, 2), "Dense_1/b": (2, 3)},
}


class Two(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.Dense(3, name="Dense_1")(jnp.tanh(nn.Dense(8, name="Dense_0")(x)))


@pytest.mark.slow
def test_a_dense_model_is_that_of_qwix_in_float32():
    given = arrays(SHAPES)
    params = {
        layer: {
            "kernel": given[f"{layer}/kernel"],
            "bias": given[f"{layer}/bias"],
            "lora_a": {"kernel": given[f"{layer}/a"]},
            "lora_b": {"kernel": given[f"{layer}/b"]},
        }
        for layer in ("Dense_0", "Dense_1")
    }
    theirs = json.loads(VECTOR.read_text())

    def loss(params):
        y = as_model(Two()).under(LoRA(2, 3.0)).apply(params, {}, given["x"])[0]
        return jnp.sum(y**2), y

    grads, y = jax.grad(loss, has_aux=True)(params)
    np.testing.assert_allclose(y, theirs["outputs"], rtol=0, atol=1e-6)
    for layer in ("Dense_0", "Dense_1"):
        for name in ("a", "b"):
            mine = grads[layer][f"lora_{name}"]["kernel"]
            np.testing.assert_allclose(mine, theirs[f"{layer}/{name}"], rtol=0, atol=1e-5)


def make_vector():
    """Writes what qwix 0.1.8 returns (JAX 0.12, CPU): python tests/modules/test_lora.py."""
    import qwix  # type: ignore[import-not-found]

    given = arrays(SHAPES)
    provider = qwix.LoraProvider(module_path=".*", rank=2, alpha=3.0)
    model = qwix.apply_lora_to_model(Two(), provider)
    params = model.init(jax.random.key(0), given["x"])["params"]
    names = {"kernel": "kernel", "bias": "bias", "kernel_lora_a": "a", "kernel_lora_b": "b"}
    assert all(set(of) == set(names) for of in params.values())
    params = {layer: {name: given[f"{layer}/{names[name]}"] for name in of} for layer, of in params.items()}

    def loss(params):
        y = model.apply({"params": params}, given["x"])
        return jnp.sum(y**2), y

    grads, y = jax.grad(loss, has_aux=True)(params)
    vector = {"outputs": y}
    for layer, of in grads.items():
        vector |= {f"{layer}/{name[-1]}": of[name] for name in ("kernel_lora_a", "kernel_lora_b")}
    VECTOR.write_text(json.dumps({name: np.asarray(x).tolist() for name, x in vector.items()}) + "\n")


if __name__ == "__main__":
    make_vector()
