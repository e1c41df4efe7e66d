"""`find_policy`: what breaks in half is found and nothing else, trees are right and short, nothing is changed."""

from __future__ import annotations

import json

import flax.linen as nn
import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxmp
from jaxmp.cli import main
from jaxmp.errors import InputError
from jaxmp.experiment.config_file import ConfigFile
from jaxmp.instruments.find_policy import Point, _flops, find_policy, shortest_tree
from jaxmp.modules.linen import ModulePolicy
from jaxmp.precision.policy import parse_policy
from jaxmp.precision.policy_tree import PolicyTree

pytestmark = pytest.mark.xdist_group("cheapest policy")  # one worker: the fixtures search

HALF, FULL = parse_policy("mixed_float16"), parse_policy("float32")


# Planted faults, each in a module of its own.


class HandNorm(nn.Module):
    """A normalisation by hand, of sums of squares that float16 does not hold."""

    @nn.compact
    def __call__(self, x):
        x = 500 * x
        return (
            x
            * jax.lax.rsqrt(jnp.mean(jnp.square(x), -1, keepdims=True) + 1e-3)
            * self.param("scale", nn.ones, x.shape[1:])
        )


class Power(nn.Module):
    """Squares numbers around 1000; it has no parameters, but a module within it has."""

    @nn.compact
    def __call__(self, x):
        return (1000 * nn.Dense(8, name="inner")(x)) ** 2 / 1e3 / 1e3


class Faint(nn.Module):
    """A branch with gradients of 1e-14, which no usual loss scale lifts into float16."""

    @nn.compact
    def __call__(self, x):
        x = x @ self.param("kernel", nn.initializers.lecun_normal(), (x.shape[-1], 3))
        for _ in range(3):
            x = x * jnp.asarray(1e-4, x.dtype)
        return x


class Model(nn.Module):
    """Two layers that half precision suits, with what is planted between and beside them."""

    norm: bool = False
    power: bool = False
    faint: bool = False
    loud: bool = False

    @nn.compact
    def __call__(self, image, *, train=False):
        inputs = image.reshape(image.shape[0], -1)
        x = nn.relu(nn.Dense(8, name="hidden")(inputs))
        x = HandNorm(name="norm")(x) if self.norm else x
        x = Power(name="power")(x) if self.power else x
        # Logits of 1e5, as of a model that is very sure.
        scale = 2e5 if self.loud else 1.0
        x = nn.Dense(3, kernel_init=nn.initializers.normal(scale), name="head")(x) * jnp.float32(1 / scale)
        return x + Faint(name="faint")(inputs) if self.faint else x


def batches(count=2, rows=16):
    for seed in range(count):
        rng = np.random.default_rng(seed)
        y = rng.integers(0, 3, rows)
        yield jnp.asarray(rng.normal(size=(rows, 8)) + y[:, None], jnp.float32), jnp.asarray(y)


def pieces(model):
    """The loss, the modules and the points of a model."""
    data = list(batches())
    params = jax.jit(model.init)(jax.random.key(0), data[0][0])["params"]

    def loss(tree):
        apply = jaxmp.with_policy(model.apply, tree)

        def of(params, x, y):
            logits = apply({"params": params}, x)
            return jnp.mean(optax.softmax_cross_entropy_with_integer_labels(logits, y))

        return of

    return loss, lambda tree: jaxmp.explain(model, tree, data[0][0]), [(params, data)]


def in_float32(found):
    return [flip.module for flip in found.modules if not flip.half]


