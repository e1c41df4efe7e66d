from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path

import pytest
import tyro

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


def test_only_what_is_a_benchmark_is_run(benchmark):
    with pytest.raises(SystemExit, match="startt: there is no such benchmark; there are peers, start"):
        benchmark("run").main(("peers", "startt"))


def test_the_exponent_is_that_of_the_larger_sizes(benchmark):
    sizes = [10, 100, 1000, 10_000]
    seconds = [5.0, 5.0, 1.0, 100.0]
    assert benchmark("growth").exponent(sizes, seconds) == pytest.approx(2)


def test_a_share_is_of_the_peak_and_the_ceiling_of_the_same_arithmetic(benchmark):
    gpu, most = benchmark("gpu"), {"bfloat16": 8e14, "tensorfloat32": 4e14, "float32": 5e13}
    of = {kind: gpu.shares(1e13, kind, "NVIDIA H200", most) for kind in (*most, "float16")}
    assert {kind: each["of_ceiling"] for kind, each in of.items()} == {
        "bfloat16": 1 / 80,
        "tensorfloat32": 1 / 40,
        "float32": 1 / 5,
        "float16": None,
    }
    assert of["float32"]["mfu"] == pytest.approx(1e13 / 67e12)
    assert of["tensorfloat32"]["mfu"] == pytest.approx(1e13 / 494.7e12)


SMALLEST = {
    "checkpoint": (("--quick",), {"1"}),
    "gpu": (
        ("--quick", "--names", "ceiling of products", "BERT-base", "--contenders", "TF32", "bfloat16"),
        {"ceiling of products", "BERT-base"},
    ),
    "pipeline": (("--quick",), {"arrays in memory", "npy files"}),
    "scaling_cost": (
        ("--quick", "--target", "cpu", "--models", "digits CNN", "--steps", "float32", "mixed_bfloat16"),
        {"digits CNN"},
    ),
}
WHOLE = {
    "gpu": (("--quick",), {"LSTM", "ResNet-50", "ViT-B/16", "GPT-2 124M", "BERT-base", "digits to 50 %"}),
    "growth": (("--quick",), {"leaves", "layers", "scanned layers", "devices"}),
    "peers": (("--size", "tiny", "--quick"), {f"{model}, float16" for model in ("MLP", "CNN", "LSTM", "transformer")}),
    "scaling_cost": (("--quick", "--target", "cpu"), {"ResNet-50", "GPT-2 124M"}),
    "start": (("--quick",), {"seconds", "parts"}),
}


def made(benchmark, name, arguments, output):
    """The results of a script, which `tables` can show."""
    found = tyro.cli(benchmark(name).main, args=["--output", str(output), *arguments])
    assert found is None
    result = json.loads(output.read_text())
    assert benchmark("tables").__dict__[name](result).count("|") > 8
    return result["results"]


@pytest.mark.slow
@pytest.mark.parametrize("name", SMALLEST)
def test_a_benchmark_runs_at_its_smallest(benchmark, tmp_path, monkeypatch, name):
    monkeypatch.delenv("JAXMP_DATA", raising=False)
    arguments, keys = SMALLEST[name]
    assert set(made(benchmark, name, arguments, tmp_path / "result.json")) == keys


@pytest.mark.full_size
@pytest.mark.parametrize("name", WHOLE)
def test_a_benchmark_runs_whole_at_toy_size(benchmark, tmp_path, name):
    arguments, keys = WHOLE[name]
    assert keys <= set(made(benchmark, name, arguments, tmp_path / "result.json"))


@pytest.mark.full_size
def test_a_benchmark_that_was_cut_off_goes_on_where_it_stopped(benchmark, tmp_path):
    output = tmp_path / "result.json"
    first = made(benchmark, "growth", ("--quick", "--kinds", "leaves"), output)
    both = made(benchmark, "growth", ("--quick", "--kinds", "leaves", "scanned layers"), output)
    assert both["leaves"] == first["leaves"] and set(both) == {"leaves", "scanned layers"}
