"""Collectives and memory of one train step on eight H100s, from the compiled program; needs no GPU.

    cd experiments/parallel
    JAX_PLATFORMS=cpu uv run python h100_collectives.py --output h100_collectives.json

Needs the CUDA build of JAX (`uv sync --extra cuda12`), and takes two minutes on 2 CPU cores. The model is a causal
transformer of 12 scanned layers of width 768 (the layers of GPT-2, with a vocabulary of 8,192 and 256 positions), under
mixed_bfloat16 with AdamW. It is compiled for each value of `--parallel.shard`, also with four microbatches, and with
the gradient reduced in bfloat16.

XLA combines all-reduces only up to a certain size, so that it splits the replicated gradient into several; the cases
"in one" are compiled without that limit.
"""

from __future__ import annotations

import argparse
import collections
import dataclasses
import json
import sys
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxmp import AdamW, Arrays, Experiment, Loop
from jaxmp.cli import script
from jaxmp.experiment.settings import Parallel
from jaxmp.instruments.program import Program
from jaxmp.instruments.target import COMPILER_OPTIONS, Target
from jaxmp.runs.provenance import provenance
from jaxmp.runs.trainer import Trainer
from jaxmp.training.metrics import Mean

WORDS, LENGTH, WIDTH, HEADS, LAYERS, BATCH = 8192, 256, 768, 12, 12, 64

CASES: dict[str, tuple[str, Parallel, Loop]] = {
    "replicated": ("mixed_bfloat16", Parallel(), Loop(steps=1)),
    "replicated, reduce=bf16": ("mixed_bfloat16,reduce=bf16", Parallel(), Loop(steps=1)),
    "replicated, 4 microbatches": ("mixed_bfloat16", Parallel(), Loop(steps=1, accumulate_steps=4)),
    "replicated, remat": ("mixed_bfloat16", Parallel(remat=("layers",)), Loop(steps=1)),
    "zero1": ("mixed_bfloat16", Parallel(shard="zero1"), Loop(steps=1)),
    "zero1, 4 microbatches": ("mixed_bfloat16", Parallel(shard="zero1"), Loop(steps=1, accumulate_steps=4)),
    "fsdp": ("mixed_bfloat16", Parallel(shard="fsdp"), Loop(steps=1)),
    "replicated, in one": ("mixed_bfloat16", Parallel(), Loop(steps=1)),
    "replicated, reduce=bf16, in one": ("mixed_bfloat16,reduce=bf16", Parallel(), Loop(steps=1)),
}


class Layer(nn.Module):
    """A transformer layer: attention and a feed-forward network, each after a layer norm, with residual connections."""

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> tuple[jax.Array, None]:
        """Maps `x` (batch, length, width) to the same shape; the second result is for `nn.scan`."""
        attention = nn.MultiHeadDotProductAttention(HEADS, deterministic=not train)
        y = attention(nn.LayerNorm()(x), mask=nn.make_causal_mask(x[..., 0]))
        x = x + nn.Dropout(0.1, deterministic=not train)(y)
        y = nn.Dense(WIDTH)(nn.gelu(nn.Dense(4 * WIDTH)(nn.LayerNorm()(x))))
        return x + nn.Dropout(0.1, deterministic=not train)(y), None


class Transformer(nn.Module):
    """A causal language model with scanned layers."""

    @nn.compact
    def __call__(self, words: jax.Array, *, train: bool = False) -> jax.Array:
        """Maps words (batch, length) to logits (batch, length, words)."""
        place = self.param("place", nn.initializers.normal(0.02), (LENGTH, WIDTH))
        axes, keys = {"params": 0}, {"params": True, "dropout": True}
        layers = nn.scan(Layer, variable_axes=axes, split_rngs=keys, in_axes=nn.broadcast, length=LAYERS)
        x, _ = layers(name="layers")(nn.Embed(WORDS, WIDTH)(words) + place, train)
        return nn.Dense(WORDS, use_bias=False)(nn.LayerNorm()(x))


@dataclasses.dataclass(frozen=True)
class NextWord:
    """Cross-entropy of the next word."""

    inputs: tuple[str, ...] = ("words",)
    target: str = "next"

    def __call__(self, logits: jax.Array, batch: dict[str, jax.Array]) -> tuple[Mean, dict[str, Mean]]:
        """See `jaxmp.tasks.task.Task`."""
        losses = optax.softmax_cross_entropy_with_integer_labels(logits.astype(jnp.float32), batch["next"])
        return Mean.of(losses, jnp.broadcast_to(batch["weight"][:, None], losses.shape)), {}


def load(split: str) -> dict[str, np.ndarray]:
    """Returns random words: nothing is trained here."""
    words = np.random.default_rng(0).integers(0, WORDS, (BATCH, LENGTH), dtype=np.int32)
    return {"words": words, "next": words}


def compiled(precision: str, parallel: Parallel, loop: Loop, target: Target, *, in_one: bool) -> dict[str, Any]:
    """Returns collectives and memory of one step per device, and the smallest possible values."""
    experiment = Experiment(
        model=Transformer(),
        data=Arrays(load, batch_size=BATCH, images=()),
        task=NextWord(),
        optimizer=AdamW(3e-4, clip_norm=1.0),
        precision=precision,
        parallel=parallel,
        loop=loop,
    )
    trainer = Trainer(experiment, target.mesh())
    step = jax.jit(trainer.train_step, donate_argnums=0)
    arguments = trainer.program()[1]
    lowered = step.lower(*arguments)
    options = COMPILER_OPTIONS | ({"xla_gpu_all_reduce_combine_threshold_bytes": 2**40} if in_one else {})
    program = Program.read(lowered.compile(compiler_options=options), str(target))
    state, batch, _ = arguments
    params, optimizer = nbytes(state.params), nbytes(state.opt_state)
    ideal = {
        "replicated": params + optimizer,
        "zero1": params + optimizer / target.count,
        "fsdp": (params + optimizer) / target.count,
    }[parallel.shard]
    arguments = program.memory.arguments - nbytes(batch) // target.count
    sums: dict[tuple[str, str, bool], list[int]] = collections.defaultdict(lambda: [0, 0])
    for each in program.collectives:
        key = each.kind, each.dtype, each.in_loop
        sums[key] = [sums[key][0] + each.times, sums[key][1] + each.times * each.nbytes]
    return {
        "parameters": sum(leaf.size for leaf in jax.tree.leaves(state.params)),
        "collectives": [
            {"kind": kind, "dtype": dtype, "in_loop": in_loop, "times": times, "bytes": size}
            for (kind, dtype, in_loop), (times, size) in sorted(sums.items())
        ],
        "memory": dataclasses.asdict(program.memory) | {"peak": program.memory.peak},
        "state and optimizer, of the ideal": arguments / ideal,
    }


def nbytes(tree: Any) -> int:
    """Returns the size of all arrays in bytes, before splitting them over devices."""
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


def main() -> None:
    """Compiles each case and writes the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--target", default="h100x8")
    parser.add_argument("--cases", nargs="*", default=list(CASES), choices=list(CASES))
    options = parser.parse_args()
    target = Target.parse(options.target)
    results = {}
    for name in options.cases:
        results[name] = compiled(*CASES[name], target, in_one=name.endswith("in one"))
        print(name, json.dumps(results[name]), flush=True)
    record = provenance(patch=False) | {"target": str(target), "cases": results}
    options.output.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    sys.exit(script(main))
