"""Host transforms and transforms: what they are given, and what is refused of what they return."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxmp.data.arrays import Arrays
from jaxmp.data.pipeline import batch_of, batch_shapes, check_splits, evaluation_batches, nbytes, resident
from jaxmp.data.transforms import FIRST_STREAM
from jaxmp.errors import InputError
from jaxmp.runs.run import _columns

KEY = jax.random.key(0)
WORDS = ["a", "bb", "ccc", "dd", "e"]


def load(split):
    return {"text": WORDS, "label": np.arange(5)}


def length(rows):
    return {**rows, "length": np.array([len(text) for text in rows["text"]])}


def double(rows):
    return {"twice": 2 * rows["length"], "label": rows["label"]}


def rows_of(*transforms, source=load):
    return Arrays(source, host_transforms=transforms).read("train")


def test_host_transforms_are_applied_in_order_and_make_numbers_of_text():
    source = rows_of(length, double)
    assert len(source) == 5
    np.testing.assert_array_equal(source[np.array([2, 0])]["twice"], [6, 2])
    assert resident(source).keys() == {"twice", "label"}
    assert nbytes(source) == 5 * (8 + 8)
    np.testing.assert_array_equal(next(evaluation_batches(source, 8))["twice"], [2, 4, 6, 4, 2, 2, 4, 6])


def test_text_that_is_left_after_them_stays_on_the_host():
    assert rows_of(length)[np.arange(2)]["text"].tolist() == ["a", "bb"]
    assert resident(rows_of(length)).keys() == {"length", "label"}


def test_a_host_transform_cannot_change_the_rows_of_the_source():
    def spoil(rows):
        rows["label"][:] = 0
        return {"label": rows.pop("label")}

    data = Arrays(load, host_transforms=(spoil,))
    np.testing.assert_array_equal(data.source("train")[np.arange(5)]["label"], np.arange(5))


@pytest.mark.parametrize(
    ("transform", "message"),
    [
        (lambda rows: {"x": rows["txet"]}, r"\(.*<lambda>\) raised KeyError: 'txet' \(test_transforms.py, line \d+\)"),
        (lambda rows: None, r"returned None; expected a dict of arrays"),
        (lambda rows: list(rows), r"returned list; expected a dict of arrays"),
        (lambda rows: {}, r"returned an empty dict; expected a dict of arrays"),
        (lambda rows: {"x": 1.0}, r"was given 1 rows and returned arrays of shapes \{'x': \(\)\}"),
        (lambda rows: {"x": np.zeros(7)}, r"was given 1 rows and returned arrays of shapes \{'x': \(7,\)\}"),
        (functools.partial(double), r"\(double\) raised KeyError: 'length'"),
    ],
)
def test_what_a_host_transform_must_not_do_is_bad_input_that_names_it(transform, message):
    with pytest.raises(InputError, match=rf"data.host_transforms\[0\].*{message}"):
        rows_of(transform)


def test_rows_of_another_length_than_the_first_are_bad_input():
    def ragged(rows):
        return {"x": np.array([list(text.ljust(max(map(len, rows["text"])))) for text in rows["text"]]) == " "}

    with pytest.raises(InputError, match=r"x bool\[3\] for some rows and x bool\[1\] for the first row alone"):
        resident(rows_of(ragged))


def test_lists_of_different_lengths_are_bad_input_that_names_the_transform():
    with pytest.raises(InputError, match=r"host_transforms gave no numbers .*pad or cut them to one length"):
        resident(rows_of(lambda rows: {"x": [[1]] * (len(rows["text"]) - 1) + [[1, 2][: len(rows["text"])]]}))


# On the device.


BATCH = {"x": jnp.arange(8.0).reshape(4, 2), "weight": jnp.ones(4)}


def add_noise(key, row):
    x = row["x"] - 1
    return {**row, "x": x if key is None else x + jax.random.normal(key, x.shape)}


def test_a_transform_sees_one_example_and_gets_no_key_in_evaluation():
    def norm(key, row):
        assert row["x"].shape == (2,)
        return {**row, "norm": jnp.sqrt((row["x"] ** 2).sum()), "one": 1}

    data = Arrays(load, transforms=(norm, add_noise))
    ready = data.prepare(train=False)(BATCH, KEY)
    np.testing.assert_allclose(ready["norm"], np.linalg.norm(BATCH["x"], axis=1), rtol=1e-6)
    np.testing.assert_array_equal(ready["one"], np.ones(4))
    np.testing.assert_array_equal(ready["x"], BATCH["x"] - 1)
    assert not np.array_equal(data.prepare(train=True)(BATCH, KEY)["x"], ready["x"])


@pytest.mark.slow
def test_a_transform_draws_by_example_and_not_by_device():
    ready = jax.jit(Arrays(load, transforms=(add_noise,)).prepare(train=True))
    whole = ready(BATCH, KEY)["x"]
    for first in (0, 2):
        part = {name: column[first : first + 2] for name, column in BATCH.items()}
        np.testing.assert_array_equal(ready(part, KEY, first + jnp.arange(2))["x"], whole[first : first + 2])
    assert len(np.unique(whole - BATCH["x"])) == 8
    assert not np.array_equal(ready(BATCH, jax.random.key(1))["x"], whole)


def test_each_transform_draws_from_a_stream_of_its_own():
    def draw(name, key, row):
        return {**row, name: jax.random.bits(key)}

    one, two = (functools.partial(draw, name) for name in ("one", "two"))
    ready = Arrays(load, transforms=(one, two)).prepare(train=True)(BATCH, KEY)
    of_augmentation = [jax.random.bits(jax.random.fold_in(KEY, place)) for place in range(4)]
    assert len(np.unique([*ready["one"], *ready["two"], *of_augmentation])) == 12
    stream = jax.random.fold_in(KEY, FIRST_STREAM + 1)
    np.testing.assert_array_equal(ready["two"], [jax.random.bits(jax.random.fold_in(stream, i)) for i in range(4)])


def test_without_transforms_nothing_is_traced():
    prepare = Arrays(load).prepare(train=True)
    assert not jax.make_jaxpr(prepare)(BATCH, KEY).eqns


def test_images_are_prepared_before_the_transforms_see_them():
    def half(key, row):
        assert row["image"].dtype == jnp.float32
        return {**row, "image": row["image"] / 2}

    batch = {"image": jnp.full((2, 1, 1, 1), 255, jnp.uint8), "weight": jnp.ones(2)}
    ready = Arrays(load, mean=(0.5,), transforms=(half,)).prepare(train=False)(batch, None)
    np.testing.assert_array_equal(ready["image"].reshape(-1), [0.25, 0.25])


@pytest.mark.parametrize(
    ("transform", "message"),
    [
        (lambda key, row: {**row, "x": row["y"]}, r"raised KeyError: 'y' \(test_transforms.py, line \d+\)"),
        (lambda key, row: row["x"], r"returned an array; expected a dict of arrays"),
        (lambda key, row: {"x": row["x"]}, r"returned x; expected 'weight', a number"),
        (lambda key, row: {**row, "weight": row["x"]}, r"returned weight, x; expected 'weight', a number"),
        (lambda key, row: {**row, "x": "a"}, r"returned str as 'x'; expected an array or a number"),
        (lambda key, row: {**row, "x": 1 if row["x"][0] > 0 else 2}, r"raised TracerBoolConversionError.*line \d+\)"),
        (lambda key, row: {**row, "x": jax.random.normal(key)}, r"raised TypeError.*\(test_transforms.py, line \d+\)"),
    ],
)
def test_what_a_transform_must_not_do_is_bad_input_that_names_it(transform, message):
    prepare = Arrays(load, transforms=(add_noise, transform)).prepare(train=False)
    with pytest.raises(InputError, match=rf"(?s)^data.transforms\[1\] \(.*<lambda>\):? {message}"):
        jax.jit(prepare)(BATCH, None)


def test_a_transform_that_makes_other_columns_in_evaluation_is_found_before_training():
    def crop(key, row):
        return {**row, "x": row["x"] if key is None else row["x"][:1]}

    data = Arrays(lambda split: {"x": np.ones((4, 2), np.float32)}, transforms=(crop,))
    assert batch_shapes(data, data.read("train"), 3, train=True)["x"].shape == (3, 1)
    others = {"test": data.read("test")}
    with pytest.raises(InputError, match=r"'x' of the test split is float32\[2\]; expected float32\[1\]"):
        check_splits(data, data.read("train"), others, ["x"])
    check_splits(data, data.read("train"), others, ["weight"])


TRAINED = {
    "image": np.zeros((4, 2), np.uint8),
    "signed": np.zeros(4, np.int32),
    "float": np.zeros((4, 2), np.float32),
    "half": np.zeros(4, np.float16),
    "flag": np.zeros(4, bool),
}


@pytest.mark.parametrize(
    ("name", "values", "dtype"),
    [
        ("image", [[0, 255]], "uint8"),
        ("image", np.array([[0, 255]], np.int16), "uint8"),
        ("signed", np.array([3], np.uint8), "int32"),
        ("signed", np.array([3], np.int64), "int64"),  # which JAX makes int32 of
        ("float", [[1, 2]], "float32"),
        ("float", [[1.5, 2]], "float64"),
        ("half", [0.1], "float16"),
        ("flag", [0], "bool"),
    ],
)
def test_rows_at_hand_have_the_dtype_of_the_training_rows(name, values, dtype):
    seen = []

    def look(rows):
        seen.append(rows[name].dtype.name)
        return rows

    data = Arrays(lambda split: TRAINED, images=(), host_transforms=(look,))
    batch = batch_of(data, {name: values}, (name,))
    assert batch[name].dtype.name == seen[-1] == dtype
    np.testing.assert_array_equal(batch[name], np.asarray(values).astype(dtype))


@pytest.mark.parametrize(
    ("name", "values", "message"),
    [
        ("image", [[0, 256]], "'image' holds int64, and uint8 in the training rows; expected uint8, or whole numbers"),
        ("image", [[0, -1]], "holds int64, and uint8"),
        ("image", [[0.5, 1.0]], "holds float64, and uint8"),
        (
            "float",
            np.zeros((1, 2), np.uint8),
            "holds uint8, and float32 in the training rows; expected float32, scaled",
        ),
        ("half", [1e6], "holds float64, and float16"),
        ("flag", [2], "holds int64, and bool"),
    ],
)
def test_rows_at_hand_whose_numbers_the_training_rows_could_not_have_are_refused(name, values, message):
    data = Arrays(lambda split: TRAINED, images=())
    with pytest.raises(InputError, match=message):
        batch_of(data, {name: values}, (name,))
    with pytest.raises(InputError, match=message):
        _columns(data, {name: values}, (name,))  # of Run.predict
    assert batch_of(data, {name: values})[name].dtype == np.asarray(values).dtype  # the model does not take it


def test_rows_at_hand_become_a_batch_of_weight_1():
    data = Arrays(load, host_transforms=(length,))
    batch = batch_of(data, {"text": ["aa", "b"], "label": jnp.arange(2), "weight": np.zeros(2)})
    assert batch.keys() == {"length", "label", "weight"}
    np.testing.assert_array_equal(batch["length"], [2, 1])
    np.testing.assert_array_equal(batch["weight"], [1, 1])
