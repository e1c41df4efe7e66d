from __future__ import annotations

import importlib
import json
import subprocess
import sys
import types
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tyro

from jaxmp.errors import InputError

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


def test_a_partial_result_is_shown_only_where_there_is_no_whole_one(benchmark, tmp_path):
    run, tables = benchmark("run"), benchmark("tables")
    for stem, results in {
        "cpu-2026-01-01": {"peers": {"value": 1}, "start, partial": {"value": 2}},
        "cpu-2026-01-02": {"peers, partial": {"value": 3}},
    }.items():
        (tmp_path / f"{stem}.json").write_text(json.dumps(results))
    found = run.newest(tmp_path)
    assert found == {
        "peers on cpu": ("cpu-2026-01-01.json", {"value": 1}),
        "start on cpu": ("cpu-2026-01-01.json", {"value": 2, "partial": True}),
    }
    origin = {"versions": {"jax": "1"}, "command": "python x"}
    assert "partial" in tables.origin("start on cpu", "x.json", origin | {"partial": True})
    assert "partial" not in tables.origin("start on cpu", "x.json", origin)


FAKE = """
import json, os, sys
from pathlib import Path

output = Path(sys.argv[sys.argv.index("--output") + 1])
kept = json.loads(output.read_text())["results"] if output.exists() else {}
if "one" not in kept or os.environ["MORE"]:
    results = kept | {"one": kept.get("one", os.environ["NOW"])} | ({"more": 1} if os.environ["MORE"] else {})
    output.write_text(json.dumps({"results": results}))
sys.exit(bool(os.environ["FAIL"]))
"""


@pytest.fixture
def run_fake(benchmark, tmp_path, monkeypatch):
    """Runs a made-up benchmark that can resume; returns its entries in the file of results."""
    module, file = benchmark("run"), tmp_path / "results" / "cpu-2026-01-01.json"
    (tmp_path / "fake.py").write_text(FAKE)
    monkeypatch.setattr(module, "FOLDER", tmp_path)
    monkeypatch.setattr(module, "BENCHMARKS", {"fake": module.OWN})
    monkeypatch.setattr(module, "QUICK", set())

    def call(now, *extra, revision="a", dirty=False, quick=False, again=False, more=False, fails=False):
        for name, value in {"NOW": now, "MORE": "1" if more else "", "FAIL": "1" if fails else ""}.items():
            monkeypatch.setenv(name, value)
        monkeypatch.setattr(module, "tree", lambda: {"revision": revision, "dirty": dirty})
        try:
            module.run("fake", file, quick=quick, again=again, torch="", extra=list(extra))
        except SystemExit:
            assert fails
        return json.loads(file.read_text())

    return call


def test_a_run_resumes_at_the_same_revision_and_command_only(run_fake):
    def measured(*args, **kwargs):
        return run_fake(*args, **kwargs)["fake"]["results"]["one"]

    assert measured("1") == "1"
    assert measured("2") == "1", "resumed"
    assert measured("3", revision="b") == "3", "what another revision measured is not this one's"
    assert measured("4", revision="b", again=True) == "4"
    assert measured("5", revision="b", quick=True) == "5", "a quick run sees whether all is well: it measures"
    assert measured("6", revision="b") == "6", "what a quick run measured is not this one's"
    assert measured("7", "--rounds=3", revision="b") == "7", "nor what fewer rounds did"
    assert measured("8", "--rounds=3", revision="b", dirty=True) == "8"
    assert measured("9", "--rounds=3", revision="b", dirty=True) == "9", "changes of a tree are not known"


def test_a_failed_run_leaves_the_whole_result_and_is_gone_on_with(run_fake):
    whole = run_fake("1")["fake"]
    assert run_fake("2", fails=True) == {"fake": whole}, "nothing new was measured"
    failed = run_fake("3", more=True, fails=True)
    assert failed["fake"] == whole and failed["fake, partial"]["results"] == {"one": "1", "more": 1}
    assert run_fake("4", fails=True) == failed
    ended = run_fake("5")
    assert set(ended) == {"fake"} and ended["fake"]["results"] == {"one": "1", "more": 1}
    assert ended["fake"]["command"] == failed["fake, partial"]["command"], "this run measured nothing"
    run_fake("6", fails=True, revision="b", again=True)
    assert set(run_fake("7", fails=True)) == {"fake", "fake, partial"}
    assert run_fake("8")["fake"] == ended["fake"], "gone on with what is of this revision"


