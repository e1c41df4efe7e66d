"""100 bad inputs of 25 kinds: each ends in exit code 2 and one message, and nothing is written or lost."""

import pytest

from jaxmp.cli import main

CONFIG = """
import dataclasses, datetime
import flax.linen as nn, jax, jax.numpy as jnp, numpy as np
from jaxmp import Adam, Arrays, Classification, Experiment, Loop, Mean, Task

class Net(nn.Module):
    out: int = 3
    @nn.compact
    def __call__(self, x):
        return nn.Dense(self.out)(x)

def rows(**columns):
    def load(split):
        x = np.ones((8, 4), np.float32)
        return {"x": x, "label": np.arange(8) % 3, **columns}
    return load

@dataclasses.dataclass(frozen=True)
class Mine(Task):
    returned: object
    inputs: tuple = ("x",)
    target: str = "label"
    def __call__(self, outputs, batch):
        return self.returned(outputs, batch)

def per_row(outputs, batch):
    return Mean.of(jnp.sum(outputs, -1), batch["weight"])

def make(load=rows(), task=Classification(inputs=("x",)), model=Net(), loop=None, seed=0, **data):
    loop = Loop(**{"epochs": 1, **(loop or {})})
    data = {"batch_size": 4, "images": (), **data}
    return Experiment(model=model, data=Arrays(load, **data), task=task, optimizer=Adam(1e-2), loop=loop, seed=seed)

def get_config():
    return EXPRESSION
"""

