"""What people met elsewhere: NumPy numbers, links, file systems without locks, URLs, broken datasets, no splits."""

import dataclasses
import errno
import fcntl
import io
import json
import subprocess
import sys
import warnings

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxmp import Adam, Arrays, Classification, Experiment, InputError, Loop, Run, fit
from jaxmp.cli import main
from jaxmp.data.catalog import damaged_datasets, list_datasets
from jaxmp.errors import local_path
from jaxmp.experiment.config_file import ConfigFile
from jaxmp.experiment.overrides import override
from jaxmp.reports.page import Page
from jaxmp.reports.run_report import report
from jaxmp.runs.folder import RunFolder, how_to_blame
from jaxmp.runs.going_on import Parent
from jaxmp.runs.writers import escaped_output
from jaxmp.training.evaluation import evaluation_key


class Net(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.Dense(3)(x)


def rows(split):
    return {"x": np.ones((8, 4), np.float32), "label": np.arange(8) % 3}


def experiment(load=rows, model=None, task=None, **loop):
    task = task or Classification(inputs=("x",))
    data = Arrays(load, batch_size=4, images=())
    return Experiment(model or Net(), data, task, precision="float32", loop=Loop(**{"epochs": 1, **loop}))


@pytest.mark.parametrize("four", [np.int64(4), np.uint8(4), 8 / 2, np.float32(4)])
def test_whole_numbers_of_any_type_are_the_same_experiment(four):
    a = Experiment(Net(), Arrays(rows, batch_size=four, images=()), loop=Loop(epochs=four), seed=int(four))
    b = Experiment(Net(), Arrays(rows, batch_size=4, images=()), loop=Loop(epochs=4), seed=np.int64(4))
    assert a.hash == b.hash and json.dumps([a.seed, b.seed]) == "[4, 4]"


@pytest.mark.parametrize("number", [np.float32(0.5), np.float64(0.5), jnp.float32(0.5)])
def test_numbers_of_numpy_and_jax_in_a_config_are_no_warning_beside_other_options(number):
    config = dataclasses.replace(experiment(ema_decay=np.float32(0.5)), optimizer=Adam(number))
    with warnings.catch_warnings(action="error"):
        changed = override(config, ["--loop.steps", "3"])
    assert changed.loop.steps == 3 and changed.loop.ema_decay == 0.5 == changed.optimizer.learning_rate


@pytest.mark.parametrize("module", [np, jnp, sys])
def test_a_function_whose_closure_holds_a_module_can_be_named(module):
    def load(split):
        return {"x": module}

    assert experiment(load).to_json()["data"]["load"]["closure"]["module"] == {"module": module.__name__}


@pytest.mark.slow
@pytest.mark.parametrize("missing", [("validation",), ("test",), ("validation", "test")])
def test_a_run_without_other_splits_trains_and_is_reported(missing, tmp_path):
    said = []
    fitted = fit(experiment(lambda s: None if s in missing else rows(s)), workdir=tmp_path, log=said.append)
    assert bool(fitted.summary["test"]) == ("test" not in missing)
    assert bool(fitted.summary["best"]) == ("validation" not in missing)
    assert [any(f"no {split} split" in line for line in said) for split in missing] == [True] * len(missing)
    run = Run(fitted.path, experiment(lambda s: None if s in missing else rows(s)))
    assert "Training" in str(report([run])) and run.state("best").step == 2
    with pytest.raises(InputError, match=f"no {missing[0]} split"):
        run.evaluate(missing[0])


@pytest.mark.slow
@pytest.mark.parametrize("link", ["run", "experiment", "workdir"])
def test_a_linked_folder_is_overwritten_where_it_points_to(link, tmp_path):
    path = fit(experiment(), workdir=tmp_path / "runs", log=str).path
    linked = {"run": path, "experiment": path.parent, "workdir": tmp_path / "runs"}[link]
    elsewhere = linked.rename(tmp_path / "elsewhere")
    linked.symlink_to(elsewhere)
    fitted = fit(experiment(), workdir=tmp_path / "runs", overwrite=True, log=str)
    assert fitted.trained and linked.is_symlink() and (path / "summary.json").exists()


def test_a_link_that_leads_to_itself_is_refused(tmp_path):
    (tmp_path / "runs").symlink_to("runs")
    with pytest.raises(InputError, match="a link on the way leads to itself"):
        RunFolder(tmp_path / "runs/name/run").create()


def test_a_link_to_a_folder_that_is_not_there_makes_it(tmp_path):
    (tmp_path / "runs").symlink_to(tmp_path / "a/b")
    RunFolder(tmp_path / "runs/run").create()
    assert (tmp_path / "a/b/run").is_dir()


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS])
def test_a_file_system_without_locks_is_said_once_and_used(number, tmp_path, monkeypatch):
    def flock(*args):
        raise OSError(number, "no locks here")

    monkeypatch.setattr(fcntl, "flock", flock)
    said = []
    with RunFolder(tmp_path).locked(said.append):
        pass
    assert len(said) == 1 and "cannot be locked (no locks here)" in said[0]


