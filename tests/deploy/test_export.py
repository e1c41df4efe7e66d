"""An exported run: the bits of `Run.apply` without jaxmp, a certificate, and a folder that is whole or refused."""

from __future__ import annotations

import dataclasses
import datetime
import errno
import hashlib
import importlib.util
import json
import shutil
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from deployed_runs import ROOT, Both, Sizes, batches_bare, images, predict_bare, trained, with_words

import jaxmp
from jaxmp import Arrays, InputError, Loop
from jaxmp.cli import main
from jaxmp.data.table_files import TableFiles
from jaxmp.data.tables import write_table
from jaxmp.deploy.export import check, lines
from jaxmp.deploy.forward import class_names
from jaxmp.deploy.predict import Artefact
from jaxmp.experiment.config_file import ConfigFile
from jaxmp.models.transformer import GPT2
from jaxmp.precision.policy import PRESETS
from jaxmp.tasks.language import NextToken
from jaxmp.trees import by_path

pytest.importorskip("flatbuffers", reason="exporting needs flatbuffers: pip install 'jaxmp[export]'")

pytestmark = pytest.mark.xdist_group("deploy")  # one worker: the fixture trains

RULES = "Dense_1=float32; @BatchNorm=float32; mixed_float16"


@pytest.fixture(scope="module")
def exported(run, tmp_path_factory):
    folder = tmp_path_factory.mktemp("exported") / "net"
    jaxmp.export(run, output=folder)
    return folder


def assert_same_bits(artefact, run, state, rows):
    """Raw rows give the outputs of `run.apply`, to the bit, whatever their number."""
    for count in (1, 7, 512):
        batch = rows(count)
        found = artefact.leaves(artefact(**{name: batch[name] for name in artefact.inputs}))
        expected = run.apply(batch, state)
        expected = {name or "output": leaf for name, leaf in by_path(expected).items()}
        assert found.keys() == expected.keys()
        for name, output in expected.items():
            assert found[name].dtype == output.dtype
            assert found[name].tobytes() == np.asarray(output).tobytes(), (name, count)


@pytest.mark.slow
def test_an_exported_run_gives_the_bits_of_apply_for_any_number_of_rows(run, exported):
    artefact = jaxmp.load(exported)
    assert artefact.inputs == {"image": {"shape": ["b", 4, 4, 1], "dtype": "uint8"}}
    assert not any(name in artefact.manifest["weights"] for name in ("key_data", "label", "name"))
    assert_same_bits(artefact, run, "best", lambda n: {"image": images(n), "label": np.zeros(n, int)})
    against = artefact.certificate["against"]
    assert against["run"]["bit_equal"] and not against["float32"]["bit_equal"]
    assert 1e-4 < against["float32"]["outputs"]["output"]["largest_relative"] < 0.1


@pytest.mark.parametrize(
    "precision",
    [
        pytest.param(RULES, marks=pytest.mark.slow),
        *(pytest.param(name, marks=pytest.mark.full_size) for name in PRESETS),
    ],
)
def test_every_policy_is_exported_with_its_bits(tmp_path, precision):
    run = trained(tmp_path, precision)
    artefact = jaxmp.export(run, output=tmp_path / "out", weights="last")
    assert_same_bits(artefact, run, "last", lambda n: {"image": images(n), "label": np.zeros(n, int)})
    assert artefact.certificate["against"]["run"]["bit_equal"]
    rows = {row["module"]: row for row in artefact.manifest["policy"]}
    assert rows["Dense_1"]["policy"] == str(run.experiment.policy.lookup("Dense_1"))


@pytest.mark.slow
def test_a_policy_beside_the_run_s_own_computes_as_a_run_under_it(run, tmp_path):
    artefact = jaxmp.export(run, output=tmp_path / "out", precision="float32")
    against = artefact.certificate["against"]
    assert against["float32"]["bit_equal"] and not against["run"]["bit_equal"]
    assert artefact.manifest["precision"] == str(jaxmp.PolicyTree.parse("float32"))


