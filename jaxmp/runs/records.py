"""`Records`: what a run writes down, and what it has come to so far."""

from __future__ import annotations

import collections
import contextlib
import functools
import math
import time
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxmp.data.dataset import Split
from jaxmp.distributed import processes
from jaxmp.experiment.experiment import Experiment
from jaxmp.experiment.identity import hashed_values
from jaxmp.instruments.flops import peak_flops
from jaxmp.instruments.ranges import StepRanges
from jaxmp.runs.console import Console
from jaxmp.runs.due import Due
from jaxmp.runs.folder import RunFolder
from jaxmp.runs.privacy import Spending
from jaxmp.runs.samples import write_samples
from jaxmp.runs.trainer import Trainer
from jaxmp.runs.writers import JsonLines, TensorBoard, WeightsAndBiases, Writer, as_images
from jaxmp.scaling.historical import scaler_exhausted
from jaxmp.scaling.transform import consecutive_skips, loss_scale, skipped_steps
from jaxmp.tasks.samples import Samples, Sampling
from jaxmp.training.feed import LONG_SKIP
from jaxmp.training.metrics import NAN_LOSS, Metrics, MetricSpec, compute, is_watched
from jaxmp.training.objective import ObjectiveSpec
from jaxmp.training.pruning import pruning_state
from jaxmp.training.state import TrainState


class Line(NamedTuple):
    """What a line of training metrics is made from: arrays that no later step is given to donate."""

    step: int
    due: bool
    """whether it is written; if not, it is only checked that the run can go on"""
    metrics: Metrics
    readings: dict[str, jax.Array]


class _Ranges(NamedTuple):
    """The ranges of a step, on the device."""

    step: int
    objective: str | None
    ranges: StepRanges
    scale: jax.Array


class Verdict(NamedTuple):
    """What a line says of the run."""

    problem: str | None = None
    """why the run cannot go on; None if it can"""
    stop: bool = False
    """whether any process was asked to stop"""


