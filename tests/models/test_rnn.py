from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxmp.models.rnn
from jaxmp.errors import InputError
from jaxmp.models.rnn import SequenceClassifier, SequenceLabeller, reverse
from jaxmp.modules.lora import LoRA
from jaxmp.modules.model import as_model
from jaxmp.testing.sums import terms


@pytest.mark.slow
@pytest.mark.parametrize("cell", ["simple", "lstm", "gru"])
def test_padding_changes_nothing_and_a_sequence_of_no_steps_is_zeros(cell):
    model = SequenceClassifier(cell, 6, 2, bidirectional=True, classes=3)
    sequence, length = jax.random.normal(jax.random.key(0), (4, 7, 5)), jnp.array([7, 4, 1, 0])
    variables = jax.jit(model.init)(jax.random.key(1), sequence, length)
    apply = jax.jit(model.apply)
    logits = apply(variables, sequence, length)
    padding = jnp.arange(7)[:, None] >= length[:, None, None]
    np.testing.assert_array_equal(apply(variables, jnp.where(padding, 9.0, sequence), length), logits)
    np.testing.assert_allclose(logits[1], apply(variables, sequence[1:2, :4])[0], atol=1e-6)
    np.testing.assert_array_equal(logits[3], variables["params"]["head"]["bias"])
    assert len({tuple(x) for x in np.asarray(logits).tolist()}) == 4


@pytest.mark.slow
def test_each_step_has_logits_and_padding_changes_nothing_in_those_that_count():
    model = SequenceLabeller("gru", 6, bidirectional=True, classes=3, stack=2)
    sequence, length = jax.random.normal(jax.random.key(0), (3, 7, 5)), jnp.array([7, 4, 0])
    variables = jax.jit(model.init)(jax.random.key(1), sequence, length)
    apply = jax.jit(model.apply)
    logits, steps = apply(variables, sequence, length)
    assert logits.shape == (3, 4, 3) and steps.tolist() == [4, 2, 0] and steps.dtype == jnp.int32
    padding = jnp.arange(7)[:, None] >= length[:, None, None]
    again, _ = apply(variables, jnp.where(padding, 9.0, sequence), length)
    counts = jnp.arange(4) < steps[:, None]
    np.testing.assert_array_equal(again[counts], logits[counts])
    alone, of_alone = apply(variables, sequence[1:2, :4])
    assert of_alone.tolist() == [2]
    np.testing.assert_allclose(logits[1, :2], alone[0], atol=1e-6)
    assert len({tuple(x) for x in np.asarray(logits[counts]).tolist()}) == 6


def lstm_of_jax(x, h, c, weights, length, inputs, width, layers, dropout, bidirectional, precision):
    """What cuDNN computes, by JAX's own reference of it, which runs on a CPU."""
    assert precision == jax.lax.Precision.HIGHEST and length.dtype == jnp.int32
    shape = (inputs, width, layers, bidirectional)
    own = jax.experimental.rnn.unpack_lstm_weights(weights, *shape)
    return jax.experimental.rnn.lstm_ref(x, h, c, *own, length, inputs, width, layers, dropout, bidirectional)


@pytest.mark.slow
@pytest.mark.parametrize("bidirectional", [False, True])
def test_cudnns_lstm_is_given_the_same_weights_and_lengths(bidirectional, monkeypatch):
    sequence, length = jax.random.normal(jax.random.key(0), (4, 7, 5)), jnp.array([7, 4, 1, 0])
    model = SequenceClassifier("lstm", 6, 2, bidirectional=bidirectional, classes=3)
    variables = jax.jit(model.init)(jax.random.key(1), sequence, length)
    variables = jax.tree.map(lambda x: x + 0.1 * jnp.arange(x.size).reshape(x.shape) / x.size, variables)  # biases too

    def loss(params, model):
        return jnp.sum(model.apply({"params": params}, sequence, length) ** 2)

    expected = model.apply(variables, sequence, length), jax.grad(loss)(variables["params"], model)
    monkeypatch.setattr(jaxmp.models.rnn, "has_cudnn", lambda: True)
    monkeypatch.setattr(jax.experimental.rnn, "lstm", lstm_of_jax)
    own = model.clone(kernel="cudnn")
    again = jax.jit(own.init)(jax.random.key(1), sequence, length)
    assert jax.tree.structure(again) == jax.tree.structure(variables)
    found = own.apply(variables, sequence, length), jax.grad(loss)(variables["params"], own)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-6), found, expected)


