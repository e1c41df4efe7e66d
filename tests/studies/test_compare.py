"""`jaxmp compare` and `jaxmp report`: what they write is whole, self-contained, and says what the runs did."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from html.parser import HTMLParser
from pathlib import Path

import jax
import numpy as np
import pytest
from scipy import stats

import jaxmp
from jaxmp.cli import main
from jaxmp.errors import InputError, RunFailed
from jaxmp.experiment.config_file import ConfigFile
from jaxmp.reports.comparison import page, text
from jaxmp.runs.fit import Fitted, _Session
from jaxmp.runs.run import Run
from jaxmp.studies.compare import differences
from jaxmp.studies.gradients import compare_gradients
from jaxmp.studies.grid import grid

pytestmark = pytest.mark.xdist_group("compare")  # one worker: the fixtures train

CONFIG = '''"""Noisy classes of 4 pixels."""
import flax.linen as nn
import numpy as np
from jaxmp import Adam, Arrays, Experiment, Loop


class Net(nn.Module):
    width: int = 8

    @nn.compact
    def __call__(self, image, *, train=False):
        x = nn.relu(nn.Dense(self.width)(image.reshape(image.shape[0], -1)))
        return nn.Dense(3)(nn.Dropout(0.1, deterministic=not train)(x))


def load(split):
    rng = np.random.default_rng({"train": 0, "validation": 1, "test": 2}[split])
    label = rng.integers(0, 3, 60)
    image = rng.integers(0, 100, (60, 2, 2, 1)) + 50 * label[:, None, None, None]
    return {"image": image.astype(np.uint8), "label": label}


def get_config():
    return Experiment(
        model=Net(),
        data=Arrays(load, batch_size=20, mean=(0.3,)),
        optimizer=Adam(0.1),
        loop=Loop(epochs=4, log_every=2),
    )
'''
PRECISIONS = ["float32", "mixed_float16"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("compared")
    (folder / "net.py").write_text(CONFIG)
    return folder


def arguments(folder, *more):
    return ["compare", str(folder / "net.py"), "--workdir", str(folder / "runs"), *more]


@pytest.fixture(scope="module")
def compared(folder):
    """A comparison of two precisions, as JSON, and its page."""
    command = arguments(folder, "--precision", *PRECISIONS, "--seeds", "0", "--gradients", "3")
    assert main(command) == 0
    file = folder / "runs" / "net" / "compare.html"
    return json.loads(file.with_suffix(".json").read_text()), file.read_text()


# What is measured.


def with_seed(comparison, seed, shift):
    """The comparison with runs of a second seed, whose losses are higher, in mixed_float16 by twice as much."""
    comparison = json.loads(json.dumps(comparison))
    for run in json.loads(json.dumps(comparison["runs"])):
        run["seed"] = seed
        more = shift * (1 + (run["precision"] == "mixed_float16"))
        for line in (*run["metrics"], run["summary"]["test"]):
            line["loss"] += more
        comparison["runs"].append(run)
    comparison["seeds"].append(seed)
    comparison["differences"] = differences(comparison["runs"], PRECISIONS)
    return comparison


@pytest.mark.slow
def test_each_cell_is_the_run_that_train_would_have_made(compared, folder):
    comparison, _ = compared
    assert [(r["precision"], r["seed"]) for r in comparison["runs"]] == [("float32", 0), ("mixed_float16", 0)]
    for cell in comparison["runs"]:
        run = Run(cell["run"])
        assert run.summary["test"] == cell["summary"]["test"]
        assert (run.experiment.precision, run.experiment.seed) == (cell["precision"], cell["seed"])
    before = Path(comparison["runs"][0]["run"], "summary.json").stat().st_mtime_ns
    command = ["train", str(folder / "net.py"), "--precision", "float32", "--seed", "0"]
    assert main([*command, "--workdir", str(folder / "runs")]) == 0
    assert Path(comparison["runs"][0]["run"], "summary.json").stat().st_mtime_ns == before


def test_seeds_are_the_outer_loop(folder):
    cells = grid(ConfigFile.find(str(folder / "net.py")), PRECISIONS, (3, 1))
    assert [(cell.precision, cell.seed) for cell in cells] == [
        ("float32", 3), ("mixed_float16", 3), ("float32", 1), ("mixed_float16", 1)
    ]  # fmt: skip
    assert all((c.experiment.precision, c.experiment.seed) == (c.precision, c.seed) for c in cells)


@pytest.mark.slow
def test_differences_are_paired_by_seed(compared):
    comparison = with_seed(compared[0], 1, 0.25)
    before, after = ([d for d in c["differences"] if d["metric"] == "loss"][1] for c in (compared[0], comparison))
    (one,) = before["pairs"].values()
    assert list(after["pairs"].values()) == pytest.approx([one, one + 0.25])
    assert after["difference"]["mean"] == pytest.approx(one + 0.125)
    half = stats.t.ppf(0.975, 1) * 0.125  # the standard error of two differences that are 0.25 apart
    interval = one + 0.125 - half, one + 0.125 + half
    assert (after["difference"]["low"], after["difference"]["high"]) == pytest.approx(interval)
    assert before["difference"]["low"] is None and before["difference"]["no_interval"] == "no interval: one pair"


@pytest.mark.slow
def test_a_seed_with_a_failed_run_is_no_pair(compared):
    comparison = with_seed(compared[0], 1, 0.25)
    comparison["runs"][2]["failed"] = "diverged"
    found = [d for d in differences(comparison["runs"], PRECISIONS) if d["metric"] == "loss"][1]
    assert list(found["pairs"]) == [0] and list(found["values"]) == [0, 1]


@pytest.mark.slow
def test_the_audit_sees_what_each_precision_computes_in(compared):
    shares = {m["precision"]: m["dot_flops_share"] for m in compared[0]["measured"]}
    assert shares == {"float32": {"float32": 1.0}, "mixed_float16": {"float16": 1.0}}


@pytest.mark.slow
def test_gradient_errors_are_of_the_size_of_the_unit_roundoff(compared):
    errors = compared[0]["gradients"]
    assert errors["steps"] == [1, 5, 9]
    full, half = (np.array(errors["precisions"][p]["relative_error"]) for p in PRECISIONS)
    assert np.all(full < 100 * 2.0**-24) and np.all(half < 100 * 2.0**-11) and np.all(half > 2.0**-13)
    angles = np.array(errors["precisions"]["mixed_float16"]["one_minus_cosine"])
    assert np.all(angles <= half**2)  # 1 - cos is about half the squared error


@pytest.mark.slow
def test_against_float32_with_the_masks_of_training_float32_has_no_error(compared):
    experiments = {cell["precision"]: Run(cell["run"]).experiment for cell in compared[0]["runs"]}
    errors = compare_gradients(experiments, 1, against="float32")["precisions"]
    assert errors["float32"]["relative_error"] == [0.0] and errors["float32"]["one_minus_cosine"] == [0.0]
    assert 2.0**-13 < errors["mixed_float16"]["relative_error"][0] < 100 * 2.0**-11
    assert not jax.config.jax_enable_x64


@pytest.mark.slow
def test_a_second_call_only_reads(compared, folder, capsys):
    states = sorted((folder / "runs").glob("net/*/checkpoints/*/manifest.json"))
    before = [path.stat().st_mtime_ns for path in states]
    command = arguments(folder, "--precision", *PRECISIONS, "--seeds", "0", "--output", str(folder / "again.html"))
    assert main(command) == 0
    assert [path.stat().st_mtime_ns for path in states] == before
    again = json.loads((folder / "again.json").read_text())
    assert [r["metrics"] for r in again["runs"]] == [r["metrics"] for r in compared[0]["runs"]]
    assert "train " not in capsys.readouterr().out


@pytest.mark.slow
def test_a_run_that_failed_is_shown_and_gives_exit_code_1(compared, folder, monkeypatch, capsys):
    def fail(experiment, **kwargs):
        raise RunFailed("2 steps in a row were skipped")

    monkeypatch.setattr("jaxmp.studies.compare.fit", fail)
    monkeypatch.setattr("jaxmp.studies.compare._of_precision", lambda cell: compared[0]["measured"][1])
    output = folder / "failed.html"
    more = ["--precision", "mixed_float16", "--seeds", "0", "--output", str(output)]
    assert main(arguments(folder, *more)) == 1
    assert "failed: mixed_float16, seed 0: 2 steps in a row were skipped" in capsys.readouterr().err
    text = output.read_text()
    assert "Failed: mixed_float16, seed 0: 2 steps in a row" in text and "1 of 1" in text
    figures = check_page(text)
    assert any("cross" in path.get("class", "") for path in figures[0].iter("path"))


@pytest.mark.slow
def test_a_run_that_diverges_is_a_result_like_others(folder):
    output = folder / "diverged.html"
    more = ["--precision", *PRECISIONS, "--seeds", "0", "--scaler.kind", "static"]
    more += ["--scaler.init-scale", str(2**24), "--loop.max-consecutive-skips", "2", "--output", str(output)]
    assert main(arguments(folder, *more)) == 1
    comparison = json.loads(output.with_suffix(".json").read_text())
    assert comparison["runs"][0]["failed"] is None and "in a row were skipped" in comparison["runs"][1]["failed"]
    (versus,) = [d for d in comparison["differences"] if (d["metric"], d["precision"]) == ("loss", "mixed_float16")]
    assert versus["difference"]["pairs"] == 0
    check_page(output.read_text())


def test_a_run_that_a_hook_ended_early_is_refused_with_its_folder(folder, tmp_path, monkeypatch, capsys):
    ended = Fitted(tmp_path, {"steps": 3, "stopped_because": "enough (hook early)"}, stopped=False)
    monkeypatch.setattr("jaxmp.studies.compare.fit", lambda *args, **kwargs: ended)
    assert main(arguments(folder, "--output", str(tmp_path / "c.html"))) == 2
    said = capsys.readouterr().err
    assert f"{tmp_path}: a hook ended this run early, after step 3: enough (hook early)" in said
    assert "--overwrite" in said and not (tmp_path / "c.html").exists()


def test_a_page_with_the_name_of_its_json_is_refused_before_anything_is_trained(folder, tmp_path, capsys):
    more = ["--output", str(tmp_path / "c.json"), "--precision", "float32", "--seeds", "6"]
    assert main(arguments(folder, *more)) == 2
    assert "c.json': the page would replace the JSON beside it" in capsys.readouterr().err
    assert not list(folder.glob("runs/net/*-s6"))


def test_a_signal_that_stops_a_run_stops_the_comparison(folder, tmp_path, monkeypatch):
    monkeypatch.setattr("jaxmp.studies.compare.fit", lambda *args, **kwargs: Fitted(tmp_path, {}, stopped=True))
    output = tmp_path / "c.html"
    assert main(arguments(folder, "--output", str(output), "--precision", "float32", "--seeds", "5")) == 75
    assert not output.exists()


def test_a_signal_in_the_end_of_a_run_stops_the_comparison(folder, tmp_path, monkeypatch):
    """`fit` looked for the last time after its last step, and the run is whole: what stops is the loop of runs."""
    finish, said = _Session._finish, []

    def interrupted(self, *args):
        os.kill(os.getpid(), signal.SIGTERM)
        return finish(self, *args)

    monkeypatch.setattr(_Session, "_finish", interrupted)
    config = ConfigFile.find(str(folder / "net.py"))
    assert jaxmp.compare(config, ["float32"], [7, 8], workdir=str(tmp_path), log=said.append) is None
    assert said[-1] == "stopped after this run; the same command goes on from there"
    (run,) = tmp_path.glob("net/*-s*")
    assert run.name.endswith("-s7") and Run(run).summary["steps"] == 12


@pytest.mark.slow
def test_a_comparison_that_was_killed_goes_on_where_it_was(compared, folder, tmp_path):
    """kill -9 in the second run: the same command reads the first, and ends as one that was not killed."""
    command = ["compare", str(folder / "net.py"), "--workdir", str(tmp_path)]
    command += ["--precision", *PRECISIONS, "--seeds", "0", "--gradients", "3"]
    root = Path(__file__).parents[2]
    command_line = [sys.executable, "-um", "jaxmp", *command]
    with subprocess.Popen(command_line, cwd=root, stdout=subprocess.PIPE, text=True) as child:
        assert child.stdout is not None
        for line in child.stdout:
            if line.startswith("[2/2]"):
                child.kill()
                break
    summaries = list(tmp_path.glob("net/*/summary.json"))
    assert len(summaries) == 1 and not (tmp_path / "net" / "compare.html").exists()
    before = summaries[0].stat().st_mtime_ns
    assert main(command) == 0
    assert summaries[0].stat().st_mtime_ns == before
    found = json.loads((tmp_path / "net" / "compare.json").read_text())
    whole = compared[0]
    assert [r["summary"]["test"] for r in found["runs"]] == [r["summary"]["test"] for r in whole["runs"]]
    assert found["gradients"] == whole["gradients"]


@pytest.mark.few_variants
@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--precision", "float32", "mixed_flaot16"], "did you mean 'mixed_float16'"),
        (["--precision", "--seeds", "0"], "--precision: nothing to compare"),
        (["--precision", "float32", "--seeds"], "--seeds: nothing to compare"),
        (["--precision", "float32", "--seeds", "0", "1", "0"], "--seeds: 0 is given twice"),
        (["--precision", "mixed_float16", "p=f32,c=f16,o=f32"], "are one policy"),
        (["--precision", "float32", "--seeds", "0", "-1"], "seed = -1"),
        (["--precision", "float32", "--seeds", "0.5"], "0.5"),
        (["--seed", "3"], "--seeds"),
        (["--precision", "float32", "--gradients", "-1"], "gradients at -1 steps"),
    ],
)
def test_bad_input_is_one_message_and_exit_code_2(folder, capsys, more, message):
    assert main([*arguments(folder), *more]) == 2
    error = capsys.readouterr().err
    assert message in error and "Traceback" not in error


def test_an_unknown_config_is_bad_input(capsys):
    assert main(["compare", "digits_cn", "--precision", "float32"]) == 2
    assert "did you mean 'digits_cnn'" in capsys.readouterr().err
    assert main(["report", "no/such/run"]) == 2
    assert main(["report"]) == 2


@pytest.mark.slow
def test_an_experiment_is_compared_from_python_as_a_config_is(compared, folder, tmp_path):
    experiment = ConfigFile.find(str(folder / "net.py")).experiment([])
    said = []
    found = jaxmp.compare(experiment, PRECISIONS, seeds=(0,), workdir=tmp_path, log=said.append)
    as_json = json.loads(json.dumps(found))
    assert as_json["differences"] == compared[0]["differences"] and said[0] == "[1/2] float32, seed 0"
    assert str(found) == text(found) and "mixed_float16" in str(found)
    assert found._repr_html_().count("<svg") >= 4 and "Loss scale" not in found._repr_html_()
    found.save(tmp_path / "c.html")
    assert json.loads((tmp_path / "c.json").read_text()) == as_json
    check_page((tmp_path / "c.html").read_text())
    for subject, message in ((3, "expected an Experiment"), (experiment, "overrides are those of a config file")):
        with pytest.raises(InputError, match=message):
            jaxmp.compare(subject, PRECISIONS, overrides=["--seed", "1"])


# What is written.


class Checked(HTMLParser):
    """Sees to it that elements are closed in order, and notes what a page refers to."""

    def __init__(self):
        super().__init__()
        self.open, self.references, self.ids = [], [], []

    def handle_starttag(self, tag, attributes):
        if tag not in ("meta", "link"):
            self.open.append(tag)
        self.references += [value for name, value in attributes if name in ("src", "href", "srcset", "data", "action")]

    def handle_endtag(self, tag):
        assert self.open and self.open.pop() == tag, f"</{tag}> closes nothing"


def check_page(text):
    """Well-formed, with well-formed SVG, and nothing that is loaded from anywhere."""
    checked = Checked()
    checked.feed(text)
    checked.close()
    links = [link for link in checked.references if link != "data:,"]
    assert checked.open == [] and all(re.fullmatch(r"[^:]*/report\.html", link) for link in links)
    assert "@import" not in text and "url(" not in text
    assert set(re.findall(r"<script[^>]*>", text)) == {'<script type="application/json" id="data">'}
    visible = re.sub(r"<script.*?</script>", "", text, flags=re.DOTALL)
    assert not re.findall(r"https?://", visible)
    figures = re.findall(r"<svg.*?</svg>", text, flags=re.DOTALL)
    return [ElementTree.fromstring(figure) for figure in figures]


def curves_in(figures):
    """`(figure name, x, y)` of each line that is drawn."""
    return [
        (figure.get("aria-label"), *(tuple(map(float, path.get(k).split())) for k in ("data-x", "data-y")))
        for figure in figures
        for path in figure.iter("path")
        if path.get("data-x") is not None
    ]


@pytest.mark.slow
def test_the_page_is_whole_and_has_the_data_of_every_curve(compared):
    links = {r["run"]: f"{Path(r['run']).name}/report.html" for r in compared[0]["runs"]}
    assert str(page(compared[0], links)) == compared[1]  # the JSON is all that the page is made from
    for path, link in links.items():
        assert f'<a href="{link}">' in compared[1] and Path(path, "report.html").is_file()
    comparison = with_seed(compared[0], 1, 0.25)
    text = str(page(comparison))
    drawn = curves_in(check_page(text))
    for run in comparison["runs"]:
        for metric, factor, split, name in [
            ("loss", 1, "validation", "Loss, validation"),
            ("loss", 1, "train", "Loss, training"),
            ("accuracy", 100, "validation", "Accuracy, validation"),
            ("examples_per_second", 1, "train", "Speed"),
        ]:
            lines = [line for line in run["metrics"] if line["split"] == split and metric in line]
            steps = tuple(line["step"] for line in lines)
            values = pytest.approx([factor * line[metric] for line in lines], rel=1e-6)
            assert any(n == name and x == steps and list(y) == values for n, x, y in drawn), (metric, split)
    assert "Loss scale: the same in every line: 1 (float32); 32,768 (mixed_float16)." in text
    assert "Skipped steps: no step was skipped." in text
    loss = [[line["loss"] for line in r["metrics"] if line["split"] == "validation"] for r in comparison["runs"]]
    mean = pytest.approx(np.mean([loss[0], loss[2]], axis=0))
    assert any(n == "Loss, validation" and list(y) == mean for n, _, y in drawn)
    between = pytest.approx(np.subtract(loss[3], loss[2]), rel=1e-4)
    assert any("difference to float32" in n and list(y) == between for n, _, y in drawn)
    embedded = json.loads(re.findall(r'<script type="application/json"[^>]*>(.*?)</script>', text)[0])
    assert embedded["runs"][0]["metrics"] == comparison["runs"][0]["metrics"]


@pytest.mark.slow
def test_the_report_of_one_run_is_in_its_folder(compared, capsys):
    run = Run(compared[0]["runs"][1]["run"])
    assert main(["report", str(run.path)]) == 0
    path = run.path / "report.html"
    assert capsys.readouterr().out.strip() == str(path)
    text = path.read_text()
    drawn = curves_in(check_page(text))
    for split in ("train", "validation"):
        steps, values = run.curve("loss", split)
        assert any(list(x) == list(steps) and list(y) == pytest.approx(values, rel=1e-6) for _, x, y in drawn)
    for part in ("mixed_float16", "Dense_0", run.config["versions"]["jax"], "p=f32,c=f16,o=f32", "Made by"):
        assert part in text


@pytest.mark.slow
def test_the_report_of_several_runs_names_what_sets_them_apart(compared, folder, capsys):
    runs = [r["run"] for r in compared[0]["runs"]]
    assert main(["report", *runs]) == 2
    assert "--output" in capsys.readouterr().err
    assert main(["report", *runs, "--output", str(folder / "two.html")]) == 0
    text = (folder / "two.html").read_text()
    figures = check_page(text)
    labels = {text.text for figure in figures for text in figure.iter("text")}
    assert set(PRECISIONS) <= labels


@pytest.mark.slow
def test_a_run_that_has_not_ended_is_shown_as_far_as_it_is(compared, tmp_path):
    path = shutil.copytree(compared[0]["runs"][0]["run"], tmp_path / "unfinished")
    (path / "summary.json").unlink()
    assert main(["report", str(path)]) == 0
    text = (path / "report.html").read_text()
    assert "Not ended" in text
    check_page(text)
    (path / "metrics.jsonl").write_text("")
    assert main(["report", str(path)]) == 0
    check_page((path / "report.html").read_text())


@pytest.mark.slow
def test_a_precision_whose_runs_all_failed_has_a_column_that_says_so(compared):
    comparison = json.loads(json.dumps(compared[0]))
    comparison["runs"][1] |= {"failed": "diverged", "summary": {}}
    comparison["differences"] = differences(comparison["runs"], PRECISIONS)
    text = str(page(comparison))
    assert "<th>float32</th><th>mixed_float16</th>" in text
    assert text.count("<td>p=f32,c=f32,o=f32,matmul=F32_F32_F32</td><td>failed</td>") >= 2
    check_page(text)


@pytest.mark.slow
def test_names_from_outside_are_no_html(compared, tmp_path):
    comparison = json.loads(json.dumps(compared[0]))
    comparison["about"] = "</script><b onclick='x'>& "
    comparison["runs"][0]["failed"] = "<i>"
    check_page(str(page(comparison)))


def chromium() -> str:
    found = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if found is None:
        pytest.skip("no Chromium on this machine")
    return found


FLAGS = (
    "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
    "--disable-component-update --disable-sync --enable-logging=stderr --hide-scrollbars"
).split()


@pytest.mark.slow
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_chromium_shows_the_page_without_an_error(compared, tmp_path, scheme):
    from PIL import Image

    html = tmp_path / "page.html"
    html.write_text(compared[1])
    browser = [chromium(), *FLAGS, f"--user-data-dir={tmp_path / 'profile'}", "--window-size=1180,1400"]
    browser += ["--blink-settings=preferredColorScheme=0"] if scheme == "dark" else []
    shot = subprocess.run(
        [*browser, f"--screenshot={tmp_path / 'shot.png'}", html.as_uri()], capture_output=True, text=True, timeout=120,
        env=os.environ | {"HOME": str(tmp_path)},
    )  # fmt: skip
    assert "CONSOLE" not in shot.stderr, shot.stderr
    pixels = np.asarray(Image.open(tmp_path / "shot.png").convert("RGB"))
    background = {"light": (255, 255, 255), "dark": (15, 19, 24)}[scheme]
    assert tuple(pixels[2, 2]) == background
    first, second = {"light": ((0, 114, 178), (213, 94, 0)), "dark": ((86, 180, 233), (255, 154, 77))}[scheme]
    for colour in (first, second):  # both precisions are drawn, one beside or below the other
        assert np.sum(np.all(pixels == colour, axis=-1)) > 100
    if scheme == "dark":
        pdf = tmp_path / "page.pdf"
        done = subprocess.run([*browser, f"--print-to-pdf={pdf}", html.as_uri()], capture_output=True, timeout=120)
        assert done.returncode == 0 and pdf.read_bytes().startswith(b"%PDF")