class Records:
    """The lines of a run: made from what was measured, handed to the writers; and the evaluations so far.

    Of several processes all make the same lines, and the first writes them.

    Args:
      trainer: of the run.
      folder: where the lines go.
      console: shows them; None if nothing does.
    """

    def __init__(self, trainer: Trainer, folder: RunFolder, console: Console | None = None):
        self._trainer, self._folder, self._loop = trainer, folder, trainer.experiment.loop
        self._console = console
        self._writers: list[Writer] = []
        self._objectives = trainer.objectives
        every = {name: spec.every for name, spec in self._objectives.items()}
        read = jax.jit(functools.partial(_read, every=every, rates=trainer.learning_rates))
        self._read = functools.partial(read, numbers=trainer.numbers)
        self._ranges: list[_Ranges] = []  # not written yet
        self._evaluated: list[tuple[int, float]] = []  # step and monitored metric of each evaluation
        self._seconds_before = 0.0  # of the sessions before this one
        self._began = time.perf_counter()
        self._pace = Pace()
        self._spending = Spending(trainer)

    def open(self, step: int) -> None:
        """Goes on after `step`: later lines are cut off, and the evaluations up to there are read back."""
        processes.from_first(lambda: self._open_writers(step))
        self._seconds_before, self._evaluated = processes.from_first(lambda: self._so_far(step))
        if self._trainer.is_private:
            self._spending = Spending.of(self._trainer, processes.from_first(self._folder.read_config))
        self._line_step = step

    def close(self) -> None:
        """Closes the writers, each of them."""
        with contextlib.ExitStack() as stack:
            for writer in self._writers:
                stack.callback(writer.close)

    def _open_writers(self, step: int) -> None:
        trainer, path = self._trainer, self._folder.path
        session = len(list(path.glob("events.out.tfevents.*")))  # each session has written one
        self._writers = [JsonLines(self._folder.metrics, resume_step=step)]  # refuses lines that cannot be read
        board = TensorBoard(path, resume_step=step)
        self._writers.append(board)
        if step == 0:
            self._describe(board)
        if self._console is not None:
            watched = {name: MetricSpec() for name in trainer.no_metrics if is_watched(name)}
            self._console.begin(trainer.steps, trainer.batches.per_epoch, trainer.metric_specs | watched, step)
            self._writers.append(self._console)
        if self._loop.wandb:
            past = self._folder.read_lines()
            writer = WeightsAndBiases(path, path.parent.name, trainer.experiment.to_json(), session=session, past=past)
            self._writers.append(writer)

    def _describe(self, board: TensorBoard) -> None:
        """Writes what is trained to TensorBoard: its text page, and its hyper-parameter page."""
        trainer = self._trainer
        experiment = trainer.experiment
        values = dict(hashed_values(experiment)) | {"seed": experiment.seed}
        rows = "\n".join(f"| {name} | {str(value).replace('|', '/')} |" for name, value in values.items())
        board.text("experiment", f"| field | value |\n|---|---|\n{rows}")
        policies = "\n".join(f"    {line}" for line in str(trainer.explain()).splitlines())
        board.text("policy", policies)
        splits = [split for split in trainer.splits if split != "train"]
        board.hyperparameters(values, [f"{split}/{name}" for split in splits for name in trainer.metric_specs])

    def show_images(self, batch: Mapping[str, Any]) -> None:
        """Shows the first images of a batch, as `loop.log_images` says, in TensorBoard and Weights & Biases."""
        images = as_images(batch, self._trainer.experiment.task.inputs, self._loop.log_images or 0)
        for writer in self._writers:
            if isinstance(writer, TensorBoard | WeightsAndBiases):
                writer.images("train/batch", images)

    def draw_samples(self, step: int, state: TrainState) -> None:
        """Draws the texts or pictures that `loop.log_samples` asks for, and keeps them; the state stays as it is.

        The seed is always 0, so that the same latent variables are seen at each evaluation.
        """
        sampling = Sampling(self._loop.log_samples)
        samples = self._trainer.sample(state, sampling)
        processes.from_first(lambda: self._keep(samples, sampling, step))

    def _keep(self, samples: Samples, sampling: Sampling, step: int) -> None:
        (board,) = (writer for writer in self._writers if isinstance(writer, TensorBoard))
        write_samples(self._folder, samples, sampling, step=step, seed=0, board=board)

    def _so_far(self, step: int) -> tuple[float, list[tuple[int, float]]]:
        """What the lines of the sessions before say: the seconds they took, and what they measured."""
        records = self._folder.read_lines()
        since = self._folder.read_config().get("best_since", 0)
        stopped_at = step if self._folder.read_stop(at=step) else None
        evaluated = counted_evaluations(records, self._trainer, since, stopped_at)
        return records[-1]["wall_seconds"] if records else 0.0, evaluated

    # Training lines.

    def dispatched(self, first: int, last: int, result: Any) -> None:
        """Notes that steps `first + 1` to `last` were handed to the device; `result` holds arrays that they make."""
        self._pace.dispatched(first, last, result)
        if self._console is not None:
            self._console.began()

    def interrupted(self) -> None:
        """Notes that something else than steps ran: an evaluation, a checkpoint."""
        self._pace.interrupted()

    def line(self, step: int, due: bool, metrics: Metrics, state: TrainState, *, stop: bool) -> Line:
        """Begins a line: nothing is waited for.

        Args:
          step: that it ends with.
          due: whether it is to be written.
          metrics: since the line before.
          state: after the step.
          stop: whether this process was asked to stop.
        """
        readings = self._read(state.opt_state, np.int32(step))
        return Line(step, due, metrics, readings | {"stop": self._trainer.devices.any_process(stop)})

    def write(self, line: Line | None) -> Verdict:
        """Writes a line if it is due, and says whether the run can go on. Waits for its numbers."""
        if line is None:
            return Verdict()
        values = compute(line.metrics)
        readings = {name: value.item() for name, value in jax.device_get(line.readings).items()}
        stop = readings.pop("stop")
        problems = [self._problem(line.step, name, values, readings) for name in self._objectives or (None,)]
        if line.due:
            rate, speed = self._pace.reached(line.step), {}
            if rate is not None:
                speed = {"steps_per_second": rate, "examples_per_second": rate * self._trainer.batches.mean_rows}
                speed |= flops_per_second(self._trainer, rate)
            self._record(line.step, "train", values | speed | device_peak(), readings)
        return Verdict(next(filter(None, problems), None), stop)

    def _problem(
        self, step: int, objective: str | None, values: dict[str, float], readings: dict[str, Any]
    ) -> str | None:
        """Why the run cannot go on after `step` for an objective, if so; takes out what no line shows."""
        of = "" if objective is None else f"/{objective}"
        in_a_row, exhausted = readings.pop(f"consecutive_skips{of}"), readings.pop(f"exhausted{of}")
        nan_loss, long_skip = values.pop(f"{NAN_LOSS}{of}"), values.pop(f"{LONG_SKIP}{of}")
        limit, last, steps, loss, scale = self._loop.max_consecutive_skips, step, "steps", "the loss", "the loss scale"
        if objective is not None:
            steps, loss, scale = f"steps of {objective}", f"the loss of {objective}", f"the loss scale of {objective}"
            every = self._objectives[objective].every
            last = (step - 1) // every * every + 1
        if in_a_row >= limit:
            return f"{in_a_row} {steps} in a row were skipped, the last of them step {last}"
        if long_skip > 0:  # a step was applied since
            return f"{limit} {steps} in a row were skipped, before step {step}"
        if nan_loss:  # no matter of the scale, which multiplies the loss and not what it is made from
            return f"{loss} is NaN, at or before step {step}"
        if exhausted:
            scaler = type(self._trainer.experiment.scaler_of(objective)).__name__
            return f"{scale} came to its floor, where {scaler} gives up, at or before step {step}"
        return None

    # Ranges.

    def add_ranges(self, step: int, ranges: StepRanges, state: TrainState, objective: str | None = None) -> None:
        """Notes the ranges of a step, counted from the state before it; they are fetched by `write_ranges`."""
        of = "" if objective is None else f"/{objective}"
        self._ranges.append(_Ranges(step, objective, ranges, self._readings(step, state)[f"loss_scale{of}"]))

    def write_ranges(self) -> None:
        """Writes the ranges that were noted, a record each."""
        for step, objective, ranges, scale in self._ranges:
            self._hand_on(
                {
                    "step": step,
                    "epoch": step / self._trainer.batches.per_epoch,
                    "split": "ranges",
                    **({} if objective is None else {"objective": objective}),
                    "loss_scale": float(scale),
                    "wall_seconds": self.seconds(),
                    "ranges": ranges.read(),
                }
            )
        self._ranges = []

    # Evaluations.

    def evaluate(self, step: int, state: TrainState, split: Split) -> dict[str, float]:
        """Evaluates a state on a split, writes the record, and returns the metrics."""
        values = self.measure(state, split)
        of_state = ("loss_scale", "skipped_steps", "sparsity")
        readings = {name: value.item() for name, value in jax.device_get(self._readings(step, state)).items()}
        kept = {name: value for name, value in readings.items() if name.partition("/")[0] in of_state}
        spent = {name: value for name, value in self.spent(step).items() if name == "epsilon"}
        self._record(step, split, values, kept | spent)
        if split == "validation" and is_pruned(readings, self._trainer.experiment):
            self._evaluated.append((step, values[self._trainer.monitor.name]))
        return values

    def count_last(self, step: int, values: Mapping[str, float]) -> None:
        """Counts the evaluation after the last step, `values`, though skipped steps or a stop delayed the pruning."""
        if not self.is_counted(step):
            self._evaluated.append((step, values[self._trainer.monitor.name]))

    def is_counted(self, step: int) -> bool:
        """Whether the evaluation after `step` counts for the best weights and for patience."""
        return any(at == step for at, _ in self._evaluated)

    def counts(self, step: int, state: TrainState) -> dict[str, Any]:
        """Applied and skipped steps and the loss scale after `step`, as in a line."""
        readings = {name: value.item() for name, value in jax.device_get(self._readings(step, state)).items()}
        counted = applied_steps(step, readings, self._objectives)
        skipped = {name: of for name, of in readings.items() if name.startswith("skipped_steps")}
        pruned = {name: of for name, of in readings.items() if name == "sparsity"}
        return counted | skipped | pruned | {name: of for name, of in readings.items() if name.startswith("loss_scale")}

    def spent(self, step: int) -> dict[str, float]:
        """`epsilon` and `delta` of the weights after `step`, those of runs before included; {} without privacy."""
        return self._spending.after(step)

    def measure(self, state: TrainState, split: Split) -> dict[str, float]:
        """Evaluates a state on a split, and returns the metrics."""
        return compute(self._trainer.evaluation(state, self._trainer.evaluated(split)))

    def best(self) -> tuple[int, float]:
        """Step and monitored metric of the best evaluation, the earliest of equals; (0, NaN) before the first."""
        return best_evaluation(self._evaluated, self._trainer)

    def out_of_patience(self) -> bool:
        """Whether so many evaluations in a row were no better that training stops early."""
        return is_out_of_patience(self._evaluated, self._trainer)

    def _readings(self, step: int, state: TrainState) -> dict[str, jax.Array]:
        return self._read(state.opt_state, np.int32(step))

    def seconds(self) -> float:
        """Wall seconds of all sessions of the run so far."""
        return self._seconds_before + time.perf_counter() - self._began

    def _record(self, step: int, split: str, values: dict[str, float], readings: dict[str, Any]) -> None:
        self._hand_on(
            {
                "step": step,
                **applied_steps(step, readings, self._objectives),
                "epoch": step / self._trainer.batches.per_epoch,
                "split": split,
                **values,
                **readings,
                "wall_seconds": self.seconds(),
            }
        )

    def _hand_on(self, record: dict[str, Any]) -> None:
        for writer in self._writers:
            writer.write(record)


