from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path

import pytest

FOLDER = Path(__file__).parents[1] / "experiments" / "benchmarks"


@pytest.fixture
def benchmark(monkeypatch):
    """Imports a script of experiments/benchmarks."""
    monkeypatch.syspath_prepend(FOLDER)
    before = set(sys.modules)
    yield importlib.import_module
    for name in set(sys.modules) - before:  # names such as `run` and `start` are nobody's else
        if str(FOLDER) in str(getattr(sys.modules[name], "__file__", "")):
            del sys.modules[name]


def test_the_readme_is_made_of_the_results(benchmark):
    run = benchmark("run")
    readme = run.README.read_text()
    assert run.with_tables(readme, run.newest()) == readme
    for name in run.BENCHMARKS:
        assert (FOLDER / f"{name}.py").exists()
        assert f"<!-- made by run.py: {name} -->" in readme


def test_the_newest_result_of_each_device_is_shown_and_none_of_a_quick_run(benchmark, tmp_path):
    run = benchmark("run")
    for stem, value in {
        "cpu-2026-01-02": 1,
        "cpu-2026-01-01": 2,
        "gpu-x-2026-01-01": 3,
        "quick-cpu-2026-01-03": 4,
    }.items():
        (tmp_path / f"{stem}.json").write_text(json.dumps({"peers": {"value": value}}))
    found = {key: (file, of["value"]) for key, (file, of) in run.newest(tmp_path).items()}
    assert found == {"peers on cpu": ("cpu-2026-01-02.json", 1), "peers on gpu-x": ("gpu-x-2026-01-01.json", 3)}


@pytest.mark.slow
def test_peers_train_the_same_models(benchmark, tmp_path):
    peers = benchmark("peers")
    output = tmp_path / "peers.json"
    peers.main(output, size="tiny", models=("MLP",), precisions=("float16",), quick=True)
    (result,) = json.loads(output.read_text())["results"].values()
    assert {"jaxmp", "hand-written"} <= set(result["one step a dispatch"])
    assert {"jaxmp, steps()", "jaxmp, fit()", "hand-written"} <= set(result["many steps a dispatch"])


@pytest.mark.full_size
def test_peers_train_each_model_in_each_precision(benchmark, tmp_path):
    peers = benchmark("peers")
    output = tmp_path / "peers.json"
    peers.main(output, size="tiny", quick=True)
    assert len(json.loads(output.read_text())["results"]) == 12
