"""The command line: exit codes, messages, help; and that `import jaxmp` and `jaxmp --help` need no JAX."""

import ast
import contextlib
import dataclasses
import errno
import html
import importlib
import inspect
import itertools
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import textwrap
import tomllib
from pathlib import Path

import jax
import numpy as np
import pytest

import jaxmp
from jaxmp import InputError, RunFailed, cli
from jaxmp.cli import main
from jaxmp.commands import doctor, train
from jaxmp.experiment.config_file import ConfigFile
from jaxmp.runs import fit as loop
from jaxmp.runs.run import Run

pytestmark = pytest.mark.xdist_group("cli")  # one worker: the fixtures train

ROOT = Path(__file__).parent.parent

MY_OWN = '''
"""A model and data of one's own."""

from __future__ import annotations

import flax.linen as nn
import numpy as np

from jaxmp import Adam, Arrays, Experiment, Loop


class Net(nn.Module):
    """A net."""

    width: int = 8
    """Units of the hidden layer."""

    @nn.compact
    def __call__(self, x):
        return nn.Dense(3)(nn.relu(nn.Dense(self.width)(x)))


def load(split):
    rng = np.random.default_rng({"train": 0, "validation": 1, "test": 2}[split])
    label = rng.integers(0, 3, 60)
    return {"x": rng.normal(size=(60, 4)).astype(np.float32) + label[:, None], "label": label}


def get_config():
    from jaxmp import Classification

    return Experiment(
        model=Net(),
        data=Arrays(load, batch_size=20, images=()),
        task=Classification(inputs=("x",)),
        optimizer=Adam(1e-2),
        loop=Loop(epochs=4),
    )
'''


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A working folder with my.py in it."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "my.py").write_text(MY_OWN)
    return tmp_path


def printed(capsys):
    """What was printed: stdout, and stderr without the boxes that tyro draws."""
    out, err = capsys.readouterr()
    assert "Traceback" not in err
    return out, " ".join(re.sub("[│─╭╮╰╯]", " ", err).split())


# Imports.


def in_a_fresh_process(code):
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT).stdout


def test_help_needs_neither_jax_nor_tyro_nor_numpy():
    out = in_a_fresh_process(
        "import sys; from jaxmp.cli import main; main(['--help']); main(['data']); main(['--version']); "
        "print({'jax', 'flax', 'numpy', 'tyro', 'rich'} & set(sys.modules))"
    )
    assert out.splitlines()[-1] == "set()"


def test_import_and_help_of_commands_need_no_jax():
    out = in_a_fresh_process(
        "import sys, jaxmp; from jaxmp.cli import main; main(['--help']); main(['train', '--help']); main(['data']); "
        "main(['configs']); print({'jax', 'flax', 'numpy'} & set(sys.modules))"
    )
    assert out.splitlines()[-1] == "set()"


def test_the_first_step_waits_for_no_library_that_it_does_not_need(folder):
    (folder / "torch.py").write_text("print('torch is imported')")  # as tensorboardX does, where it is installed
    out = in_a_fresh_process(
        f"import sys; sys.path.append({str(folder)!r}); import jaxmp.runs.fit as module; from jaxmp.cli import main\n"
        "def first(*args, **kwargs):\n"
        "    for info in dispatches(*args, **kwargs):\n"
        "        print(info.step, {'orbax', 'flax.nnx', 'tensorflow_datasets', 'IPython'} & set(sys.modules))\n"
        "        yield info\n"
        "dispatches, module._dispatches = module._dispatches, first\n"
        f"main(['train', {str(folder / 'my.py')!r}, '--workdir', {str(folder)!r}, '--loop.steps', '1', '--quiet'])\n"
        "import torch"
    )
    assert out.splitlines() == ["1 set()", "torch is imported"]


def test_every_public_name_is_importable_and_known_to_type_checkers():
    (block,) = (node for node in ast.parse(Path(jaxmp.__file__).read_text()).body if isinstance(node, ast.If))
    seen_by_checkers = {name.name: node.module for node in block.body for name in node.names}
    assert seen_by_checkers == jaxmp._MODULE_OF
    for name in jaxmp.__all__:
        assert getattr(jaxmp, name) is getattr(importlib.import_module(jaxmp._MODULE_OF[name]), name)
    assert set(jaxmp.__all__) <= set(dir(jaxmp))


