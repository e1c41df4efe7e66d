"""Checkpoints: everything a run needs to go on, written while it goes on.

    checkpoints/<step>/arrays/        the leaves, by Orbax: one flat mapping of path to array
    checkpoints/<step>/manifest.json  step, metrics; dtype and shape of each leaf; CRC-32 of each file
    checkpoints/<step>.partial        being written
    checkpoints/<step>.deleted        being deleted
    checkpoints/<step>.corrupt        was found damaged; moved out of the way, never deleted

A folder is called by its bare step only while it is whole: one rename gives it that name after the last byte, another
takes it away before the first file goes. So a `kill -9` at any moment leaves nothing that looks like a checkpoint and
is none.

Orbax writes the arrays (`AsyncCheckpointer`: one checkpoint, nothing else). Which ones there are, which is best and
which go is decided here, from what is on the disk: `CheckpointManager` remembers its own list and deletes in place,
which goes wrong after a kill or with a damaged file. Of several processes, which need a file system in common, each
writes its own shards, and the first does all the rest. `orbax.checkpoint.experimental.v1` is not stable yet.
"""

from __future__ import annotations

import errno
import functools
import json
import logging
import math
import os
import shutil
import sys
import threading
import warnings
import weakref
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from jaxmp.distributed import processes
from jaxmp.errors import InputError
from jaxmp.trees import is_key, path_name

_MANIFEST = "manifest.json"
_ARRAYS = "arrays"


class _Corrupt(Exception):
    """Why a checkpoint cannot be read back as it was written."""


