"""`Space`: which fields of an experiment a study varies, over which values, and the experiments that come out.

optimizer.learning-rate=log:1e-4:1e-1      a range, drawn evenly in its logarithm
model.dropout=linear:0:0.5                 a range, drawn evenly
data.batch-size=32,64,128                  a list; where a value has commas in it: precision=float32|p=f32,c=bf16
optimizer.nesterov=True,False              a flag
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import io
import itertools
import math
import numbers
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from jaxmp.errors import InputError, nearest
from jaxmp.experiment.config_file import ConfigFile
from jaxmp.experiment.experiment import Experiment, in_words
from jaxmp.experiment.identity import HASHED, field_kinds
from jaxmp.experiment.overrides import field_path, named_fields, override, refuse_without_effect

KINDS = ("log", "linear")
"""how a range is drawn: evenly in the logarithm of its values, or evenly"""


class Range(NamedTuple):
    """Numbers from `low` to `high`, both included."""

    low: float
    high: float
    log: bool
    """whether values are drawn evenly in their logarithm"""
    whole: bool
    """whether only whole numbers are drawn"""

    def __str__(self) -> str:
        return f"{'log' if self.log else 'linear'}:{self.low!r}:{self.high!r}"

    @property
    def ends(self) -> tuple[Any, Any]:
        """The least and the largest value."""
        return self.low, self.high


class Choices(NamedTuple):
    """A list of values."""

    texts: tuple[str, ...]
    """what a command line, a table and the study call each value"""
    values: tuple[Any, ...] | None = None
    """the values, where they were given from Python; None where `texts` are read as on the command line"""

    def __str__(self) -> str:
        return ("|" if any("," in text for text in self.texts) else ",").join(self.texts)

    @property
    def ends(self) -> tuple[str, ...]:
        """All values, as a study calls them."""
        return self.texts


@dataclass(frozen=True)
class Subject:
    """The experiment that a study varies: a config file with the arguments of its command line, or an Experiment."""

    source: ConfigFile | Experiment
    name: str
    """folder of its runs"""
    overrides: tuple[str, ...] = ()
    """for a config file, further arguments of `jaxmp train` for all runs"""

    @functools.cached_property
    def base(self) -> Experiment:
        """The experiment before anything is varied."""
        return self.source if isinstance(self.source, Experiment) else self.source.experiment(self.overrides)

    def make(self, words: Sequence[str]) -> Experiment:
        """The experiment changed by arguments of a command line; of a config file, which is run again, a fresh one.

        Raises: InputError if an argument cannot be read, is refused, or has no effect.
        """
        if isinstance(self.source, Experiment):
            return _quietly(override, self.source, words)
        experiment = _quietly(self.source.experiment, [*self.overrides, *words])
        refuse_without_effect(experiment, [*self.overrides, *words], varied=named_fields(words))
        return experiment

    def origin(self, arguments: Sequence[str]) -> dict[str, Any] | None:
        """How `fit` records that a run can be made again; None where no arguments make it, see `Point`."""
        if isinstance(self.source, Experiment) or not arguments:
            return None
        return self.source.origin([*self.overrides, *arguments])


class Point(NamedTuple):
    """One experiment of a space."""

    experiment: Experiment
    arguments: list[str]
    """what `jaxmp train CONFIG` takes beside the study's own overrides; [] for an Experiment from Python, and with a
    value that no argument can give, such as a module"""


@dataclass(frozen=True)
class Space:
    """The fields that a study varies, each with a range or a list of values, in the order in which they were given."""

    leaves: Mapping[str, Range | Choices]
    """by path as Python spells it, `optimizer.learning_rate`"""

    @classmethod
    def parse(cls, given: Sequence[str] | Mapping[str, Any], subject: Subject) -> Space:
        """Reads and checks a space.

        Args:
          given: `LEAF=RANGE or LIST` texts, as the command line takes them; or a mapping from leaves to such texts
            (without `LEAF=`) or to sequences of values, each of which may be an object: a Flax module, an optimizer.
          subject: the experiment that is varied.

        Raises:
          InputError: the space is empty, or names a leaf twice, one that the experiment does not have, one that
            changes no result, or one that the study's overrides set; bounds are reversed or no numbers; the experiment
            takes one of the values in no combination.
        """
        if isinstance(given, str) or not isinstance(given, Sequence | Mapping):
            raise InputError(f"space = {given!r:.60}: expected {{'optimizer.learning_rate': 'log:1e-4:1e-1'}}, say")
        if not given:
            raise InputError(
                "--space: nothing to vary; expected LEAF=log:LOW:HIGH, LEAF=linear:LOW:HIGH or LEAF=VALUE,VALUE, such "
                "as optimizer.learning-rate=log:1e-4:1e-1"
            )
        base = subject.base
        leaves: dict[str, Range | Choices] = {}
        for name, text in given.items() if isinstance(given, Mapping) else map(_leaf_and_text, given):
            path = field_path(str(name))
            if path in leaves:
                raise InputError(f"--space {spelled(path)}: given twice")
            leaves[path] = _values(path, text, base, subject)
        space = cls(leaves)
        space._check(subject, base)
        return space

    def to_json(self) -> dict[str, str]:
        """The range or list of each leaf as text, by its path as the command line spells it."""
        return {spelled(path): str(values) for path, values in self.leaves.items()}

    @property
    def ranges(self) -> list[str]:
        """The paths that have a range, which no grid can hold."""
        return [path for path, values in self.leaves.items() if isinstance(values, Range)]

    def points(self) -> list[dict[str, str]]:
        """All combinations of lists, by leaf; the last leaf changes fastest.

        Raises: InputError if a leaf has a range.
        """
        if self.ranges:
            path = self.ranges[0]
            raise InputError(
                f"--space {spelled(path)}={self.leaves[path]}: a grid has points, not ranges; expected a list, "
                f"{spelled(path)}=A,B,C, or --sampler tpe"
            )
        values = [self.leaves[path].ends for path in self.leaves]
        return [dict(zip(self.leaves, combination, strict=True)) for combination in itertools.product(*values)]

    def suggest(self, trial: Any) -> dict[str, Any]:
        """Draws a value of each leaf for an Optuna trial: numbers of ranges, texts of lists."""
        drawn: dict[str, Any] = {}
        for path, of in self.leaves.items():
            if isinstance(of, Choices):
                drawn[path] = trial.suggest_categorical(path, of.texts)
            elif of.whole:
                drawn[path] = trial.suggest_int(path, of.low, of.high, log=of.log)
            else:
                drawn[path] = trial.suggest_float(path, of.low, of.high, log=of.log)
        return drawn

    def point(self, subject: Subject, drawn: Mapping[str, Any], seed: int) -> Point:
        """The experiment with the values that `suggest` drew, and a seed.

        Raises: InputError if the experiment takes them in no such combination.
        """
        values = {}
        for path, value in drawn.items():
            of = self.leaves[path]
            if isinstance(of, Choices) and of.values is not None:
                values[path] = of.values[of.texts.index(value)]
        from_file = isinstance(subject.source, ConfigFile)
        if values and from_file:
            with contextlib.suppress(InputError):
                words = _words(subject.base, {**drawn, **values}, seed)
                made = subject.make(words)
                if made.hash == replaced(made, values).hash:
                    return Point(made, words)
        words = _words(subject.base, {path: value for path, value in drawn.items() if path not in values}, seed)
        return Point(replaced(subject.make(words), values), words if from_file and not values else [])

    def _check(self, subject: Subject, base: Experiment) -> None:
        """Raises InputError if a leaf cannot be varied, or the experiment takes one of its values in no combination."""
        given = named_fields(subject.overrides)
        kinds = field_kinds(base)
        for path, of in self.leaves.items():
            whole = next((other for other in self.leaves if path.startswith(f"{other}.")), None)
            if whole is not None:
                raise InputError(
                    f"--space {spelled(path)}: {spelled(whole)} is varied as a whole; expected one of them"
                )
            if path in given:
                raise InputError(f"--{spelled(path)}: the study varies it, by --space {spelled(path)}={of}")
            parts = path.split(".")
            above = (".".join(parts[:n]) for n in range(len(parts), 0, -1))
            kind = next((kinds[name] for name in above if name in kinds), "decides")
            if kind == "apart":
                raise InputError("--space seed: a study varies no seed; expected --seeds 3, the seeds of each trial")
            if kind not in HASHED:
                raise InputError(f"--space {spelled(path)}: it changes no result but the last digits; expected another")
            for value in of.ends:
                self._check_value(subject, base, path, value)

    def _check_value(self, subject: Subject, base: Experiment, path: str, value: Any) -> None:
        """Raises InputError if the experiment takes a value neither alone nor beside a value of one other leaf."""
        try:
            self.point(subject, {path: value}, 0)
            return
        except InputError as error:
            alone = error
        if isinstance(alone, NoValue):
            now = dict(fields_of(base))[path]
            raise NoValue(
                f"--space {spelled(path)}: {value!r} is no value of this field, which is {now!r:.60}; expected values "
                "such as A,B,C, or a range, log:LOW:HIGH or linear:LOW:HIGH"
            ) from None
        others = [(other, end) for other, of in self.leaves.items() if other != path for end in of.ends]
        for other, end in others:
            with contextlib.suppress(InputError):
                self.point(subject, {path: value, other: end}, 0)
                return
        raise InputError(f"--space {spelled(path)}: {value} is refused: {alone}") from None


class NoValue(InputError):
    """A text that cannot be read as a value of the field."""


def spelled(path: str) -> str:
    """A path as the command line spells it.

    >>> spelled("optimizer.learning_rate")
    'optimizer.learning-rate'
    """
    return path.replace("_", "-")


def fields_of(value: Any, above: str = "") -> Iterator[tuple[str, Any]]:
    """The fields of nested dataclasses and mappings by path, those with fields of their own too."""
    for name, of in _children(value):
        yield f"{above}{name}", of
        yield from fields_of(of, f"{above}{name}.")


def replaced(value: Any, new: Mapping[str, Any]) -> Any:
    """A copy of nested dataclasses and mappings with other values at some paths, each dataclass checked once."""
    below: dict[str, dict[str, Any]] = {}
    for path, of in new.items():
        first, _, rest = path.partition(".")
        below.setdefault(first, {})[rest] = of
    if not below:
        return value
    children = dict(_children(value))
    changed = {name: paths[""] if "" in paths else replaced(children[name], paths) for name, paths in below.items()}
    return {**value, **changed} if isinstance(value, Mapping) else dataclasses.replace(value, **changed)


def _children(value: Any) -> list[tuple[str, Any]]:
    if isinstance(value, Mapping):
        return [(str(name), of) for name, of in value.items()]
    if not dataclasses.is_dataclass(value) or isinstance(value, type):
        return []
    names = [field.name for field in dataclasses.fields(value) if field.init and not field.name.startswith("_")]
    of_flax = {"parent", "name"} if {"parent", "name"} <= set(names) else set()
    return [(name, getattr(value, name, None)) for name in names if name not in of_flax]


def _leaf_and_text(given: str) -> tuple[str, str]:
    name, equals, text = given.partition("=")
    if not equals:
        raise InputError(f"--space {given}: expected LEAF=log:LOW:HIGH or LEAF=VALUE,VALUE")
    return name, text


def _values(path: str, given: Any, base: Experiment, subject: Subject) -> Range | Choices:
    """The range or list of a leaf. Raises InputError if the experiment has no such leaf, or `given` says neither."""
    where, fields = f"--space {spelled(path)}", dict(fields_of(base))
    if path not in fields:
        leaves = [name for name, of in fields.items() if not _children(of)]
        of_that_name = [name for name in leaves if name.rpartition(".")[2] == path]
        close = f"; did you mean {spelled(of_that_name[0])!r}?" if of_that_name else ""
        raise InputError(
            f"{where}: {subject.name} has no such field{close or nearest(spelled(path), map(spelled, leaves))}"
        )
    if not isinstance(given, str):
        return _choices_from_python(where, given)
    if inner := [f"{path}.{name}" for name, _ in _children(fields[path])]:
        raise InputError(f"{where}: has fields of its own; expected one of {', '.join(map(spelled, inner))}")
    kind, colon, bounds = given.partition(":")
    if colon and kind in KINDS:
        return _range(where, path, kind, bounds, fields[path], subject)
    texts = tuple(text.strip() for text in given.split("|" if "|" in given else ","))
    if not all(texts):
        raise InputError(f"{where}={given}: expected log:LOW:HIGH, linear:LOW:HIGH or VALUE,VALUE")
    return _distinct(where, Choices(texts))


def _choices_from_python(where: str, given: Any) -> Choices:
    if not isinstance(given, Sequence) or not given:
        raise InputError(f"{where} = {given!r:.60}: expected a list of values, or a text such as 'log:1e-4:1e-1'")
    return _distinct(where, Choices(tuple(_named(value) for value in given), tuple(given)))


def _named(value: Any) -> str:
    return value if isinstance(value, str) else in_words(value)


def _distinct(where: str, choices: Choices) -> Choices:
    twice = [text for i, text in enumerate(choices.texts) if text in choices.texts[:i]]
    if twice:
        raise InputError(f"{where}: {twice[0]} is given twice")
    return choices


def _range(where: str, path: str, kind: str, bounds: str, now: Any, subject: Subject) -> Range:
    takes_numbers = isinstance(now, numbers.Real) and not isinstance(now, bool)
    # A field of floats may be written as a whole number, weight_decay=0.
    whole = takes_numbers and isinstance(now, numbers.Integral) and not _takes(subject, path, "0.5")
    try:
        low, high = map(float, bounds.split(":"))
    except ValueError:
        raise InputError(f"{where}={kind}:{bounds}: expected two numbers, {kind}:LOW:HIGH") from None
    if now is None:  # a field that is unset says by what it takes what it is
        takes_numbers = _takes(subject, path, "1")
        whole = takes_numbers and not _takes(subject, path, "0.5")
    if not takes_numbers:
        raise InputError(f"{where}={kind}:{bounds}: the field is no number, it is {now!r:.60}; expected a list")
    if not (math.isfinite(low) and math.isfinite(high) and low < high):
        raise InputError(f"{where}={kind}:{bounds}: expected LOW below HIGH, both finite")
    if kind == "log" and low <= 0:
        raise InputError(f"{where}={kind}:{bounds}: expected LOW above 0, or linear:{bounds}")
    if whole and not (low.is_integer() and high.is_integer()):
        raise InputError(f"{where}={kind}:{bounds}: the field is a whole number; expected whole bounds")
    return Range(int(low), int(high), kind == "log", True) if whole else Range(low, high, kind == "log", False)


def _takes(subject: Subject, path: str, word: str) -> bool:
    try:
        subject.make([f"--{spelled(path)}", word])
    except NoValue:
        return False
    except InputError:  # read, and out of bounds
        return True
    return True


def _words(base: Experiment, values: Mapping[str, Any], seed: int) -> list[str]:
    """The arguments of a command line that set fields to texts or values. tyro may refuse those of a value."""
    words, fields = [], dict(fields_of(base))
    for path, value in values.items():
        if isinstance(fields[path], bool) and str(value) in ("True", "False"):
            above, dot, name = spelled(path).rpartition(".")
            words.append(f"--{above}{dot}{'' if str(value) == 'True' else 'no-'}{name}")
            continue
        words.append(f"--{spelled(path)}")
        if isinstance(value, list | tuple):
            words += map(str, value)
        elif isinstance(value, str) and not isinstance(fields[path], str):
            words += value.split()
        else:
            words.append(str(value))
    return [*words, "--seed", str(seed)]


def _quietly(make: Callable[..., Experiment], *arguments: Any) -> Experiment:
    """Calls what reads arguments by tyro, whose message is not for here. Raises NoValue if it cannot read one."""
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said), contextlib.redirect_stdout(said):
            return make(*arguments)
    except SystemExit:
        raise NoValue(f"cannot read {' '.join(arguments[-1])}") from None
