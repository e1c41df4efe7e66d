"""How the arguments of a command are read: its options, the experiment, and the overrides that a run records."""

from __future__ import annotations

import sys
from dataclasses import dataclass

import pytest

from jaxmp import InputError, cli
from jaxmp.commands import compare, train, tune
from jaxmp.commands.command import Command, ConfigCommand, parse, require_path
from jaxmp.distributed import parent, processes
from jaxmp.experiment.config_file import ConfigFile
from jaxmp.studies.tune_space import Subject

SOURCE = '''
"""A small one."""
from jaxmp import Experiment
from jaxmp.models.mlp import MLP

def get_config():
    return Experiment(model=MLP(features=(8,)), precision="mixed_bfloat16")
'''
SMALL = ConfigFile("small", SOURCE, "/nowhere/small.py")


@dataclass(frozen=True)
class Options:
    """Options of every kind."""

    workdir: str = "runs"
    """Folder."""
    fast: bool = False
    """Flag."""
    seeds: tuple[int, ...] = (0, 1)
    """Several values."""
    json: str | None = None
    """File."""


def refused(capsys, options, *arguments):
    """The message about arguments that cannot be read, without the boxes that tyro draws."""
    with pytest.raises(SystemExit) as stop:
        parse(SMALL, options, arguments)
    assert stop.value.code == 2
    return " ".join(capsys.readouterr().err.replace("│", " ").split())


def test_each_argument_goes_to_the_options_or_to_the_experiment_and_overrides_keep_their_order():
    arguments = "--data.mean -0.1 0.2 --fast --seed=3 --workdir=there --model.features 4 5 --seeds 7 --loop.wandb"
    options, experiment, overrides = parse(SMALL, Options, arguments.split())
    assert options == Options(workdir="there", fast=True, seeds=(7,))
    assert overrides == "--data.mean -0.1 0.2 --seed=3 --model.features 4 5 --loop.wandb".split()
    assert (experiment.data.mean, experiment.seed, experiment.model.features) == ((-0.1, 0.2), 3, (4, 5))
    assert experiment.loop.wandb and type(experiment) is type(SMALL.experiment())
    assert experiment.hash == SMALL.experiment(overrides).hash


def test_without_overrides_the_experiment_is_that_of_the_file():
    options, experiment, overrides = parse(SMALL, Options, ["--fast"])
    assert options == Options(fast=True) and not overrides
    assert experiment.hash == SMALL.experiment().hash


@pytest.mark.parametrize("spelling", ["--no-fast", "--no_fast"])
def test_options_are_read_in_every_spelling_of_tyro(spelling):
    options, _, overrides = parse(SMALL, Options, ["--fast", spelling])
    assert options == Options() and not overrides


def test_an_option_hides_the_field_of_its_name():
    options, experiment, overrides = parse(SMALL, compare.Options, "--precision float32 f16 --seed 1".split())
    assert options.precision == ("float32", "f16")
    assert experiment.precision == "mixed_bfloat16" and experiment.seed == 1
    assert overrides == ["--seed", "1"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--fats", "Perhaps you meant: --fast"),
        ("--sed 1", "--seed INT"),
        ("--model.features 4 --fast 5", "Unrecognized options: 5"),  # not the width of another layer
        ("--model.features 4 --workdir there 5", "Unrecognized options: 5"),
        ("5", "Unrecognized options: 5"),
        ("--workdir --fast", "--workdir"),
        ("--seeds one", "Error parsing --seeds"),
        ("--loop.epochs many", "invalid literal for int"),
    ],
)
def test_an_argument_that_cannot_be_read_is_one_message_that_knows_all_names(arguments, message, capsys):
    assert message in refused(capsys, Options, *arguments.split())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--seed -1", "seed = -1"),
        ("--precision flaot32", "did you mean 'float32'"),
        ("--loop.epochs 0", "at least 1"),
        ("--loop.steps 3 --loop.epochs 2", "--loop.epochs: without effect beside loop.steps = 3"),
    ],
)
def test_a_value_that_the_experiment_refuses_is_an_input_error(arguments, message):
    with pytest.raises(InputError, match=message):
        parse(SMALL, Options, arguments.split())


