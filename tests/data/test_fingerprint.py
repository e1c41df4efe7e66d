"""What changed in a split is named."""

from __future__ import annotations

import dataclasses
import datetime

import numpy as np
import pytest

from jaxmp.data import fingerprint as module
from jaxmp.data.fingerprint import changed_rows, fingerprint
from jaxmp.data.pipeline import check_values
from jaxmp.data.source import Columns, as_column


def columns():
    return {
        "x": np.arange(1200, dtype=np.float32).reshape(300, 4),
        "label": np.arange(300) % 3,
        "text": np.array([f"row {n}" for n in range(300)], object),
    }


def one_value(rows):
    rows["x"][299, 3] += 1
    return rows


CHANGES = {
    "rows fewer": (lambda rows: {name: column[:-1] for name, column in rows.items()}, "train has 299 rows (was 300)"),
    "columns permuted": (lambda rows: rows | {"x": rows["x"][:, ::-1]}, "'x'"),
    "dtype": (lambda rows: rows | {"label": rows["label"].astype(np.int32)}, "'label'"),
    "shape": (lambda rows: rows | {"x": rows["x"][:, :3]}, "'x'"),
    "one value": (one_value, "'x'"),
    "one letter": (lambda rows: rows | {"text": np.array(["Row 0", *rows["text"][1:]], object)}, "'text'"),
    "a column less": (lambda rows: {"x": rows["x"], "text": rows["text"]}, "'label'"),
}


@pytest.mark.parametrize("change", CHANGES)
def test_what_changed_is_named(change):
    make, named = CHANGES[change]
    (sentence,) = changed_rows("train", fingerprint(Columns(columns())), fingerprint(Columns(make(columns()))))
    assert "train" in sentence and named in sentence


def test_equal_rows_are_equal_in_whatever_order_the_columns_come():
    reordered = dict(reversed(columns().items()))
    assert changed_rows("train", fingerprint(Columns(columns())), fingerprint(Columns(reordered))) == []


@dataclasses.dataclass
class Named:
    """A source of one's own with an attribute that is called like one of jaxmp's."""

    columns: str = "x"
    source: str = "rows.bin"

    def __len__(self):
        return 300

    def __getitem__(self, indices):
        return {"x": indices}


def test_attributes_of_ones_own_source_may_have_any_name():
    assert fingerprint(Named())["rows"] == 300
    check_values(Named())


def test_a_large_split_is_sampled_and_says_so(monkeypatch):
    monkeypatch.setattr(module, "WHOLE_BYTES", 1000)
    made = fingerprint(Columns(columns()))
    assert made["sampled"] == 256
    assert changed_rows("train", made, fingerprint(Columns(one_value(columns())))) != []  # the last row is among them


def padded(value):
    """A longdouble among bytes that mean nothing."""
    column = np.full(3, 0xFF if value else 0, np.uint8).repeat(16).view(np.longdouble)
    column[:] = 1
    return column


class Thing:
    pass


SAME_AGAIN = {
    "objects of a class": lambda n: [Thing() for _ in range(3)],
    "sets": lambda n: [set(["a", "b", "c"][:: 1 - 2 * n])] * 3,
    "longdouble": padded,
    "gaps in records": lambda n: np.full(48, 255 * n, np.uint8).view(np.dtype([("a", "u1"), ("b", "f8")], align=True)),
    "long text": lambda n: np.array(["a" * 100] * 3, np.dtypes.StringDType()),
}


@pytest.mark.parametrize("kind", SAME_AGAIN)
def test_what_means_nothing_is_not_compared(kind):
    made = [as_column("odd", SAME_AGAIN[kind](n)) for n in (0, 1)]
    if kind == "gaps in records":
        for column in made:
            column["a"], column["b"] = 1, 2.0
    one, other = (fingerprint(Columns({"odd": column})) for column in made)
    assert changed_rows("train", one, other) == []


OTHER_OBJECTS = {
    "the middle of a long array": lambda n: [np.arange(5000) == 2500 * n] * 2 + [np.ones(3)],
    "a dtype in a list": lambda n: [[np.float32(1), [np.arange(2, dtype=(np.int32, np.int64)[n])]]] * 3,
    "an entry of a dict": lambda n: [{"a": {"b": n}}] * 3,
    "a date": lambda n: [datetime.date(2020, 1, 1 + n)] * 3,
    "long text": lambda n: np.array(["a" * 100 + str(n)] * 3, np.dtypes.StringDType()),
    "longdouble": lambda n: np.ones(3, np.longdouble) + n * np.finfo(np.longdouble).eps,
}


@pytest.mark.parametrize("kind", OTHER_OBJECTS)
def test_objects_are_compared_by_value(kind):
    one, other = (fingerprint(Columns({"odd": as_column("odd", OTHER_OBJECTS[kind](n))})) for n in (0, 1))
    assert changed_rows("train", one, other) == ["column 'odd' of train has other values"]


@pytest.mark.slow
def test_a_split_is_read_by_the_processes_that_are_to_read_it():
    columns = Columns({"x": np.arange(10_000), "text": np.array(["a", "bc"] * 5000)})
    assert fingerprint(columns, workers=2) == fingerprint(columns)
