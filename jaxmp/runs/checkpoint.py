"""`Checkpoints`: saves everything that a run needs to be resumed, in the background, and restores it.

    checkpoints/<step>/arrays/        the leaves, written by Orbax: a flat mapping from path to array
    checkpoints/<step>/manifest.json  step, metrics; dtype and shape of each leaf; CRC-32 of each file
    checkpoints/<step>.partial        a checkpoint that is being written
    checkpoints/<step>.deleted        a checkpoint that is being deleted
    checkpoints/<step>.corrupt        a damaged checkpoint; renamed, never deleted

A folder is named by its step alone only while it is complete: it is renamed to this name after its last byte has been
written, and renamed away before its first file is deleted. So even after a `kill -9`, no incomplete folder looks like a
checkpoint.

Orbax only writes the arrays (`AsyncCheckpointer`). This module decides which checkpoints exist, which is the best and
which are deleted, from the files on disk. Orbax's `CheckpointManager` would keep its own list and delete in place,
which fails after a kill or with a damaged file; `orbax.checkpoint.experimental.v1` is not stable yet. Several processes
need a common file system: each writes its own shards, and the first does everything else.
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
import tempfile
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
from jaxmp.training.metrics import is_watched
from jaxmp.trees import is_key, path_name

_MANIFEST = "manifest.json"
_ARRAYS = "arrays"
_ORBAX = threading.Lock()
"""Held from the beginning of a save to its end, and while a checkpoint is read.

