"""`gate`: is each precision non-inferior to the first, by pairs of seeds that are planned before the first run?

A precision is not inferior if the mean of its paired differences is shown to be less than a margin worse. How many
pairs there are is fixed before the first, or the looks are: to look after every pair until one is content accepts far
more than 5 % of what it should not. So a file keeps the plan and every look, and seeds at which a precision was looked
at are not used for another plan of it, whatever else is compared along with it.

A run that diverged is never left out: a precision that fails where the first does not is not accepted, and is inferior
if it fails so often that chance does not explain it. A pair in which both fail says nothing of either, so that with any
such pair nothing is accepted: what is left is not what was planned.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from jaxmp.errors import InputError, local_path, nearest, number
from jaxmp.experiment.config_file import ConfigFile
from jaxmp.experiment.experiment import Experiment
from jaxmp.reports.gate_report import trained_before
from jaxmp.reports.page import write
from jaxmp.runs.checks import check
from jaxmp.runs.folder import RunFolder
from jaxmp.runs.trainer import Trainer
from jaxmp.studies.compare import train_cell
from jaxmp.studies.grid import Cell, grid
from jaxmp.text_table import without_nan

PAIRS = 10
"""pairs of seeds, by default"""
P = 0.05
"""one-sided p of the one look at a fixed number of pairs"""
LOOKS, P_OF_LOOKS = (5, 10, 20), 0.0206
"""numbers of pairs at which a plan with several looks decides, and the one-sided p of each: 5 % over the three together
(simulated: experiments/benchmarks/gate_errors.py)"""
POWER = 0.8
"""how often a gate shall accept what is not worse at all"""

LEAST_PAIRS = 3
"""the fewest pairs that a plan has, and that must have ended for the mean of their differences to decide"""

NOT_INFERIOR, INFERIOR, UNDECIDED = "not inferior", "inferior", "undecided"


class Verdict(NamedTuple):
    """What so many pairs say about one precision."""

    answer: str
    """not inferior, inferior or undecided"""
    pairs: int
    """pairs whose runs both ended"""
    mean: float
    """by how much it is worse on average, in the metric's unit; NaN without a pair"""
    spread: float
    """standard deviation of the differences; NaN for fewer than two pairs"""
    bound: float
    """upper end of the one-sided interval of the mean: as much worse it may be; NaN where there is none"""
    p: float
    """one-sided p that it is worse by the margin or more, had it been"""
    p_inferior: float
    """one-sided p of the opposite: that it is worse by less than the margin"""
    failed: int
    """pairs in which it failed and the first did not"""
    first_failed: int
    """pairs in which the first failed and it did not"""
    both_failed: int
    """pairs in which both failed"""
    p_failed: float
    """one-sided p that it fails no more often than the first, by the exact McNemar test; NaN if neither failed alone"""
    skewness: float
    """of the differences, positive where a few seeds are far worse; NaN where there is none"""


def decide(
    worse: Sequence[float], margin: float, p: float, failed: int = 0, first_failed: int = 0, both_failed: int = 0
) -> Verdict:
    """Decides about one precision by Student's t, one-sided, on the paired differences minus the margin.

    Args:
      worse: by how much it is worse in each pair of runs that both ended.
      margin: by how much it may be worse, in the metric's unit.
      p: what the one-sided p has to be below.
      failed: pairs in which it alone failed. With any, it is not accepted.
      first_failed: pairs in which the first precision alone failed. They are not held against it.
      both_failed: pairs in which both failed. With any, it is not accepted.

    So a precision is accepted only if every pair ended, but for those in which the first alone failed. By the mean it
    is accepted or inferior only if 3 pairs or more ended. Where all differences are equal there is no spread to test
    by; the p is then that of the signs, 2^-n.

    Sources: Schuirmann 1987 (one of the two one-sided tests); McNemar 1947, exact, for the failures.

    >>> decide([0.001, -0.002, 0.0, 0.001, 0.002], margin=0.01, p=0.05).answer
    'not inferior'
    >>> decide([0.001, -0.002, 0.0, 0.001, 0.002], margin=0.01, p=0.05, failed=1).answer
    'undecided'
    >>> decide([0.001, -0.002, 0.0, 0.001, 0.002], margin=0.01, p=0.05, both_failed=5).answer
    'undecided'
    """
    from scipy import stats  # here: importing it takes longer than `jaxmp --help` may

    values, n = np.asarray(worse, np.float64), len(worse)
    mean = float(values.mean()) if n else math.nan
    spread = float(values.std(ddof=1)) if n > 1 else math.nan
    accept, reject, bound, skewness = 1.0, 1.0, math.nan, math.nan
    if n > 1 and np.allclose(values, values[0], rtol=1e-9, atol=0):
        accept, reject = (2.0**-n, 1.0) if mean < margin else (1.0, 2.0**-n if mean > margin else 1.0)
    elif n > 1:
        error = spread / math.sqrt(n)
        accept = float(stats.t.cdf((mean - margin) / error, n - 1))
        reject = float(stats.t.sf((mean - margin) / error, n - 1))
        bound = mean + error * float(stats.t.isf(p, n - 1))
        skewness = float(stats.skew(values))
    alone = failed + first_failed
    p_failed = float(stats.binom.sf(failed - 1, alone, 0.5)) if alone else math.nan
    answer = UNDECIDED
    if (reject < p and n >= LEAST_PAIRS) or p_failed < p:
        answer = INFERIOR
    elif accept < p and n >= LEAST_PAIRS and not failed and not both_failed:
        answer = NOT_INFERIOR
    counts = failed, first_failed, both_failed
    return Verdict(answer, n, mean, spread, bound, accept, reject, *counts, p_failed, skewness)


