r"""What weights of few bits cost a run: bytes, accuracy, and the change by pairs of decisions, for each format.

jaxmp train mnist_cnn --loop.epochs 1
python experiments/compression/formats.py runs/mnist_cnn --output experiments/compression/mnist_cnn.json
python experiments/compression/formats.py runs/digits_mlp --formats int4:channel int4 int2:group16 \
  --methods nearest gptq awq --calibrate 20 --output experiments/compression/methods.json
"""

from __future__ import annotations

import argparse
import itertools
import json
import sys
import tempfile
from pathlib import Path

import jaxmp
from jaxmp.cli import script
from jaxmp.deploy.quantise import FORMATS, quantise
from jaxmp.runs.provenance import provenance


def main() -> None:
    """Quantises the run in each format, and writes what was measured on its test split."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", help="run folder")
    parser.add_argument("--formats", nargs="+", default=list(FORMATS))
    parser.add_argument("--methods", nargs="+", default=["nearest"])
    parser.add_argument("--calibrate", type=int, default=20, help="training batches that other methods look at")
    parser.add_argument("--output", default="formats.json")
    options = parser.parse_args()
    run, rows = jaxmp.Run(options.run), []
    for format, method in itertools.product(options.formats, options.methods):
        calibrate = None if method == "nearest" else options.calibrate
        with tempfile.TemporaryDirectory() as folder:
            found = quantise(run, output=Path(folder) / "out", weights=format, method=method, calibrate=calibrate)
        assert found.trade
        against = found.artefact.certificate["against"]["run"]
        (error,) = against["outputs"].values()
        change, low, high = (100 * each for each in found.trade.change)
        rows.append(
            {
                "format": format,
                "method": method,
                "bytes": found.nbytes,
                "bytes_before": found.nbytes_before,
                "accuracy_before": 100 * found.trade.before.share,
                "accuracy": 100 * found.trade.after.share,
                "change": change,
                "interval": [low, high],
                "rows": found.trade.after.rows,
                "median_relative_error": error["median_relative"],
                "mean_kl": against["kl"]["mean"],
            }
        )
        print(
            f"{format:<14} {method:<8} {found.nbytes_before / found.nbytes:.2f} times fewer bytes, "
            f"{100 * found.trade.after.share:.2f} %, {change:+.2f} points ({low:+.2f} to {high:+.2f}), "
            f"median error {error['median_relative']:.1e}, KL {against['kl']['mean']:.1e}",
            flush=True,
        )
    name = run.config["name"]
    how = {each: value for each, value in provenance(patch=False).items() if each != "command"}
    result = {"run": name, "overrides": run.config.get("overrides", []), "formats": rows, "provenance": how}
    Path(options.output).write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    sys.exit(script(main))