@pytest.mark.slow
def test_the_modules_that_half_breaks_stay_in_float32_and_no_others():
    model = Model(norm=True, faint=True)
    loss, explain, points = pieces(model)
    found = jaxmp.find_policy(loss, explain, points, loss_scale=2.0**10)
    assert in_float32(found) == ["norm", "faint"]
    assert {row.module: row.policy for row in explain(found.tree)} == {
        flip.module: str(HALF if flip.half else FULL) for flip in found.modules
    }
    alone = {flip.module: flip.alone for flip in found.modules}
    assert found.gap.error <= found.budget < min(alone["norm"].error, alone["faint"].error)
    assert alone["faint"].underflow >= 24 / (72 + 8 + 27 + 24)  # its kernel, of all parameters
    # Two for each row, input and output: forward, by the kernel, and where they are no inputs of the model by those.
    flops = {flip.module: flip.flops for flip in found.modules}
    each = 2 * 16 * 8
    assert flops == {"": 0, "hidden": 2 * 8 * each, "norm": 0, "head": 3 * 3 * each, "faint": 2 * 3 * each}
    assert found.half_flops_share == 1 - flops["faint"] / sum(flops.values())
    assert json.loads(json.dumps(found.to_json(), allow_nan=False))["precision"] == found.precision
    assert found.precision in str(found)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("planted", "module", "precision"),
    [
        ("loud", "head", "head=float32; mixed_float16"),
        ("power", "power", "power/inner=mixed_float16; power=float32; mixed_float16"),
        ("norm", "norm", "norm=float32; mixed_float16"),
        ("faint", "faint", "faint=float32; mixed_float16"),
    ],
)
def test_each_planted_fault_is_found_alone(planted, module, precision):
    found = jaxmp.find_policy(*pieces(Model(**{planted: True})), loss_scale=2.0**10)
    assert in_float32(found) == [module]
    assert found.precision == precision


# The search and its figures, on a loss that was written by hand: sums of squares, with gradients known by heart.

NAMES = ("a", "b", "c")


def by_hand(data, seen=None):
    """A loss with a module a name: mean over rows of (x . p)^2 / 2 and, beside it, what is lost of x in half."""

    def loss(tree):
        def module(name, p, x):
            dtype = tree.lookup(name).compute_dtype
            with jax.named_scope(name):
                y = jnp.dot(x.astype(dtype), p.astype(dtype))
                return jnp.mean(jnp.square(y.astype(p.dtype))) * jnp.asarray(0.5, p.dtype)

        def of(params, x):
            if seen is not None:
                seen.append(str(tree))
            with jax.named_scope("Hand"):
                return sum(module(name, params[name], x) for name in NAMES)

        return of

    def explain(tree):
        for name in ("", *NAMES):
            rule = tree.rule(name)
            policy = tree.default if rule is None else rule.policy
            yield ModulePolicy(name, "Hand" if not name else "Sum", 4 if name else 0, str(policy), "", "")

    params = {name: jnp.asarray(np.random.default_rng(7).normal(size=4), jnp.float32) for name in NAMES}
    return loss, explain, [(params, [(x,) for x in data])]


def rounded(x):
    return np.asarray(x, np.float32).astype(np.float16).astype(np.float64)


@pytest.fixture(scope="module")
def data():
    rng = np.random.default_rng(0)
    return [jnp.asarray(rng.normal(size=(8, 4)), jnp.float32) for _ in range(3)]


@pytest.fixture(scope="module")
def found_by_hand(data):
    return jaxmp.find_policy(*by_hand(data), loss_scale=1.0)


def exact_gradient(p, x):
    x, p = np.asarray(x, np.float64), np.asarray(p, np.float64)
    return x.T @ (x @ p) / len(x)


@pytest.mark.slow
def test_errors_are_those_of_float64_arithmetic_in_units_of_the_noise(data, found_by_hand):
    """The gradient of a dot of rounded operands, in NumPy and float64, with float16 where JAX rounds."""
    _, _, [(params, _)] = by_hand(data)
    p = params["a"]
    exact = np.stack([exact_gradient(p, x) for x in data])
    noise = np.sqrt(np.sum(np.var(exact, axis=0, ddof=1)))
    half = []
    for x in data:
        y = rounded(rounded(x) @ rounded(p))
        half.append(rounded(rounded(x).T @ rounded(y / len(x))))
    expected = np.sqrt(np.mean(np.sum((np.stack(half) - exact) ** 2, axis=1))) / noise
    (flip,) = (flip for flip in found_by_hand.modules if flip.module == "a")
    # The order of the sums is XLA's own: a unit in the last place of float16, now and then, of eight of them.
    assert flip.alone.error == pytest.approx(expected, rel=0.5)
    assert flip.alone.parameter == "a"
    norms = len(NAMES) * np.mean(np.sum(exact**2, axis=1))  # the modules are alike
    assert flip.alone.relative_error == pytest.approx(flip.alone.error * noise / np.sqrt(norms), rel=1e-3)
    assert found_by_hand.float32.error < 2**-20 / noise


