"""What the rows of a split are, and what of them has changed."""

from __future__ import annotations

import numpy as np
import pytest

from jaxmp.data import fingerprint as module
from jaxmp.data.fingerprint import changed_rows, fingerprint
from jaxmp.data.source import Columns
from jaxmp.data.transforms import HostTransformed


def columns(**changes):
    rng = np.random.default_rng(0)
    text = np.array([f"row {n}" for n in range(100)], object)
    return {"x": rng.normal(size=(100, 4)).astype(np.float32), "label": rng.integers(0, 3, 100), "text": text} | changes


def one_value(column):
    changed = column.copy()
    changed.flat[250 if column.ndim > 1 else 50] += 1
    return changed


def other_text(column):
    changed = column.copy()
    changed[7] = "another"
    return changed


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda c: {name: column[:99] for name, column in c.items()}, "train has 99 rows (was 100)"),
        (lambda c: c | {"x": c["x"][:, [1, 0, 2, 3]]}, "column 'x' of train has other values"),
        (lambda c: c | {"x": c["x"][:, :3]}, "column 'x' of train is float32[3] (was float32[4])"),
        (lambda c: c | {"label": c["label"].astype(np.int16)}, "column 'label' of train is int16[] (was int64[])"),
        (lambda c: c | {"x": one_value(c["x"])}, "column 'x' of train has other values"),
        (lambda c: c | {"label": one_value(c["label"])}, "column 'label' of train has other values"),
        (lambda c: c | {"text": other_text(c["text"])}, "column 'text' of train has other values"),
        (lambda c: {"x": c["x"], "text": c["text"]}, "train has no column 'label' any more"),
        (lambda c: c | {"weights": c["label"]}, "train has a new column 'weights'"),
    ],
)
def test_what_differs_is_named(change, said):
    was, now = fingerprint(Columns(columns())), fingerprint(Columns(change(columns())))
    assert changed_rows("train", was, now) == [said]


def test_equal_rows_have_one_fingerprint_whatever_the_order_of_the_columns():
    backwards = dict(reversed(columns().items()))
    assert fingerprint(Columns(backwards)) == fingerprint(Columns(columns()))
    assert changed_rows("test", fingerprint(Columns(columns())), fingerprint(Columns(backwards))) == []


def test_a_split_larger_than_the_limit_goes_by_rows_spread_evenly(monkeypatch):
    monkeypatch.setattr(module, "WHOLE_BYTES", 1000)
    monkeypatch.setattr(module, "SAMPLED_ROWS", 10)
    x = np.zeros((100, 4), np.float32)
    was = fingerprint(Columns({"x": x}))
    assert was["sampled"] == 10 and was["rows"] == 100
    for row, seen in ((0, True), (99, True), (11, True), (12, False)):
        other = x.copy()
        other[row] = 1
        assert bool(changed_rows("train", was, fingerprint(Columns({"x": other})))) == seen


def test_host_transforms_are_code_and_not_called():
    def fails(rows):
        raise AssertionError

    whole = fingerprint(Columns(columns()))
    transformed = HostTransformed.__new__(HostTransformed)
    transformed.source, transformed.transforms = Columns(columns()), (fails,)
    assert fingerprint(transformed) == whole
