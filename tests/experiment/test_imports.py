"""What a config imports from its own folder: found without running it, recorded, and compared."""

import json
import sys

import pytest

from jaxmp.cli import main
from jaxmp.experiment.imports import local_imports


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A folder of a user's own on the path; what is imported from it is forgotten again."""
    before = set(sys.modules)
    monkeypatch.syspath_prepend(tmp_path)
    yield tmp_path
    for name in set(sys.modules) - before:
        if str(tmp_path) in str(getattr(sys.modules[name], "__file__", None)):
            del sys.modules[name]


def write(folder, **files):
    for name, text in files.items():
        path = folder / f"{name.replace('__', '/')}.py"
        path.parent.mkdir(exist_ok=True)
        path.write_text(text)


def test_imports_are_found_where_they_lie_and_through_each_other(folder):
    config = """
import json, jax.numpy as jnp
import my_cells as cells
from my_package.layers import Dense
from my_spaces import plain
def load(split):
    from my_data import rows
"""
    write(folder, my_cells="import my_base\nimport missing_altogether", my_base="x = 1", my_data="rows = 1")
    write(folder, my_spaces__plain="y = 2", my_unused="")
    (folder / "my_package").mkdir()
    (folder / "my_package" / "__init__.py").write_text("# empty")
    write(folder / "my_package", layers="from . import blocks\nfrom .norms import Norm", blocks="", norms="Norm = 1")
    found = local_imports(config, str(folder / "config.py"))
    assert list(found) == [
        "my_base",
        "my_cells",
        "my_data",
        *("my_package", "my_package.blocks", "my_package.layers", "my_package.norms"),
        "my_spaces.plain",
    ]
    assert found["my_base"] == "x = 1"
    assert not set(found) & set(sys.modules)
    assert local_imports(config, str(folder / "elsewhere" / "config.py")) == {}


def test_what_is_installed_in_the_folder_does_not_count(tmp_path, monkeypatch):
    packages = tmp_path / "venv" / "site-packages"
    packages.mkdir(parents=True)
    (packages / "my_installed.py").write_text("")
    monkeypatch.syspath_prepend(packages)
    assert local_imports("import my_installed, jaxmp.models.mlp", str(tmp_path / "config.py")) == {}


CONFIG = """
import numpy as np
from jaxmp import Arrays, Experiment, Loop
from my_base import Net

def load(split):
    return {"image": np.zeros((8, 2, 2, 1), np.uint8), "label": np.arange(8) % 3}

def get_config():
    return Experiment(model=Net(), data=Arrays(load, batch_size=4), loop=Loop(steps=1))
"""
BASE = """
import flax.linen as nn

class Net(nn.Module):
    @nn.compact
    def __call__(self, image):
        return nn.Dense(3)(nn.relu(image.reshape(len(image), -1)))
"""


@pytest.mark.slow
def test_a_run_is_gone_on_with_and_read_by_the_code_that_it_began_with(folder, capsys):
    write(folder, config=CONFIG, my_base=BASE)
    runs = str(folder / "runs")
    train, read = ["train", str(folder / "config.py"), "--workdir", runs], ["eval", runs]
    assert main(train) == 0
    write(folder, my_base=BASE.replace("nn.relu", "nn.gelu"))
    sys.modules.pop("my_base")  # in a new process
    for command in (train, read):
        capsys.readouterr()
        assert main(command) == 2
        assert f"my_base.Net.__call__ has changed since {folder / 'runs'}" in capsys.readouterr().err
    (recorded,) = (folder / "runs").glob("config/*/config.json")
    assert json.loads(recorded.read_text())["imports"] == {"my_base": BASE}
    write(folder, my_base=BASE.replace("@nn.compact", "# why\n    @nn.compact"))
    sys.modules.pop("my_base")
    assert main(train) == main(read) == 0
