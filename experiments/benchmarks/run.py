"""Runs benchmarks by name, keeps their results in one file a device and day, and makes the README of these files.

    python experiments/benchmarks/run.py peers start growth
    python experiments/benchmarks/run.py --quick peers          # short rounds, into results/quick-...: is all well?
    python experiments/benchmarks/run.py                        # only the tables and plots of README.md

A benchmark that compares jaxmp with other frameworks runs in an environment of its own, which the first run makes with
uv, in $XDG_CACHE_HOME/jaxmp/benchmarks: jaxmp as it stands here, `requirements.txt`, and torch. A benchmark that can
resume does not measure again what today's file has of the same git revision, without changes, and from the same
command; the others start anew. What a run measured
before it failed is kept as `NAME, partial`, and shown only where there is no whole result.
"""

from __future__ import annotations

import datetime
import importlib
import importlib.metadata
import importlib.util
import json
import os
import re
import shlex
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Annotated, Any

import jax
import tables
import tyro

from jaxmp.cli import script
from jaxmp.errors import InputError
from jaxmp.runs.provenance import provenance

FOLDER = Path(__file__).parent
RESULTS = FOLDER / "results"
README = FOLDER / "README.md"

OWN, PEERS = "own", "peers"
BENCHMARKS = {
    "peers": PEERS,
    "start": PEERS,
    "growth": OWN,
    "checkpoint": OWN,
    "pipeline": PEERS,
    "scaling_cost": OWN,
    "gpu": PEERS,
    "step_time": OWN,
    "ranges_cost": OWN,
    "watch_cost": OWN,
    "audit_time": OWN,
    "tune_digits": OWN,
    "pipelines": OWN,
    "streamed_memory": OWN,
    "gate_errors": OWN,
    "h100_program": OWN,
    "recipe_time": OWN,
}
"""each benchmark, a script of this folder, and the environment that it runs in"""
QUICK = {"peers", "start", "growth", "checkpoint", "pipeline", "scaling_cost", "gpu"}
"""the benchmarks that have a --quick"""
PARTIAL = ", partial"
"""ends the name of a benchmark in a file of results, where its run failed before the end"""
PLOTTED = ("start", "growth")
"""the benchmarks whose script has a `plot(axes, result)`"""


def environment_folder() -> Path:
    """Returns where the environment with the peers is, or will be: one for each version of Python."""
    cache = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache"))
    return cache / "jaxmp" / "benchmarks" / f"python{sys.version_info.major}.{sys.version_info.minor}"


def environment(torch: str) -> Path:
    """Returns the Python of the environment with the peers, which is made first if it is not there.

    Args:
      torch: the requirement of torch, "" for none.
    """
    folder = environment_folder()
    python = folder / "bin" / "python"
    if python.exists():
        return python
    uv = [sys.executable, "-m", "uv"] if _has_uv() else ["uv"]
    partial = folder.with_name(f"{folder.name}.partial")
    subprocess.run([*uv, "venv", "--clear", "--python", sys.executable, str(partial)], check=True)
    install = [*uv, "pip", "install", "--python", str(partial / "bin" / "python")]
    own = [f"{name}=={_version(name)}" for name in ("jax", "jaxlib")]
    subprocess.run(
        [*install, "--editable", str(FOLDER.parents[1]), "--requirements", str(FOLDER / "requirements.txt"), *own],
        check=True,
    )
    # The CPU's build where there is no GPU: the other brings several GB of CUDA.
    backend = [] if has_gpu() or "+" in torch else ["--torch-backend", "cpu"]
    if torch and subprocess.run([*install, torch, *backend]).returncode:
        print(f"{torch} could not be installed: it is left out. --torch names another build", file=sys.stderr)
    partial.rename(folder)
    return python


def _has_uv() -> bool:
    return subprocess.run([sys.executable, "-m", "uv", "--version"], capture_output=True).returncode == 0


def _version(package: str) -> str:
    return importlib.metadata.version(package)


def has_gpu() -> bool:
    """Whether JAX finds a GPU."""
    return jax.default_backend() == "gpu"


def device() -> str:
    """Returns the kind of the device as a part of a file name: `cpu`, or `nvidia-h100-80gb-hbm3`."""
    return re.sub(r"[^a-z0-9]+", "-", jax.devices()[0].device_kind.lower()).strip("-")


def tree() -> dict[str, Any] | None:
    """Returns this tree's git `revision`, and whether it is `dirty`; None outside a repository."""
    git: dict[str, Any] | None = provenance(patch=False)["git"]
    return git


def is_of(result: dict[str, Any], git: dict[str, Any] | None, command: str) -> bool:
    """Whether a command measured a result in a tree like `git`; False if that had changes, which are not known."""
    return git is not None and not git["dirty"] and result.get("git") == git and result.get("command") == command


