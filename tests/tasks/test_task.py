"""Tasks of one's own: what they declare about their metrics is checked, monitored and shown."""

from __future__ import annotations

import dataclasses
import json

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxmp import Arrays, Classification, Experiment, InputError, Loop, Mean, MetricSpec, Run, Task, fit, steps
from jaxmp.cli import main
from jaxmp.commands.dry_run import dry_run
from jaxmp.reports.run_report import report
from jaxmp.tasks.loss import make_loss
from jaxmp.tasks.task import Monitor, find_monitor, metric_specs, objective_metric_specs, objectives_of
from jaxmp.training.feed import HIDDEN_METRICS
from jaxmp.training.metrics import BOOKKEEPING
from jaxmp.training.objective import ObjectiveSpec


class Line(nn.Module):
    outputs: int = 1

    @nn.compact
    def __call__(self, x):
        return nn.Dense(self.outputs)(x)


def load(split):
    x = np.random.default_rng(len(split)).normal(size=(32, 3)).astype(np.float32)
    return {"x": x, "y": x @ np.float32([[1.0], [-2.0], [0.5]])}


def heavy(split):
    return {**load(split), "y": np.full((32, 1), 101.0, np.float32)}


@dataclasses.dataclass(frozen=True)
class Regression(Task):
    """Squared error, and a metric of one's own whose name says nothing about its direction."""

    inputs: tuple[str, ...] = ("x",)
    target: str = "y"

    metrics = {  # noqa: RUF012
        "loss": MetricSpec("min", "kg^2"),
        "deviation": MetricSpec("min", "kg", digits=3),
        "within_a_kilogram": MetricSpec("max", "%", digits=3),
    }
    monitor = "deviation"

    def __call__(self, outputs, batch):
        error = (outputs.astype(jnp.float32) - batch[self.target])[:, 0]
        metrics = {"within_a_kilogram": abs(error) < 1, "deviation": abs(error), "bias": error}
        return (
            Mean.of(error**2, batch["weight"]),
            {name: Mean.of(values, batch["weight"]) for name, values in metrics.items()},
        )

    def check(self, outputs, batch):
        if outputs.shape != batch[self.target].shape:
            raise InputError(f"outputs {list(outputs.shape)}, targets {list(batch[self.target].shape)}")

    def check_rows(self, outputs, columns, split):
        if np.abs(columns[self.target]).max() > 100:
            raise InputError(f"{self.target} of {split} is above 100 kg")


def experiment(task=None, *, load=load, model=None, **loop):
    return Experiment(
        model=model or Line(),
        data=Arrays(load, batch_size=8, images=()),
        task=task or Regression(),
        precision="float32",
        loop=Loop(**{"steps": 8, "log_every": 4, "eval_every": 2, "keep": 1} | loop),
    )


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A run monitored by a metric of its own of which less is better, and what it said."""
    import contextlib
    import io

    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        fitted = fit(experiment(), workdir=tmp_path_factory.mktemp("runs"))
    return fitted, out.getvalue()


@pytest.mark.slow
def test_the_best_of_a_metric_of_which_less_is_better_is_the_least(trained):
    fitted, _ = trained
    step, values = Run(fitted.path, experiment()).curve("deviation", "validation")
    assert len(set(values)) > 1
    best = {"step": step[values.argmin()], "deviation": values.min()}
    assert {name: value for name, value in fitted.summary["best"].items() if name != "test"} == best
    assert int(Run(fitted.path, experiment()).state("best").step) == step[values.argmin()]


@pytest.mark.slow
def test_every_metric_is_on_the_console_with_the_digits_of_its_spec(trained):
    fitted, said = trained
    test = fitted.summary["test"]
    (line,) = [line for line in said.splitlines() if line.startswith("test ")]
    assert line.split("8/8  ")[1].split("  scale")[0] == (
        f"loss {test['loss']:.4f}  deviation {test['deviation']:.3f}  "
        f"within_a_kilogram {test['within_a_kilogram']:.3f}  bias {test['bias']:.4f}"
    )


def test_a_run_records_its_specs_and_a_report_names_its_axes_after_them(trained):
    fitted, _ = trained
    config = json.loads((fitted.path / "config.json").read_text())
    assert config["monitor"] == "deviation"
    assert config["metrics"]["deviation"] == {"best": "min", "unit": "kg", "digits": 3}
    assert config["metrics"]["bias"] == {"best": None, "unit": "", "digits": 4}
    text = str(report([Run(fitted.path)]))
    for label in ("loss, kg^2", "deviation, kg", "within a kilogram, %", "bias"):
        assert f">{label}</text>" in text, label
        assert f">test {label}</th>" in text, label
    share = 100 * fitted.summary["test"]["within_a_kilogram"]
    assert f">{share:.1f}</td>" in text and f">{fitted.summary['test']['deviation']:.3f}</td>" in text


FILE = '''"""A metric of one's own, in one file."""
import dataclasses
import flax.linen as nn
import jax.numpy as jnp
import numpy as np
from jaxmp import Arrays, Experiment, Loop, Mean, MetricSpec, Task


