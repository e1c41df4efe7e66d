"""`jaxmp train`: its options, each on a small run."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from jaxmp.cli import main
from jaxmp.errors import BAD_INPUT, DONE, FAILED, STOPPED

pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("train options")]

CONFIG = '''
"""Two clusters."""

import flax.linen as nn
import numpy as np

from jaxmp import Adam, Arrays, Classification, CosineDecay, Experiment, Loop


class Net(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.Dense(2)(nn.relu(nn.Dense(32)(x)))


def load(split):
    rng = np.random.default_rng(len(split))
    label = rng.integers(0, 2, 100)
    return {"x": (rng.normal(size=(100, 3)) + label[:, None]).astype(np.float32), "label": label}


def get_config():
    return Experiment(
        model=Net(),
        data=Arrays(load, batch_size=10, images=()),
        task=Classification(inputs=("x",)),
        optimizer=Adam(0.1, schedule=CosineDecay(warmup_steps=50)),
        loop=Loop(epochs=10, log_every=10),
    )
'''


@pytest.fixture
def train(tmp_path, monkeypatch):
    """`train(*options) -> exit code`, in a folder with the config."""
    monkeypatch.chdir(tmp_path)
    Path("net.py").write_text(CONFIG)
    return lambda *options: main(["train", "net.py", *options])


def lines(split="train"):
    (file,) = Path("runs").glob("*/*/metrics.jsonl")
    return [line for line in map(json.loads, file.read_text().splitlines()) if line["split"] == split]


def test_a_fast_dev_run_does_everything_and_leaves_nothing(train, capsys):
    assert train("--fast-dev-run") == DONE  # with a warm-up of more steps than it makes
    out = capsys.readouterr().out
    assert "fast dev run: 4 steps; evaluations: 2 of validation, 1 of test" in out
    assert [path.name for path in Path().iterdir()] == ["net.py"]
    assert train("--fast-dev-run", "--overwrite") == BAD_INPUT
    assert "--overwrite: not with --fast-dev-run" in capsys.readouterr().err
    assert train("--fast-dev-run", "--optimizer.learning-rate", "1e38") in (DONE, FAILED)
    assert "jaxmp-fast-dev-run" not in capsys.readouterr().err


def test_quiet_says_nothing(train, capsys):
    assert train("--quiet", "--loop.steps", "60") == DONE
    assert capsys.readouterr() == ("", "")
    assert len(lines()) == 6


def test_limited_batches_are_counted_as_epochs_and_limit_evaluation(train):
    assert train("--loop.limit-batches", "3", "--optimizer.schedule.warmup-steps", "0") == DONE
    assert [line["step"] for line in lines("validation")] == list(range(3, 31, 3))
    assert all(round(line["accuracy"] * 30) == pytest.approx(line["accuracy"] * 30) for line in lines("validation"))


def test_the_same_batches_over_and_over_are_learned_by_heart(train, capsys):
    assert train("--loop.overfit-batches", "1", "--loop.epochs", "300", "--loop.eval-every", "50") == DONE
    assert "trains on the same 10 rows, and they are the validation split" in capsys.readouterr().out
    assert lines("validation")[-1]["accuracy"] == 1.0 and lines("validation")[-1]["loss"] < 0.1


def test_a_run_out_of_minutes_is_saved_and_the_same_command_goes_on(train, capsys):
    options = ("--loop.max-minutes", "1e-6", "--loop.log-every", "50", "--loop.epochs", "5")
    assert [train(*options) for _ in range(6)] == [STOPPED] * 4 + [DONE] * 2  # an epoch a session
    assert "stopped at step 10 after 1e-06 minutes (loop.max_minutes) and saved" in capsys.readouterr().out


# Of jaxlib 0.12, which aborts where it is an error.
@pytest.mark.filterwarnings("ignore:builtin type event_stats has no __module__:DeprecationWarning")
def test_a_trace_of_some_steps_can_be_read_and_one_past_the_end_is_refused_before_the_first_step(train, capsys):
    assert train("--profile", "99:101") == BAD_INPUT
    assert "the run has 100 steps; expected FIRST:LAST within 1:100" in capsys.readouterr().err
    assert not Path("runs").exists()
    assert train("--profile", "22:24") == DONE
    (file,) = Path("runs").glob("*/*/plugins/profile/*/*.xplane.pb")
    from jax.profiler import ProfileData

    events = [
        event for plane in ProfileData.from_file(str(file)).planes for line in plane.lines for event in line.events
    ]
    steps = {dict(event.stats)["step_num"] for event in events if event.name == "train"}
    assert steps == {22, 23, 24}