@pytest.mark.slow
def test_it_is_deterministic(data, found_by_hand):
    assert jaxmp.find_policy(*by_hand(data), loss_scale=1.0) == found_by_hand


def test_a_model_without_products_is_refused():
    class Norms(nn.Module):
        @nn.compact
        def __call__(self, x):
            return nn.LayerNorm()(nn.LayerNorm()(x))[:, :3]

    with pytest.raises(InputError, match="no module has a product or a convolution of its own"):
        jaxmp.find_policy(*pieces(Norms()), loss_scale=1.0)


@pytest.mark.slow
def test_what_overflows_at_the_loss_scale_is_outside_the_budget(data):
    with pytest.raises(InputError, match=r"no module with FLOPs can be in half .*; all of them overflow"):
        jaxmp.find_policy(*by_hand(data), loss_scale=2.0**24)


@pytest.mark.slow
def test_modules_are_taken_by_their_error_as_long_as_the_budget_lasts(data):
    """Errors of which each fits, those of a and b together as well, and all three do not: all in one direction."""
    loss, explain, points = by_hand(data)

    exact = np.stack([exact_gradient(points[0][0]["a"], x) for x in data])
    noise = np.sqrt(np.sum(np.var(exact, axis=0, ddof=1)))

    def coarser(tree):
        def of(params, x):
            in_half = [name for name in NAMES if tree.lookup(name).compute_dtype == np.float16]
            bias = jnp.float32(sum({"a": 0.01, "b": 0.03, "c": 0.1}[name] for name in in_half))
            return loss(tree)(params, x) + bias * jnp.sum(params["a"])

        return of

    budget = 0.12 * 2 / noise  # 2: the norm of ones, in four places
    found = jaxmp.find_policy(coarser, explain, points, budget=budget, loss_scale=1.0)
    alone = {flip.module: flip.alone.error for flip in found.modules if flip.alone}
    assert alone["a"] < alone["b"] < alone["c"] < budget < sum(alone.values())
    assert found.precision == "c=float32; mixed_float16"
    assert found.gap.error == pytest.approx(alone["a"] + alone["b"], rel=0.1)
    tried = [(set(trial.added), trial.taken) for trial in found.trials]
    assert tried == [({"a", "b", "c", ""}, False), ({"a", "b"}, True), ({"c", ""}, False), ({"c"}, False), ({""}, True)]


@pytest.mark.slow
def test_a_gradient_that_is_zero_is_not_judged(data):
    """As that of a bias before a normalisation: what float32 makes of it is rounding, and half all the more."""
    loss, explain, [(params, points)] = by_hand(data)

    def shifted(tree):
        def of(params, x):
            shift = params["shift"].astype(tree.lookup("a").compute_dtype)
            y = x.astype(shift.dtype) + shift
            y = y - jnp.mean(y, axis=-1, keepdims=True)
            return loss(tree)({n: params[n] for n in NAMES}, x) + jnp.mean(jnp.sin(y).astype(params["a"].dtype) ** 2)

        return of

    found = jaxmp.find_policy(shifted, explain, [({**params, "shift": jnp.float32(0.3)}, points)], loss_scale=1.0)
    assert found.unresolved == ("shift",)
    assert found.half_flops_share == 1


# Trees.


@st.composite
def assignments(draw):
    paths = [""]
    for block in ("encoder_0", "encoder_1", "Dense_0", "Dense_1", "head"):
        paths.append(block)
        if block.startswith("encoder"):
            paths += [f"{block}/{inner}" for inner in ("query", "key", "mlp", "mlp/Dense_0", "mlp/Dense_1")]
    return {path: draw(st.sampled_from([HALF, FULL])) for path in paths}


def rows_of(want):
    def explain(tree):
        return [ModulePolicy(path, "Module", 1, str(tree.lookup(path)), "", "") for path in want]

    return explain


@hypothesis.given(assignments())
@hypothesis.settings(max_examples=20)
def test_a_tree_gives_every_module_its_policy_and_no_rule_is_idle(want):
    tree = shortest_tree(want, rows_of(want))
    assert {path: tree.lookup(path) for path in want} == want
    tree.require_match({path: () for path in want})
    for i in range(len(tree.rules)):
        fewer = PolicyTree((*tree.rules[:i], *tree.rules[i + 1 :]), tree.default)
        assert {path: fewer.lookup(path) for path in want} != want


