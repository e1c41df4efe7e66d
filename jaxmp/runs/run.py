"""`Run`: a run folder, read back."""

from __future__ import annotations

import collections
import dataclasses
import functools
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from jaxmp.data.dataset import Dataset, Split
from jaxmp.data.fingerprint import changed_rows, fingerprint
from jaxmp.data.pipeline import batch_of, evaluation_batches
from jaxmp.data.source import Columns, Source
from jaxmp.errors import InputError, local_path, nearest
from jaxmp.experiment.config_file import ConfigFile
from jaxmp.experiment.experiment import Experiment
from jaxmp.experiment.identity import identity_hash
from jaxmp.experiment.reachable import Comparison, made_by
from jaxmp.html.elements import Elements
from jaxmp.modules.dropout import DropoutByExample
from jaxmp.modules.linen import UnderPolicy
from jaxmp.modules.model import as_model
from jaxmp.runs.curves import Curve, curve_figures
from jaxmp.runs.folder import RunFolder
from jaxmp.runs.initial_weights import weights_by_path
from jaxmp.runs.trainer import Trainer
from jaxmp.scaling.transform import loss_scale
from jaxmp.tasks.samples import Samples, Sampling
from jaxmp.tasks.task import predictions
from jaxmp.training.evaluation import evaluation_key
from jaxmp.training.metrics import MetricSpec, compute, spec_of, specs_from_json
from jaxmp.training.state import TrainState
from jaxmp.trees import upcast

WEIGHTS = ("evaluated", "ema", "raw")
"""which weights of a state predictions are made with"""


