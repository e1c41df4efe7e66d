"""`TFDS`, any dataset that TFDS has prepared: read without TensorFlow, decoded once, then memory-mapped."""

from __future__ import annotations

import contextlib
import hashlib
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from jaxmp.data import catalog
from jaxmp.data.cache import UNREADABLE, CachedColumns, cache_folder, prepare_once, save_columns
from jaxmp.data.catalog import Prepared
from jaxmp.data.dataset import Split
from jaxmp.data.images import Images
from jaxmp.data.records import decode_records, differing_shapes, flatten
from jaxmp.data.source import Columns
from jaxmp.errors import InputError, nearest

CHUNK_ROWS = 4096
CHUNK_BYTES = 2**27  # of decoded images in memory at a time


@dataclass(frozen=True)
class TFDS(Images):
    """A dataset that TFDS has prepared. `jaxmp data list` shows those on this machine."""

    name: str = "digits"
    """Name of a prepared dataset, with its config if it has one: "mnist", "glue/sst2". See `jaxmp data list`."""
    train: str = "train"
    """Rows to train on, in TFDS's split syntax: "train[:55000]", "train[80%:]", "train+test"."""
    validation: str = "validation"
    """Rows to validate on, in the same syntax."""
    test: str = "test"
    """Rows to test on, in the same syntax."""
    version: str | None = None
    """Version of the dataset, such as "3.0.1"; by default the newest that is prepared."""

    def source(self, split: Split) -> Columns:
        """The rows of one split: numbers and images as arrays, text as object arrays of bytes.

        Decodes them on first use into `cache_folder()`/decoded, or into memory each time if that cannot be written.
        Raises InputError if the dataset or the split is missing, a file is damaged, or images differ in shape.
        """
        dataset = catalog.find_dataset(self.name, self.version)
        spec = {"train": self.train, "validation": self.validation, "test": self.test}[split]
        folder = _cache(dataset, spec)
        with contextlib.suppress(*UNREADABLE):
            return CachedColumns(folder)
        features, files = _open(dataset, spec)  # which finds a bad split before anything is written

        def build(draft: Path) -> None:
            save_columns(draft, sum(file.take for file in files), _chunks(dataset, features, files))

        try:
            return prepare_once(folder, build, CachedColumns)
        except OSError:  # of the cache: what is wrong with the dataset itself is an InputError
            chunks = list(_chunks(dataset, features, files))
            return Columns({name: np.concatenate([chunk[name] for chunk in chunks]) for name in chunks[0]})


def _cache(dataset: Prepared, spec: str) -> Path:
    key = hashlib.sha256(f"{dataset.fingerprint} {spec}".encode()).hexdigest()[:12]
    readable = re.sub(r"\W+", "-", spec).strip("-")[:40]
    return cache_folder() / "decoded" / dataset.name / dataset.version / f"{readable}-{key}"


def _open(dataset: Prepared, spec: str) -> tuple[Any, list[Any]]:
    """TFDS's features, and its instructions: which rows of which files make up the split `spec`."""
    info = catalog.read_tfds_info(dataset)
    if info.file_format.value != catalog.FORMAT:
        raise InputError(
            f"{dataset.name} in {dataset.folder} is stored as {info.file_format.value}; jaxmp reads {catalog.FORMAT}: "
            f"`tfds convert_format --dataset_version_dir={dataset.folder} --out_file_format={catalog.FORMAT} "
            f"--out_dir={catalog.own_folder() / dataset.name / dataset.version}`"
        )
    try:
        files = info.splits[spec].file_instructions
    except (ValueError, KeyError, AssertionError) as error:
        raise InputError(_unknown_split(dataset, spec, error)) from error
    if not sum(file.take for file in files):
        raise InputError(f"split {spec!r} of {dataset.name} {dataset.version} has no rows; {_splits(dataset)}")
    return info.features, files


def _unknown_split(dataset: Prepared, spec: str, error: Exception) -> str:
    name = re.split(r"\W", spec)[0]
    hint = f" ({str(error).splitlines()[-1]})" if name in dataset.splits else nearest(name, dataset.splits)
    if name == "validation" and name not in dataset.splits and "train" in dataset.splits:
        cut = dataset.splits["train"] * 9 // 10
        hint = f"; take one from train: --data.train 'train[:{cut}]' --data.validation 'train[{cut}:]'"
    return (
        f"{dataset.name} {dataset.version} has no split {spec!r}; {_splits(dataset)}, "
        f"and slices and sums of them such as 'train[:80%]'{hint}"
    )


def _splits(dataset: Prepared) -> str:
    return "its splits are " + ", ".join(f"{name} ({rows} rows)" for name, rows in dataset.splits.items())


def _chunks(dataset: Prepared, features: Any, files: list[Any]) -> Iterator[dict[str, np.ndarray]]:
    """Yields the columns of a split's files, some rows at a time. Raises InputError if a file cannot be read."""
    from array_record.python.array_record_data_source import ArrayRecordDataSource

    shapes = [tensor.shape for tensor in flatten(features.get_tensor_info()).values()]
    row_bytes = max(np.prod([side or 1 for side in shape]) for shape in shapes)
    size = int(np.clip(CHUNK_BYTES // row_bytes, 1, CHUNK_ROWS))
    first: dict[str, np.ndarray] = {}
    for file in files:
        try:
            with ArrayRecordDataSource([file]) as records:
                for start in range(0, file.take, size):
                    chunk = records.__getitems__(list(range(start, min(start + size, file.take))))
                    columns = decode_records(features, chunk)
                    first = first or columns
                    for name, column in columns.items():
                        if column.shape[1:] != first[name].shape[1:]:
                            raise differing_shapes(name)
                    yield columns
        except InputError as error:
            raise InputError(f"{dataset.name} {dataset.version}: {error}") from error
        except Exception as error:  # array_record, protobuf and Pillow each have their own for a damaged file
            raise InputError(
                f"data file {file.filename} is damaged or missing ({error}); copy it again, or delete "
                f"{dataset.folder} and run `jaxmp data prepare {dataset.name}`"
            ) from error
