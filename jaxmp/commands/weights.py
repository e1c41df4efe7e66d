"""`jaxmp weights RUN`: a run's weights as a safetensors file, whole, merged or LoRA's adapters alone."""

from __future__ import annotations

from dataclasses import dataclass

from jaxmp.commands.command import Command, require_path
from jaxmp.errors import DONE, InputError, local_path


@dataclass(frozen=True)
class Options:
    """The options of `jaxmp weights`."""

    run: str
    """Run folder, or a folder that contains one run."""
    output: str = "weights.safetensors"
    """File to write, .safetensors; --init-from reads it back."""
    step: str = "last"
    """Weights to write: of the last checkpoint, of the best by the monitored metric, or of a step: last, best or N.
    Averaged weights are taken where the run has them."""
    only: tuple[str, ...] = ()
    """Patterns of the weights to write, such as **/lora_a **/lora_b, LoRA's adapters alone; by default all."""
    merged: bool = False
    """Write the weights of the model without adapters that computes the same."""


def weights(options: Options) -> int:
    """Writes a run's weights to a safetensors file, by their paths in the model."""
    require_path(run=options.run, output=options.output)
    from jaxmp.models.pretrained import write_safetensors
    from jaxmp.runs.folder import parse_step
    from jaxmp.runs.run import Run
    from jaxmp.trees import Pattern

    step, path = parse_step(options.step, f"--step {options.step}"), local_path("output", options.output)
    if path.suffix != ".safetensors":
        raise InputError(f"output {options.output!r}: expected a file whose name ends in .safetensors")
    if not path.parent.is_dir():
        raise InputError(f"output {options.output!r}: there is no folder {str(path.parent)!r}")
    patterns = [Pattern(text) for text in options.only]
    run = Run(options.run)
    if options.merged and not run.experiment.lora.rank:
        raise InputError(f"--merged: {run.path} was trained without adapters; expected a run with --lora.rank")
    found = run.weights(step, merged=options.merged)
    for pattern in patterns:
        if not any(pattern.covers(name) for name in found):
            raise InputError(f"--only {pattern}: no such weight; {pattern.what_there_is(found)}")
    chosen = {n: x for n, x in found.items() if not patterns or any(each.covers(n) for each in patterns)}
    write_safetensors(path, chosen)
    print(f"{'weights':<16} {len(chosen)} of {len(found)}, {sum(x.size for x in chosen.values()):,} numbers")
    print(f"{'file':<16} {options.output}, {path.stat().st_size:,} bytes")
    return DONE


COMMAND = Command("weights", Options, weights)
