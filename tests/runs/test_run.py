"""A Run: a run folder read back, with its metrics, its model and the experiment that made it."""

import dataclasses
import json
import math
import shutil

import flax.linen as nn
import jax.numpy as jnp
import numpy as np
import pytest

import jaxmp
from jaxmp import Adam, Arrays, Experiment, InputError, Loop, Run, TrainState
from jaxmp.cli import main
from jaxmp.models.noise import Noise
from jaxmp.tasks.classification import Classification
from jaxmp.tasks.regression import Regression
from jaxmp.training.metrics import compute

pytestmark = pytest.mark.xdist_group("run")  # one worker: the fixtures train

CONFIG = """
import flax.linen as nn
import numpy as np
from jaxmp import Adam, Arrays, Experiment, Loop


class Net(nn.Module):
    width: int = 8
    rate: float = 0.5

    @nn.compact
    def __call__(self, image, *, train=False):
        x = nn.relu(nn.Dense(self.width)(image.reshape(image.shape[0], -1)))
        x = nn.BatchNorm(use_running_average=not train)(x)
        return nn.Dense(3)(nn.Dropout(self.rate, deterministic=not train)(x))


def load(split):
    rng = np.random.default_rng({"train": 0, "validation": 1, "test": 2}[split])
    label = rng.integers(0, 3, 60)
    image = rng.integers(0, 100, (60, 2, 2, 1)) + 50 * label[:, None, None, None]
    return {"image": image.astype(np.uint8), "label": label, "name": np.array(["a"] * 60)}


def get_config():
    return Experiment(
        model=Net(),
        data=Arrays(load, batch_size=20, mean=(0.3,)),
        optimizer=Adam(0.1),
        loop=Loop(epochs=5, log_every=2, ema_decay=0.9),
    )
"""


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """The run folder of a finished run, begun from the command line."""
    folder = tmp_path_factory.mktemp("trained")
    (folder / "net.py").write_text(CONFIG)
    overrides = ["--model.width", "6", "--precision", "mixed_bfloat16", "--seed", "2"]
    assert main(["train", str(folder / "net.py"), "--workdir", str(folder / "runs"), *overrides]) == 0
    (config,) = folder.glob("runs/net/*/config.json")
    return config.parent


def copy(trained, tmp_path, name="copy"):
    return shutil.copytree(trained, tmp_path / name)


def edit(path, **changes):
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_the_experiment_is_made_again_with_the_same_hash(trained):
    run = Run(trained)
    assert run.experiment.model.width == 6
    assert run.experiment.precision == "mixed_bfloat16"
    assert run.experiment.seed == 2
    assert run.path.name == f"{run.experiment.hash}-s2"
    assert run.experiment.to_json() == run.config["experiment"]


def test_the_experiment_does_not_need_the_config_file_any_more(trained, tmp_path):
    run = copy(trained, tmp_path)
    edit(run / "config.json", file=str(tmp_path / "gone.py"))
    assert Run(run).experiment.hash == Run(trained).experiment.hash


def test_metrics_are_the_lines_and_a_curve_is_steps_and_values(trained):
    run = Run(trained)
    assert run.metrics == [json.loads(line) for line in (trained / "metrics.jsonl").read_text().splitlines()]
    steps, loss = run.curve("loss")
    assert steps.dtype == np.int64 and loss.dtype == np.float64
    assert steps[-1] == 15 and len(steps) == len(loss) > 5
    assert list(run.curve("accuracy", "validation")[0]) == [3, 6, 9, 12, 15]
    assert run.curve("accuracy", "test")[1] == [run.summary["test"]["accuracy"]]


def test_a_curve_says_what_there_is(trained):
    with pytest.raises(InputError, match=r"no 'acuracy' on validation.*did you mean 'accuracy'"):
        Run(trained).curve("acuracy", "validation")