@pytest.mark.slow
def test_two_inputs_and_a_dict_of_outputs(tmp_path):
    data = Arrays(with_words, batch_size=10, eval_batch_size=8)
    run = trained(tmp_path, model=Both(), data=data, task=Sizes())
    artefact = jaxmp.export(run, output=tmp_path / "out")
    assert list(artefact.inputs) == ["image", "words"] and artefact.inputs["words"]["dtype"] == "int32"
    batch = {"image": images(7), "words": np.arange(35).reshape(7, 5) % 7}
    found = artefact(**batch)
    assert found["size"]["parts"][0].shape == (7, 1) and found["size"]["parts"][1].tolist() == [0, 5, 3, 1, 6, 4, 2]
    assert_same_bits(artefact, run, "best", lambda n: {"image": images(n), "words": np.arange(5 * n).reshape(n, 5) % 7})


@pytest.mark.full_size
def test_a_decoder_is_exported_with_its_cache(tmp_path):
    def tokens(split):
        text = np.random.default_rng(0).integers(0, 11, (20, 7)).astype(np.int32)
        return {"tokens": text[:, :-1], "target": text[:, 1:]}

    model = GPT2(vocabulary=11, context=6, layers=2, heads=2, width=8)
    data = Arrays(tokens, batch_size=10, eval_batch_size=8)
    run = trained(tmp_path, model=model, data=data, task=NextToken(inputs=("tokens",), target="target"))
    artefact = jaxmp.export(run, output=tmp_path / "out", decode=True)
    assert {spec["dtype"] for name, spec in artefact.manifest["state"].items() if "keys" in name} == {"bfloat16"}
    # Token by token, from an empty cache: what is computed for the whole row at once, but for rounding.
    against = artefact.certificate["against"]["run"]
    assert against["outputs"]["output"]["largest_relative"] < 2**-6
    batch = tokens("test")["tokens"]
    state = artefact.start(20)
    first, state = artefact.step(state, batch[:, :4])  # a prompt at once
    rest, state = artefact.step(state, tokens=batch[:, 4:])
    whole = np.asarray(run.apply(tokens("test"), "best"))
    assert np.abs(np.concatenate([first, rest], axis=1) - whole).max() < 2**-6 * np.abs(whole).max()
    with pytest.raises(ValueError, match="start"):
        artefact(batch)


@pytest.mark.slow
def test_predict_py_in_the_folder_needs_no_jaxmp(run, exported, tmp_path):
    np.savez(tmp_path / "rows.npz", image=images(7))
    code, text = predict_bare(exported, tmp_path / "rows.npz", tmp_path / "out.npz")
    assert code == 0, text
    found = np.load(tmp_path / "out.npz")["output"]
    assert found.tobytes() == np.asarray(run.apply({"image": images(7), "label": np.zeros(7, int)}, "best")).tobytes()
    np.savez(tmp_path / "rows.npz", image=images(7)[..., 0])
    code, text = predict_bare(exported, tmp_path / "rows.npz", tmp_path / "no.npz")
    assert code == 2 and "expected uint8[b, 4, 4, 1]" in text and "Traceback" not in text


@pytest.mark.slow
def test_rows_that_predict_py_cannot_use_are_one_message(exported, tmp_path, monkeypatch, capsys):
    def saved(name, **arrays):
        np.savez(tmp_path / name, **arrays)
        return tmp_path / name

    good = saved("good.npz", image=images(2))
    np.save(tmp_path / "one.npy", images(2))
    (tmp_path / "cut.npz").write_bytes(good.read_bytes()[:-30])
    (tmp_path / "empty.npz").touch()
    spec = importlib.util.spec_from_file_location("predict", exported / "predict.py")
    predict = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(predict)
    for path, more, expected in (
        (saved("no_rows.npz", image=images(2)[:0]), [], "at least one row"),
        (saved("number.npz", image=np.array(3, np.uint8)), [], "input image is uint8[]; expected uint8[b, 4, 4, 1]"),
        (saved("other.npz", picture=images(2)), [], "(nothing); expected image"),
        (tmp_path / "one.npy", [], "expected a .npz file with an array for each input"),
        (tmp_path / "cut.npz", [], "expected a .npz file with an array for each input"),
        (tmp_path / "empty.npz", [], "expected a .npz file with an array for each input"),
        (tmp_path / "missing.npz", [], "No such file"),
        (good, ["--batch", "0"], "--batch 0: expected 1 or more"),
        (good, ["--batch", "-1"], "--batch -1: expected 1 or more"),
    ):
        monkeypatch.setattr("sys.argv", ["predict.py", str(path), str(tmp_path / "out.npz"), *more])
        assert predict.main() == 2, path
        said = capsys.readouterr().err
        assert said.startswith("predict.py: ") and expected in said, said
    assert not (tmp_path / "out.npz").exists()


