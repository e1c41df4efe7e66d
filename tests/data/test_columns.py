"""Columns as tables have them: what JAX cannot hold is left out or refused, and never wrapped."""

import jax
import numpy as np
import pytest
import scipy.sparse

from jaxmp import Arrays, InputError
from jaxmp.data.pipeline import check_values, left_out, resident
from jaxmp.data.source import Columns

LEFT_OUT = {
    "datetime": np.arange(3).astype("datetime64[D]"),
    "timedelta": np.arange(3).astype("timedelta64[s]"),
    "structured": np.zeros(3, [("a", "f4"), ("b", "i4")]),
    "longdouble": np.zeros(3, np.longdouble),
    "complex_longdouble": np.zeros(3, np.clongdouble),
    "void": np.zeros(3, "V5"),
    "ragged": [[1], [1, 2], []],
    "nested": {"a": np.zeros(3), "b": np.zeros(3)},
    "none": None,
    "scalar": 3,
    "text": ["a", "b", "c"],
    "keys": jax.random.split(jax.random.key(0), 3),
    "list of keys": [jax.random.key(0)] * 3,
    "sparse": scipy.sparse.eye(3).tocsr(),
    "generator": (number for number in range(3)),
    "dicts": [{"a": 1}] * 3,
    "strings of any length": np.array(["a", "b" * 100, ""], np.dtypes.StringDType()),
    "large whole numbers": [10**30] * 3,
}


@pytest.mark.parametrize("name", LEFT_OUT)
def test_an_unused_column_of_another_kind_is_left_out_and_named(name):
    source = Arrays(lambda split: {"x": np.ones(3), name: LEFT_OUT[name]}).read("train")
    assert list(resident(source)) == ["x"]
    assert list(left_out(source)) == [name]


@pytest.mark.parametrize("dtype", [">f4", ">i2", ">i8", ">f8", ">u4", "<i8"])
def test_a_column_of_the_other_byte_order_has_the_same_values(dtype):
    (column,) = resident(Columns({"x": np.array([1, 2, 300]).astype(dtype)})).values()
    assert column.dtype.isnative and column.tolist() == [1, 2, 300]


@pytest.mark.parametrize(
    ("column", "value"),
    [
        (np.array([0, 2**31]), "2147483648"),
        (np.array([-(2**31) - 1, 0]), "-2147483649"),
        (np.array([2**32], np.uint64), "4294967296"),
        (np.array([2**63], ">u8"), "9223372036854775808"),
        (np.array([1e39]), "1e+39"),
    ],
)
def test_values_that_jax_would_wrap_are_refused_by_name_and_value(column, value):
    source = Columns({"x": column})
    with pytest.raises(InputError) as error:
        resident(source)
    assert "'x'" in str(error.value) and value in str(error.value)
    if column.dtype.kind in "iu":
        with pytest.raises(InputError):
            check_values(source)
    with pytest.raises(InputError, match="'x'"):
        check_values(Streamed(source))


class Lazy:
    """A column that is read where it is indexed, by arrays alone."""

    def __init__(self, values, *, has_dtype):
        self.values = values
        if has_dtype:
            self.dtype, self.ndim, self.shape = values.dtype, values.ndim, values.shape

    def __len__(self):
        return len(self.values)

    def __getitem__(self, indices):
        assert isinstance(indices, np.ndarray) and len(indices) < len(self), "not all at once"
        return self.values[indices]


@pytest.mark.parametrize(("has_dtype", "at"), [(True, 1234), (False, 0), (False, 1999)])
def test_a_column_that_is_read_later_is_checked_too(has_dtype, at, monkeypatch):
    monkeypatch.setattr("jaxmp.data.pipeline.CHECKED_BYTES", 1600)
    values = np.zeros((2000, 2), np.int64)
    check_values(Columns({"x": Lazy(values, has_dtype=has_dtype)}))
    values[at, 1] = 2**40
    with pytest.raises(InputError, match="1099511627776"):
        check_values(Columns({"x": Lazy(values, has_dtype=has_dtype)}))


class Foreign:
    """An array of another library: NumPy reads it, and its dtype is none of NumPy's."""

    def __init__(self, values):
        self.values, self.shape, self.dtype = values, values.shape, "torch.float32"

    def __array__(self, dtype=None, copy=None):
        return self.values


def test_a_source_may_return_arrays_of_another_library():
    class Source(Streamed):
        def __getitem__(self, indices):
            return {name: Foreign(column) for name, column in self.rows[indices].items()}

    found = resident(Source(Columns({"x": np.arange(3.0), "label": np.arange(3)})))
    assert {name: column.tolist() for name, column in found.items()} == {"x": [0, 1, 2], "label": [0, 1, 2]}


class Streamed:
    """A source of one's own, which is read by rows."""

    def __init__(self, source):
        self.rows = source

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, indices):
        return self.rows[indices]


@pytest.mark.parametrize("at", [0, 999])
def test_a_streamed_source_is_sampled_with_its_first_and_last_row_before_training(at):
    column = np.arange(1000)
    check_values(Streamed(Columns({"x": column})))
    column[at] = 2**40
    with pytest.raises(InputError, match="1099511627776"):
        check_values(Streamed(Columns({"x": column})))


@pytest.mark.parametrize(
    "column", [np.array([2**31 - 1, -(2**31)]), np.array([2**32 - 1], np.uint64), np.array([np.inf])]
)
def test_values_that_fit_are_kept(column):
    assert resident(Columns({"x": column}))["x"].tolist() == column.tolist()


def test_a_split_is_loaded_once():
    calls = []

    def load(split):
        calls.append(split)
        return {"x": np.random.default_rng().normal(size=(4, 2))}

    data = Arrays(load)
    first = [data.read("train")[np.arange(4)]["x"], data.source("train")[np.arange(4)]["x"]]
    assert np.array_equal(*first) and calls == ["train"]
    assert data.read("train") is data.read("train")


def test_only_the_training_split_has_to_exist():
    data = Arrays(lambda split: {"x": np.ones(3)} if split == "train" else None)
    assert data.read("validation") is None and data.read("test") is None
    with pytest.raises(InputError, match=r"\('train'\) returned None"):
        Arrays(lambda split: None).read("train")