def test_a_running_run_can_be_watched(trained, tmp_path):
    run = Run(copy(trained, tmp_path))
    lines = len(run.metrics)
    (run.path / "summary.json").unlink()
    with (run.path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 16, "split": "train", "loss": null}\n{"step": 17, "spl')
    assert len(run.metrics) == lines + 1
    assert math.isnan(run.curve("loss")[1][-1])
    with pytest.raises(InputError, match="has not ended"):
        _ = run.summary


def test_state_is_the_last_checkpoint_or_the_best_or_that_of_a_step(trained):
    run = Run(trained)
    state = run.state()
    assert isinstance(state, TrainState)
    assert int(state.step) == 15
    assert state.params["Dense_0"]["kernel"].shape == (4, 6)
    assert int(run.state("best").step) == run.summary["best"]["step"]
    assert int(run.state(12).step) == 12
    with pytest.raises(InputError, match="no checkpoint of step 99"):
        run.state(99)


def test_apply_gives_the_outputs_of_the_averaged_weights_under_the_policy(trained):
    run = Run(trained)
    rows = run.experiment.data.source("test")[np.arange(7)]
    logits = run.apply(rows)
    assert logits.shape == (7, 3) and logits.dtype == jnp.float32
    state, image = run.state(), jnp.asarray(rows["image"], jnp.float32) / 255 - 0.3
    in_float32 = [
        run.experiment.model.apply({"params": p, **state.model_state}, image) for p in (state.ema, state.params)
    ]
    from_averaged, from_last = (np.abs(logits - expected).max() for expected in in_float32)
    assert 0 < from_averaged < 0.05 < from_last  # not float32, but near it


class Drawing(nn.Module):
    """Draws in evaluation, too."""

    @nn.compact
    def __call__(self, x):
        return nn.Dropout(0.5, deterministic=False)(nn.Dense(1)(x)) + Noise(1)(len(x))


def test_what_is_drawn_for_a_row_is_what_evaluation_draws_whatever_the_size_of_batches(trained):
    rows = {"x": np.linspace(-1, 1, 20, dtype=np.float32).reshape(10, 2), "y": np.ones((10, 1), np.float32)}

    def predicted(size, state=None):
        data = Arrays(lambda split: rows, batch_size=5, eval_batch_size=size, images=())
        run = Run(trained)
        run.experiment = Experiment(Drawing(), data, Regression(inputs=("x",)), precision="float32")
        state = run.trainer.devices.get(run.trainer.devices.put_state(run.trainer.init())) if state is None else state
        return run, state, run.predict(rows, state)["output"]

    run, state, found = predicted(3)
    _, _, at_once = predicted(10, state)
    np.testing.assert_allclose(found, at_once, rtol=1e-6)
    evaluated = compute(run.trainer.evaluation(state, run.trainer.source()))["loss"]
    assert evaluated == pytest.approx(np.square(found - rows["y"]).mean(), rel=1e-5)


def test_predictions_are_made_with_the_weights_that_are_named(trained):
    run = Run(trained)
    rows = {"image": run.experiment.data.source("test").columns["image"][:8]}
    best, last = (run.state(step) for step in ("best", "last"))
    for state, weights, expected in [
        (None, "evaluated", last),
        ("best", "evaluated", best),
        (int(best.step), "ema", best),
        (last, "raw", dataclasses.replace(last, ema=None)),
        ("best", "raw", dataclasses.replace(best, ema=None)),
    ]:
        outputs = np.asarray(run.apply(rows, state, weights=weights))
        np.testing.assert_array_equal(outputs, run.apply(rows, expected))
        np.testing.assert_array_equal(outputs.argmax(-1), run.predict(rows, state, weights=weights)["prediction"])
    assert not np.array_equal(run.apply(rows), run.apply(rows, weights="raw"))
    with pytest.raises(InputError, match="did you mean 'raw'"):
        run.predict(rows, weights="rwa")
    with pytest.raises(InputError, match=r"keeps no average of its weights \(loop.ema_decay"):
        run.apply(rows, dataclasses.replace(last, ema=None), weights="ema")


def test_evaluate_gives_the_metrics_that_the_run_wrote(trained):
    run = Run(trained)
    assert run.evaluate() == run.summary["test"]
    assert run.evaluate("validation")["accuracy"] == run.curve("accuracy", "validation")[1][-1]
    steps, losses = run.curve("loss", "validation")
    assert run.evaluate("validation", run.state(12))["loss"] == losses[list(steps).index(12)]


def test_reading_changes_nothing(trained):
    def stamps():
        return {path: path.stat().st_mtime_ns for path in trained.rglob("*")}

    before, run = stamps(), Run(trained)
    _ = run.metrics, run.summary, run.state(), run.evaluate()
    assert stamps() == before


def test_a_damaged_last_checkpoint_is_warned_of_and_the_one_before_taken(trained, tmp_path):
    run = Run(copy(trained, tmp_path))
    for file in (run.path / "checkpoints" / "15").rglob("*"):
        if file.is_file():
            file.write_bytes(b"")
    with pytest.warns(UserWarning, match="checkpoint 15 .* is damaged"):
        assert int(run.state().step) < 15


@pytest.mark.parametrize("content", ['{"steps": 15, "te', "{}", "[]"])
def test_a_broken_summary_says_how_it_is_made_again(trained, tmp_path, content):
    run = copy(trained, tmp_path)
    (run / "summary.json").write_text(content)
    with pytest.raises(InputError, match=r"summary.json (is no JSON.*|lacks best, policy, .*); delete this file alone"):
        _ = Run(run).summary


def test_a_failed_run_has_a_reason(trained, tmp_path):
    run = Run(copy(trained, tmp_path))
    assert run.failure is None
    (run.path / "summary.json").unlink()
    (run.path / "failed.json").write_text('{"step": 3, "reason": "the loss is NaN"}')
    assert run.failure == "the loss is NaN"
    with pytest.raises(InputError, match="no summary: the run failed: the loss is NaN"):
        _ = run.summary
    (run.path / "failed.json").write_text("{")
    assert "damaged" in run.failure


def test_of_an_earlier_version_metrics_and_summary_are_read_and_state_is_refused(trained, tmp_path):
    run = Run(copy(trained, tmp_path))
    config = json.loads((run.path / "config.json").read_text())
    del config["made_by"]
    (run.path / "config.json").write_text(json.dumps(config))
    earlier = Run(run.path)
    assert earlier.metrics and earlier.summary["steps"] == 15
    for read in (
        lambda: earlier.experiment,
        earlier.state,
        lambda: jaxmp.fit(Run(trained).experiment, init_from=run.path),
    ):
        with pytest.raises(InputError, match=r"was written by an earlier jaxmp: .* only by jaxmp 0\."):
            read()


# Which folder.


def test_a_folder_with_one_run_below_it_is_that_run(trained):
    assert Run(trained.parent).path == Run(trained.parent.parent).path == trained
    assert repr(Run(trained.parent)) == f"Run({str(trained)!r})"


def test_of_several_runs_one_has_to_be_named(trained, tmp_path):
    for name in ("a", "b"):
        copy(trained, tmp_path, name)
    with pytest.raises(InputError, match=r"holds 2 runs; name one of them:\n.*/a\n.*/b"):
        Run(tmp_path)


@pytest.mark.parametrize("path", ["/", ""])
def test_no_run_is_suggested_that_was_given_or_stands_in_the_root_folder(tmp_path, monkeypatch, path):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "opt.md").write_text("")
    (tmp_path / "tmp2").symlink_to(tmp_path / "gone")
    for name in ("opt.md", "tmp2", "tmp3"):
        with pytest.raises(InputError, match=r"this is a file; expected a run folder|no such folder$"):
            Run(f"{path}{name}")


