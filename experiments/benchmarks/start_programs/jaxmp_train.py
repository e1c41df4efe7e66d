"""`jaxmp train digits_mlp`: `python jaxmp_train.py STEPS FOLDER`. With one step it ends there."""

from __future__ import annotations

import os
import sys

from jaxmp import cli


def main(count: int, folder: str) -> int:
    """Trains for `count` steps, from the command line's own beginning."""
    sys.argv = ["jaxmp", "train", "digits_mlp", "--workdir", folder, "--loop.steps", str(count)]
    if count > 1:
        return cli.main()
    import jax

    import jaxmp.runs.fit as module

    dispatches = module._dispatches

    def first(*args: object, **kwargs: object) -> object:
        for info in dispatches(*args, **kwargs):  # type: ignore[arg-type]
            jax.block_until_ready(info.state)
            os._exit(0)

    module._dispatches = first  # type: ignore[assignment]
    return cli.main()


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1]), sys.argv[2]))
