"""What pruning costs a run: it is trained again with each structure and sparsity, and compared on the same rows.

jaxmp train mnist_cnn --loop.epochs 1
python experiments/compression/pruned.py runs/mnist_cnn --keep Conv_0 --output experiments/compression/pruned.json

Each model is trained again from the best weights for as long as the run was, with its learning rate from the start; so
is a dense one, with which the epochs more can be told from the pruning.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
import time
from pathlib import Path

import jaxmp
from jaxmp.cli import script
from jaxmp.deploy.accuracy import Trade, trade
from jaxmp.deploy.export import ROWS, Measured
from jaxmp.deploy.prune import prune
from jaxmp.runs.provenance import provenance


def dense(run: jaxmp.Run) -> Trade | None:
    """Trains the run again from its best weights, with nothing pruned, and compares both on the same rows."""
    workdir, name = run.path.parent.parent, run.config["name"]
    fitted = jaxmp.fit(
        run.experiment,
        workdir=workdir,
        name=name,
        init_from=f"{run.path}@best",
        progress="none",
        log=lambda text: None,
    )
    again = jaxmp.Run(fitted.path, run.experiment)
    before, after = run.state("best"), again.state("best")
    return trade(
        run,
        Measured.of_run(run, None, ROWS).source,
        lambda batch: run.outputs(dict(batch), before),
        lambda batch: again.outputs(dict(batch), after),
    )


def main() -> None:
    """Prunes the run in each way, and writes what was measured on its test split."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", help="run folder")
    parser.add_argument("--ways", nargs="+", default=["dense", "2:4", "0.9"], help="dense, 2:4, or a sparsity")
    parser.add_argument("--keep", nargs="*", default=[], help="weights that 2:4 leaves dense")
    parser.add_argument("--output", default="pruned.json")
    options = parser.parse_args()
    run, rows = jaxmp.Run(options.run), []
    for way in options.ways:
        if way == "dense":
            control = dense(run)
            assert control is not None
            print("\n".join(control.lines("trained again")), flush=True)
            change, low, high = (100 * each for each in control.change)
            rows.append(
                {
                    "way": way,
                    "accuracy_before": 100 * control.before.share,
                    "accuracy": 100 * control.after.share,
                    "change": change,
                    "interval": [low, high],
                    "rows": control.after.rows,
                }
            )
            continue
        structured = way == "2:4"
        how = {"structure": "2:4", "keep": tuple(options.keep)} if structured else {"sparsity": float(way)}
        experiment = dataclasses.replace(run.experiment, pruning=jaxmp.Pruning(**how))
        began = time.process_time()
        found = prune(run, experiment, progress="none", log=lambda text: None)
        assert found is not None and found.trade is not None
        print(f"{way}, {time.process_time() - began:.0f} CPU-seconds\n{found}\n", flush=True)
        change, low, high = (100 * each for each in found.trade.change)
        rows.append(
            {
                "way": way,
                "keep": list(options.keep) if structured else [],
                "sparsity": found.sparsity,
                "bytes_dense": found.total("nbytes"),
                "bytes_sparse": found.total("sparse"),
                "bytes_packed": found.total("packed") if structured else None,
                "flops": found.flops,
                "accuracy_before": 100 * found.trade.before.share,
                "accuracy": 100 * found.trade.after.share,
                "change": change,
                "interval": [low, high],
                "rows": found.trade.after.rows,
            }
        )
    how = {each: value for each, value in provenance(patch=False).items() if each != "command"}
    name, overrides = run.config["name"], run.config.get("overrides", [])
    result = {"run": name, "overrides": overrides, "pruned": rows, "provenance": how}
    Path(options.output).write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    sys.exit(script(main))