@pytest.mark.parametrize(
    ("full", "expected"),
    [
        (["Dense_1"], "Dense_1"),
        (["Dense_0", "Dense_1"], "Dense_*"),
        (["encoder_0/query", "encoder_1/query"], "encoder_*/query"),
        (["encoder_0/mlp", "encoder_0/mlp/Dense_0", "encoder_0/mlp/Dense_1"], "encoder_0/mlp"),
        (["encoder_0/mlp/Dense_0", "encoder_0/mlp/Dense_1"], "encoder_0/mlp/Dense_*"),
    ],
)
def test_rules_for_modules_alike_become_one(full, expected):
    paths = ["", "Dense_0", "Dense_1"]
    for block in ("encoder_0", "encoder_1"):
        paths += [block, *(f"{block}/{inner}" for inner in ("query", "mlp", "mlp/Dense_0", "mlp/Dense_1"))]
    want = {path: FULL if path in full else HALF for path in paths}
    assert [rule.pattern for rule in shortest_tree(want, rows_of(want)).rules] == [expected]


def test_a_recurrent_cell_can_have_a_policy_of_its_own():
    class Recurrent(nn.Module):
        @nn.compact
        def __call__(self, x):
            return nn.Dense(2)(nn.RNN(nn.SimpleCell(3))(x))

    x = jax.ShapeDtypeStruct((2, 3, 4), jnp.float32)
    names = [row.module for row in jaxmp.explain(Recurrent(), FULL_TREE, x)]
    for cell_in_half in (True, False):
        want = {name: HALF if (name.startswith("SimpleCell") == cell_in_half) else FULL for name in names}
        tree = shortest_tree(want, lambda tree: jaxmp.explain(Recurrent(), tree, x))
        assert {row.module: parse_policy(row.policy) for row in jaxmp.explain(Recurrent(), tree, x)} == want


FULL_TREE = PolicyTree((), FULL)


class Cells(nn.Module):
    """A recurrent model whose cells stand beside the layers that scan them."""

    @nn.compact
    def __call__(self, x):
        h = nn.RNN(nn.SimpleCell(6), name="rnn")(x)
        return nn.Dense(2)(nn.RNN(nn.GRUCell(5))(h))


class InSetup(nn.Module):
    def setup(self):
        self.cell = nn.SimpleCell(6)
        self.rnn = nn.RNN(self.cell)

    def __call__(self, x):
        return self.rnn(x)


