"""`jaxmp quantise RUN`: a run's model with weights of a few bits, and what that costs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from jaxmp.commands.command import Command, require_path
from jaxmp.errors import DONE


@dataclass(frozen=True)
class Options:
    """The options of `jaxmp quantise`."""

    run: str
    """Run folder, or a folder that contains one run."""
    output: str = "quantised"
    """Folder to write: a new one, or an empty one."""
    weights: str = "int8"
    """Format of the weights: int8, int4, e4m3, mxfp8, nvfp4, or another block format such as int4:group32."""
    method: Literal["nearest", "gptq", "awq"] = "nearest"
    """How weights are rounded: to nearest, or by GPTQ or AWQ, which need --calibrate; kernels of Dense layers alone."""
    activations: Literal["int8", "e4m3"] | None = None
    """Format of the inputs of products, with a scale for each vector, which is emulated; by default they stay."""
    calibrate: int | None = None
    """Training batches that --method gptq and awq look at, and that give the inputs of products static scales, in the
    place of those made for each row, with --activations."""
    checkpoint: Literal["best", "last", "ema"] = "best"
    """Weights to quantise: of the best checkpoint, or the last one, averaged where the run averages; or ema."""
    keep: tuple[str, ...] = ()
    """Patterns of weights that stay as they are, such as Dense_1 or **/embedding."""
    budget: float | None = None
    """Points of accuracy that may be lost on the validation split, or, without one, on the training split, beside the
    run's own: each weight gets the fewest bits within it."""
    platforms: tuple[str, ...] = ("cpu",)
    """Platforms to make a program for: cpu, cuda, rocm, tpu."""
    format: Literal["stablehlo", "onnx"] = "stablehlo"
    """Program to write: StableHLO, or ONNX, which needs jaxmp[onnx]; both decode the packed weights."""
    split: Literal["train", "validation", "test"] | None = None
    """Split that accuracy and certificate are measured on; by default test, else validation, else train."""
    rows: int = 10_000
    """The most rows that anything is measured on, spread evenly over the split."""


def quantise(options: Options) -> int:
    """Writes a run's model with weights of a few bits each, and prints what that costs.

    Weights are rounded after training; the folder is that of `jaxmp export`, and its program unpacks them.
    """
    require_path(run=options.run, output=options.output)
    import dataclasses

    from jaxmp.deploy import quantise as deploy
    from jaxmp.deploy.export import lines

    arguments = {field.name: getattr(options, field.name) for field in dataclasses.fields(options)}
    found = deploy.quantise(arguments.pop("run"), **arguments)
    print(found)
    for name, text in lines(found.artefact, options.output):
        if name.startswith("against"):
            print(f"{name:<16} {text}")
    print(f"{'folder':<16} {options.output}")
    return DONE


COMMAND = Command("quantise", Options, quantise)
