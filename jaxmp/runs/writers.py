"""Where the numbers of a run go: metrics.jsonl, TensorBoard, Weights & Biases; the screen is in console.py.

A record is one flat mapping. Its fields:

    step                 int, training steps attempted so far, skipped ones included
    applied_steps        int, those of them that changed the parameters
    epoch                float, passes over the training set so far
    split                "train", "validation" or "test"
    loss                 float, the mean over the examples that the record stands for
    loss_scale           float, S of the step; 1 without loss scaling
    skipped_steps        int, total so far
    sparsity             float, share of the weights that are pruned so far, of a run with pruning
    epsilon              float, of an evaluation of a private run: what the weights tell of a row, at the optimizer's
                         delta; null if nothing bounds it
    examples_per_second  float, without the padding of the last batch of an epoch
    tflops_per_second    float, of the products and convolutions of the model, see `Trainer.step_flops`; not there where
                         parameters are frozen, an objective trains a part alone, or there is a teacher
    mfu                  float, the share of what the devices can reach; not there where that is not known
    wall_seconds         float, of all sessions of the run so far
    ...                  any other metric of the task, a float: accuracy, say

Of several objectives, each has `generator/loss`, `applied_steps/generator`, `loss_scale/generator` and
`skipped_steps/generator`; `skipped_steps` is their sum, and the plain `loss`, `applied_steps` and `loss_scale` are not
there. A record of split "ranges" then says in `objective` whose it is.

A record of split "ranges" has the magnitudes of one step instead of metrics: `ranges` maps a kind (parameters,
gradients, ...) and a name to what `jaxmp.instruments.ranges.Range.to_json` returns.

`step` and `split` are always present. All fields but the metrics are listed in `jaxmp.training.metrics.BOOKKEEPING`. A
value that is not finite is written as each format writes it.
"""

from __future__ import annotations

import contextlib
import io
import json
import math
import os
import secrets
import struct
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from jaxmp.errors import InputError, install
from jaxmp.text_table import without_nan

Record = Mapping[str, Any]


@contextlib.contextmanager
def escaped_output() -> Iterator[None]:
    """Context manager: what the output's encoding does not have is escaped, and ends no run."""
    stream, before = sys.stdout, getattr(sys.stdout, "errors", None)
    if not isinstance(stream, io.TextIOWrapper) or before != "strict":
        yield
        return
    stream.reconfigure(errors="backslashreplace")
    try:
        yield
    finally:
        stream.reconfigure(errors=before)


class Writer(Protocol):
    """Takes the records of a run, in the order of their steps."""

    def write(self, record: Record) -> None:
        """Writes one record. Raises InputError if it cannot be written (disk full)."""

    def close(self) -> None:
        """Writes what is left. Nothing may be written afterwards."""


