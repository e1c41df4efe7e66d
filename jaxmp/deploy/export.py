"""`export`: a run as a folder that predicts without jaxmp; `load` reads it back."""

from __future__ import annotations

import datetime
import hashlib
import inspect
import json
import os
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

import jaxmp.deploy.predict as shipped
from jaxmp.data.dataset import Split
from jaxmp.data.pipeline import evaluation_batches
from jaxmp.data.source import Rows, Source
from jaxmp.deploy import onnx
from jaxmp.deploy.certificate import Deviation
from jaxmp.deploy.decisions import compared, decisions, targets_of
from jaxmp.deploy.forward import Forward, class_names, decoder, forward
from jaxmp.deploy.onnx_graph import interface_dtype
from jaxmp.deploy.predict import Artefact, ArtefactError
from jaxmp.errors import InputError, install, local_path, nearest
from jaxmp.jaxprs import tracing
from jaxmp.models.pretrained import write_safetensors
from jaxmp.modules.linen import explain
from jaxmp.precision.policy_tree import PolicyTree
from jaxmp.runs.folder import how_to_blame
from jaxmp.runs.provenance import processor, provenance
from jaxmp.runs.run import Run
from jaxmp.runs.trainer import Trainer
from jaxmp.text_table import without_nan
from jaxmp.training.state import TrainState

FORMATS = ("stablehlo", "onnx")
WEIGHTS = ("best", "last", "ema")
PLATFORMS = ("cpu", "cuda", "rocm", "tpu")

PROMISED = datetime.timedelta(days=180)
"""how long later versions of JAX promise to load what this one exports: six months,
https://docs.jax.dev/en/latest/export/export.html#compatibility-guarantees"""

ROWS = 10_000
"""the most rows that a certificate is measured on, unless told otherwise"""


def export(
    run: Run | str | Path,
    *,
    output: str | Path,
    weights: Literal["best", "last", "ema"] = "best",
    precision: str | None = None,
    platforms: Sequence[str] = ("cpu",),
    format: Literal["stablehlo", "onnx"] = "stablehlo",
    split: Split | None = None,
    rows: int = ROWS,
    decode: bool = False,
) -> Artefact:
    """Writes a run's model as a folder that predicts without jaxmp, and returns it, read back.

    The program takes raw rows, any number of them: their preparation is inside. The folder has the program, the
    weights, manifest.json, certificate.json, and predict.py, which loads it. It appears when it is whole.

    Args:
      run: the run, or its folder.
      output: the folder to write; one that is there has to be empty.
      weights: of the best checkpoint by the monitored metric, or the last one, averaged where the run averages; or the
        last average, an error where the run keeps none.
      precision: policy to compute under; by default the run's own.
      platforms: a program is made for each of these: cpu, cuda, rocm, tpu; this machine's has to be among them, which
        measures the certificate. Of ONNX, cpu alone.
      format: "stablehlo", or "onnx", which needs the extra `onnx`.
      split: rows that the certificate is measured on; by default test, else validation, else train.
      rows: the most rows that it is measured on, spread evenly over the split.
      decode: export one step of decoding with a cache instead, of a decoder such as GPT2.

    Raises:
      InputError: the run has failed or has no such weights, the folder is not empty or cannot be written, the format's
        packages are missing, the model cannot be exported, or one of its outputs has no leading axis of rows.

    See `jaxmp.load`.
    """
    run = run if isinstance(run, Run) else Run(run)
    folder = local_path("output", output)
    check(run, folder, weights, platforms, format)
    measured = Measured.of_run(run, split, rows)
    state = chosen_state(run, weights)
    if decode:
        of = decoder(run, state, precision=precision)
    else:
        of = forward(run, state, measured.source, precision=precision)
    tree = run.experiment.policy if precision is None else PolicyTree.parse(precision)
    how = {"weights": weights, "step": int(state.step)}
    write_folder(run, state, of, folder, measured, tree=tree, how=how, platforms=platforms, format=format)
    return load(folder)


