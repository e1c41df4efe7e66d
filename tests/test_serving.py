"""experiments/serving: every kind of bad request is answered by 400 or 422, and an output may have any name."""

from __future__ import annotations

import importlib.util
import io
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import numpy as np

from jaxmp.deploy import predict
from jaxmp.deploy.predict import Artefact

FOLDER = Path(__file__).parents[1] / "experiments" / "serving"


def serving(monkeypatch):
    """server.py and load.py, without FastAPI."""
    fastapi, concurrency = ModuleType("fastapi"), ModuleType("fastapi.concurrency")
    for name in ("FastAPI", "Request", "Response"):
        setattr(fastapi, name, SimpleNamespace)
    concurrency.run_in_threadpool = None
    monkeypatch.setitem(sys.modules, "fastapi", fastapi)
    monkeypatch.setitem(sys.modules, "fastapi.concurrency", concurrency)
    for name in ("server", "load"):
        spec = importlib.util.spec_from_file_location(name, FOLDER / f"{name}.py")
        module = importlib.util.module_from_spec(spec)
        monkeypatch.setitem(sys.modules, name, module)
        spec.loader.exec_module(module)
    return sys.modules["server"], sys.modules["load"]


def test_bad_requests_are_answered_by_what_is_wrong_with_them(monkeypatch):
    server, load = serving(monkeypatch)
    manifest = {
        "inputs": {"image": {"shape": ["b", 2], "dtype": "float32"}},
        "outputs": {"file": {"shape": ["b", 2], "dtype": "float32"}},
        "structure": {"file": 0},
        "state": {},
    }
    model = Artefact(manifest, {}, lambda state, inputs: inputs)
    bad = load.bad_requests(model, 33)
    statuses = [server.answer_to(body, predict, model)[0] for body in bad]
    assert statuses[:11] == [400, 400, 422, 422, 422, 422, 422, 400, 422, 400, 400] and set(statuses) == {400, 422}
    rows = load.rows_for(model, 3, 0)
    status, content = server.answer_to(load.packed(rows), predict, model)
    assert status == 200 and np.load(io.BytesIO(content))["file"].tolist() == rows["image"].tolist()
    monkeypatch.setattr(server, "MOST_BYTES", 100)
    status, content = server.answer_to(load.packed(rows), predict, model)
    assert status == 400 and b"at most 100 are read" in content
