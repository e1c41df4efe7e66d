"""Connectionist temporal classification, against sums over all alignments in float64, and edit distances in Python."""

from __future__ import annotations

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxmp.errors import InputError
from jaxmp.tasks.ctc import CTC, ctc_loss, edit_distance, greedy_labels
from jaxmp.training.metrics import compute, merge


def collapse(path, blank):
    """The labels of an alignment."""
    return [label for label, _ in itertools.groupby(path) if label != blank]


def loss_of_all_alignments(logits, labels):
    """Minus the logarithm of the sum over all alignments, in float64. logits: (steps, classes)."""
    logits = np.asarray(logits, np.float64)
    probabilities = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    steps, classes = logits.shape
    total = sum(
        np.prod([probabilities[step, label] for step, label in enumerate(path)])
        for path in itertools.product(range(classes), repeat=steps)
        if collapse(path, classes - 1) == list(labels)
    )
    return -np.log(total)


def levenshtein(found, labels):
    """By the definition, in Python."""
    if not found or not labels:
        return len(found) + len(labels)
    if found[0] == labels[0]:
        return levenshtein(found[1:], labels[1:])
    return 1 + min(levenshtein(found[1:], labels), levenshtein(found, labels[1:]), levenshtein(found[1:], labels[1:]))


ROWS = [(5, [0, 1]), (5, [1, 1]), (4, [0]), (3, []), (5, [1, 0, 1]), (3, [0, 0]), (2, [0, 0])]
"""the number of steps and the labels of rows; the last has too few steps"""


def batch_of(rows, seed=0, longest=3, steps=5, classes=3):
    labels = np.full((len(rows), longest), -1, np.int32)
    for row, (_, of_row) in enumerate(rows):
        labels[row, : len(of_row)] = of_row
    logits = np.random.default_rng(seed).normal(size=(len(rows), steps, classes)).astype(np.float32) * 2
    return (jnp.asarray(logits), jnp.array([count for count, _ in rows])), {
        "labels": jnp.asarray(labels),
        "weight": jnp.ones(len(rows)),
    }


def test_the_loss_is_that_of_all_alignments_in_float64_and_rows_too_short_are_left_out():
    (logits, steps), batch = batch_of(ROWS)
    loss, metrics = jax.jit(CTC())((logits, steps), batch)
    expected = [loss_of_all_alignments(logits[row, :count], labels) for row, (count, labels) in enumerate(ROWS[:-1])]
    np.testing.assert_allclose(loss.total / loss.weight, np.mean(expected), rtol=1e-6)
    assert float(loss.weight) == 6 and float(metrics["too_short"].total) == 1


def test_greedy_decoding_and_edits_are_those_of_python_whatever_the_padding():
    rng = np.random.default_rng(0)
    steps, longest, rows = 6, 4, 60
    path = rng.integers(0, 3, (rows, steps))  # 2 is the blank
    logits = jax.nn.one_hot(path, 3)
    count, number = rng.integers(0, steps + 1, rows), rng.integers(0, longest + 1, rows)
    labels = rng.integers(0, 2, (rows, longest))
    found, kept = map(np.asarray, jax.jit(greedy_labels)(logits, count))
    decoded = [collapse(path[row, : count[row]], 2) for row in range(rows)]
    assert [found[row][kept[row]].tolist() for row in range(rows)] == decoded
    expected = [levenshtein(decoded[row], labels[row, : number[row]].tolist()) for row in range(rows)]
    edits = jax.jit(edit_distance)(found, kept, labels, number)
    assert edits.dtype == jnp.int32 and edits.tolist() == expected
    predicted = jax.device_get(jax.jit(CTC().predictions)((logits, count)))
    assert [row[:n].tolist() for row, n in zip(predicted["prediction"], predicted["count"], strict=True)] == decoded
    assert all((row[n:] == -1).all() for row, n in zip(predicted["prediction"], predicted["count"], strict=True))


def test_255_of_uint8_is_a_label_and_no_padding():
    batch = {"labels": np.array([[255, 3]]), "weight": jnp.ones(1)}
    outputs = jnp.zeros((1, 5, 257)), jnp.array([5])
    of_int, of_byte = (
        CTC()(outputs, {**batch, "labels": jnp.asarray(batch["labels"], t)})[1] for t in ("int32", "uint8")
    )
    assert float(of_int["label_error_rate"].weight) == float(of_byte["label_error_rate"].weight) == 2


