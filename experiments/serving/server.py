"""Serves an exported model over HTTP: ONNX Runtime, or JAX, behind FastAPI. jaxmp is not needed.

    jaxmp export runs/digits_mlp --format onnx --output digits
    pip install fastapi uvicorn onnxruntime numpy
    python experiments/serving/server.py digits --port 8000

A request is a POST to /predict of a .npz file with an array for each input; the answer is a .npz file with one for each
output. /about says what the model takes and gives, and its certificate. What does not fit is answered by 422 and the
sentence of `predict.py`; a request that is too large by 413; what is no .npz file, or too large unpacked, by 400.
"""

from __future__ import annotations

import argparse
import importlib.util
import io
import sys
from pathlib import Path
from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.concurrency import run_in_threadpool

MOST_BYTES = 64 * 2**20
"""size of the largest request, and of its arrays together"""


def predict_module(folder: Path) -> Any:
    """The predict.py that lies in an exported folder, as a module: its `load` reads the folder."""
    spec = importlib.util.spec_from_file_location("predict", folder / "predict.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["predict"] = module
    spec.loader.exec_module(module)
    return module


def answer_to(body: bytes, predict: Any, model: Any) -> tuple[int, bytes]:
    """The status and the content of the answer to a request.

    Args:
      body: content of the request.
      predict: the module that loaded the model.
      model: the model.
    """
    try:
        rows = predict.read_columns(io.BytesIO(body), most=MOST_BYTES)
    except predict.ArtefactError as error:
        return 400, str(error).encode()
    try:
        outputs = model.leaves(model(**rows))
    except predict.ArtefactError as error:
        return 422, str(error).encode()
    answer = io.BytesIO()
    predict.write_columns(answer, outputs)
    return 200, answer.getvalue()


def make_app(folder: Path) -> FastAPI:
    """The application that serves the model of a folder."""
    predict = predict_module(folder)
    model = predict.load(folder)
    app = FastAPI(title=model.manifest["name"])

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
        status, content = await run_in_threadpool(answer_to, bytes(body), predict, model)
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
