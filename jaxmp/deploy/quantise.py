"""`quantise`: a run's weights in a few bits each, packed, as an exported folder; and what that costs, measured."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxmp.data.dataset import Split
from jaxmp.data.pipeline import evaluation_batches
from jaxmp.deploy import calibrate as static
from jaxmp.deploy import onnx
from jaxmp.deploy.accuracy import Trade, trade
from jaxmp.deploy.awq import awq
from jaxmp.deploy.certificate import kl_divergence
from jaxmp.deploy.contraction import matrix_axes, summed_axes
from jaxmp.deploy.decisions import decisions, labels_of, targets_of
from jaxmp.deploy.export import ROWS, Measured, check, chosen_state, load, write_folder
from jaxmp.deploy.forward import Forward, forward
from jaxmp.deploy.gptq import check_format, gptq
from jaxmp.deploy.packed_weight import PackedWeight
from jaxmp.deploy.predict import Artefact
from jaxmp.errors import InputError, local_path, nearest
from jaxmp.instruments.audit import audit
from jaxmp.modules.products import ObservedProduct, observed_products
from jaxmp.precision.blocks import BlockFormat, pack, parse_block_format
from jaxmp.precision.policy_tree import PolicyTree
from jaxmp.runs.run import Run
from jaxmp.text_table import table
from jaxmp.trees import Pattern, is_floating

FORMATS = {
    "int8": "int8:channel",
    "int4": "int4:block64",
    "e4m3": "e4m3:channel",
    "mxfp8": "mxfp8",
    "nvfp4": "nvfp4",
}
"""block formats of weights by short name; scales are float32 for each output channel, or of 64 weights of it"""

ACTIVATIONS = {"int8": "int8:channel", "e4m3": "e4m3:channel"}
"""block formats of the inputs of products: a scale for each vector that a product sums over"""

METHODS = ("nearest", "gptq", "awq")
"""how weights are rounded"""

SMALLEST = 2
"""least number of axes of a weight that is quantised: biases, scales and statistics stay"""

_ADDED = ("bias", "scale", "mean", "var")
"""names of weights that stay however many axes they have, unless a product sums over one"""


class Layer(NamedTuple):
    """A weight, and what it is stored in."""

    path: str
    shape: tuple[int, ...]
    format: str | None
    """block format; None: it stays as it is"""
    nbytes: int
    before: int
    """bytes before"""
    why: str
    """why it stays; "" if it is quantised"""
    method: str = ""
    """how it is rounded: `nearest`, `gptq` or `awq`"""
    to_nearest: str = ""
    """why it is rounded to nearest although another method is asked for; "" if it is not"""

    @property
    def stored(self) -> str:
        """What it is stored in, in words."""
        if self.format is None:
            return f"stays: {self.why}"
        how = "" if self.method == "nearest" else f", {self.method}"
        return f"{self.format}{how}" + (f", to nearest: {self.to_nearest}" if self.to_nearest else "")


class Calibrated(NamedTuple):
    """Activations with static scales, and how far they reach beyond them."""

    format: str
    rows: int
    """rows of the training split from which the scales were made"""
    clipped: dict[str, float]
    """share of the inputs of each product that is clipped, on the rows of the certificate, by layer"""
    share: float
    """share of the inputs of all products that is clipped"""

    def lines(self) -> list[str]:
        """What was calibrated, in words."""
        most = max(self.clipped, key=lambda layer: self.clipped[layer], default=None)
        largest = 0.0 if most is None else 100 * self.clipped[most]
        worst = f", at most {largest:.2g} % in {most}" if largest else ""
        return [
            f"activations      {self.format}, static scales from {self.rows:,} training rows",
            f"clipped          {100 * self.share:.2g} % of the inputs of products{worst}",
        ]


@dataclasses.dataclass(frozen=True)
class Quantised:
    """A quantised model and what was measured of it; printed, a report."""

    artefact: Artefact
    """the exported folder, read back"""
    layers: tuple[Layer, ...]
    """every weight of the model"""
    trade: Trade | None
    """accuracy of the run and of the quantised model on the split of the certificate; None where the task decides
    nothing that is labelled"""
    calibration: Calibrated | None
    """of activations with static scales; None without them"""
    activations: str | None
    """format of the inputs of products; None if they stay as they are"""
    unrounded: tuple[str, ...]
    """with `activations`, layers whose inputs stay nevertheless; "" is the model itself"""
    flops: dict[str, int]
    """FLOPs of products for one row, by dtype; those of a format that no device here has run in the dtype named"""

    @property
    def nbytes(self) -> int:
        """Bytes of all weights."""
        return sum(layer.nbytes for layer in self.layers)

    @property
    def nbytes_before(self) -> int:
        """Bytes of all weights before."""
        return sum(layer.before for layer in self.layers)

    def __str__(self) -> str:
        rows = [
            (layer.path, "x".join(map(str, layer.shape)), layer.stored, f"{layer.nbytes:,}") for layer in self.layers
        ]
        lines = [table(rows, header=("weight", "shape", "stored in", "bytes"), right=(3,)), ""]
        ratio = self.nbytes_before / self.nbytes
        lines.append(f"bytes            {self.nbytes:,} of {self.nbytes_before:,}, {ratio:.2f} times fewer")
        if self.calibration is not None:
            lines += self.calibration.lines()
        elif self.activations is not None:
            lines.append(f"activations      {self.activations}, a scale for each vector of each row; emulated")
        if self.unrounded:
            lines.append(f"not rounded      the inputs of {', '.join(each or '(model)' for each in self.unrounded)}")
        if self.trade is not None:
            lines += self.trade.lines("quantised")
        flops = ", ".join(f"{dtype} {count:,}" for dtype, count in self.flops.items())
        lines.append(f"FLOPs a row      {flops or 'none'}")
        return "\n".join(lines)


def quantise(
    run: Run | str | Path,
    *,
    output: str | Path,
    weights: str = "int8",
    method: Literal["nearest", "gptq", "awq"] = "nearest",
    activations: str | None = None,
    calibrate: int | None = None,
    checkpoint: Literal["best", "last", "ema"] = "best",
    keep: Sequence[str] = (),
    budget: float | None = None,
    platforms: Sequence[str] = ("cpu",),
    format: Literal["stablehlo", "onnx"] = "stablehlo",
    split: Split | None = None,
    rows: int = ROWS,
    log: Callable[[str], None] = print,
) -> Quantised:
    """Writes a run's model with its weights in a narrow format after training.

    Weights of two axes and more are packed, but for biases and scales that are stacked by `nn.scan`: codes in uint8,
    two in a byte of 4 bits, and scales. The program unpacks them, and computes under the run's policy. The folder is
    that of `jaxmp.export`, with a certificate.

    Args:
      run: the run, or its folder.
      output: the folder to write, new or empty.
      weights: int8, int4, e4m3, mxfp8, nvfp4, or any block format (`jaxmp.parse_block_format`), such as int4:group32.
      method: how weights are rounded. `nearest`; or `gptq` or `awq`, see `jaxmp.deploy.gptq` and `jaxmp.deploy.awq`,
        which make the error of outputs small on the rows of `calibrate`: of the kernels of Dense and DenseGeneral, also
        within attention and recurrent cells. Others are rounded to nearest, and listed, as are those whose outputs
        GPTQ makes worse on these rows, which happens at 2 bits.
      activations: int8 or e4m3: the inputs of products are rounded, too, with a scale for each vector that is summed
        over, made anew for each row. This is emulated.
      calibrate: number of training batches that `gptq` and `awq` look at; and from which, with `activations`, one
        static scale is made for the input of each product, its largest magnitude there, in the place of scales that
        are made anew; see `jaxmp.deploy.calibrate`.
      checkpoint: whose weights, as `jaxmp.export` takes them.
      keep: patterns of weights that stay as they are, such as Dense_1 or **/embedding.
      budget: points of accuracy that the model may lose on the validation split, or, without one, on the training
        split, beside the run's own. Each weight then gets the fewest bits that were found within it: `weights`,
        int8:channel, or as it is.
      platforms: as in `jaxmp.export`.
      format: as in `jaxmp.export`; an ONNX file has the packed weights, and the operations that decode them.
      split: rows of the certificate and of the accuracy, as in `jaxmp.export`.
      rows: the most rows that anything is measured on.
      log: takes each message of the search.

    Raises:
      InputError: as `jaxmp.export` does; a format or pattern is unknown; the run has rules whose default has a recipe;
        `method` can round no weight; or a budget is given where no accuracy can be measured, or one that rounded
        activations alone exceed.
    """
    run = run if isinstance(run, Run) else Run(run)
    folder = local_path("output", output)
    block = _format("weights", weights, FORMATS)
    patterns = [Pattern(text) for text in keep]
    check(run, folder, checkpoint, platforms, format, option="checkpoint")
    _check_method(method, block, calibrate, budget)
    tree = _with_activations(run.experiment.policy, activations)
    if calibrate is not None and activations is None and method == "nearest":
        raise InputError(
            f"--calibrate {calibrate}: there is nothing to calibrate; expected --activations beside it, or --method"
        )
    measured = Measured.of_run(run, split, rows)
    state = chosen_state(run, checkpoint, option="checkpoint")
    calibration, unrounded = None, tuple[str, ...]()
    if activations is None or calibrate is None:
        of = forward(run, state, measured.source, precision=str(tree))
    else:
        found = static.calibrate(run, state, activations, batches=calibrate)
        calibration, tree, unrounded = (
            _calibrated(run, state, measured, activations, found),
            found.tree,
            found.unrounded,
        )
        of = forward(run, found.state, measured.source, precision=str(tree))
    for pattern in patterns:
        if not any(pattern.covers(name) for name in of.weights):
            raise InputError(f"keep {pattern}: no such weight; {pattern.what_there_is(of.weights)}")
    summed = summed_axes(forward(run, state, measured.source, precision="float32"))
    if activations is not None:
        unrounded = tuple(dict.fromkeys([*unrounded, *_unrounded(of, measured, summed)]))
    candidates = {name: leaf for name, leaf in of.weights.items() if not why_kept(name, leaf, patterns, summed)}
    if not candidates:
        raise InputError(f"quantise: {run.path} has no weight that can be quantised; expected one of two axes or more")
    formats: dict[str, BlockFormat | None] = dict.fromkeys(candidates, block)
    if budget is not None:
        judge = _Judge(run, state, of, rows)
        formats = _search(judge, block, candidates, budget, activations, log, summed)
    packed: dict[str, PackedWeight] = {}
    reasons: dict[str, str] = {}
    statistics: dict[str, static.InputStatistics] = {}
    if method != "nearest" and calibrate is not None:
        sizes = {name.rpartition("/")[0]: np.size(leaf) for name, leaf in candidates.items() if _is_kernel(name)}
        statistics, _ = static.input_statistics(run, state, calibrate, sizes)
        if not any(name.rpartition("/")[0] in statistics for name in candidates if _is_kernel(name)):
            raise InputError(
                f"--method {method}: no weight to be quantised is the kernel of a Dense layer whose inputs can be "
                "observed (convolutions and layers in nn.scan cannot); expected --method nearest"
            )
    for name, leaf in candidates.items():
        if (of_name := formats[name]) is None:
            continue
        packed[name] = to_nearest = packed_weight(name, leaf, of_name, summed)
        about = statistics.get(name.rpartition("/")[0]) if _is_kernel(name) else None
        if about is not None:
            packed[name], reasons[name] = _by_method(method, leaf, to_nearest, about)
        elif method != "nearest":
            reasons[name] = "no inputs of a Dense layer were observed"
    exported = pack_weights(of, packed)
    methods = {name: "nearest" if reasons.get(name) or method == "nearest" else method for name in packed}
    layers = tuple(
        _layer(name, leaf, packed.get(name), why_kept(name, leaf, patterns, summed))._replace(
            method=methods.get(name, ""), to_nearest=reasons.get(name, "")
        )
        for name, leaf in of.weights.items()
    )
    how = {
        "weights": checkpoint,
        "step": int(state.step),
        "formats": {layer.path: layer.format for layer in layers},
        "methods": methods,
        "activations": activations,
        "unrounded": list(unrounded),
    } | ({} if calibration is None else {"calibration": calibration._asdict()})
    content = onnx.files(of, packed) if format == "onnx" else None
    write_folder(
        run, state, exported, folder, measured, tree=tree, how=how, platforms=platforms, format=format, files=content
    )
    artefact = load(folder)
    trade_ = _trade(artefact, exported, run, state, measured)
    return Quantised(artefact, layers, trade_, calibration, activations, unrounded, _flops(exported, measured))


def _check_method(method: str, block: BlockFormat, calibrate: int | None, budget: float | None) -> None:
    """Refuses a negative budget, and a method that is unknown, or that the other options do not go with."""
    if budget is not None and not budget >= 0:
        raise InputError(f"--budget {budget}: expected 0 points of accuracy or more")
    if method not in METHODS:
        raise InputError(f"--method {method}: expected {', '.join(METHODS)}{nearest(method, METHODS)}")
    if method == "nearest":
        return
    if calibrate is None:
        raise InputError(
            f"--method {method} looks at the inputs of layers; expected --calibrate N beside it, such as 8"
        )
    if budget is not None:
        raise InputError(
            f"--budget {budget:g} with --method {method}: the search rounds to nearest; expected one of both"
        )
    if method == "gptq":
        check_format(block)


def _is_kernel(name: str) -> bool:
    return name.rpartition("/")[2] == "kernel"


def _by_method(
    method: str, leaf: Any, to_nearest: PackedWeight, about: static.InputStatistics
) -> tuple[PackedWeight, str]:
    """A weight rounded by `gptq` or `awq`, and why it is rounded to nearest instead: "" if it is not."""
    format, order = to_nearest.blocks.format, to_nearest.order
    matrix = np.asarray(jnp.transpose(jnp.asarray(leaf, jnp.float32), order)).reshape(to_nearest.blocks.shape)
    if method == "awq":
        blocks, after = awq(matrix, about.gram, about.magnitudes, format)
        return dataclasses.replace(to_nearest, blocks=blocks, after=None if after is None else jnp.asarray(after)), ""
    blocks = gptq(matrix, about.gram, format)
    errors = [np.asarray(each.unpack(), np.float64) - matrix for each in (to_nearest.blocks, blocks)]
    before, now = (float(np.einsum("ri,ri->", error @ about.gram, error)) for error in errors)
    if now > before:
        return to_nearest, f"its outputs' error is {now / max(before, 1e-300):.3g} times as large with gptq"
    return dataclasses.replace(to_nearest, blocks=blocks), ""


def _format(option: str, text: str, known: Mapping[str, str]) -> BlockFormat:
    """The block format that an option names. Raises InputError with the nearest name."""
    if text in known:
        return parse_block_format(known[text])
    try:
        return parse_block_format(text)
    except InputError as error:
        near = nearest(text, known)
        raise InputError(f"--{option} {text}: expected {', '.join(known)}, or a block format{near}: {error}") from None


def _with_activations(tree: PolicyTree, activations: str | None) -> PolicyTree:
    """The policy in which the inputs of products are rounded to a format."""
    if activations is None:
        return tree
    if activations not in ACTIVATIONS:
        expected = ", ".join(ACTIVATIONS)
        raise InputError(f"--activations {activations}: expected {expected}{nearest(activations, ACTIVATIONS)}")
    if tree.default.recipe is not None or tree.default.operands is not None:
        raise InputError(f"--activations {activations}: the run's policy {tree} rounds the inputs of products already")
    return PolicyTree.parse(f"{tree},fprop={ACTIVATIONS[activations]}/high")


def _calibrated(run: Run, state: Any, measured: Measured, format: str, found: static.Calibration) -> Calibrated:
    """How much of the inputs of products lies beyond the static scales, on the rows of the certificate."""
    counts = static.clipped(run, state, measured.source, found)
    by_layer = {
        f"{path or '(model)'}" + (f" {n}" if n else ""): above / size for (path, n), (above, size) in counts.items()
    }
    above, size = (sum(each[index] for each in counts.values()) for index in (0, 1))
    return Calibrated(format, found.rows, by_layer, above / max(size, 1))


def _unrounded(of: Forward, measured: Measured, summed: Collection[str]) -> list[str]:
    """The layers that multiply a weight by inputs that are not rounded.

    A rule of the policy keeps them, or they make their products where no recipe reaches, as a cell that joins its gates
    does.

    Args:
      of: the model under a policy that rounds the inputs of products.
      measured: rows, of which one gives the shapes.
      summed: the weights in products.
    """
    rounded: dict[str, bool] = {}

    def observe(path: str, product: ObservedProduct) -> jax.Array:
        is_rounded = product.recipe is not None and product.recipe.fprop.left is not None
        rounded[path] = rounded.get(path, True) and is_rounded
        return product.result

    with observed_products(observe):
        # A function of its own: one that has been traced before would not be traced again, and nothing be observed.
        jax.eval_shape(lambda *given: of.function(*given), *_arguments(of, measured))
    # Scales and biases come into a product as a part of its input.
    weights = {name for name, leaf in of.weights.items() if np.ndim(leaf) > 1 and name.rpartition("/")[2] not in _ADDED}
    layers = dict.fromkeys(name.rpartition("/")[0] for name in of.weights if name in summed and name in weights)
    return [layer for layer in layers if not rounded.get(layer)]


def why_kept(name: str, leaf: Any, patterns: Sequence[Pattern], summed: Collection[str]) -> str:
    """Why a weight stays as it is: "" for one that is quantised; `summed` are the weights in products."""
    if not is_floating(leaf):
        return "not of floats"
    if np.ndim(leaf) < SMALLEST:
        return f"{np.ndim(leaf)} axes" if np.ndim(leaf) != 1 else "1 axis"
    if name.rpartition("/")[2] in _ADDED and name not in summed:  # of layers in nn.scan, with an axis more
        return "in no product"
    return "--keep" if any(pattern.covers(name) for pattern in patterns) else ""


def as_matrix(leaf: Any, rows: Sequence[int], columns: Sequence[int]) -> jax.Array:
    """A weight as a float32 matrix; for its axes see `matrix_axes`."""
    weight = jnp.asarray(leaf, jnp.float32)
    return jnp.transpose(weight, [*rows, *columns]).reshape(math.prod(weight.shape[axis] for axis in rows), -1)


def packed_weight(name: str, leaf: Any, format: BlockFormat, summed: Mapping[str, tuple[int, ...]]) -> PackedWeight:
    """Rounds a weight to a block format; `summed` is that of `summed_axes`."""
    rows, columns = matrix_axes(name, leaf, summed)
    like = jax.ShapeDtypeStruct(np.shape(leaf), jnp.result_type(leaf))
    return PackedWeight(pack(as_matrix(leaf, rows, columns), format, axis=1), (*rows, *columns), like)


def pack_weights(of: Forward, packed: Mapping[str, PackedWeight]) -> Forward:
    """A forward function whose arguments are packed weights, which it unpacks.

    Args:
      of: the function of plain weights.
      packed: weights that are packed, by path.
    """
    arguments: dict[str, Any] = {}
    for name, leaf in of.weights.items():
        parts = {"": leaf} if name not in packed else packed[name].arrays()
        arguments |= {f"{name}.{part}".rstrip("."): array for part, array in parts.items()}

    def function(given: Sequence[Any], state: Sequence[Any], inputs: Sequence[Any]) -> list[Any]:
        rest, plain = list(given), []
        for name in of.weights:
            if name not in packed:
                plain.append(rest.pop(0))
                continue
            parts = {part: rest.pop(0) for part in packed[name].arrays()}
            plain.append(packed[name].with_arrays(parts).unpack())
        return of.function(plain, state, inputs)

    return dataclasses.replace(of, function=function, weights=arguments)


def _layer(name: str, leaf: Any, packed: PackedWeight | None, why: str) -> Layer:
    before = int(np.asarray(leaf).nbytes)
    if packed is None:
        return Layer(name, np.shape(leaf), None, before, before, why or "the budget")
    return Layer(name, np.shape(leaf), str(packed.blocks.format), before=before, nbytes=packed.nbytes, why="")


def _trade(artefact: Artefact, of: Forward, run: Run, state: Any, measured: Measured) -> Trade | None:
    """The accuracy of the run and of its artefact on the rows of the certificate; `of` is what was exported."""

    def of_artefact(batch: Mapping[str, Any]) -> Any:
        found = artefact.leaves(artefact(**{name: np.asarray(jnp.asarray(batch[name])) for name in artefact.inputs}))
        return of.unflatten([jnp.asarray(leaf) for leaf in found.values()])

    return trade(run, measured.source, lambda batch: run.outputs(dict(batch), state), of_artefact)


def _flops(of: Forward, measured: Measured) -> dict[str, int]:
    """FLOPs of products for one row, by dtype."""
    return dict(audit(of.function, *_arguments(of, measured)).dot_flops_by_dtype)


def _arguments(of: Forward, measured: Measured) -> tuple[Any, ...]:
    """The arguments of a forward function for one row, the weights by their shapes."""
    row = measured.source[np.arange(1)]
    return of.arguments()[0], [], [np.asarray(jnp.asarray(row[name])) for name in of.inputs]


def _search(
    judge: _Judge,
    format: BlockFormat,
    candidates: Mapping[str, Any],
    budget: float,
    activations: str | None,
    log: Callable[[str], None],
    summed: Mapping[str, tuple[int, ...]],
) -> dict[str, BlockFormat | None]:
    """The formats with the fewest bits whose accuracy is within the budget of the run's own.

    Each weight is first rounded alone, which says how much it costs: the mean KL divergence of the classes of a
    decision, or of each of several labels. All begin in the narrowest format; then the one that costs most for the
    bytes that it saves goes one rung up, to 8 bits or as it was, until the measured accuracy is within the budget.

    Raises: InputError if it is not with all weights as they are, since rounded activations alone cost more.
    """
    eight = parse_block_format(FORMATS["int8"])
    ladder: list[BlockFormat | None] = [format, *([eight] if format.bits < eight.bits else []), None]
    rounded = {
        name: [leaf if each is None else packed_weight(name, leaf, each, summed).unpack() for each in ladder]
        for name, leaf in candidates.items()
    }
    sizes = {
        name: [
            np.asarray(leaf).nbytes if each is None else packed_weight(name, leaf, each, summed).nbytes
            for each in ladder
        ]
        for name, leaf in candidates.items()
    }
    whole = judge.of_run()
    judge({})  # what divergences are from
    cost = {
        name: [judge({name: each})[1] if rung < len(ladder) - 1 else 0.0 for rung, each in enumerate(of_name)]
        for name, of_name in rounded.items()
    }
    rungs = dict.fromkeys(candidates, 0)
    while True:
        right, _ = judge({name: rounded[name][rung] for name, rung in rungs.items()})
        lost = 100 * (whole - right)
        bits = 8 * sum(sizes[name][rung] for name, rung in rungs.items())
        average = bits / sum(np.size(leaf) for leaf in candidates.values())
        log(f"{average:.2f} bits a weight: {lost:+.2f} points lost on {judge.where}")
        if lost <= budget + 1e-9:  # shares are not exact
            return {name: ladder[rung] for name, rung in rungs.items()}
        # What a rung up gains for each byte that it adds.
        gains = {
            name: (cost[name][rung] - cost[name][rung + 1]) / max(1, sizes[name][rung + 1] - sizes[name][rung])
            for name, rung in rungs.items()
            if rung + 1 < len(ladder)
        }
        if not gains:
            why = "" if activations is None else f", the cost of --activations {activations} alone"
            raise InputError(
                f"--budget {budget:g}: with all weights as they are {lost:.2f} points are lost on {judge.where}{why}; "
                f"expected a budget of {math.ceil(100 * lost - 1e-6) / 100:.2f} or more"
                + ("" if activations is None else ", or no --activations")
            )
        rungs[max(gains, key=lambda name: gains[name])] += 1


class _Judge:
    """Judges a model with other weights: its accuracy, and the mean KL divergence from the model itself."""

    def __init__(self, run: Run, state: Any, of: Forward, rows: int):
        split: Split = "validation" if "validation" in run.trainer.splits else "train"
        self._run, self._state, self._of, self._measured = run, state, of, Measured.of_run(run, split, rows)
        self._program, self._targets = jax.jit(of.function), targets_of(run.experiment)
        self._own: list[np.ndarray] = []
        self.where = f"{split} rows"
        """the rows that it judges by, in words"""
        if split == "train":
            self.where += ", on which the run was trained: there is no validation split"

    def of_run(self) -> float:
        """The share of right decisions of the run itself. Raises InputError if no label counts."""
        right = [self._right(batch, self._run.outputs(batch, self._state))[0] for batch in self._batches()]
        found = np.concatenate(right)
        if not found.size:
            raise InputError(f"--budget: no label of the {self.where} counts; expected some that are no padding")
        return float(np.mean(found))

    def __call__(self, weights: Mapping[str, Any]) -> tuple[float, float]:
        """The share of right decisions, and the divergence, with some weights in the place of the model's."""
        first, found, divergences = not self._own, [], []
        given = [weights.get(name, leaf) for name, leaf in self._of.weights.items()]
        for at, batch in enumerate(self._batches()):
            leaves = self._program(given, [], [np.asarray(jnp.asarray(batch[name])) for name in self._of.inputs])
            right, counts = self._right(batch, self._of.unflatten(leaves))
            logits = np.asarray(leaves[0])[: len(counts)]
            if logits.shape == counts.shape:  # one for each decision, of a sigmoid: its softmax beside a logit of 0
                logits = np.stack([logits, np.zeros_like(logits)], axis=-1)
            if first:
                self._own.append(logits)
            divergence = np.minimum(kl_divergence(self._own[at], logits), 1e3)
            found.append(right)
            divergences.append(divergence[counts] if divergence.shape == counts.shape else divergence.ravel())
        return float(np.mean(np.concatenate(found))), float(np.mean(np.concatenate(divergences)))

    def _batches(self) -> Iterator[dict[str, Any]]:
        source, size = self._measured.source, self._run.experiment.data.eval_batch_size
        return (dict(batch) for batch in evaluation_batches(source, size))

    def _right(self, batch: Mapping[str, Any], outputs: Any) -> tuple[np.ndarray, np.ndarray]:
        """Whether each decision that counts is right, and which of the rows' decisions count.

        Raises: InputError if the task decides nothing that the data label.
        """
        task, there = self._run.experiment.task, int(np.sum(batch["weight"]))
        decided = decisions(task, outputs)
        labels = labels_of(task, self._targets(batch), decided)
        if labels is None or len(jax.tree.leaves(outputs)) != 1:
            raise InputError(
                f"--budget: {type(task).__name__} decides nothing that the data label; expected a classification"
            )
        counts = labels.counts[:there]
        return np.asarray(decided == labels.values)[:there][counts], counts