N = 8
# Kind: expressions of the config, each with the words that the message has to hold: value, place, what is expected.
CONFIGS = {
    "a number of rows that is not whole": {
        "make(batch_size=2.5)": "data.batch_size = 2.5 whole",
        "make(batch_size='4')": "data.batch_size = '4' whole",
        "make(eval_batch_size=True)": "data.eval_batch_size = True whole",
        "make(batch_size=float('nan'))": "data.batch_size = nan whole",
    },
    "a length of training that is not whole": {
        "make(loop=dict(epochs=1.5))": "loop.epochs = 1.5 whole",
        "make(loop=dict(steps=np.float32(2.5)))": "loop.steps = 2.5 whole",
        "make(loop=dict(log_every=0))": "loop.log_every = 0 whole",
        "make(loop=dict(limit_batches=0))": "loop.limit_batches = 0 whole",
        "make(loop=dict(max_minutes=0))": "loop.max_minutes=0.0 above",
        "make(loop=dict(patience='3'))": "loop.patience = '3' whole",
    },
    "a seed": {
        "make(seed=-1)": "seed = -1 whole",
        "make(seed=1.5)": "seed = 1.5 whole",
        "make(seed=2**32)": "seed = 4294967296 whole",
        "make(seed='a')": "seed = 'a' whole",
    },
    "integers beyond 32 bits": {
        "make(rows(label=np.full(8, 2**32)))": "label 4294967296 int32",
        "make(rows(u=np.full(8, 2**40, np.uint64)))": "u 1099511627776 uint32",
        "make(rows(i=np.full(8, -2**35)))": "i -34359738368 int32",
        "make(rows(x=np.full((8, 4), 2**31)))": "x 2147483648 int32",
    },
    "an input that holds no numbers": {
        "make(rows(x=np.arange(8).astype('datetime64[D]')))": "x datetime64[D] numbers",
        "make(rows(x=np.arange(8).astype('timedelta64[s]')))": "x timedelta64[s] numbers",
        "make(rows(x=np.zeros(8, [('a', 'f4')])))": "x JAX does not have numbers",
        "make(rows(x=np.zeros((8, 4), np.longdouble)))": "x JAX does not have numbers",
        "make(rows(x=[[1] * (i + 1) for i in range(8)]))": "x objects numbers",
        "make(rows(x={'a': np.ones(8)}))": "x dict array",
    },
    "a label that holds no numbers": {
        "make(rows(label=['a'] * 8))": "label strings whole numbers",
        "make(rows(label=None))": "label NoneType whole numbers",
        "make(rows(label=np.array([b'a'] * 8)))": "label strings whole numbers",
        "make(rows(label=np.array([{}] * 8)))": "label objects whole numbers",
    },
    "a label outside the classes": {
        "make(rows(label=np.full(8, 3)))": "label 3 0 to 2",
        "make(rows(label=np.full(8, -1)))": "label -1 0 to 2",
        "make(rows(label=np.arange(8)))": "label 7 0 to 2",
    },
    "a label of another shape or dtype": {
        "make(rows(label=np.zeros((8, 1), int)))": "label 4, 1 expected",
        "make(rows(label=np.zeros((8, 3), int)))": "label 4, 3 expected",
        "make(rows(label=np.zeros(8, np.float32)))": "label float32 whole numbers",
        "make(rows(label=np.zeros(8, bool)))": "label bool whole numbers",
    },
    "what load returns": {
        "make(lambda split: None)": "'train' None dict",
        "make(lambda split: [1])": "'train' list dict",
        "make(lambda split: {})": "'train' empty dict",
        "make(lambda split: {'x': np.ones(0)})": "'train' no rows",
        "make(rows(x=np.ones((9, 4))))": "'train' (9, 4) leading axis",
        "make(rows(x=np.ma.masked_array(np.ones(8), np.ones(8, bool))))": "x 8 masked",
    },
    "what load raises": {
        "make(lambda split: 1 / 0)": "'train' ZeroDivisionError",
        "make(lambda split: open('nothing.npy'))": "'train' nothing.npy",
        "make(lambda split: {}[split])": "'train' KeyError",
    },
    "columns of the task": {
        "make(task=Classification(inputs=('y',)))": "'y' x",
        "make(task=Classification(inputs=('x',), target='lable'))": "'lable' did you mean 'label'",
        "make(rows(weight=np.ones(8)))": "'weight' rename",
        "make(task=Classification(inputs='x'))": "'x' tuple",
    },
    "(rows, 1) outputs beside a (rows,) target": {
        "make(model=Net(1), task=Mine(lambda o, b: (Mean.of(o - b['label'], b['weight']), {})))": "shape weights",
        "make(model=Net(1), task=Mine(lambda o, b: (Mean.of(jnp.mean((o - b['label'])**2, -1), b['weight']), {})))": (
            "(4, 1) (4,) label"
        ),
        "make(model=Net(1), task=Mine(lambda o, b: (Mean.of(jnp.abs(b['label'] * o).sum(0), b['weight']), {})))": (
            "(4, 1) (4,) label"
        ),
    },
    "what a task returns": {
        "make(task=Mine(lambda o, b: o.mean()))": "Mine.__call__ Mean.of",
        "make(task=Mine(lambda o, b: (o.mean(), {})))": "Mine.__call__ loss Mean.of",
        "make(task=Mine(lambda o, b: per_row(o, b)))": "Mine.__call__ Mean",
        "make(task=Mine(lambda o, b: (per_row(o, b), {'a': 1.0})))": "Mine.__call__ a float Mean",
        "make(task=Mine(lambda o, b: (per_row(o, b), {3: per_row(o, b)})))": "Mine.__call__ 3 string",
        "make(task=Mine(lambda o, b: (per_row(o, b), {'a': b['importance'] })))": "'importance' label, weight, x",
    },
    "a reserved name of a metric": {
        f"make(task=Mine(lambda o, b: (per_row(o, b), {{'{name}': per_row(o, b)}})))": f"'{name}' another name"
        for name in ("step", "epoch", "split", "loss", "loss_scale", "wall_seconds", "nan_loss", "ranges")
    },
    "a monitor": {
        "make(loop=dict(monitor='acuracy'))": "'acuracy' did you mean 'accuracy'",
        "make(loop=dict(monitor='f1'))": "'f1' expected",
        "make(loop=dict(mode='maximum'))": "mode=maximum max or min",
    },
    "patience without a validation split": {
        "make(lambda s: rows()(s) if s == 'train' else None, loop=dict(patience=2))": "loop.patience = 2 validation",
        "make(lambda s: rows()(s) if s != 'validation' else None, loop=dict(patience=1))": "patience = 1 validation",
    },
    "splits that differ": {
        "make(lambda s: rows(x=np.ones((8, 4 + (s == 'test')), np.float32))(s))": "x test 5 expected",
        "make(lambda s: rows(x=np.ones((8, 4), 'f4' if s == 'train' else 'i4'))(s))": "x validation int32 expected",
    },
    "a batch of more rows than there are": {
        "make(batch_size=9)": "data.batch_size 9 8 rows",
        "make(batch_size=10**9)": "data.batch_size 1000000000 8 rows",
    },
    "readers": {
        "make(workers=-1)": "data.workers = -1 whole",
        "make(workers=1.5)": "data.workers = 1.5 whole",
        "make(device_limit=-5)": "data.device_limit = -5 whole",
        "make(host_transforms=print)": "data.host_transforms tuple",
    },
    "what get_config returns": {
        "None": "get_config() None Experiment",
        "Net()": "get_config() Net Experiment",
        "undefined": "NameError undefined",
        "Experiment(Net)": "model Net instance",
    },
}
# Kind: arguments after `jaxmp`, with my.py a good config.
COMMANDS = {
    "a workdir that is no path here": {
        "train my.py --workdir s3://bucket/runs": "workdir s3:// path",
        "train my.py --workdir gs://bucket/runs": "workdir gs:// path",
        "train my.py --workdir file:///tmp/runs": "workdir file:// path",
        "train my.py --workdir hdfs://a/b": "workdir hdfs:// path",
        "train my.py --workdir=": "workdir empty path",
        "train my.py --workdir ~nobody_of_this_name/runs": "workdir ~nobody_of_this_name path",
    },
    "a file to write that is no path here": {
        "audit my.py --json s3://bucket/a.json": "json s3:// path",
        "compare my.py --output gs://bucket/a.html": "output gs:// path",
        "report nothing --output s3://bucket/a.html": "output s3:// path",
        "find-policy my.py --json az://bucket/a.json": "json az:// path",
    },
    "a run that is not there": {
        "eval nothing": "nothing folder",
        "blame s3://bucket/run": "run s3:// path",
        "report my.py": "my.py file run folder",
        "eval .": "config.json",
    },
    "a config that is not there": {
        "train mi.py": "mi.py did you mean 'my.py'",
        "train digits_mpl": "digits_mpl did you mean 'digits_mlp'",
        "train .": "expected",
        "audit nowhere/my.py": "nowhere",
    },
    "a command or a dataset that is not there": {
        "trian my.py": "trian did you mean 'train'",
        "data lsit": "data lsit did you mean 'data list'",
        "data info digitz": "digitz did you mean 'digits'",
        "train": "CONFIG",
    },
}


