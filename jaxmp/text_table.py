"""What is shown to people and to machines: aligned tables of text, JSON without NaN, and URLs without passwords."""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any


class Table(str):
    """The text of a table, with the cells that it shows, for whoever shows them otherwise."""

    rows: list[Sequence[str]]
    header: Sequence[str]


def table(
    rows: Iterable[Sequence[str]],
    *,
    header: Sequence[str] = (),
    right: Collection[int] = (),
    widths: Sequence[int] = (),
    indent: int = 0,
) -> Table:
    """Returns `rows` as lines of text, with two spaces between columns, and none at the end of a line.

    Args:
      rows: the cells of each row; all rows have the same number of cells.
      header: the cells of a first row.
      right: the columns, from 0, whose cells are aligned right; all others are aligned left.
      widths: the least width of each column, in characters; columns without one are as wide as their widest cell.
      indent: how many spaces begin each line.

    Raises:
      ValueError: the rows have different numbers of cells.

    >>> print(table([("mnist", "60,000"), ("digits", "1,797")], header=("dataset", "rows"), right=[1]))
    dataset    rows
    mnist    60,000
    digits    1,797
    """
    rows = list(rows)
    lines = [*([header] if header else []), *rows]
    least = dict(enumerate(widths))
    wide = [max(least.get(i, 0), *map(len, column)) for i, column in enumerate(zip(*lines, strict=True))]
    aligned = (
        "  ".join(cell.rjust(wide[i]) if i in right else cell.ljust(wide[i]) for i, cell in enumerate(line))
        for line in lines
    )
    text = Table("\n".join(" " * indent + line.rstrip() for line in aligned))
    text.rows, text.header = rows, header
    return text


def without_nan(value: Any) -> Any:
    """Returns `value` for `json.dumps`, with None for NaN and infinities, which JSON does not have.

    Args:
      value: dicts, lists and tuples of anything that JSON can hold. They are copied, tuples as lists.

    >>> without_nan({"loss": float("nan"), "scales": (1.0, float("inf"))})
    {'loss': None, 'scales': [1.0, None]}
    """
    if isinstance(value, Mapping):
        return {name: without_nan(each) for name, each in value.items()}
    if isinstance(value, list | tuple):
        return [without_nan(each) for each in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def without_password(text: str) -> str:
    """Returns `text`, a URL or an argument of a command, with every password of a URL left out.

    >>> without_password("postgresql+psycopg://me:secret@host/db")
    'postgresql+psycopg://me@host/db'
    >>> without_password("postgresql+psycopg://me@host/db?password=secret&sslmode=require")
    'postgresql+psycopg://me@host/db?password=...&sslmode=require'
    """
    # A password ends at an @ and may hold blanks. One that should have been escaped in it ends it too early: no host
    # holds an @, so that all is left out up to the last before the database.
    text = re.sub(r"(://[^/@:]*):[^@]*@(?:[^@/?]*@)*", r"\1@", text)
    return re.sub(r"([?&]\w*passw\w*=)[^&]*", r"\1...", text)
