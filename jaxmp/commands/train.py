"""`jaxmp train CONFIG`: trains an experiment, alone or as one of several processes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from jaxmp.commands.command import ConfigCommand, require_path
from jaxmp.commands.summary import print_summary
from jaxmp.errors import DONE, STOPPED, InputError
from jaxmp.experiment.config_file import ConfigFile

if TYPE_CHECKING:
    from jaxmp.experiment.experiment import Experiment


@dataclass(frozen=True)
class Options:
    """The options of `jaxmp train`."""

    workdir: str = "runs"
    """Folder for the runs; this one goes to WORKDIR/CONFIG/HASH-sSEED."""
    dry_run: bool = False
    """Show shapes, parameters, precision, memory and batches per epoch, from one step that is compiled but not run."""
    fast_dev_run: bool = False
    """Make a few steps of everything (training, evaluation, checkpoint, report) in a folder that is deleted again."""
    quiet: bool = False
    """Show nothing but errors."""
    profile: str | None = None
    """Trace steps FIRST:LAST, counted from 1; xprof or TensorBoard opens the trace."""
    overwrite: bool = False
    """Delete this run if it exists and start again, instead of resuming it."""
    continue_: str | None = None
    """Go on from all of the state of RUN, or RUN@STEP, with what is changed, in a folder of its own."""
    init_from: str | None = None
    """Begin with the weights of RUN, RUN@best or RUN@STEP, or with pretrained ones: FILE.safetensors."""
    init_only: tuple[str, ...] = ()
    """Patterns of the weights that --init-from takes, such as **/kernel or Conv_*; the others begin fresh."""
    distributed: bool = False
    """Train together with other processes that run the same command; Slurm, Open MPI and Kubernetes are detected."""
    coordinator: str | None = None
    """Address of process 0, HOST:PORT; needed with --distributed if the cluster is not detected."""
    process_count: int | None = None
    """Number of processes; needed with --distributed if the cluster is not detected."""
    process_index: int | None = None
    """Number of this process, from 0; needed with --distributed if the cluster is not detected."""
    start_timeout: int = 300
    """Seconds to wait until all processes have started."""


def train(config: ConfigFile, options: Options, experiment: Experiment, overrides: list[str]) -> int:
    """Trains a config; the same command resumes a run that was stopped."""
    require_path(workdir=options.workdir)
    from jaxmp.distributed import processes

    if options.dry_run:
        from jaxmp.commands.dry_run import dry_run

        lines = dry_run(experiment, options.continue_ or options.init_from)
        if processes.is_first():
            print(lines)
        return DONE
    how: dict[str, Any] = {
        "workdir": options.workdir,
        "name": config.name,
        "init_from": options.init_from,
        "init_only": options.init_only,
        "progress": "none" if options.quiet else "auto",
        "log": _silent if options.quiet else print,
    }
    if options.fast_dev_run:
        for option in ("overwrite", "continue_", "profile"):
            if getattr(options, option):
                said = "--" + option.removesuffix("_")
                raise InputError(f"{said}: not with --fast-dev-run, which begins a run that is deleted again")
        from jaxmp.commands.fast_dev_run import fast_dev_run

        text = fast_dev_run(experiment, **how)
        if processes.is_first() and not options.quiet:
            print(text)
        return DONE
    from jaxmp.runs.fit import fit
    from jaxmp.runs.trace import StepRange

    fitted = fit(
        experiment,
        origin=config.origin(overrides),
        overwrite=options.overwrite,
        continue_from=options.continue_,
        profile=None if options.profile is None else StepRange.parse(options.profile),
        **how,
    )
    if fitted.stopped:
        return STOPPED
    if not processes.is_first() or options.quiet:
        return DONE
    if not fitted.trained:
        print(f"{fitted.path} is finished: nothing was trained, this is its summary; --overwrite starts again")
    print_summary({**fitted.summary, "run": str(fitted.path)})
    return DONE


def _silent(message: str) -> None:
    """The log of `--quiet`."""


def join(options: Options, argv: Sequence[str]) -> int | None:
    """With --distributed: hands `argv` to a child process, or joins the other processes if this is one.

    Called before the config file is run: it may ask JAX for its devices, and no process can join after that.
    """
    if not options.distributed:
        for name in ("coordinator", "process_count", "process_index"):
            if getattr(options, name) is not None:
                option = "--" + name.replace("_", "-")
                raise InputError(f"{option} {getattr(options, name)}: only with --distributed, which is not given")
        return None
    from jaxmp.distributed import parent

    if parent.is_needed():
        return parent.run(["train", *argv])
    from jaxmp.distributed import processes

    processes.join(options.coordinator, options.process_count, options.process_index, options.start_timeout)
    return None


COMMAND = ConfigCommand("train", Options, train, before_config=join)