def test_submodules_are_reachable_and_other_names_are_refused():
    out = in_a_fresh_process("import jaxmp; print(jaxmp.errors.InputError.__name__, jaxmp.models.__name__)")
    assert out.split() == ["InputError", "jaxmp.models"]
    with pytest.raises(AttributeError, match="did you mean 'Policy'"):
        _ = jaxmp.Polcy


def test_the_version_stands_in_pyproject_too():
    assert tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"] == jaxmp.__version__


# Help and listings.


def test_help_names_every_command(capsys):
    assert main(["--help"]) == 0
    out, _ = printed(capsys)
    for name, command in cli.COMMANDS.items():
        assert command.summary.endswith(".")
        assert f"  {name:<14}{command.summary}" in out.splitlines()
    assert main([]) == 2


def test_every_file_of_a_command_is_in_the_list():
    files = {path.stem for path in (ROOT / "jaxmp" / "commands").glob("*.py")} - {
        "command",
        "dry_run",
        "fast_dev_run",
        "summary",
    }
    assert {command.run.__module__.rpartition(".")[2] for command in cli.COMMANDS.values()} == files


@pytest.mark.parametrize("name", cli.COMMANDS)
def test_every_command_has_help_with_a_line_for_every_option(name, capsys):
    assert main([*name.split(), "--help"]) == 0
    out = printed(capsys)[0]
    assert f"usage: jaxmp {name}" in out
    assert set(cli.COMMANDS[name].description.splitlines()) <= set(out.splitlines())
    fields = {field.name for field in dataclasses.fields(cli.COMMANDS[name].options)}
    assert fields == set(documented(cli.COMMANDS[name].options))


@pytest.mark.parametrize(
    ("command", "option"),
    [("train", "--overwrite"), ("audit", "--strict"), ("compare", "--seeds"), ("find-policy", "--budget")],
)
def test_help_without_a_config_has_the_options_and_tells_how_to_see_the_fields(command, option, capsys):
    assert main([command, "--help"]) == 0
    text = printed(capsys)[0]
    assert option in text and f"jaxmp {command} CONFIG --help" in text
    assert main(["train"]) == 2
    assert main(["train", "--seed", "1", "my.py"]) == 2
    assert "first argument has to be CONFIG" in printed(capsys)[1]


def test_help_of_a_config_shows_every_field_with_its_line_and_value(folder, capsys):
    assert main(["train", "my.py", "--help"]) == 0
    out = " ".join(re.sub("[│─╭╮╰╯]", " ", printed(capsys)[0]).split())
    for text in (
        "A model and data of one's own.",
        "--model.width INT Units of the hidden layer. (default: 8)",
        "--data.load {set in the file}",
        "(default: load)",
        "--precision STR",
        "--scaler.kind {auto,dynamic,static,none}",
        "--optimizer.learning-rate FLOAT",
        "--loop.epochs INT",
        "--parallel.mode {jit,pmap}",
        "--workdir STR",
        "--dry-run",
        "--overwrite",
    ):
        assert text in out
    assert "parent" not in out and "object at 0x" not in out


def documented(cls):
    """The fields of a class of ours that have a docstring under them, those of its bases included."""
    for base in cls.__mro__:
        if base.__module__.startswith("jaxmp"):
            (node,) = ast.parse(textwrap.dedent(inspect.getsource(base))).body
            for field, docstring in itertools.pairwise(node.body):
                if isinstance(field, ast.AnnAssign) and isinstance(docstring, ast.Expr):
                    yield field.target.id


@pytest.mark.parametrize("name", ["digits_mlp", "digits_cnn", "mnist_mlp", "mnist_cnn", "cifar10_cnn"])
def test_every_field_of_every_shipped_config_has_a_line_of_help(name):
    experiment = ConfigFile.find(str(ROOT / "configs" / f"{name}.py")).experiment()
    parts = [experiment, experiment.data.augment, experiment.optimizer.schedule, train.Options()]
    parts += [part for part in vars(experiment).values() if dataclasses.is_dataclass(part)]
    for part in parts:
        fields = {field.name for field in dataclasses.fields(part)} - {"parent", "name"}
        assert not fields - set(documented(type(part))), type(part)


