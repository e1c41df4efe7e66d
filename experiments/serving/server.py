"""Serves an exported model over HTTP: ONNX Runtime, or JAX, behind FastAPI. jaxmp is not needed.

    jaxmp export runs/digits_mlp --format onnx --output digits
    pip install fastapi uvicorn onnxruntime numpy
    python experiments/serving/server.py digits --port 8000

A request is a POST to /predict of a .npz file with an array for each input; the answer is a .npz file with one for each
output. /about says what the model takes and gives, and its certificate. What does not fit is answered by 422 and the
sentence of `predict.py`, what is too large by 413, what is no .npz file by 400.
"""

from __future__ import annotations

import argparse
import importlib.util
import io
import sys
import zipfile
import zlib
from pathlib import Path
from typing import Any

import numpy as np
from fastapi import FastAPI, Request, Response
from fastapi.concurrency import run_in_threadpool

MOST_BYTES = 64 * 2**20
"""size of the largest request"""


def load(folder: Path) -> Any:
    """The model of an exported folder, by the predict.py that lies in it."""
    spec = importlib.util.spec_from_file_location("predict", folder / "predict.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["predict"] = module
    spec.loader.exec_module(module)
    return module.load(folder)


def make_app(folder: Path) -> FastAPI:
    """The application that serves the model of a folder."""
    model = load(folder)
    app = FastAPI(title=model.manifest["name"])

    def predict(body: bytes) -> tuple[int, bytes]:
        try:
            with np.load(io.BytesIO(body), allow_pickle=False) as file:
                rows = {name: file[name] for name in file.files}
        except (ValueError, OSError, KeyError, EOFError, zipfile.BadZipFile, zlib.error, NotImplementedError):
            return 400, b"expected a .npz file with an array for each input"
        try:
            outputs = model.leaves(model(**rows))
        except ValueError as error:
            return 422, str(error).encode()
        answer = io.BytesIO()
        # Floats of ml_dtypes as float32: NumPy alone reads their bytes back as bytes.
        plain = {name: a.astype(np.float32) if a.dtype.kind == "V" else a for name, a in outputs.items()}
        np.savez(answer, **plain)
        return 200, answer.getvalue()

    @app.get("/about")
    def about() -> dict[str, Any]:
        """What the model takes and gives, and its certificate."""
        return {
            **{name: model.manifest[name] for name in ("name", "precision", "inputs", "outputs", "classes")},
            "certificate": model.certificate,
        }

    @app.post("/predict")
    async def answer(request: Request) -> Response:
        """The outputs for rows."""
        body = bytearray()
        async for part in request.stream():
            body += part
            if len(body) > MOST_BYTES:
                return Response(f"expected at most {MOST_BYTES:,} bytes", 413, media_type="text/plain")
        status, content = await run_in_threadpool(predict, bytes(body))
        return Response(content, status, media_type="application/octet-stream" if status == 200 else "text/plain")

    return app


def main() -> None:
    """Serves a folder until it is stopped."""
    import uvicorn

    parser = argparse.ArgumentParser(description="Serves the model of an exported folder.")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=8000)
    options = parser.parse_args()
    uvicorn.run(make_app(options.folder), host=options.host, port=options.port, log_level="warning")


if __name__ == "__main__":
    main()