class Line(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.Dense(1)(x)


@dataclasses.dataclass(frozen=True)
class Regression(Task):
    inputs: tuple[str, ...] = ("x",)
    target: str = "y"
    power: float = 2.0

    metrics = {"surprise": MetricSpec("min", "kg", digits=1)}
    monitor = "surprise"

    def __call__(self, outputs, batch):
        error = jnp.abs(outputs.astype(jnp.float32)[:, 0] - batch["y"])
        return Mean.of(error**self.power, batch["weight"]), {"surprise": Mean.of(10 * error, batch["weight"])}


def load(split):
    x = np.random.default_rng(len(split)).normal(size=(32, 3)).astype(np.float32)
    return {"x": x, "y": x.sum(1)}


def get_config():
    loop = Loop(steps=4, eval_every=1, patience=4)
    return Experiment(model=Line(), data=Arrays(load, batch_size=8, images=()), task=Regression(), loop=loop)
'''


@pytest.mark.slow
def test_a_metric_in_a_file_of_ones_own_is_monitored_shown_and_reported(tmp_path, capsys):
    (tmp_path / "my.py").write_text(FILE)
    command = [str(tmp_path / "my.py"), "--workdir", str(tmp_path / "runs"), "--task.power", "1.5"]
    assert main(["train", *command]) == 0
    run = Run(tmp_path / "runs")
    assert f"  surprise {run.summary['test']['surprise']:.1f}  scale" in capsys.readouterr().out
    assert run.summary["best"]["surprise"] == run.curve("surprise", "validation")[1].min()
    assert main(["report", str(run.path)]) == 0
    assert ">surprise, kg</text>" in (run.path / "report.html").read_text()


@pytest.mark.slow
def test_the_fields_of_a_line_that_are_no_metrics_are_all_known(trained):
    fitted, _ = trained
    fields = {name for line in Run(fitted.path).metrics for name in line}
    fields |= {
        "steps_per_second",
        "examples_per_second",
        "tflops_per_second",
    }  # left out where all steps ran while one was dispatched
    # Of ranges, a GPU, a GPU that is known, a private run and a pruned one.
    of_others = {"ranges", "device_peak_bytes", "mfu", "epsilon", "sparsity"}
    assert fields - set(Run(fitted.path).metric_specs) == set(BOOKKEEPING) - of_others


def changed(**attributes):
    return type("Changed", (Regression,), attributes)()


def returning(*names):
    def call(self, outputs, batch):
        loss, metrics = Regression.__call__(self, outputs, batch)
        return loss, metrics | {name: loss for name in names}

    return changed(__call__=call)


@pytest.mark.parametrize(
    ("made", "message"),
    [
        (lambda: experiment(monitor="bias"), r"loop.monitor='bias': .*MetricSpec\('min'\)"),
        (lambda: experiment(changed(monitor="bias")), r"Changed.monitor='bias': .*loop.mode=max or min"),
        (lambda: experiment(monitor="deviaton"), "loop.monitor='deviaton' is nothing .*did you mean 'deviation'"),
        (lambda: experiment(changed(monitor="perplexity")), "Changed.monitor='perplexity' is nothing"),
        (lambda: experiment(changed(metrics={"deviaton": MetricSpec()})), "declares 'deviaton'.*mean 'deviation'"),
        (lambda: experiment(changed(metrics={"deviation": "min"})), r"metrics\['deviation'\] = 'min': expected"),
        (lambda: experiment(changed(metrics=("deviation",))), "expected a mapping"),
        (lambda: experiment(returning("step")), "metric called 'step'"),
        (lambda: experiment(returning("loss_scale")), "metric called 'loss_scale'"),
        (lambda: experiment(returning("loss")), "metric called 'loss'"),
        (lambda: experiment(model=Line(2)), r"outputs \[8, 2\], targets \[8, 1\]"),
        (lambda: experiment(load=heavy), "y of train is above"),
    ],
)
def test_what_does_not_fit_is_refused_before_anything_is_written(tmp_path, made, message):
    for run in (lambda e: fit(e, workdir=tmp_path), dry_run):
        with pytest.raises(InputError, match=message):
            run(made())
    assert not list(tmp_path.iterdir())


def test_a_loop_of_ones_own_refuses_a_task_alike():
    with pytest.raises(InputError, match="metric called 'step'"):
        next(steps(experiment(returning("step"))))
    with pytest.raises(InputError, match="y of train is above"):
        next(steps(experiment(load=heavy)))


@pytest.mark.parametrize("name", [*BOOKKEEPING, *HIDDEN_METRICS, "loss"])
def test_no_metric_may_be_called_like_a_field_of_a_line(name):
    with pytest.raises(InputError, match=f"metric called '{name}'"):
        metric_specs(Regression(), ["deviation", "within_a_kilogram", name])


def test_the_loss_comes_first_then_what_is_declared_then_the_rest():
    assert list(metric_specs(Regression(), ["bias", "within_a_kilogram", "deviation"])) == [
        "loss", "deviation", "within_a_kilogram", "bias"
    ]  # fmt: skip


class Duck:
    """A task that derives from nothing and has what a task needs, and no more."""

    inputs = ("x",)

    def __call__(self, outputs, batch):
        return Mean.of(outputs[:, 0], batch["weight"]), {}


def test_a_task_that_derives_from_nothing_is_monitored_by_its_loss():
    specs = metric_specs(Duck(), [])
    assert specs == {"loss": MetricSpec("min")}
    assert find_monitor(Duck(), specs) == find_monitor(Task(), specs) == Monitor("loss", "min")


def test_the_loop_goes_before_the_task_and_the_mode_before_the_spec():
    specs = metric_specs(Regression(), ["bias", "within_a_kilogram", "deviation"])
    assert find_monitor(Regression(), specs) == Monitor("deviation", "min")
    assert find_monitor(Regression(), specs, "within_a_kilogram") == Monitor("within_a_kilogram", "max")
    assert find_monitor(Regression(), specs, "bias", "max") == Monitor("bias", "max")
    assert find_monitor(Regression(), specs, None, "max") == Monitor("deviation", "max")


def test_classification_is_monitored_by_accuracy_and_checks_shapes_without_values():
    specs = metric_specs(Classification(), ["accuracy"])
    assert find_monitor(Classification(), specs) == Monitor("accuracy", "max")
    logits = jax.ShapeDtypeStruct((4, 3), jnp.float16)
    Classification().check(logits, {"label": jax.ShapeDtypeStruct((4,), jnp.int32)})
    for label in (jax.ShapeDtypeStruct((4, 1), jnp.int32), jax.ShapeDtypeStruct((4,), jnp.float32)):
        with pytest.raises(InputError, match="expected whole numbers, one for each vector of logits"):
            Classification().check(logits, {"label": label})
    with pytest.raises(InputError, match="outputs are of type tuple"):
        Classification().check((logits, logits), {"label": jax.ShapeDtypeStruct((4,), jnp.int32)})


@pytest.mark.parametrize("fields", [{"best": "less"}, {"unit": None}, {"digits": -1}, {"digits": 2.0}])
def test_a_spec_that_says_nothing_is_refused(fields):
    with pytest.raises(InputError, match=next(iter(fields))):
        MetricSpec(**fields)


# Several objectives.


def of_two(**fields):
    """A task with objectives a and b, of which b measures its recall."""
    objectives = {"a": ObjectiveSpec(("body",)), "b": ObjectiveSpec(("head",), every=2)}
    return type("Two", (Task,), {"inputs": ("x",), "objectives": objectives, **fields})()


def test_metrics_of_several_objectives_are_declared_for_one_or_for_each():
    declared = {
        "b/recall": MetricSpec("max", "%"),
        "loss": MetricSpec("min", "nats"),
        "b/loss": MetricSpec("min", "kg"),
    }
    specs = objective_metric_specs(of_two(metrics=declared), {"a": ["size"], "b": ["recall"]})
    assert list(specs) == ["a/loss", "a/size", "b/loss", "b/recall"]
    assert [spec.unit for spec in specs.values()] == ["nats", "", "kg", "%"]
    with pytest.raises(InputError, match=r"Two\.monitor='loss' is nothing that is measured; expected one of a/loss, "):
        find_monitor(of_two(), specs)
    assert find_monitor(of_two(monitor="b/recall"), specs).best == "max"


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"objectives": ("a", "b")}, r"Two\.objectives = \('a', 'b'\): expected a mapping"),
        ({"objectives": {"a": ("body",)}}, r"Two\.objectives\['a'\] = \('body',\): expected an ObjectiveSpec"),
        ({"objectives": {"a/b": ObjectiveSpec()}}, "objective 'a/b': expected a name without / and blanks"),
        ({"objectives": {"loss_scale": ObjectiveSpec()}}, "'loss_scale' is a field of metrics.jsonl"),
        ({"order": "at_onec"}, "expected in_turn or at_once; did you mean 'at_once'"),
        ({"metrics": {"b/recal": MetricSpec()}}, "declares 'b/recal', .*did you mean 'b/recall'"),
        ({"metrics": {"b/recall": "max"}}, r"Two\.metrics\['recall'\] = 'max': expected a MetricSpec"),
    ],
)
def test_a_task_refuses_objectives_and_metrics_that_do_not_fit(fields, message):
    task = of_two(**fields)
    with pytest.raises(InputError, match=message):
        objectives_of(task)
        objective_metric_specs(task, {"a": [], "b": ["recall"]})


def test_a_loss_is_of_one_of_several_objectives():
    for objective, message in (
        (None, "make_loss without objective= takes a single objective; Two has 2: a, b"),
        ("c", r"Two\.objectives: there is no objective 'c'; there are a, b"),
    ):
        with pytest.raises(InputError, match=message):
            make_loss(None, of_two(), "float32", objective=objective)
