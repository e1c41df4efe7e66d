"""`reproduce`: runs the study of a paper, judges its claims, and writes what was found.

A paper is a folder with a file `paper.py` that defines `get_paper(quick: bool) -> Paper`. Arms that train are ordinary
run folders, arms that are computed are JSON files beside them, so that the same command resumes a study, and reads what
is finished. All tables, plots and verdicts are made from results.json alone: see `written`.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import linecache
import re
import sys
import time
import traceback
import types
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from jaxmp.distributed.signals import stop_signals
from jaxmp.errors import InputError, local_path, nearest
from jaxmp.experiment.config_file import ConfigFile
from jaxmp.experiment.experiment import Experiment
from jaxmp.experiment.reachable import made_by_function
from jaxmp.reports import paper_report
from jaxmp.reports.page import write
from jaxmp.runs.folder import RunFolder
from jaxmp.runs.provenance import provenance, without_patch
from jaxmp.runs.run import Run
from jaxmp.studies.claims import Compute, Paper, Results, Train
from jaxmp.studies.compare import train_cell
from jaxmp.studies.grid import Cell
from jaxmp.studies.paired import method
from jaxmp.text_table import without_nan

RESULTS = "results.json"
_NUMBERS = re.compile(r'\[\n([^][{}"]*)\n *\]')
"""a list of numbers in indented JSON, which is written in one line"""


def folders() -> list[Path]:
    """The folders in which papers are searched by name: `./experiments`, then that of jaxmp's checkout."""
    return [Path("experiments"), Path(__file__).parents[2] / "experiments"]


def available() -> dict[str, Path]:
    """The folder of each paper, by name; `./experiments` comes first."""
    found: dict[str, Path] = {}
    for folder in folders():
        for path in sorted(folder.glob("*/paper.py")):
            found.setdefault(path.parent.name, path.parent)
    return found


def find(name: str) -> Path:
    """Returns the folder of a paper, by its name or path. Raises InputError with the nearest name if there is none."""
    papers = available()
    if name in papers:
        return papers[name]
    path = local_path("reproduce", name)
    if (path / "paper.py").is_file():
        return path
    among = f"expected one of {', '.join(papers)}" if papers else "there is none; run it in a checkout of jaxmp"
    raise InputError(
        f"paper {name!r}: no paper.py in {' or '.join(str(folder / name) for folder in folders()[:1])}; "
        f"{among}, or a folder with a paper.py{nearest(name, papers)}"
    )


def load(folder: Path, *, quick: bool) -> Paper:
    """Runs `paper.py` of a folder and returns its paper.

    Raises: InputError if the file raises, with its line; if it has no `get_paper`, or that returns no Paper; if a claim
    names an arm that is not there, or two claims have one id.
    """
    file = folder / "paper.py"
    module = types.ModuleType(f"jaxmp_papers.{folder.resolve().name}")
    vars(module)["__file__"] = str(file.resolve())
    sys.modules[module.__name__] = module  # for typing and inspect, which look for the module of a function
    try:
        source = file.read_text(encoding="utf-8")
        linecache.cache[str(file)] = (len(source), None, source.splitlines(keepends=True), str(file))
        exec(compile(source, str(file), "exec", dont_inherit=True), vars(module))
        paper = module.get_paper(quick=quick)
    except Exception as error:
        lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == str(file)]
        where = f" in line {lines[-1]}" if lines else ""
        raise InputError(f"{file} raised{where}: {type(error).__name__}: {error}") from error
    if not isinstance(paper, Paper):
        raise InputError(f"{file}: get_paper() returned {paper!r:.60}; expected a jaxmp.studies.claims.Paper")
    ids = [claim.id for claim in paper.claims]
    for claim in paper.claims:
        if ids.count(claim.id) > 1:
            raise InputError(f"{file}: two claims have the id {claim.id!r}; expected one of each")
        for arm in claim.arms:
            if arm not in paper.arms:
                raise InputError(f"{file}: claim {claim.id!r}: no arm {arm!r}{nearest(arm, paper.arms)}")
    return paper