def decidable_margin(pairs: int, p: float, power: float = POWER) -> float:
    """The margin, in standard deviations of the differences, by which what is not worse at all is accepted so often.

    >>> [math.ceil(100 * decidable_margin(n, 0.05)) / 100 for n in (3, 5, 10, 20)]
    [2.3, 1.36, 0.86, 0.58]
    """
    from scipy import optimize, stats

    threshold = stats.t.isf(p, pairs - 1)
    return float(optimize.brentq(lambda d: stats.nct.sf(threshold, pairs - 1, d * math.sqrt(pairs)) - power, 1e-3, 100))


class Plan(NamedTuple):
    """What a gate asks, fixed before its first run."""

    precisions: list[str]
    """all are compared with the first"""
    metric: str
    """on the test split, of the last weights"""
    direction: str
    """whether less (min) or more (max) of it is better"""
    margin: float
    """by how much a precision may be worse, in the metric's unit"""
    seeds: list[int]
    looks: list[int]
    """numbers of pairs after which it is decided"""
    p: float
    """one-sided p of each look"""


class Gate(dict[str, Any]):
    """The plan, every look and the answers, as JSON."""

    @property
    def is_open(self) -> bool:
        """Whether every precision is shown to be not inferior."""
        return all(verdict["answer"] == NOT_INFERIOR for verdict in self["verdicts"].values())

    @property
    def common_seeds(self) -> list[int]:
        """The seeds that every precision was trained with."""
        decided = [look["pairs"] for look in self["taken"] if len(look["verdicts"]) == len(self["precisions"]) - 1]
        return list(self["seeds"][: max(decided)])