class Run:
    """A run folder, read back: what was trained, how it went, and the trained model. It never writes.

        run = jaxmp.Run("runs/digits_mlp")
        run.summary["test"]["accuracy"]
        plt.plot(*run.curve("loss"))
        logits = run.apply(run.experiment.data.source("test")[np.arange(8)])

    Files are read on access, so a run can be watched while it trains.

    Args:
      path: the run folder, or a folder with exactly one run below it.
      experiment: what was trained; needed for a run that was started from Python, whose folder has no config file.

    Raises:
      InputError: there is no run, or there are several, or the experiment is not the one that was trained.
    """

    def __init__(self, path: str | Path, experiment: Experiment | None = None):
        self._folder = RunFolder.find(local_path("run", path))
        self._folder.read_config()  # refuses what is no run
        self._given = experiment
        self._states: dict[Any, TrainState] = {}  # by what names a checkpoint

    @property
    def path(self) -> Path:
        """The run folder."""
        return self._folder.path

    def __repr__(self) -> str:
        return f"Run({str(self.path)!r})"

    def _repr_html_(self) -> str:
        """Shows in a notebook how the run stands, its metrics and its curves; of one that trains, as far as it is."""
        metrics, specs, config = self.metrics, self.metric_specs, self.config
        summary = self.summary if self.has_ended else {}
        last = {**(metrics[-1] if metrics else {}), **summary}
        rows = [
            ("run", str(self.path)),
            ("state", f"failed: {self.failure}" if self.failure else "finished" if self.has_ended else "not ended"),
            ("precision", str(config["experiment"]["precision"])),
            ("seed", str(config["seed"])),
            ("steps", f"{last.get('steps', last.get('step', 0)):,}"),
            ("skipped", f"{last.get('skipped_steps', 0):,}"),
        ]
        for name, value in summary.get("test", {}).items():
            spec = spec_of(specs, name)
            rows.append((f"test {spec.label(name)}", "not finite" if value is None else spec.text(value)))
        found = Elements()
        found.table(("", ""), rows)
        if metrics:
            curve = Curve(str(config["experiment"]["precision"]), config["seed"], metrics, bool(self.failure), specs)
            found.figures(curve_figures([curve]))
        return found.cell()

    @functools.cached_property
    def config(self) -> dict[str, Any]:
        """The content of config.json: the resolved experiment, its source and overrides, versions, git, devices."""
        return self._folder.read_config()

    @property
    def metric_specs(self) -> dict[str, MetricSpec]:
        """The direction, unit and digits of each metric, by name; empty for a run of an earlier version."""
        return specs_from_json(self.config.get("metrics", {}))

    @property
    def metrics(self) -> list[dict[str, Any]]:
        """The lines of metrics.jsonl, in order, without those of `ranges`; a value is None if it was not finite.

        `pandas.DataFrame(run.metrics)` makes a DataFrame of them.
        """
        return [line for line in self._lines if line["split"] != "ranges"]

    @property
    def ranges(self) -> list[dict[str, Any]]:
        """The value ranges of single steps, if `loop.ranges_every` is set: `step`, `loss_scale`, `ranges`.

        `line["ranges"]["output_gradients"]["Dense_0"]` is a `jaxmp.instruments.ranges.Range.to_json`.
        """
        return [line for line in self._lines if line["split"] == "ranges"]

    @property
    def _lines(self) -> list[dict[str, Any]]:
        return self._folder.read_lines()

    def curve(self, metric: str, split: Split = "train") -> tuple[np.ndarray, np.ndarray]:
        """Returns steps, int64 (lines,), and a metric's values, float64 (lines,); NaN if one was not finite."""
        lines = [line for line in self.metrics if line["split"] == split]
        names = sorted({name for line in lines for name in line})
        if metric not in names:
            there = ", ".join(names) or "nothing"
            raise InputError(f"{self.path} has no {metric!r} on {split}; there is {there}{nearest(metric, names)}")
        lines = [line for line in lines if metric in line]
        values = [math.nan if line[metric] is None else line[metric] for line in lines]
        return np.array([line["step"] for line in lines], np.int64), np.array(values, np.float64)

    @property
    def summary(self) -> dict[str, Any]:
        """The content of summary.json. Raises InputError if the run has not ended."""
        summary = self._folder.read_summary()
        if summary is None:
            why = f"failed: {self.failure}" if self.failure else "has not ended; the same `jaxmp train` resumes it"
            raise InputError(f"{self.path} has no summary: the run {why}")
        return summary

    @property
    def failure(self) -> str | None:
        """Why the run failed; None if it did not."""
        return self._folder.read_failure()

    @functools.cached_property
    def experiment(self) -> Experiment:
        """The experiment, made again from the saved source and overrides. Its hash is compared with the recorded one.

        Raises: InputError if it cannot be made again, or comes out different.
        """
        self._folder.refuse_earlier_version(self.config)
        experiment = self._given or self._rebuild()
        expected, seed = self.config["hash"], self.config["seed"]
        identity = identity_hash(experiment, self.config.get("begins_with"))
        if (identity, experiment.seed) != (expected, seed):
            raise InputError(
                f"{self.path} trained the experiment of hash {expected} with seed {seed}; the one "
                f"{'given' if self._given else 'made again from its source'} has hash {identity} and seed "
                f"{experiment.seed}: {_first_difference(self.config['experiment'], experiment.to_json())}. "
                f"Versions then: {', '.join(f'{name} {number}' for name, number in self.config['versions'].items())}"
            )
        now = made_by(experiment)
        changed = Comparison(self.config.get("made_by", now), now).changed
        if changed:
            raise InputError(
                f"{', '.join(changed[:5])} has changed since {self.path} began, and its model would be made by other "
                f"code; {self.path / 'config.json'} keeps the files as they were, under source and imports"
            )
        return experiment

    def _rebuild(self) -> Experiment:
        if "source" not in self.config:
            raise InputError(
                f"{self.path} was started from Python and keeps no config file; give its experiment: "
                "jaxmp.Run(path, experiment)"
            )
        config = ConfigFile(self.config["name"], self.config["source"], self.config["file"])
        return config.experiment(self.config["overrides"])

    @property
    def has_ended(self) -> bool:
        """Whether the run has a summary."""
        return self._folder.has_ended

    @functools.cached_property
    def trainer(self) -> Trainer:
        """The pieces that the run trains with."""
        return Trainer(self.experiment)

    def state(self, step: int | Literal["last", "best"] = "last") -> TrainState:
        """The state of a checkpoint: the last, the best by the monitored metric, or that of a step.

        Raises: InputError if there is no such checkpoint; a damaged last one is warned of, and the one before taken.
        """
        trainer = self.trainer
        best_of, mode = trainer.monitor
        checkpoints = self._folder.checkpoints(keep=self.experiment.loop.keep, best_of=best_of, mode=mode)
        if step == "best":
            step = checkpoints.best_step() or "last"
        template = {"state": trainer.state_spec, "metrics": trainer.no_metrics}
        found = checkpoints.restore(template, step=None if step == "last" else step)
        checkpoints.close()
        if found is None:
            raise InputError(f"{self.path} has no checkpoint yet")
        return found[1]["state"]

    def weights(self, step: int | Literal["last", "best"] = "last", *, merged: bool = False) -> dict[str, np.ndarray]:
        """Parameters and model state of a checkpoint by path, such as Dense_0/kernel; averaged where the run has that.

        Args:
          step: see `state`.
          merged: with LoRA, the weights of the model without adapters that computes the same.
        """
        state = self.state(step)
        params = state.averaged_params
        if merged:
            params = self.experiment.lora.merge(params)
        return {path: np.asarray(leaf) for path, leaf in weights_by_path(params, state.model_state).items()}

    def count_ranges(self, step: int | Literal["last", "best"] = "last") -> list[dict[str, Any]]:
        """Lines of `ranges`, of the step after a checkpoint: that step is computed again, and its ranges counted.

        There is one line; of several objectives, one for each that runs in that step.

        Raises: InputError if there is no such checkpoint.
        """
        trainer = self.trainer
        devices = trainer.devices
        state = devices.get(devices.put(self.state(step)))
        at = int(state.step)
        feed = trainer.feed(fuse=False)
        batch = devices.shard_rows(feed.batch(at))
        feed.close()
        lines = []
        for name in trainer.due(at):
            ranges = trainer.step_ranges(name)(trainer.state_seen(name)(state, batch), batch)
            of = {} if name is None else {"objective": name}
            scale = float(loss_scale(state.opt_state if name is None else state.opt_state[name]))
            lines.append({"step": at + 1, "split": "ranges", **of, "loss_scale": scale, "ranges": ranges.read()})
        return lines

    def checkpoint_steps(self) -> list[int]:
        """The steps of which there is a checkpoint, ascending."""
        return self._folder.checkpoint_steps()

    def _chosen(self, state: TrainState | int | str | None, weights: str) -> TrainState:
        """The state whose `averaged_params` are the weights that are asked for."""
        if not isinstance(state, TrainState):
            at: Any = "last" if state is None else state
            if at not in self._states:
                self._states[at] = self.state(at)
            state = self._states[at]
        if weights not in WEIGHTS:
            raise InputError(f"weights={weights!r}: expected {', '.join(WEIGHTS)}{nearest(str(weights), WEIGHTS)}")
        if weights == "ema" and state.ema is None:
            raise InputError(f"weights='ema': {self.path} keeps no average of its weights (loop.ema_decay is not set)")
        return dataclasses.replace(state, ema=None) if weights == "raw" else state

    def apply(
        self, batch: dict[str, Any], state: TrainState | int | str | None = None, *, weights: str = "evaluated"
    ) -> Any:
        """The model's outputs for rows of the data, under the run's policy; from averaged weights where it has them.

        Args:
          batch: rows as the data has them (`run.experiment.data.source("test")[indices]`), at least the task's inputs;
            they go through the data's host transforms and are prepared as in evaluation.
          state: whose weights: "last" (the default), "best", the number of a step, or a state. Each is read once.
          weights: "evaluated", which evaluation uses: the moving average where the run keeps one; "ema", the average,
            or an InputError where there is none; "raw", the weights as they were trained.
        """
        return self.outputs(
            batch_of(self.experiment.data, batch, self.experiment.task.inputs), self._chosen(state, weights)
        )

    def outputs(self, batch: dict[str, Any], state: TrainState, *, first: int | None = None) -> Any:
        """The model's outputs for rows after the host transforms that are not prepared yet, with their "weight".

        `first` is the number of the first row in the split of which they are a batch: a model that draws in evaluation
        then draws for a row what evaluation does.
        """
        inputs = {name: jnp.asarray(column) for name, column in batch.items()}
        number = None if first is None else np.int32(first)
        return self._outputs(state.averaged_params, state.model_state, inputs, evaluation_key(state), number)

    @functools.cached_property
    def _outputs(self) -> Callable[..., Any]:
        experiment = self.experiment
        model = as_model(experiment.adapted_model).under(UnderPolicy(experiment.policy))
        prepared = experiment.data.prepare(train=False)

        @jax.jit
        def outputs(params: Any, model_state: Any, batch: dict[str, jax.Array], key: jax.Array, first: Any) -> Any:
            batch = prepared(batch, None)
            drawing = model
            if first is not None:
                index = first + jnp.arange(len(batch["weight"]), dtype=jnp.int32)
                drawing = model.under(DropoutByExample(index, len(index)))
            return drawing.apply(params, model_state, *(batch[name] for name in experiment.task.inputs), key=key)[0]

        return outputs

    def sample(self, sampling: Sampling, *, seed: int = 0, state: TrainState | int | str | None = None) -> Samples:
        """Draws texts or pictures from the trained model, under the run's policy, as `task.sample` does.

        Args:
          sampling: what is to be drawn.
          seed: seed of the draws.
          state: whose weights, as in `apply`.

        Raises:
          InputError: the task has no `sample`, or it cannot draw that.
        """
        return self.trainer.sample(self._chosen(state, "evaluated"), sampling, seed=seed)

    @property
    def samples(self) -> list[Path]:
        """The files of texts and pictures that were drawn, by the step of their weights."""
        paths = [path for path in self._folder.samples.glob("*-*") if path.suffix in (".txt", ".png")]
        return sorted(paths, key=lambda path: (int(path.name.partition("-")[0]), path.name))

    def source(self, split: Split = "train") -> Source:
        """The rows of a split after the host transforms.

        Raises: InputError if there is no such split, or its rows are not those that the run began with; names what
          differs.
        """
        source = self.trainer.source(split)
        recorded = self.config.get("rows", {})
        found = changed_rows(split, recorded[split], fingerprint(source)) if split in recorded else []
        if found:
            raise InputError(
                f"the data have changed since {self.path} began: {', '.join(found)}. Bring them back, or give other "
                "rows to jaxmp.Run(path).apply in Python"
            )
        return source

    def predict(
        self,
        rows: Split | Mapping[str, Any] = "test",
        state: TrainState | int | str | None = None,
        *,
        weights: str = "evaluated",
    ) -> dict[str, np.ndarray]:
        """The model's predictions for a split or for rows of your own, as `task.predictions` gives them.

        A model that draws in evaluation draws for the row of a number what evaluation does.

        Args:
          rows: name of a split; or arrays of shape (n, ...) by name, as the data has them, at least the task's inputs.
          state: whose weights, as in `apply`: "last", "best", the number of a step, or a state.
          weights: "evaluated", "ema" or "raw", as in `apply`.

        Returns:
          Arrays of shape (n, ...) in the order of the rows, floats of less than 32 bits as float32. The task's target
          is among them under its own name, where the rows have it.

        Raises:
          InputError: an input is missing, or has numbers that its dtype in the training rows does not hold; a
            prediction is called as the target; of a split, as `source` does.
        """
        data, task = self.experiment.data, self.experiment.task
        source = self.source(rows) if isinstance(rows, str) else _columns(data, rows, task.inputs)
        chosen = self._chosen(state, weights)
        found: dict[str, list[np.ndarray]] = collections.defaultdict(list)
        for number, batch in enumerate(evaluation_batches(source, data.eval_batch_size)):
            missing = [name for name in task.inputs if name not in batch]
            if missing:
                raise InputError(
                    f"the rows have no column {missing[0]!r}, an input of the model; they have "
                    f"{', '.join(sorted(set(batch) - {'weight'}))}{nearest(missing[0], batch)}"
                )
            there = int(np.sum(batch["weight"]))  # the last batch is filled up with rows of weight 0
            predicted = predictions(task, self.outputs(batch, chosen, first=number * data.eval_batch_size))
            target = getattr(task, "target", None)
            if target in batch:
                if target in predicted:
                    raise InputError(
                        f"{type(task).__name__}.predictions has {target!r}, the name of the task's target, which "
                        "stands beside them; expected another name"
                    )
                predicted[target] = batch[target]
            for name, values in predicted.items():
                found[name].append(np.asarray(upcast(values))[:there])
        return {name: np.concatenate(parts) for name, parts in found.items()}

    def evaluate(
        self, split: Split = "test", state: TrainState | int | str | None = None, *, weights: str = "evaluated"
    ) -> dict[str, float]:
        """The metrics of a split as the run evaluates it, under the policy and with the weights of `apply`.

        That is the whole split, but for `loop.limit_batches`. Raises InputError as `source` does.
        """
        self.source(split)  # refuses other rows
        trainer = self.trainer
        placed = trainer.devices.get(trainer.devices.put_state(self._chosen(state, weights)))
        return compute(trainer.evaluation(placed, trainer.evaluated(split)))


def _columns(data: Dataset, rows: Mapping[str, Any], inputs: Sequence[str]) -> Columns:
    """Rows of one's own as a source, after the host transforms of the data; see `batch_of`."""
    batch = batch_of(data, rows, inputs)
    return Columns({name: column for name, column in batch.items() if name != "weight"})


def _first_difference(recorded: Any, now: Any, where: str = "") -> str:
    """The path of the first leaf in which two JSON values differ, and both values."""
    if isinstance(recorded, dict) and isinstance(now, dict):
        for name in sorted({*recorded, *now}):
            if recorded.get(name) != now.get(name):
                return _first_difference(recorded.get(name), now.get(name), f"{where}.{name}" if where else name)
    return f"{where} was {recorded!r:.60} and is {now!r:.60}"