@pytest.mark.slow
def test_one_changed_bit_in_any_file_is_refused(exported, tmp_path):
    for name in sorted(path.name for path in exported.iterdir()):
        for place in (0, 0.5, 1):
            folder = shutil.copytree(exported, tmp_path / f"{name}-{place}")
            data = bytearray((folder / name).read_bytes())
            data[int(place * (len(data) - 1))] ^= 0x20
            (folder / name).write_bytes(data)
            with pytest.raises(InputError, match="export the run again"):
                jaxmp.load(folder)
    for name in sorted(path.name for path in exported.iterdir()):
        folder = shutil.copytree(exported, tmp_path / f"without-{name}")
        (folder / name).unlink()
        with pytest.raises(InputError, match=f"{name}: No such file"):
            jaxmp.load(folder)


def with_manifest(exported, folder, **changes):
    """A copy whose manifest says something else, with digests that agree."""
    shutil.copytree(exported, folder)
    manifest = json.loads((folder / "manifest.json").read_text())
    text = json.dumps({**manifest, **changes}).encode()
    (folder / "manifest.json").write_bytes(text)
    (folder / "manifest.sha256").write_text(f"{hashlib.sha256(text).hexdigest()}  manifest.json\n")
    return folder


@pytest.mark.slow
def test_a_folder_loads_until_the_last_of_the_days_that_jax_promises(exported, tmp_path):
    manifest, today = json.loads((exported / "manifest.json").read_text()), datetime.date.today()
    began, ends = (datetime.date.fromisoformat(manifest[name]) for name in ("exported", "expires"))
    assert (ends - began).days == 180  # six months
    last = with_manifest(exported, tmp_path / "last", expires=today.isoformat())
    if datetime.date.today() == today:
        assert jaxmp.load(last)(images(2)).shape == (2, 3)
    over = with_manifest(exported, tmp_path / "over", expires=(today - datetime.timedelta(days=1)).isoformat())
    with pytest.raises(InputError, match="expired on"):
        jaxmp.load(over)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"artefact": 2}, "version 2 of the layout; this program reads version 1"),
        ({"expires": "2020-01-01"}, "expired on 2020-01-01"),
        ({"jax": {"version": "9.1.0"}}, "pip install 'jax>=9.1.0'"),
        ({"programs": {"tpu": "program.cpu.stablehlo"}}, "--platforms tpu cpu, or set JAX_PLATFORMS=tpu"),
    ],
)
def test_another_version_platform_or_date_is_refused(exported, tmp_path, changes, expected):
    folder = with_manifest(exported, tmp_path / "copy", **changes)
    with pytest.raises(InputError) as error:
        jaxmp.load(folder)
    assert expected in str(error.value)
    if "expires" in changes:
        assert jaxmp.load(folder, accept_expired=True)(images(2)).shape == (2, 3)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("rows", "expected"),
    [
        ({}, "0 inputs were given (nothing); expected image: uint8[b, 4, 4, 1]"),
        ({"picture": images(2)}, "(picture); expected image"),
        ({"image": images(2)[0]}, "input image is uint8[4, 4, 1]; expected uint8[b, 4, 4, 1]"),
        ({"image": images(2) / 255}, "input image is float64[2, 4, 4, 1]; expected uint8"),
        ({"image": images(2).astype(int) - 300}, "some of its values do not fit in uint8"),
        ({"image": images(2)[:0]}, "at least one row"),
    ],
)
def test_arrays_that_do_not_fit_are_refused(exported, rows, expected):
    with pytest.raises(ValueError) as error:
        jaxmp.load(exported)(**rows)
    assert expected in str(error.value)
    assert jaxmp.load(exported)(images(2).astype(np.int64)).shape == (2, 3)