class Both(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.Bidirectional(nn.RNN(nn.SimpleCell(6), name="rnn"), nn.RNN(nn.SimpleCell(6)))(x)


@pytest.mark.parametrize(
    ("model", "cells"),
    [
        (Cells(), {"SimpleCell_0": 60, "GRUCell_0": 3 * 55}),
        (InSetup(), {"cell": 60}),
        (Both(), {"SimpleCell_0": 60, "SimpleCell_1": 60}),
    ],
    ids=["Cells", "InSetup", "Both"],
)
def test_the_flops_of_a_recurrent_layer_are_those_of_its_cell(model, cells):
    x = jax.ShapeDtypeStruct((3, 5, 4), jnp.float32)
    params = jax.eval_shape(model.init, jax.random.key(0), x)["params"]

    def loss(params, x):
        return jnp.sum(model.apply({"params": params}, x))

    flops = _flops(loss, list(jaxmp.explain(model, FULL_TREE, x)), Point(params, [(x,)]))
    for cell, weights in cells.items():
        # Of the first layer's two products one is not differentiated by its input.
        inside = sum(n for path, n in flops.items() if path.split("/")[0] == cell)
        assert 2 * 2 * 3 * 5 * weights < inside <= 3 * 2 * 3 * 5 * weights, flops
    assert not any(n for path, n in flops.items() if path in ("", "rnn") or path.startswith("RNN"))


class Sampling(nn.Module):
    """Noise and dropout, as in a variational autoencoder."""

    @nn.compact
    def __call__(self, x, train=False):
        h = nn.Dense(4, name="mean")(x)
        if train:
            h += 0.1 * jax.random.normal(self.make_rng("noise"), h.shape)
        return nn.Dense(3, name="head")(nn.Dropout(0.25, deterministic=not train)(h))


@pytest.mark.slow
def test_random_draws_are_the_same_under_each_tree_and_in_float64():
    data = list(batches())
    params = jax.jit(Sampling().init)(jax.random.key(0), data[0][0])["params"]

    def loss(tree):
        def of(params, x, y):
            rngs = {name: jax.random.key(1) for name in ("noise", "dropout")}
            logits = jaxmp.with_policy(Sampling().apply, tree)({"params": params}, x, train=True, rngs=rngs)
            return jnp.mean(optax.softmax_cross_entropy_with_integer_labels(logits, y))

        return of

    explain = lambda tree: jaxmp.explain(Sampling(), tree, data[0][0])  # noqa: E731
    found = find_policy(loss, explain, [(params, data)], budget=0.5, unit="gradient")
    # Another mask or noise would be an error of the size of the gradient.
    assert found.float32.relative_error < 1e-5 and found.gap.relative_error < 1e-2 and found.gap.overflow == 0
    assert found.half_flops_share == 1


# The command.

CONFIG = '''"""Noisy classes of 8 pixels."""
import flax.linen as nn
import jax.numpy as jnp
import numpy as np
from jaxmp import Adam, Arrays, Experiment, Loop


class Loud(nn.Module):
    @nn.compact
    def __call__(self, x):
        kernel = self.param("kernel", nn.initializers.normal(100.0), (x.shape[-1], 3))
        return (x * 3e4) @ kernel


class Net(nn.Module):
    @nn.compact
    def __call__(self, image, *, train=False):
        x = nn.relu(nn.Dense(8, name="hidden")(image.reshape(image.shape[0], -1)))
        return Loud(name="loud")(x) * jnp.float32(1e-6)


class Whole(nn.Module):
    @nn.compact
    def __call__(self, image, *, train=False):
        return image.reshape(image.shape[0], -1) @ self.param("kernel", nn.initializers.normal(1.0), (8, 3))


def load(split):
    rng = np.random.default_rng({"train": 0, "validation": 1, "test": 2}[split])
    label = rng.integers(0, 3, 48)
    image = rng.integers(0, 100, (48, 2, 4, 1)) + 50 * label[:, None, None, None]
    return {"image": image.astype(np.uint8), "label": label}


def get_config():
    return Experiment(
        model=MODEL(), data=Arrays(load, batch_size=16, mean=(0.3,)), optimizer=Adam(0.01), loop=Loop(epochs=2)
    )
'''


@pytest.fixture(scope="module")
def configs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("configs")
    for name, model in (("net", "Net"), ("whole", "Whole")):
        (folder / f"{name}.py").write_text(CONFIG.replace("MODEL", model))
    return folder


@pytest.mark.slow
def test_the_command_writes_the_tree_and_the_evidence(configs, capsys):
    output = configs / "found.json"
    arguments = ["find-policy", str(configs / "net.py"), "--warmup-steps", "0", "--batches", "2"]
    assert main([*arguments, "--json", str(output)]) == 0
    out = capsys.readouterr().out
    assert "precision        loud=float32; mixed_float16" in out
    assert "state after 0 steps, batches 1 to 2" in out
    found = json.loads(output.read_text())
    assert found["precision"] == "loud=float32; mixed_float16"
    assert found["loss_scale"] == 2.0**15
    assert [flip["module"] for flip in found["modules"] if not flip["half"]] == ["loud"]
    assert found["half_flops_share"] == pytest.approx(2 * 8 * 8 / (2 * 8 * 8 + 3 * 8 * 3))
    trained = ConfigFile.find(str(configs / "net.py")).experiment(["--precision", found["precision"]])
    table = jaxmp.explain(trained.model, trained.policy, jax.ShapeDtypeStruct((1, 2, 4, 1), jnp.float32))
    assert [row.module for row in table if row.policy == str(FULL)] == ["loud"]


@pytest.mark.slow
def test_the_states_of_a_run_are_read_and_the_run_is_not_changed(configs, capsys):
    workdir = configs / "runs"
    config = str(configs / "net.py")
    assert main(["train", config, "--precision", "float32", "--workdir", str(workdir)]) == 0

    def contents():
        return {path: (path.stat().st_mtime_ns, path.read_bytes()) for path in workdir.rglob("*") if path.is_file()}

    before = contents()
    assert main(["find-policy", config, "--run", str(workdir)]) == 0
    assert contents() == before
    out = capsys.readouterr().out
    assert [f"state after {step} steps" in out for step in (0, 3, 6)] == [True] * 3
    assert main(["find-policy", config, "--warmup-steps", "3"]) == 0  # the same state, trained for the purpose
    again = capsys.readouterr().out
    assert "state after 3 steps, batches 4 to 7" in again
    assert main(["find-policy", str(configs / "whole.py"), "--run", str(workdir)]) == 2


@pytest.mark.few_variants
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["net", "--budget", "0"], "budget 0: expected a positive number"),
        (["net", "--budget=-1"], "budget -1: expected a positive number"),
        (["net", "--budget", "nan"], "budget nan: expected a positive number"),
        (["net", "--half", "float32"], "half float32: expected a policy that computes in half"),
        (["net", "--half", "mixed_float61"], "did you mean 'mixed_float16'?"),
        (["net", "--loss-scale", "3"], "loss_scale=3.0: expected a power of two"),
        (["net", "--batches", "0"], "batches=0: expected a whole number of at least 1"),
        (["net", "--batches", "1", "--warmup-steps", "0"], "the unit noise takes 2 batches or more"),
        (["net", "--run", "nowhere"], "run 'nowhere': no such folder"),
        (["whole"], "Whole has one module only"),
    ],
)
def test_bad_input_is_one_message_and_exit_code_2(configs, capsys, arguments, message):
    name, *options = arguments
    assert main(["find-policy", str(configs / f"{name}.py"), *options]) == 2
    err = capsys.readouterr().err
    assert message in err
    assert err.count("\n") == 1


