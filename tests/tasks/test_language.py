from __future__ import annotations

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxmp.errors import InputError
from jaxmp.tasks.language import MaskedLM, NextToken
from jaxmp.tasks.regression import Regression
from jaxmp.tasks.tokens import TokenClassification
from jaxmp.training.metrics import ExpOfMean, Mean, compute, merge, zeros_like


def example(rows=4, length=3, vocabulary=5, dtype=jnp.float32):
    rng = np.random.default_rng(0)
    logits = jnp.asarray(rng.normal(size=(rows, length, vocabulary)), dtype)
    targets = rng.integers(0, vocabulary, (rows, length)).astype(np.int32)
    targets[1, 1:] = -1
    return logits, {"next_tokens": jnp.asarray(targets), "weight": jnp.array([1.0, 1.0, 2.0, 0.0])}


def measured(task, logits, batch):
    loss, metrics = jax.jit(task)(logits, batch)
    return {"loss": loss, **metrics}


def test_loss_perplexity_and_bits_a_byte_are_those_of_their_definitions_over_what_counts():
    logits, batch = example()
    batch["bytes"] = jnp.array([[1, 2, 3], [4, 9, 9], [1, 1, 2], [9, 9, 9]])
    found = compute(measured(NextToken(byte_counts="bytes"), logits, batch))
    nats, tokens, size = 0.0, 0.0, 0.0
    for row, at in np.ndindex(4, 3):
        target, weight = int(batch["next_tokens"][row, at]), float(batch["weight"][row])
        if target >= 0:
            x = np.asarray(logits[row, at], np.float64)
            nats += weight * (math.log(np.exp(x).sum()) - x[target])
            tokens += weight
            size += weight * int(batch["bytes"][row, at])
    assert tokens == 3 + 1 + 6
    assert found["loss"] == pytest.approx(nats / tokens, rel=1e-6)
    assert found["perplexity"] == pytest.approx(math.exp(nats / tokens), rel=1e-6)
    assert found["bits_per_byte"] == pytest.approx(nats / math.log(2) / size, rel=1e-6)


@pytest.mark.parametrize("task", [MaskedLM(), TokenClassification()], ids=["masked", "classes"])
def test_a_target_for_each_token_counts_where_it_is_no_padding(task):
    logits, batch = example()
    batch["targets"] = batch.pop("next_tokens")
    found = compute(measured(task, logits, batch))
    nats, right, count = 0.0, 0.0, 0.0
    for row, at in np.ndindex(4, 3):
        target, weight = int(batch["targets"][row, at]), float(batch["weight"][row])
        if target >= 0:
            x = np.asarray(logits[row, at], np.float64)
            nats += weight * (math.log(np.exp(x).sum()) - x[target])
            right += weight * (x.argmax() == target)
            count += weight
    expected = {"loss": nats / count, "accuracy": right / count}
    expected |= {"perplexity": math.exp(nats / count)} if isinstance(task, MaskedLM) else {}
    assert found == pytest.approx(expected, rel=1e-6)
    # Batches of other sizes, and rows that fill one up, make no other numbers.
    parts = [measured(task, logits[a:b], {k: v[a:b] for k, v in batch.items()}) for a, b in ((0, 1), (1, 4))]
    assert compute(merge(*parts)) == pytest.approx(found, rel=1e-6)
    assert 0 < right < count


def test_255_of_uint8_is_a_target_and_no_padding():
    task, batch = NextToken(), {"weight": jnp.ones(1)}
    of_int, of_byte = (
        task(jnp.zeros((1, 3, 256)), {**batch, "next_tokens": jnp.array([[255, 3, 255]], dtype)})[0]
        for dtype in ("int32", "uint8")
    )
    assert float(of_int.weight) == float(of_byte.weight) == 3 and float(of_int.total) == float(of_byte.total)


@pytest.mark.slow
def test_metrics_do_not_depend_on_how_rows_make_up_batches_and_padding_is_nothing():
    logits, batch = example()
    whole = measured(NextToken(), logits, batch)
    parts = [measured(NextToken(), logits[a:b], {k: v[a:b] for k, v in batch.items()}) for a, b in ((0, 1), (1, 4))]
    merged = merge(merge(zeros_like(whole), parts[0]), parts[1])
    assert compute(merged) == pytest.approx(compute(whole), rel=1e-6)
    assert isinstance(merged["perplexity"], ExpOfMean)
    # A mean of the batches' perplexities would be another number.
    apart = np.mean([compute(part)["perplexity"] for part in parts])
    assert abs(apart - compute(whole)["perplexity"]) > 0.01
    padded = {name: jnp.pad(x, [(0, 2)] + [(0, 0)] * (x.ndim - 1)) for name, x in batch.items()}
    with_padding = measured(NextToken(), jnp.pad(logits, ((0, 2), (0, 0), (0, 0)), constant_values=jnp.nan), padded)
    assert compute(with_padding) == pytest.approx(compute(whole), rel=1e-6)
    assert float(whole["perplexity"].compute()) == pytest.approx(compute(whole)["perplexity"], rel=1e-6)


