"""`jaxmp data list`, `jaxmp data prepare NAME`, `jaxmp data info NAME`: the datasets of this machine."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from jaxmp.commands.command import Command
from jaxmp.errors import DONE

if TYPE_CHECKING:
    from jaxmp.data.catalog import Prepared


@dataclass(frozen=True)
class ListOptions:
    """`jaxmp data list` has no options."""


def list_datasets(options: ListOptions) -> int:
    """Lists the datasets that are prepared on this machine, or by jaxmp when first used."""
    from jaxmp.data import catalog

    for dataset in catalog.list_datasets():
        print(f"{dataset.name:<20} {dataset.version:<8} {_rows(dataset)}")
    for name, why in catalog.damaged_datasets().items():
        print(f"{name:<20} damaged: {why}")
    for name, what in catalog.unprepared().items():
        print(f"{name:<20} not prepared: `jaxmp data prepare {name} --manual FOLDER` makes it from {what}")
    print("\nfiles of your own, which need no preparing: jaxmp data info FOLDER_OF_IMAGES, or TABLE.csv")
    print(f"looked in {catalog.data_folder()} ($JAXMP_DATA, $TFDS_DATA_DIR) and {catalog.own_folder()}")
    return DONE


@dataclass(frozen=True)
class DatasetOptions:
    """The options of `jaxmp data info`."""

    name: str
    """Name of the dataset, and of its TFDS config if it has several: mnist, glue/sst2. Or a path: a folder of images,
    with a folder in it for each split and class; a table (.csv, .jsonl, .parquet, .npz); a folder of .npy files. A path
    that is called like a dataset is ./NAME."""


@dataclass(frozen=True)
class PrepareOptions(DatasetOptions):
    """The options of `jaxmp data prepare`."""

    manual: str | None = None
    """Folder of the files that mnist or spoken_digits is made from; by default downloads/manual in the data folder."""


def prepare(options: PrepareOptions) -> int:
    """Prepares a dataset, unless it is prepared already.

    jaxmp itself prepares digits, and mnist and spoken_digits from the files in --manual; the others, TFDS's builders.

    Files of your own need no preparing: if NAME is a path, and --manual is not given, shows what is in them.
    """
    from jaxmp.data.catalog import prepare_dataset

    if options.manual is None and _is_path(options.name):
        return info(options)
    dataset = prepare_dataset(options.name, options.manual)
    print(f"{dataset.name} {dataset.version} in {dataset.folder}: {_rows(dataset)}")
    return DONE


def info(options: DatasetOptions) -> int:
    """Shows rows, features, licence and source of a prepared dataset; of files, rows and columns."""
    from jaxmp.data.catalog import describe

    if _is_path(options.name):
        from jaxmp.data.files import describe_files

        _print_lines(describe_files(options.name))
        return DONE
    from jaxmp.data.text import describe_texts

    description = describe(options.name)
    dataset = description.dataset
    lines = {
        "dataset": f"{dataset.name} {dataset.version}",
        "folder": f"{dataset.folder} ({dataset.nbytes / 2**20:.1f} MiB)",
        "rows": _rows(dataset),
        "features": ", ".join(f"{key} {feature}" for key, feature in description.features.items()),
        "texts": describe_texts(description),
        "about": description.text,
        "homepage": description.homepage,
        "licence": description.licence,
        "citation": description.citation,
    }
    _print_lines(lines)
    return DONE


def _print_lines(lines: dict[str, str]) -> None:
    for key, value in lines.items():
        if value:
            print(f"{key:<9} {value}")


def _is_path(name: str) -> bool:
    from jaxmp.data.builders import VERSIONS
    from jaxmp.data.catalog import list_datasets
    from jaxmp.data.files import is_path

    return is_path(name) and name not in {*VERSIONS, *(dataset.name for dataset in list_datasets())}


def _rows(dataset: Prepared) -> str:
    return ", ".join(f"{split} {rows}" for split, rows in dataset.splits.items()) or "prepared when first used"


LIST = Command("data list", ListOptions, list_datasets)
PREPARE = Command("data prepare", PrepareOptions, prepare)
INFO = Command("data info", DatasetOptions, info)
