from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import pytest


def _load(name):
    """A file of this folder that has no tests, as a module: pytest does not put the folder on the path."""
    spec = importlib.util.spec_from_file_location(name, Path(__file__).with_name(f"{name}.py"))
    sys.modules[name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(sys.modules[name])
    return sys.modules[name]


@pytest.fixture(scope="session")
def run(tmp_path_factory):
    """A run of two steps, with an average of its weights."""
    return runs.trained(tmp_path_factory.mktemp("deploy"))


runs = _load("deployed_runs")
