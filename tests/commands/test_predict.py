"""`jaxmp predict`: from a run and a file to a file."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest

from jaxmp.cli import main
from jaxmp.data.tables import read_table

pytestmark = pytest.mark.xdist_group("predict")  # one worker: the fixture trains

CONFIG = '''
"""Points on a line."""

import flax.linen as nn
import numpy as np

from jaxmp import Adam, Arrays, Classification, Experiment, Loop


class Sign(nn.Module):
    """A linear model."""

    @nn.compact
    def __call__(self, x):
        return nn.Dense(2)(x[:, None])


def load(split):
    x = np.linspace(-1, 1, 40, dtype=np.float32)
    return {"x": x, "label": (x > 0).astype(int)}


def get_config():
    return Experiment(
        model=Sign(),
        data=Arrays(load, batch_size=40, eval_batch_size=16, images=()),
        task=Classification(inputs=("x",)),
        optimizer=Adam(0.1),
        loop=Loop(steps=60),
        precision="mixed_bfloat16",
    )
'''


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("predict")
    (folder / "sign.py").write_text(CONFIG)
    assert main(["train", str(folder / "sign.py"), "--workdir", str(folder / "runs")]) == 0
    return folder


@pytest.mark.slow
def test_a_split_and_a_file_with_its_rows_are_predicted_alike(trained, capsys):
    for output, more in (("a.npz", []), ("b.csv", []), ("c.parquet", ["--input", str(trained / "rows.csv")])):
        x = np.linspace(-1, 1, 40, dtype=np.float32)
        lines = [f"{value!r},{int(value > 0)}" for value in x.tolist()]
        (trained / "rows.csv").write_text("\n".join(["x,label", *lines]))
        assert main(["predict", str(trained / "runs"), "--output", str(trained / output), *more]) == 0
        out = capsys.readouterr().out
        assert out.splitlines()[0].split() == ["rows", "40"] and out.splitlines()[-1].endswith(output)
        assert "label, predicted:" in out and "f1-score" in out
    a, b, c = (read_table(trained / name) for name in ("a.npz", "b.csv", "c.parquet"))
    assert a["prediction"].tolist() == b["prediction"].tolist() == c["prediction"].tolist() == [0] * 20 + [1] * 20
    assert a["probability"].tolist() == b["probability"].tolist() == c["probability"].tolist()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("argv", "expected"),
    [
        (["--input", "points.csv"], "no column 'x', an input of the model; they have label, y"),
        (["--input", "nothing.csv"], "'nothing.csv': No such file"),
        (["--output", "p.txt"], "'p.txt': expected a file that ends with"),
        (["--output", "nowhere/p.csv"], "there is no folder 'nowhere'"),
        (["--output", "s3://bucket/p.csv"], "not s3:// URLs"),
        (["--step", "7"], "7"),
        (["--step", "first"], "--step first: expected last, best or the number of a step"),
    ],
)
def test_bad_input_is_one_message_and_nothing_is_written(trained, tmp_path, monkeypatch, capsys, argv, expected):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "points.csv").write_text("y,label\n1,0\n")
    assert main(["predict", str(trained / "runs"), *argv]) == 2
    assert expected in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["points.csv"]


def test_padding_of_the_task_is_no_class(tmp_path, monkeypatch, capsys):
    task = SimpleNamespace(target="tag", padding=-1)
    predicted = {"prediction": np.array([[0, 1, 1]]), "tag": np.array([[0, 1, -1]])}
    run = SimpleNamespace(experiment=SimpleNamespace(task=task), predict=lambda rows, state: predicted)
    monkeypatch.setattr("jaxmp.runs.run.Run", lambda path: run)
    assert main(["predict", "a", "--output", str(tmp_path / "p.npz")]) == 0
    assert "label, predicted:  0  1" in capsys.readouterr().out