def reproduce(
    folder: Path, *, quick: bool = False, workdir: str = "runs", log: Callable[[str], None] = print
) -> dict[str, Any] | None:
    """Runs what is not finished yet of a paper's study, and judges its claims.

    Args:
      folder: the paper's folder.
      quick: run the paper's small version, whose verdicts say that everything works, and little more.
      workdir: folder of all runs, and of what is computed.
      log: takes each message to the user.

    Returns:
      What results.json holds: `provenance` of this command, the settings and metrics of each arm by seed, each with
      the `git` revision at which it was measured, and the claims with their findings. None if a signal stopped a run,
      after saving it.

    Raises: InputError as `load` and `jaxmp.fit` do.
    """
    paper, name = load(folder, quick=quick), folder.resolve().name
    workdir = str(local_path("workdir", workdir))
    arms: dict[str, dict[int, dict[str, Any]]] = {arm: {} for arm in paper.arms}
    total, done = len(paper.seeds) * len(paper.arms), 0
    for seed in paper.seeds:  # seed by seed, so that runs that are compared are close in time
        for arm, how in paper.arms.items():
            done += 1
            log(f"[{done}/{total}] {arm}, seed {seed}")
            if isinstance(how, Train):
                found = _trained(how, folder, name, seed, workdir, log)
            else:
                found = _computed_to_its_end(how, arm, seed, Path(workdir) / name / "computed", log)
            if found is None:  # stopped by a signal
                return None
            arms[arm][seed] = without_nan(found)
    results = {
        "paper": name,
        "title": paper.title,
        "authors": paper.authors,
        "url": paper.url,
        "quick": quick,
        **provenance(patch=False),
        "command": f"jaxmp reproduce {name}{' --quick' if quick else ''}",
        "seeds": list(paper.seeds),
        "seconds": sum(of["seconds"] for seeds in arms.values() for of in seeds.values()),
        "method": method(len(paper.seeds)),
        "arms": {arm: {"how": _described(how), "seeds": arms[arm]} for arm, how in paper.arms.items()},
    }
    return judged(paper, folder, results)


def judged(paper: Paper, folder: Path, results: Mapping[str, Any]) -> dict[str, Any]:
    """Returns `results` with the paper's claims, judged by the metrics that the results hold.

    `folder` is the paper's, beside whose file its configs are.

    Raises: InputError if they are of other arms, other settings of an arm, or other seeds than the paper has.
    """
    _require_same(paper, folder, results)
    found = results_of(results)
    claims = []
    for claim in paper.claims:
        finding = claim.judge([found.of(arm, claim.metric) for arm in claim.arms])
        said = {field.name: getattr(claim, field.name) for field in dataclasses.fields(claim) if field.name != "judge"}
        claims.append(without_nan({**said, **finding._asdict()}))
    return {**results, "claims": claims}


def _require_same(paper: Paper, folder: Path, results: Mapping[str, Any]) -> None:
    now = {"seeds": str(list(paper.seeds)), **{f"arm {arm!r}": _described(how) for arm, how in paper.arms.items()}}
    then = {"seeds": str(list(results["seeds"]))}
    then |= {f"arm {arm!r}": of["how"] for arm, of in results["arms"].items()}
    changed = [what for what in {**now, **then} if now.get(what) != then.get(what)]
    if not changed:
        changed = list(_other_experiments(paper, folder, results))
        now |= dict.fromkeys(changed, "other settings")
        then |= dict.fromkeys(changed, "those of its runs")
    if changed:
        what = changed[0]
        more = f", and {len(changed) - 1} more" if len(changed) > 1 else ""
        raise InputError(
            f"{results['paper']}: {RESULTS} was made by another paper.py: {what}: {now.get(what, 'none')} (was "
            f"{then.get(what, 'none')}){more}; expected jaxmp reproduce {results['paper']} again"
        )