@pytest.mark.parametrize("text", ["s3://a/b", "gs:/a", "file:///a", "az://b", "", "a\0b"])
def test_what_is_no_path_here_is_refused(text):
    with pytest.raises(InputError, match=r"workdir .*expected a path"):
        local_path("workdir", text)


@pytest.mark.parametrize("text", ["runs", "a:b", "C:/runs", "/tmp/s3:x"])
def test_other_paths_are_paths(text):
    assert str(local_path("workdir", text)) == text


def test_a_home_folder_is_expanded(monkeypatch):
    monkeypatch.setenv("HOME", "/somewhere")
    assert str(local_path("workdir", "~/runs")) == "/somewhere/runs"
    for text in ("~/runs", "~/runs@best"):
        with pytest.raises(InputError, match="'/somewhere/runs': no such folder"):
            Parent.find(text, "init")


@pytest.mark.parametrize("text", ["s3://bucket/run", "gs://bucket/run@3", "file:///run@best"])
def test_a_run_to_begin_with_is_a_path_here(text):
    with pytest.raises(InputError, match=r"--init-from RUN '.*expected a path"):
        Parent.find(text, "init")


@pytest.mark.parametrize(("workdir", "name"), [("r\udce9", "name"), ("runs", "m\udce9"), ("a/\udcff/b", "name")])
def test_a_path_that_is_not_utf_8_is_refused_before_training(workdir, name):
    with pytest.raises(InputError, match="expected a path in UTF-8"):
        fit(experiment(), workdir=workdir, name=name)


@pytest.mark.parametrize(
    "content", ["", "[]", '{"splits": [{}]}', '{"splits": [{"name": "a", "shardLengths": ["x"]}]}']
)
def test_one_broken_dataset_is_named_and_blocks_no_other(content, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("JAXMP_DATA", str(tmp_path))
    for name, text in (("broken", content), ("whole", "{}")):
        folder = tmp_path / name / "1.0.0"
        folder.mkdir(parents=True)
        (folder / "dataset_info.json").write_text(text)
    assert "whole" in {dataset.name for dataset in list_datasets()} and list(damaged_datasets()) == ["broken"]
    assert main(["data", "list"]) == 0 and "damaged" in capsys.readouterr().out
    assert main(["data", "info", "broken"]) == 2


@pytest.mark.parametrize("text", ["</script>", "<!--<script>", "<b>&amp;"])
def test_no_name_in_the_data_of_a_page_is_read_as_markup(text):
    page = Page(text, text)
    page.data({text: text})
    (script,) = [part for part in str(page).split("<script") if 'id="data"' in part]
    assert json.loads(script.partition(">")[2].partition("</script>")[0]) == {text: text}
    assert str(page).count("<script") == 1


def test_a_path_that_is_not_utf_8_is_written_to_a_page(tmp_path):
    Page("\udce9").write(tmp_path / "page.html")
    assert "\\udce9" in (tmp_path / "page.html").read_text()


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "cp1252"])
def test_what_an_output_cannot_encode_is_escaped_and_ends_no_run(encoding, monkeypatch):
    stream = io.TextIOWrapper(io.BytesIO(), encoding)
    monkeypatch.setattr(sys, "stdout", stream)
    with escaped_output():
        print("\N{SNOWMAN} \udce9", flush=True)
    assert stream.buffer.getvalue() == b"\\u2603 \\udce9\n" and stream.errors == "strict"


