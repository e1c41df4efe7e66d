"""`jaxmp sample RUN`: texts or pictures drawn from a trained model."""

from __future__ import annotations

from dataclasses import dataclass

from jaxmp.commands.command import Command, require_path
from jaxmp.errors import DONE


@dataclass(frozen=True)
class Options:
    """The options of `jaxmp sample`."""

    run: str
    """Run folder, or a folder that contains one run."""
    count: int | None = None
    """Number of texts or pictures; by default 4 texts, or 64 pictures."""
    prompt: str | None = None
    """Text that each text begins with; by default the end of a text before, or a new line."""
    length: int | None = None
    """Tokens to draw for a text; by default as many as the model's context has room for."""
    temperature: float = 1.0
    """What the logits of tokens are divided by: below 1 for more probable text; 0 takes the most probable token."""
    seed: int = 0
    """Seed of the draws."""
    step: str = "last"
    """Weights to sample from: of the last checkpoint, of the best by the monitored metric, or of a step: last, best or
    N. Averaged weights are taken where the run has them."""


def sample(options: Options) -> int:
    """Draws texts or pictures from a run's model; keeps them in the run's folder and in TensorBoard."""
    require_path(run=options.run)
    from jaxmp.errors import whole_number
    from jaxmp.runs.folder import RunFolder, parse_step
    from jaxmp.runs.run import Run
    from jaxmp.runs.samples import RULE, write_samples
    from jaxmp.tasks.samples import Sampling

    step, seed = parse_step(options.step, f"--step {options.step}"), whole_number("seed", options.seed, 0)
    sampling = Sampling(options.count, options.prompt, options.length, options.temperature)
    run = Run(options.run)
    state = run.state(step)
    samples = run.sample(sampling, seed=seed, state=state)
    if samples.texts:
        print(f"\n{RULE}\n".join(samples.texts))
    for path in write_samples(RunFolder(run.path), samples, sampling, step=int(state.step), seed=seed):
        print(f"\n{'samples':<16} {path}")
    return DONE


COMMAND = Command("sample", Options, sample)
