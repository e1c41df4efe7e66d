"""`jaxmp export RUN`: a run's model as a folder that predicts without jaxmp."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from jaxmp.commands.command import Command, require_path
from jaxmp.errors import DONE


@dataclass(frozen=True)
class Options:
    """The options of `jaxmp export`."""

    run: str
    """Run folder, or a folder that contains one run."""
    output: str = "exported"
    """Folder to write: a new one, or an empty one."""
    weights: Literal["best", "last", "ema"] = "best"
    """Weights to export: of the best checkpoint by the monitored metric, or the last one, averaged where the run
    averages; or ema, the last average, an error where the run keeps none."""
    precision: str | None = None
    """Policy to compute under; by default the run's own."""
    platforms: tuple[str, ...] = ("cpu",)
    """Platforms to make a program for: cpu, cuda, rocm, tpu. This machine's has to be among them."""
    format: Literal["stablehlo", "onnx"] = "stablehlo"
    """Program to write: StableHLO, which JAX runs with the bits of this run; or ONNX, which needs jaxmp[onnx]."""
    split: Literal["train", "validation", "test"] | None = None
    """Split that the certificate is measured on; by default test, else validation, else train."""
    rows: int = 10_000
    """The most rows that the certificate is measured on, spread evenly over the split."""
    decode: bool = False
    """Export one step of decoding with a cache, of a decoder such as GPT2, instead of the outputs for whole rows."""


def export(options: Options) -> int:
    """Writes a run's model as a folder that predicts without jaxmp, with a certificate.

    The certificate says how far the outputs are from those in float32, and from the run's own.
    """
    require_path(run=options.run, output=options.output)
    from jaxmp.deploy import export as deploy

    artefact = deploy.export(
        options.run,
        output=options.output,
        weights=options.weights,
        precision=options.precision,
        platforms=options.platforms,
        format=options.format,
        split=options.split,
        rows=options.rows,
        decode=options.decode,
    )
    for name, text in deploy.lines(artefact, options.output):
        print(f"{name:<16} {text}")
    return DONE


COMMAND = Command("export", Options, export)
