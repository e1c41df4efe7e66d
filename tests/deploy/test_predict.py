"""predict.py: what is no .npz file and what does not fit is one sentence, under any names."""

from __future__ import annotations

import io
import zipfile

import numpy as np
import pytest

from jaxmp.deploy import predict
from jaxmp.deploy.predict import Artefact, ArtefactError, read_columns, write_columns


def npz(**members):
    file = io.BytesIO()
    write_columns(file, members)
    return file.getvalue()


def test_arrays_under_any_names_are_written_and_read_back():
    for name in ("file", "self", "size/mean", "args"):
        for array in (np.arange(6, dtype=">i4").reshape(2, 3), np.float32(3), np.zeros((0, 2)), np.array(["a", "bc"])):
            content = npz(**{name: array, "other": np.asfortranarray(np.ones((2, 3)))})
            found = read_columns(io.BytesIO(content))
            assert list(found) == [name, "other"] and found["other"].tolist() == np.ones((2, 3)).tolist()
            assert found[name].dtype == array.dtype and np.array_equal(found[name], array)
            assert found[name].shape == array.shape
            assert np.array_equal(np.load(io.BytesIO(content))[name], array)
    fortran = io.BytesIO()
    np.savez_compressed(fortran, x=np.asfortranarray(np.arange(6).reshape(2, 3)))
    assert read_columns(fortran)["x"].tolist() == [[0, 1, 2], [3, 4, 5]]


def test_no_change_of_one_bit_is_another_error():
    good, refused = npz(image=np.zeros((3, 2), np.float32)), 0
    for place in range(8 * len(good)):
        if place % 3 and place // 8 < 40:  # a third of the bits of the header, all of the directory
            continue
        damaged = bytearray(good)
        damaged[place // 8] ^= 1 << place % 8
        try:
            read_columns(io.BytesIO(damaged), most=1000)
        except ArtefactError:
            refused += 1
    assert refused > len(good)


def member(content, compression=zipfile.ZIP_STORED):
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", compression) as archive:
        archive.writestr("image.npy", content)
    return file.getvalue()


def with_header(text, data=b""):
    header = text.encode().ljust(117) + b"\n"
    return member(b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header + data)


def test_sizes_are_compared_before_anything_is_read_and_headers_are_not_trusted():
    start = "{'descr': '<f4', 'fortran_order': False, 'shape': "
    for content, expected in (
        (b"", "expected a .npz file with an array for each input"),
        (with_header(start + "(1000000000000, 64)}"), "has 0 bytes; its header says float32[1000000000000, 64]"),
        (with_header(start + "(-1, 2)}"), "header says float32[-1, 2]"),
        (with_header(start + "(3,)}", bytes(16)), "has 16 bytes; its header says float32[3]"),
        (with_header(start + "(3, 2"), "expected a .npz file"),
        (with_header(start + "(" * 60), "expected a .npz file"),
        (with_header("{'descr': '|O', 'fortran_order': False, 'shape': (1,)}", bytes(8)), "header says object[1]"),
        (member(b"no array"), "expected a .npz file"),
        (member(bytes(10_000), zipfile.ZIP_DEFLATED), "has 10,000 bytes unpacked; at most 1,000 are read"),
        (member(b"", zipfile.ZIP_LZMA), "compressed otherwise than by deflate"),
    ):
        assert len(content) < 1000
        with pytest.raises(ArtefactError) as error:
            read_columns(io.BytesIO(content), most=1000)
        assert expected in str(error.value), (expected, str(error.value))


MANIFEST = {
    "name": "net",
    "format": "onnx",
    "classes": ["a", "b"],
    "inputs": {"image": {"shape": ["b", 2], "dtype": "float32"}},
    "outputs": {"file": {"shape": ["b", 2], "dtype": "float32"}, "class": {"shape": ["b"], "dtype": "int32"}},
    "structure": {"file": 0, "class": 1},
    "state": {},
}


def test_predict_py_takes_and_writes_columns_of_any_name(tmp_path, monkeypatch, capsys):
    model = Artefact(MANIFEST, {}, lambda state, inputs: [inputs[0], np.arange(len(inputs[0]), dtype=np.int32)])
    monkeypatch.setattr(predict, "load", lambda folder: model)
    rows = np.ones((3, 2), np.float32)
    (tmp_path / "rows.npz").write_bytes(npz(image=rows, self=rows))
    monkeypatch.setattr("sys.argv", ["predict.py", str(tmp_path / "rows.npz"), str(tmp_path / "found")])
    assert predict.main() == 0 and str(tmp_path / "found.npz") in capsys.readouterr().out
    with np.load(tmp_path / "found.npz") as found:
        assert found["class"].tolist() == [0, 1, 2] and "file.npy" in found.zip.namelist()
    with pytest.raises(ArtefactError, match=r"2 inputs were given \(image, self\); expected image"):
        model(**{"image": rows, "self": rows})


DECODER = {
    "inputs": {"tokens": {"shape": ["b", "t"], "dtype": "int32"}},
    "outputs": {"output": {"shape": ["b", "t", 3], "dtype": "float32"}},
    "structure": 0,
    "state": {"keys": {"shape": ["b", 6, 2], "dtype": "bfloat16"}, "at": {"shape": [], "dtype": "int32"}},
    "context": 6,
}


def test_a_step_refuses_what_does_not_fit_the_state_and_the_context():
    model = Artefact(DECODER, {}, lambda state, inputs: [np.zeros((*inputs[0].shape, 3), np.float32), *state])
    state = model.start(2)
    assert model.step(state, np.ones((2, 6), np.int32))[0].shape == (2, 6, 3)
    for given, tokens, expected in (
        (state, (2, 7), "7 tokens a row were given; expected at most 6, the model's context"),
        (state, (3, 1), "input tokens is int32[3, 1]; expected int32[b, t], and 2 rows, as the state has"),
        (state[:1], (2, 1), "the state has 1 arrays; expected the 2 of start(rows)"),
        ([state[0], 3], (2, 1), "state at is int[]; expected int32[]"),
        ([state[0].astype(np.float32), state[1]], (2, 1), "state keys is float32[2, 6, 2]; expected bfloat16[b, 6, 2]"),
        ([state[0][:, :5], state[1]], (2, 1), "state keys is bfloat16[2, 5, 2]"),
        ([state[0][0], state[1]], (2, 1), "state keys is bfloat16[6, 2]"),
    ):
        with pytest.raises(ArtefactError) as error:
            model.step(given, tokens=np.ones(tokens, np.int32))
        assert str(error.value).startswith(expected), str(error.value)