class Checkpoints:
    """The checkpoints of one run: the last `keep`, and the best.

    Nothing is created before the first `save`: a run that is only read is not changed. One program at a time may save.

    Args:
      folder: holds one folder a step.
      keep: how many of the newest to keep, at least 1.
      best_of: the metric whose best checkpoint is kept as well; None: only the newest.
      mode: whether "max" or "min" of that metric is best. On a tie the earlier step is best; NaN never is.
    """

    def __init__(
        self, folder: Path, *, keep: int = 2, best_of: str | None = "accuracy", mode: Literal["max", "min"] = "max"
    ):
        import orbax.checkpoint as ocp  # here: importing it takes longer than `jaxmp --help` may

        if keep < 1:
            raise InputError(f"keep={keep}: at least 1 checkpoint must be kept")
        if mode not in ("max", "min"):
            raise InputError(f"mode={mode!r}: expected 'max' or 'min'")
        _quieten_orbax()
        self.folder = Path(folder).absolute()
        self.keep = keep
        self.best_of = best_of
        self.mode = mode
        self._ocp = ocp
        self._orbax = ocp.AsyncCheckpointer(ocp.PyTreeCheckpointHandler())
        self._writing: threading.Thread | None = None
        self._saved: int | None = None  # the step last handed to `save`
        self._failure: tuple[int, Exception] | None = None
        self._corrupt: set[int] = set()  # found by `restore`, to be moved aside by the next `save`
        _wait_before_exit(self)

    def save(self, step: int, tree: Any, metrics: dict[str, float] | None = None) -> None:
        """Saves `tree` as it is now; returns when its buffers may be donated, and writes in the background.

        `tree` is any pytree of arrays (of any dtype, PRNG keys included) and scalars. Of a step that is saved already
        only the metrics are taken, where it had none. Waits for a save that is still being written.

        Raises:
          InputError: this or the save before could not be written (disk full, folder not writable). Those before are
            whole.
        """
        if not processes.is_first():
            self.wait()
        metrics = {name: float(value) for name, value in (metrics or {}).items()}
        named = _named_leaves(tree)
        leaves = {path: _describe(leaf) for path, leaf in named.items()}
        partial = self._path(step, "partial")
        try:
            if not processes.from_first(lambda: self._begin(step, metrics)):
                return
            arrays = {path: _storable(leaf) for path, leaf in named.items()}
            arrays = {path: array for path, array in arrays.items() if array.size}  # Orbax refuses the empty ones
            # Nothing is copied here. Orbax fetches from a GPU before it returns; on a CPU it holds views of JAX's own
            # buffers, and while such a view lives, JAX gives a donated buffer's memory to nobody else.
            self._orbax.save(partial / _ARRAYS, args=self._ocp.args.PyTreeSave(arrays))
        except OSError as error:
            raise self._not_written(step, error) from error
        self._saved = step
        manifest = {"step": step, "metrics": metrics, "leaves": leaves}
        self._writing = threading.Thread(target=self._finish, args=(manifest,), name="checkpoint", daemon=True)
        self._writing.start()

    def restore(
        self, template: Any, *, step: int | None = None, warn: Callable[[str], None] = warnings.warn
    ) -> tuple[int, Any] | None:
        """The newest whole checkpoint, or that of `step`: (step, tree like `template`); None where there is none.

        Template leaves are arrays or `jax.ShapeDtypeStruct`s. Each leaf comes back bit by bit as it was saved, with the
        template's sharding, strongly typed; a numpy leaf of the template comes back as numpy. A damaged checkpoint is
        reported through `warn` and the one before is used (not where `step` was asked for).

        Raises:
          InputError: path, shape or dtype of a leaf differ from the template's (all of them are named, before anything
            is read); there are checkpoints, but all are damaged; there is none of `step`.
        """
        self.wait()
        self._saved = None  # it may turn out to be damaged, and must then be saved again
        steps = processes.from_first(self.steps)
        if step is not None:
            if step not in steps:
                raise InputError(f"no checkpoint of step {step} in {self.folder}; there are {steps or 'none'}")
            steps = [step]
        damage = []
        for candidate in reversed(steps):
            try:
                manifest, why_not = processes.from_first(functools.partial(self._checked, candidate, template))
                if why_not is not None:
                    raise _Corrupt(why_not)
                return candidate, self._read(candidate, manifest, template)
            except _Corrupt as why:
                if step is None and not processes.several() and not (self.folder / str(candidate)).exists():
                    return self.restore(template, warn=warn)  # deleted meanwhile, by the run that writes here
                self._corrupt.add(candidate)
                damage.append(f"{candidate} ({why})")
                if candidate != steps[0]:
                    warn(f"checkpoint {candidate} in {self.folder} is damaged ({why}); using the one before")
        if damage:
            raise InputError(
                f"no intact checkpoint in {self.folder}; damaged: {'; '.join(damage)}. "
                "Put back a copy of one, or start the run again (--overwrite)"
            )
        return None

    def steps(self) -> list[int]:
        """The steps of which there is a checkpoint on the disk, ascending, without one that is still being written."""
        if not self.folder.is_dir():
            return []
        return sorted(int(path.name) for path in self.folder.iterdir() if path.name.isdecimal())

    def best_step(self) -> int | None:
        """The step whose `best_of` metric is best; None where no checkpoint has one."""
        return self._best({step: manifest["metrics"] for step, manifest in self._manifests().items()})

    def wait(self) -> None:
        """Returns when all is on the disk and the old ones are deleted. Raises InputError where writing failed."""
        if self._writing is not None:
            self._writing.join()
            self._writing = None
        if self._failure is not None:
            (step, error), self._failure = self._failure, None
            raise self._not_written(step, error) from error

    def close(self) -> None:
        """Waits, as `wait` does, and frees Orbax's threads."""
        try:
            self.wait()
        finally:
            self._orbax.close()

    # Writing.

    def _begin(self, step: int, metrics: dict[str, float]) -> bool:
        """Makes the folder of a checkpoint; False where there is one of that step, which then gets its metrics."""
        self.wait()
        self._tidy()
        if step == self._saved or (self.folder / str(step)).exists():
            self._add_metrics(step, metrics)
            return False
        self._path(step, "partial").mkdir()
        return True

    def _finish(self, manifest: dict) -> None:
        """In the background: the manifest, the rename that makes it a checkpoint, and away with what is too old now."""
        step = manifest["step"]
        partial = self._path(step, "partial")
        try:
            self._orbax.wait_until_finished()  # in the first process: until all have written
            if processes.is_first():
                files = sorted(path for path in (partial / _ARRAYS).rglob("*") if path.is_file())
                manifest["files"] = {str(path.relative_to(partial)): _crc32(path) for path in files}
                _write_manifest(partial / _MANIFEST, manifest)
                os.rename(partial, self.folder / str(step))
                self._delete_old()
        except Exception as error:  # raised again by the next `wait`
            self._failure = step, error
            self._saved = None
            if processes.is_first():
                shutil.rmtree(partial, ignore_errors=True)

    def _delete_old(self) -> None:
        manifests = self._manifests()  # what cannot be read neither counts as one of the newest nor is deleted
        best = self._best({step: manifest["metrics"] for step, manifest in manifests.items()})
        for step in sorted(manifests)[: -self.keep]:
            if step != best:
                doomed = self._path(step, "deleted")
                os.rename(self.folder / str(step), doomed)
                shutil.rmtree(doomed, ignore_errors=True)

    def _tidy(self) -> None:
        """Clears what a killed process left half-written or half-deleted; moves damaged checkpoints out of the way."""
        self.folder.mkdir(parents=True, exist_ok=True)
        for path in self.folder.iterdir():
            if path.suffix in (".partial", ".deleted") and path.stem.isdecimal():
                shutil.rmtree(path, ignore_errors=True)
        for step in self._corrupt:
            names = ["corrupt", *(f"corrupt{n}" for n in range(2, 1000))]
            free = next(path for name in names if not (path := self._path(step, name)).exists())
            os.rename(self.folder / str(step), free)
        self._corrupt.clear()

    def _add_metrics(self, step: int, metrics: dict[str, float]) -> None:
        manifest = self._manifests().get(step)
        if manifest is not None and metrics and not manifest["metrics"]:
            _write_manifest(self.folder / str(step) / _MANIFEST, manifest | {"metrics": metrics})

    def _not_written(self, step: int, error: Exception) -> InputError:
        return InputError(
            f"the checkpoint of step {step} could not be written to {self.folder}: {_reason(error)}. "
            f"Whole are: {self.steps() or 'none'}. Make room or choose another folder, and run the same command again"
        )

    def _path(self, step: int, suffix: str) -> Path:
        return self.folder / f"{step}.{suffix}"

    # Reading.

    def _manifests(self) -> dict[int, dict]:
        manifests = {}
        for step in self.steps():
            try:
                manifests[step] = self._manifest(step)
            except _Corrupt:
                continue
        return manifests

    def _manifest(self, step: int) -> dict:
        try:
            manifest = json.loads((self.folder / str(step) / _MANIFEST).read_bytes())
            checksum = manifest.pop("crc32")
        except OSError as error:
            raise _Corrupt(f"{_MANIFEST}: {error.strerror}") from error
        except (ValueError, AttributeError, KeyError) as error:
            raise _Corrupt(f"{_MANIFEST} is not what was written") from error
        if checksum != _json_crc32(manifest):
            raise _Corrupt(f"{_MANIFEST} does not match its checksum")
        return manifest

    def _best(self, metrics: dict[int, dict[str, float]]) -> int | None:
        values = {step: of.get(self.best_of or "", math.nan) for step, of in metrics.items()}
        values = {step: value for step, value in values.items() if not math.isnan(value)}
        if not values:
            return None
        return (max if self.mode == "max" else min)(sorted(values), key=values.__getitem__)

    def _checked(self, step: int, template: Any) -> tuple[dict | None, str | None]:
        """The manifest of a checkpoint whose files are as they were written; or None, and what is wrong."""
        try:
            manifest = self._manifest(step)
            self._compare(step, manifest, template)
            self._verify(step, manifest)
        except _Corrupt as why:
            return None, str(why)
        return manifest, None

    def _compare(self, step: int, manifest: dict, template: Any) -> None:
        """Orbax casts to the template's dtype without a word, so the difference is looked for first."""
        saved = {path: f"{leaf['dtype']}{leaf['shape']}" for path, leaf in manifest["leaves"].items()}
        expected = {path: "{}{}".format(*_dtype_and_shape(leaf)) for path, leaf in _named_leaves(template).items()}
        wrong = [
            f"  {path}: saved {saved.get(path, 'nothing')}, expected {expected.get(path, 'nothing')}"
            for path in dict.fromkeys([*expected, *saved])
            if saved.get(path) != expected.get(path)
        ]
        if wrong:
            raise InputError(
                f"checkpoint {self.folder / str(step)} is of another model, optimizer or precision:\n"
                + "\n".join(wrong)
            )

    def _read(self, step: int, manifest: dict, template: Any) -> Any:
        wanted = _named_leaves(template)
        leaves = manifest["leaves"]
        how = {path: self._restore_args(wanted[path]) for path, leaf in leaves.items() if math.prod(leaf["shape"])}
        try:
            arrays = self._orbax.restore(
                self.folder / str(step) / _ARRAYS, args=self._ocp.args.PyTreeRestore(dict.fromkeys(how, 0), how)
            )
        except Exception as error:  # Orbax, TensorStore and Zstandard each raise their own
            if processes.several():  # the others may have read it, and would not follow to the one before
                raise InputError(f"checkpoint {self.folder / str(step)} cannot be read: {_reason(error)}") from error
            raise _Corrupt(_reason(error)) from error
        restored = []
        for path, like in wanted.items():
            leaf = leaves[path]
            array = arrays[path] if path in arrays else np.zeros(leaf["shape"], leaf["dtype"])
            restored.append(_place(array, leaf.get("key"), like))
        return jax.tree.unflatten(jax.tree.structure(template), restored)

    def _verify(self, step: int, manifest: dict) -> None:
        """Compares the files with their checksums, for what Orbax does with a damaged one is anyone's guess."""
        for name, checksum in manifest["files"].items():
            try:
                if _crc32(self.folder / str(step) / name) != checksum:
                    raise _Corrupt(f"{name} does not match its checksum")
            except OSError as error:
                raise _Corrupt(f"{name}: {error.strerror}") from error

    def _restore_args(self, like: Any) -> Any:
        """Through host memory, so that uncommitted arrays stay so; straight to devices that span processes."""
        sharding = getattr(like, "sharding", None)
        if sharding is None or sharding.is_fully_addressable:
            return self._ocp.RestoreArgs(restore_type=np.ndarray)
        return self._ocp.ArrayRestoreArgs(restore_type=jax.Array, sharding=sharding)


