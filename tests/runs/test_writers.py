"""Writers: what is written can be read back, after a kill too."""

from __future__ import annotations

import json
import subprocess
import sys
import types
from pathlib import Path

import pytest

from jaxmp.errors import InputError
from jaxmp.runs.writers import JsonLines, TensorBoard, WeightsAndBiases, read_lines


def record(step: int, split: str = "train", **fields: float) -> dict:
    return {
        "step": step,
        "applied_steps": step - 1,
        "epoch": step / 10,
        "split": split,
        "loss": 1 / step,
        "accuracy": 0.5,
        "loss_scale": 32768.0,
        "skipped_steps": 1,
        "examples_per_second": 1234.5,
    } | fields


def lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_a_record_comes_back_from_json_as_it_was(tmp_path):
    writer = JsonLines(tmp_path / "run" / "metrics.jsonl", None)
    writer.write(record(1, perplexity=1 / 3))
    assert lines(writer.path) == [record(1, perplexity=1 / 3)]  # before close: a kill costs nothing
    writer.write(record(2, "test"))
    writer.close()
    assert lines(writer.path) == [record(1, perplexity=1 / 3), record(2, "test")]


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_a_number_that_is_not_finite_is_null_in_json(tmp_path, value):
    writer = JsonLines(tmp_path / "metrics.jsonl", None)
    writer.write(record(1, loss=value))
    writer.close()
    assert lines(writer.path)[0]["loss"] is None
    assert "NaN" not in writer.path.read_text()


def test_arrays_of_one_number_are_written_as_numbers(tmp_path):
    import numpy as np

    writer = JsonLines(tmp_path / "metrics.jsonl", None)
    writer.write({"step": 1, "split": "train", "loss": np.float32(0.5)})
    writer.close()
    assert lines(writer.path) == [{"step": 1, "split": "train", "loss": 0.5}]


def test_on_resume_later_lines_and_a_half_written_one_are_cut(tmp_path):
    path = tmp_path / "metrics.jsonl"
    writer = JsonLines(path, None)
    for step in (1, 2, 3, 4):
        writer.write(record(step))
        writer.write(record(step, "validation"))
    writer.close()
    whole = path.read_bytes().splitlines(keepends=True)
    for half in (b"", whole[0][:-1], whole[0][:7]):
        path.write_bytes(b"".join(whole) + half)
        writer = JsonLines(path, 2)
        writer.write(record(3))
        writer.close()
        assert path.read_bytes().splitlines(keepends=True)[:4] == whole[:4]
        assert [(line["step"], line["split"]) for line in lines(path)][4:] == [(3, "train")]
    assert [file.name for file in tmp_path.iterdir()] == ["metrics.jsonl"]


@pytest.mark.parametrize("broken", [b"garbage", b"\xff\xfe", b"[1]", b"{}", b""])
def test_a_broken_line_is_named_and_not_cut(tmp_path, broken):
    path = tmp_path / "metrics.jsonl"
    good = json.dumps(record(1)).encode()
    path.write_bytes(b"\n".join([good, broken, good, b""]))
    before = path.read_bytes()
    for read in (read_lines, lambda path: JsonLines(path, 0)):
        with pytest.raises(InputError, match=r"metrics.jsonl, line 2: .* repair this line"):
            read(path)
    assert path.read_bytes() == before


def test_starting_anew_starts_an_empty_file(tmp_path):
    for _ in range(2):
        writer = JsonLines(tmp_path / "metrics.jsonl", None)
        writer.write(record(1))
        writer.close()
    assert len(lines(writer.path)) == 1


@pytest.mark.parametrize("make", [lambda path: JsonLines(path / "m.jsonl", None), lambda path: TensorBoard(path, None)])
def test_a_place_that_cannot_be_written_is_an_input_error(tmp_path, make):
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match=r"cannot be written: (Not a directory|File exists)"):
        make(tmp_path / "file")


