"""Our own TFDS builders: datasets that jaxmp prepares itself, from its dependencies, without network or TensorFlow."""

from __future__ import annotations

import contextlib
import io
from pathlib import Path
from typing import Any

from jaxmp.data.builders.versions import MANUAL, VERSIONS

__all__ = ["MANUAL", "VERSIONS", "has_files", "prepare"]


def prepare(name: str, folder: Path, manual: Path | None = None) -> None:
    """Writes dataset `name` in its current version to `folder`/name/version, as array_record.

    `manual` is the folder of the files that it is made from, for a dataset in `MANUAL`. Raises InputError if one of
    them is damaged.
    """
    import tensorflow_datasets as tfds

    tfds.disable_progress_bar()
    options: dict[str, Any] = {} if manual is None else {"manual": manual}
    with contextlib.redirect_stdout(io.StringIO()):  # "Downloading ...": nothing is
        _builder(name)(data_dir=folder, file_format="array_record", **options).download_and_prepare()


def has_files(name: str, manual: Path) -> bool:
    """Whether `manual` is a folder with a file that dataset `name`, one of `MANUAL`, is made from."""
    names, _ = MANUAL[name]
    return any((manual / f"{file}{ending}").exists() for file in names for ending in ("", ".gz"))


def _builder(name: str) -> Any:
    if name == "digits":
        from jaxmp.data.builders.digits import Digits as Builder
    elif name == "mnist":
        from jaxmp.data.builders.mnist import Mnist as Builder
    else:
        from jaxmp.data.builders.spoken_digits import SpokenDigits as Builder
    return Builder