def test_recorded_arguments_may_lose_their_effect_and_those_that_are_given_may_not():
    recorded = ["--loop.epochs", "2"]
    _, experiment, overrides = parse(SMALL, Options, ["--loop.steps", "3"], recorded=recorded)
    assert (experiment.loop.epochs, experiment.loop.steps) == (2, 3)
    assert overrides == ["--loop.epochs", "2", "--loop.steps", "3"]
    with pytest.raises(InputError, match=r"--loop\.epochs: without effect beside loop\.steps = 3"):
        parse(SMALL, Options, recorded, recorded=["--loop.steps", "3"])


def test_what_has_an_effect_on_some_runs_of_a_study_is_not_refused():
    arguments = ["--scaler.init-scale", "8"]  # SMALL computes in bfloat16
    with pytest.raises(InputError, match=r"--scaler\.init-scale: without effect"):
        parse(SMALL, Options, arguments)
    parse(SMALL, compare.Options, arguments)
    parse(SMALL, tune.Options, [*arguments, "--space", "precision=mixed_bfloat16,mixed_float16"])
    assert Subject(SMALL, "small", tuple(arguments)).make(["--precision", "float32"]).scaler.init_scale == 8


@pytest.mark.parametrize("arguments", ["--help", "--fast -h", "--seed 1 --help --fast", "--workdir there -h"])
def test_help_is_one_for_options_and_fields_wherever_it_is_asked_for(arguments, capsys):
    with pytest.raises(SystemExit) as stop:
        parse(SMALL, Options, arguments.split(), prog="jaxmp try small")
    assert not stop.value.code
    out = capsys.readouterr().out
    for text in ("usage: jaxmp try small", "A small one.", "--fast", "--model.features", "--loop.epochs"):
        assert text in out


def test_usage_shows_every_option_with_its_default():
    def run(*arguments):
        """Runs."""

    command = ConfigCommand("try", Options, run)
    with pytest.raises(InputError) as error:
        command(["--fast"])
    usage = "usage: jaxmp try CONFIG [--workdir runs] [--fast] [--seeds 0 1] [--json JSON] [--FIELD VALUE ...]"
    assert usage in str(error.value).splitlines()


def test_fields_without_a_default_are_positional(capsys):
    @dataclass(frozen=True)
    class Needs:
        """Needs a run."""

        run: str
        """Run."""
        step: int = 0
        """Step."""

    seen = []

    def run(options):
        """Runs."""
        seen.append(options)
        return 7

    command = Command("try", Needs, run)
    assert command(["--step", "3", "there"]) == 7
    assert seen == [Needs("there", 3)]
    with pytest.raises(SystemExit):
        command([])
    assert "Missing from jaxmp try: RUN" in " ".join(capsys.readouterr().err.replace("│", " ").split())


@pytest.mark.parametrize("path", ["", " "])
def test_an_empty_path_is_refused(path):
    require_path(run=None, workdir="runs")
    with pytest.raises(InputError, match=r"workdir .*: expected a path"):
        require_path(workdir=path)


def test_no_config_file_is_run_before_the_processes_are_joined(tmp_path, monkeypatch):
    (tmp_path / "mine.py").write_text("import sys\nsys.ran = True\nraise RuntimeError\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "ran", False, raising=False)
    calls = []
    monkeypatch.setattr(parent, "run", lambda argv: calls.append(argv) or 75)
    monkeypatch.setattr(processes, "join", lambda *where: calls.append((*where, sys.ran)))
    arguments = ["train", "mine.py", "--seed", "3", "--distributed", "--process-count", "2"]
    assert cli.main(arguments) == 75  # of the child, which is given the whole command
    monkeypatch.setattr(parent, "is_needed", lambda: False)
    assert cli.main(arguments) == 2  # the config raises
    assert calls == [arguments, (None, 2, None, train.Options.start_timeout, False)]
    assert sys.ran