def _wait_before_exit(checkpoints: Checkpoints) -> None:
    """Lets a save end that the program did not wait for, and says so where it could not.

    `atexit` is too late: Python has then shut down the executors that Orbax writes with, and its threads die with a
    traceback, or wait for ever. concurrent.futures uses this hook itself; ours, being later, runs before its own. From
    Python 3.12 on no thread can start any more by then, and what has not been written by the others is lost.
    """
    reference = weakref.ref(checkpoints)

    def wait() -> None:
        unfinished = reference()
        if unfinished is not None and unfinished._writing is not None:
            unfinished._writing.join(timeout=60)
            if unfinished._failure is not None or unfinished._writing.is_alive():
                print("the last checkpoint was not written: the program ended without close()", file=sys.stderr)

    threading._register_atexit(wait)  # type: ignore[attr-defined]


def _reason(error: Exception) -> str:
    """The operating system's reason where there is one (TensorStore hides it in a long text), or the first line."""
    for code in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EIO):
        if os.strerror(code) in str(error):
            return os.strerror(code)
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]


def _named_leaves(tree: Any) -> dict[str, Any]:
    """The leaves by path: `params/Dense_0/kernel`, `opt_state/0/mu`, ... in the order of the tree."""
    flat = jax.tree_util.tree_leaves_with_path(tree)
    leaves = {path_name(path) or "value": leaf for path, leaf in flat}
    if len(leaves) != len(flat):
        raise InputError("the tree has two leaves with the same path, so they cannot be told apart in a checkpoint")
    return leaves


