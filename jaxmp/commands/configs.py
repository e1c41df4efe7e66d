"""`jaxmp configs`: the configs that have a name."""

from __future__ import annotations

import json
import re
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jaxmp.commands.command import Command
from jaxmp.errors import DONE, InputError
from jaxmp.experiment import config_file
from jaxmp.text_table import table


@dataclass(frozen=True)
class Options:
    """The options of `jaxmp configs`."""

    markdown: bool = False
    """print a Markdown page with the whole record of each config, as in configs/README.md"""


def configs(options: Options) -> int:
    """Lists the configs that have a name: those in ./configs, and those that come with jaxmp."""
    found = sorted(config_file.available())
    if not found:
        raise InputError(f"no configs in {' or '.join(map(str, config_file.folders()))}")
    records = {name: _record(name) for name in found}
    if options.markdown:
        print(page(records, _results()))
    else:
        print(table([(name, _title(text)) for name, text in records.items()]))
    return DONE


_INTRODUCTION = """# Configs

Each config is one file of this folder, and its docstring is the record of the experiment: source, command, hardware,
time and result. This page is made of them, by

    uv run jaxmp configs --markdown > configs/README.md

`uv run jaxmp train NAME --help` lists every field of a config; `--dry-run` shows shapes, policies and memory.
"""


_MEASURED = """
## Measured

The monitored metric on the test split, of the last weights: mean and standard deviation over seeds, the same seeds in
each precision. From [results.json](results.json), which has each run and its revision, by

    uv run python experiments/precisions/results.py CONFIG ...

"""


def page(records: dict[str, str], results: Sequence[dict[str, Any]] = ()) -> str:
    """Returns a Markdown page of configs: a table of all, what was measured, and a section of each record.

    Args:
      records: the docstring of each config, by its name.
      results: rows of experiments/precisions/results.py.

    A docstring is a title, paragraphs, and a list of entries such as `Command:   jaxmp train digits_mlp`, whose text
    goes on in indented lines. Lines of a command that begin with a note, `at epsilon 8: jaxmp train ...`, are
    alternatives to it.
    """
    rows = [f"| [{name}](#{name}) | {_title(text).rstrip('.')} |" for name, text in records.items()]
    sections = [f"## {name}\n\n{_markdown(text)}" for name, text in records.items()]
    measured = [_MEASURED + _measured(results)] if results else []
    table_of_all = ["| config | what it trains |", "|---|---|", *rows]
    return "\n".join([_INTRODUCTION, *table_of_all, *measured, "", "\n\n".join(sections)])


def _results() -> list[dict[str, Any]]:
    """What configs reached: the results.json beside them, if there is one."""
    for folder in config_file.folders():
        if (folder / "results.json").is_file():
            return _read_results(folder / "results.json")
    return []


ROW = {"config": str, "options": str, "metric": str, "seeds": list, "test": dict}
"""the keys of a row of results.json, and what each holds"""


def _read_results(path: Path) -> list[dict[str, Any]]:
    """The rows of a results.json. Raises InputError if the file is something else."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: cannot be read as JSON ({error}); expected {_ROWS}") from error
    for number, row in enumerate(found if isinstance(found, list) else [found], start=1):
        if not isinstance(found, list) or not isinstance(row, dict) or not _is_row(row):
            raise InputError(f"{path}: row {number} is {json.dumps(row):.80}; expected {_ROWS}")
    return found


_ROWS = f"a list of objects with the keys {', '.join(ROW)}, as experiments/precisions/results.py writes it"


def _is_row(row: dict[str, Any]) -> bool:
    return all(isinstance(row.get(name), kind) for name, kind in ROW.items()) and all(
        isinstance(values, list) and all(value is None or isinstance(value, int | float) for value in values)
        for values in row["test"].values()
    )


def _measured(results: Sequence[dict[str, Any]]) -> str:
    """A table of the rows of results.json."""
    precisions = list(dict.fromkeys(precision for row in results for precision in row["test"]))
    names = " | ".join(f"`{precision}`" for precision in precisions)
    lines = [f"| config | metric | seeds | {names} |", "|---|---|---|" + "---|" * len(precisions)]
    for row in results:
        config = f"`{row['config']}`" + (f" `{row['options']}`" if row["options"] else "")
        values = " | ".join(_mean_and_spread(row["test"].get(precision, [])) for precision in precisions)
        lines.append(f"| {config} | {row['metric']} | {len(row['seeds'])} | {values} |")
    return "\n".join(lines)


def _mean_and_spread(values: Sequence[float | None]) -> str:
    """Mean and sample standard deviation; runs that have no finite value are counted, not dropped."""
    found = [value for value in values if value is not None]
    if len(found) < len(values):
        return f"{len(values) - len(found)} of {len(values)} diverged"
    spread = f" ± {statistics.stdev(found):.4f}" if len(found) > 1 else ""
    return f"{statistics.mean(found):.4f}{spread}" if found else ""


def _record(name: str) -> str:
    """The docstring of a config; why there is none, if the file cannot be read."""
    try:
        return config_file.ConfigFile.find(name).docstring
    except InputError as error:
        return f"(cannot be read: {error})"


def _title(record: str) -> str:
    return record.partition("\n")[0]


def _markdown(record: str) -> str:
    """The docstring with its entries as a list; the command in code."""
    paragraphs = []
    for paragraph in record.split("\n\n"):
        entries = re.split(r"^(Command|Folder|Hardware|Expected):\s+", paragraph, flags=re.MULTILINE)
        if len(entries) == 1:
            paragraphs.append(paragraph)
            continue
        items = zip(entries[1::2], entries[2::2], strict=True)
        lines = [f"- {key}: {_commands(text) if key == 'Command' else ' '.join(text.split())}" for key, text in items]
        paragraphs.append("\n".join([*filter(None, [entries[0].strip()]), *lines]))
    return "\n\n".join(paragraphs)


def _commands(text: str) -> str:
    """A command in code, and its alternatives, each in code of its own after its note."""
    first, *others = re.split(r"^\s*([^:`\n]+): (?=jaxmp )", text, flags=re.MULTILINE)
    found = [f"`{' '.join(first.split())}`"]
    for note, command in zip(others[::2], others[1::2], strict=True):
        found.append(f"{note}: `{' '.join(command.split())}`")
    return "; ".join(found)


COMMAND = Command("configs", Options, configs)