Orbax numbers its operations for the whole process: of runs in several threads that save at once, one waits for what the
other writes, and fails with a folder that exists, or with a coroutine that nothing awaits (orbax-checkpoint 0.12).
"""


class _Corrupt(Exception):
    """A checkpoint is damaged; the text says how."""


class Checkpoints:
    """The checkpoints of one run: keeps the newest `keep` and the best.

    Nothing is created before the first `save`, so that reading a run does not change it. Only one program at a time may
    save.

    Args:
      folder: folder that contains one folder per checkpoint.
      keep: number of newest checkpoints to keep, at least 1.
      best_of: metric whose best checkpoint is also kept; None keeps only the newest.
      mode: "max" if larger values of that metric are better, "min" if smaller ones are. The earlier step wins a tie;
        NaN is never best.

    Raises:
      InputError: `keep` or `mode` is not valid.
    """

    def __init__(self, folder: Path, *, keep: int = 2, best_of: str | None = None, mode: Literal["max", "min"] = "max"):
        if keep < 1:
            raise InputError(f"keep={keep}: at least 1 checkpoint must be kept")
        if mode not in ("max", "min"):
            raise InputError(f"mode={mode!r}: expected 'max' or 'min'")
        self.folder = Path(folder).absolute()
        self.keep = keep
        self.best_of = best_of
        self.mode = mode
        self._made: Any = None  # see `_orbax`
        self._link: tempfile.TemporaryDirectory[str] | None = None  # see `_arrays`
        self._writing: threading.Thread | None = None
        self._saved: int | None = None  # the step last handed to `save`
        self._failure: tuple[int, Exception] | None = None
        self._corrupt: set[int] = set()  # found by `restore`, to be moved aside by the next `save`

    def save(self, step: int, tree: Any, metrics: dict[str, float] | None = None) -> None:
        """Saves `tree` in the background; returns as soon as its buffers may be donated.

        Waits first for an earlier save to finish. If there is already a checkpoint of this step, only adds `metrics` to
        it, unless it has some.

        Args:
          step: number of the step; names the checkpoint.
          tree: any pytree of arrays (any dtype, including PRNG keys) and scalars.
          metrics: metrics of this state, by name, to choose the best checkpoint by.

        Raises:
          InputError: this save or the one before could not be written (disk full, folder not writable). Older
            checkpoints are intact.
        """
        if not processes.is_first():
            self.wait()
        metrics = {name: float(value) for name, value in (metrics or {}).items()}
        named = named_leaves(tree)
        leaves = {path: _describe(leaf) for path, leaf in named.items()}
        partial = self._path(step, "partial")
        try:
            if not processes.from_first(lambda: self._begin(step, metrics)):
                return
            arrays = {path: _storable(leaf) for path, leaf in named.items()}
            arrays = {path: array for path, array in arrays.items() if array.size}  # Orbax refuses the empty ones
            # No copy is necessary. On a GPU, Orbax fetches the arrays before it returns. On a CPU, it holds views of
            # JAX's buffers, and JAX does not reuse the memory of a donated buffer while a view of it exists.
            manifest = {"step": step, "metrics": metrics, "leaves": leaves}
            writing = threading.Thread(target=self._finish, args=(manifest,), name="checkpoint", daemon=True)
            _ORBAX.acquire()  # `_finish` releases it
            try:
                self._orbax().save(self._arrays(partial), args=_ocp().args.PyTreeSave(arrays))
                self._saved = step
                writing.start()
            except BaseException:
                if writing.ident is None:  # it was not started
                    self._saved = None
                    _ORBAX.release()
                raise
        except OSError as error:
            raise self._not_written(step, error) from error
        self._writing = writing

    def restore(
        self, template: Any, *, step: int | None = None, warn: Callable[[str], None] = warnings.warn
    ) -> tuple[int, Any] | None:
        """Restores the newest checkpoint, or that of `step`.

        Leaves are restored to the bit, strongly typed, and with the sharding of the template; where the template has a
        numpy array, so does the result. If the newest checkpoint is damaged, the one before is used.

        Args:
          template: a pytree like the saved one, of arrays or `jax.ShapeDtypeStruct`s.
          step: the checkpoint to restore; None for the newest. With a step, no other checkpoint is used.
          warn: called with a message for each damaged checkpoint that is passed over.

        Returns:
          (step, tree); None if there is no checkpoint.

        Raises:
          InputError: paths, shapes or dtypes differ from the template (all differences are listed, and nothing is
            read); all checkpoints are damaged; or there is no checkpoint of `step`.
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

    def leaves(self, step: int) -> dict[str, str]:
        """Returns dtype and shape of each saved leaf, by path: {"state/step": "int32[]"}.

        Reads the manifest alone. Raises InputError if there is no checkpoint of `step`, or its manifest is damaged.
        """
        return {path: f"{leaf['dtype']}{leaf['shape']}" for path, leaf in self._described(step)["leaves"].items()}

    def metrics(self, step: int) -> dict[str, float]:
        """Returns the metrics that were saved with a state. Raises InputError as `leaves` does."""
        return dict(self._described(step)["metrics"])

    def read_leaves(self, step: int, like: dict[str, Any]) -> dict[str, Any]:
        """Restores some leaves of a checkpoint: those that `like` has, by path, each on the devices of its value there.

        Raises InputError if there is no checkpoint of `step`, or it is damaged.
        """
        manifest = self._described(step)
        try:
            self._verify(step, manifest)
            return self._read_leaves(step, manifest, like)
        except _Corrupt as why:
            raise InputError(f"checkpoint {self.folder / str(step)} is damaged ({why})") from why

    def _described(self, step: int) -> dict:
        """The manifest of a checkpoint."""
        if step not in self.steps():
            raise InputError(f"no checkpoint of step {step} in {self.folder}; there are {self.steps() or 'none'}")
        try:
            return self._manifest(step)
        except _Corrupt as why:
            raise InputError(f"checkpoint {self.folder / str(step)} is damaged ({why})") from why

    def steps(self) -> list[int]:
        """Returns the steps of all checkpoints on disk, ascending, without one that is still being written."""
        if not self.folder.is_dir():
            return []
        return sorted(int(path.name) for path in self.folder.iterdir() if path.name.isdecimal())

    def best_step(self) -> int | None:
        """Returns the step whose `best_of` metric is best; None if no checkpoint has that metric."""
        return self._best({step: manifest["metrics"] for step, manifest in self._manifests().items()})

    def wait(self) -> None:
        """Waits until all saves are written and old checkpoints deleted. Raises InputError if writing failed."""
        if self._writing is not None:
            self._writing.join()
            self._writing = None
        if self._failure is not None:
            (step, error), self._failure = self._failure, None
            raise self._not_written(step, error) from error

    def close(self) -> None:
        """Calls `wait`, and ends Orbax's threads."""
        try:
            self.wait()
        finally:
            if self._made is not None:
                with _ORBAX:
                    self._made.close()
            if self._link is not None:
                self._link.cleanup()
                self._link = None

    def _orbax(self) -> Any:
        """Orbax's checkpointer, made when it is first asked to save or to read."""
        if self._made is None:
            ocp = _ocp()
            _quieten_orbax()  # after the import, which makes the logger
            self._made = ocp.AsyncCheckpointer(ocp.PyTreeCheckpointHandler())
            _wait_before_exit(self)
        return self._made

    # Writing.

    def _begin(self, step: int, metrics: dict[str, float]) -> bool:
        """Creates the folder of a checkpoint. If that step is already saved, adds `metrics` to it and returns False."""
        self.wait()
        self._tidy()
        if step == self._saved or (self.folder / str(step)).exists():
            self._add_metrics(step, metrics)
            return False
        self._path(step, "partial").mkdir()
        return True

    def _finish(self, manifest: dict) -> None:
        """Writes the manifest, renames the folder to its final name and deletes old checkpoints; runs in a thread."""
        step = manifest["step"]
        partial = self._path(step, "partial")
        try:
            try:
                self._made.wait_until_finished()  # in the first process, waits for all processes
            finally:
                _ORBAX.release()
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
        manifests = self._manifests()  # damaged ones are neither counted nor deleted
        best = self._best({step: manifest["metrics"] for step, manifest in manifests.items()})
        for step in sorted(manifests)[: -self.keep]:
            if step != best:
                doomed = self._path(step, "deleted")
                os.rename(self.folder / str(step), doomed)
                shutil.rmtree(doomed, ignore_errors=True)

    def _tidy(self) -> None:
        """Deletes what a killed process left half-written or half-deleted, and renames damaged checkpoints."""
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
            f"Intact checkpoints: {self.steps() or 'none'}. Make room or choose another folder, and run the same "
            "command again"
        )

    def _arrays(self, checkpoint: Path) -> Path:
        """The folder of a checkpoint's arrays, by a path that Orbax can read again.

        Orbax takes `[` and `\\` in a path for a pattern of names, finds nothing, and the checkpoint seems damaged.
        There it is given the path of a link.
        """
        if not set("[]\\") & set(str(self.folder)):
            return checkpoint / _ARRAYS
        if processes.several():  # each would have another link, and all have to name one folder
            raise InputError(f"{self.folder}: several processes cannot write where a path has one of []\\ in it")
        if self._link is None:
            self._link = tempfile.TemporaryDirectory(prefix="jaxmp-")
            Path(self._link.name, "checkpoints").symlink_to(self.folder)
        return Path(self._link.name, "checkpoints") / checkpoint.name / _ARRAYS

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
        """Checks a checkpoint. Returns (manifest, None) if it is intact, or (None, what is wrong)."""
        try:
            manifest = self._manifest(step)
            self._compare(step, manifest, template)
            self._verify(step, manifest)
        except _Corrupt as why:
            return None, str(why)
        return manifest, None

    def _compare(self, step: int, manifest: dict, template: Any) -> None:
        """Raises InputError if leaves differ from the template; Orbax would silently cast to its dtypes (B19)."""
        saved = {path: f"{leaf['dtype']}{leaf['shape']}" for path, leaf in manifest["leaves"].items()}
        expected = {path: "{}{}".format(*_dtype_and_shape(leaf)) for path, leaf in named_leaves(template).items()}
        wrong = [
            f"  {path}: saved {saved.get(path, 'nothing')}, expected {expected.get(path, 'nothing')}"
            for path in dict.fromkeys([*expected, *saved])
            if saved.get(path) != expected.get(path) and not _is_of_watched(path)
        ]
        if wrong:
            raise InputError(
                f"checkpoint {self.folder / str(step)} is of another model, optimizer or precision:\n"
                + "\n".join(wrong)
            )

    def _read(self, step: int, manifest: dict, template: Any) -> Any:
        restored = self._read_leaves(step, manifest, named_leaves(template))
        return jax.tree.unflatten(jax.tree.structure(template), list(restored.values()))

    def _read_leaves(self, step: int, manifest: dict, wanted: dict[str, Any]) -> dict[str, Any]:
        orbax, leaves = self._orbax(), manifest["leaves"]  # if Orbax cannot be imported, no checkpoint is to blame
        how = {path: self._restore_args(wanted.get(path)) for path, leaf in leaves.items() if math.prod(leaf["shape"])}
        try:
            with _ORBAX:
                arrays = orbax.restore(
                    self._arrays(self.folder / str(step)), args=_ocp().args.PyTreeRestore(dict.fromkeys(how, 0), how)
                )
        except Exception as error:  # Orbax, TensorStore and Zstandard each raise their own
            if processes.several():  # others may have read it, and would not use the one before
                raise InputError(f"checkpoint {self.folder / str(step)} cannot be read: {_reason(error)}") from error
            raise _Corrupt(_reason(error)) from error
        restored = {}
        for path, like in wanted.items():
            if path not in leaves:  # a metric that is watched since
                restored[path] = like
                continue
            leaf = leaves[path]
            array = arrays[path] if path in arrays else np.zeros(leaf["shape"], leaf["dtype"])
            restored[path] = _place(array, leaf.get("key"), like)
        return restored

    def _verify(self, step: int, manifest: dict) -> None:
        """Compares all files with their checksums, since Orbax may not notice that a file is damaged."""
        for name, checksum in manifest["files"].items():
            try:
                if _crc32(self.folder / str(step) / name) != checksum:
                    raise _Corrupt(f"{name} does not match its checksum")
            except OSError as error:
                raise _Corrupt(f"{name}: {error.strerror}") from error

    def _restore_args(self, like: Any) -> Any:
        """Restores to host memory, so that uncommitted arrays stay so; across processes, directly to devices."""
        sharding = getattr(like, "sharding", None)
        if sharding is None or sharding.is_fully_addressable:
            return _ocp().RestoreArgs(restore_type=np.ndarray)
        return _ocp().ArrayRestoreArgs(restore_type=jax.Array, sharding=sharding)