def cases(kinds):
    return [
        pytest.param(given, words, id=f"{kind}: {given}") for kind, of in kinds.items() for given, words in of.items()
    ]


def refused(arguments, words, folder, capsys):
    before = sorted(path for path in folder.rglob("*") if "__pycache__" not in path.parts)
    assert main(arguments) == 2
    out, err = capsys.readouterr()
    assert err.startswith("jaxmp: ") and "Traceback" not in err and len(err) <= 600, err
    for word in words.split():
        assert word in err, (word, err)
    assert sorted(path for path in folder.rglob("*") if "__pycache__" not in path.parts) == before
    assert "train " not in out


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_there_are_100_bad_inputs_of_25_kinds():
    assert len({*CONFIGS, *COMMANDS}) >= 25
    assert len(cases(CONFIGS) + cases(COMMANDS)) >= 100


@pytest.mark.slow
@pytest.mark.parametrize(("expression", "words"), cases(CONFIGS))
def test_a_config_that_cannot_train_is_one_message(expression, words, folder, capsys):
    (folder / "my.py").write_text(CONFIG.replace("EXPRESSION", expression))
    refused(["train", "my.py"], words, folder, capsys)


@pytest.mark.parametrize(("line", "words"), cases(COMMANDS))
def test_a_command_line_that_cannot_be_run_is_one_message(line, words, folder, capsys):
    (folder / "my.py").write_text(CONFIG.replace("EXPRESSION", "make()"))
    refused(line.split(" "), words, folder, capsys)
