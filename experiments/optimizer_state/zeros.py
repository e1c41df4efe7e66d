"""Says why Adam diverges with second moments in 8 bits without range expansion: what is rounded to 0.

    python experiments/optimizer_state/zeros.py --output experiments/optimizer_state/zeros.json

A config is trained with float32 state. Then its second moments are rounded to each format once, and the update of Adam
without its learning rate, m / (sqrt(v) + eps), is computed from them. It is about 1 in float32. Where v is rounded to 0
it is m / eps, up to 1e8 times as large. The last column replaces these zeros by the smallest positive number that is
stored in their block: if nothing else were wrong with the format, the updates would then be as large as in float32.

Result (zeros.json): it is the zeros alone. With them, the largest update is 1,400 or more; with them replaced, it is
3.6 in e4m3 and 3.4 in int8, and it is 3.6 in float32. The numbers of a block of second moments span more than the 5.3
decades of e4m3 (from 448 to 2^-9), and a format that ends above 0 has no number for the rest. That is so by design:
COAT (2410.19313, section 4.1) expands the range for this reason, and the code of 2110.02861 (section 1.3, bitsandbytes)
gives the second moment a data type of 7 decades. Rounding stochastically, rather than to nearest, leaves fewer zeros in
the mean and as large updates in the worst case.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxmp import steps
from jaxmp.cli import script
from jaxmp.experiment.config_file import ConfigFile
from jaxmp.runs.provenance import provenance
from jaxmp.scaling.state_format import state_format

FORMATS = ("float32", "e5m2:block128", "e4m3:block128", "e4m3:block128, expanded", "int8:group128")
BLOCK = 128
"""length of the blocks of all of them"""
EPS = 1e-8


def moments(config: str, count: int) -> tuple[Any, Any]:
    """The first and second moments of Adam after `count` steps with float32 state, without the correction of bias."""
    options = ["--precision", "float32", "--loop.steps", str(count), "--loop.eval-every", str(count)]
    experiment = ConfigFile.find(config).experiment(options)
    for info in steps(experiment):
        state = info.state
    found = optax.tree_utils.tree_get(state.opt_state, "mu"), optax.tree_utils.tree_get(state.opt_state, "nu")
    return jax.device_get(found)


def stored(nu: Any, format: str, rounding: str) -> Any:
    """The second moments after they were stored once in a format."""
    if format == "float32":
        return nu
    name, _, expanded = format.partition(", ")
    keep = optax.GradientTransformation(lambda params: optax.TraceState(nu), lambda g, state, params: (g, state))
    packed = state_format(keep, rounding=rounding, expand_range=bool(expanded), trace=name).init(nu)
    return jax.tree.map(
        lambda x: np.asarray(x.unpack()), packed.inner_state.trace, is_leaf=lambda x: hasattr(x, "unpack")
    )


def blocks(tree: Any) -> np.ndarray:
    """The numbers of all parameters in their blocks, float64 [blocks, BLOCK]; short blocks end in zeros."""
    flat = [np.ravel(x).astype(np.float64) for x in jax.tree.leaves(tree)]
    return np.concatenate([np.pad(x, (0, -x.size % BLOCK)).reshape(-1, BLOCK) for x in flat])


def row(mu: Any, nu: Any, format: str, rounding: str) -> dict[str, Any]:
    """What is lost in one format, over all parameters."""
    m, v, rounded = (blocks(each) for each in (mu, nu, stored(nu, format, rounding)))
    lost = (v > 0) & (rounded == 0)
    smallest = np.min(rounded, axis=1, keepdims=True, where=rounded > 0, initial=np.inf)
    assert np.isfinite(np.where(lost, smallest, 0)).all(), "a block of which nothing is left has no smallest number"
    update = np.abs(m) / (np.sqrt(rounded) + EPS)
    mended = np.abs(m) / (np.sqrt(np.where(lost, smallest, rounded)) + EPS)
    return {
        "format": format,
        "rounding": rounding,
        "rounded to 0": float(lost.sum() / (v > 0).sum()),
        "largest update": float(update.max()),
        "largest update without these zeros": float(np.max(np.where(lost, 0, update))),
        "largest update with the smallest number of the block for 0": float(mended.max()),
    }


def main(config: str = "digits_mlp", count: int = 100, output: Path | None = None) -> None:
    """Prints a row for each format and rounding.

    Args:
      config: what to train.
      count: number of steps before the moments are looked at.
      output: file for the results, as JSON.
    """
    mu, nu = moments(config, count)
    spans = [float(np.log10(there.max() / there.min())) for each in blocks(nu) if (there := each[each > 0]).size]
    rows = [row(mu, nu, "float32", "nearest")]
    rows += [row(mu, nu, format, rounding) for format in FORMATS[1:] for rounding in ("nearest", "stochastic")]
    for each in rows:
        print(each, flush=True)
    decades = {"median": float(np.median(spans)), "largest": max(spans)}
    print("decades of a block:", decades, "of e4m3:", float(jnp.log10(448 * 2.0**9)))
    if output is not None:
        own = "python experiments/optimizer_state/zeros.py"
        how = f"{own} --config {config} --count {count} --output {output}"
        content = {**provenance(patch=False), "command": how, "decades of a block": decades, "rows": rows}
        output.write_text(json.dumps(content, indent=1) + "\n")


if __name__ == "__main__":
    sys.exit(script(main))