def _ocp() -> Any:
    """Orbax. Not imported at the top: `jaxmp --help` and the first step would wait for it."""
    import orbax.checkpoint

    return orbax.checkpoint


def _wait_before_exit(checkpoints: Checkpoints) -> None:
    """Waits at exit for a save that the program did not wait for, and prints a message if it could not be finished.

    `atexit` would be too late: by then Python has shut down the executors with which Orbax writes, and Orbax's threads
    fail with a traceback or wait for ever. This uses the hook of concurrent.futures, which runs later registrations
    first. From Python 3.12 on, no thread can be started by then, and the save is lost if Orbax still needs a new one.
    """
    reference = weakref.ref(checkpoints)

    def wait() -> None:
        unfinished = reference()
        if unfinished is not None and unfinished._writing is not None:
            unfinished._writing.join(timeout=60)
            if unfinished._failure is not None or unfinished._writing.is_alive():
                print("the last checkpoint was not written: the program ended without close()", file=sys.stderr)
                _let_go_of_orbax()

    threading._register_atexit(wait)  # type: ignore[attr-defined]


def _let_go_of_orbax() -> None:
    """Keeps Python 3.12 from waiting at exit for Orbax's threads, which wait minutes for one that could not start."""
    locks = getattr(threading, "_shutdown_locks", None)
    for thread in threading.enumerate():
        if locks is not None and type(thread).__module__.startswith("orbax."):
            locks.discard(thread._tstate_lock)  # type: ignore[attr-defined]


