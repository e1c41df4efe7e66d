"""Tables in files: every kind is read back as it was written, and what is broken is one message."""

from __future__ import annotations

import io
import sys

import numpy as np
import pytest

from jaxmp import InputError
from jaxmp.data.tables import read_table, write_table

COLUMNS = {
    "x": np.array([0.1, -1e-30, 3.0], np.float32),
    "file": np.array([1, 2, 3]),
    "text": np.array(["a, b", 'c"d', "é"], object),
    "grid": np.arange(12, dtype=np.float32).reshape(3, 2, 2) / 7,
}


@pytest.mark.parametrize("kind", ["csv", "jsonl", "parquet", "npz"])
def test_what_is_written_is_read_back_equal(tmp_path, kind):
    columns = {name: c for name, c in COLUMNS.items() if kind != "npz" or c.dtype != object}
    write_table(tmp_path / f"t.{kind}", columns)
    read = read_table(tmp_path / f"t.{kind}")
    if kind == "csv":
        read["grid"] = np.stack([read.pop(f"grid_{i}") for i in range(4)], axis=1).reshape(3, 2, 2)
    assert set(read) == set(columns)
    for name, column in columns.items():
        assert read[name].tolist() == column.tolist(), name
    assert sorted(path.name for path in tmp_path.iterdir()) == [f"t.{kind}"], "nothing half-written is left"


@pytest.mark.parametrize("text", ["x,y\n1,a\n2,b\n", '\n{"x": 1, "y": "a"}\n{"y": "b", "x": 2}\n'])
def test_standard_input_is_csv_or_json_lines(monkeypatch, text):
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(text.encode())))
    assert {name: column.tolist() for name, column in read_table("-").items()} == {"x": [1, 2], "y": ["a", "b"]}


def corrupt():
    """A compressed npz file whose compressed bytes are broken."""
    file = io.BytesIO()
    np.savez_compressed(file, x=np.arange(1000))
    content = bytearray(file.getvalue())
    content[100:140] = bytes(40)
    return bytes(content)


CORRUPT = corrupt()


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("no.csv", None, "No such file"),
        ("t.xls", b"", "ends with .csv, .jsonl, .parquet, .npz"),
        ("t.csv", b"", "as csv: Empty CSV file"),
        ("t.csv", b"x,y\n", "at least one row"),
        ("t.csv", b"x,y\n1,2\n3\n", "as csv: .*Expected 2 columns"),
        ("t.csv", b"x,y\n1,\n2,3\n", "column 'y' has 1 empty cells"),
        ("t.csv", b"x,y\n\xff\xfe,3\n", "column 'x' is not UTF-8"),
        ("t.jsonl", b'{"x": 1}\n{"z": 1}\n', "object 2 has other names"),
        ("t.jsonl", b"[1]\n", "object 1"),
        ("t.jsonl", b"{", "as jsonl: "),
        ("t.parquet", b"PAR1", "as parquet: "),
        ("t.npz", b"PK\x03\x04", "as npz: "),
        ("t.npz", b"nothing", "as npz: "),
        pytest.param("t.npz", CORRUPT, "as npz: .*decompressing", id="corrupt"),
    ],
)
def test_what_cannot_be_read_is_one_message(tmp_path, name, content, expected):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError, match=expected):
        read_table(tmp_path / name)


def test_arrays_of_different_lengths_and_arrays_without_a_name_are_no_table(tmp_path):
    np.savez(tmp_path / "t.npz", x=np.zeros(3), y=np.zeros(4))
    with pytest.raises(InputError, match=r"lengths \{'x': 3, 'y': 4\}"):
        read_table(tmp_path / "t.npz")
    np.save(tmp_path / "one.npy", np.zeros(3))
    (tmp_path / "one.npy").rename(tmp_path / "one.npz")
    with pytest.raises(InputError, match="one array without a name"):
        read_table(tmp_path / "one.npz")


def test_a_write_that_fails_leaves_the_file_as_it_was(tmp_path):
    write_table(tmp_path / "t.npz", {"x": np.zeros(3)})
    with pytest.raises(ValueError, match="Object arrays"):
        write_table(tmp_path / "t.npz", {"x": np.array([None])})
    assert read_table(tmp_path / "t.npz")["x"].tolist() == [0.0, 0.0, 0.0]
    assert [path.name for path in tmp_path.iterdir()] == ["t.npz"]


def test_a_file_that_the_system_cannot_read_is_one_message(tmp_path, monkeypatch):
    def fails(*_, **__):
        raise OSError(5, "Input/output error")

    (tmp_path / "t.parquet").write_bytes(b"PAR1")
    monkeypatch.setattr("pyarrow.parquet.read_table", fails)
    with pytest.raises(InputError, match=r"t\.parquet cannot be read as parquet: .*Input/output error"):
        read_table(tmp_path / "t.parquet")