def test_configs_lists_names_with_their_first_line(folder, capsys):
    (folder / "configs").mkdir()
    (folder / "configs" / "mine.py").write_text('"""My record.\n\nMore."""\nraise RuntimeError\n')
    assert main(["configs"]) == 0
    out, _ = printed(capsys)
    assert re.search(r"^mine +My record\.$", out, re.MULTILINE)
    assert re.search(r"^digits_mlp +8x8 handwritten digits", out, re.MULTILINE)


@pytest.mark.parametrize("text", ["{", '{"accuracy": 0.9}', "[3]", '[{"config": "a", "test": {}}]'])
def test_a_results_file_of_another_shape_is_named_with_the_keys_that_are_expected(folder, capsys, text):
    (folder / "configs").mkdir()
    (folder / "configs" / "mine.py").write_text('"""My record."""\n')
    (folder / "configs" / "results.json").write_text(text)
    assert main(["configs", "--markdown"]) == 2
    err = printed(capsys)[1]
    assert str(Path("configs", "results.json")) in err and "config, options, metric, seeds, test" in err


def test_doctor_knows_the_extras_of_pyproject_and_no_others():
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    assert set(doctor.EXTRAS) == set(extras) - {"cuda12", "cuda13"}


def test_data_commands(capsys):
    assert main(["data", "list"]) == 0
    assert "digits" in printed(capsys)[0]
    assert main(["data", "prepare", "digits"]) == 0
    assert "train 1258" in printed(capsys)[0]
    assert main(["data", "info", "digits"]) == 0
    assert "uint8" in printed(capsys)[0]
    assert main(["data"]) == 2
    assert main(["data", "--help"]) == 0


def test_doctor_says_what_is_here_and_how_to_get_what_is_missing(capsys, monkeypatch, tmp_path):
    monkeypatch.setenv("JAXMP_DATA", str(tmp_path))
    monkeypatch.setitem(doctor.EXTRAS, "wandb", ("no_such_module", "metrics elsewhere"))
    assert main(["doctor"]) == 0
    out, _ = printed(capsys)
    assert f"jax {jax.__version__}" in out
    assert f"{jax.local_device_count()} x cpu" in out
    assert "no_such_module (metrics elsewhere): `uv sync --extra wandb`, or `pip install 'jaxmp[wandb]'`" in out
    assert "jaxmp data prepare mnist" in out


@pytest.mark.parametrize(
    ("capability", "native"),
    [
        ("7.5", {"float64", "float32", "float16"}),
        ("8.0", {"float64", "float32", "float16", "tensorfloat32", "bfloat16"}),
        ("9.0", {"float64", "float32", "float16", "tensorfloat32", "bfloat16", "float8"}),
    ],
)
def test_native_dtypes_of_a_gpu_follow_its_compute_capability(capability, native):
    class Device:
        platform = "gpu"
        compute_capability = capability

    assert {name for name, is_native in doctor.native_dtypes(Device).items() if is_native} == native