def _reason(error: Exception) -> str:
    """Returns the reason of the operating system, which TensorStore hides in a long text, or else the first line."""
    for code in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EIO):
        if os.strerror(code) in str(error):
            return os.strerror(code)
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]


def _is_of_watched(path: str) -> bool:
    """Whether a leaf is of a metric that one session of a run may watch, and another not."""
    return path.startswith("metrics/") and is_watched(path.removeprefix("metrics/").rpartition("/")[0])


def named_leaves(tree: Any) -> dict[str, Any]:
    """Returns the leaves by path, such as `params/Dense_0/kernel` or `opt_state/0/mu`, in the order of the tree."""
    flat = jax.tree_util.tree_leaves_with_path(tree)
    leaves = {path_name(path) or "value": leaf for path, leaf in flat}
    if len(leaves) != len(flat):
        raise InputError("the tree has two leaves with the same path, so they cannot be told apart in a checkpoint")
    return leaves


def describe(leaf: Any) -> str:
    """Dtype and shape of a leaf, as `Checkpoints.leaves` returns them: "float32[3, 4]"."""
    return "{}{}".format(*_dtype_and_shape(leaf))


def _dtype_and_shape(leaf: Any) -> tuple[str, list[int]]:
    dtype = leaf.dtype if hasattr(leaf, "dtype") else jax.dtypes.result_type(leaf)
    return str(dtype), list(np.shape(leaf))


