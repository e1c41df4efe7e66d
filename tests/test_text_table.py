"""Aligned tables, and JSON without NaN."""

from __future__ import annotations

import json
import math

import pytest

from jaxmp.text_table import table, without_nan, without_password


def test_columns_are_as_wide_as_their_widest_cell_and_aligned_as_asked():
    rows = [("Dense_0", "1,024", "mixed_float16"), ("head", "10", "float32")]
    assert table(rows, header=("module", "numbers", "policy"), right=[1]).splitlines() == [
        "module   numbers  policy",
        "Dense_0    1,024  mixed_float16",
        "head          10  float32",
    ]


def test_columns_have_their_least_width_and_no_line_ends_in_a_space():
    assert table([("a", "1"), ("total", "")], right=[1], widths=(6, 4), indent=2) == "  a          1\n  total"


def test_a_cell_wider_than_the_least_width_moves_the_whole_column():
    assert table([("float8_e4m3fn", "1"), ("float32", "2")], widths=(9,)) == "float8_e4m3fn  1\nfloat32        2"


def test_a_table_without_rows_is_its_header_or_nothing():
    assert table([], header=("a", "b")) == "a  b"
    assert table([]) == ""


def test_rows_of_different_lengths_are_refused():
    with pytest.raises(ValueError):
        table([("a", "b"), ("c",)])


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_what_json_cannot_hold_is_null_at_any_depth(value):
    found = without_nan({"a": [1, (value, {"b": value})], "c": "nan", "d": True, "e": 0.5, "f": None})
    assert found == {"a": [1, [None, {"b": None}]], "c": "nan", "d": True, "e": 0.5, "f": None}
    json.dumps(found, allow_nan=False)


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("postgresql+psycopg://me:s/e?c&ret@host:5432/db", "postgresql+psycopg://me@host:5432/db"),
        ("--storage=mysql://me:secret@host/db?charset=utf8", "--storage=mysql://me@host/db?charset=utf8"),
        (
            "postgresql://me@host/db?password=secret&sslmode=require",
            "postgresql://me@host/db?password=...&sslmode=require",
        ),
        ("postgresql://host/db?user=me&sslpassword=secret", "postgresql://host/db?user=me&sslpassword=..."),
        ("postgresql://me:my long\tsecret@host/db", "postgresql://me@host/db"),
        ("postgresql://my self:secret@host/db", "postgresql://my self@host/db"),
        ("postgresql://me:sec@r et@host/db?x=a@b", "postgresql://me@host/db?x=a@b"),
        ("postgresql://host/db?password=my secret&user=me", "postgresql://host/db?password=...&user=me"),
        ("postgresql://me@host:5432/db", "postgresql://me@host:5432/db"),
        ("sqlite:///runs/a.db", "sqlite:///runs/a.db"),
        ("me@host:secret", "me@host:secret"),
    ],
)
def test_a_url_is_shown_without_its_password(text, shown):
    assert without_password(text) == shown == without_password(shown)
