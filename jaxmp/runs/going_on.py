"""Going on with a run: in its own folder with other settings, or in a folder of its own from the state of another."""

from __future__ import annotations

import dataclasses
import os
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp

from jaxmp.data.fingerprint import changed_rows
from jaxmp.distributed import processes
from jaxmp.errors import InputError, local_path
from jaxmp.experiment.canonical import canonical
from jaxmp.experiment.experiment import Experiment
from jaxmp.experiment.identity import HASHED, Difference, differences
from jaxmp.experiment.reachable import Comparison, made_by
from jaxmp.runs.checkpoint import Checkpoints, describe, named_leaves
from jaxmp.runs.folder import RunFolder, parse_step
from jaxmp.runs.initial_weights import as_leaf, check_only, choose_weights, part_of, weights_of, with_weights
from jaxmp.runs.records import best_evaluation, counted_evaluations, is_out_of_patience
from jaxmp.runs.trainer import Trainer
from jaxmp.scaling.transform import skipped_steps
from jaxmp.training import schedules
from jaxmp.training.state import TrainState

Log = Callable[[str], None]

DEVICES = "devices"
"""what a session calls the number of devices, which is no field of an experiment"""
PLACE = "seeds_together"
"""what config.json and a session call the run's place in a program of several seeds, `1 of 3`; null if it runs alone"""


NEIGHBOURS = 3
"""the most runs that `log_neighbours` speaks of"""


# By the same code, over the same data.


def refuse_other_code(folder: RunFolder, config: Mapping[str, Any], now: Mapping[str, Any], log: Log) -> None:
    """Refuses to go on with a run that was made by other code. A finished run is only read, whatever the packages are.

    Args:
      folder: of the run.
      config: its config.json.
      now: what `made_by` returns now.
      log: takes what cannot be compared.

    Raises: InputError that names what differs.
    """
    found = Comparison(config.get("made_by", now), now)
    if found.unknown:
        log(
            f"{_listed(found.unknown)}: kept as bytecode of another version of Python; whether it has changed since "
            f"{folder.path} began is not known"
        )
    if found.changed:
        raise InputError(
            f"{_listed(found.changed)} has changed since {folder.path} began, and a run is resumed only with the code "
            "that it began with; take back the change, choose another --workdir (workdir=), or begin again with "
            "--overwrite (overwrite=True)"
        )
    if found.packages and not folder.has_ended:
        raise InputError(
            f"{_listed(found.packages)}: {folder.path} began with another version, and a run is resumed only with the "
            "code that it began with; install that version, choose another --workdir (workdir=), or begin again with "
            "--overwrite (overwrite=True)"
        )