@pytest.mark.slow
def test_what_cannot_be_exported_is_one_message_and_nothing_is_written(run, tmp_path, monkeypatch):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").write_text("")
    before = sorted(tmp_path.rglob("*"))
    out = tmp_path / "out"
    failed = jaxmp.Run(shutil.copytree(run.path, tmp_path.parent / "failed"), run.experiment)
    (failed.path / "failure.json").write_text("")
    failed._folder.write_failure(1, "the loss is not finite")
    for of, options, expected in (
        (run, {"output": tmp_path / "full"}, "not empty, it has file"),
        (run, {"output": tmp_path / "no" / "out"}, "there is no folder"),
        (run, {"output": out, "platforms": ["gpu"]}, "platforms 'gpu': expected cpu, cuda"),
        (run, {"output": out, "platforms": ["tpu"]}, "--platforms tpu cpu"),
        (run, {"output": out, "weights": "bset"}, "did you mean 'best'?"),
        (run, {"output": out, "precision": "Dense_9=float32; float16"}, "Dense_9"),
        (run, {"output": out, "decode": True}, "Net decodes without a cache; expected a decoder"),
        (failed, {"output": out}, "the loss is not finite"),
    ):
        with pytest.raises(InputError) as error:
            jaxmp.export(of, **options)
        assert expected in str(error.value), options

    monkeypatch.setattr("jaxmp.deploy.predict.platform", lambda: "cuda")
    with pytest.raises(InputError, match=r"on cuda; expected --platforms cpu cuda, or JAX_PLATFORMS=cpu$"):
        jaxmp.export(run, output=out)
    monkeypatch.undo()
    opened = Path.open

    def full(self, mode="r", *args, **kwargs):
        if mode == "wb":
            raise OSError(errno.ENOSPC, "No space left on device")
        return opened(self, mode, *args, **kwargs)

    monkeypatch.setattr(Path, "open", full)
    with pytest.raises(InputError, match=r"No space left on device; make room there"):
        jaxmp.export(run, output=out)
    assert sorted(tmp_path.rglob("*")) == before


def test_a_folder_that_cannot_be_replaced_is_refused_before_anything_is_done(tmp_path, monkeypatch):
    run = SimpleNamespace(failure=None)
    for name in ("here", "mounted", "empty"):
        (tmp_path / name).mkdir()
    for link, to in (("loop", "loop"), ("away", "no/such"), ("there", "empty"), ("new", "other")):
        (tmp_path / link).symlink_to(tmp_path / to)
    monkeypatch.chdir(tmp_path / "here")
    monkeypatch.setattr("os.path.ismount", lambda path: Path(path).name == "mounted")
    for folder, expected in (
        (Path("."), "output '.': the current folder cannot be replaced; expected a new folder in it"),
        (tmp_path / "here", "the current folder cannot be replaced"),
        (tmp_path / "mounted", "a mount point cannot be replaced"),
        (tmp_path / "loop", "a loop of symbolic links; expected a new or empty folder"),
        (tmp_path / "away", f"there is no folder {str(tmp_path / 'no')!r}"),
    ):
        with pytest.raises(InputError) as error:
            check(run, folder, "best", ["cpu"])
        assert expected in str(error.value), folder
    for folder in ("there", "new", "empty", "fresh"):
        check(run, tmp_path / folder, "best", ["cpu"])


@pytest.mark.slow
def test_the_average_is_exported_only_of_a_run_that_keeps_one(run, tmp_path, monkeypatch):
    state = run.state("last")
    assert state.ema is not None
    (tmp_path / "ema").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "ema")  # to an empty folder, which is replaced
    artefact = jaxmp.export(run, output=tmp_path / "link", weights="ema")
    assert (tmp_path / "link").is_symlink() and (tmp_path / "ema" / "manifest.json").is_file()
    assert (
        artefact(images(3)).tobytes() == np.asarray(run.apply({"image": images(3), "label": [0] * 3}, "last")).tobytes()
    )
    monkeypatch.setattr(run, "state", lambda step: dataclasses.replace(state, ema=None))
    with pytest.raises(InputError, match=r"keeps no average of its weights"):
        jaxmp.export(run, output=tmp_path / "out", weights="ema")


CONFIGS = (
    *("digits_mlp", "mnist_cnn", "cifar10_cnn", "mnist_vae"),
    *("spoken_digits_lstm", "sst2_lstm", "shakespeare_gpt", "sst2_bert_tiny"),
)
POLICIES = tuple(name for name in PRESETS if not name.endswith("-mixed"))  # those are second names