def test_what_is_no_run_is_an_input_error(trained, tmp_path):
    with pytest.raises(InputError, match="no such folder; did you mean 'runs'"):
        Run(trained.parent.parent.parent / "rums")
    with pytest.raises(InputError, match="holds none"):
        Run(tmp_path)
    for content, message in [("{", "no JSON"), ("3", "no JSON object"), ('{"learning_rate": 1}', "not written by")]:
        (tmp_path / "config.json").write_text(content)
        with pytest.raises(InputError, match=message):
            Run(tmp_path)


# Which experiment.


def test_an_experiment_that_comes_out_different_is_refused_with_the_first_difference(trained, tmp_path):
    run = copy(trained, tmp_path)
    edit(run / "config.json", source=CONFIG.replace("Adam(0.1)", "Adam(0.2)"))
    with pytest.raises(InputError, match=r"optimizer.learning_rate was 0.1 and is 0.2.*jax "):
        _ = Run(run).experiment


@pytest.mark.slow
def test_a_run_from_python_wants_its_experiment(tmp_path):
    class Net(nn.Module):
        @nn.compact
        def __call__(self, x):
            return nn.Dense(2)(x)

    def load(split):
        return {"x": np.eye(8, 4, dtype=np.float32), "label": np.arange(8) % 2}

    experiment = Experiment(
        model=Net(),
        data=Arrays(load, batch_size=4, images=()),
        task=Classification(inputs=("x",)),
        optimizer=Adam(),
        loop=Loop(epochs=1),
    )
    fitted = jaxmp.fit(experiment, workdir=tmp_path)
    with pytest.raises(InputError, match=r"jaxmp.Run\(path, experiment\)"):
        _ = Run(fitted.path).experiment
    assert Run(fitted.path, experiment).evaluate() == fitted.summary["test"]
    with pytest.raises(InputError, match="the one given has hash"):
        _ = Run(fitted.path, dataclasses.replace(experiment, precision="float32")).experiment
    assert int(Run(fitted.path, experiment).state().step) == 2


def test_predictions_are_those_of_apply_for_every_row_in_order(trained):
    run = Run(trained)
    rows = run.experiment.data.source("test")[np.arange(60)]
    logits = np.asarray(run.apply(rows), np.float32)
    for predicted in (run.predict("test"), run.predict({"image": rows["image"], "label": rows["label"]})):
        assert set(predicted) == {"prediction", "probability", "output", "label"}
        assert predicted["output"].dtype == predicted["probability"].dtype == np.float32
        np.testing.assert_array_equal(predicted["output"], logits)
        np.testing.assert_array_equal(predicted["prediction"], logits.argmax(-1))
        exact = np.exp(logits.astype(np.float64))
        np.testing.assert_allclose(predicted["probability"], (exact / exact.sum(-1, keepdims=True)).max(-1), rtol=1e-5)
        np.testing.assert_array_equal(predicted["label"], rows["label"])
    few = run.predict({"image": rows["image"][:7]}, run.state("best"))
    assert {name: len(values) for name, values in few.items()} == dict.fromkeys(
        ("prediction", "probability", "output"), 7
    )
    with pytest.raises(InputError, match="no column 'image', an input of the model; they have imagine; did you mean"):
        run.predict({"imagine": rows["image"]})


def test_no_prediction_is_replaced_by_the_target(trained, monkeypatch):
    monkeypatch.setattr(Classification, "predictions", lambda task, outputs: {"label": outputs.argmax(-1)})
    with pytest.raises(InputError, match=r"Classification\.predictions has 'label', the name of the task's target"):
        Run(trained).predict("test")
