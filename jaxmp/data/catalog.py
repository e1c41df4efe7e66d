"""Which datasets are prepared, where, and how to prepare others: what `jaxmp data list|prepare|info` shows.

Datasets are looked for in two folders: the data folder ($JAXMP_DATA, else $TFDS_DATA_DIR, else ~/tensorflow_datasets),
which is only read, and `cache_folder()`/tfds, which `prepare_dataset` writes. jaxmp prepares some datasets itself: what
its dependencies hold when it is first used, and others from files of one's own, in a manual folder.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import os
import re
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from jaxmp.data import builders
from jaxmp.data.cache import cache_folder, prepare_once
from jaxmp.data.records import flatten
from jaxmp.errors import InputError, install, local_path, nearest

FORMAT = "array_record"  # the one of TFDS's formats that is read at random and without TensorFlow


@dataclass(frozen=True)
class Prepared:
    """One version of a dataset on this machine, as TFDS wrote it."""

    name: str
    """The name that `TFDS(name)` takes, with the config if it has one: "glue/sst2"."""
    version: str
    folder: Path
    splits: dict[str, int]
    """Rows of each split; empty for a dataset of jaxmp's own that is prepared on first use."""
    nbytes: int
    """Size of all splits as stored, in bytes."""

    @property
    def fingerprint(self) -> str:
        """A hash of name, version, and the names, sizes and times of the files; it changes when the dataset does."""
        files = sorted(self.folder.iterdir())
        stats = [(file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in files]
        return hashlib.sha256(repr((self.name, self.version, stats)).encode()).hexdigest()


@dataclass(frozen=True)
class Description:
    """What TFDS records about a prepared dataset."""

    dataset: Prepared
    features: dict[str, str]
    """Dtype and shape of each feature."""
    text: str
    homepage: str
    licence: str
    """Empty if TFDS does not record it."""
    citation: str


def data_folder() -> Path:
    """The folder $JAXMP_DATA, else $TFDS_DATA_DIR, else TFDS's default. It need not exist."""
    folder = os.environ.get("JAXMP_DATA") or os.environ.get("TFDS_DATA_DIR") or "~/tensorflow_datasets"
    return local_path("data folder, from $JAXMP_DATA or $TFDS_DATA_DIR,", folder)


def own_folder() -> Path:
    """The folder that jaxmp prepares datasets in."""
    return cache_folder() / "tfds"


def list_datasets() -> list[Prepared]:
    """All versions of the prepared datasets, and those that jaxmp prepares when first used; by name, newest first.

    Those whose description cannot be read are left out; see `damaged_datasets`.
    """
    found = {(entry.name, entry.version): entry for entry in _found() if isinstance(entry, Prepared)}
    for name, version in _offline().items():
        found.setdefault((name, version), Prepared(name, version, own_folder() / name / version, {}, 0))
    newest_first = sorted(found.values(), key=lambda entry: _order(entry.version), reverse=True)
    return sorted(newest_first, key=lambda entry: entry.name)


def damaged_datasets() -> dict[str, str]:
    """Name of each dataset whose description cannot be read, and why not."""
    return dict(entry for entry in _found() if not isinstance(entry, Prepared))


def find_dataset(name: str, version: str | None = None) -> Prepared:
    """The newest prepared version of `name`, or `version`. A dataset of jaxmp's own is prepared first if need be.

    Raises InputError if it is not prepared, with the folders searched and the command that prepares it.
    """
    if name in _offline() and version in (None, builders.VERSIONS[name]):
        return _prepare_own(name)
    entries = list_datasets()
    versions = [entry for entry in entries if entry.name == name]
    matching = [entry for entry in versions if version in (None, entry.version)]
    if matching:
        return matching[0]
    for broken, why in damaged_datasets().items():
        if broken == name:
            raise InputError(why)
    looked = f"looked in {data_folder()}, which $JAXMP_DATA sets, and {own_folder()}"
    if versions:
        there = ", ".join(entry.version for entry in versions)
        raise InputError(f"dataset {name!r} is not prepared in version {version!r}, only in {there} ({looked})")
    configs = sorted({entry.name for entry in entries if entry.name.startswith(name + "/")})
    if configs:
        raise InputError(f"dataset {name!r} needs a config; prepared: {', '.join(configs)} ({looked})")
    names = {entry.name for entry in entries}
    hint = _from_files(name) if name in builders.MANUAL else f"to prepare it: `jaxmp data prepare {name}`"
    mean = "" if name in builders.MANUAL else nearest(name, {*names, *builders.MANUAL})
    raise InputError(f"dataset {name!r} is not prepared ({looked}); {hint}; prepared: {', '.join(sorted(names))}{mean}")


def unprepared() -> dict[str, str]:
    """What the files are that jaxmp makes a dataset from, by the name of each such dataset that is not prepared."""
    prepared = {entry.name for entry in list_datasets()}
    return {name: what for name, (_, what) in builders.MANUAL.items() if name not in prepared}


def prepare_dataset(name: str, manual: str | os.PathLike[str] | None = None) -> Prepared:
    """Prepares `name` in `own_folder()` if it is not prepared yet: by jaxmp, or by TFDS's builder.

    Args:
      name: of the dataset.
      manual: folder of the files that it is made from, if jaxmp makes it from files; by default `manual_folder()`.

    Raises:
      InputError: the manual folder has none of the files, or one is damaged; TFDS does not know the name; TensorFlow,
        which its builders import, is not installed; or the builder fails, for example because the source cannot be
        downloaded.
    """
    if name in _offline():
        return _prepare_own(name)
    for entry in list_datasets():
        if entry.name == name:
            return entry
    if name in builders.MANUAL:
        folder = manual_folder() if manual is None else local_path("manual folder", manual)
        if builders.has_files(name, folder):
            return _prepare_own(name, folder)
        if manual is not None or name == "spoken_digits":
            raise InputError(_no_files(name, folder))
    elif manual is not None:
        raise InputError(
            f"manual folder {os.fspath(manual)!r}: jaxmp makes {' and '.join(builders.MANUAL)} from files of yours, "
            f"not {name!r}{nearest(name, builders.MANUAL)}"
        )
    import tensorflow_datasets as tfds

    known = tfds.list_builders(with_community_datasets=False)
    if name.split("/")[0] not in known:
        raise InputError(f"TFDS has no dataset {name!r}{nearest(name, [*known, *builders.VERSIONS])}")
    if importlib.util.find_spec("tensorflow") is None:
        raise InputError(
            f"preparing {name!r} runs TFDS's own builder, which imports TensorFlow, and that is not installed: "
            f"{install('prepare')} (reading what is prepared needs none)"
            + (f"; or, without TensorFlow, {_from_files(name)}" if name in builders.MANUAL else "")
        )
    try:
        tfds.builder(name, data_dir=own_folder(), file_format=FORMAT).download_and_prepare()
    except Exception as error:  # a builder downloads and runs dataset authors' code: anything can go wrong in it
        raise InputError(f"preparing {name!r} in {own_folder()} failed: {type(error).__name__}: {error}") from error
    return find_dataset(name)


def describe(name: str, version: str | None = None) -> Description:
    """What TFDS records about dataset `name`. Raises InputError if it is not prepared."""
    dataset = find_dataset(name, version)
    info = _read_info(dataset.folder)
    tensors = flatten(read_tfds_info(dataset).features.get_tensor_info())
    return Description(
        dataset=dataset,
        features={name: f"{np.dtype(tensor.np_dtype)} {tensor.shape}" for name, tensor in tensors.items()},
        text=" ".join(f"{info.get('description', '')} {info.get('configDescription', '')}".split()),
        homepage=", ".join(info.get("location", {}).get("urls", [])),
        licence=info.get("redistributionInfo", {}).get("license", ""),
        citation=info.get("citation", ""),
    )


def read_tfds_info(dataset: Prepared) -> Any:
    """TFDS's `DatasetInfo` of a prepared dataset. Raises InputError if a file that describes it is damaged."""
    import tensorflow_datasets as tfds

    try:
        return tfds.builder_from_directory(dataset.folder).info
    except Exception as error:  # TFDS, json and protobuf each have their own
        raise InputError(
            f"{dataset.folder}: the description of a dataset, in features.json or dataset_info.json, cannot be read: "
            f"{error!r:.200}; copy it again, or remove the folder and run `jaxmp data prepare {dataset.name}`"
        ) from error


def manual_folder() -> Path:
    """TFDS's folder for files of one's own: `data_folder()`/downloads/manual. It need not exist."""
    return data_folder() / "downloads" / "manual"


def _offline() -> dict[str, str]:
    """The versions of the datasets that jaxmp prepares from its dependencies alone, by name."""
    return {name: version for name, version in builders.VERSIONS.items() if name not in builders.MANUAL}


def _from_files(name: str) -> str:
    return f"`jaxmp data prepare {name} --manual FOLDER` makes it from {builders.MANUAL[name][1]}"


def _no_files(name: str, folder: Path) -> str:
    names, _ = builders.MANUAL[name]
    return f"{folder} has none of {', '.join(names)}; {_from_files(name)}, in FOLDER"


def _prepare_own(name: str, manual: Path | None = None) -> Prepared:
    version = builders.VERSIONS[name]
    folder = own_folder() / name / version

    def build(draft: Path) -> None:
        builders.prepare(name, draft, manual)
        for file in (draft / name / version).iterdir():
            file.rename(draft / file.name)
        shutil.rmtree(draft / name)
        shutil.rmtree(draft / "downloads", ignore_errors=True)  # which TFDS makes even where nothing is downloaded

    try:
        return prepare_once(folder, build, lambda folder: _entry(folder, name))
    except OSError as error:
        raise InputError(
            f"cannot prepare {name!r} in {folder}: {error}; $XDG_CACHE_HOME names another place"
        ) from error


def _found() -> Iterator[Prepared | tuple[str, str]]:
    """Every dataset in both folders; of a damaged one, its name and what is wrong."""
    for folder in (data_folder(), own_folder()):
        yield from _scan(folder)


def _scan(folder: Path) -> Iterator[Prepared | tuple[str, str]]:
    """Every dataset below `folder`: name/version and name/config/version, each with its dataset_info.json."""
    for pattern in ("*/*/dataset_info.json", "*/*/*/dataset_info.json"):
        for path in folder.glob(pattern):
            if re.fullmatch(r"\d+\.\d+\.\d+", path.parent.name):  # and not a draft of TFDS's or ours
                name = path.parent.parent.relative_to(folder).as_posix()
                try:
                    yield _entry(path.parent, name)
                except InputError as error:
                    yield name, str(error)


def _entry(folder: Path, name: str) -> Prepared:
    info = _read_info(folder)
    try:
        splits = info.get("splits", [])
        rows = {split["name"]: sum(map(int, split.get("shardLengths", []))) for split in splits}
        return Prepared(name, folder.name, folder, rows, sum(int(split.get("numBytes", 0)) for split in splits))
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise _unreadable(folder, error) from error


def _unreadable(folder: Path, error: Exception) -> InputError:
    path = folder / "dataset_info.json"
    return InputError(f"{path}, the description of a dataset, cannot be read: {error!r:.200}; remove {folder}")


def _read_info(folder: Path) -> dict:
    path = folder / "dataset_info.json"
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise _unreadable(folder, error) from error


def _order(version: str) -> list[int]:
    return [int(part) for part in version.split(".")]