def _dtype_and_shape(leaf: Any) -> tuple[str, list[int]]:
    dtype = leaf.dtype if hasattr(leaf, "dtype") else jax.dtypes.result_type(leaf)
    return str(dtype), list(np.shape(leaf))


def _describe(leaf: Any) -> dict[str, Any]:
    """What the manifest says of a leaf, its checksums aside. A key's dtype and shape are the key's, not its bits'."""
    dtype, shape = _dtype_and_shape(leaf)
    return {"dtype": dtype, "shape": shape} | ({"key": str(jax.random.key_impl(leaf))} if is_key(leaf) else {})


def _storable(leaf: Any) -> jax.Array | np.ndarray:
    """The array that Orbax writes for a leaf."""
    if is_key(leaf):
        leaf = jax.random.key_data(leaf)
    return leaf if isinstance(leaf, jax.Array) else np.asarray(leaf, _dtype_and_shape(leaf)[0])


def _crc32(path: Path) -> int:
    checksum = 0
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            checksum = zlib.crc32(block, checksum)
    return checksum


def _place(array: jax.Array | np.ndarray, key: str | None, like: Any) -> jax.Array | np.ndarray:
    """`array` as a leaf like `like`: a PRNG key where `key` names its kind, on the template's devices."""
    if isinstance(like, np.ndarray | np.generic):
        return array
    leaf = array if key is None else jax.random.wrap_key_data(jnp.asarray(array), impl=key)
    if isinstance(array, jax.Array):  # Orbax has put it where it belongs
        return leaf
    # An uncommitted array stays one: committed to a device, it could not meet a batch that is spread over several.
    return jax.device_put(leaf, getattr(like, "sharding", None) if getattr(like, "committed", True) else None)


def _json_crc32(manifest: dict) -> int:
    return zlib.crc32(json.dumps(manifest).encode())


def _write_manifest(path: Path, manifest: dict) -> None:
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(manifest | {"crc32": _json_crc32(manifest)}))
    os.replace(temporary, path)


def _quieten_orbax() -> None:
    """Keeps Orbax's tracebacks off the terminal: what matters in them is raised, and said in a sentence, here."""
    logging.getLogger("absl").addFilter(_not_of_orbax)
    if sys.unraisablehook is not _unraisable:
        global _next_hook
        _next_hook, sys.unraisablehook = sys.unraisablehook, _unraisable


def _not_of_orbax(record: logging.LogRecord) -> bool:
    return "orbax" not in record.pathname or logging.getLogger("absl").isEnabledFor(logging.INFO)


_next_hook = sys.__unraisablehook__


def _unraisable(unraisable: Any) -> None:
    # Where several writes fail (disk full), Orbax closes its event loop after the first; TensorStore still calls it.
    if unraisable.object is not None or str(unraisable.exc_value) != "Event loop is closed":
        _next_hook(unraisable)