def gate(
    subject: Experiment | ConfigFile,
    precisions: Sequence[str],
    *,
    margin: float,
    metric: str | None = None,
    seeds: Sequence[int] | None = None,
    looks: bool = False,
    name: str = "experiment",
    overrides: Sequence[str] = (),
    workdir: str = "runs",
    log: Callable[[str], None] = print,
) -> Gate | None:
    """Trains planned pairs of seeds, and says of each precision whether it is not inferior to the first.

    Args:
      subject: the experiment to train, or a config file.
      precisions: what `--precision` takes; all others are compared with the first.
      margin: by how much the metric may be worse, in its unit (an accuracy as a share).
      metric: of the last weights on the test split; by default the one that the experiment monitors.
      seeds: the pairs, planned before the first; by default 0 to 9, or to 19 with `looks`. Those that have finished
        runs already are named with every answer: they may have been looked at.
      looks: whether to decide after 5, 10 and 20 pairs instead of after all; what is decided is trained no further.
      name: of the experiment, as `jaxmp.fit` takes it; a config file has its own.
      overrides: for a config file, further arguments of `jaxmp train` for all runs.
      workdir: folder of all runs; the file `gate-<hash>.json` of all plans with this metric and first precision is in
        `workdir/name`.
      log: takes each message to the user.

    Returns:
      The gate, a dict for JSON; None if a signal stopped a run, after saving it.

    Raises: InputError as `grid` and `fit` do, for a margin that is not positive, and for seeds at which one of the
      precisions was looked at by another plan: other seeds, looks, p or margin.
    """
    plan, cells = _plan(subject, precisions, margin, metric, seeds, looks, overrides)
    name = subject.name if isinstance(subject, ConfigFile) else name
    experiments = [cell.experiment.hash for cell in cells[: len(plan.precisions)]]
    path = local_path("workdir", workdir) / name / f"gate-{_question(experiments[0], plan.metric)}.json"
    there = {cell.seed for cell in cells if RunFolder.of(cell.experiment, workdir, name).has_ended}
    before = _keep(path, plan, experiments, before=sorted(there))["before"]  # before the first run
    if before:
        log(trained_before(before))
    log(_power(plan))
    results: dict[tuple[str, int], dict[str, Any]] = {}
    verdicts: dict[str, dict[str, Any]] = {}
    study: dict[str, Any] = {}
    for done, pairs in zip([0, *plan.looks], plan.looks, strict=False):
        left = [each for each in plan.precisions[1:] if _answer(verdicts, each) == UNDECIDED]
        for cell in cells:
            if cell.seed not in plan.seeds[done:pairs] or cell.precision not in (plan.precisions[0], *left):
                continue
            log(f"[pair {plan.seeds.index(cell.seed) + 1}/{len(plan.seeds)}] {cell.precision}, seed {cell.seed}")
            origin = subject.origin(cell.overrides) if isinstance(subject, ConfigFile) else None
            result = train_cell(cell, workdir, name, origin, log)
            if result is None:
                return None
            results[cell.precision, cell.seed] = result
        for each in left:
            verdicts[each] = without_nan(_decide(plan, results, each, plan.seeds[:pairs])._asdict())
        study = _keep(path, plan, experiments, {"pairs": pairs, "verdicts": {each: verdicts[each] for each in left}})
        if not any(_answer(verdicts, each) == UNDECIDED for each in plan.precisions[1:]):
            break
    return Gate(file=str(path), **plan._asdict(), used=pairs, taken=study["looks"], before=before, verdicts=verdicts)


def _answer(verdicts: dict[str, dict[str, Any]], precision: str) -> str:
    return str(verdicts[precision]["answer"]) if precision in verdicts else UNDECIDED


def _plan(
    subject: Experiment | ConfigFile,
    precisions: Sequence[str],
    margin: float,
    metric: str | None,
    seeds: Sequence[int] | None,
    looks: bool,
    overrides: Sequence[str],
) -> tuple[Plan, list[Cell]]:
    if not number("--margin", margin) > 0:
        raise InputError(f"--margin {margin:g}: expected a positive number, in the unit of the metric")
    chosen = list(range(LOOKS[-1] if looks else PAIRS)) if seeds is None else list(seeds)
    if looks and len(chosen) != LOOKS[-1]:
        raise InputError(f"--looks: the last is at {LOOKS[-1]} pairs; expected as many --seeds, not {len(chosen)}")
    if len(chosen) < LEAST_PAIRS:
        fewest = f"{LEAST_PAIRS} or more, {PAIRS} by default"
        raise InputError(f"--seeds: {len(chosen)} pairs decide nothing; expected {fewest}")
    cells = grid(subject, precisions, chosen, overrides)
    if len(precisions) < 2:
        raise InputError(f"--precision {precisions[0]}: expected two or more; all are compared with the first")
    trainer = Trainer(cells[0].experiment)
    check(trainer)
    specs = trainer.metric_specs
    metric = trainer.monitor.name if metric is None else metric
    if metric not in specs:
        raise InputError(f"--metric {metric}: expected one of {', '.join(specs)}{nearest(metric, specs)}")
    if specs[metric].best is None:
        raise InputError(f"--metric {metric}: it has no better direction; expected another")
    if "test" not in trainer.splits:
        raise InputError("--margin: this data has no test split, on which precisions are compared")
    numbers, p = (list(LOOKS), P_OF_LOOKS) if looks else ([len(chosen)], P)
    return Plan(list(precisions), metric, str(specs[metric].best), float(margin), chosen, numbers, p), cells


def _question(first: str, metric: str) -> str:
    """A hash of what others are compared with: the first experiment's hash, however it is spelled, and the metric."""
    return hashlib.sha256(json.dumps([first, metric]).encode()).hexdigest()[:12]


