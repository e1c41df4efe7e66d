"""`Laws`: properties with the smallest counterexample of each; a table when printed, tests when collected by pytest."""

from __future__ import annotations

import dataclasses
import textwrap
import unittest
from collections.abc import Callable, Iterable, Iterator
from typing import Any, Literal, NamedTuple, TypeVar

import hypothesis
from hypothesis import strategies as st

from jaxmp.errors import InputError, nearest

Example = TypeVar("Example")

hypothesis.settings.register_profile(
    "jaxmp-quick", max_examples=20, deadline=None, derandomize=True, database=None, print_blob=False
)
hypothesis.settings.register_profile("jaxmp-thorough", hypothesis.settings.get_profile("jaxmp-quick"), max_examples=500)


class Broken(AssertionError):
    """A law does not hold; the message is its smallest counterexample."""


class Skipped(unittest.SkipTest):
    """A law presumes something that is not so here; the message is the reason. pytest skips the test."""


@dataclasses.dataclass(frozen=True)
class Law:
    """One property."""

    name: str
    """its name, that of its test"""
    statement: str
    """the property as a sentence"""
    check: Callable[[], None]
    """raises `Broken` with a counterexample, or `Skipped`"""


class Row(NamedTuple):
    """What became of one law."""

    law: str
    """name of the law"""
    statement: str
    """the law as a sentence"""
    verdict: Literal["holds", "broken", "skipped"]
    """whether it holds"""
    words: str
    """the smallest counterexample, or the reason why it was skipped; "" where it holds"""


class Laws:
    """Laws about one thing. Nothing runs before they are asked: by pytest, `print`, iteration or `report[name]`.

    Iteration gives a `Row` for each. As a module attribute whose name begins with `test`, it becomes a test a law.
    """

    def __init__(self, title: str, laws: Iterable[Law]):
        self.title = title
        self.laws = {law.name: law for law in laws}
        self._rows: dict[str, Row] = {}

        def check(law: str) -> None:
            __tracebackhide__ = True
            row = self[law]
            if row.verdict == "skipped":
                raise Skipped(row.words)
            if row.verdict == "broken":
                raise Broken(f"{row.statement}\nDoes not hold for {self.title}:\n{row.words}")

        self.__wrapped__ = check  # what pytest takes for the test function

    def __call__(self, law: str) -> None:
        """Checks one law, by its name. Raises `Broken`, or `unittest.SkipTest` with the reason."""
        __tracebackhide__ = True
        self.__wrapped__(law)

    @property
    def pytestmark(self) -> list[Any]:
        """Makes pytest call this once for each law."""
        import pytest

        return [pytest.mark.parametrize("law", list(self.laws))]

    def __getitem__(self, name: str) -> Row:
        """What became of one law. Raises InputError for one that there is not."""
        if name not in self.laws:
            raise InputError(
                f"{self.title} has no law {name!r}; it has {', '.join(self.laws)}{nearest(name, self.laws)}"
            )
        if name not in self._rows:
            self._rows[name] = _verdict(self.laws[name])
        return self._rows[name]

    def __iter__(self) -> Iterator[Row]:
        return (self[name] for name in self.laws)

    def __len__(self) -> int:
        return len(self.laws)

    @property
    def broken(self) -> list[str]:
        """The names of the laws that do not hold."""
        return [row.law for row in self if row.verdict == "broken"]

    def __str__(self) -> str:
        rows = list(self)
        width = max(len(row.law) for row in rows)
        lines = [self.title]
        for row in rows:
            lines.append(f"  {row.law:<{width}}  {row.verdict}")
            lines += textwrap.wrap(row.words, 116, initial_indent="      ", subsequent_indent="      ")
        count = {verdict: sum(row.verdict == verdict for row in rows) for verdict in ("holds", "broken", "skipped")}
        return "\n".join([*lines, f"  {count['holds']} hold, {count['broken']} broken, {count['skipped']} skipped"])

    def __repr__(self) -> str:
        return f"<{len(self)} laws of {self.title}; print it to check them>"


def require(strategy: st.SearchStrategy[Example], counterexample: Callable[[Example], str | None]) -> None:
    """Raises `Broken` with the words for the smallest example that is a counterexample.

    Args:
      strategy: examples.
      counterexample: what an example shows to be wrong, in words; None where the law holds for it.
    """

    def words(example: Example) -> str | None:
        try:
            return counterexample(example)
        except Broken as broken:
            return str(broken)

    try:
        smallest = hypothesis.find(strategy, lambda example: words(example) is not None, settings=_settings())
    except hypothesis.errors.NoSuchExample:
        return
    raise Broken(words(smallest))


def thorough() -> bool:
    """Whether the thorough profile is in force."""
    return hypothesis.settings.get_current_profile_name() == "jaxmp-thorough"


def require_methods(entry: str, adapter: Any, methods: Iterable[str], laws: Iterable[Law]) -> None:
    """Raises InputError where an adapter lacks a method, with a law that calls it."""
    for method in methods:
        if not callable(getattr(adapter, method, None)):
            law = next(iter(laws)).name
            there = [name for name in dir(adapter) if not name.startswith("_") and callable(getattr(adapter, name))]
            raise InputError(
                f"{entry}: the adapter {type(adapter).__name__} has no method {method!r}, which the law {law!r} calls; "
                f"it has {', '.join(there) or 'none'}{nearest(method, there)}"
            )


def calling(what: str, function: Callable[..., Any], *args: Any, given: str = "") -> Any:
    """`function(*args)`; what it raises becomes a `Broken` that says what raised, and what it was given."""
    try:
        return function(*args)
    except (Broken, Skipped):
        raise
    except Exception as error:
        lines = str(error).strip().splitlines() or [""]
        words = f"{what} raised {type(error).__name__}: {lines[0][:300]}"
        raise Broken(f"{words} (given {given})" if given else words) from error


def _verdict(law: Law) -> Row:
    try:
        law.check()
    except Skipped as reason:
        return Row(law.name, law.statement, "skipped", str(reason))
    except Broken as broken:
        return Row(law.name, law.statement, "broken", str(broken))
    return Row(law.name, law.statement, "holds", "")


def _settings() -> hypothesis.settings:
    return hypothesis.settings.get_profile("jaxmp-thorough" if thorough() else "jaxmp-quick")
