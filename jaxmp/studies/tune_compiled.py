"""`shared_compiles`: what one trial of a study compiles, the next loads, in this process and in others of the machine.

Trials whose programs are equal share them: those that differ in numbers that are arguments of the step in every run
(learning rate, its schedule's numbers, weight decay, clipping norm, momentum, eps, EMA decay, number of epochs, seed;
see `Trainer.numbers`), and all trials of one model share evaluation. Where a trial changes what is a constant (a width,
a batch size, dropout, b1; with pruning also the number of epochs), its step is compiled once for that value.
"""

from __future__ import annotations

import contextlib
import platform
import shutil
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

import jax
from jax.experimental.compilation_cache import compilation_cache

from jaxmp.data.cache import cache_folder
from jaxmp.errors import InputError


@contextlib.contextmanager
def shared_compiles(study: str, is_over: Callable[[], bool]) -> Iterator[None]:
    """Context manager in which JAX keeps compiled programs on disk, by its persistent compilation cache.

    They are in `~/.cache/jaxmp/compiled/<host>/<study>`: what XLA:CPU compiles runs on machines of one kind alone. A
    cache that is set up already (JAX_COMPILATION_CACHE_DIR) is used as it is.

    Args:
      study: tells the programs of this study from others.
      is_over: whether no worker needs them any more; they are then deleted.
    """
    try:
        home = cache_folder()
    except InputError:  # there is no home folder
        home = None
    folder = (home or Path()) / "compiled" / (platform.node() or "host") / study
    values = {
        "jax_compilation_cache_dir": str(folder),
        "jax_persistent_cache_min_compile_time_secs": 0.0,
        "jax_persistent_cache_min_entry_size_bytes": 0,
    }
    before = {name: getattr(jax.config, name) for name in values}
    if home is None or before["jax_compilation_cache_dir"] is not None:
        yield
        return
    _configure(values)
    try:
        with warnings.catch_warnings():
            # Another worker is writing that entry, not in one piece: JAX compiles instead.
            warnings.filterwarnings("ignore", message="Error reading persistent compilation cache")
            yield
    finally:
        _configure(before)
        if is_over():
            shutil.rmtree(folder, ignore_errors=True)


def _configure(values: dict[str, object]) -> None:
    for name, value in values.items():
        jax.config.update(name, value)
    compilation_cache.reset_cache()  # whether there is one is decided at the first compile, once
