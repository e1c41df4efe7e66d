"""`memory`: predicted bytes beside the compiler's, and beside what can be counted by hand."""

import dataclasses
from pathlib import Path

import jax
import jax.numpy as jnp
import optax
import pytest

from jaxmp.errors import InputError
from jaxmp.experiment.config_file import ConfigFile
from jaxmp.runs.trainer import Trainer
from jaxmp.scaling.state_format import state_format
from jaxmp.studies.memory import memory
from jaxmp.tasks.loss import make_loss

F16, BF16, F32 = jnp.float16, jnp.bfloat16, jnp.float32
CONFIGS = sorted((Path(__file__).parents[2] / "configs").glob("*.py"))
STATE = ("master weights", "parameters", "moments", "other state")


def of(shape, dtype=F32):
    return jax.ShapeDtypeStruct(shape, dtype)


def sizes(report):
    return {(item.name, item.dtype): item.nbytes for item in report.items}


def mlp(params, x):
    for w, b in zip(params["w"], params["b"], strict=True):
        x = jnp.tanh(x @ w.astype(x.dtype) + b.astype(x.dtype))
    return jnp.sum(x.astype(F32))


def params(dtype=F32):
    return {"w": [of((64, 32), dtype), of((32, 8), dtype)], "b": [of((32,), dtype), of((8,), dtype)]}


COUNT = 64 * 32 + 32 * 8 + 32 + 8


def test_state_and_gradients_are_counted_by_kind():
    tx = optax.adam(1e-3)
    opt_state = {"adam": jax.eval_shape(tx.init, params()), "scale": of(())}
    seen = sizes(memory(mlp, params(), of((16, 64), BF16), opt_state=opt_state, state={"step": of((), jnp.int32)}))
    assert seen["master weights", "float32"] == seen["gradients", "float32"] == 4 * COUNT
    assert seen["moments", "float32"] == 8 * COUNT
    assert seen["other state", "float32"] == 4
    assert seen["other state", "int32"] == 8  # Adam's count, and the step
    assert seen["batch", "bfloat16"] == 2 * 16 * 64
    assert not any(name == "parameters" for name, _ in seen)


def test_packed_moments_count_with_elements_and_scales_under_the_name_of_their_format():
    tx = state_format(optax.adam(1e-3), mu="block128", nu="block128", expand_range=True)
    opt_state = jax.eval_shape(tx.init, params())
    found = memory(mlp, params(), of((16, 64), BF16), opt_state=opt_state)
    blocks = 64 * 32 // 128 + 32 * 8 // 128 + 1 + 1
    assert sizes(found)["moments", "block128"] == found.nbytes("moments") == 2 * (COUNT + (4 + 2) * blocks)
    assert [item.arrays for item in found.items if item.name == "moments"] == [8]


def test_half_parameters_have_no_masters_and_half_gradients():
    seen = sizes(memory(mlp, params(BF16), of((16, 64), BF16)))
    assert seen["parameters", "bfloat16"] == seen["gradients", "bfloat16"] == 2 * COUNT
    assert not any(name in ("master weights", "weights cast for compute") for name, _ in seen)


def test_what_the_backward_pass_needs_is_what_a_hand_count_says():
    # Of exp(x @ w): the result alone, which is its own derivative, and w, cast, to give the gradient of x. The first
    # weight gives no gradient to the input, which nothing is differentiated by; the input is an argument.
    def loss(params, x):
        for w in params:
            x = jnp.exp(x @ w.astype(F16))
        return jnp.sum(x.astype(F32))

    seen = sizes(memory(loss, [of((64, 32)), of((32, 8))], of((16, 64), F16)))
    assert seen["weights cast for compute", "float16"] == 2 * 32 * 8
    assert seen["saved activations", "float16"] == 2 * 16 * (32 + 8)
    assert ("saved activations", "float32") not in seen


def test_what_is_kept_in_two_shapes_is_kept_once():
    def loss(w, x):
        y = jnp.exp(x @ w)
        return jnp.sum(y * y) + jnp.sum(jnp.sin(y.reshape(-1)) * y.reshape(-1))

    kept = memory(loss, of((8, 8)), of((4, 8))).nbytes("saved activations")
    assert kept == 3 * 4 * (4 * 8)  # y, its sine and its cosine