class Measured(NamedTuple):
    """The rows that a certificate is measured on."""

    split: Split
    source: Source
    """rows of the split, at most the number that was asked for, spread evenly"""
    of: int
    """rows that the split has"""

    @classmethod
    def of_run(cls, run: Run, split: Split | None, most: int) -> Measured:
        """The rows of a split; by default of one that was not trained on, where there is one."""
        check_rows(run.trainer, split, most)
        splits: tuple[Split, ...] = ("test", "validation", "train")
        chosen = next(each for each in splits if each in run.trainer.splits) if split is None else split
        source = run.source(chosen)
        count = len(source)
        if most < count:
            source = Rows(source, np.arange(most, dtype=np.int64) * count // most)
        return cls(chosen, source, count)


def check_rows(trainer: Trainer, split: Split | None, most: int) -> None:
    """Raises InputError if the data have no such split, or the most rows are fewer than 1."""
    if most < 1:
        raise InputError(f"rows {most}: expected 1 or more")
    if split is not None:
        trainer.source(split)


def write_folder(
    run: Run,
    state: TrainState,
    of: Forward,
    folder: Path,
    measured: Measured,
    *,
    tree: PolicyTree,
    how: Mapping[str, Any],
    platforms: Sequence[str] = ("cpu",),
    format: str = "stablehlo",
    files: Mapping[str, bytes] | None = None,
) -> None:
    """Writes an artefact, which appears when it is whole, and measures its certificate.

    Args:
      run: the run that it is of.
      state: the state whose weights it has.
      of: what is exported.
      folder: the folder to write, new or empty.
      measured: rows of the certificate.
      tree: the policy that it computes under.
      how: what the manifest says of its weights.
      platforms: the platforms to make programs for.
      format: "stablehlo" or "onnx".
      files: the program by the name of its file; by default what `of` is in the format.
    """
    explained = explain(run.experiment.adapted_model, tree, tuple(run.trainer.inputs))
    if files is None:
        files = onnx.files(of) if format == "onnx" else _programs(of, platforms)
    manifest: dict[str, Any] = {
        "artefact": shipped.VERSION,
        "format": format,
        "name": run.config["name"],
        "run": {name: run.config[name] for name in ("hash", "seed")} | dict(how),
        "experiment": run.config["experiment"],
        "precision": str(tree),
        "policy": [row._asdict() for row in explained],
        "inputs": {name: _layout(spec, format) for name, spec in of.inputs.items()},
        "outputs": {name: _layout(spec, format) for name, spec in of.outputs.items()},
        "structure": of.structure(),
        "state": {name: _layout(spec, format) for name, spec in of.state.items()},
        "context": of.context,
        "classes": class_names(run.experiment.data, getattr(run.experiment.task, "target", None)),
        "versions": provenance(patch=False)["versions"],
        "jax": {"version": jax.__version__},
        "programs": {platform: f"program.{platform}.stablehlo" for platform in platforms} if format != "onnx" else {},
        "weights": list(of.weights) if format != "onnx" else [],
        "exported": datetime.date.today().isoformat(),
        "expires": None if format == "onnx" else (datetime.date.today() + PROMISED).isoformat(),
    }
    target = _target(folder)
    draft = _draft(target)
    try:
        for name, content in files.items():
            _write(draft / name, content)
        if format != "onnx":
            write_safetensors(draft / "weights.safetensors", of.weights)
        contents = {path.name: path.read_bytes() for path in draft.iterdir()}
        artefact = assemble(manifest, contents, str(folder))
        _write(draft / "certificate.json", _json(_certificate(artefact, of, run, state, measured)))
        _write(draft / "predict.py", inspect.getsource(shipped).encode())
        digests = {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(draft.iterdir())}
        text = _json({**manifest, "sha256": digests})
        _write(draft / shipped.MANIFEST, text)
        _write(draft / shipped.DIGEST, f"{hashlib.sha256(text).hexdigest()}  {shipped.MANIFEST}\n".encode())
        draft.chmod(0o755)  # a temporary folder is its owner's alone
        try:
            draft.rename(target)
        except OSError as error:
            raise InputError(f"output {str(folder)!r}: {error.strerror}; expected a new or empty folder") from None
    finally:
        shutil.rmtree(draft, ignore_errors=True)


def load(folder: str | Path, *, accept_expired: bool = False) -> Artefact:
    """An exported model as a function of NumPy arrays: `load("folder")(image=images)`. Each file is checked first.

    Args:
      folder: the folder that `export` wrote.
      accept_expired: whether to load it after the date until which JAX promises to.

    Raises: InputError if the folder is incomplete, damaged, of another version, expired, for other platforms or by a
      later JAX; or a package that it needs is missing.
    """
    try:
        return shipped.load(local_path("artefact", folder), accept_expired=accept_expired)
    except ArtefactError as error:
        raise InputError(str(error)) from None


def assemble(manifest: dict[str, Any], files: Mapping[str, bytes], name: str) -> Artefact:
    """The model of files in memory. Raises InputError if this process cannot run it."""
    try:
        return shipped.assemble(manifest, files, name)
    except ArtefactError as error:
        raise InputError(str(error)) from None


def check(
    run: Run,
    folder: Path,
    weights: str,
    platforms: Sequence[str],
    format: str = "stablehlo",
    *,
    option: str = "weights",
) -> None:
    """Refuses what can be known to be wrong before anything is traced. `option` names `weights` in messages."""
    for name, value, known in ((option, weights, WEIGHTS), ("format", format, FORMATS)):
        if value not in known:
            raise InputError(f"{name} {value!r}: expected {', '.join(known)}{nearest(str(value), known)}")
    for platform in platforms:
        if platform not in PLATFORMS:
            raise InputError(
                f"platforms {platform!r}: expected {', '.join(PLATFORMS)}{nearest(str(platform), PLATFORMS)}"
            )
    if not platforms:
        raise InputError(f"platforms: expected at least one of {', '.join(PLATFORMS)}")
    if format == "onnx":
        onnx.require_packages()
        if list(platforms) != ["cpu"]:
            raise InputError(f"platforms {' '.join(platforms)}: an ONNX file has one program for all; expected none")
    else:
        _require_flatbuffers()
        if (here := shipped.platform()) not in platforms:
            raise InputError(
                f"platforms {' '.join(platforms)}: the certificate is measured here, on {here}; expected --platforms "
                f"{' '.join(platforms)} {here}, or JAX_PLATFORMS={platforms[0]}"
            )
    if run.failure:
        how = how_to_blame(run.path, run.config)
        why = f"; `{how}` tells why" if how else ""
        raise InputError(f"{run.path} failed ({run.failure}), and a failed run is not exported{why}")
    if folder.exists() and not folder.is_dir():
        raise InputError(f"output {str(folder)!r}: a file of that name is there; expected a new or empty folder")
    if folder.is_dir() and (there := sorted(path.name for path in folder.iterdir())):
        raise InputError(
            f"output {str(folder)!r}: not empty, it has {', '.join(there[:3])}; expected a new or empty folder"
        )
    if folder.is_dir() and (folder.samefile(os.curdir) or os.path.ismount(folder)):
        what = "the current folder" if folder.samefile(os.curdir) else "a mount point"
        raise InputError(f"output {str(folder)!r}: {what} cannot be replaced; expected a new folder in it")
    if not (parent := _target(folder).parent).is_dir():
        named = parent if folder.is_symlink() else folder.parent
        raise InputError(f"output {str(folder)!r}: there is no folder {str(named)!r}")


def _target(folder: Path) -> Path:
    """Where a folder is, behind symbolic links. Raises InputError if they make a loop."""
    try:
        target = folder.resolve()
    except (OSError, RuntimeError):  # Python 3.13 returns the link
        target = folder
    if target.is_symlink():
        raise InputError(f"output {str(folder)!r}: a loop of symbolic links; expected a new or empty folder")
    return target


def _require_flatbuffers() -> None:
    try:
        import flatbuffers  # noqa: F401
    except ImportError:
        raise InputError(f"exporting needs flatbuffers: {install('export')}") from None


def chosen_state(run: Run, weights: str, *, option: str = "weights") -> TrainState:
    """The state whose averaged weights are meant. Raises InputError, which names `option`, if there is none."""
    state = run.state("best" if weights == "best" else "last")
    if weights == "ema" and state.ema is None:
        raise InputError(
            f"{option} ema: {run.path} keeps no average of its weights (loop.ema_decay is not set); expected best or "
            "last"
        )
    return state


def _programs(of: Forward, platforms: Sequence[str]) -> dict[str, bytes]:
    """A serialised program for each platform, by the name of its file."""
    from jax import export as jax_export

    found = {}
    for platform in platforms:
        with tracing(f"export for {platform}: the model cannot be exported", "one whose operations JAX exports"):
            exported = jax_export.export(jax.jit(of.function), platforms=[platform])(*of.arguments())
            found[f"program.{platform}.stablehlo"] = bytes(exported.serialize())
    return found


def _draft(folder: Path) -> Path:
    """A new hidden folder beside `folder`, in which it is written."""
    try:
        return Path(tempfile.mkdtemp(prefix=f".{folder.name}.", suffix=".partial", dir=folder.absolute().parent))
    except OSError as error:
        raise InputError(f"output {str(folder)!r}: {error.strerror}; choose another folder") from None


def _write(path: Path, content: bytes) -> None:
    """Writes a file to the disk. Raises InputError if it is full, say."""
    try:
        with path.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        raise InputError(
            f"{path.parent.parent}: {path.name}, {len(content):,} bytes, is not written: {error.strerror}; make room "
            "there, or choose another --output"
        ) from None


def _json(value: Any) -> bytes:
    return (json.dumps(without_nan(value), indent=2, allow_nan=False) + "\n").encode()


def _layout(spec: Any, format: str) -> dict[str, Any]:
    """Shape and dtype as JSON; a dimension that is not known is its name."""
    shape = [size if isinstance(size, int) else str(size) for size in spec.shape]
    dtype = interface_dtype(spec.dtype) if format == "onnx" else np.dtype(spec.dtype)
    return {"shape": shape, "dtype": dtype.name}


def _certificate(artefact: Artefact, of: Forward, run: Run, state: TrainState, measured: Measured) -> dict[str, Any]:
    """Runs the exported program on rows of a split, and compares it with the model in float32 and with the run."""
    task, data, source, decode = run.experiment.task, run.experiment.data, measured.source, bool(of.state)
    in_float32 = forward(run, state, source, precision="float32")
    program, weights = jax.jit(in_float32.function), list(in_float32.weights.values())
    found, targets = {"float32": Deviation(), "run": Deviation()}, targets_of(run.experiment)
    for batch in evaluation_batches(source, data.eval_batch_size):
        there = int(np.sum(batch["weight"]))
        batch = {name: np.asarray(jnp.asarray(column)) for name, column in batch.items()}  # in JAX's dtypes
        inputs = {name: batch[name] for name in of.inputs}
        outputs = _decoded(artefact, **inputs) if decode else artefact.leaves(artefact(**inputs))
        right = program(weights, [], [batch[name] for name in in_float32.inputs])
        own = jax.tree.leaves(run.outputs(batch, state))
        decided = decisions(task, of.unflatten([jnp.asarray(leaf) for leaf in outputs.values()]))
        for name, reference in (("float32", right), ("run", own)):
            arrays = dict(zip(outputs, (np.asarray(leaf) for leaf in reference), strict=True))
            others = decisions(task, of.unflatten(list(reference)))
            both = None
            if decided is not None and others is not None:
                both = decided, others, compared(task, targets(batch), decided, others)
            found[name].add(outputs, arrays, both, there)
    return {
        "split": measured.split,
        "rows": len(source),
        "of": measured.of,
        "measured": {
            "by": artefact.manifest["format"],
            **_measured_on(artefact),
            "decoded": "token by token" if decode else None,
        },
        "against": {name: deviation.to_json() for name, deviation in found.items()},
    }


def _measured_on(artefact: Artefact) -> dict[str, Any]:
    """What ran the exported program: JAX's device; of ONNX, the execution providers of ONNX Runtime and the CPU."""
    if artefact.manifest["format"] == "onnx":
        return {"providers": list(artefact.providers), "device": processor()}
    device = jax.devices()[0]
    return {"platform": device.platform, "device": device.device_kind}


def _decoded(artefact: Artefact, **inputs: np.ndarray) -> dict[str, np.ndarray]:
    """The outputs for whole rows of tokens, decoded one token after the other."""
    ((name, tokens),) = inputs.items()
    state, parts = artefact.start(len(tokens)), []
    for at in range(tokens.shape[1]):
        outputs, state = artefact.step(state, **{name: tokens[:, at : at + 1]})
        parts.append(artefact.leaves(outputs))
    return {output: np.concatenate([part[output] for part in parts], axis=1) for output in parts[0]}


def lines(artefact: Artefact, folder: str | Path) -> list[tuple[str, str]]:
    """What was exported and its certificate in words: a name and a text for each line."""
    certificate, manifest = artefact.certificate, artefact.manifest
    sizes = {path.name: path.stat().st_size for path in local_path("artefact", folder).iterdir()}
    lines = [
        ("inputs", ", ".join(f"{name} {shipped.layout(spec)}" for name, spec in manifest["inputs"].items())),
        ("outputs", ", ".join(f"{name} {shipped.layout(spec)}" for name, spec in manifest["outputs"].items())),
        ("precision", manifest["precision"]),
        ("weights", f"{manifest['run']['weights']}, step {manifest['run']['step']:,}"),
        ("files", ", ".join(f"{name} {size:,} bytes" for name, size in sorted(sizes.items()))),
    ]
    if manifest["expires"]:
        lines.append(("loads", f"in jax {manifest['jax']['version']} and later, until {manifest['expires']}"))
    lines.append(("certificate", f"{certificate['rows']:,} of {certificate['of']:,} rows, {certificate['split']}"))
    for name, found in certificate["against"].items():
        parts = []
        if found["bit_equal"]:
            parts.append("equal to the bit")
        else:
            for output, of in found["outputs"].items():
                parts.append(
                    f"{output}: largest error {of['largest_ulp']:.3g} ulp of {of['ulp_of']}, median "
                    f"{of['median_ulp']:.3g}, relative {of['largest_relative']:.1e}"
                )
            for output, of in found.get("whole_numbers", {}).items():
                parts.append(f"{output}: {of['differing']:,} of {of['compared']:,} whole numbers differ")
        if found["nonfinite"]:
            parts.append(f"{found['nonfinite']:,} outputs differ and are not finite")
        if "decisions" in found:
            parts.append(f"decisions {found['decisions']['agree']:,} of {found['decisions']['compared']:,} equal")
        if "kl" in found and not found["bit_equal"]:
            mean, most = ("infinite" if kl is None else f"{kl:.1e}" for kl in map(found["kl"].get, ("mean", "largest")))
            parts.append(f"KL {mean}, at most {most}")
        lines.append((f"against {name}", "; ".join(parts)))
    return lines
