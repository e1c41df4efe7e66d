"""A load test of server.py on the loopback: throughput and p99 latency by batch size, and 1,000 bad requests.

    python experiments/serving/load.py digits --output experiments/serving/digits.json

It starts the server on a free port and stops it at the end. Every answer is compared with that of the folder loaded in
this process: an answer that is lost or another is an error.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import http.client
import io
import json
import platform
import socket
import subprocess
import sys
import time
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from server import predict_module

CLIENTS = 4
"""requests at a time"""


def post(port: int, body: bytes) -> tuple[int, bytes]:
    """The status and content of the answer to a request."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    try:
        connection.request("POST", "/predict", body, {"Content-Type": "application/octet-stream"})
        answer = connection.getresponse()
        return answer.status, answer.read()
    finally:
        connection.close()


def packed(members: Mapping[str, np.ndarray | bytes]) -> bytes:
    """Arrays, or the bytes of .npy files, as a .npz file; their names are any texts."""
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        for name, array in members.items():
            data = io.BytesIO(array if isinstance(array, bytes) else b"")
            if not isinstance(array, bytes):
                np.lib.format.write_array(data, array, allow_pickle=False)
            archive.writestr(f"{name}.npy", data.getvalue())
    return file.getvalue()


def npy(header: str) -> bytes:
    """A .npy file that ends after its header."""
    text = header.encode().ljust(117) + b"\n"
    return b"\x93NUMPY\x01\x00" + len(text).to_bytes(2, "little") + text


def encrypted(content: bytes) -> bytes:
    """A .npz file whose first array is said to be encrypted: one bit is changed in its directory."""
    flags = content.index(b"PK\x01\x02") + 8
    return content[:flags] + bytes([content[flags] | 1]) + content[flags + 1 :]


def rows_for(model: Any, count: int, seed: int) -> dict[str, np.ndarray]:
    """Random rows that fit the model."""
    rng = np.random.default_rng(seed)
    found = {}
    for name, spec in model.inputs.items():
        shape = [count if size == "b" else size for size in spec["shape"]]
        kind = np.dtype(spec["dtype"])
        whole = kind.kind in "iu"
        found[name] = (rng.integers(0, 2, shape) if whole else rng.standard_normal(shape)).astype(kind)
    return found


def bad_requests(model: Any, count: int) -> list[bytes]:
    """Requests that no model can answer.

    Noise, files cut off, other names, shapes, dtypes and numbers of rows; a file that is said to be encrypted, a column
    called `self`, and headers that name a huge shape or do not end.
    """
    rng, good = np.random.default_rng(0), rows_for(model, 3, 0)
    name, array = next(iter(good.items()))
    header = "{'descr': '<f4', 'fortran_order': False, 'shape': (1000000000000, 64"
    kinds = [
        lambda: rng.bytes(int(rng.integers(0, 200))),
        lambda: packed(good)[: int(rng.integers(1, 60))],
        lambda: packed({f"{name}x": array}),
        lambda: packed({**good, name: array[..., None]}),
        lambda: packed({**good, name: array.astype(np.complex64)}),
        lambda: packed({**good, name: array[:0]}),
        lambda: packed({}),
        lambda: encrypted(packed(good)),
        lambda: packed({**good, "self": array}),
        lambda: packed({**good, name: npy(header + ")}")}),
        lambda: packed({**good, name: npy(header)}),
    ]
    return [kinds[index % len(kinds)]() for index in range(count)]


def measure(port: int, model: Any, batch: int, count: int) -> dict[str, Any]:
    """Sends `count` requests of `batch` rows, `CLIENTS` at a time, and compares each answer."""
    bodies = [rows_for(model, batch, seed) for seed in range(8)]
    right = [model.leaves(model(**rows)) for rows in bodies]
    sent = [packed(rows) for rows in bodies]
    post(port, sent[0])

    def one(index: int) -> float:
        start = time.perf_counter()
        status, content = post(port, sent[index % len(sent)])
        seconds = time.perf_counter() - start
        assert status == 200, content
        with np.load(io.BytesIO(content)) as file:
            for name, output in right[index % len(sent)].items():
                np.testing.assert_allclose(file[name], output, rtol=1e-5, atol=1e-5 * float(np.abs(output).max()))
        return seconds

    start = time.perf_counter()
    with concurrent.futures.ThreadPoolExecutor(CLIENTS) as clients:
        seconds = np.array(list(clients.map(one, range(count))))
    whole = time.perf_counter() - start
    return {
        "batch": batch,
        "requests": count,
        "rows_per_second": batch * count / whole,
        "p50_ms": 1e3 * float(np.quantile(seconds, 0.5)),
        "p99_ms": 1e3 * float(np.quantile(seconds, 0.99)),
    }


def main() -> None:
    """Runs the load test, and writes what was measured."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8, 64, 512])
    parser.add_argument("--requests", type=int, default=300)
    parser.add_argument("--bad", type=int, default=1000)
    parser.add_argument("--output", type=Path, default=Path("serving.json"))
    options = parser.parse_args()
    model = predict_module(options.folder).load(options.folder)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    server = subprocess.Popen(
        [sys.executable, str(Path(__file__).with_name("server.py")), str(options.folder), "--port", str(port)]
    )
    try:
        for _ in range(600):
            try:
                post(port, b"")
                break
            except OSError:
                time.sleep(0.1)
        rows = [measure(port, model, batch, options.requests) for batch in options.batches]
        for row in rows:
            print(
                f"batch {row['batch']:>4}: {row['rows_per_second']:>9,.0f} rows/s, p50 {row['p50_ms']:.1f} ms, "
                f"p99 {row['p99_ms']:.1f} ms"
            )
        with concurrent.futures.ThreadPoolExecutor(CLIENTS) as clients:
            statuses = [
                status for status, _ in clients.map(lambda body: post(port, body), bad_requests(model, options.bad))
            ]
        counts = {status: statuses.count(status) for status in sorted(set(statuses))}
        assert set(counts) <= {400, 422}, counts
        after = measure(port, model, 8, 20)  # it still answers, and rightly
        print(f"{options.bad:,} bad requests: {counts}; afterwards p50 {after['p50_ms']:.1f} ms")
    finally:
        server.terminate()
        server.wait()
    result = {
        "model": model.manifest["name"],
        "format": model.manifest["format"],
        "clients": CLIENTS,
        "by_batch": rows,
        "bad_requests": {str(status): count for status, count in counts.items()},
        "machine": {"processor": platform.machine(), "python": platform.python_version()},
    }
    options.output.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