@pytest.mark.slow
def test_fit_says_what_its_output_cannot_encode(tmp_path, monkeypatch):
    stream = io.TextIOWrapper(io.BytesIO(), "ascii")
    monkeypatch.setattr(sys, "stdout", stream)
    missing = experiment(lambda split: rows(split) if split == "train" else None)
    assert fit(missing, workdir=tmp_path / "\N{SNOWMAN}").trained
    fit(dataclasses.replace(missing, loop=Loop(epochs=2)), workdir=tmp_path / "\N{SNOWMAN}")
    stream.flush()
    assert rb"\u2603" in stream.buffer.getvalue()


def test_configs_import_what_is_beside_them_from_any_folder(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "path", list(sys.path))
    for folder, width in (("first", 3), ("second exp", 4)):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "beside_it.py").write_text(f"WIDTH = {width}")
        text = "from beside_it import WIDTH\nfrom jaxmp import Experiment\nfrom jaxmp.models.mlp import MLP\n"
        (tmp_path / folder / "my.py").write_text(f"{text}def get_config(): return Experiment(MLP((WIDTH,)))")
        assert ConfigFile.find(str(tmp_path / folder / "my.py")).experiment().model.features == (width,)
    del sys.modules["beside_it"]


def test_a_failed_run_from_python_names_what_can_be_called(tmp_path):
    assert how_to_blame(tmp_path / "a b", {"source": ""}) == f"jaxmp blame '{tmp_path / 'a b'}'"
    assert how_to_blame(tmp_path, {}).startswith(f"jaxmp.blame(jaxmp.Run('{tmp_path}', experiment))")


class Noisy(nn.Module):
    """A VAE's noise, drawn in evaluation too."""

    @nn.compact
    def __call__(self, x):
        return nn.Dense(3)(x) + jax.random.normal(self.make_rng("noise"), (len(x), 3))


@pytest.mark.slow
def test_evaluation_draws_from_the_key_and_the_step_of_the_state(tmp_path):
    fitted = fit(experiment(model=Noisy(), save_every=1, keep=4), workdir=tmp_path, log=str)
    run = Run(fitted.path, experiment(model=Noisy(), save_every=1, keep=4))
    assert run.evaluate("test") == pytest.approx(fitted.summary["test"])
    assert np.array_equal(run.apply(rows("test")), run.apply(rows("test")))
    keys = [evaluation_key(run.state(step)) for step in (1, 2)]
    assert not jnp.array_equal(*map(jax.random.key_data, keys))


@pytest.mark.slow
def test_each_label_of_a_row_has_the_weight_of_its_row():
    logits = jnp.zeros((2, 3, 4)).at[1].set(jnp.array([9.0, 0, 0, 0]))
    batch = {"label": jnp.zeros((2, 3), int), "weight": jnp.array([0.0, 1.0])}
    loss, metrics = Classification()(logits, batch)
    assert metrics["accuracy"].weight == loss.weight == 3
    assert metrics["accuracy"].compute() == 1 and loss.compute() < 1e-2


@pytest.mark.slow
@pytest.mark.parametrize("platform", ["cuda", "rocm", "nonsense"])
def test_a_platform_that_is_not_there_is_one_message_and_doctor_tells(platform):
    environment = {"PATH": "", "HOME": "/nowhere", "JAX_PLATFORMS": platform, "PYTHONPATH": ":".join(sys.path)}
    jaxmp = [sys.executable, "-m", "jaxmp"]
    done = subprocess.run([*jaxmp, "train", "digits_mlp"], capture_output=True, text=True, env=environment)
    assert done.returncode == 2 and done.stderr.startswith("jaxmp: ") and "Traceback" not in done.stderr
    done = subprocess.run([*jaxmp, "doctor"], capture_output=True, text=True, env=environment)
    assert done.returncode == 0 and f"JAX_PLATFORMS={platform}" in done.stdout
