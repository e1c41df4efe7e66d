"""`jaxmp predict RUN`: a run's predictions for a split, or for the rows of a file."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from jaxmp.commands.command import Command, require_path
from jaxmp.errors import DONE, InputError, local_path


@dataclass(frozen=True)
class Options:
    """The options of `jaxmp predict`."""

    run: str
    """Run folder, or a folder that contains one run."""
    split: Literal["train", "validation", "test"] = "test"
    """Split to predict, with the rows that the run's config gives it."""
    input: str | None = None
    """File to predict instead of a split: .csv, .jsonl, .parquet or .npz with the columns that the data has; - reads
    CSV or JSON lines from standard input."""
    output: str = "predictions.npz"
    """File to write, .npz, .csv, .jsonl or .parquet: a row for each row predicted, in the same order."""
    step: str = "last"
    """Weights to predict with: of the last checkpoint, of the best by the monitored metric, or of a step: last, best
    or N. Averaged weights are taken where the run has them."""


def predict(options: Options) -> int:
    """Writes a run's predictions for a split or a file; prints the confusion matrix where classes are known."""
    require_path(run=options.run, output=options.output, input=options.input)
    from jaxmp.data.tables import read_table, table_kind, write_table
    from jaxmp.reports.confusion import confusion
    from jaxmp.runs.folder import parse_step
    from jaxmp.runs.run import Run

    step = parse_step(options.step, f"--step {options.step}")
    table_kind(options.output, "output")
    folder = local_path("output", options.output).parent
    if not folder.is_dir():
        raise InputError(f"output {options.output!r}: there is no folder {str(folder)!r}")
    run = Run(options.run)
    rows = options.split if options.input is None else read_table(options.input)
    predicted = run.predict(rows, None if step == "last" else run.state(step))
    write_table(options.output, predicted)
    print(f"{'rows':<16} {len(next(iter(predicted.values()))):,}")
    task = run.experiment.task
    for text in confusion(predicted, getattr(task, "target", None), getattr(task, "padding", None)):
        print(f"\n{text}")
    print(f"{'predictions':<16} {options.output}")
    return DONE


COMMAND = Command("predict", Options, predict)