def test_an_unknown_config_is_named(capsys):
    assert main(["find-policy", "digits_mpl"]) == 2
    assert "digits_mlp" in capsys.readouterr().err


@pytest.mark.slow
def test_a_budget_below_float32_or_below_all_modules_says_what_would_do(data):
    with pytest.raises(InputError, match=r"budget 1e-12: float32 itself has an error of"):
        jaxmp.find_policy(*by_hand(data), budget=1e-12)
    with pytest.raises(InputError, match=r"no module with FLOPs can be in half .*; [abc] comes nearest, with 0\.00"):
        jaxmp.find_policy(*by_hand(data), budget=1e-5, loss_scale=1.0)
    with pytest.raises(InputError, match=r"unit 'noice': expected one of noise, gradient, float32"):
        jaxmp.find_policy(*by_hand(data), unit="noice")


class Normed(nn.Module):
    """Two layers, and a normalisation, in which a recipe rounds nothing."""

    @nn.compact
    def __call__(self, x):
        return nn.Dense(4, name="last")(nn.LayerNorm(name="norm")(nn.Dense(64, name="first")(x)))


@pytest.mark.slow
def test_which_layers_bear_a_recipe_is_found():
    x = jax.random.normal(jax.random.key(0), (4, 32, 64))
    model = Normed()
    params = model.init(jax.random.key(1), x[0])["params"]
    target = jax.random.normal(jax.random.key(2), (32, 4))

    def loss(tree):
        apply = jaxmp.with_policy(model.apply, tree)

        def of_batch(params, x):
            y = apply({"params": params}, x, rngs={"params": jax.random.key(0)})
            return jnp.mean(y * target)

        return of_batch

    points = [(params, [(each,) for each in x])]
    explain = lambda tree: jaxmp.explain(model, tree, x[0])  # noqa: E731
    errors = find_policy(loss, explain, points, half="mxfp4", budget=1e6, unit="gradient")
    alone = {each.module: each.alone for each in errors.modules}
    assert alone["norm"] is None and alone[""] is None  # no product of theirs is rounded
    assert errors.precision == "mxfp4" and errors.half_flops_share == 1
    better, worse = sorted(("first", "last"), key=lambda name: alone[name].error)
    budget = (alone[better].error * alone[worse].error) ** 0.5
    found = find_policy(loss, explain, points, half="mxfp4", budget=budget, unit="gradient")
    assert found.tree.lookup(worse).recipe is None and found.tree.lookup(better).recipe is not None
    assert set(found.flops_by_dtype) == {"mxfp4:rceil/mxfp4:rceil", "float32"}
    with pytest.raises(InputError, match=r"fp8_delayed: its scales follow.*fp8_current"):
        find_policy(loss, explain, points, half="fp8_delayed")
