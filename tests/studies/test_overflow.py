"""`blame`: overflows that were planted are found where they were planted, and nothing else is blamed."""

import dataclasses
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import jaxmp
from jaxmp import Arrays, Classification, Experiment, InputError, Loop, Run, Scaling
from jaxmp.cli import main
from jaxmp.instruments.nonfinite import Replay, blame
from jaxmp.jaxprs import equations, is_backward, is_scaling
from jaxmp.modules.linen import with_policy
from jaxmp.precision.formats import fake_quantize, quantize
from jaxmp.runs.trainer import Trainer
from jaxmp.scaling.transform import last_step_finite
from jaxmp.studies.overflow import blame_run
from jaxmp.training.gradients import make_gradients

ROOT = Path(__file__).parents[2]

F16, F32 = jnp.float16, jnp.float32


def half(*numbers):
    return jnp.array(numbers, F16)


def loss_of(model, policy="mixed_float16", scale=1.0):
    """The loss of a model under a policy, times a loss scale, as a function of its parameters and input."""
    apply = with_policy(model.apply, policy)

    def loss(params, x):
        return jnp.sum(apply({"params": params}, x).astype(F32)) * scale

    return loss


def variables(model, x, **changed):
    """Parameters of ones, but for those that are named by their path, `_` for `/`."""
    shapes = jax.eval_shape(model.init, jax.random.key(0), x)["params"]
    fill = {path.replace("_", "/"): value for path, value in changed.items()}

    def value(path, leaf):
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        return jnp.full(leaf.shape, fill.get(name.replace("_", "/"), 1.0), leaf.dtype)

    return jax.tree_util.tree_map_with_path(value, shapes)


# The planted faults. Each is a function and its arguments.


class Net(nn.Module):
    """Two layers, of which the second is called head."""

    @nn.compact
    def __call__(self, x):
        return nn.Dense(1, name="head")(nn.relu(nn.Dense(3, name="hidden")(x)))