@pytest.mark.parametrize("writer", ["JsonLines(folder / 'metrics.jsonl', None)", "TensorBoard(folder, None)"])
def test_a_full_disk_is_an_input_error(tmp_path, writer):
    code = f"""
import pathlib, resource
from jaxmp.errors import InputError
from jaxmp.runs.writers import JsonLines, TensorBoard
folder = pathlib.Path({str(tmp_path)!r})
resource.setrlimit(resource.RLIMIT_FSIZE, (2000, 2000))
writer = {writer}
try:
    for step in range(100):
        writer.write({{"step": step, "split": "train", "loss": 0.5}})
except InputError as error:
    print(error)
try:
    writer.close()
except InputError as error:
    pass
"""
    result = subprocess.run(
        [sys.executable, "-c", code], cwd=Path(__file__).parents[2], capture_output=True, text=True, timeout=60
    )
    assert "cannot be written: File too large" in result.stdout, result.stderr
    assert result.stderr == ""


def scalars(folder: Path) -> dict[str, list[tuple[int, float]]]:
    events = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    accumulator = events.EventAccumulator(str(folder), size_guidance={events.SCALARS: 0})
    accumulator.Reload()
    return {tag: [(e.step, e.value) for e in accumulator.Scalars(tag)] for tag in accumulator.Tags()["scalars"]}


def test_tensorboard_reads_the_scalars_and_drops_what_a_resumed_run_does_again(tmp_path):
    pytest.importorskip("tensorboard")  # here: with nothing open yet
    first = TensorBoard(tmp_path, None)
    for step in (1, 2, 3, 4):
        first.write(record(step))
    first.write(record(4, "validation", loss=float("nan")))
    read = scalars(tmp_path)  # before close: a kill costs nothing
    assert [step for step, _ in read["train/loss"]] == [1, 2, 3, 4]
    assert read["validation/loss"][0][1] != read["validation/loss"][0][1]
    assert "train/step" not in read
    second = TensorBoard(tmp_path, 2)  # within the same second, and the first was never closed
    second.write(record(3, loss=7.0))
    second.close()
    first.close()
    read = scalars(tmp_path)
    assert read["train/loss"] == [(1, 1.0), (2, 0.5), (3, 7.0)]
    assert read["train/loss_scale"][0] == (1, 32768.0)
    assert "validation/loss" not in read or read["validation/loss"] == []


def test_an_event_file_is_one_that_tensorboardx_could_have_written(tmp_path):
    """Read without TensorBoard: the framing and the checksums of TFRecord."""
    import struct

    from tensorboardX.proto.event_pb2 import Event
    from tensorboardX.record_writer import masked_crc32c

    writer = TensorBoard(tmp_path, None)
    writer.write(record(5))
    writer.close()
    data, events = writer.path.read_bytes(), []
    while data:
        (length,), (check,) = struct.unpack("<Q", data[:8]), struct.unpack("<I", data[8:12])
        assert check == masked_crc32c(data[:8])
        body, data = data[12 : 12 + length], data[12 + length :]
        assert struct.unpack("<I", data[:4]) == (masked_crc32c(body),)
        events.append(Event.FromString(body))
        data = data[4:]
    assert events[0].file_version == "brain.Event:2"
    assert events[1].step == 5
    assert {value.tag: value.simple_value for value in events[1].summary.value}["train/accuracy"] == 0.5