def flops_per_second(trainer: Trainer, rate: float) -> dict[str, float]:
    """`tflops_per_second` of a speed in steps a second; and `mfu`, its share of what all devices can reach.

    MFU (Chowdhery et al. 2022, https://arxiv.org/abs/2204.02311, appendix B) is the FLOPs of the model a second by the
    devices' peak in the arithmetic of most of them: that of true float32 is a seventh of TF32's on an H100. It is not
    there where `PEAK_FLOPS` has no such device. What is computed again in the backward pass does not count.
    """
    by_kind = trainer.step_flops
    if not by_kind:
        return {}
    flops = rate * sum(by_kind.values())
    device = trainer.devices.mesh.devices.flat[0].device_kind
    peak = peak_flops(device, max(by_kind, key=lambda kind: by_kind[kind]))
    share = {} if peak is None else {"mfu": flops / (peak * trainer.devices.count)}
    return {"tflops_per_second": flops / 1e12, **share}


PACE_SECONDS = 5.0
"""how far back the speed is measured: a single line is seen late where the host is busy, and the next one early"""


class Pace:
    """The speed of the steps over the last seconds in which steps ran: compiling, evaluating and saving do not count.

    Args:
      seconds: how far back.
    """

    def __init__(self, seconds: float = PACE_SECONDS):
        self._seconds = seconds
        self._since: tuple[int, float] | None = None  # a step, and when it was done
        self._timed: collections.deque[tuple[int, float]] = collections.deque()  # numbers of steps, and their seconds

    def interrupted(self) -> None:
        """Leaves out the time up to the next dispatch, and that which it takes to compile."""
        self._since = None

    def dispatched(self, first: int, last: int, result: Any) -> None:
        """Notes that the call that makes steps `first + 1` to `last` has returned, with arrays in `result`."""
        if self._since is None:
            # XLA:CPU runs cheap programs within the call: then its time, which may be that of compiling, is left out.
            ran = all(leaf.is_ready() for leaf in jax.tree.leaves(result)[:1])
            self._since = last if ran else first, time.perf_counter()

    def reached(self, step: int) -> float | None:
        """Steps a second, now that `step` is done; None if none was timed since the last call."""
        before, now = self._since, time.perf_counter()
        self._since = step, now
        if before is None or before[0] >= step:
            return None
        timed = self._timed
        timed.append((step - before[0], now - before[1]))
        while sum(seconds for _, seconds in timed) - timed[0][1] >= self._seconds:
            timed.popleft()
        return sum(steps for steps, _ in timed) / max(sum(seconds for _, seconds in timed), 1e-9)