def _keep(
    path: Path, plan: Plan, experiments: list[str], look: dict[str, Any] | None = None, before: Sequence[int] = ()
) -> dict[str, Any]:
    """Adds a plan, or a look of it, to the file of its question, and returns the plan with its looks as it is there.

    The file is locked and read again, so that two gates at once keep all plans and looks of both.

    Args:
      path: the file.
      plan: what is asked.
      experiments: the hash of the experiment under each of the plan's precisions.
      look: of the plan.
      before: the seeds with runs that had ended when the plan was made, for one that is not there yet.

    Raises: InputError if a seed of the plan was looked at by another plan with one of its experiments.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        lock = path.with_suffix(".lock").open("w")
    except OSError as error:
        raise InputError(f"{path} cannot be written: {error.strerror}; choose another --workdir") from error
    with lock:
        with contextlib.suppress(OSError):  # a file system without locks
            fcntl.flock(lock, fcntl.LOCK_EX)
        studies, asked = _read(path, plan, experiments), {"plan": plan._asdict(), "experiments": experiments}
        study = next((each for each in studies if asked.items() <= each.items()), None)
        if study is None:
            studies.append(study := {**asked, "before": list(before), "looks": []})
        if look is not None and look not in study["looks"]:
            study["looks"].append(look)
        write(path, json.dumps({"studies": studies}, indent=1) + "\n")
    return {"before": [], **study}


def _read(path: Path, plan: Plan, experiments: list[str]) -> list[dict[str, Any]]:
    """The studies in the file of a question.

    Raises: InputError if another plan looked at a seed of this one with one of its experiments; or if a file of an
      earlier version, which does not say with which, may have.
    """
    studies = []
    for file in sorted(path.parent.glob("gate-*.json")):
        try:
            found = json.loads(file.read_text())["studies"]
            looked = [(Plan(**study["plan"]), study.get("experiments")) for study in found if study["looks"]]
        except (ValueError, TypeError, KeyError) as error:
            raise InputError(f"{file} was not written by this version of jaxmp ({error})") from error
        if any(of is None and other.metric == plan.metric and {*other.seeds} & {*plan.seeds} for other, of in looked):
            raise InputError(
                f"--seeds: {file} has looks at some of them by an earlier jaxmp, which does not say of which "
                "experiments; expected fresh seeds, or the file moved away"
            )
        if file == path:
            studies = found
            _refuse_seeds_looked_at(file, plan, [other for other, of in looked if {*of[1:]} & {*experiments[1:]}])
    return studies


def _refuse_seeds_looked_at(path: Path, plan: Plan, others: Sequence[Plan]) -> None:
    """Raises InputError if one of `others`, which looked at a precision of the plan, did so by another plan."""
    for other in others:
        changed = [
            f"{field} {now} (was {was})"
            for field, was, now in zip(Plan._fields, other, plan, strict=True)
            if was != now and field != "precisions"
        ]
        again = {*other.seeds} & {*plan.seeds}
        if changed and again:
            fresh = max(seed for each in (*others, plan) for seed in each.seeds) + 1
            raise InputError(
                f"--seeds: {len(again)} of them were looked at before, by another plan: {', '.join(changed)}. Another "
                f"plan needs fresh seeds, from {fresh} on say, or what is accepted is no longer right in 95 % of "
                f"cases; {path} has every look"
            )


def _decide(
    plan: Plan, results: dict[tuple[str, int], dict[str, Any]], precision: str, seeds: Sequence[int]
) -> Verdict:
    worse, failed, first_failed, both_failed = [], 0, 0, 0
    sign = 1 if plan.direction == "min" else -1
    for seed in seeds:
        first, own = (_value(results[each, seed], plan.metric) for each in (plan.precisions[0], precision))
        failed += own is None and first is not None
        first_failed += first is None and own is not None
        both_failed += first is None and own is None
        if first is not None and own is not None:
            worse.append(sign * (own - first))
    return decide(worse, plan.margin, plan.p, failed, first_failed, both_failed)


def _value(result: dict[str, Any], metric: str) -> float | None:
    """The metric of the last weights on the test split; None if the run failed, or it is not finite."""
    value = None if result["failed"] else result["summary"]["test"].get(metric)
    return value if value is not None and math.isfinite(value) else None


def _power(plan: Plan) -> str:
    """What a gate says before it trains: which margin it can decide."""
    margins = [f"{math.ceil(100 * decidable_margin(n, plan.p)) / 100:.2f} with {n} pairs" for n in plan.looks]
    return (
        f"gate: a margin of {plan.margin:g} in {plan.metric}. What is not worse at all is accepted in {100 * POWER:g} "
        f"% of studies if the margin is at least, in standard deviations of paired differences: {', '.join(margins)}"
    )
