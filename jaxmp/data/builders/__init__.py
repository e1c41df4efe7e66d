"""Our own TFDS builders: datasets that jaxmp prepares itself, from its dependencies, without network or TensorFlow."""

from __future__ import annotations

import contextlib
import io
from pathlib import Path

from jaxmp.data.builders.versions import VERSIONS

__all__ = ["VERSIONS", "prepare"]


def prepare(name: str, folder: Path) -> None:
    """Write dataset `name` in its current version to `folder`/name/version, as array_record."""
    import tensorflow_datasets as tfds

    from jaxmp.data.builders.digits import Digits

    tfds.disable_progress_bar()
    with contextlib.redirect_stdout(io.StringIO()):  # "Downloading ...": nothing is
        {"digits": Digits}[name](data_dir=folder, file_format="array_record").download_and_prepare()
