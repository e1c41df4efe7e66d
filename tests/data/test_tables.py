"""Tables in files: every kind is read back as it was written, and what is broken is one message."""

from __future__ import annotations

import io
import struct
import sys
import zipfile

import jax.numpy as jnp
import numpy as np
import pyarrow as pa
import pyarrow.parquet
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


def npy(header=b"{'descr': '<f8', 'fortran_order': False, 'shape': (3,), }\n"):
    return b"\x93NUMPY\1\0" + struct.pack("<H", len(header)) + header + np.zeros(3).tobytes()


def npz(content=None, name="x.npy", *, flags=0, method=0):
    """An npz file of one member, with the flags and the compression method that its directory says it has."""
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr(name, npy() if content is None else content)
    whole = bytearray(file.getvalue())
    for start, at in ((b"PK\1\2", 8), (b"PK\3\4", 6)):
        place = whole.index(start) + at
        whole[place : place + 4] = struct.pack("<HH", flags, method)
    return bytes(whole)


def parquet(values, kind):
    file = io.BytesIO()
    pyarrow.parquet.write_table(pa.table({"y": pa.array(values, kind)}), file)
    return file.getvalue()


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("no.csv", None, "No such file"),
        ("t.xls", b"", "ends with .csv, .jsonl, .parquet, .npz"),
        ("t.csv", b"", "as csv: Empty CSV file"),
        ("t.csv", b"x,y\n", "at least one row"),
        ("t.csv", b"x,y\n1,2\n3\n", "as csv: .*Expected 2 columns"),
        ("t.csv", b"x,y\n1,\n2,3\n", "column 'y' has 1 empty cells"),
        ("t.csv", b"x,y\n1,\n2,a\n", "column 'y' has 1 empty cells"),
        ("t.jsonl", b'{"y": "a"}\n{"y": null}\n', "column 'y' has 1 empty cells, the first in object 2; fill"),
        (
            "t.jsonl",
            b'{"y": [[1], [2]]}\n{"y": [[1], [null]]}\n',
            "column 'y' has 1 empty cells, the first in object 2",
        ),
        pytest.param(
            "t.parquet", parquet([[1, 2], [3, None]], pa.list_(pa.int8())), "'y' has 1 empty cells;", id="lists"
        ),
        pytest.param(
            "t.parquet", parquet([[1], [3, None]], pa.list_(pa.int8())), "'y' has 1 empty cells;", id="ragged"
        ),
        ("t.csv", b"x,y\n\xff\xfe,3\n", "column 'x' is not UTF-8"),
        ("t.jsonl", b'{"x": 1}\n{"z": 1}\n', "object 2 has other names"),
        ("t.jsonl", b"[1]\n", "object 1"),
        ("t.jsonl", b"{", "as jsonl: "),
        ("t.parquet", b"PAR1", "as parquet: "),
        ("t.npz", b"PK\x03\x04", "as npz: "),
        ("t.npz", b"nothing", "as npz: "),
        pytest.param("t.npz", CORRUPT, "as npz: .*decompressing", id="corrupt"),
        pytest.param("t.npz", npz(npy(b"{'descr': (\n")), "as npz: ", id="a header that is no Python"),
        pytest.param(
            "t.npz", npz(b"text", "x.txt"), "as npz: 'x.txt' in it is no array", id="a member that is no array"
        ),
        pytest.param("t.npz", npz(method=97), "as npz: .*compression method", id="an unknown compression"),
        pytest.param("t.npz", npz(flags=1), "as npz: .*encrypted", id="encrypted"),
        pytest.param("t.jsonl", b'{"x": ' + b"[" * 100_000 + b"]" * 100_000 + b"}", "as jsonl: ", id="nested"),
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


DTYPES = ["bool", "int8", "uint8", "int16", "uint16", "int32", "uint32", "int64", "uint64"]


@pytest.mark.parametrize("dtype", [*DTYPES, "float16", "float32", "float64", ">f4", "bfloat16"])
@pytest.mark.parametrize("kind", ["parquet", "npz"])
def test_a_parquet_or_npz_file_keeps_dtype_and_shape(tmp_path, kind, dtype):
    grid = np.arange(24).reshape(2, 3, 4).astype(jnp.dtype(dtype))
    columns = {"grid": grid, "flat": grid[:, 0, 0]}
    write_table(tmp_path / f"t.{kind}", columns)
    read = read_table(tmp_path / f"t.{kind}")
    expected = np.dtype("float32" if dtype == "bfloat16" else dtype)
    for name, column in columns.items():
        assert read[name].dtype.newbyteorder("=") == expected.newbyteorder("="), name
        np.testing.assert_array_equal(read[name], column.astype(expected))


@pytest.mark.parametrize("kind", [pa.list_(pa.uint8()), pa.large_list(pa.uint8()), pa.list_(pa.uint8(), 2)])
def test_lists_of_parquet_have_the_dtype_of_their_numbers(tmp_path, kind):
    (tmp_path / "t.parquet").write_bytes(parquet([[1, 2], [3, 255]], kind))
    read = read_table(tmp_path / "t.parquet")["y"]
    assert read.dtype == np.uint8 and read.tolist() == [[1, 2], [3, 255]]
    (tmp_path / "t.parquet").write_bytes(parquet([[1], [3, 255], []], pa.list_(pa.uint8())))
    assert read_table(tmp_path / "t.parquet")["y"].tolist() == [[1], [3, 255], []]


@pytest.mark.parametrize("kind", ["csv", "jsonl", "parquet"])
def test_numbers_that_are_not_finite_and_texts_that_look_empty_are_read_back(tmp_path, kind):
    columns = {
        "x": np.array([np.nan, np.inf, -np.inf, 1.5]),
        "nan": np.full(4, np.nan),
        "text": np.array(["NA", "null", "nan", ""], object),
    }
    write_table(tmp_path / f"t.{kind}", columns)
    read = read_table(tmp_path / f"t.{kind}")
    np.testing.assert_array_equal(read["x"], columns["x"])
    np.testing.assert_array_equal(read["nan"], columns["nan"])
    assert read["text"].tolist() == columns["text"].tolist()


def test_a_large_csv_file_may_have_lines_in_its_texts(tmp_path):
    texts = ["a\n" * 200 + str(row) for row in range(4000)]
    write_table(tmp_path / "t.csv", {"text": np.array(texts, object)})
    assert (tmp_path / "t.csv").stat().st_size > 2**20
    assert read_table(tmp_path / "t.csv")["text"].tolist() == texts