def _describe(leaf: Any) -> dict[str, Any]:
    """Returns the manifest entry of a leaf. For a PRNG key, dtype and shape are those of the key, not of its bits."""
    dtype, shape = _dtype_and_shape(leaf)
    return {"dtype": dtype, "shape": shape} | ({"key": str(jax.random.key_impl(leaf))} if is_key(leaf) else {})


def _storable(leaf: Any) -> jax.Array | np.ndarray:
    """Converts a leaf to the array that Orbax writes."""
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
    """Converts a restored array to a leaf like `like`, on its devices. `key` names the kind of a PRNG key."""
    if isinstance(like, np.ndarray | np.generic):
        return array
    leaf = array if key is None else jax.random.wrap_key_data(jnp.asarray(array), impl=key)
    if isinstance(array, jax.Array):  # Orbax has already placed it
        return leaf
    # An uncommitted array stays uncommitted: a committed one could not be combined with a batch on several devices.
    return jax.device_put(leaf, getattr(like, "sharding", None) if getattr(like, "committed", True) else None)


def _json_crc32(manifest: dict) -> int:
    return zlib.crc32(json.dumps(manifest).encode())


def _write_manifest(path: Path, manifest: dict) -> None:
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(manifest | {"crc32": _json_crc32(manifest)}))
    os.replace(temporary, path)


def _quieten_orbax() -> None:
    """Hides Orbax's tracebacks: this module raises its own errors, with one sentence each."""
    logging.getLogger("absl").addFilter(_not_of_orbax)
    if sys.unraisablehook is not _unraisable:
        global _next_hook
        _next_hook, sys.unraisablehook = sys.unraisablehook, _unraisable


def _not_of_orbax(record: logging.LogRecord) -> bool:
    return "orbax" not in record.pathname or logging.getLogger("absl").isEnabledFor(logging.INFO)


_next_hook = sys.__unraisablehook__


def _unraisable(unraisable: Any) -> None:
    # If several writes fail (disk full), Orbax closes its event loop after the first, but TensorStore still calls it.
    if unraisable.object is not None or str(unraisable.exc_value) != "Event loop is closed":
        _next_hook(unraisable)