def _other_experiments(paper: Paper, folder: Path, results: Mapping[str, Any]) -> Iterator[str]:
    """The arms whose runs were of another experiment: a run's folder has the hash of its experiment in its name."""
    for arm, how in paper.arms.items():
        seed, metrics = next(iter(results["arms"][arm]["seeds"].items()))
        if isinstance(how, Train) and "run" in metrics:
            experiment, _, _ = _subject(how, folder, "", int(seed))
            if RunFolder.of(experiment, "runs", "").path.name != Path(metrics["run"]).name:
                yield f"arm {arm!r}"


def results_of(results: Mapping[str, Any]) -> Results:
    """The metrics of each arm by seed, of what results.json holds."""
    return Results(
        {arm: {int(seed): metrics for seed, metrics in of["seeds"].items()} for arm, of in results["arms"].items()}
    )


def written(folder: Path, results: Mapping[str, Any], output: Path, readme: str) -> dict[Path, str]:
    """Makes the files of a paper from its results: results.json, a plot each, and README.md with its tables.

    Args:
      folder: the paper's folder.
      results: what `reproduce` returns.
      output: the folder that the files belong to.
      readme: the text of README.md, between whose marks the tables go; "" for none yet.

    Returns: the text of each file, by path. The same results give the same text.
    """
    paper = load(folder, quick=results["quick"])
    plots = {
        figure.name: paper_report.plot(
            figure.draw(results_of(results)), figure.title, figure.caption, results["command"]
        )
        for figure in paper.figures
    }
    captions = [(figure.name, figure.title, figure.caption) for figure in paper.figures]
    block = paper_report.block(results, paper.tables, captions)
    text = json.dumps(results, indent=1, allow_nan=False)
    return {
        output / RESULTS: _NUMBERS.sub(lambda found: f"[{' '.join(found[1].split())}]", text) + "\n",
        **{output / f"{name}.svg": text for name, text in plots.items()},
        output / "README.md": paper_report.between_marks(readme or f"# {paper.title}\n\n", block),
    }


def save(folder: Path, results: Mapping[str, Any], workdir: str) -> Path:
    """Writes the files of a paper: of a quick study into `WORKDIR/NAME/quick`, else into the paper's own folder.

    The table of all papers in the README.md above it is made anew, too. Returns the path of the README.md with the
    tables. Raises InputError if a file cannot be written.
    """
    output = local_path("workdir", workdir) / str(results["paper"]) / "quick" if results["quick"] else folder
    readme = folder / "README.md"
    text = readme.read_text(encoding="utf-8") if readme.is_file() else ""
    for path, content in written(folder, results, output, text).items():
        write(path, content)
    above = folder / ".." / "README.md"
    if not results["quick"] and above.is_file() and paper_report.has_marks(above.read_text(encoding="utf-8")):
        write(above.resolve(), overview(folder.resolve().parent))
    return output / "README.md"


def overview(experiments: Path) -> str:
    """Returns the README.md of a folder of papers, with its table of papers, claims and verdicts made anew."""
    found = [json.loads(path.read_text(encoding="utf-8")) for path in sorted(experiments.glob(f"*/{RESULTS}"))]
    papers = [of for of in found if "paper" in of and "claims" in of]
    papers += [_unrun(path.parent) for path in sorted(experiments.glob("*/paper.py")) if committed(path.parent) is None]
    text = (experiments / "README.md").read_text(encoding="utf-8")
    return paper_report.between_marks(text, paper_report.overview(papers))


def _unrun(folder: Path) -> dict[str, Any]:
    """What an overview says of a paper without results: its claims, not run yet."""
    paper = load(folder, quick=False)
    claims = [{"id": of.id, "says": of.says, "published": of.published, "checked": of.checked} for of in paper.claims]
    return {"paper": folder.name, "title": paper.title, "claims": claims}


def committed(folder: Path) -> dict[str, Any] | None:
    """What results.json of a paper's folder holds; None if there is none."""
    path = folder / RESULTS
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None