@contextlib.contextmanager
def _or_input_error(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise InputError(f"{path} cannot be written: {error.strerror}. Make room or choose another folder") from error


def _numbers(record: Record) -> dict[str, float]:
    return {name: float(value) for name, value in record.items() if not isinstance(value, str | Mapping)}


def _histograms(record: Record) -> Iterator[tuple[str, list[int], list[int]]]:
    """Yields the histograms of a record: name, base 2 logarithms at which bins begin, and counts of the bins."""
    above = [record["split"], *([record["objective"]] if "objective" in record else [])]
    for kind, ranges in record.get("ranges", {}).items():
        for name, seen in ranges.items():
            low, counts = seen["lowest_exponent"], seen["counts"]
            if counts:
                yield f"{'/'.join(above)}/{kind}/{name or '(model)'}", list(range(low, low + len(counts))), counts


class JsonLines:
    """Writes one JSON object a line, with every field of the record; a metric that is not finite is null.

    Each line is handed to the system before `write` returns, so a `kill -9` loses at most the line being written.

    Args:
      path: the file, in a folder that exists or can be made.
      resume_step: the restored step: later lines, and a half-written last one, are cut. None: an empty file.
    """

    def __init__(self, path: Path, resume_step: int | None = None):
        self.path = Path(path)
        with _or_input_error(self.path):
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._keep_until(-1 if resume_step is None else resume_step)
            self._file = self.path.open("ab")

    def write(self, record: Record) -> None:
        """Appends the record."""
        line = json.dumps({name: _jsonable(value) for name, value in record.items()}, allow_nan=False)
        with _or_input_error(self.path):
            self._file.write(line.encode() + b"\n")
            self._file.flush()

    def close(self) -> None:
        """Closes the file."""
        with _or_input_error(self.path):
            self._file.close()

    def _keep_until(self, step: int) -> None:
        """Cuts later lines; replaces the file in one rename, so that a kill leaves either the old lines or the new."""
        if not self.path.exists():
            return
        if step >= 0:
            read_lines(self.path)  # refuses a broken one, which would be cut otherwise
        temporary = self.path.with_name(self.path.name + ".tmp")
        with self.path.open("rb") as old, temporary.open("wb") as new:
            new.writelines(line for line in old if _step_of(line) <= step)
        os.replace(temporary, self.path)


def read_lines(path: Path) -> list[dict[str, Any]]:
    """Reads the records of a metrics.jsonl, in order, without what follows the last newline: it is being written.

    Raises: InputError with the number of a line that is no record.
    """
    if not path.exists():
        return []
    *lines, _ = path.read_bytes().split(b"\n")
    return [_record(line, f"{path}, line {number}") for number, line in enumerate(lines, 1)]


def _record(line: bytes, where: str) -> dict[str, Any]:
    expected = "expected a JSON object with step and split; repair this line, or take it out of the file"
    try:
        record = json.loads(line.decode())
    except ValueError as error:  # of both
        raise InputError(f"{where}: {error}; {expected}") from None
    if not isinstance(record, dict) or not {"step", "split"} <= set(record):
        raise InputError(f"{where}: {line.decode()[:60]}; {expected}")
    return record


def _jsonable(value: Any) -> Any:
    if isinstance(value, str | int | Mapping):  # bool too
        return value
    return without_nan(float(value))


def _step_of(line: bytes) -> float:
    """The step of a line; infinity for a line that a resumed run writes again: a test line, or half a line."""
    try:
        record = json.loads(line)
        return record["step"] if line.endswith(b"\n") and record["split"] != "test" else math.inf
    except (ValueError, KeyError, TypeError):
        return math.inf


class TensorBoard:
    """Writes scalars named `<split>/<field>` at each step, to a TensorBoard event file of its own.

    It writes before it returns, with tensorboardX's protocol buffers. tensorboardX's SummaryWriter writes in a thread:
    once that thread has died of a full disk, its queue fills up and the run hangs.

    Args:
      folder: TensorBoard's log folder.
      resume_step: the restored step: TensorBoard then drops later steps of earlier files.
    """

    def __init__(self, folder: Path, resume_step: int | None = None):
        _import_tensorboardx()
        from tensorboardX.proto import event_pb2, summary_pb2

        self._event = event_pb2.Event
        self._summary = summary_pb2.Summary
        self._histogram_type = summary_pb2.HistogramProto
        # Not tensorboardX's name, which a run that is resumed within the same second would share and overwrite.
        seconds, nanoseconds = divmod(time.time_ns(), 10**9)
        self.path = Path(folder) / f"events.out.tfevents.{seconds}.{nanoseconds:09}"
        with _or_input_error(self.path):
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._file = self.path.open("xb")
        self._append(file_version="brain.Event:2")
        if resume_step is not None:
            start = event_pb2.SessionLog(status=event_pb2.SessionLog.START)
            self._append(step=resume_step + 1, session_log=start)

    def write(self, record: Record) -> None:
        """Appends one event with all numbers of the record but the step."""
        values = [
            self._summary.Value(tag=f"{record['split']}/{name}", simple_value=value)
            for name, value in _numbers(record).items()
            if name != "step"
        ]
        values += [self._histogram(*histogram) for histogram in _histograms(record)]
        self._append(step=record["step"], summary=self._summary(value=values))

    def text(self, tag: str, text: str, step: int = 0) -> None:
        """Writes a text in Markdown."""
        from tensorboardX import summary

        self._append(step=step, summary=summary.text(tag, text))

    def images(self, tag: str, images: Any, step: int = 0) -> None:
        """Writes images, `tag/0` and so on: uint8 (n, height, width, channels) with 1, 3 or 4 channels."""
        from tensorboardX import summary

        for number, image in enumerate(images):
            self._append(step=step, summary=summary.image(f"{tag}/{number}", image, dataformats="HWC"))

    def values(self, tag: str, values: Any, step: int = 0) -> None:
        """Writes a histogram of the finite values of an array, in 64 bins of one width."""
        import numpy as np
        from tensorboardX import summary

        values = np.asarray(values, np.float64).ravel()
        self._append(step=step, summary=summary.histogram(tag, values[np.isfinite(values)], bins=64))

    def hyperparameters(self, values: Mapping[str, Any], metrics: Sequence[str]) -> None:
        """Writes a row of the hyper-parameter page.

        Args:
          values: numbers, bools and texts by name.
          metrics: the tags to show beside them, such as "validation/accuracy".
        """
        from tensorboardX import summary

        experiment, start, _ = summary.hparams(dict(values), dict.fromkeys(metrics, 0.0))
        for what in (experiment, start):
            self._append(summary=what)

    def close(self) -> None:
        """Closes the file."""
        with _or_input_error(self.path):
            self._file.close()

    def _histogram(self, tag: str, exponents: list[int], counts: list[int]) -> Any:
        """A histogram over the base 2 logarithm of the magnitude."""
        middles = [e + 0.5 for e in exponents]
        histogram = self._histogram_type(
            min=exponents[0],
            max=exponents[-1] + 1,
            num=sum(counts),
            sum=sum(n * m for n, m in zip(counts, middles, strict=True)),
            sum_squares=sum(n * m * m for n, m in zip(counts, middles, strict=True)),
            bucket_limit=[e + 1 for e in exponents],
            bucket=counts,
        )
        return self._summary.Value(tag=f"{tag} log2", histo=histogram)

    def _append(self, **fields: Any) -> None:
        """Appends one record of a TFRecord file: length, its checksum, data, its checksum."""
        # tensorboardX's RecordWriter frames alike, but its flush waits for the disk (fsync) at each line, and it
        # overwrites a file of that name.
        from tensorboardX.record_writer import masked_crc32c

        data = self._event(wall_time=time.time(), **fields).SerializeToString()
        length = struct.pack("<Q", len(data))
        checksums = [struct.pack("<I", masked_crc32c(part)) for part in (length, data)]
        with _or_input_error(self.path):
            self._file.write(length + checksums[0] + data + checksums[1])
            self._file.flush()


def _import_tensorboardx() -> None:
    """Imports tensorboardX without torch, which takes it a second where that is installed: for a type annotation."""
    if not {"tensorboardX", "torch"} & sys.modules.keys():
        sys.modules["torch"] = None  # type: ignore[assignment]
        try:
            import tensorboardX  # noqa: F401
        finally:
            del sys.modules["torch"]


class WeightsAndBiases:
    """Writes scalars named `<split>/<field>` over `step` to Weights & Biases, online or offline by `WANDB_MODE`.

    A run folder that is resumed continues the same W&B run. Each record carries the number of its session: after a
    kill, steps are written twice, and those of the last session count.

    Args:
      folder: the run folder; W&B's own files go to `wandb` in it.
      name: the run's name on the page.
      config: the experiment as JSON, shown beside it.
      session: how often the run was gone on with before.
      past: the records so far; those that W&B was not sent, since it was switched off, are written first.
    """

    def __init__(
        self,
        folder: Path,
        name: str,
        config: Mapping[str, Any],
        *,
        session: int = 0,
        past: Sequence[Record] = (),
    ):
        try:
            import wandb

            wandb.init  # noqa: B018  without the package, a folder called wandb can be imported all the same
        except (ImportError, AttributeError):
            raise InputError(f"Weights & Biases is not installed: {install('wandb')}") from None
        identity = Path(folder) / "wandb" / "run_id"
        with _or_input_error(identity):
            identity.parent.mkdir(parents=True, exist_ok=True)
            if not identity.exists() or not identity.read_text():
                identity.write_text(secrets.token_hex(4))
        try:
            self._run = wandb.init(
                project="jaxmp",
                name=name,
                id=identity.read_text(),
                resume="allow",
                dir=str(folder),
                config=dict(config),
                settings=wandb.Settings(silent=True, console="off"),
            )
        except wandb.errors.Error as error:
            raise InputError(
                f"Weights & Biases: {error}. Log in with `wandb login`, or keep the run local with WANDB_MODE=offline"
            ) from error
        # Their own step may only grow; ours goes back when a run is resumed, and has a record for each split.
        self._run.define_metric("*", step_metric="step")
        self._session = session
        self._sent = identity.with_name("last_step")
        text = self._sent.read_text() if self._sent.exists() else ""
        last = int(text) if text.isdecimal() else -1  # a kill may have left nothing in it
        for record in (record for record in past if record["step"] > last):
            self.write({name: math.nan if value is None else value for name, value in record.items()})

    def write(self, record: Record) -> None:
        """Logs all numbers of the record."""
        import numpy as np
        from wandb import Histogram

        split = record["split"]
        fields: dict[str, Any] = {"session": self._session} | {
            name if name == "step" else f"{split}/{name}": v for name, v in _numbers(record).items()
        }
        for tag, exponents, counts in _histograms(record):
            fields[f"{tag} log2"] = Histogram(
                np_histogram=(np.array(counts), np.array([*exponents, exponents[-1] + 1]))
            )
        self._run.log(fields)
        with _or_input_error(self._sent):
            self._sent.write_text(str(record["step"]))

    def images(self, tag: str, images: Any, step: int = 0) -> None:
        """Logs images: uint8 (n, height, width, channels) with 1, 3 or 4 channels."""
        from wandb import Image

        self._run.log({"session": self._session, "step": step, tag: [Image(image) for image in images]})

    def close(self) -> None:
        """Ends the run and, where online, waits for the upload."""
        self._run.finish()


def as_images(batch: Mapping[str, Any], inputs: Sequence[str], count: int) -> Any:
    """The first images of a batch for people to see, uint8 (n, height, width, channels).

    Floats are stretched so that the least value of all of them is black and the largest is white.

    Args:
      batch: arrays of shape (rows, ...).
      inputs: the columns to look for images in: the first of shape (rows, height, width, 1, 3 or 4).
      count: the most images.

    Raises: InputError if there is no such column.
    """
    import numpy as np

    for name in inputs:
        if len(batch[name].shape) == 4 and batch[name].shape[-1] in (1, 3, 4):
            images = np.asarray(batch[name][:count])
            if images.dtype == np.uint8:
                return images
            images = images.astype(np.float32)
            least, most = images.min(), images.max()
            return np.round((images - least) * (255 / max(most - least, 1e-30))).astype(np.uint8)
    shapes = ", ".join(f"{name} {list(batch[name].shape)}" for name in inputs)
    raise InputError(f"loop.log_images = {count}: no input is an image of 1, 3 or 4 channels; there are {shapes}")
