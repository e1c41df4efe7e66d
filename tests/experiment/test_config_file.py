"""Config files: how they are found and run, and what is said of one that cannot be used."""

from pathlib import Path

import pytest

from jaxmp import InputError
from jaxmp.experiment import config_file
from jaxmp.experiment.config_file import ConfigFile


def write(folder, text, name="my.py"):
    path = folder / name
    path.write_text(text)
    return path


SMALL = (
    "from jaxmp import *\nfrom jaxmp.models.mlp import MLP\n\ndef get_config():\n    return Experiment(model=MLP())\n"
)


def test_a_config_is_found_by_path_and_by_name_in_the_working_folder_first(tmp_path, monkeypatch):
    shipped, own = tmp_path / "shipped", tmp_path / "own"
    for folder in (shipped, own / "configs"):
        folder.mkdir(parents=True)
        write(folder, SMALL, "same.py")
    write(shipped, SMALL, "other.py")
    monkeypatch.chdir(own)
    monkeypatch.setattr(config_file, "folders", lambda: [Path("configs"), shipped])
    assert Path(ConfigFile.find("same").file) == own / "configs" / "same.py"
    assert Path(ConfigFile.find("other").file) == shipped / "other.py"
    assert Path(ConfigFile.find("configs/same.py").file) == own / "configs" / "same.py"
    assert sorted(config_file.available()) == ["other", "same"]
    with pytest.raises(InputError, match="did you mean 'other'"):
        ConfigFile.find("othr")
    with pytest.raises(InputError, match=r"no such file.*did you mean 'same\.py'"):
        ConfigFile.find("configs/sme.py")
    with pytest.raises(InputError, match="no such file"):
        ConfigFile.find("nowhere/same.py")


def test_a_config_that_raises_is_one_message_with_its_own_line(tmp_path):
    path = write(tmp_path, SMALL.replace("MLP()", "MLP(featurs=3)"))
    with pytest.raises(InputError) as error:
        ConfigFile.find(str(path)).experiment()
    assert str(error.value).startswith(
        f"config {path} raised in line 5:\n    return Experiment(model=MLP(featurs=3))\n"
    )
    assert "TypeError" in str(error.value) and "featurs" in str(error.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("def get_config(:\n", "line 1:\n    def get_config"),
        ("import nothing_of_this_name\n", "ModuleNotFoundError"),
        ("raise SystemExit(3)\n", "SystemExit"),
        (SMALL.replace("model=MLP()", "model=MLP(), precision='flaot32'"), "did you mean 'float32'"),
        (SMALL.replace("get_config", "get_confg"), r"expected a function get_config\(\).*did you mean 'get_confg'"),
        (
            SMALL.replace("Experiment(model=MLP())", "3"),
            r"get_config\(\) returned 3, a int; expected a jaxmp.Experiment",
        ),
        (SMALL.replace("get_config()", "get_config(seed)"), "missing 1 required positional argument"),
        ("\0", "null bytes"),
    ],
)
def test_a_config_that_cannot_be_used_is_an_input_error(text, message, tmp_path):
    with pytest.raises(InputError, match=message):
        ConfigFile.find(str(write(tmp_path, text))).experiment()


def test_a_file_that_is_no_text_is_an_input_error(tmp_path):
    (tmp_path / "my.py").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(InputError, match="expected a Python file"):
        ConfigFile.find(str(tmp_path / "my.py"))


def test_docstrings_of_configs_are_read_without_running_them(tmp_path):
    path = write(tmp_path, '"""The record.\n\nMore."""\nraise RuntimeError\n')
    assert ConfigFile.find(str(path)).docstring.splitlines()[0] == "The record."
    assert ConfigFile.find(str(write(tmp_path, "def"))).docstring == "(not Python)"


def test_classes_and_annotations_of_a_config_are_its_own(tmp_path):
    # String annotations are looked up in the module, and so are the docstrings that --help shows.
    text = (
        "from __future__ import annotations\nimport flax.linen as nn\n"
        + SMALL
        + ("\nclass Mine(nn.Module):\n    width: int = 3\n    'Width.'\n")
    )
    config = ConfigFile.find(str(write(tmp_path, text.replace("model=MLP()", "model=Mine()"))))
    assert config.experiment(["--model.width", "4"]).model.width == 4


def test_a_config_is_plain_python_whatever_jaxmp_imports_from_the_future():
    text = "def get_config(x: int = 0):\n    raise TypeError(get_config.__annotations__)\n"
    with pytest.raises(InputError, match=r"\{'x': <class 'int'>\}"):
        ConfigFile("my", text, "my.py").experiment()