# Training from the command line.


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A folder with my.py and a finished run of it."""
    folder = tmp_path_factory.mktemp("trained")
    (folder / "my.py").write_text(MY_OWN)
    with contextlib.chdir(folder):
        options_between_overrides = "--data.mean -0.1 0.2 --overwrite --seed 3 --workdir=runs --model.width 4"
        assert main(["train", "my.py", *options_between_overrides.split()]) == 0
    return folder


@pytest.fixture
def finished(trained, tmp_path, monkeypatch):
    """A copy of it as the working folder; returns the run folder."""
    folder = shutil.copytree(trained, tmp_path / "copy")
    monkeypatch.chdir(folder)
    (config,) = folder.glob("runs/my/*/config.json")
    return config.parent


SAME = "train my.py --data.mean -0.1 0.2 --seed 3 --model.width 4".split()


@pytest.mark.slow
def test_a_file_of_ones_own_trains(finished):
    config = json.loads((finished / "config.json").read_text())
    assert finished.name == f"{config['hash']}-s3"
    assert config["source"] == MY_OWN
    assert config["overrides"] == SAME[2:]
    assert Path(config["file"]).name == "my.py"
    assert json.loads((finished / "summary.json").read_text())["steps"] == 12


def test_a_finished_run_only_prints_its_summary(finished, capsys):
    metrics = (finished / "metrics.jsonl").read_text()
    assert main(SAME) == 0
    out, _ = printed(capsys)
    assert re.search(r"^test accuracy +0\.\d+", out, re.MULTILINE)
    assert str(finished.relative_to(Path.cwd())) in out
    assert (finished / "metrics.jsonl").read_text() == metrics


def test_a_finished_run_says_that_it_was_not_trained_and_refuses_what_a_fresh_one_would(finished, capsys):
    assert main([*SAME, "--parallel.shard", "zero1"]) == 0
    no_effect, trained, *rest = printed(capsys)[0].splitlines()
    assert no_effect == "parallel.shard = zero1 (was replicated) has no effect: the run is finished"
    assert trained.endswith("is finished: nothing was trained, this is its summary; --overwrite starts again") and rest
    assert main([*SAME, "--parallel.remat", "Dense_7"]) == 2
    out, err = printed(capsys)
    assert "parallel.remat 'Dense_7' names no module; " in err and not out


@pytest.mark.parametrize("content", ['{"steps": 12, "te', "{}"])
def test_a_broken_summary_is_refused_and_made_again_where_it_is_deleted(finished, content, capsys):
    summary = finished / "summary.json"
    before = json.loads(summary.read_text())
    summary.write_text(content)
    for command in (SAME, ["report", "runs"]):
        assert main(command) == 2
        out, err = printed(capsys)
        assert re.search("summary.json .*; delete this file alone", err) and not out
    summary.unlink()
    assert main(SAME) == 0
    assert json.loads(summary.read_text()) | {"wall_seconds": 0} == before | {"wall_seconds": 0}


@pytest.mark.parametrize("broken", [b"garbage\n", b"\xff\xfe\n", b"[1]\n"])
def test_a_broken_line_of_metrics_is_refused_by_report_and_train(finished, broken, capsys):
    metrics = finished / "metrics.jsonl"
    metrics.write_bytes(content := broken + metrics.read_bytes())
    (finished / "summary.json").unlink()
    for command in (SAME, ["report", "runs"]):
        assert main(command) == 2
        assert re.search(r"metrics.jsonl, line 1: .*; expected a JSON object", printed(capsys)[1])
    assert metrics.read_bytes() == content


def test_eval_prints_the_metrics_of_a_split(finished, capsys):
    assert main(["eval", "runs", "--split", "validation"]) == 0
    assert re.search(r"^accuracy +0\.\d+$", printed(capsys)[0], re.MULTILINE)


@pytest.mark.slow
def test_overwrite_starts_again(finished):
    (finished / "summary.json").write_text('{"marker": 1}')
    assert main([*SAME, "--overwrite"]) == 0
    assert "marker" not in (finished / "summary.json").read_text()


def test_dry_run_shows_what_would_run_and_writes_nothing(folder, capsys):
    assert main(["train", "my.py", "--dry-run", "--precision", "mixed_bfloat16"]) == 0
    out, _ = printed(capsys)
    assert "parameters  67" in out  # 4 * 8 + 8 + 8 * 3 + 3
    assert "3 batches an epoch, 12 steps in 4 epochs" in out
    assert re.search(r"^Dense_1 +Dense +40 +p=f32,c=bf16,o=f32 +\(default\)$", out, re.MULTILINE)
    assert "x float32 (20, 4)" in out
    assert [path.name for path in folder.iterdir()] == ["my.py"]


def test_a_signal_saves_and_ends_with_75_and_the_same_command_goes_on(folder, monkeypatch, capsys):
    dispatches = loop._dispatches

    def stopped_after_the_second(*arguments):
        for count, info in enumerate(dispatches(*arguments)):
            if count == 1:
                os.kill(os.getpid(), signal.SIGTERM)
            yield info

    with monkeypatch.context() as patched:
        patched.setattr(loop, "_dispatches", stopped_after_the_second)
        assert main(["train", "my.py"]) == 75
    assert "the same command goes on from there" in printed(capsys)[0]
    assert not list(folder.glob("runs/my/*/summary.json"))
    assert main(["train", "my.py"]) == 0
    assert "resuming runs/my/" in printed(capsys)[0]


@pytest.mark.slow
def test_ctrl_c_before_there_is_something_to_save_ends_with_130(folder):
    """Also where Python would swallow a KeyboardInterrupt."""
    interrupted = """