def _trained(
    how: Train, folder: Path, name: str, seed: int, workdir: str, log: Callable[[str], None]
) -> dict[str, Any] | None:
    """The metrics of one run, trained if it is not finished; None if a signal stopped it."""
    experiment, name, origin = _subject(how, folder, name, seed)
    result = train_cell(Cell("", seed, experiment, []), workdir, name, origin, log)
    if result is None:
        return None
    lines, path = result["metrics"], Path(result["run"])
    found: dict[str, Any] = {"run": path.relative_to(workdir).as_posix()}
    found["seconds"] = max((line["wall_seconds"] for line in lines if "wall_seconds" in line), default=0.0)
    if RunFolder(path).is_unused():  # it failed before it had a folder
        return {**found, "git": provenance(patch=False)["git"], "failed": result["failed"]}
    run = Run(path, experiment)
    found["git"] = without_patch(run.config.get("git"))
    if result["failed"]:
        return {**found, "failed": result["failed"]}
    summary = result["summary"]
    found |= {"skipped_steps": summary.get("skipped_steps", 0), **summary["test"]}
    return {**found, **(how.measure(run) if how.measure else {})}


def _subject(how: Train, folder: Path, name: str, seed: int) -> tuple[Experiment, str, dict[str, Any] | None]:
    """What an arm trains with a seed, the name of its runs (by default the paper's), and how to make it again."""
    if not isinstance(how.subject, str):
        return dataclasses.replace(how.subject, seed=seed), name, None
    file, overrides = _config(how.subject, folder), [*how.options, "--seed", str(seed)]
    return file.experiment(overrides), file.name, file.origin(overrides)


def _config(name: str, folder: Path) -> ConfigFile:
    beside = folder / name
    return ConfigFile.find(str(beside) if name.endswith(".py") and beside.is_file() else name)


def _computed_to_its_end(
    how: Compute, arm: str, seed: int, folder: Path, log: Callable[[str], None]
) -> dict[str, Any] | None:
    """`_computed`; None if a signal came meanwhile, after keeping what was computed."""
    with stop_signals() as stopped:
        try:
            found = _computed(how, arm, seed, folder)
        except Exception:
            if not stopped():  # a child process that got the signal too
                raise
        if not stopped():
            return found
    log("stopped after this arm; the same command goes on from there")
    return None


def _computed(how: Compute, arm: str, seed: int, folder: Path) -> dict[str, Any]:
    """The metrics of a computed arm, read if the same code, of jaxmp too, and arguments were run before."""
    identity = json.dumps([made_by_function(how.function), how.arguments, _sources()], sort_keys=True)
    digest = hashlib.sha256(identity.encode()).hexdigest()[:12]
    path = folder / f"{digest}-s{seed}.json"
    if path.is_file():
        return json.loads(path.read_text(encoding="utf-8"))
    start = time.perf_counter()
    found = dict(how.function(seed, **how.arguments))
    found["seconds"] = time.perf_counter() - start
    found["git"] = provenance(patch=False)["git"]
    content = json.dumps(without_nan({"arm": arm, **found}), indent=1, allow_nan=False)
    write(path, content + "\n")
    return json.loads(content)


@functools.cache
def _sources() -> str:
    """A digest of all Python files of jaxmp: `made_by_function` knows a package by its version alone."""
    package, digest = Path(__file__).parents[1], hashlib.sha256()
    for path in sorted(package.rglob("*.py")):
        content = path.read_bytes()
        digest.update(f"{path.relative_to(package).as_posix()} {len(content)}\n".encode() + content)
    return digest.hexdigest()


def _described(how: Train | Compute) -> str:
    if isinstance(how, Compute):
        arguments = ", ".join(f"{name}={value!r}" for name, value in how.arguments.items())
        return f"{how.function.__name__}(seed{', ' if arguments else ''}{arguments})"
    if not isinstance(how.subject, str):
        return "an experiment of paper.py"
    import shlex

    return shlex.join(["jaxmp", "train", how.subject, *how.options])