@pytest.mark.parametrize(
    ("fields", "dtype", "names"),
    [
        ({"cell": "gru"}, "float32", "kernel='cudnn' with cell='gru'; expected 'lstm'"),
        ({}, "bfloat16", "the sequence is bfloat16; expected float32"),
        ({}, "float32", "the device is cpu; expected an NVIDIA GPU"),
    ],
)
def test_what_cudnns_lstm_cannot_do_is_refused(fields, dtype, names):
    variables = jax.eval_shape(SequenceClassifier().init, jax.random.key(0), jnp.ones((2, 3, 4)))
    with pytest.raises(InputError) as error:
        model = SequenceClassifier(kernel="cudnn", **fields)
        jax.eval_shape(model.apply, variables, jax.ShapeDtypeStruct((2, 3, 4), dtype))
    assert names in str(error.value)


def test_cudnns_lstm_refuses_adapters_that_it_would_not_read():
    model, x = as_model(SequenceClassifier(width=4, kernel="cudnn")).under(LoRA(rank=2)), jnp.ones((2, 3, 4))
    params, state = model.init(jax.random.key(0), x)
    with pytest.raises(
        InputError, match=r"kernel='cudnn' has no place for adapters in 'forward_0'; expected kernel='sc"
    ):
        model.apply(params, state, x)


def test_a_length_beyond_the_steps_counts_all_of_them():
    x, beyond = jax.random.normal(jax.random.key(0), (2, 3, 4)), jnp.array([4, 9])
    for model in (SequenceClassifier("simple", 4), SequenceLabeller("simple", 4, stack=2)):
        variables, apply = model.init(jax.random.key(1), x), jax.jit(model.apply)
        jax.tree.map(np.testing.assert_array_equal, apply(variables, x, beyond), apply(variables, x))


@pytest.mark.slow
def test_cudnns_lstm_equals_the_scan():
    if not jaxmp.models.rnn.has_cudnn():
        pytest.skip("needs an NVIDIA GPU")
    sequence, length = jax.random.normal(jax.random.key(0), (4, 9, 5)), jnp.array([9, 4, 1, 0])
    model = SequenceClassifier("lstm", 16, 2, bidirectional=True, classes=3)
    variables = jax.jit(model.init)(jax.random.key(1), sequence, length)
    with jax.default_matmul_precision("highest"):
        expected = jax.jit(model.apply)(variables, sequence, length)
    found = jax.jit(model.clone(kernel="cudnn").apply)(variables, sequence, length)
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)


def test_turning_round_adds_up_no_gradients():
    def gradient(x):
        return jax.grad(lambda x: jnp.sum(reverse(x, jnp.array([4, 2, 0]))))(x)

    equations = jax.make_jaxpr(gradient)(jnp.ones((3, 4, 2), jnp.float16)).jaxpr.eqns
    (scatter,) = (each for each in equations if each.primitive.name == "scatter-add")
    assert scatter.invars[-1].aval.size == 24 and terms(scatter) == 1


@pytest.mark.slow
def test_a_sequence_turned_round_twice_is_itself():
    x, length = jnp.arange(24.0).reshape(3, 4, 2), jnp.array([4, 2, 0])
    turned = reverse(x, length)
    np.testing.assert_array_equal(turned[0], x[0, ::-1])
    np.testing.assert_array_equal(turned[1], x[1, jnp.array([1, 0, 2, 3])])
    np.testing.assert_array_equal(turned[2], x[2])
    np.testing.assert_array_equal(reverse(turned, length), x)


@pytest.mark.slow
def test_an_image_is_a_sequence_of_its_rows():
    model = SequenceClassifier("gru", 6)
    image = jax.random.normal(jax.random.key(0), (2, 4, 3, 2))
    variables = jax.jit(model.init)(jax.random.key(1), image)
    rows = image.reshape(2, 4, 6)
    np.testing.assert_array_equal(jax.jit(model.apply)(variables, image), jax.jit(model.apply)(variables, rows))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("fields", "shape", "dtype", "names"),
    [
        ({"cell": "rnn"}, (1, 2, 3), float, "cell='rnn': expected simple or lstm or gru"),
        ({"width": 0}, (1, 2, 3), float, "width=0: expected 1 or more"),
        ({"vocabulary": 0}, (1, 2), int, "vocabulary=0: expected 1 or more"),
        ({"dropout": -0.5}, (1, 2, 3), float, "dropout=-0.5: expected 0 or more, below 1"),
        ({}, (1, 2), float, "the sequence is float32[1, 2]; expected features"),
        ({}, (1, 2, 3), int, "the sequence is int32[1, 2, 3]; expected features"),
        ({"vocabulary": 5}, (1, 2), float, "the sequence is float32[1, 2]; expected tokens"),
    ],
)
def test_a_sequence_that_does_not_fit_is_refused(fields, shape, dtype, names):
    for model in (SequenceClassifier, SequenceLabeller):
        with pytest.raises(InputError) as error:
            jax.eval_shape(model(**fields).init, jax.random.key(0), jnp.zeros(shape, dtype))
        assert names in str(error.value) and model.__name__ in str(error.value)
    with pytest.raises(InputError, match="SequenceLabeller: stack=0: expected 1 or more"):
        SequenceLabeller(stack=0)