class Swallowing:
    def __del__(self):
        import os, signal
        os.kill(os.getpid(), signal.SIGINT)
        sum(range(10**6))
Swallowing()
"""
    (folder / "my.py").write_text(MY_OWN + interrupted)
    done = subprocess.run([sys.executable, "-m", "jaxmp", "train", "my.py"], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (130, "jaxmp: interrupted\n")
    assert not list(folder.glob("runs/my/*"))


# Bad input: exit code 2, one message, nothing written.


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("trian my.py", "unknown command 'trian'; expected one of train, eval, .*did you mean 'train'"),
        ("data prepair digits", "unknown command 'data prepair'.*did you mean 'data prepare'"),
        ("train digits_mpl", "config 'digits_mpl': no digits_mpl.py in .*did you mean 'digits_mlp'"),
        ("train me.py", "config 'me.py': no such file; did you mean 'my.py'"),
        ("train my.py --optimizer.learning-rat 1", "Perhaps you meant: --optimizer.learning-rate"),
        ("train my.py --model.widht 1", "Perhaps you meant: --model.width INT"),
        ("train my.py --dry-rn", "Perhaps you meant: --dry-run"),
        ("train my.py 3", "Unrecognized options: 3"),
        ("train my.py --model.width wide", "invalid literal for int.*'wide'"),
        ("train my.py --precision mixed_float61", "'mixed_float61' is no preset.*did you mean 'mixed_float16'"),
        ("train my.py --scaler.kind dynamc", "invalid choice 'dynamc'.*'dynamic'"),
        ("train my.py --optimizer.learning-rate -1", "learning_rate = -1.0: expected 0 or a positive number"),
        ("train my.py --data.batch-size 61", "batch_size is 61; the training split has only 60 rows"),
        ("train my.py --task.inputs y", "task.inputs names 'y'; the data has label, weight, x"),
        ("train my.py --loop.monitor acuracy", "expected one of .*did you mean 'accuracy'"),
        ("train digits_mlp --data.name imagenot", "dataset 'imagenot' is not prepared .*jaxmp data prepare imagenot"),
        ("train digits_mlp --data.train trian", "no split 'trian'; its splits are .*did you mean 'train'"),
        ("data info imagenot", "dataset 'imagenot' is not prepared"),
        ("eval nowhere", "run 'nowhere': no such folder"),
        ("eval my.py", "run 'my.py': this is a file; expected a run folder"),
        ("train my.py --workdir=", "workdir '': expected a path, which is empty here"),
        ("train my.py --dry-run --workdir=", "workdir '': expected a path"),
        ("compare my.py --workdir=", "workdir '': expected a path"),
        ("compare my.py --output=", "output '': expected a path"),
        ("report nowhere --output=", "output '': expected a path"),
        ("eval .", "is no run folder and holds none"),
        ("eval", "Missing from jaxmp eval: RUN"),
    ],
)
def test_bad_input_is_exit_code_2_and_one_message(arguments, message, folder, capsys):
    assert main(arguments.split()) == 2
    out, err = printed(capsys)
    assert re.search(message, err), err
    assert not out
    assert [path.name for path in folder.iterdir()] == ["my.py"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (("Net()", "Net(widht=3)"), r"my.py raised in line 33: model=Net\(widht=3\), TypeError: .*widht"),
        (("def get_config", "def get_confg"), r"expected a function get_config\(\).*did you mean 'get_confg'"),
        (("return Experiment(", "return dict("), "get_config.. returned .* a dict; expected a jaxmp.Experiment"),
        (("def load(split):", "def load(split:"), "SyntaxError"),
        (("Arrays(load,", "Arrays(lambda split: [1, 2],"), "returned a list; expected a dict of arrays"),
        (
            ("def load(split):", "def load(split):\n    raise OSError('broken file')"),
            "raised OSError: broken file.*line",
        ),
        (("Arrays(load,", "Arrays([].append,"), "data.load.*not the same in the next process"),
    ],
)
def test_a_config_that_does_not_work_is_exit_code_2(change, message, folder, capsys):
    assert change[0] in MY_OWN
    (folder / "my.py").write_text(MY_OWN.replace(*change))
    assert main(["train", "my.py"]) == 2
    _, err = printed(capsys)
    assert re.search(message, err), err
    assert [path.name for path in folder.iterdir()] == ["my.py"]


def test_a_run_folder_of_another_config_is_refused_and_left_alone(finished, capsys):
    config = json.loads((finished / "config.json").read_text())
    (finished / "config.json").write_text(json.dumps(config | {"hash": "0" * 12}))
    before = {path: path.stat().st_mtime_ns for path in finished.rglob("*")}
    assert main(SAME) == 2
    assert re.search("belongs to another experiment: hash 0{12}", printed(capsys)[1])
    assert {path: path.stat().st_mtime_ns for path in finished.rglob("*")} == before


def test_a_folder_that_is_no_run_folder_is_never_deleted(folder, capsys):
    experiment = ConfigFile.find("my.py").experiment()
    run = folder / "runs" / "my" / f"{experiment.hash}-s0"
    run.mkdir(parents=True)
    (run / "thesis.tex").write_text("years of work")
    for arguments in (["train", "my.py"], ["train", "my.py", "--overwrite"]):
        assert main(arguments) == 2
        assert "no run folder" in printed(capsys)[1]
    assert (run / "thesis.tex").read_text() == "years of work"


def test_a_workdir_that_cannot_be_written_is_exit_code_2(folder, monkeypatch, capsys):
    def mkdir(self, *arguments, **keywords):  # permissions would not stop root, who runs tests in containers
        raise PermissionError(errno.EACCES, "Permission denied", str(self))

    monkeypatch.setattr(Path, "mkdir", mkdir)
    assert main(["train", "my.py"]) == 2
    assert re.search("runs/my/.*: Permission denied; choose another folder", printed(capsys)[1])


@pytest.mark.parametrize("command", ["eval", "blame", "report"])
def test_an_empty_path_is_not_the_current_folder(finished, command, capsys):
    assert main([command, ""]) == 2
    assert "run '': expected a path" in printed(capsys)[1]


@pytest.mark.skipif(not Path("/proc/self").exists(), reason="no /proc here")
def test_a_place_that_takes_no_folders_is_exit_code_2(folder, capsys):
    assert main(["train", "my.py", "--workdir", "/proc/nope"]) == 2
    assert re.search("/proc/nope/my/.*: no folder can be made there; choose another", printed(capsys)[1])


def test_a_file_in_the_place_of_the_workdir_is_exit_code_2(folder, capsys):
    assert main(["train", "my.py", "--workdir", "my.py"]) == 2
    assert "my.py" in printed(capsys)[1]


@pytest.mark.slow
def test_a_full_disk_is_exit_code_2_and_with_more_room_the_run_goes_on(finished, capsys):
    disk, whole = finished.parents[2] / "disk", Run(finished)
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=48k", "tmpfs", str(disk)]
    if subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("mounting a small file system is not permitted here")
    try:
        assert main([*SAME, "--workdir", str(disk)]) == 2
        assert re.search("No space left on device.* Make room or choose another folder", printed(capsys)[1])
        subprocess.run(["mount", "-o", "remount,size=10m", str(disk)], check=True)
        assert main([*SAME, "--workdir", str(disk)]) == 0
        again = Run(disk)
        assert [line["loss"] for line in again.metrics] == [line["loss"] for line in whole.metrics]
        jax.tree.map(np.testing.assert_array_equal, again.state().params, whole.state().params)
    finally:
        subprocess.run(["umount", str(disk)], check=True)


# Failed runs.


@pytest.mark.parametrize(
    ("error", "code", "message"),
    [
        (InputError("what was wrong"), 2, "jaxmp: what was wrong"),
        (RunFailed("diverged at step 3"), 1, "jaxmp: diverged at step 3"),
        (jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory\nmore"), 1, "out of memory .*--data.batch-size"),
        (MemoryError(), 1, "out of memory"),
        (OSError(errno.ENOSPC, "No space left on device", "runs/my"), 2, "runs/my: No space left on device; .* room"),
        (OSError(errno.EROFS, "Read-only file system"), 2, "jaxmp: Read-only file system"),
        (KeyboardInterrupt(), 130, "interrupted"),
    ],
)
def test_expected_ends_are_a_message_and_a_code(error, code, message, monkeypatch, capsys):
    def fail(argv):
        raise error

    monkeypatch.setitem(cli.COMMANDS, "doctor", fail)
    assert main(["doctor"]) == code
    assert re.search(message, printed(capsys)[1])


def test_a_script_ends_as_a_command_does(monkeypatch, capsys):
    def measure(rows: int = 3) -> None:
        """Measures.

        Args:
            rows: How many.
        """
        if rows < 0:
            raise InputError(f"rows {rows}: expected 0 or more")
        if rows == 0:
            raise SystemExit("nothing was measured")
        print(rows)

    def alone() -> None:
        print(sys.argv[1:])

    for arguments, code, said in (
        ([], 0, "3"),
        (["--rows", "2"], 0, "2"),
        (["--rows", "-1"], 2, "jaxmp: rows -1: expected 0 or more"),
        (["--rows", "0"], 1, "nothing was measured"),
        (["--rwos", "0"], 2, "--rwos"),
        (["--help"], 0, "How many."),
    ):
        monkeypatch.setattr(sys, "argv", ["measure.py", *arguments])
        assert cli.script(measure) == code
        assert said in "".join(printed(capsys))
    monkeypatch.setattr(sys, "argv", ["alone.py", "--own"])
    assert cli.script(alone) == 0 and printed(capsys)[0] == "['--own']\n"


def test_bugs_show_their_traceback(monkeypatch):
    def fail(argv):
        raise TypeError("a bug")

    monkeypatch.setitem(cli.COMMANDS, "doctor", fail)
    with pytest.raises(TypeError, match="a bug"):
        main(["doctor"])


@pytest.mark.slow
def test_a_run_whose_loss_is_nan_fails_with_exit_code_1(folder, capsys):
    changed = MY_OWN.replace("+ label[:, None]", "* np.float32(np.inf)")
    (folder / "my.py").write_text(changed)
    assert main(["train", "my.py"]) == 1
    assert "the loss is NaN" in printed(capsys)[1]


@pytest.mark.slow
def test_a_run_whose_steps_are_all_skipped_fails_with_exit_code_1(folder, capsys):
    static = ["--scaler.kind", "static", "--scaler.init-scale", str(2.0**30)]
    assert main(["train", "my.py", *static, "--loop.max-consecutive-skips", "3"]) == 1
    _, err = printed(capsys)
    reason = re.search(r"\d steps in a row were skipped, .*(?=\. The state)", err)[0]
    assert main(["report", "runs"]) == 0
    page = html.unescape(Path(printed(capsys)[0].strip()).read_text())
    (path,) = folder.glob("runs/my/*")
    assert f"{path.relative_to(folder)}: {reason}" in page and f"jaxmp blame {path.relative_to(folder)}" in page
    assert "Not ended" not in page and "cross" in page


def test_an_output_that_is_closed_is_no_error(monkeypatch):
    monkeypatch.setattr(sys, "stdout", None)  # as Python has it after `>&-`
    assert main(["configs"]) == 0


def test_a_closed_pipe_is_no_error():
    read_end, write_end = os.pipe()
    os.close(read_end)
    done = subprocess.run(
        [sys.executable, "-m", "jaxmp", "configs"],
        stdout=write_end,
        stderr=subprocess.PIPE,
        text=True,
        cwd=ROOT,
        env={name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"},  # as most users have it
    )
    os.close(write_end)
    assert (done.returncode, done.stderr) == (0, "")