def test_what_a_parameter_is_broadcast_to_is_an_activation():
    def loss(b):
        rows = jnp.broadcast_to(b, (4, 8))
        return jnp.sum(rows * rows)

    seen = sizes(memory(loss, of((8,))))
    assert seen["saved activations", "float32"] == 4 * 4 * 8


def test_a_cast_within_a_jitted_function_is_a_cast():
    cast = jax.jit(lambda w: w.astype(F16))

    def loss(w, x):
        return jnp.sum((jnp.exp(x @ w[0].astype(F16)) @ cast(w[1])).astype(F32))

    seen = sizes(memory(loss, [of((8, 8))] * 2, of((4, 8), F16)))
    assert seen["weights cast for compute", "float16"] == 2 * 8 * 8
    assert seen["master weights", "float32"] == 2 * 4 * 8 * 8


def test_a_scan_keeps_the_activations_of_every_turn_and_a_weight_cast_inside_it_is_a_master():
    def loss(w, x):
        return jnp.sum(jax.lax.scan(lambda h, _: (jnp.exp(h @ w.astype(BF16)), None), x, None, length=7)[0].astype(F32))

    seen = sizes(memory(loss, of((8, 8)), of((4, 8), BF16)))
    assert seen["master weights", "float32"] == 4 * 8 * 8
    # Of each turn what it was given and what came out; the cast weight, which is the same in all turns, once.
    assert seen["saved activations", "bfloat16"] == 2 * (2 * 7 * 4 * 8)
    assert seen["weights cast for compute", "bfloat16"] == 2 * 8 * 8


def test_remat_keeps_the_inputs_alone():
    def block(w, x):
        return jnp.exp(jnp.exp(x @ w.astype(BF16)))

    def loss(block, w, x):
        return jnp.sum(block(w, x).astype(F32))

    args = of((64, 64)), of((256, 64), BF16)
    kept = memory(lambda *a: loss(block, *a), *args).nbytes("saved activations")
    again = memory(lambda *a: loss(jax.checkpoint(block), *a), *args).nbytes("saved activations")
    assert kept == 2 * 2 * 256 * 64 and again == 0


def test_integers_are_state_and_have_no_gradient():
    seen = sizes(memory(lambda p, x: jnp.sum(p["w"] * x), {"w": of((3,)), "n": of((5,), jnp.int32)}, of((3,))))
    assert seen["other state", "int32"] == 20 and seen["gradients", "float32"] == 12


def test_arrays_that_are_split_count_with_the_share_of_a_device():
    mesh = jax.sharding.AbstractMesh((4,), ("d",), axis_types=(jax.sharding.AxisType.Auto,))
    split = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("d"))
    moments = {"mu": jax.ShapeDtypeStruct((64,), F32, sharding=split)}
    assert sizes(memory(lambda w: jnp.sum(w * w), of((64,)), opt_state=moments))["moments", "float32"] == 64


def test_a_loss_that_has_no_gradient_is_one_message():
    with pytest.raises(InputError, match="cannot be differentiated"):
        memory(lambda w: w @ w, of((2, 3)))


@pytest.mark.parametrize(
    ("loss", "returned"),
    [
        (lambda w: w**2, r"float32\[3\]"),
        (lambda w: (jnp.sum(w), {"accuracy": w[0]}), r"\('float32\[\]', \{'accuracy': 'float32\[\]'\}\)"),
        (lambda w: None, "None"),
    ],
)
def test_a_loss_that_is_no_scalar_is_one_message(loss, returned):
    with pytest.raises(InputError, match=f"expected a scalar; it returns {returned}"):
        memory(loss, of((3,)))


def test_the_last_row_of_the_table_is_the_total():
    seen = memory(mlp, {"w": [of((1024, 1024))], "b": [of((1024,))]}, of((16, 1024), BF16))
    *rows, total = [line.split() for line in str(seen).splitlines()]
    assert total == ["total", f"{seen.nbytes() / 2**20:.2f}"]
    assert sum(float(row[-1]) for row in rows) == pytest.approx(float(total[1]), abs=0.005 * (len(rows) + 1))


@pytest.fixture
def of_config(made_up):
    """The trainer of a config, by name, in a precision, on random rows."""

    def of(name, precision):
        (path,) = (path for path in CONFIGS if path.stem == name)
        return Trainer(dataclasses.replace(made_up(ConfigFile.find(str(path)).experiment(), 64), precision=precision))

    return of