Evaluations = list[tuple[int, float]]
"""step and monitored metric of each evaluation"""


def counted_evaluations(
    records: Iterable[Mapping[str, Any]], trainer: Trainer, since: int = 0, stopped_at: int | None = None
) -> Evaluations:
    """The evaluations among lines that count for the best and for patience: those that this run's loop would make.

    Of a run with pruning, those from the step on in which it is pruned as far as it will be, and the last one.

    Args:
      records: lines of metrics.jsonl.
      trainer: of the run.
      since: evaluations at or before this step do not count: they measured something else.
      stopped_at: the step after which a hook ended the run, whose evaluation counts as the last one's does.
    """
    due, name = Due(trainer.experiment.loop, trainer.batches.per_epoch, trainer.steps), trainer.monitor.name
    evaluations = [line for line in records if line["split"] == "validation" and name in line and line["step"] > since]
    last = (trainer.steps, stopped_at)
    evaluations = [line for line in evaluations if is_pruned(line, trainer.experiment) or line["step"] in last]
    steps = [(line["step"], line) for line in evaluations]
    return [(step, _number(line[name])) for step, line in steps if due.evaluation(step) or step == stopped_at]


def is_pruned(readings: Mapping[str, Any], experiment: Experiment) -> bool:
    """Whether weights with these readings are pruned as far as the run prunes them; True without pruning."""
    share = experiment.pruning.share
    return not share or readings.get("sparsity", 0.0) >= float(np.float32(share))