def refuse_other_rows(folder: RunFolder, config: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    """Refuses to go on with a run over other data. Raises InputError that names what differs in which split."""
    found = other_rows(config, now)
    if found:
        raise InputError(
            f"the data have changed since {folder.path} began: {_listed(found)}. A run is resumed only over the data "
            "that it began with (a load that draws without a seed makes others in each process); bring them back, "
            "choose another --workdir (workdir=), or begin again with --overwrite (overwrite=True)"
        )


def refuse_other_rows_if_readable(folder: RunFolder, config: Mapping[str, Any], trainer: Trainer, log: Log) -> None:
    """Refuses to give the results of a finished run for those of other data.

    Says so where the data cannot be read any more: a finished run needs them no more.

    Raises: InputError that names what differs in which split.
    """
    try:
        now = trainer.fingerprints()
    except InputError as error:
        log(f"{str(error)[:200]}; whether the data have changed since {folder.path} began is not known")
    else:
        refuse_other_rows(folder, config, now)


def other_rows(config: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """In what the splits differ from those of a run, by its config.json."""
    was = config.get("rows") or now  # a run of an earlier version has none
    gone = [f"there is no {split} split any more" for split in was if split not in now]
    new = [f"there is a {split} split now" for split in now if split not in was]
    return gone + new + [one for split in now if split in was for one in changed_rows(split, was[split], now[split])]


def log_sampled(rows: Mapping[str, Any], log: Log) -> None:
    """Says which splits are too large to be compared whole when a run is gone on with."""
    large = [f"{split} ({of['rows']} rows)" for split, of in rows.items() if of["sampled"]]
    if large:
        log(f"{', '.join(large)}: more than 64 MiB, so that 256 rows, spread evenly, tell whether the data changed")


def _listed(names: list[str]) -> str:
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")


# In the same folder.


def changed_settings(
    config: dict[str, Any], experiment: Experiment, devices: int | None = None, place: str | None = None
) -> list[Difference]:
    """What a session of a run would do differently from the session before: fields that operate or round.

    Args:
      config: the run's config.json.
      experiment: what is to be trained, of the same hash.
      devices: the number of devices now; None if it does not matter.
      place: its place in a program of several seeds now; None if it runs alone.
    """
    since = {path: pair["is"] for session in config.get("sessions", ()) for path, pair in session["changed"].items()}
    count, kept = since.pop(DEVICES, len(config["devices"])), since.pop(PLACE, config.get(PLACE))
    found = differences(config["experiment"], experiment, since)
    found = [difference for difference in found if difference.kind in ("operates", "rounds")]
    if devices is not None and devices != count:
        found.append(Difference(DEVICES, "rounds", count, devices))
    if place != kept:
        found.append(Difference(PLACE, "rounds", kept, place))
    return found


def log_changes(changes: Iterable[Difference], log: Log) -> None:
    """Says with which other settings a run goes on, and what they do to it."""
    for change in changes:
        if change.path == DEVICES:
            log(
                f"this run goes on on {change.now} devices, after {change.was}: sums are rounded in another order, and "
                "a module that draws noise by itself, other than by nn.Dropout, draws another"
            )
        elif change.path == PLACE:
            was, now = (f"as {of} seeds in one program" if of else "alone" for of in (change.was, change.now))
            log(f"this run goes on {now}, after {was}: sums are rounded in another order")
        elif change.kind == "rounds":
            log(f"going on with {change}: sums are rounded in another order, so that last digits may differ")
        else:
            log(f"going on with {change}: no bit of the state or of a metric depends on it")


def log_without_effect(changes: Iterable[Difference], log: Log) -> None:
    """Says which other settings have no effect on a finished run."""
    for change in changes:
        log(f"{change} has no effect: the run is finished")


def with_session(config: dict[str, Any], step: int, changes: Iterable[Difference]) -> dict[str, Any]:
    """config.json with another entry in `sessions`: the step from which, and the settings with which, a run goes on."""
    changed = {change.path: {"was": change.was, "is": change.now} for change in changes}
    return config | {"sessions": [*config.get("sessions", ()), {"step": step, "changed": changed}]}


def log_neighbours(
    folder: RunFolder,
    trainer: Trainer,
    fresh: TrainState,
    rows: Mapping[str, Any],
    origin: dict[str, Any] | None,
    log: Log,
) -> None:
    """Says which runs beside this new one differ from it in one field alone, and what --continue would do with them.

    Args:
      folder: of the new run.
      trainer: of the new run.
      fresh: its first state, or the shapes of it.
      rows: the fingerprints of its splits.
      origin: what it begins with; runs that begin with something else are not compared.
      log: takes the words.
    """
    said, experiment = 0, trainer.experiment
    for other in folder.beside():
        if said == NEIGHBOURS:
            return
        try:
            config = other.read_config()
            if config["seed"] != experiment.seed or config.get("begins_with") != origin:
                continue
            found = [one for one in differences(config["experiment"], experiment) if one.kind in HASHED]
        except (OSError, InputError):  # a run of another version
            continue
        if len(found) == 1:
            said += 1
            log(
                f"a new run: it differs from {other.path} in {found[0]} alone; {_would_do(other, trainer, fresh, rows)}"
            )


def _would_do(other: RunFolder, trainer: Trainer, fresh: TrainState, rows: Mapping[str, Any]) -> str:
    if not other.checkpoint_steps():
        return "that has no state yet with which --continue could go on"
    try:
        parent = Parent.find(other.path, "continue")
        parent.check(trainer, rows)
        parent.check_layout(trainer, fresh)
    except InputError as error:
        first, *leaves = str(error).splitlines()
        more = [f"  and {len(leaves) - 2} more"] if len(leaves) > 2 else []
        return "\n".join([f"it cannot be gone on with: {first}", *leaves[:2], *more])
    return f"--continue {other.path} goes on from its step {parent.step}, in a folder of its own, with all of its state"


EVALUATED = ("data.transforms", "data.host_transforms", "data.images", "data.mean", "data.std")
"""fields of the data that leave each step its rows, but change what is evaluated"""

SAME_BATCHES = ("data.augment", *EVALUATED)
"""fields of the data that leave each step its rows"""

OTHER_BATCHES = ("loop.limit_batches", "loop.overfit_batches")
"""fields of the loop that give steps other rows"""


def is_other_data(path: str) -> bool:
    """Whether a field that differs gives the steps of a run other rows."""
    return path in OTHER_BATCHES or (path.partition(".")[0] == "data" and not _is_in(path, SAME_BATCHES))


def _is_in(path: str, fields: Iterable[str]) -> bool:
    """Whether a path is that of one of the fields, or below one."""
    return any(f"{path}.".startswith(f"{name}.") for name in fields)


# From the state or the weights of another run.


class Carried(NamedTuple):
    """What a run that goes on from another begins with."""

    lines: list[dict[str, Any]]
    states: list[tuple[int, Any, dict[str, float]]]
    """step, state with metrics since the last line, and validation metrics: of the best weights, then of the last"""
    how: dict[str, Any]
    """how checkpoints are kept"""

    def write(self, folder: RunFolder) -> None:
        """Writes it. The state to go on from comes last, so that a kill on the way leaves none to resume from."""
        processes.from_first(lambda: folder.write_lines(self.lines))
        checkpoints = folder.checkpoints(**self.how)
        try:
            for step, tree, measured in self.states:
                checkpoints.save(step, tree, measured)
        finally:
            checkpoints.close()


@dataclasses.dataclass(frozen=True)
class Parent:
    """A run whose state, or whose weights, another run begins with."""

    folder: RunFolder
    config: dict[str, Any]
    """its config.json"""
    step: int
    """of the checkpoint"""
    how: Literal["continue", "init"]
    """whether all of its state is taken, or its weights alone"""
    only: tuple[str, ...] = ()
    """patterns of the weights that are taken; all if empty"""

    @classmethod
    def find(cls, text: str | os.PathLike[str], how: Literal["continue", "init"], only: Sequence[str] = ()) -> Parent:
        """The run that `RUN`, `RUN@STEP` or, to take weights from, `RUN@best` names.

        Raises: InputError if there is no such run, or it has no such checkpoint.
        """
        option = "--continue" if how == "continue" else "--init-from"
        name, at, which = os.fspath(text).rpartition("@")
        if not at or Path(os.fspath(text)).exists():
            name, which = os.fspath(text), "last"
        check_only(only)
        folder = RunFolder.find(local_path(f"{option} RUN", name))
        config, steps = folder.read_config(), folder.checkpoint_steps()
        folder.refuse_earlier_version(config)
        step = parse_step(which, f"{option} {os.fspath(text)}")
        if how == "continue" and step == "best":
            raise InputError(
                f"{option} {os.fspath(text)}: expected RUN or RUN@STEP; --init-from takes the best weights"
            )
        if not steps:
            raise InputError(f"{option} {os.fspath(text)}: {folder.path} has no checkpoint yet")
        if step == "best":
            checkpoints = folder.checkpoints(best_of=config.get("monitor"), mode=config.get("mode", "max"))
            step = checkpoints.best_step() or "last"
            checkpoints.close()
        step = steps[-1] if step == "last" else step
        if step not in steps:
            raise InputError(
                f"{option} {os.fspath(text)}: {folder.path} has no checkpoint of step {step}; there are "
                f"{', '.join(map(str, steps))}"
            )
        return cls(folder, config, step, how, tuple(only))

    @classmethod
    def of(cls, run: Path, config: Mapping[str, Any]) -> Parent:
        """The run that the one in the folder `run`, of this config.json, began with: where it was, or beside `run`.

        Raises: InputError if it is not there any more, or its checkpoint is not.
        """
        begins = config["begins_with"]
        for path in (Path(config["parent"]), run.absolute().with_name(f"{begins['hash']}-s{begins['seed']}")):
            folder = RunFolder(path)
            try:
                own = folder.read_config()
            except (OSError, InputError):
                continue
            is_it = (own["hash"], own["seed"]) == (begins["hash"], begins["seed"])
            if is_it and begins["step"] in folder.checkpoint_steps():
                return cls(folder, own, begins["step"], begins["how"], tuple(begins.get("only", ())))
        what = "state" if begins["how"] == "continue" else "weights"
        raise InputError(
            f"{run} began with the {what} of step {begins['step']} of {config['parent']}, where there is no such "
            "checkpoint any more; bring that run back there, or beside this one"
        )

    @property
    def takes_all(self) -> bool:
        """Whether all of its state is taken."""
        return self.how == "continue"

    @property
    def begins_with(self) -> dict[str, Any]:
        """What identifies the state or the weights, as JSON."""
        only = {"only": list(self.only)} if self.only else {}
        return {"how": self.how, "hash": self.config["hash"], "seed": self.config["seed"], "step": self.step, **only}

    def check(self, trainer: Trainer, rows: Mapping[str, Any]) -> None:
        """Refuses what --continue cannot do, from what config.json says; `rows` are the trainer's fingerprints.

        Raises: InputError if the rows of a step would be others, code of both was edited, or no step is left.
        """
        if not self.takes_all:
            return
        name = self.folder.path
        for one in differences(self.config["experiment"], trainer.experiment):
            if one.kind in HASHED and is_other_data(one.path):
                raise InputError(
                    f"--continue {name}: {one}, and its steps go over other rows; --init-from {name} takes its weights"
                )
        found = other_rows(self.config, rows)
        if found:
            raise InputError(
                f"--continue {name}: {_listed(found)}: its steps would go over other data; --init-from {name} takes "
                "its weights"
            )
        edited = self._compared(trainer.experiment).changed
        if edited:
            raise InputError(
                f"--continue {name}: {_listed(edited)} has changed since, and its state would be gone on with by other "
                f"code; take back the change, or take its weights alone: --init-from {name}"
            )
        if trainer.experiment.seed != self.config["seed"]:
            raise InputError(
                f"--continue {name}: seed = {trainer.experiment.seed} (was {self.config['seed']}), and its steps go "
                f"over other rows; --init-from {name} takes its weights"
            )
        if trainer.steps <= self.step:
            raise InputError(
                f"--continue {name}: it stands at step {self.step}, and this run has {trainer.steps} steps: nothing is "
                "left to do; expected more --loop.epochs or --loop.steps"
            )
        evaluated = counted_evaluations(self.lines(), trainer, self.best_since(trainer))
        if is_out_of_patience(evaluated, trainer):
            raise InputError(
                f"--continue {name}: {trainer.experiment.loop.patience} evaluations in a row were no better, so that "
                "loop.patience leaves nothing to do; expected a larger one, or None"
            )

    def _compared(self, experiment: Experiment) -> Comparison:
        """What was edited of the functions and values that both are made by, beyond what the experiment chooses."""
        recorded, now = self.config.get("made_by", {}), made_by(experiment)
        parts = {field.name for field in dataclasses.fields(experiment)}
        names = [name for name in recorded if name in now and re.split(r"[.\[]", name)[0] not in parts]
        return Comparison(*({name: of[name] for name in names} for of in (recorded, now)))

    def lines(self) -> list[dict[str, Any]]:
        """The lines of the parent up to the step, without those of the test split."""
        lines = self.folder.read_lines()
        return [line for line in lines if line["step"] <= self.step and line["split"] != "test"]

    def best_since(self, trainer: Trainer) -> int:
        """The step up to which evaluations do not count for the best: the parent's, if it measured something else."""
        same = (self.config.get("monitor"), self.config.get("mode")) == (trainer.monitor.name, trainer.monitor.best)
        same = same and not self._changes(trainer, "task", "pruning", *EVALUATED)
        return self.config.get("best_since", 0) if same else self.step

    def _changes(self, trainer: Trainer, *fields: str) -> bool:
        """Whether one of these fields of the parent's experiment differs in the run's."""
        return any(_is_in(one.path, fields) for one in differences(self.config["experiment"], trainer.experiment))

    # The whole state.

    def carry_over(self, trainer: Trainer, fresh: TrainState, log: Log) -> Carried:
        """Reads what a new run begins with: the state of the step and of the best one, in the layout of `fresh`.

        Raises: InputError if a leaf that has to be taken differs in path, shape or dtype; all are named.
        """
        checkpoints = self.folder.checkpoints()
        evaluated = counted_evaluations(self.lines(), trainer, self.best_since(trainer))
        best, _ = best_evaluation(evaluated, trainer)
        try:
            tree, began = self._converted(trainer, fresh, checkpoints, self.step)
            self._log(trainer, tree["state"], began, log)
            states = [(self.step, tree, checkpoints.metrics(self.step) if self.step in dict(evaluated) else {})]
            if best != self.step and best in checkpoints.steps() and best < self.step:
                of_best, why = processes.try_in_each(
                    lambda: (best, self._converted(trainer, fresh, checkpoints, best)[0], checkpoints.metrics(best))
                )
                if why is None:
                    states.insert(0, of_best)
                else:
                    log(f"the best weights of {self.folder.path}, of step {best}, are not taken over: {why}")
        finally:
            checkpoints.close()
        how = {"keep": trainer.experiment.loop.keep, "best_of": trainer.monitor.name, "mode": trainer.monitor.best}
        return Carried(self.lines(), states, how)

    def take_state(self, trainer: Trainer, fresh: TrainState) -> TrainState:
        """All of the state of the step, in the layout of `fresh`, as a run that goes on from there begins with it.

        Raises: InputError as `carry_over` does.
        """
        checkpoints = self.folder.checkpoints()
        try:
            return self._converted(trainer, fresh, checkpoints, self.step)[0]["state"]
        finally:
            checkpoints.close()

    def check_layout(self, trainer: Trainer, fresh: TrainState) -> None:
        """Raises InputError, which names each, if leaves that have to be taken differ in path, shape or dtype."""
        checkpoints = self.folder.checkpoints()
        try:
            self._taken(trainer, fresh, checkpoints.leaves(self.step))
        finally:
            checkpoints.close()

    def _taken(self, trainer: Trainer, fresh: TrainState, saved: dict[str, str]) -> tuple[dict[str, str], list[str]]:
        """The saved path of each leaf that is taken, by its path in the new state; and what begins fresh."""
        wanted = named_leaves({"state": fresh, "metrics": trainer.no_metrics})
        expected = {path: describe(leaf) for path, leaf in wanted.items()}
        scaler = trainer.experiment.make_scalers() or trainer.experiment.make_scaler()
        same_scaler = self.config.get("scaler") == canonical(scaler, "scaler")
        same_scaler = same_scaler and all(
            saved.get(path) == expected.get(path) for path in {*saved, *expected} if _of_scaler(path)
        )
        same_metrics = all(
            saved.get(path) == expected.get(path) for path in {*saved, *expected} if part_of(path) == "metrics"
        )
        takes: dict[str, str] = {}
        began, wrong = [], []
        here, there = INNER + "sparsity" in expected, INNER + "sparsity" in saved  # whether there are masks
        same_pruning = here and there and not self._changes(trainer, "pruning")
        for path in expected:
            source = path
            if here and _of_pruning(path):
                source = path if same_pruning else ""
            elif here != there and path.startswith(INNER):  # the state inside pruning's, or without it
                within = path.removeprefix(INNER).removeprefix("inner_state/" if here else "")
                source = f"{INNER}{'inner_state/' if there else ''}{within}"
            elif _of_scaler(path):
                source = path if same_scaler else ""
            elif part_of(path) == "metrics":
                source = path if same_metrics else ""
            elif part_of(path) == "ema" and path not in saved:
                source = path.replace("state/ema", "state/params", 1)
                began.append("the moving average of the weights (from the weights)")
            elif part_of(path) == "compensation" and path not in saved:
                source = ""
                began.append("the compensation of the rounding of updates")
            if not source:
                continue
            takes[path] = source
            averaged = part_of(path) == "ema" and source != path
            if not averaged and saved.get(source) != expected[path]:
                wrong.append(f"  {path}: {saved.get(source, 'nothing')} there, {expected[path]} here")
        sources = set(takes.values())
        dropped = [path for path in saved if path not in sources and not (there and _of_pruning(path))]
        wrong += [
            f"  {path}: {saved[path]} there, nothing here"
            for path in dropped
            if not _of_scaler(path) and part_of(path) not in ("metrics", "ema", "compensation")
        ]
        if wrong:
            raise InputError(
                f"--continue {self.folder.path}: its state of step {self.step} is of another model, optimizer or "
                "precision (--init-from takes weights alone):\n" + "\n".join(wrong)
            )
        if not same_scaler:
            began.append("the loss scale")
        if here and not same_pruning:
            began.append("the masks of pruning")
        return takes, list(dict.fromkeys(began))

    def _converted(
        self, trainer: Trainer, fresh: TrainState, checkpoints: Checkpoints, step: int
    ) -> tuple[Any, list[str]]:
        """The state and metrics of a checkpoint in the layout of `fresh`, and what of them begins fresh."""
        template: Any = {"state": fresh, "metrics": trainer.no_metrics}
        wanted = named_leaves(template)
        takes, began = self._taken(trainer, fresh, checkpoints.leaves(step))
        read = checkpoints.read_leaves(step, {source: wanted[path] for path, source in takes.items()})
        if (place := INNER + "step") in wanted and place not in takes:  # pruning begins: its schedule counts all steps
            applied = int(read["state/step"]) - int(read["state/opt_state/skipped"])
            wanted[place] = as_leaf(jnp.int32(applied), wanted[place])
        leaves = [as_leaf(read[takes[path]], leaf) if path in takes else leaf for path, leaf in wanted.items()]
        return jax.tree.unflatten(jax.tree.structure(template), leaves), began

    def _log(self, trainer: Trainer, state: TrainState, began: list[str], log: Log) -> None:
        """Says what goes on, with which learning rate, and what begins fresh."""
        log(f"going on from step {self.step} of {self.folder.path}")
        packages = self._compared(trainer.experiment).packages
        if packages:
            log(f"that run began with other versions: {_listed(packages)}")
        for name in trainer.objectives or (None,):
            then, now = self._rates(trainer, state, name)
            of = "" if name is None else f" of {name}"
            if then is not None or now is not None:
                log(f"the learning rate{of} at its end was {_shown(then)}, and is {_shown(now)} now")
        if began:
            log(f"fresh: {', '.join(began)}")

    def _rates(self, trainer: Trainer, state: TrainState, name: str | None) -> tuple[float | None, float | None]:
        """The learning rate of an objective at the parent's end, and now; None where it is not known."""
        was, is_ = self.config["experiment"]["optimizer"], trainer.experiment.optimizer
        opt_state, every = state.opt_state, 1
        if name is not None:
            opt_state, every = opt_state[name], trainer.objectives[name].every
            was = was if not isinstance(was, dict) or "class" in was else was.get(name)
            is_ = trainer.experiment.optimizer_of(name)
        steps = self.config.get("steps")
        applied = -(-int(state.step) // every) - int(skipped_steps(opt_state))
        then = _rate_of_json(was, None if steps is None else -(-steps // every), applied)
        return then, _rate(is_, -(-trainer.steps // every), applied)

    # The weights alone.

    def give_weights(self, trainer: Trainer, fresh: TrainState, log: Log) -> TrainState:
        """The fresh state of a run, with the parent's weights; averaged ones where it keeps an average.

        Batch statistics and other state of the model go with the weights.

        Raises: InputError if a leaf differs in path, shape or dtype, or a pattern of --init-only matches none.
        """
        checkpoints = self.folder.checkpoints()
        try:
            saved, mine = checkpoints.leaves(self.step), weights_of(fresh)
            what = f"--init-from {self.folder.path}: its weights of step {self.step}"
            adapters = bool(trainer.experiment.lora.rank)
            taken = choose_weights(saved, fresh, self.only, what, adapters=adapters)
            averaged = {path: path.replace("state/params", "state/ema", 1) for path in taken}
            source = {path: averaged[path] if averaged[path] in saved else path for path in taken}
            read = checkpoints.read_leaves(self.step, {source[path]: mine[path] for path in taken})
        finally:
            checkpoints.close()
        log(f"weights of step {self.step} of {self.folder.path}: {len(taken)} of {len(mine)} leaves, the others fresh")
        return with_weights(fresh, {path: read[source[path]] for path in taken})


INNER = "state/opt_state/inner_state/"
"""where the state of the optimizer inside loss scaling lies"""


def _of_pruning(path: str) -> bool:
    """Whether a leaf is of the state of pruning, and not of the optimizer inside it."""
    return path.startswith(INNER) and path.removeprefix(INNER).partition("/")[0] in ("masks", "sparsity", "step")


def _of_scaler(path: str) -> bool:
    """Whether a leaf is of the state of a scaler, and not of the optimizer inside its loss scaling."""
    names = path.split("/")
    if names[:2] != ["state", "opt_state"] or "inner_state" in names:
        return False
    return "scaler" in names or names[-1] == "skipped_scale"


def _rate(optimizer: Any, steps: int | None, applied: int) -> float | None:
    """The learning rate of the step after `applied` ones; None if the optimizer does not say it."""
    schedule: Any = getattr(optimizer, "schedule", None)
    peak = getattr(optimizer, "learning_rate", None)
    if schedule is None or peak is None or steps is None:
        return None
    return float(schedules.make_schedule(schedule, peak, steps)(applied))


def _rate_of_json(optimizer: Any, steps: int | None, applied: int) -> float | None:
    """The same of a recorded optimizer; None if its schedule is not one of jaxmp's."""
    recorded = optimizer.get("schedule") if isinstance(optimizer, dict) else None
    if not isinstance(recorded, dict) or steps is None:
        return None
    name = str(recorded.get("class", ""))
    kind = getattr(schedules, name.removeprefix("jaxmp."), None) if name.startswith("jaxmp.") else None
    if kind is None:
        return None
    fields = {name: tuple(of) if isinstance(of, list) else of for name, of in recorded.items() if name != "class"}
    return float(kind(**fields).make(optimizer["learning_rate"], steps)(max(applied - 1, 0)))


def _shown(rate: float | None) -> str:
    return "unknown" if rate is None else f"{rate:.3g}"
