"""From a source to batches: the same rows at a step, resident or streamed, on any number of devices."""

from __future__ import annotations

import hashlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxmp.data.arrays import Arrays
from jaxmp.data.pipeline import Batches, epoch_order, evaluation_batches, nbytes, resident, sample, stream
from jaxmp.data.source import Columns, as_column
from jaxmp.errors import InputError

BATCHES = Batches(examples=23, batch_size=5, seed=3)


def load(split):
    images = np.random.default_rng(0).integers(0, 256, (23, 6, 6, 3), np.uint8)
    return {"image": images, "label": np.arange(23), "text": np.array([b"text"] * 23, object)}


SOURCE = Arrays(load).source("train")


def test_an_epoch_visits_each_row_once_in_an_order_of_its_own():
    orders = {(seed, epoch): epoch_order(seed, epoch, 100) for seed in range(3) for epoch in range(3)}
    assert all(order.dtype == np.int32 and sorted(order) == list(range(100)) for order in orders.values())
    assert len({order.tobytes() for order in orders.values()}) == 9


def test_the_order_of_an_epoch_never_changes():
    digest = hashlib.sha256(epoch_order(0, 0, 1000).astype("<i4").tobytes()).hexdigest()
    assert digest[:16] == "1062080ef2cb015f"
    assert len(epoch_order(-1, 0, 10)) == 10


def test_an_epoch_is_padded_to_whole_batches_with_its_first_rows():
    rows = BATCHES.epoch_rows(2)
    order = epoch_order(3, 2, 23)
    assert (rows.shape, rows.dtype, BATCHES.per_epoch) == ((5, 5), np.int32, 5)
    np.testing.assert_array_equal(rows.reshape(-1), np.concatenate([order, order[:2]]))


def test_padding_has_no_weight():
    weights = np.stack([BATCHES.weights(position) for position in range(5)])
    assert weights.dtype == np.float32
    np.testing.assert_array_equal(weights.reshape(-1), [1] * 23 + [0] * 2)
    traced = jax.jit(BATCHES.weights)(jnp.int32(4))
    assert traced.dtype == jnp.float32
    np.testing.assert_array_equal(traced, weights[4])
    assert BATCHES.mean_rows == pytest.approx(23 / 5) and BATCHES.expected_rows == 5


def test_a_batch_that_divides_the_set_has_no_padding():
    batches = Batches(20, 5, 0)
    assert batches.per_epoch == 4
    assert batches.weights(3).all()


def test_a_limited_epoch_takes_its_first_batches_and_a_repeated_one_those_of_the_first_epoch():
    whole = [BATCHES.epoch_rows(epoch) for epoch in range(2)]
    for repeat in (False, True):
        few = Batches(23, 5, 3, limit=2, repeat=repeat)
        assert few.per_epoch == 2 and few.weights(1).all() and few.mean_rows == 5
        np.testing.assert_array_equal(few.epoch_rows(1), whole[0 if repeat else 1][:2])
        np.testing.assert_array_equal(few.rows(3)[0], few.epoch_rows(1)[1])
    assert Batches(23, 5, 3, limit=9).per_epoch == 5


def test_the_rows_of_a_step_are_those_of_its_place_in_its_epoch():
    for step in (0, 4, 5, 12):
        rows, weight = BATCHES.rows(step)
        np.testing.assert_array_equal(rows, BATCHES.epoch_rows(step // 5)[step % 5])
        np.testing.assert_array_equal(weight, BATCHES.weights(step % 5))


def test_a_batch_larger_than_the_set_is_bad_input():
    with pytest.raises(InputError, match=r"data\.batch_size is 24; the training split has only 23 rows"):
        Batches(23, 24, 0)


def same(left, right):
    return left.keys() == right.keys() and all(np.array_equal(left[name], right[name]) for name in left)


def test_streamed_and_resident_rows_are_the_same():
    whole = resident(SOURCE)
    batches = list(stream(SOURCE, BATCHES, 0, 12))
    assert len(batches) == 12
    for step, batch in enumerate(batches):
        rows, weight = BATCHES.rows(step)
        assert same(batch, {name: column[rows] for name, column in whole.items()} | {"weight": weight})


def test_a_stream_started_at_a_step_equals_one_that_reached_it():
    reached = list(stream(SOURCE, BATCHES, 0, 14))
    for start in (3, 5, 13):
        started = list(stream(SOURCE, BATCHES, start, 14))
        assert len(started) == 14 - start
        assert all(map(same, started, reached[start:]))


def test_a_stream_can_be_left_early_and_a_source_that_raises_is_heard():
    batches = stream(SOURCE, BATCHES, 0, 10_000)
    next(batches)
    batches.close()

    class Broken:
        def __len__(self):
            return 23

        def __getitem__(self, indices):
            raise InputError("data file x is damaged")

    with pytest.raises(InputError, match="data file x is damaged"):
        next(stream(Broken(), BATCHES, 0, 2))


@pytest.mark.slow
def test_worker_processes_stream_the_same_batches():
    assert all(map(same, stream(SOURCE, BATCHES, 2, 7, workers=2), stream(SOURCE, BATCHES, 2, 7)))


def test_an_evaluation_sees_each_row_once_in_order():
    batches = list(evaluation_batches(SOURCE, 10))
    assert all(len(batch["image"]) == 10 for batch in batches)
    label, weight = (np.concatenate([batch[name] for batch in batches]) for name in ("label", "weight"))
    np.testing.assert_array_equal(label[weight == 1], np.arange(23))
    assert weight.dtype == np.float32 and weight.sum() == 23


def test_an_evaluation_batch_may_be_larger_than_the_set():
    (batch,) = evaluation_batches(SOURCE, 50)
    assert len(batch["label"]) == 50 and batch["weight"].sum() == 23


def test_bytes_are_those_of_the_resident_arrays():
    assert nbytes(SOURCE) == sum(column.nbytes for column in resident(SOURCE).values())


def test_a_column_named_weight_is_bad_input():
    source = Arrays(lambda split: {"weight": np.ones(3)}).source("train")
    with pytest.raises(InputError, match="column 'weight'"):
        resident(source)


class Lists:
    """A column of lists that are stacked when they are read, as those of Hugging Face are."""

    def __init__(self, rows):
        self.rows = rows

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, indices):
        return as_column("x", [self.rows[index] for index in indices])


@pytest.mark.parametrize(
    "odd", [[1], [1, None], None, np.zeros((2, 2))], ids=["shorter", "empty value", "empty", "array"]
)
@pytest.mark.parametrize(
    "read",
    [resident, sample, lambda source: list(evaluation_batches(source, 3)), lambda s: list(stream(s, BATCHES, 0, 5))],
)
def test_a_column_of_which_a_row_is_unlike_the_first_is_refused_and_never_left_out(odd, read):
    source = Columns({"x": Lists([*([row, 2] for row in range(17)), odd, *([0, 1] for _ in range(5))])})
    with pytest.raises(
        InputError, match=r"column 'x' holds numbers of shape \(2,\) in row 0, and in row 17 numbers of"
    ):
        read(source)
    # What holds no numbers in row 0 is in no batch.
    source = Columns({"y": np.arange(23), "x": Lists([[0, None], *([row, 2] for row in range(22))])})
    found = read(source)
    assert all(set(batch) - {"weight"} == {"y"} for batch in (found if isinstance(found, list) else [found]))
