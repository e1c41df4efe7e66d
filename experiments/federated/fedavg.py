"""Federated averaging of a config's model, its clients along a mesh axis, and a table of test accuracies.

    python experiments/federated/fedavg.py --output digits.json
    python experiments/federated/fedavg.py --config mnist_mlp --clients 100 --fraction 0.1 --batch-size 10 \
        --rounds 50 --output mnist.json

Source: McMahan et al. 2017, Communication-Efficient Learning of Deep Networks from Decentralized Data, algorithm 1,
https://arxiv.org/abs/1602.05629. A client trains by jaxmp's step, under the precision and with a loss scale of its own,
which it keeps from one round to the next; the server averages float32 weights, weighted by the clients' rows.
"""

from __future__ import annotations

import dataclasses
import json
import statistics
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import optax
import tyro
from jax.sharding import AxisType, Mesh
from jax.sharding import PartitionSpec as P

import jaxmp
from jaxmp.cli import script
from jaxmp.data.pipeline import batch_of
from jaxmp.errors import InputError
from jaxmp.experiment.config_file import ConfigFile
from jaxmp.runs.provenance import provenance
from jaxmp.runs.trainer import Trainer
from jaxmp.training.metrics import compute
from jaxmp.trees import tree_where

CLIENTS = "clients"
"""name of the mesh axis"""


def partition(labels: np.ndarray, clients: int, how: str, *, seed: int) -> list[np.ndarray]:
    """The rows of each client: all rows once, in parts whose sizes differ by one at most, of shards by two.

    Args:
      labels: int (rows,).
      clients: number of clients.
      how: "iid": dealt at random. "shards": sorted by label and cut into two shards a client, so that most clients have
        rows of two labels (McMahan et al. 2017, section 3).
      seed: of the deal.
    """
    draw = np.random.default_rng(seed)
    if how == "iid":
        return np.array_split(draw.permutation(len(labels)), clients)
    shards = np.array_split(np.argsort(labels, kind="stable"), 2 * clients)
    order = draw.permutation(2 * clients)
    return [np.concatenate([shards[i] for i in order[2 * client : 2 * client + 2]]) for client in range(clients)]


