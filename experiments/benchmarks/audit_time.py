"""Measures how long `jaxmp.audit` takes on a train step of GPT-2. The step is traced without creating arrays.

    python experiments/benchmarks/run.py audit_time

The model is GPT-2 with 124 million parameters (Radford et al. 2019, "Language Models are Unsupervised Multitask
Learners", table 2, the smallest: 12 layers, width 768, 1024 tokens, a vocabulary of 50257) in plain Flax Linen with
tied embeddings, under mixed_float16 and loss_scaling, with AdamW. Each round traces it again. The FLOPs in the report
are compared with a count by hand. The finding that the audit reports is correct: the position embedding is broadcast
over the batch in half precision, so that its gradient is summed over the batch in half precision.
"""

from __future__ import annotations

import collections
import json
import os
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax

from jaxmp import TrainState, audit, loss_scaling, make_loss, make_train_step
from jaxmp.cli import script
from jaxmp.runs.provenance import provenance
from jaxmp.training.metrics import Mean

VOCABULARY, LENGTH, WIDTH, HEADS = 50257, 1024, 768, 12


class Block(nn.Module):
    """A transformer block: causal attention and an MLP, each with a layer norm before and a residual connection."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps `x` (batch, time, width) to the same shape."""
        mask = nn.make_causal_mask(jnp.ones(x.shape[:2]))
        x += nn.MultiHeadDotProductAttention(HEADS, name="attention")(nn.LayerNorm()(x), mask=mask)
        hidden = nn.gelu(nn.Dense(4 * WIDTH, name="up")(nn.LayerNorm()(x)))
        return x + nn.Dense(WIDTH, name="down")(hidden)


class GPT2(nn.Module):
    """GPT-2: maps tokens int32 (batch, time) to logits (batch, time, vocabulary)."""

    layers: int = 12

    @nn.compact
    def __call__(self, tokens: jax.Array) -> jax.Array:
        """Returns the logits (batch, time, vocabulary)."""
        embedding = nn.Embed(VOCABULARY, WIDTH, name="tokens")
        x = embedding(tokens) + nn.Embed(LENGTH, WIDTH, name="positions")(jnp.arange(tokens.shape[1]))
        for i in range(self.layers):
            x = Block(name=f"block_{i}")(x)
        return embedding.attend(nn.LayerNorm()(x))


@dataclass(frozen=True)
class NextToken:
    """Cross-entropy of each token given those before it."""

    inputs: tuple[str, ...] = ("tokens",)

    def __call__(self, outputs: jax.Array, batch: Any) -> tuple[Mean, dict[str, Mean]]:
        """Returns the loss: the mean over tokens, in float32."""
        logits = outputs[:, :-1].astype(jnp.float32)
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, batch["tokens"][:, 1:])
        return Mean.of(losses, jnp.broadcast_to(batch["weight"][:, None], losses.shape)), {}


def step_and_arguments(layers: int, batch_size: int) -> tuple[Any, Any, Any]:
    """Returns the train step, and the shapes of its state and batch."""
    model, tx = GPT2(layers), loss_scaling(optax.adamw(6e-4))
    batch = {
        "tokens": jax.ShapeDtypeStruct((batch_size, LENGTH), jnp.int32),
        "weight": jax.ShapeDtypeStruct((batch_size,), jnp.float32),
    }

    def init(key: jax.Array) -> TrainState:
        params = model.init(key, jnp.zeros((1, LENGTH), jnp.int32))["params"]
        return TrainState.create(params, tx, key=key)

    step = make_train_step(make_loss(model, NextToken(), "mixed_float16"), tx)
    return jax.jit(step, donate_argnums=0), jax.eval_shape(init, jax.random.key(0)), batch


def hand_count(layers: int, batch_size: int) -> int:
    """Returns the FLOPs of all matrix products of a step: three times those of the forward pass."""
    tokens = batch_size * LENGTH
    block = 2 * tokens * 12 * WIDTH**2 + 2 * 2 * tokens * LENGTH * WIDTH
    return 3 * (layers * block + 2 * tokens * WIDTH * VOCABULARY)


def measure(layers: int = 12, batch_size: int = 8, rounds: int = 5, output: Path | None = None) -> None:
    """Times the audit, and prints the result or writes it to a file.

    Args:
      layers: number of blocks of the model.
      batch_size: number of sequences in a batch.
      rounds: how often to trace and audit.
      output: file to write the result to.
    """
    seconds = collections.defaultdict(list)
    for _ in range(rounds):
        jax.clear_caches()
        step, state, batch = step_and_arguments(layers, batch_size)
        start = time.perf_counter(), time.process_time()
        step.trace(state, batch)
        traced = time.perf_counter(), time.process_time()
        jax.clear_caches()
        step, state, batch = step_and_arguments(layers, batch_size)
        fresh = time.perf_counter(), time.process_time()
        report = audit(step, state, batch, policy="mixed_float16")
        done = time.perf_counter(), time.process_time()
        for kind, clock in enumerate(("wall", "CPU")):
            seconds[f"trace alone, {clock}"].append(round(traced[kind] - start[kind], 3))
            seconds[f"audit, trace included, {clock}"].append(round(done[kind] - fresh[kind], 3))
    expected = {"float16": hand_count(layers, batch_size)}
    if report.dot_flops_by_dtype != expected:
        raise SystemExit(f"FLOPs {report.dot_flops_by_dtype}, by hand {expected}")
    result = {
        **provenance(patch=False),
        "cores": len(os.sched_getaffinity(0)),
        "layers": layers,
        "parameters": sum(leaf.size for leaf in jax.tree.leaves(state.params)),
        "batch": [batch_size, LENGTH],
        "flops": report.dot_flops_by_dtype,
        "findings": [f"{finding.rule}: {finding.what} [{finding.path}]" for finding in report.findings],
        "products": sum(dot.times for dot in report.dots),
        "seconds": dict(seconds),
        "fastest": {name: min(times) for name, times in seconds.items()},
    }
    text = json.dumps(result, indent=1)
    print(text)
    if output is not None:
        output.write_text(text + "\n")


if __name__ == "__main__":
    sys.exit(script(measure))