def best_evaluation(evaluated: Evaluations, trainer: Trainer) -> tuple[int, float]:
    """Step and monitored metric of the best evaluation, the earliest of equals; (0, NaN) if all are NaN."""
    sign = 1 if trainer.monitor.best == "max" else -1
    numbers = [pair for pair in evaluated if not math.isnan(pair[1])]
    return max(numbers, key=lambda pair: (sign * pair[1], -pair[0]), default=(0, math.nan))


def is_out_of_patience(evaluated: Evaluations, trainer: Trainer) -> bool:
    """Whether so many of the last evaluations were no better that training stops early."""
    patience = trainer.experiment.loop.patience
    best_step, _ = best_evaluation(evaluated, trainer)
    return patience is not None and sum(step > best_step for step, _ in evaluated) >= patience


def applied_steps(step: int, readings: Mapping[str, Any], objectives: Mapping[str, ObjectiveSpec]) -> dict[str, int]:
    """The steps that changed the parameters, of those up to `step`; of several objectives, those of each.

    Args:
      step: number of steps so far.
      readings: `skipped_steps`, or `skipped_steps/NAME` of each objective.
      objectives: several objectives by name; {} of a single one.
    """
    if not objectives:
        return {"applied_steps": step - readings["skipped_steps"]}
    return {
        f"applied_steps/{name}": -(-step // spec.every) - readings[f"skipped_steps/{name}"]
        for name, spec in objectives.items()
    }


Rates = Mapping[str | None, Callable[[Any, Any], Any]]
"""`Trainer.learning_rates`"""


def _read(
    opt_state: Any, step: Any, *, numbers: Mapping[str, Any], every: Mapping[str, int], rates: Rates
) -> dict[str, jax.Array]:
    # As results of a program of its own they are copies: the state's buffers are donated to the next dispatch.
    if every:
        found: dict[str, jax.Array] = {}
        for name, n in every.items():
            of_one: Rates = {None: rates[name]} if name in rates else {}
            read = _read(opt_state[name], -(-step // n), numbers={"": numbers[name]}, every={}, rates=of_one)
            found |= {f"{reading}/{name}": value for reading, value in read.items()}
        return found | {"skipped_steps": skipped_steps(opt_state)}
    found = {
        "loss_scale": loss_scale(opt_state),
        "skipped_steps": skipped_steps(opt_state),
        "consecutive_skips": consecutive_skips(opt_state),
        "exhausted": scaler_exhausted(opt_state),
    }
    if (pruning := pruning_state(opt_state)) is not None:
        found["sparsity"] = pruning.sparsity
    if None in rates:  # that of the last step that was applied
        applied = jnp.maximum(step - skipped_steps(opt_state) - 1, 0)
        found["learning_rate"] = jnp.asarray(rates[None](applied, numbers[""]), jnp.float32)
    return found


def device_peak() -> dict[str, int]:
    """`device_peak_bytes`: the most bytes that one device of this process held at a time; {} where none tells."""
    peaks = [(device.memory_stats() or {}).get("peak_bytes_in_use") for device in jax.local_devices()]
    known = [peak for peak in peaks if peak is not None]
    return {"device_peak_bytes": max(known)} if known else {}


def _number(value: float | None) -> float:
    return math.nan if value is None else value