def local_batches(
    rows: np.ndarray, epochs: int, batch_size: int, steps: int, seed: tuple[int, ...]
) -> tuple[np.ndarray, np.ndarray]:
    """A client's rows for `epochs` epochs, each in random order: int32 and weights float32, (steps, batch).

    The last batch of an epoch is filled up with rows of weight 0, and so are steps beyond the last epoch, which the
    client does not make.
    """
    draw, per_epoch = np.random.default_rng(seed), -(-len(rows) // batch_size)
    index, weight = np.zeros((steps, batch_size), np.int32), np.zeros((steps, batch_size), np.float32)
    for epoch in range(epochs):
        own = slice(epoch * per_epoch, (epoch + 1) * per_epoch)
        index[own] = np.resize(draw.permutation(rows), (per_epoch, batch_size))
        weight[own] = (np.arange(per_epoch * batch_size) < len(rows)).reshape(per_epoch, batch_size)
    return index, weight


def make_round(step: Any, mesh: Mesh) -> Callable[..., tuple[Any, Any, Any]]:
    """One round: each client trains from the server's weights, and the server takes their weighted average.

    Args:
      step: `(state, batch) -> (state, metrics)`, of `jaxmp.make_train_step`, on one client.
      mesh: with the axis `clients`; the number of clients of a round divides over its devices.

    Returns:
      `(params, states, batches, rows) -> (params, states, metrics)`, compiled. `states` are the clients' train states,
      `batches` their batches of each local step, (clients, steps, batch, ...), `rows` float32 (clients,) the numbers
      that the average is weighted by. A step whose rows all have weight 0 changes nothing of its client. Of a
      client's state, step, key and loss scale live on; its optimizer begins anew in each round. A step that overflows
      is skipped by its client alone. The metrics are summed over all.
    """

    def own_step(state: Any, batch: Any) -> tuple[Any, Any]:
        new, metrics = step(state, batch)
        is_made = jnp.any(batch["weight"] > 0)
        return tree_where(is_made, new, state), tree_where(is_made, metrics, jax.tree.map(jnp.zeros_like, metrics))

    def local(params: Any, state: Any, batches: Any) -> tuple[Any, Any]:
        state, metrics = jax.lax.scan(own_step, dataclasses.replace(state, params=params), batches)
        return state, jax.tree.map(lambda x: jnp.sum(x, axis=0), metrics)

    def share(params: Any, states: Any, batches: Any, rows: jax.Array) -> tuple[Any, Any, Any]:
        new, metrics = jax.vmap(local, in_axes=(None, 0, 0))(params, states, batches)
        whole = jax.lax.psum(jnp.sum(rows), CLIENTS)

        def average(x: jax.Array) -> jax.Array:
            weighted = jnp.tensordot(rows / whole, x.astype(jnp.float32), axes=1, precision="highest")
            return jax.lax.psum(weighted, CLIENTS).astype(x.dtype)

        total = jax.lax.psum(jax.tree.map(lambda x: jnp.sum(x, axis=0), metrics), CLIENTS)
        return jax.tree.map(average, new.params), new, total

    in_specs, out_specs = (P(), P(CLIENTS), P(CLIENTS), P(CLIENTS)), (P(), P(CLIENTS), P())
    return jax.jit(jax.shard_map(share, mesh=mesh, in_specs=in_specs, out_specs=out_specs, check_vma=False))


def fresh_optimizer(state: Any, tx: optax.GradientTransformation) -> Any:
    """A client's state at the beginning of a round: the optimizer's own state begins anew, the loss scale stays."""
    inner = tx.init(state.params).inner_state
    return dataclasses.replace(state, opt_state=state.opt_state._replace(inner_state=inner))


@dataclasses.dataclass(frozen=True)
class Federation:
    """What is trained together, and how."""

    config: str = "digits_mlp"
    """Config whose model, data and task are trained; its optimizer and loop are not used."""
    clients: int = 32
    """Number of clients, which the training rows are dealt to."""
    fraction: float = 0.25
    """Share of the clients that a round takes, drawn anew for each (C)."""
    local_epochs: int = 5
    """Passes of a client over its own rows in a round (E)."""
    batch_size: int = 10
    """Rows of a client's batch (B)."""
    rounds: int = 20
    """Number of rounds."""
    learning_rate: float = 0.1
    """Learning rate of the clients' SGD, without momentum."""

    def __post_init__(self) -> None:
        """Raises InputError for a number out of range."""
        for name in ("clients", "local_epochs", "batch_size", "rounds"):
            if getattr(self, name) < 1:
                raise InputError(f"--{name.replace('_', '-')} {getattr(self, name)}: expected at least 1")
        if not 0 < self.fraction <= 1:
            raise InputError(f"--fraction {self.fraction}: expected a number above 0, at most 1")

    @property
    def chosen(self) -> int:
        """Number of clients in a round."""
        return max(1, round(self.fraction * self.clients))


def train(federation: Federation, precision: str, how: str, seed: int) -> dict[str, Any]:
    """Trains for all rounds; returns test accuracy, skipped steps, and the rounds to 95 % of validation rows."""
    file = ConfigFile.find(federation.config)
    experiment = file.experiment(["--precision", precision, "--seed", str(seed)])
    trainer = Trainer(experiment)
    if "accuracy" not in trainer.metric_specs:
        raise InputError(
            f"--config {federation.config}: {type(experiment.task).__name__} measures no accuracy; expected a config "
            "of a classification task, such as digits_mlp"
        )
    source, data = trainer.source(), experiment.data
    whole = source[np.arange(len(source))]
    if federation.clients * 2 > len(source):
        raise InputError(
            f"--clients {federation.clients}: the training split has {len(source)} rows, two shards a client"
        )
    parts = partition(whole[experiment.task.target], federation.clients, how, seed=seed)
    tx = jaxmp.loss_scaling(optax.sgd(federation.learning_rate), experiment.make_scaler())
    step = jaxmp.make_train_step(trainer.make_loss(), tx)
    first = trainer.init()
    if jax.tree.leaves(first.model_state):
        raise InputError(
            f"--config {federation.config}: its model keeps {', '.join(first.model_state)}, which no server averages; "
            "expected a model without, with LayerNorm for example"
        )
    clients = [
        jaxmp.TrainState.create(
            first.params, tx, key=jax.random.fold_in(first.key, client), model_state=first.model_state
        )
        for client in range(federation.clients)
    ]
    devices = np.gcd(len(jax.devices()), federation.chosen)
    mesh = jax.make_mesh((devices,), (CLIENTS,), axis_types=(AxisType.Auto,), devices=jax.devices()[:devices])
    play, prepare = make_round(step, mesh), jax.jit(data.prepare(train=False))
    fresh = jax.jit(lambda state: fresh_optimizer(state, tx))
    rows = prepare(batch_of(data, whole), None)
    steps = federation.local_epochs * -(-max(map(len, parts)) // federation.batch_size)
    params, reached, draw = first.params, None, np.random.default_rng([seed, 1])
    for number in range(1, federation.rounds + 1):
        chosen = np.sort(draw.choice(federation.clients, federation.chosen, replace=False))
        how_many = (federation.local_epochs, federation.batch_size, steps)
        found = [local_batches(parts[c], *how_many, (seed, 2, number, int(c))) for c in chosen]
        index, weight = (np.stack(of) for of in zip(*found, strict=True))
        batches = {name: column[index] for name, column in rows.items()} | {"weight": jnp.asarray(weight)}
        states = jax.tree.map(lambda *x: jnp.stack(x), *(fresh(clients[c]) for c in chosen))
        sizes = jnp.asarray([len(parts[c]) for c in chosen], jnp.float32)
        params, states, _ = play(params, states, batches, sizes)
        for i, client in enumerate(chosen):
            clients[client] = jax.tree.map(lambda x, i=i: x[i], states)
        server = dataclasses.replace(first, params=params)
        if reached is None and measure(trainer, server, "validation") >= 0.95:
            reached = number
    skipped = sum(int(jaxmp.skipped_steps(client.opt_state)) for client in clients)
    return {"accuracy": measure(trainer, server, "test"), "skipped_steps": skipped, "rounds_to_95": reached}


def measure(trainer: Trainer, state: Any, split: Literal["validation", "test"]) -> float:
    """The accuracy of a state on a split, from 0 to 1."""
    return compute(trainer.evaluation(state, trainer.evaluated(split)))["accuracy"]


def main(
    federation: tyro.conf.OmitArgPrefixes[Federation] = Federation(),
    precisions: tuple[str, ...] = ("float32", "mixed_bfloat16", "mixed_float16"),
    partitions: tuple[Literal["iid", "shards"], ...] = ("iid", "shards"),
    seeds: tuple[int, ...] = (0, 1, 2),
    output: Path | None = None,
) -> None:
    """Trains under each precision, partition and seed, and prints a table.

    Args:
      federation: what is trained.
      precisions: policies of the clients' steps.
      partitions: how rows are dealt to clients: iid, or shards of sorted labels.
      seeds: of weights, deal and draws.
      output: JSON file for all figures.
    """
    found = []
    print("| partition | precision | test accuracy | rounds to 95 % | skipped steps |\n|---|---|---|---|---|")
    for how in partitions:
        for precision in precisions:
            each = [train(federation, precision, how, seed) for seed in seeds]
            accuracies = [100 * run["accuracy"] for run in each]
            spread = f" ± {statistics.stdev(accuracies):.2f}" if len(each) > 1 else ""
            to_95 = ", ".join("-" if run["rounds_to_95"] is None else str(run["rounds_to_95"]) for run in each)
            skipped = ", ".join(str(run["skipped_steps"]) for run in each)
            print(
                f"| {how} | `{precision}` | {statistics.mean(accuracies):.2f}{spread} | {to_95} | {skipped} |",
                flush=True,
            )
            found.append({"partition": how, "precision": precision, "seeds": list(seeds), "runs": each})
    if output is not None:
        made_by = provenance()
        record = {"federation": dataclasses.asdict(federation), "rows": found, "versions": made_by.get("versions")}
        output.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    sys.exit(script(main))
