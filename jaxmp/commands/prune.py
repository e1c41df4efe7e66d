"""`jaxmp prune RUN|CONFIG`: a run whose small weights become zero while it trains again, and what that costs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from jaxmp.commands.command import ConfigCommand, parse, require_path
from jaxmp.errors import DONE, STOPPED, InputError
from jaxmp.experiment.config_file import ConfigFile

if TYPE_CHECKING:
    from jaxmp.experiment.experiment import Experiment
    from jaxmp.runs.run import Run


@dataclass(frozen=True)
class Options:
    """The options of `jaxmp prune`."""

    workdir: str | None = None
    """Folder of all runs: the pruned one goes to WORKDIR/NAME/<hash>-s<seed>; by default that of RUN, or runs."""
    split: Literal["train", "validation", "test"] | None = None
    """Split that accuracy is measured on; by default test, else validation, else train."""
    rows: int = 10_000
    """The most rows that accuracy is measured on, spread evenly over the split."""
    quiet: bool = False
    """Print nothing of the training."""


def prune(config: ConfigFile, options: Options, experiment: Experiment, overrides: list[str]) -> int:
    """Trains a run again with pruning, from its best weights, and prints what that costs and saves.

    Of a run folder, any field of the experiment can be changed: --pruning.sparsity 0.9, --pruning.structure 2:4.

    With CONFIG, its run without pruning is trained first, unless it is there. The same command resumes both.
    """
    from jaxmp.deploy.export import check_rows
    from jaxmp.deploy.prune import check_weights
    from jaxmp.runs.fit import fit
    from jaxmp.runs.run import Run
    from jaxmp.runs.trainer import Trainer

    require_path(workdir=options.workdir)
    trainer = Trainer(experiment)
    check_weights(trainer)
    check_rows(trainer, options.split, options.rows)
    workdir = options.workdir or "runs"
    plain = without_pruning(overrides)
    dense = config.experiment(plain)
    if dense.pruning.share:
        plain = [*plain, *_default_pruning()]
        dense = config.experiment(plain)
    fitted = fit(dense, workdir=workdir, name=config.name, origin=config.origin(plain), **_how(options))
    if fitted.stopped:
        return STOPPED
    return _prune(Run(fitted.path), config, options, experiment, overrides, workdir)


def _default_pruning() -> list[str]:
    """The arguments that give every field of pruning its default, with which nothing is pruned."""
    import dataclasses

    from jaxmp.training.pruning import Pruning

    arguments = []
    for name, value in dataclasses.asdict(Pruning()).items():
        arguments += [f"--pruning.{name}", *map(str, value if isinstance(value, tuple) else [value])]
    return arguments


def without_pruning(overrides: Sequence[str]) -> list[str]:
    """The arguments that change other fields than those of pruning.

    >>> without_pruning(["--seed", "1", "--pruning.keep", "a", "b", "--loop.epochs", "2"])
    ['--seed', '1', '--loop.epochs', '2']
    """
    kept, of_pruning = [], False
    for argument in overrides:
        if argument.startswith("--"):
            of_pruning = argument.startswith("--pruning.")
        if not of_pruning:
            kept.append(argument)
    return kept


def _how(options: Options) -> dict[str, Any]:
    """How a training speaks."""
    return {"progress": "none", "log": _silent} if options.quiet else {}


def _silent(message: str) -> None:
    """The log of `--quiet`."""


def _prune(
    run: Run, config: ConfigFile, options: Options, experiment: Experiment, overrides: list[str], workdir: str | None
) -> int:
    from jaxmp.deploy import prune as deploy
    from jaxmp.distributed import processes

    how = {"split": options.split, "rows": options.rows, **_how(options)}
    found = deploy.prune(run, experiment, workdir=workdir, origin=config.origin(overrides), **how)
    if found is None:
        return STOPPED
    if processes.is_first():
        print(found)
        print(f"{'run':<16} {found.run.path}")
    return DONE


class _RunOrConfig(ConfigCommand):
    def __call__(self, argv: Sequence[str]) -> int:
        """As of `ConfigCommand`; a folder as first argument is a run."""
        if not argv or argv[0].startswith("-") or not Path(argv[0]).is_dir():
            return super().__call__(argv)
        from jaxmp.runs.run import Run

        run = Run(argv[0])
        recorded = run.config
        if "source" not in recorded:
            raise InputError(
                f"{run.path} was started from Python and keeps no config file; prune it from Python: "
                "jaxmp.deploy.prune.prune(run, experiment)"
            )
        _ = run.experiment  # refuses other code
        config = ConfigFile(recorded["name"], recorded["source"], recorded["file"])
        prog = f"jaxmp {self.name} {argv[0]}"
        options, experiment, overrides = parse(
            config, self.options, argv[1:], recorded=recorded["overrides"], prog=prog
        )
        require_path(workdir=options.workdir)
        return _prune(run, config, options, experiment, overrides, options.workdir)


COMMAND = _RunOrConfig("prune", Options, prune)