def test_each_extra_is_handed_on_and_recorded(benchmark, run_fake, monkeypatch, tmp_path):
    recorded = run_fake("1", "--more", "--names=a b")["fake"]["command"]
    assert recorded == "python experiments/benchmarks/run.py fake --extra=--more '--extra=--names=a b'"
    run, given = benchmark("run"), []
    monkeypatch.setattr(run, "run", lambda name, file, **how: given.append((name, how["extra"])))
    monkeypatch.setattr(run, "draw", lambda results, folder: None)
    monkeypatch.setattr(run, "README", tmp_path / "README.md")
    (tmp_path / "README.md").write_text("")
    tyro.cli(run.main, args=["fake", "--extra=--models", "--extra=MLP"])
    assert given == [("fake", ["--models", "MLP"])]


def test_only_what_is_a_benchmark_is_run(benchmark):
    with pytest.raises(InputError, match="startt: there is no such benchmark; there are peers, start"):
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


def losing(first, fall):
    """A step whose loss falls, and its state: 6 parameters, a counter, and a loss scale, which is no parameter."""
    state = {"w": jnp.ones((2, 3)), "i": jnp.int32(0), "scale": jnp.float32(1)}
    return lambda of, batch: (of | {"i": of["i"] + 1}, {"loss": first - fall * of["i"]}), state


def test_peers_that_train_another_model_are_not_compared(benchmark, monkeypatch):
    peers, cases = benchmark("peers"), benchmark("peer_steps.cases")
    case = cases.Case(cases.MLP((4,)), (3,), 2)
    step, state = losing(2.0, 0.1)
    same = {"hand-written": (step, state), "jaxmp": (step, state), "Flax": losing(3.0, 0.1)}
    monkeypatch.setattr(peers, "module_of", lambda file: None)
    assert peers.check_parameters(case, same) == {"hand-written": 6, "jaxmp": 6, "Flax": 6}
    with pytest.raises(RuntimeError, match=r"numbers of parameters are .*'Haiku': 8"):
        peers.check_parameters(case, same | {"Haiku": (step, state | {"b": jnp.ones(2)})})
    for file, name in {"torch_amp": "torch", "keras_jax": "Keras"}.items():
        peer = types.SimpleNamespace(parameters=lambda case: 7)
        monkeypatch.setattr(peers, "module_of", lambda wanted, file=file, peer=peer: peer if wanted == file else None)
        with pytest.raises(RuntimeError, match=rf"numbers of parameters are .*'{name}': 7"):
            peers.check_parameters(case, same)
    losses = peers.check_losses(case, "float32", same)
    assert losses["jaxmp"] == pytest.approx({"1": 2.0, "5": 1.6})
    for name, other in {"jaxmp": losing(2.001, 0.1), "jaxmp, NoScaler": losing(2.0, 0.101)}.items():
        with pytest.raises(RuntimeError, match="not the same model: the losses"):
            peers.check_losses(case, "float32", same | {name: other})
    with pytest.raises(RuntimeError, match="Flax does not train"):
        peers.check_losses(case, "float32", same | {"Flax": losing(3.0, 0.0)})


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


def test_a_program_that_xla_does_not_compile_is_a_row_and_ends_no_count(benchmark, monkeypatch):
    module = benchmark("scaling_cost")

    def counted(workload, name, target):
        if name == "float32":
            raise jax.errors.JaxRuntimeError("INTERNAL: no tiles\nmore")
        return {"beside": module.BESIDE[name]} | dict.fromkeys(("kernels", "selects", "temporaries", "peak"), 7)

    monkeypatch.setattr(module, "counted", counted)
    found = {name: module.counted_or_why_not(None, name, "h100") for name in ("float32", "mixed_bfloat16")}
    rows = benchmark("tables").scaling_cost({"results": {"ViT": found}}).splitlines()
    assert "not compiled: INTERNAL: no tiles |" in rows[2] and "| float32 | 7 | 7 | 7 | 7 |" in rows[3]


@pytest.mark.slow
def test_the_parts_of_the_first_step_are_of_the_program_by_hand_itself():
    script = FOLDER / "start_programs" / "parts.py"
    command = [sys.executable, "-X", "importtime", str(script), "hand-written"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    found = json.loads(done.stdout)
    assert list(found) == ["importing", "data", "first state", "tracing", "lowering", "compiling", "the step"]
    assert "jaxmp" not in done.stderr, "what is compared with jaxmp imports nothing of it"


@pytest.mark.slow
def test_the_resident_batches_of_the_pipeline_are_those_of_the_feed_of_jaxmp(benchmark):
    pipeline = benchmark("pipeline")
    rows = pipeline.rows_of(256)
    batches = pipeline.of_jaxmp_resident(rows)
    found = [{name: np.asarray(column) for name, column in next(batches).items()} for _ in range(4)]
    for epoch in range(2):
        for position, order in enumerate(pipeline.Batches(256, pipeline.BATCH, seed=0).epoch_rows(epoch)):
            batch = found[2 * epoch + position]
            np.testing.assert_array_equal(batch["label"], rows["label"][order])
            np.testing.assert_allclose(batch["image"], rows["image"][order] / 255, rtol=1e-6)


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