def run(name: str, file: Path, *, quick: bool, again: bool, torch: str, extra: list[str]) -> None:
    """Runs one benchmark, and keeps its result in `file` under its name. Raises SystemExit if it fails.

    Args:
      name: one of `BENCHMARKS`.
      file: the results of this device and day.
      quick: short rounds, where the benchmark has them; measures all again.
      again: measures again what `file` has of this revision.
      torch: see `environment`.
      extra: further arguments of the script.
    """
    results = json.loads(file.read_text()) if file.exists() else {}
    options = [*(["--quick"] if quick else []), name, *(f"--extra={word}" for word in extra)]
    asked, now = shlex.join(["python", "experiments/benchmarks/run.py", *options]), tree()
    candidates = [results[key] for key in (name + PARTIAL, name) if key in results]
    begun = next((of for of in candidates if is_of(of, now, asked)), None)
    resumed = begun is not None and not again and not quick
    python = environment(torch) if BENCHMARKS[name] == PEERS else Path(sys.executable)
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder) / "result.json"
        if resumed:
            output.write_text(json.dumps(begun))
        command = [str(python), str(FOLDER / f"{name}.py"), "--output", str(output), *extra]
        env = os.environ | {"PYTHONPATH": str(FOLDER.parents[1])}  # this tree, whichever made the environment
        done = subprocess.run([*command, *(["--quick"] if quick and name in QUICK else [])], env=env)
        made = json.loads(output.read_text()) if output.exists() else None
    if resumed and made == begun:
        print(f"{name}: nothing more was measured than {file.name} had; --again measures it again")
        made = None if done.returncode else begun
    elif made is not None:
        made |= {"command": asked, "git": now}
    if made is not None:
        kept = {key: of for key, of in results.items() if key != name + PARTIAL}
        kept |= {name + (PARTIAL if done.returncode else ""): made}
        file.parent.mkdir(exist_ok=True)
        file.write_text(json.dumps(dict(sorted(kept.items())), indent=1) + "\n")
    if done.returncode:
        where = "" if made is None else f"; what it measured is in {file}"
        raise SystemExit(f"{name} ended with exit code {done.returncode}{where}")


def newest(folder: Path = RESULTS) -> dict[str, tuple[str, dict[str, Any]]]:
    """Returns the newest result of each benchmark on each device: `{"peers on cpu": (file's name, result)}`.

    A partial one, of a run that failed, only where there is no whole one; it has `"partial": True`.
    """
    whole: dict[str, tuple[str, dict[str, Any]]] = {}
    partial: dict[str, tuple[str, dict[str, Any]]] = {}
    for path in sorted(folder.glob("*.json"), key=lambda path: path.stem[-10:]):
        if path.stem.startswith("quick-"):
            continue
        for name, result in json.loads(path.read_text()).items():
            key = f"{name.removesuffix(PARTIAL)} on {path.stem[:-11]}"
            if name.endswith(PARTIAL):
                partial[key] = path.name, result | {"partial": True}
            else:
                whole[key] = path.name, result
    return partial | whole


def with_tables(readme: str, results: dict[str, tuple[str, dict[str, Any]]]) -> str:
    """Returns the text `readme` with what `tables` makes of the results between each pair of marks.

    The marks are `<!-- made by run.py: NAME -->` and `<!-- end -->`; NAME is a benchmark's, for its results on all
    devices.
    """

    def between(match: re.Match[str]) -> str:
        name, parts = match[2], []
        for key, (file, result) in results.items():
            if key.partition(" on ")[0] == name:
                plot = f"\n![{name}](results/{name}-{key.partition(' on ')[2]}.svg)\n" if name in PLOTTED else ""
                table = getattr(tables, name)(result).rstrip()
                parts.append(f"{table}\n{plot}\n{tables.origin(key, file, result)}\n")
        return f"{match[1]}\n{chr(10).join(parts) or 'Not measured yet.' + chr(10)}\n{match[3]}"

    return re.sub(r"(<!-- made by run\.py: (\w+) -->\n).*?(<!-- end -->)", between, readme, flags=re.DOTALL)


def draw(results: dict[str, tuple[str, dict[str, Any]]], folder: Path) -> None:
    """Draws the plot of each newest result whose script has a `plot`; matplotlib is in the environment of the peers."""
    if importlib.util.find_spec("matplotlib") is None:
        python = environment_folder() / "bin" / "python"
        if not python.exists():
            print("matplotlib is not installed here: the plots stay as they are")
            return
        subprocess.run([str(python), __file__], env=os.environ | {"PYTHONPATH": str(FOLDER.parents[1])}, check=True)
        return
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams |= {"svg.hashsalt": "jaxmp", "svg.fonttype": "none"}  # the same file of the same result
    from matplotlib import pyplot

    for key, (_, result) in results.items():
        name, _, device = key.partition(" on ")
        if name not in PLOTTED:
            continue
        figure, axes = pyplot.subplots(figsize=(8, 3), layout="constrained")
        importlib.import_module(name).plot(axes, result)
        figure.savefig(folder / f"{name}-{device}.svg", metadata={"Date": None})
        pyplot.close(figure)


def main(
    names: Annotated[tuple[str, ...], tyro.conf.Positional] = (),
    quick: bool = False,
    again: bool = False,
    torch: str = "torch",
    extra: tyro.conf.UseAppendAction[tuple[str, ...]] = (),
) -> None:
    """Runs the named benchmarks one after the other, then makes the tables and plots of README.md.

    Args:
        names: Names of benchmarks; none only makes the tables.
        quick: Short rounds, kept apart in results/quick-DEVICE-DATE.json, which no table shows; measures all again.
        again: Measure again what today's file has of this git revision.
        torch: The torch to install when the environment is made, torch==2.13.0+cpu, say, where UV_FIND_LINKS names the
            folder of that build; "" for none.
        extra: A further argument of the scripts; give it once for each, as in --extra=--models --extra=MLP.
    """
    for name in names:
        if name not in BENCHMARKS:
            raise InputError(f"{name}: there is no such benchmark; there are {', '.join(BENCHMARKS)}")
    for name in names:
        apart = quick or "--toys" in extra
        stem = f"{'quick-' if apart else ''}{device()}-{datetime.date.today().isoformat()}"
        run(name, RESULTS / f"{stem}.json", quick=quick, again=again, torch=torch, extra=list(extra))
    found = newest()
    draw(found, RESULTS)
    README.write_text(with_tables(README.read_text(), found))


if __name__ == "__main__":
    sys.exit(script(main))