@pytest.mark.parametrize(
    ("total", "weight", "expected"), [(2.0, 1.0, math.exp(2)), (0.0, 0.0, math.nan), (800.0, 1.0, math.inf)]
)
def test_the_exponential_of_a_mean_is_nan_of_nothing_and_inf_of_too_much(total, weight, expected):
    found = compute({"x": ExpOfMean(np.float32(total), np.float32(weight)), "mean": Mean(np.float32(3), np.float32(2))})
    np.testing.assert_equal(found, {"x": expected, "mean": 1.5})


@pytest.mark.slow
def test_padding_has_no_gradient_and_half_logits_have_a_loss_in_float32():
    logits, batch = example()
    gradient = np.asarray(jax.grad(lambda x: NextToken()(x, batch)[0].total)(logits))
    assert gradient[0].any() and not gradient[1, 1:].any() and not gradient[3].any()
    half, _ = NextToken()(logits.astype(jnp.bfloat16), batch)
    wide, _ = NextToken()(logits.astype(jnp.bfloat16).astype(jnp.float32), batch)
    assert half.total == wide.total and half.total.dtype == jnp.float32


def shapes(**arrays):
    return {name: jax.ShapeDtypeStruct(shape, dtype) for name, (shape, dtype) in arrays.items()}


@pytest.mark.parametrize(
    ("check", "names"),
    [
        (lambda: NextToken(inputs="tokens"), "expected a tuple, ('tokens',)"),
        (
            lambda: NextToken().check(jnp.zeros((2, 3, 5)), shapes(next_tokens=((2, 4), jnp.int32))),
            "'next_tokens' is int32[2, 4] beside logits of [2, 3, 5]",
        ),
        (
            lambda: NextToken().check(jnp.zeros((2, 3, 5)), shapes(next_tokens=((2, 3), jnp.float32))),
            "'next_tokens' is float32[2, 3]",
        ),
        (
            lambda: NextToken().check_rows(jnp.zeros((2, 3, 5)), {"next_tokens": np.array([[-1, 5]])}, "train"),
            "'next_tokens' of the train split: tokens run from 5 to 5; expected 0 to 4, one for each of the model's 5 "
            "outputs, and -1 for padding",
        ),
        (
            lambda: NextToken().check_rows(jnp.zeros((2, 3, 5)), {"next_tokens": np.array([[-2, 4]])}, "test"),
            "tokens run from -2 to 4",
        ),
        (
            lambda: NextToken().check_rows(jnp.zeros((2, 3, 5)), {"tokens": np.array([[-1, 4]])}, "test"),
            "'tokens' of the test split: tokens run from -1 to 4; expected 0 to 4",
        ),
        (lambda: Regression(inputs="x"), "expected a tuple, ('x',)"),
        (
            lambda: Regression().check(jnp.zeros((2, 1)), shapes(y=((2,), jnp.float32))),
            "'y' is float32[2] beside outputs of [2, 1]; expected numbers of the same shape; give the targets an axis",
        ),
        (lambda: Regression().check((1,), shapes(y=((2,), jnp.float32))), "outputs are of type tuple"),
    ],
)
def test_what_does_not_fit_is_refused_before_the_first_step(check, names):
    with pytest.raises(InputError) as error:
        check()
    assert names in str(error.value)


def test_masks_and_positions_are_no_tokens():
    columns = {"tokens": np.array([[4, 0]]), "mask": np.array([[9, 9]]), "positions": np.array([[0, 99]])}
    NextToken(inputs=("tokens", "mask", "positions")).check_rows(jnp.zeros((2, 3, 5)), columns, "train")
    TokenClassification().check_rows(
        jnp.zeros((2, 3, 5)), {"tokens": np.array([[99]]), "targets": np.array([[-1, 4]])}, ""
    )
    TokenClassification(padding=255).check_rows(jnp.zeros((2, 3, 5)), {"targets": np.array([[255, 4]], np.uint8)}, "")


def test_tokens_and_padding_that_fit_are_let_be():
    columns = {"next_tokens": np.array([[0, -1]]), "tokens": np.array([[4, 0]])}
    NextToken().check_rows(jnp.zeros((2, 3, 5)), columns, "train")


def test_a_regression_takes_the_mean_over_a_row_and_then_over_rows():
    outputs = jnp.array([[1.0, 2.0], [3.0, 3.0], [9.0, 9.0]], jnp.bfloat16)
    batch = {"y": jnp.array([[0.0, 2.0], [0, 0], [0, 0]]), "weight": jnp.array([1.0, 1.0, 0.0])}
    found = compute(measured(Regression(), outputs, batch))
    assert found == {"loss": (0.5 + 9) / 2, "absolute_error": (0.5 + 3) / 2}