@pytest.mark.slow
def test_metrics_are_exact_over_padding_and_over_any_batches():
    task = jax.jit(CTC())
    (logits, steps), batch = batch_of(ROWS[:-1])
    loss, metrics = task((logits, steps), batch)
    parts = []
    for rows in ([0, 1, 2, 3], [4, 5, 0, 0]):
        weight = jnp.array([1, 1, 1, 1] if rows[0] == 0 else [1, 1, 0, 0], jnp.float32)
        part = {"labels": batch["labels"][jnp.array(rows)], "weight": weight}
        of_part, measured = task((logits[jnp.array(rows)], steps[jnp.array(rows)]), part)
        parts.append({"loss": of_part, **measured})
    together, whole = compute(merge(*parts)), compute({"loss": loss, **metrics})
    assert together["label_error_rate"] == whole["label_error_rate"]
    assert together["loss"] == pytest.approx(whole["loss"], rel=1e-6)

    wider = jnp.pad(logits, ((0, 0), (0, 3), (0, 0)), constant_values=7.0), steps
    padded = {**batch, "labels": jnp.pad(batch["labels"], ((0, 0), (0, 2)), constant_values=-1)}
    of_wider, measured = task(wider, padded)
    assert measured["label_error_rate"] == metrics["label_error_rate"]
    np.testing.assert_allclose(of_wider.total, loss.total, rtol=1e-6)
    gradient = jax.jit(jax.grad(lambda x: CTC()((x, steps), padded)[0].total))(wider[0])
    assert np.isfinite(gradient).all() and not gradient[0, 5:].any() and gradient[0, :5].any()


@pytest.mark.slow
def test_the_loss_is_computed_in_float32_at_the_highest_precision_from_half():
    (logits, steps), batch = batch_of(ROWS)
    labels, number = jnp.maximum(batch["labels"], 0), jnp.array([len(labels) for _, labels in ROWS])
    jaxpr = str(jax.make_jaxpr(ctc_loss)(logits.astype(jnp.float16), steps, labels, number))
    products = [line for line in jaxpr.splitlines() if "dot_general" in line]
    assert products and jaxpr.count("Precision.HIGHEST") >= len(products)
    halves = [line for line in jaxpr.splitlines() if ":f16" in line.partition("=")[0]]
    assert not [line for line in halves if "lambda" not in line]


def shapes(*all_of):
    return [jax.ShapeDtypeStruct(shape, dtype) for shape, dtype in all_of]


@pytest.mark.parametrize(
    ("outputs", "labels", "message"),
    [
        (shapes(((4, 5, 3), float)), ((4, 3), int), "of type list; expected (logits, steps)"),
        (shapes(((4, 5, 3), float), ((4, 5), int)), ((4, 3), int), "of [4, 5, 3] and [4, 5]; expected logits"),
        (
            shapes(((4, 5, 3), float), ((4,), int)),
            ((4,), int),
            "'labels' is int64[4]; expected whole numbers (rows, l",
        ),
        (shapes(((4, 5, 3), float), ((4,), int)), ((4, 3), float), "'labels' is float64[4, 3]; expected whole numbers"),
    ],
)
def test_outputs_and_labels_that_do_not_fit_are_refused(outputs, labels, message):
    (labels,) = shapes(labels)
    outputs = tuple(outputs) if len(outputs) == 2 else outputs
    with pytest.raises(InputError) as error:
        CTC().check(outputs, {"labels": labels})
    assert message in str(error.value)


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (
            [[0, 2, -1]],
            "'labels' of the test split: labels run from 0 to 2; expected 0 to 1, .* 3 outputs but the la",
        ),
        ([[0, -2, -1]], "labels run from -2 to 0"),
        ([[0, 1, 1], [0, -1, 1]], "row 1: a label stands behind padding, -1"),
    ],
)
def test_a_label_out_of_range_is_refused_before_the_first_step(labels, message):
    outputs = tuple(shapes(((4, 5, 3), float), ((4,), int)))
    with pytest.raises(InputError, match=message):
        CTC().check_rows(outputs, {"labels": np.array(labels)}, "test")
    CTC().check_rows(outputs, {"labels": np.array([[0, 1, 0], [-1, -1, -1]])}, "test")


def test_settings_that_cannot_be_used_are_refused():
    with pytest.raises(InputError, match=r"task.inputs = 'features': expected a tuple"):
        CTC(inputs="features")
    with pytest.raises(InputError, match=r"task.padding = 0: expected a number below 0"):
        CTC(padding=0)
