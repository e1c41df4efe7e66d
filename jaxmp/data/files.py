"""`describe_files`: what a table file, or a folder of images or of .npy files, has; for `jaxmp data info`."""

from __future__ import annotations

import os
from collections import Counter
from pathlib import Path

import numpy as np

from jaxmp.data.dataset import Split
from jaxmp.data.image_folder import ImageFolder
from jaxmp.data.source import is_numeric
from jaxmp.data.table_files import read_columns
from jaxmp.errors import InputError

SPLITS: tuple[Split, ...] = ("train", "validation", "test")
TABLES = (".csv", ".jsonl", ".parquet", ".npz")


def is_path(name: str) -> bool:
    """Whether the name of a dataset is the path of files: it is there, or ends like a table, or begins like a path."""
    return name.startswith((".", "/", "~")) or Path(name).suffix in TABLES or os.path.exists(name)


def describe_files(path: str) -> dict[str, str]:
    """Lines about the data at a path, by what they say: how it is given to an Experiment, its rows and its columns.

    Raises: InputError if nothing is there, or it cannot be read.
    """
    folder = Path(path).expanduser()
    if not folder.exists():
        raise InputError(f"data {path!r}: there is no such file or folder, and no prepared dataset of that name")
    if folder.is_dir() and not list(folder.glob("*.npy")):
        return _describe_images(path)
    columns = read_columns(path, "data")
    rows = len(next(iter(columns.values())))
    features = ", ".join(f"{name} {_dtype(column)} {column.shape[1:]}" for name, column in columns.items())
    return {"dataset": f"TableFiles(train={path!r})", "rows": str(rows), "features": features}


def _describe_images(path: str) -> dict[str, str]:
    data = ImageFolder(folder=path)
    sources = {split: data.source(split) for split in SPLITS}
    classes, lines = data.classes(), []
    for split, source in sources.items():
        if source is not None:
            of_class = Counter(source.columns["label"].tolist())
            by_class = ", ".join(f"{name} {of_class[number]}" for number, name in enumerate(classes))
            lines.append(f"{split} {len(source)} ({by_class})")
    train = sources["train"]
    assert train is not None  # without one, `source` raises
    shape = train[np.arange(1)]["image"].shape[1:]
    return {
        "dataset": f"ImageFolder(folder={path!r})",
        "rows": ", ".join(lines),
        "features": f"image uint8 {shape}, of the first image; label int32 ()",
    }


def _dtype(column: np.ndarray) -> str:
    return column.dtype.name if is_numeric(column) else "text" if column.dtype.kind in "OSU" else column.dtype.name