class Recurrent(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.RNN(nn.SimpleCell(2, name="cell", activation_fn=lambda h: h), name="rnn")(x)


class Layer(nn.Module):
    @nn.compact
    def __call__(self, carry, _):
        return nn.Dense(2, use_bias=False, name="dense")(carry), None


class Scanned(nn.Module):
    @nn.compact
    def __call__(self, x):
        layers = nn.scan(Layer, variable_axes={"params": 0}, split_rngs={"params": True}, length=4)
        return layers(name="layers")(x, None)[0]


class Remat(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.remat(nn.Dense)(3, name="block")(x) * 2


class Attention(nn.Module):
    """Logits of one position to 70,000, and the sum of a softmax over them in half."""

    @nn.compact
    def __call__(self, x):
        q = nn.Dense(1, name="query")(x)
        logits = q * jnp.zeros(70_000, q.dtype)
        with jax.named_scope("softmax"):
            total = lax.reduce(jnp.exp(logits), np.zeros((), logits.dtype), lax.add, (1,))
            return logits - total  # its logarithm would make the policy compute the sum in float32


class Scores(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.MultiHeadDotProductAttention(1, name="attention")(x, x, x)


class Embedded(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.Embed(5, 4, name="table")(x.astype(int))


@jax.custom_vjp
def doubled(x):
    return 2 * x


doubled.defvjp(lambda x: (2 * x, None), lambda _, g: (g * F16(1e4),))


@jax.custom_jvp
def squashed(x):
    return jnp.tanh(x)


squashed.defjvp(lambda primals, tangents: (jnp.tanh(primals[0]), tangents[0] * jnp.exp(primals[0])))


def in_rules(x):
    with jax.named_scope("rules"):
        return doubled(x).astype(F32).sum() * 16


def in_jvp_rule(x):
    with jax.named_scope("squash"):
        return squashed(x).sum()


def norm(x):
    with jax.named_scope("norm"):
        return jnp.sqrt(lax.reduce(x * x, np.float16(0), lax.add, (0,)))


def branch(x):
    return lax.cond(x[0] > 0, lambda x: jnp.log(x - x), lambda x: x, x).sum()


def growing(x):
    return lax.while_loop(lambda c: c[0] < 9, lambda c: (c[0] + 1, c[1] * c[1]), (0, x))[1]


def forward_scan(x):
    return lax.scan(lambda c, x: (c * x, c), F16(1), x)[0]


def nested_scans(x):
    def outer(c, row):
        return lax.scan(lambda c, x: (c + x, None), c, row)[0], None

    return lax.scan(outer, F16(0), x)[0]


def running_maximum(x):
    """As in online softmax: the carry begins at -inf, and the exponential of an overflow comes later."""

    def body(c, x):
        highest = jnp.maximum(c[0], x)
        return (highest, c[1] * jnp.exp(c[0] - highest) + jnp.exp(x) * 100), None

    return lax.scan(body, (F16(-jnp.inf), F16(0)), x)[0][1]


def grad_of(model, x, scale=1.0, policy="mixed_float16", **values):
    return jax.grad(loss_of(model, policy, scale)), variables(model, x, **values), x


def loss_and(model, x, policy="mixed_float16", **values):
    return loss_of(model, policy), variables(model, x, **values), x


ONES = np.ones((2, 4), np.float32)
PLANTED = {
    # name: (function and arguments, value, primitive, path, backward, turns)
    "exp": (lambda: (jnp.exp, half(1, 12)), "inf", "exp", "", False, ()),
    "log of zero": (lambda: (lambda x: jnp.log(x).sum(), half(1, 0)), "-inf", "log", "", False, ()),
    "division by zero": (lambda: (lambda x: (1 / x).sum(), half(1, 0)), "inf", "div", "", False, ()),
    "norm of large values": (lambda: (norm, half(300, 300)), "inf", "mul", "norm", False, ()),
    "sum in half": (lambda: (norm, half(*[200] * 4)), "inf", "reduce_sum", "norm", False, ()),
    "cast": (lambda: (lambda x: x.astype(F16) * 0, jnp.array([1e5])), "inf", "convert_element_type", "", False, ()),
    "gradient of a square root": (
        lambda: (jax.grad(lambda x: jnp.sqrt(x).sum()), half(4, 0)),
        *("inf", "div", "", False, ()),  # JAX computes the factor in the forward pass
    ),
    "gradient of a masked logarithm": (
        lambda: (jax.grad(lambda x: jnp.where(x > 0, jnp.log(x), 0).sum()), half(1, 0)),
        *("NaN", "div", "", True, ()),
    ),
    "branch of a conditional": (lambda: (branch, half(1)), "-inf", "log", "", False, ()),
    "scan": (lambda: (forward_scan, half(100, 100, 10, 100)), "inf", "mul", "", False, ((2, 4),)),
    "scan in a scan": (lambda: (nested_scans, jnp.full((3, 4), 7000, F16)), "inf", "add", "", False, ((2, 3), (1, 4))),
    "while loop": (lambda: (growing, F16(3)), "inf", "mul", "", False, ((3, 0),)),
    "carry that begins at -inf": (lambda: (running_maximum, half(1, 3, 7, 3)), "inf", "mul", "", False, ((2, 4),)),
    "backward in a scan": (
        lambda: (jax.grad(lambda x: forward_scan(x) * F16(2e3)), half(0.5, 1, 2, 4, 4, 2)),
        *("inf", "mul", "", True, ((2, 6),)),
    ),
    "dense, forward": (lambda: loss_and(Net(), ONES * 1e4, head_kernel=2), "inf", "dot_general", "Net/head", False, ()),
    "dense, backward: the loss scale": (
        lambda: grad_of(Net(), ONES, scale=2.0**15, head_kernel=3),
        *("inf", "dot_general", "Net/head", True, ()),
    ),
    "cotangent of the output: the loss scale": (
        lambda: grad_of(Net(), ONES, scale=2.0**16),
        *("inf", "convert_element_type", "", True, ()),
    ),
    "bias gradient in half": (
        lambda: grad_of(
            Net(), jnp.ones((200, 4)), 2.0**10, "p=f32,c=f16,o=f32,grad=f16", head_kernel=0.1, hidden_kernel=0
        ),
        *("inf", "reduce_sum", "Net/head", True, ()),
    ),
    "embedding gradient in half": (
        lambda: grad_of(Embedded(), jnp.zeros(3), 2.0**15, "p=f32,c=f16,o=f32,grad=f16"),
        *("inf", "scatter-add", "Embedded/table", True, ()),
    ),
    "recurrent cell": (
        lambda: loss_and(Recurrent(), jnp.ones((1, 5, 2)), cell_h_kernel=20),
        *("inf", "dot_general", "Recurrent/rnn/cell/h", False, ((3, 5),)),
    ),
    "recurrent cell, backward": (
        lambda: grad_of(Recurrent(), jnp.ones((1, 5, 2)) * 1e-4, 2.0**6, cell_h_kernel=8, cell_i_bias=0),
        *("inf", "dot_general", "Recurrent/rnn/cell/h", True, ((2, 5),)),
    ),
    "scanned layers": (
        lambda: loss_and(Scanned(), jnp.ones((1, 2)), layers_dense_kernel=20),
        *("inf", "dot_general", "Scanned/layers/dense", False, ((3, 4),)),
    ),
    "remat": (lambda: loss_and(Remat(), ONES * 1e4), "inf", "mul", "Remat", False, ()),
    "remat, backward": (
        lambda: (
            jax.grad(lambda p, x: loss_of(Remat(), scale=2.0**14)(p, x)),
            variables(Remat(), jnp.ones((1, 4)) * 3),
            jnp.ones((1, 4)) * 3,
        ),
        *("inf", "dot_general", "Remat/block", True, ()),
    ),
    "rule of a custom_vjp": (lambda: (jax.grad(in_rules), half(1)), "inf", "mul", "rules", True, ()),
    "rule of a custom_jvp": (lambda: (jax.grad(in_jvp_rule), half(12)), "inf", "exp", "squash", False, ()),
    "softmax in half": (
        lambda: loss_and(Attention(), jnp.ones((1, 2)), "float16"),
        *("inf", "reduce_sum", "Attention/softmax", False, ()),
    ),
    "attention scores": (
        lambda: loss_and(Scores(), jnp.ones((1, 3, 4)) * 100),
        *("inf", "dot_general", "Scores/attention", False, ()),
    ),
    "emulated e5m2 gradients": (
        lambda: grad_of(Net(), ONES, 2.0**16, "c=e4m3/e5m2"),
        *("inf", "quantize_e5m2", "Net/head", True, ()),
    ),
    "emulated e4m3": (
        lambda: (lambda x: quantize(x, "e4m3", saturate=False), jnp.array([500.0])),
        "NaN",
        "quantize_e4m3",
        "",
        False,
        (),
    ),
    "emulated e4m3, backward": (
        lambda: (jax.grad(lambda x: fake_quantize(x, None, "e4m3", saturate=False) * 1e3), F32(1)),
        *("NaN", "quantize_e4m3", "", True, ()),
    ),
    "NaN in the data": (
        lambda: loss_and(Net(), np.where(np.arange(4) == 1, np.nan, ONES)),
        "NaN",
        "argument",
        "x",
        False,
        (),
    ),
    "inf in a parameter": (
        lambda: loss_and(Net(), ONES, head_kernel=jnp.inf),
        *("inf", "argument", "params/head/kernel", False, ()),
    ),
    "-inf in a parameter": (
        lambda: loss_and(Net(), ONES, head_kernel=-jnp.inf),
        *("-inf", "argument", "params/head/kernel", False, ()),
    ),
    "overflow beside a mask": (
        lambda: (lambda x: jax.nn.softmax(jnp.where(x > 5, x, -jnp.inf) * 400), half(200, 1)),
        *("inf and -inf", "mul", "", False, ()),
    ),
    "overflow beside a mask that was given": (
        lambda: (lambda x, mask: jax.nn.softmax((x + mask) * 400), half(200, 1), half(0, -jnp.inf)),
        *("inf and -inf", "mul", "", False, ()),
    ),
    "carry that is still at -inf": (lambda: (running_maximum, half(7, 3)), "inf", "mul", "", False, ((0, 2),)),
    "a mask of a whole row that was given": (
        lambda: (lambda x, mask: jax.nn.softmax(x + mask), half(200, 1), half(-jnp.inf, -jnp.inf)),
        *("-inf", "argument", "mask", False, ()),
    ),
    "a row that is masked as a whole": (
        lambda: (lambda x: jax.nn.softmax(jnp.where(x > 5, x, -jnp.inf)), half(1, 2)),
        *("NaN", "sub", "", False, ()),
    ),
}


# What takes about a second each, and is much like another of these.
SLOW = {
    *("bias gradient in half", "attention scores", "recurrent cell", "softmax in half", "embedding gradient in half"),
    "scanned layers",
}


@pytest.mark.few_variants
@pytest.mark.parametrize("name", [pytest.param(n, marks=[pytest.mark.slow] if n in SLOW else []) for n in PLANTED])
def test_a_planted_fault_is_found(name):
    planted, value, primitive, path, backward, turns = PLANTED[name]
    found = blame(*planted())
    assert found.value == value
    assert (found.primitive, found.path, found.backward, found.turns) == (primitive, path, backward, turns)


@pytest.mark.parametrize(
    ("harmless", "argument"),
    [
        (lambda x: jnp.where(x > 0, jnp.log(x), 0), half(0, 1)),
        (lambda x: jax.nn.softmax(jnp.where(x > 0, x, -jnp.inf)), half(0, 1, 2)),
        (lambda x: jax.nn.softmax(x), half(1, -jnp.inf)),
        (lambda x: jnp.where(x > 5, jnp.nan, x), half(1, 2)),
        (lambda x: jnp.minimum(x, jnp.inf), half(1, 2)),
        (lambda x: lax.scan(lambda c, x: (jnp.maximum(c, x), c), F16(-jnp.inf), x)[0], half(1, 2)),
        (lambda x: jnp.zeros(2) + len(x), half(jnp.nan)),
    ],
)
def test_what_reaches_no_result_and_what_was_written_on_purpose_is_not_blamed(harmless, argument):
    assert blame(harmless, argument) is None


def test_a_masked_overflow_before_the_one_that_counts_is_passed_over():
    def f(x):
        masked = jnp.where(x > 100, x, jnp.exp(x))  # exp(200) is inf, and selected away
        return masked * x * x

    found = blame(f, half(2, 200))
    assert found.primitive == "mul" and found.operands[0].largest == 40000


def test_the_turn_is_the_first_that_leads_to_a_result():
    """A carry that overflows and is never read again is not what overflowed in the other carry, later."""

    def body(carry, _):
        a, b = carry
        return (a * 10, b * 3), None

    (_, *args), first = (None, half(1000), half(1)), lambda c: c[0][1]
    found = blame(lambda a, b: first(lax.scan(body, (a, b), None, length=12)), *args)
    assert found.turns == ((10, 12),) and 3**10 < 65504 < 3**11


@pytest.mark.parametrize(
    "loop",
    [
        lambda x: lax.while_loop(jnp.isfinite, lambda c: c / 2, x),
        lambda x: lax.scan(lambda c, _: (c / 2, None), x, None, length=0)[0],
    ],
)
def test_a_loop_without_a_turn_leads_on_to_what_it_was_given(loop):
    found = blame(lambda x: loop(jnp.log(x)), F16(0))
    assert (found.primitive, found.value) == ("log", "-inf")


def test_ranges_are_those_of_the_operands_and_the_limit_is_the_formats():
    found = blame(lambda x, y: x * y, half(0, 2, -3), half(1, 2, 30000))
    x, y = found.operands
    assert (x.smallest, x.largest, x.zeros, y.smallest, y.largest) == (2, 3, 1, 1, 30000)
    assert found.value == "-inf" and (found.result.minus_inf, found.result.inf, found.result.nan) == (1, 0, 0)
    assert found.result.limit == np.finfo(np.float16).max and found.result.largest == 4
    assert found.reaches == ("result",)
    assert str(found).splitlines()[0].split(maxsplit=1) == ["first", "-inf from mul, forward"]
    assert json.loads(json.dumps(found.to_json()))["operands"][0]["largest"] == 3


def test_rounding_to_an_emulated_format_is_one_operation():
    found = blame(lambda x: quantize(x, "e4m3", saturate=False), jnp.array([500.0, 1.0]))
    (operand,) = found.operands
    assert (operand.dtype, operand.largest, found.result.dtype, found.result.limit) == ("float32", 500, "e4m3", 448)


def test_the_loss_times_the_loss_scale_is_named_as_jaxmps_own():
    def scaled(loss, scale):
        with jax.named_scope("loss_scale"):
            return loss * scale

    assert blame(scaled, F32(1e30), F32(2.0**40)).note == "jaxmp's own: the loss times the loss scale"

    # A train step has it under that name, forward and backward.
    gradients = make_gradients(lambda params, state, batch, key: (params * 2, (F32(1), {}, state)))
    jaxpr = jax.make_jaxpr(gradients)(F32(1), {}, F32(8), {"weight": jnp.ones(1)}, None)
    names = [(equation.primitive.name, is_backward(names)) for equation, names in equations(jaxpr) if is_scaling(names)]
    assert names == [("mul", False), ("mul", True)]


def test_a_line_is_that_of_the_user():
    found = blame(lambda x: jnp.exp(x), F16(12))
    file, _, line = found.source.rpartition(":")
    assert (
        file == __file__
        and "found = blame(lambda x: jnp.exp(x)" in Path(__file__).read_text().splitlines()[int(line) - 1]
    )


def test_results_that_are_not_finite_are_named():
    found = blame(lambda p: {"a": p["x"] * 2, "b": [p["x"] - 1, p["y"]]}, {"x": half(60000), "y": half(1)})
    assert found.reaches == ("result/a",)


def test_a_function_that_does_not_trace_is_an_input_error():
    with pytest.raises(InputError, match=r"blame: .* does not trace with these arguments .*expected a function of"):
        blame(lambda x: x if x > 0 else -x, half(1))


def test_a_function_traced_once_can_be_replayed_on_other_values():
    replay = Replay(lambda x: lax.scan(lambda c, _: (c * 2, None), x, None, length=8)[0], F16(1))
    assert replay.blame(F16(255)) is None
    assert replay.blame(F16(256)).turns == ((7, 8),)


# Runs

CONFIG = """
import flax.linen as nn
import numpy as np
from jaxmp import SGD, Arrays, Classification, Experiment, Loop


class Net(nn.Module):
    gain: float = 1.0

    @nn.compact
    def __call__(self, x):
        x = nn.relu(nn.Dense(8, name="body")(x))
        return nn.Dense(2, name="head")(x * self.gain) / self.gain


def load(split):
    rng = np.random.default_rng({"train": 0, "validation": 1, "test": 2}[split])
    label = rng.integers(0, 2, 64)
    return {"x": rng.normal(size=(64, 4)).astype(np.float32) + label[:, None], "label": label}


def get_config():
    return Experiment(
        model=Net(),
        data=Arrays(load, batch_size=16, images=()),
        task=Classification(inputs=("x",)),
        optimizer=SGD(0.1),
        loop=Loop(steps=16, log_every=4, eval_every=8),
    )
"""


@pytest.fixture
def config(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "net.py").write_text(CONFIG)
    return "net.py"


def skipped_at(experiment):
    """The steps, counted from 1, that a run skips."""
    one_by_one = dataclasses.replace(experiment, loop=dataclasses.replace(experiment.loop, steps_per_dispatch=1))
    return [info.step for info in jaxmp.steps(one_by_one) if not last_step_finite(info.state.opt_state)]


def test_what_is_written_is_json_though_a_number_is_not_finite(tmp_path, monkeypatch):
    found = SimpleNamespace(to_json=lambda: {"largest": float("inf"), "of": [float("nan"), 1.0]})
    monkeypatch.setattr("jaxmp.runs.run.Run", lambda path: path)
    monkeypatch.setattr("jaxmp.studies.overflow.blame_run", lambda *args, **how: found)
    assert main(["blame", "a", "--json", str(tmp_path / "b.json")]) == 0
    assert json.loads((tmp_path / "b.json").read_text()) == {"largest": None, "of": [None, 1.0]}


@pytest.mark.slow
def test_the_last_skipped_step_of_a_run_is_found_with_its_scale_and_rule(config, capsys):
    assert main(["train", config, "--scaler.init-scale", str(2.0**20)]) == 0
    run = Run("runs")
    capsys.readouterr()
    assert main(["blame", "runs", "--json", "blame.json"]) == 0
    out, _ = capsys.readouterr()
    found = json.loads(Path("blame.json").read_text())
    step = skipped_at(run.experiment)[-1]
    assert found["step"] == step and f"step        {step} of" in out
    assert found["module"] == "head" and found["found"]["backward"]

    # What it says of the scale holds for the step as it is trained: finite with this one, and not with the double.
    trainer, state = run_training(run, step)
    gradients = jax.jit(make_gradients(trainer.loss_fn()))
    batch, key = trainer.feed(fuse=True).batch(step - 1), jax.random.fold_in(state.key, step - 1)

    def is_finite(scale):
        grads, _, _ = gradients(state.params, state.model_state, scale, batch, key)
        return all(bool(jnp.isfinite(leaf).all()) for leaf in jax.tree.leaves(grads))

    assert found["scale"] == 2 * found["passing_scale"]
    assert is_finite(found["passing_scale"]) and not is_finite(found["scale"])


def run_training(run, step):
    """The training of a run, and the state that a step begins with."""
    trainer = Trainer(run.experiment)
    state = trainer.init()
    for info in jaxmp.steps(dataclasses.replace(run.experiment, loop=Loop(steps=step - 1, steps_per_dispatch=1))):
        state = info.state
    return trainer, state


@pytest.mark.slow
def test_a_failed_run_gives_the_command_that_names_the_module_and_the_rule_keeps_it_going(config, capsys):
    planted = ["train", config, "--model.gain", "30000", "--loop.max-consecutive-skips", "5"]
    assert main(planted) == 1
    command = re.search(r"jaxmp (blame \S+)$", capsys.readouterr().err.strip()).group(1)
    assert main(command.split()) == 0
    named = capsys.readouterr().out
    assert re.search(r"^first +.*inf from (dot_general|mul) in Net.*, forward$", named, re.MULTILINE)
    assert "no loss scale prevents it" in named
    precision = re.search(r'--precision "?([^"]+?)"? (prevents|does)', named).group(1)
    assert main([*planted, "--precision", precision]) == 0


@pytest.mark.slow
def test_a_run_without_skips_and_other_bad_input_get_one_message(config, capsys):
    assert main(["train", config]) == 0
    capsys.readouterr()
    assert main(["blame", "runs"]) == 2
    assert "none of its 16 steps was skipped; --step N compares one with float32" in capsys.readouterr().err
    for step in ("0", "17"):
        assert main(["blame", "runs", "--step", step]) == 2
        assert f"--step {step}: expected one of the steps of" in capsys.readouterr().err
    folder = Run("runs").path
    recorded = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({k: v for k, v in recorded.items() if k != "fuse_steps"}))
    assert main(["blame", "runs"]) == 2
    assert "lacks fuse_steps: it was not written by this version" in capsys.readouterr().err
    assert main(["blame", "rums"]) == 2
    assert "did you mean 'runs'" in capsys.readouterr().err


def same_rows(split):
    """Rows and columns that are all alike, so that the gradients of all uses of a weight have one sign and size."""
    return {"x": np.ones((16, 600, 2), np.float32), "label": np.zeros(16, np.int64)}


class Use(nn.Module):
    @nn.compact
    def __call__(self, carry, x):
        return carry, nn.Dense(4, name="dense")(x)


class Uses(nn.Module):
    """One layer that is used 600 times, in a scan."""

    @nn.compact
    def __call__(self, x):
        scan = nn.scan(Use, variable_broadcast="params", split_rngs={"params": False}, in_axes=1, out_axes=1)
        return nn.Dense(2, name="head")(jnp.mean(scan(name="uses")(0, x)[1], axis=1))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("precision", "scaler", "names"),
    [
        ("mixed_float16", Scaling(), None),
        ("mixed_bfloat16", Scaling(), None),
        ("p=f32,c=bf16,o=f32,grad=bf16", Scaling(), "gradient of bias of uses/dense"),  # trap T1
        ("mixed_float16", Scaling("static", 2.0**-18), "gradient of bias of head"),  # underflow
    ],
)
def test_what_is_worse_than_rounding_is_named_where_nothing_overflowed(precision, scaler, names, tmp_path):
    experiment = Experiment(
        model=Uses(),
        data=Arrays(same_rows, batch_size=16, images=()),
        task=Classification(inputs=("x",)),
        precision=precision,
        scaler=scaler,
        loop=Loop(steps=2),
    )
    found = blame_run(Run(jaxmp.fit(experiment, workdir=tmp_path).path, experiment), 1)
    assert found.found is None
    worst = found.worst
    assert (worst and f"{worst.what} of {worst.module}") == names
    assert ("nothing is worse than rounding" in str(found)) == (names is None)


@pytest.mark.parametrize(
    "spread",
    [
        pytest.param(["--parallel.mode", "pmap"], id="pmap", marks=pytest.mark.full_size),
        pytest.param(["--parallel.shard", "zero1"], id="zero1", marks=pytest.mark.slow),
        pytest.param(["--parallel.shard", "fsdp"], id="fsdp", marks=pytest.mark.full_size),
    ],
)
def test_replicas_are_repeated_on_one_device(spread, config):
    """With their microbatches, too, so that a step of eight devices fails here where it failed there."""
    flags = f"{os.environ['XLA_FLAGS']} --xla_force_host_platform_device_count=8 --xla_backend_optimization_level=0"
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "XLA_FLAGS": flags}

    def jaxmp_(*arguments):
        command = [sys.executable, "-m", "jaxmp", *arguments]
        return subprocess.run(command, capture_output=True, text=True, env=environment)

    arguments = [*spread, "--loop.accumulate-steps", "2", "--scaler.init-scale", str(2.0**20)]
    trained = jaxmp_("train", config, *arguments)
    assert trained.returncode == 0, trained.stderr
    named = jaxmp_("blame", "runs")
    assert named.returncode == 0, named.stderr
    assert re.search("inf from (dot_general in Net/head|convert_element_type), turn [01] of 2, backward", named.stdout)


def masked_power(x, weight):
    return jnp.sum(jnp.where(weight > 0, jnp.exp(200 * jnp.log(x)), 0))


@pytest.mark.parametrize("padding", [-1.0, 1.0, 0.0])
def test_what_a_where_has_masked_in_one_row_hides_nothing_in_another(padding):
    found = blame(masked_power, jnp.array([2.0, padding]), jnp.array([1.0, 0.0]))  # -1: a NaN from log, masked
    assert found.primitive == "exp"


def test_the_branch_that_is_not_selected_is_not_blamed():
    def two_branches(x):
        other = jnp.log(x)  # first, and NaN at -1
        return jnp.where(x < 5, jnp.exp(100 * x), other)

    assert blame(two_branches, jnp.array([-1.0, 2.0])).primitive == "exp"
    assert blame(two_branches, jnp.array([-1.0, 7.0])) is None
    assert blame(lambda x: two_branches(x) * jnp.log(x), jnp.array([-1.0, 2.0])).primitive == "exp"
    assert blame(lambda x: jnp.log(x) * two_branches(x)[::-1], jnp.array([-1.0, 2.0])).primitive == "log"