def test_microbatches_keep_their_own_activations_alone(of_config):
    experiment = of_config("digits_mlp", "mixed_float16").experiment
    parts = dataclasses.replace(experiment, loop=dataclasses.replace(experiment.loop, accumulate_steps=2))
    whole, half = (memory(each).nbytes("saved activations") for each in (experiment, parts))
    assert half < 0.6 * whole


def compiled_gradients(trainer):
    """Bytes of the gradients, as the compiler hands them out."""
    experiment, (_, (state, batch, _)) = trainer.experiment, trainer.program()
    loss_fn = make_loss(experiment.model, experiment.task, experiment.policy)
    gradients = jax.jit(jax.grad(lambda *args: loss_fn(*args)[0]))
    compiled = gradients.lower(state.params, state.model_state, batch, state.key).compile()
    return compiled.memory_analysis().output_size_in_bytes


LARGE = ("imagenet_", "openwebtext_", "bert_base_", "cifar10_resnet18", "cifar10_vit")  # long to compile
# The one needs a teacher's run, the other has several objectives (tests/test_gan.py).
LEFT_OUT = (*LARGE, "mnist_distilled", "mnist_dcgan")
CASES = [(path.stem, "mixed_float16") for path in CONFIGS if not path.stem.startswith(LEFT_OUT)]
CASES += [("digits_mlp", precision) for precision in ("float32", "bfloat16", "bfloat16,rounding=kahan")]


SHORT = ("digits_mlp", "digits_cnn", "sst2_lstm")
"""configs that the slow suite has time for; `-m full_size` tests all others"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "precision"),
    [pytest.param(*case, marks=[] if case[0] in SHORT else pytest.mark.full_size) for case in CASES],
)
def test_state_and_gradients_are_within_5_percent_of_what_the_compiler_says(of_config, name, precision):
    trainer = of_config(name, precision)
    predicted = memory(trainer.experiment)
    step, arguments = trainer.program()
    compiled = step.lower(*arguments).compile().memory_analysis()
    assert predicted.nbytes(*STATE, "batch") == pytest.approx(compiled.argument_size_in_bytes, rel=0.05)
    assert predicted.nbytes(*STATE) == pytest.approx(compiled.alias_size_in_bytes, rel=0.05)
    assert predicted.nbytes("gradients") == pytest.approx(compiled_gradients(trainer), rel=0.05)


@pytest.mark.slow
def test_memory_falls_by_what_is_frozen_as_the_compiler_confirms(of_config):
    whole = of_config("digits_mlp", "mixed_float16").experiment
    found = []
    for trains in (("**",), ("Dense_1",)):
        trainer = Trainer(dataclasses.replace(whole, trains=trains, data=dataclasses.replace(whole.data, workers=0)))
        step, arguments = trainer.program()
        compiled = step.lower(*arguments).compile().memory_analysis()
        predicted = memory(trainer.experiment)
        state = predicted.nbytes(*STATE, "frozen parameters")
        assert state == pytest.approx(compiled.alias_size_in_bytes, rel=0.05)
        found.append((trainer, predicted, compiled))
    (trainer, before, whole_step), (_, after, frozen_step) = found
    frozen = sum(4 * leaf.size for leaf in jax.tree.leaves(trainer.state_spec.params["Dense_0"]))
    assert after.nbytes("frozen parameters") == frozen
    assert before.nbytes("gradients") - after.nbytes("gradients") == frozen
    assert before.nbytes("moments") - after.nbytes("moments") == 2 * frozen
    argument_sizes = [step.argument_size_in_bytes for step in (whole_step, frozen_step)]
    assert argument_sizes[0] - argument_sizes[1] == pytest.approx(2 * frozen, rel=0.01)
    assert frozen_step.temp_size_in_bytes < whole_step.temp_size_in_bytes


def test_weights_that_are_cast_in_each_turn_of_a_scan_are_weights():
    def loss(weights, x):
        def layer(x, w):
            return (x.astype(BF16) @ w.astype(BF16)).astype(F32), None

        return jnp.sum(jnp.square(jax.lax.scan(layer, x, weights)[0]))

    found = sizes(memory(loss, of((10, 64, 64)), of((1, 64))))
    assert found["master weights", "float32"] == 10 * 64 * 64 * 4
    assert found["weights cast for compute", "bfloat16"] == 10 * 64 * 64 * 2
    assert found["saved activations", "bfloat16"] == 10 * 64 * 2