@pytest.mark.slow
def test_weights_and_biases_is_filled_from_the_lines_and_goes_on_with_its_offline_run(tmp_path, monkeypatch):
    pytest.importorskip("wandb")
    code = f"""
import pathlib, time
from jaxmp.runs.writers import WeightsAndBiases
past = [{{"step": 0, "split": "train", "loss": None}}]  # of a run that W&B did not see begin
folder = pathlib.Path({str(tmp_path)!r})
for session, steps in enumerate(((1, 2), (2, 3)), 1):
    writer = WeightsAndBiases(folder, "digits_mlp/abc-s0", {{"seed": 0}}, session=session, past=past)
    for step in steps:
        writer.write({{"step": step, "split": "train", "loss": 1 / step}})
        writer.write({{"step": step, "split": "validation", "loss": float("nan")}})
    writer.close()
    time.sleep(1.1)  # W&B names a folder by the second, and would overwrite it
"""
    monkeypatch.setenv("WANDB_MODE", "offline")
    result = subprocess.run(
        [sys.executable, "-c", code], cwd=Path(__file__).parents[2], capture_output=True, text=True, timeout=120
    )
    assert (result.returncode, result.stdout, result.stderr) == (0, "", "")
    identity = (tmp_path / "wandb" / "run_id").read_text()
    runs = sorted((tmp_path / "wandb").glob(f"offline-run-*-{identity}"))
    assert runs
    first, *history = [history for run in runs for history in wandb_history(run)]
    assert first == pytest.approx({"session": 1, "step": 0, "train/loss": float("nan")}, nan_ok=True)
    assert history == [
        pytest.approx({"session": session, "step": step, **fields}, nan_ok=True)
        for session, steps in enumerate(((1, 2), (2, 3)), 1)
        for step in steps
        for fields in ({"train/loss": 1 / step}, {"validation/loss": float("nan")})
    ]


def test_weights_and_biases_switched_on_late_is_filled_from_the_lines_first(tmp_path, monkeypatch):
    logged = []
    run = types.SimpleNamespace(define_metric=lambda *args, **kwargs: None, log=logged.append, finish=lambda: None)
    errors = types.SimpleNamespace(Error=RuntimeError)
    fake = types.SimpleNamespace(init=lambda **kwargs: run, Settings=lambda **kwargs: None, errors=errors)
    monkeypatch.setitem(sys.modules, "wandb", fake)
    monkeypatch.setattr(fake, "Histogram", None, raising=False)
    past = [{"step": 1, "split": "train", "loss": 0.5}, {"step": 1, "split": "validation", "loss": None}]
    for session in (2, 3, 5):  # switched off in session 4
        writer = WeightsAndBiases(tmp_path, "name", {}, session=session, past=past)
        writer.write({"step": session, "split": "train", "loss": 0.25})
        past.append({"step": session, "split": "train", "loss": 0.25})
        if session == 3:
            past.append({"step": 4, "split": "train", "loss": 0.125})
    assert logged == [
        {"session": 2, "step": 1, "train/loss": 0.5},
        pytest.approx({"session": 2, "step": 1, "validation/loss": float("nan")}, nan_ok=True),
        {"session": 2, "step": 2, "train/loss": 0.25},
        {"session": 3, "step": 3, "train/loss": 0.25},
        {"session": 5, "step": 4, "train/loss": 0.125},
        {"session": 5, "step": 5, "train/loss": 0.25},
    ]


def wandb_history(run: Path) -> list[dict]:
    """The history in a `.wandb` file: LevelDB's log format after 7 bytes, here in one block."""
    from wandb.proto.wandb_internal_pb2 import Record

    (file,) = run.glob("*.wandb")
    data, position, history = file.read_bytes(), 7, []
    assert data.startswith(b":W&B") and len(data) < 32768
    while position < len(data):
        length = int.from_bytes(data[position + 4 : position + 6], "little")
        record = Record.FromString(data[position + 7 : position + 7 + length])
        position += 7 + length
        if record.HasField("history"):
            items = {item.key or "/".join(item.nested_key): item.value_json for item in record.history.item}
            history.append({name: float(json.loads(v)) for name, v in items.items() if not name.startswith("_")})
    return history


def test_without_weights_and_biases_the_error_says_how_to_install_it(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(InputError, match=r"uv sync --extra wandb.*pip install 'jaxmp\[wandb\]'"):
        WeightsAndBiases(tmp_path, "name", {})


def test_importing_the_module_imports_none_of_the_packages_behind_it():
    code = "import sys, jaxmp.runs.writers; print({'rich', 'wandb', 'tensorboardX', 'jax'} & set(sys.modules))"
    result = subprocess.run(
        [sys.executable, "-c", code], cwd=Path(__file__).parents[2], capture_output=True, text=True, timeout=60
    )
    assert result.stdout == "set()\n", result.stderr
