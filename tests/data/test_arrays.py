"""One's own data, by a function."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxmp.data.arrays import Arrays
from jaxmp.data.pipeline import nbytes, resident
from jaxmp.errors import InputError


def rows(split):
    return {"image": np.zeros((6, 4, 4, 1), np.uint8), "label": list(range(6)), "name": ["one"] * 6}


def test_a_source_gives_batches_of_rows():
    source = Arrays(rows).source("train")
    batch = source[np.array([4, 0, 4])]
    assert len(source) == 6
    assert batch["image"].shape == (3, 4, 4, 1)
    np.testing.assert_array_equal(batch["label"], [4, 0, 4])


def test_text_stays_on_the_host():
    source = Arrays(rows).source("train")
    assert source[np.arange(2)]["name"].tolist() == ["one", "one"]
    assert set(resident(source)) == {"image", "label"}
    assert nbytes(source) == 6 * (16 + 8)


def computed(split):
    return {"image": jax.random.uniform(jax.random.key(0), (6, 2)), "label": jnp.arange(6) % 3}


def test_a_load_may_compute_by_jax_though_it_is_first_called_in_a_trace():
    found = []
    jax.eval_shape(lambda: found.append(Arrays(computed).source("train")))
    columns = resident(found[0])
    np.testing.assert_array_equal(columns["label"], [0, 1, 2, 0, 1, 2])
    np.testing.assert_array_equal(columns["image"], computed("train")["image"])


def raising(split):
    return {}[split]


@pytest.mark.parametrize(
    "load, message",
    [
        (lambda split: [1, 2], r"returned a list; expected a dict of arrays"),
        (lambda split: np.zeros(3), r"returned an ndarray; expected a dict of arrays"),
        (lambda split: {}, r"expected a dict of arrays"),
        (lambda split: {"a": np.zeros(3), "b": np.zeros(4)}, r"shapes \{'a': \(3,\), 'b': \(4,\)\}; expected one lead"),
        (lambda split: {"a": 1.0}, r"returned no arrays, only {'a': 'float'}; expected a dict of arrays"),
        (lambda split: {"a": np.zeros((0, 2))}, r"returned no rows"),
        (raising, r"raising\('test'\) raised KeyError: 'test' \(test_arrays.py, line \d+\)"),
    ],
)
def test_a_load_that_returns_no_rows_is_bad_input(load, message):
    with pytest.raises(InputError, match=message):
        Arrays(load).source("test")


@pytest.mark.parametrize("field, value", [("batch_size", 0), ("eval_batch_size", -1), ("workers", -1), ("std", (0.0,))])
def test_an_impossible_setting_is_bad_input(field, value):
    with pytest.raises(InputError, match=rf"data\.{field} (is|=) .*expected"):
        Arrays(rows, **{field: value})


def test_arrays_that_are_given_are_not_those_that_are_written_to_later(tmp_path):
    x, text = np.zeros(3), np.array(["a", "b", "c"], object)
    data = Arrays.of({"x": x, "text": text})
    x[:], text[0] = 1, "z"
    assert data.read("train")[np.arange(3)]["x"].tolist() == [0, 0, 0]
    assert data.read("train")[np.arange(3)]["text"].tolist() == ["a", "b", "c"]
    np.save(tmp_path / "x.npy", x)
    mapped = np.load(tmp_path / "x.npy", mmap_mode="r")
    assert np.shares_memory(Arrays.of({"x": mapped}).source("train").columns["x"], mapped)
