"""What changed in a split is named."""

from __future__ import annotations

import numpy as np
import pytest

from jaxmp.data import fingerprint as module
from jaxmp.data.fingerprint import changed_rows, fingerprint
from jaxmp.data.source import Columns


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


def test_a_large_split_is_sampled_and_says_so(monkeypatch):
    monkeypatch.setattr(module, "WHOLE_BYTES", 1000)
    made = fingerprint(Columns(columns()))
    assert made["sampled"] == 256
    assert changed_rows("train", made, fingerprint(Columns(one_value(columns())))) != []  # the last row is among them
