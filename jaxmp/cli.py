"""`jaxmp COMMAND ...`: the command line. Each command is a function that returns the exit code; tyro reads its
signature and docstring.

Exit codes: 0 done; 1 the run failed; 2 bad input; 75 stopped by a signal after saving, to be run again; 130 interrupted
where there was nothing to save.
JAX and tyro are imported by the commands that need them, so that `jaxmp --help` is quick.
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import json
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from jaxmp.errors import BAD_INPUT, DONE, FAILED, INTERRUPTED, STOPPED, InputError, RunFailed, nearest
from jaxmp.experiment import config_file
from jaxmp.experiment.config_file import ConfigFile, override
from jaxmp.text_table import table

# What a disk says when it is not ours to write on: no space, quota, no permission, read-only, a file in the way.
_UNWRITABLE = (errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EEXIST)


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command line and returns its exit code. The one place where exceptions become a message and a code."""
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    with _ending_at_once():
        return _main(arguments)


def _main(arguments: list[str]) -> int:
    try:
        code = _run(arguments)
        sys.stdout.flush()  # here, where a closed pipe is dealt with
        return code
    except SystemExit as stop:  # tyro, after --help (0) and after its own message about an argument (2)
        return stop.code if isinstance(stop.code, int) else DONE
    except BrokenPipeError:  # `jaxmp configs | head`
        sys.stdout = None
        return DONE
    except (Exception, KeyboardInterrupt) as error:
        ending = _ending(error)
        if ending is None:
            raise  # a bug, of jaxmp or of the model: the traceback is what helps
        code, message = ending
        print(f"jaxmp: {message}", file=sys.stderr)
        return code


