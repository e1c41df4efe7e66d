"""`Laws`: properties, each with its smallest counterexample: a table when printed, tests when pytest collects them."""

from __future__ import annotations

import dataclasses
import textwrap
import unittest
from collections.abc import Callable, Iterable, Iterator
from typing import Any, Literal, NamedTuple, TypeVar

import hypothesis
from hypothesis import strategies as st

from jaxmp.errors import InputError, nearest
from jaxmp.html.elements import Elements, escape
from jaxmp.text_table import table

Example = TypeVar("Example")

hypothesis.settings.register_profile(
    "jaxmp-quick", max_examples=20, deadline=None, derandomize=True, database=None, print_blob=False
)
hypothesis.settings.register_profile("jaxmp-thorough", hypothesis.settings.get_profile("jaxmp-quick"), max_examples=500)


class Broken(AssertionError):
    """A law does not hold; the message is its smallest counterexample."""


class Skipped(unittest.SkipTest):
    """A law does not apply to its subject; the message is the reason. pytest skips the test."""


@dataclasses.dataclass(frozen=True)
class Law:
    """One property."""

    name: str
    """its name, that of its test"""
    statement: str
    """the property as a sentence"""
    check: Callable[[], None]
    """raises `Broken` with a counterexample, or `Skipped`"""

    @classmethod
    def of(cls, check: Callable[[Any], None], subject: Any) -> Law:
        """Makes a law of a function of its subject: its name, and the first line of its docstring as the statement."""
        statement = (check.__doc__ or "").strip().partition("\n")[0]
        return cls(check.__name__, statement, lambda: check(subject))


class LawResult(NamedTuple):
    """The result of checking one law."""

    law: str
    """name of the law"""
    statement: str
    """the law as a sentence"""
    verdict: Literal["holds", "broken", "skipped"]
    """whether it holds"""
    words: str
    """the smallest counterexample, or the reason why it was skipped; "" if it holds"""


class Laws:
    """The laws of one subject, each checked when it is first asked for: by pytest, `print`, iteration or `laws[name]`.

    Printed, it is a table of names, verdicts and statements. Iteration gives a `LawResult` for each law. pytest makes
    one test for each law of a `Laws` under a module attribute whose name begins with `test`.
    """

    def __init__(self, title: str, laws: Iterable[Law]):
        self.title = title
        self.laws = {law.name: law for law in laws}
        self._results: dict[str, LawResult] = {}

        def check(law: str) -> None:
            __tracebackhide__ = True
            result = self[law]
            if result.verdict == "skipped":
                raise Skipped(result.words)
            if result.verdict == "broken":
                raise Broken(f"{result.statement}\nDoes not hold for {self.title}:\n{result.words}")

        self.__wrapped__ = check  # what pytest takes for the test function

    def __call__(self, law: str) -> None:
        """Checks one law, by its name. Raises `Broken`, or `unittest.SkipTest` if it does not apply."""
        __tracebackhide__ = True
        self.__wrapped__(law)

    @property
    def pytestmark(self) -> list[Any]:
        """Makes pytest call this once for each law."""
        import pytest

        return [pytest.mark.parametrize("law", list(self.laws))]

    def __getitem__(self, name: str) -> LawResult:
        """Checks one law, by its name, and returns the result. Raises InputError if there is no such law."""
        if name not in self.laws:
            raise InputError(
                f"{self.title} has no law {name!r}; it has {', '.join(self.laws)}{nearest(name, self.laws)}"
            )
        if name not in self._results:
            self._results[name] = _result(self.laws[name])
        return self._results[name]

    def __iter__(self) -> Iterator[LawResult]:
        return (self[name] for name in self.laws)

    def __len__(self) -> int:
        return len(self.laws)

    @property
    def broken(self) -> list[str]:
        """The names of the laws that do not hold."""
        return [result.law for result in self if result.verdict == "broken"]

    def __str__(self) -> str:
        results = list(self)
        lines = [self.title]
        heads = table([(result.law, result.verdict) for result in results], indent=2).splitlines()
        column = max(map(len, heads), default=0) + 2
        for head, result in zip(heads, results, strict=True):
            first, *others = textwrap.wrap(result.statement, max(120 - column, 40)) or [""]
            lines += [f"{head:{column}}{first}".rstrip(), *(" " * column + line for line in others)]
            lines += textwrap.wrap(result.words, 116, initial_indent="      ", subsequent_indent="      ")
        count = {verdict: sum(r.verdict == verdict for r in results) for verdict in ("holds", "broken", "skipped")}
        return "\n".join([*lines, f"  {count['holds']} hold, {count['broken']} broken, {count['skipped']} skipped"])

    def _repr_html_(self) -> str:
        """Checks the laws, and shows them in a notebook."""
        found = Elements()
        found.parts.append(f"<h3>{escape(self.title)}</h3>")
        results = list(self)
        rows = [(result.law, result.verdict, result.statement, result.words) for result in results]
        said = any(result.words for result in results)
        header = ("law", "verdict", "statement", "counterexample, or why it was skipped")
        found.table(header[: 3 + said], [row[: 3 + said] for row in rows])
        return found.cell()

    def __repr__(self) -> str:
        return f"<{len(self)} laws of {self.title}; print it to check them>"


def require(strategy: st.SearchStrategy[Example], counterexample: Callable[[Example], str | None]) -> None:
    """Searches for the smallest counterexample among examples, and raises `Broken` with its words if there is one.

    Args:
      strategy: examples.
      counterexample: says in words what is wrong for an example; None if the law holds for it.
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
    """True if hypothesis's profile `jaxmp-thorough` is in force."""
    return hypothesis.settings.get_current_profile_name() == "jaxmp-thorough"


def require_methods(entry: str, adapter: Any, methods: Iterable[str], laws: Iterable[Law]) -> None:
    """Raises an InputError that names a law, if the adapter lacks one of the methods that the laws call."""
    for method in methods:
        if not callable(getattr(adapter, method, None)):
            law = next(iter(laws)).name
            there = [name for name in dir(adapter) if not name.startswith("_") and callable(getattr(adapter, name))]
            raise InputError(
                f"{entry}: the adapter {type(adapter).__name__} has no method {method!r}, which the law {law!r} calls; "
                f"it has {', '.join(there) or 'none'}{nearest(method, there)}"
            )


def calling(what: str, function: Callable[..., Any], *args: Any, given: str = "") -> Any:
    """Returns `function(*args)`; an exception in it becomes a `Broken` that says what raised, and what it was given."""
    try:
        return function(*args)
    except (Broken, Skipped):
        raise
    except Exception as error:
        lines = str(error).strip().splitlines() or [""]
        words = f"{what} raised {type(error).__name__}: {lines[0][:300]}"
        raise Broken(f"{words} (given {given})" if given else words) from error


def _result(law: Law) -> LawResult:
    try:
        law.check()
    except Skipped as reason:
        return LawResult(law.name, law.statement, "skipped", str(reason))
    except Broken as broken:
        return LawResult(law.name, law.statement, "broken", str(broken))
    return LawResult(law.name, law.statement, "holds", "")


def _settings() -> hypothesis.settings:
    return hypothesis.settings.get_profile("jaxmp-thorough" if thorough() else "jaxmp-quick")
