"""The runs that the tests of this folder export, and a process in which they predict."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
from pathlib import Path

import flax.linen as nn
import jax.numpy as jnp
import numpy as np

import jaxmp
from jaxmp import Adam, Arrays, Experiment, Loop

ROOT = Path(__file__).parents[2]
"""of the repository"""


class Net(nn.Module):
    """A convolution, statistics and two layers; what only training needs is no part of an export."""

    @nn.compact
    def __call__(self, image, *, train=False):
        x = nn.relu(nn.Conv(4, (3, 3))(image))
        x = nn.BatchNorm(use_running_average=not train)(nn.avg_pool(x, (2, 2)))
        x = nn.relu(nn.Dense(8)(x.reshape(x.shape[0], -1)))
        return nn.Dense(3)(nn.Dropout(0.5, deterministic=not train)(x))


def load(split):
    rng = np.random.default_rng({"train": 0, "validation": 1, "test": 2}[split])
    label = rng.integers(0, 3, 20)
    image = rng.integers(0, 100, (20, 4, 4, 1)) + 50 * label[:, None, None, None]
    return {"image": image.astype(np.uint8), "label": label, "name": np.array(["a"] * 20)}


class Both(nn.Module):
    """Two inputs, one of tokens, and a dict of outputs."""

    @nn.compact
    def __call__(self, image, words):
        x = jnp.concatenate([image.reshape(image.shape[0], -1), nn.Embed(7, 4)(words).mean(axis=1)], axis=-1)
        return {"logits": nn.Dense(3)(x), "size": {"mean": nn.Dense(2)(x), "parts": (nn.Dense(1)(x), words[:, 0])}}


@dataclasses.dataclass(frozen=True)
class Sizes(jaxmp.Task):
    inputs: tuple[str, ...] = ("image", "words")
    target: str = "label"

    def __call__(self, outputs, batch):
        return jaxmp.Mean.of(outputs["logits"][:, 0].astype(jnp.float32) ** 2, batch["weight"]), {}


def with_words(split):
    return load(split) | {"words": np.random.default_rng(3).integers(0, 7, (20, 5))}


def trained(folder, precision="mixed_bfloat16", **fields):
    experiment = Experiment(
        **{
            "model": Net(),
            "data": Arrays(load, batch_size=10, eval_batch_size=8, mean=(0.3,)),
            "optimizer": Adam(0.1),
            "loop": Loop(steps=2, ema_decay=0.9),
            "precision": precision,
            **fields,
        }
    )
    jaxmp.fit(experiment, workdir=folder / "runs", log=lambda text: None)
    return jaxmp.Run(folder / "runs", experiment)


def images(rows):
    return np.random.default_rng(rows).integers(0, 256, (rows, 4, 4, 1)).astype(np.uint8)


BARE = """
import importlib.abc, sys

class Blocked(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {BLOCKED}:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, Blocked())
sys.path[:] = [FOLDER, *(path for path in sys.path if path != ROOT)]
import predict
"""

MAIN = """
sys.argv = ["predict.py", ROWS, OUTPUT]
sys.exit(predict.main())
"""

BATCHES = """
import numpy as np
rows, model, found = np.load(ROWS), predict.load(FOLDER), {}
for count in COUNTS:
    outputs = model.leaves(model(**{name: rows[name][:count] for name in model.inputs}))
    found |= {f"{count} {name}": output.view(f"u{output.dtype.itemsize}") for name, output in outputs.items()}
np.savez(OUTPUT, **found)
"""

BLOCKED = ("jaxmp", "flax", "optax", "orbax", "jmp", "tyro", "sklearn", "onnx", "safetensors")


def _bare(folder, code, *blocked, **values):
    """Runs code after the import of a folder's predict.py, in a process in which nothing else can be imported."""
    values = {"FOLDER": str(folder), "ROOT": str(ROOT), **values}
    code = BARE.replace("{BLOCKED}", repr(set(blocked or BLOCKED))) + code
    for name, value in values.items():
        code = code.replace(name, repr(value))
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, cwd=folder)
    return done.returncode, done.stdout + done.stderr


def predict_bare(folder, rows, output, *blocked):
    """Runs predict.py of a folder in a process in which nothing but what it may need can be imported."""
    return _bare(folder, MAIN, *blocked, ROWS=str(rows), OUTPUT=str(output))


def batches_bare(folder, rows, output, counts, *blocked):
    """The outputs for the first `counts` rows, as whole numbers of their bits, by number of rows and name."""
    code, text = _bare(folder, BATCHES, *blocked, ROWS=str(rows), OUTPUT=str(output), COUNTS=tuple(counts))
    assert code == 0, text
    return np.load(output)