@contextlib.contextmanager
def _ending_at_once() -> Iterator[None]:
    """Within: Ctrl-C ends the process there and then, as a `kill -9` might, which loses nothing that is written.

    A KeyboardInterrupt comes anywhere: in the middle of an import, in a callback of JAX, which swallows it, or so that
    Python is torn down under the threads of XLA. (While it trains, a run takes the signal itself: it saves and stops.)
    """
    if threading.current_thread() is not threading.main_thread():  # only the main thread can handle signals
        yield
        return

    def end(number: int, frame: object) -> None:
        with contextlib.suppress(Exception):  # it may be the middle of a write
            sys.stdout.flush()
        os.write(2, b"jaxmp: interrupted\n")
        os._exit(INTERRUPTED)

    before = signal.signal(signal.SIGINT, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def _run(arguments: list[str]) -> int:
    if not arguments or arguments[0] in ("-h", "--help"):
        print(_usage(COMMANDS))
        return DONE if arguments else BAD_INPUT
    if arguments[0] == "--version":
        import jaxmp

        print(f"jaxmp {jaxmp.__version__}")
        return DONE
    for words in (2, 1):
        command, rest = " ".join(arguments[:words]), arguments[words:]
        if command in ("train", "audit", "compare", "find-policy"):
            return COMMANDS[command](rest)
        if command in COMMANDS:
            import tyro

            positional = (tyro.conf.PositionalRequiredArgs, tyro.conf.PositionalMetavarFromFieldName)
            return tyro.cli(COMMANDS[command], args=rest, prog=f"jaxmp {command}", config=positional)
    group = [name for name in COMMANDS if name.startswith(f"{arguments[0]} ")]
    if group and (len(arguments) == 1 or arguments[1] in ("-h", "--help")):
        print(_usage(group))
        return DONE if arguments[1:] else BAD_INPUT
    given = " ".join(arguments[:2]) if group else arguments[0]
    names = group or COMMANDS
    raise InputError(f"unknown command {given!r}; expected one of {', '.join(names)}{nearest(given, names)}")


def _usage(commands: Iterable[str]) -> str:
    lines = [f"  {name:<14}{_first_line(COMMANDS[name])}" for name in commands]
    return "\n".join(
        [
            "usage: jaxmp COMMAND ...",
            "",
            "Trains any experiment under any precision, and shows what it did.",
            "",
            *lines,
            "",
            "`jaxmp COMMAND --help` shows a command's options, `jaxmp train CONFIG --help` every field of that config.",
        ]
    )


def _first_line(function: Callable[..., int]) -> str:
    return (function.__doc__ or "").partition("\n")[0]


def _ending(error: BaseException) -> tuple[int, str] | None:
    """The exit code and the message of an expected end; None for a bug."""
    if isinstance(error, InputError):
        return BAD_INPUT, str(error)
    if isinstance(error, RunFailed):
        return FAILED, str(error)
    if isinstance(error, KeyboardInterrupt):
        return INTERRUPTED, "interrupted"
    if isinstance(error, OSError) and error.errno in _UNWRITABLE:
        where = f"{error.filename}: " if error.filename else ""
        return BAD_INPUT, f"{where}{error.strerror}; choose another folder (--workdir), or make room there"
    if isinstance(error, MemoryError) or _is_out_of_memory(error):
        return FAILED, (
            f"out of memory ({str(error).partition(chr(10))[0] or 'host'}); try a smaller --data.batch-size or a "
            "precision with half the bytes, and `jaxmp train CONFIG --dry-run` to see what a step needs"
        )
    return None


def _is_out_of_memory(error: BaseException) -> bool:
    if "jax" not in sys.modules:
        return False
    from jax.errors import JaxRuntimeError

    return isinstance(error, JaxRuntimeError) and "RESOURCE_EXHAUSTED" in str(error)


@dataclass(frozen=True)
class TrainOptions:
    """What `jaxmp train` takes beside the fields of the experiment."""

    workdir: str = "runs"
    """Folder of the run folders: WORKDIR/CONFIG/HASH-sSEED."""
    dry_run: bool = False
    """Trace one step without running it: shapes, parameters, policy, memory, batches an epoch."""
    overwrite: bool = False
    """Start again where there is such a run already, instead of resuming it."""
    distributed: bool = False
    """Be one of several processes, over whose devices the run goes; Slurm, Open MPI and Kubernetes are found."""
    coordinator: str | None = None
    """HOST:PORT of process 0, where the cluster does not say it."""
    process_count: int | None = None
    """How many processes there are, where the cluster does not say it."""
    process_index: int | None = None
    """Which of them this is, from 0, where the cluster does not say it."""
    start_timeout: int = 300
    """Seconds to wait for all processes to be there."""


def train(arguments: list[str]) -> int:
    """Trains a config: a name or a Python file. A run that was stopped goes on where it was."""
    given = arguments
    config, arguments = _config_argument(arguments)
    prog = f"jaxmp train {config.name}"
    if "--distributed" in arguments and not {"-h", "--help"} & set(arguments):
        from jaxmp.distributed import parent

        if parent.is_needed():
            return parent.run(["train", *given])
        _join(_split_off_options(arguments, prog)[0])  # before the config, which may ask JAX for something
    experiment = config.experiment()
    # Parsed with the options, for one --help and for messages that know all names; then without them, since what is
    # left is what the run folder records.
    override(_with_options(experiment), arguments, prog=prog, description=config.docstring.partition("\n")[0])
    options, overrides = _split_off_options(arguments, prog)
    _refuse_empty(workdir=options.workdir)
    experiment = override(experiment, overrides, prog=prog)
    if not options.distributed:
        _refuse_without_distributed(options)

    from jaxmp.distributed import processes

    if options.dry_run:
        from jaxmp.commands.dry_run import dry_run

        lines = dry_run(experiment)
        if processes.is_first():
            print(lines)
        return DONE
    from jaxmp.runs.fit import fit

    fitted = fit(
        experiment,
        workdir=options.workdir,
        name=config.name,
        origin=config.origin(overrides),
        overwrite=options.overwrite,
    )
    if fitted.stopped:
        return STOPPED
    if not processes.is_first():
        return DONE
    if not fitted.trained:
        print(f"{fitted.path} is finished: nothing was trained, this is its summary; --overwrite starts again")
    _print_summary(fitted.summary)
    print(f"{'run':<16} {fitted.path}")
    return DONE


def _join(options: TrainOptions) -> None:
    from jaxmp.distributed import processes

    processes.join(options.coordinator, options.process_count, options.process_index, options.start_timeout)


def _refuse_without_distributed(options: TrainOptions) -> None:
    for name in ("coordinator", "process_count", "process_index"):
        if getattr(options, name) is not None:
            option = "--" + name.replace("_", "-")
            raise InputError(f"{option} {getattr(options, name)}: only with --distributed, which is not given")


@dataclass(frozen=True)
class AuditOptions:
    """What `jaxmp audit` takes beside the fields of the experiment."""

    strict: bool = False
    """Exit with 1 where there is a finding."""
    json: str | None = None
    """File to write the audit to as well, as JSON."""
    target: str | None = None
    """GPUs to compile the step for as well, which need not be there: h100, or h100x8 for eight of them. Takes the CUDA
    build of JAX."""


def audit(arguments: list[str]) -> int:
    """Shows which dtypes a config's train step runs in, and what is wrong with that, without running it."""
    config, arguments = _config_argument(arguments, _AUDIT_USAGE, AuditOptions)
    experiment = config.experiment()
    prog = f"jaxmp audit {config.name}"
    both = _with_options(experiment, AuditOptions)
    override(both, arguments, prog=prog, description=config.docstring.partition("\n")[0])
    options, overrides = _split_off_options(arguments, prog, AuditOptions)
    _refuse_empty(json=options.json)
    import jax

    from jaxmp.instruments import audit as instrument
    from jaxmp.instruments.target import Target
    from jaxmp.reports.page import write
    from jaxmp.runs.trainer import Training

    target = None if options.target is None else Target.parse(options.target)
    # Otherwise JAX does not load its CUDA build where there is no GPU.
    if target is not None and not jax.config.jax_platforms:  # type: ignore[attr-defined]
        jax.config.update("jax_platforms", "cpu")
    # pmap runs the same step, which wants its arrays stacked.
    experiment = override(experiment, overrides, prog=prog)
    experiment = dataclasses.replace(experiment, parallel=dataclasses.replace(experiment.parallel, mode="jit"))
    training = Training(experiment, None if target is None else target.mesh())
    step = training.devices.compile(training.train_step, (0, 0))
    policy, modules = experiment.policy, training.explain()
    report = instrument.audit(step, *training.arguments, policy=policy, modules=modules, target=target)
    print(report)
    if options.json is not None:
        write(Path(options.json), json.dumps(report.to_json(), indent=1) + "\n")
    return FAILED if options.strict and report.findings else DONE


@dataclass(frozen=True)
class CompareOptions:
    """What `jaxmp compare` takes beside the fields of the experiment."""

    precision: tuple[str, ...] = ("float32", "mixed_bfloat16", "mixed_float16")
    """Precisions to train under; the others are compared with the first."""
    seeds: tuple[int, ...] = (0, 1, 2)
    """Seeds; each is trained under every precision."""
    output: str | None = None
    """HTML file to write, and a JSON file beside it; WORKDIR/CONFIG/compare.html by default."""
    workdir: str = "runs"
    """Folder of the run folders; runs that are there are resumed, or read."""
    gradients: int = 0
    """At how many steps of the first run to compare gradients as well."""
    gradients_against: Literal["float64", "float32"] = "float64"
    """float64, without random masks; or float32, with those of training."""


def compare(arguments: list[str]) -> int:
    """Trains a config under several precisions and seeds, and writes what that shows as one HTML file."""
    config, arguments = _config_argument(arguments, _COMPARE_USAGE, CompareOptions)
    experiment = config.experiment()
    prog = f"jaxmp compare {config.name}"
    both = _with_options(experiment, CompareOptions)
    override(both, arguments, prog=prog, description=config.docstring.partition("\n")[0])
    options, overrides = _split_off_options(arguments, prog, CompareOptions)
    _refuse_empty(workdir=options.workdir, output=options.output)
    if any(argument.partition("=")[0] == "--seed" for argument in overrides):
        raise InputError("--seed: a comparison has several; expected --seeds 0 1 2")
    from jaxmp.studies import compare as runs

    comparison = runs.compare(
        config,
        options.precision,
        options.seeds,
        overrides=overrides,
        workdir=options.workdir,
        gradients=options.gradients,
        gradients_against=options.gradients_against,
    )
    if comparison is None:
        return STOPPED
    output = Path(options.output or Path(options.workdir) / config.name / "compare.html")
    runs.save(comparison, output)
    print(f"{'report':<16} {output}")
    failures = runs.failures(comparison)
    for failure in failures:
        print(f"jaxmp: failed: {failure}", file=sys.stderr)
    return FAILED if failures else DONE


@dataclass(frozen=True)
class FindPolicyOptions:
    """What `jaxmp find-policy` takes beside the fields of the experiment."""

    budget: float = 0.1
    """The most that the error of any parameter's gradient may be, in units."""
    unit: Literal["noise", "gradient", "float32"] = "noise"
    """What that error is a multiple of: the spread of the gradient over batches, its norm, or the error of float32."""
    half: str = "mixed_float16"
    """The policy of modules in half: mixed_float16 or mixed_bfloat16."""
    batches: int = 4
    """Training batches to take gradients on, at each state."""
    warmup_steps: int = 100
    """Float32 steps to a second state to take them at, beside the fresh one."""
    run: str | None = None
    """A run of the same model, to take them at the states of its checkpoints instead."""
    loss_scale: float | None = None
    """Loss scale, a power of two; by default the first of the scaler."""
    json: str | None = None
    """File to write what was measured to, as JSON."""


def find_policy(arguments: list[str]) -> int:
    """Finds which modules of a config's model can compute in half, by the error that this makes in the gradient."""
    config, arguments = _config_argument(arguments, _FIND_POLICY_USAGE, FindPolicyOptions)
    experiment = config.experiment()
    prog = f"jaxmp find-policy {config.name}"
    both = _with_options(experiment, FindPolicyOptions)
    override(both, arguments, prog=prog, description=config.docstring.partition("\n")[0])
    options, overrides = _split_off_options(arguments, prog, FindPolicyOptions)
    _refuse_empty(run=options.run, json=options.json)
    from jaxmp.studies import cheapest_policy as runs

    chosen = dataclasses.asdict(options)
    file = chosen.pop("json")
    found = runs.find_policy(override(experiment, overrides, prog=prog), **chosen)
    print(f"\n{found}")
    if file is not None:
        runs.save(found, config.name, Path(file))
    return DONE


def report(runs: tuple[str, ...], *, output: str | None = None, look: bool = False) -> int:
    """Writes what one or more runs did as one HTML file.

    Args:
      runs: Run folders, or folders with one run in them.
      output: File to write; of a single run, report.html in its folder by default.
      look: Of a run without --loop.ranges-every, do one step after its last checkpoint again, and show its ranges.
    """
    from jaxmp.reports.run_report import report as page
    from jaxmp.runs.run import Run

    _refuse_empty(output=output)
    for run in runs:
        _refuse_empty(run=run)
    found = [Run(run) for run in runs]
    if not found:
        raise InputError("report: expected RUN..., one or more run folders")
    if output is None and len(found) > 1:
        raise InputError(f"report: of {len(found)} runs there is no one folder for it; expected --output FILE")
    path = Path(output) if output is not None else found[0].path / "report.html"
    page(found, look=look).write(path)
    print(path)
    return DONE


def _refuse_empty(**paths: str | None) -> None:
    """An empty path would silently be the current folder: a variable of the shell that is not set, as a rule."""
    for name, path in paths.items():
        if path is not None and not path.strip():
            raise InputError(f"{name} {path!r}: expected a path, which is empty here; the current folder is .")


def _print_summary(summary: Mapping[str, Any], above: str = "") -> None:
    """One line a number, those of nested mappings under both names; tables are left to the file."""
    for name, value in summary.items():
        if isinstance(value, Mapping):
            _print_summary(value, f"{above}{name} ")
        elif not isinstance(value, list):
            print(f"{above + name:<16} {value:.6g}" if isinstance(value, float) else f"{above + name:<16} {value}")


_TRAIN_USAGE = (
    "usage: jaxmp train CONFIG [--FIELD VALUE ...] [--workdir runs] [--dry-run] [--overwrite] [--distributed]"
)
_AUDIT_USAGE = "usage: jaxmp audit CONFIG [--FIELD VALUE ...] [--strict] [--json FILE] [--target h100]"
_FIND_POLICY_USAGE = (
    "usage: jaxmp find-policy CONFIG [--budget 0.1] [--half mixed_float16] [--json FILE] [--FIELD VALUE ...]"
)
_COMPARE_USAGE = "usage: jaxmp compare CONFIG [--precision A B C] [--seeds 0 1 2] [--output FILE] [--FIELD VALUE ...]"


def _config_argument(
    arguments: list[str], synopsis: str = _TRAIN_USAGE, options: Any = TrainOptions
) -> tuple[ConfigFile, list[str]]:
    if not arguments or arguments[0].startswith("-"):
        command = synopsis.split()[2]
        about = (
            "CONFIG is a Python file with `get_config() -> jaxmp.Experiment`, or a name that `jaxmp configs` lists.\n"
            f"`jaxmp {command} CONFIG --help` shows every field of that config, with what it means and its value."
        )
        if {"-h", "--help"} & set(arguments):
            import tyro

            tyro.cli(options, args=["--help"], prog=f"jaxmp {command} CONFIG [--FIELD VALUE ...]", description=about)
        raise InputError(f"{command}: the first argument has to be CONFIG\n{synopsis}\n\n{about}")
    return ConfigFile.find(arguments[0]), arguments[1:]


def _with_options(experiment: Any, options: type = TrainOptions) -> Any:
    """`experiment` as a value of a class that has the fields of the `options` too, or in the place of its own."""
    own = {field.name for field in dataclasses.fields(options)}
    fields = {field.name for field in dataclasses.fields(experiment)}
    # Of an experiment with other fields, the experiment's own checks make no sense.
    checks = {"__post_init__": lambda self: None} if own & fields else {}
    both = dataclasses.make_dataclass("Arguments", [], bases=(options, type(experiment)), frozen=True, namespace=checks)
    return both(**{name: getattr(experiment, name) for name in fields - own})


def _split_off_options(arguments: list[str], prog: str, options: Any = TrainOptions) -> tuple[Any, list[str]]:
    """The options of the command among its valid arguments, and the other arguments in their order."""
    import tyro

    return tyro.cli(options, args=arguments, prog=prog, return_unknown_args=True)


def evaluate(run: str, *, split: Literal["train", "validation", "test"] = "test") -> int:
    """Prints the metrics of a run on a split of its data.

    Args:
      run: A run folder, or a folder with one run in it.
      split: Which split; its rows are those that the run's config says.
    """
    from jaxmp.runs.run import Run

    _refuse_empty(run=run)
    _print_summary(Run(run).evaluate(split))
    return DONE


def blame(run: str, *, step: int | None = None, json: str | None = None) -> int:
    """Names what overflowed in a skipped step of a run, and the loss scale and the rule that would have prevented it.

    Args:
      run: A run folder, or a folder with one run in it.
      step: The step to repeat, counted from 1; by default the last that was skipped. Of one that was not, it says how
        far it is from float32.
      json: File to write the answer to as well, as JSON.
    """
    from json import dumps

    from jaxmp.reports.page import write
    from jaxmp.runs.run import Run
    from jaxmp.studies.overflow import blame_run

    _refuse_empty(run=run, json=json)
    found = blame_run(Run(run), step)
    print(found)
    if json is not None:
        write(Path(json), dumps(found.to_json(), indent=1) + "\n")
    return DONE


def configs() -> int:
    """Lists the configs that can be trained by name: those in ./configs, then those that come with jaxmp."""
    found = config_file.available()
    if not found:
        raise InputError(f"no configs in {' or '.join(map(str, config_file.folders()))}")
    print(table([(name, ConfigFile.find(name).docstring.partition(chr(10))[0]) for name in sorted(found)]))
    return DONE


def data_list() -> int:
    """Lists the datasets that are prepared on this machine, and those that jaxmp prepares itself."""
    from jaxmp.data.catalog import data_folder, list_datasets, own_folder

    for dataset in list_datasets():
        print(f"{dataset.name:<20} {dataset.version:<8} {_rows(dataset)}")
    print(f"\nlooked in {data_folder()} ($JAXMP_DATA, $TFDS_DATA_DIR) and {own_folder()}")
    return DONE


def data_prepare(name: str) -> int:
    """Prepares a dataset, where it is not yet: jaxmp's own offline, others by TFDS's builder.

    Args:
      name: Name of the dataset, with its config where it has one: mnist, glue/sst2.
    """
    from jaxmp.data.catalog import prepare_dataset

    dataset = prepare_dataset(name)
    print(f"{dataset.name} {dataset.version} in {dataset.folder}: {_rows(dataset)}")
    return DONE


def data_info(name: str) -> int:
    """Says what is known of a prepared dataset: rows, features, licence, source.

    Args:
      name: Name of the dataset, with its config where it has one: mnist, glue/sst2.
    """
    from jaxmp.data.catalog import describe

    description = describe(name)
    dataset = description.dataset
    features = ", ".join(f"{key} {feature}" for key, feature in description.features.items())
    lines = {
        "dataset": f"{dataset.name} {dataset.version}",
        "folder": f"{dataset.folder} ({dataset.nbytes / 2**20:.1f} MiB)",
        "rows": _rows(dataset),
        "features": features,
        "about": description.text,
        "homepage": description.homepage,
        "licence": description.licence,
        "citation": description.citation,
    }
    for key, value in lines.items():
        if value:
            print(f"{key:<9} {value}")
    return DONE


def _rows(dataset: Any) -> str:
    return ", ".join(f"{split} {rows}" for split, rows in dataset.splits.items()) or "prepared when first used"


def doctor() -> int:
    """Shows devices, versions, native dtypes and data folders of this machine, and how to get what is missing."""
    from jaxmp.commands.doctor import report

    print(report())
    return DONE


COMMANDS: dict[str, Callable[..., int]] = {
    "train": train,
    "eval": evaluate,
    "audit": audit,
    "blame": blame,
    "compare": compare,
    "find-policy": find_policy,
    "report": report,
    "configs": configs,
    "data list": data_list,
    "data prepare": data_prepare,
    "data info": data_info,
    "doctor": doctor,
}