@pytest.mark.full_size
@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("precision", POLICIES)
def test_shipped_configs_predict_their_bits_without_jaxmp(tmp_path, made_up, name, precision):
    experiment = made_up(ConfigFile.find(str(ROOT / "configs" / f"{name}.py")).experiment(), 16)
    experiment = dataclasses.replace(experiment, loop=Loop(steps=2), precision=precision)
    if precision == "fp8_delayed" and name.endswith("_lstm"):
        pytest.skip("layers in nn.RNN have no state of delayed scaling: training refuses it")
    jaxmp.fit(experiment, workdir=tmp_path / "runs", log=lambda text: None)
    run = jaxmp.Run(tmp_path / "runs", experiment)
    began = time.perf_counter()
    artefact = jaxmp.export(run, output=tmp_path / "out", weights="last")
    exported = time.perf_counter()
    against = artefact.certificate["against"]["run"]
    assert against["bit_equal"] and all(output["largest_ulp"] == 0 for output in against["outputs"].values())
    assert not any("gradient" in key for key in artefact.manifest["weights"])  # which no prediction depends on
    source, state, counts = run.source("test"), run.state("last"), (1, 7, 512)
    rows = source[np.arange(512) % len(source)]
    np.savez(tmp_path / "rows.npz", **{key: rows[key] for key in artefact.inputs})
    found = batches_bare(tmp_path / "out", tmp_path / "rows.npz", tmp_path / "found.npz", counts)
    print(
        f"{name} {precision}: exported in {exported - began:.1f} s, loaded and predicted in a new process in", end=" "
    )
    print(f"{time.perf_counter() - exported:.1f} s")
    for count in counts:
        batch = {key: column[:count] for key, column in rows.items() if column.dtype.kind in "biuf"}
        outputs = run.outputs(batch | {"weight": np.ones(count, np.float32)}, state)
        names = {key or "output": np.asarray(leaf) for key, leaf in by_path(outputs).items()}
        assert {f"{count} {key}" for key in names} == {key for key in found if key.startswith(f"{count} ")}
        for key, own in names.items():
            bits = found[f"{count} {key}"]
            assert bits.shape == own.shape, (count, key)
            assert bits.tobytes() == own.tobytes(), (count, key)


def test_only_labels_of_text_in_table_files_are_names_of_classes(tmp_path):
    columns = {"x": np.zeros(4), "kind": np.array(["b", "a", "10", "b"]), "count": np.array([2, 10, 0, 2])}
    write_table(tmp_path / "rows.csv", columns)
    for label, names in (("kind", ["10", "a", "b"]), ("count", None), ("x", None), (None, None)):
        data = TableFiles(train=str(tmp_path / "rows.csv"), label=label)
        assert class_names(data, "label") == names and class_names(data, "x") is None


def test_a_divergence_that_is_infinite_is_said_to_be(tmp_path):
    kl = {"mean": None, "largest": None}
    found = {"bit_equal": False, "outputs": {}, "nonfinite": 0, "kl": kl}
    manifest = {"inputs": {}, "outputs": {}, "precision": "float32", "run": {"weights": "best", "step": 2}}
    certificate = {"rows": 1, "of": 1, "split": "test", "against": {"run": found}}
    artefact = Artefact({**manifest, "expires": None}, certificate, None)
    assert lines(artefact, tmp_path)[-1] == ("against run", "KL infinite, at most infinite")


@pytest.mark.slow
def test_the_command_prints_the_certificate(tmp_path, capsys):
    (tmp_path / "sign.py").write_text(
        '"""Points."""\n'
        "import flax.linen as nn\nimport numpy as np\n"
        "from jaxmp import Arrays, Classification, Experiment, Loop\n"
        "def load(split):\n"
        "    x = np.linspace(-1, 1, 40, dtype=np.float32)[:, None]\n"
        "    return {'x': x, 'label': (x[:, 0] > 0).astype(int)}\n"
        "def get_config():\n"
        "    data = Arrays(load, batch_size=40, images=())\n"
        "    return Experiment(nn.Dense(2), data, Classification(inputs=('x',)), loop=Loop(steps=2))\n"
    )
    assert main(["train", str(tmp_path / "sign.py"), "--workdir", str(tmp_path / "runs")]) == 0
    capsys.readouterr()
    assert main(["export", str(tmp_path / "runs"), "--output", str(tmp_path / "out")]) == 0
    out = capsys.readouterr().out
    assert "against run      equal to the bit; decisions 40 of 40 equal" in out and "float32[b, 1]" in out
    assert main(["export", str(tmp_path / "runs"), "--output", str(tmp_path / "out")]) == 2
    assert "not empty" in capsys.readouterr().err
