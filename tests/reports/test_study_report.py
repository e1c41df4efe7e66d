"""The page of a study: every trial is a point of its history and of each slice."""

from __future__ import annotations

import xml.etree.ElementTree as ElementTree

from jaxmp.reports import study_report

DEFINITION = {
    "config": "c",
    "experiment": "0" * 12,
    "seed": 0,
    "overrides": ["--loop.epochs", "2"],
    "space": {"optimizer.learning-rate": "log:0.001:1", "data.batch-size": "32,64"},
    "trials": 60,
    "seeds": 1,
    "metric": "loss",
    "direction": "min",
    "sampler": "tpe",
    "pruner": "median",
}


def study():
    trials = [
        {
            "number": i,
            "state": "pruned" if i == 7 else "failed" if i == 8 else "done",
            "value": None if i in (7, 8) else 1 + (i - 30) ** 2 / 900,
            "params": {"optimizer.learning_rate": 10.0 ** (-3 + i / 20), "data.batch_size": "32" if i % 2 else "64"},
            "seeds": {} if i in (7, 8) else {"0": 1.0},
            "runs": [f"runs/c/{i}"],
            "arguments": ["--optimizer.learning-rate", str(i), "--seed", "0"],
            "reason": "worse & worse" if i in (7, 8) else None,
            "curve": [(50, 1.0), (100, 2.0 + i)],
        }
        for i in range(60)
    ]
    origin = {"devices": ["cpu"], "platform": "cpu", "versions": {}, "git": None, "command": "jaxmp tune"}
    return {
        "definition": DEFINITION,
        "trials": trials,
        "best": 30,
        "importance": {"optimizer.learning_rate": 0.75, "data.batch_size": 0.25},
        "metrics": {"loss": {"best": "min", "unit": "nats", "digits": 4}},
        "storage": None,
        "folder": "runs/c/tune",
        "workdir": "runs",
        "source": "c.py",
        "choices": {"data.batch-size": ["32", "64"]},
        **origin,
    }


def test_a_slice_names_each_value_of_a_list_whatever_letters_it_has():
    found = study()
    found["definition"] = DEFINITION | {"space": {"model.features": "(4,)", "model.kind": "a|b|c,d"}}
    found["choices"] = {"model.features": ["(4,)"], "model.kind": ["a|b", "c,d"]}
    for trial in found["trials"]:
        trial["params"] = {"model.features": "(4,)", "model.kind": "c,d" if trial["number"] % 2 else "a|b"}
    (_, features, _), (_, kind, _) = study_report._slices(found)
    assert {circle.get("data-x") for circle in circles(features, 0)} == {"0"}
    assert {circle.get("data-x") for circle in circles(kind, 0)} == {"0", "1"}
    assert ">a|b<" in kind and ">c,d<" in kind


def test_the_page_of_a_study_by_the_wilcoxon_test_says_what_that_compares():
    found = study()
    found["definition"] = DEFINITION | {"pruner": "wilcoxon", "seeds": 8}
    page = str(study_report.page(found))
    assert "What the pruner saw of each seed of each trial" in page and "first seed" not in page


def circles(svg, style):
    return [c for c in ElementTree.fromstring(svg).iter("circle") if c.get("class").split()[0] == f"c{style}"]


def test_each_trial_with_a_value_is_a_point_of_the_history_and_of_each_slice():
    found = study()
    (_, history, _), (_, importance, _) = study_report._figures(found)
    assert len(circles(history, 1)) == 58
    assert ["75", "25"] == [t.text for t in ElementTree.fromstring(importance).iter("text") if t.text in ("75", "25")]
    slices = study_report._slices(found)
    assert [title for title, _, _ in slices] == list(DEFINITION["space"])
    for _, svg, _ in slices:
        assert len(circles(svg, 0)) == 58


def test_the_stairs_of_the_history_are_of_trials_with_all_seeds(monkeypatch):
    found, drawn = study(), []
    found["definition"] = DEFINITION | {"seeds": 2}
    found["trials"] = [
        found["trials"][0] | {"number": i, "value": value, "seeds": dict.fromkeys(map(str, range(seeds)), value)}
        for i, (value, seeds) in enumerate([(0.5, 1), (3.0, 2), (0.1, 1), (2.0, 2)])
    ]
    monkeypatch.setattr(study_report, "line_figure", lambda x, y, lines, **how: drawn.append(lines) or "")
    study_report._history(found)
    ((best, _),) = drawn
    assert str(best.y) == "[nan, 3.0, 3.0, 2.0]"


def test_the_page_has_the_command_of_the_best_and_each_reason_and_the_terminal_the_best_trials():
    found = study()
    command = "jaxmp train c.py --loop.epochs 2 --optimizer.learning-rate 30 --seed 0 --workdir runs"
    assert study_report.command_of(found, study_report.best_of(found)) == command
    page = str(study_report.page(found))
    assert command in page and page.count("worse &amp; worse") == 2
    assert "60 trials: 58 done, 1 pruned, 1 failed" in page
    text = study_report.text(found).splitlines()
    assert text[1].split()[0] == "31" and len(text[1:11]) == 10 and "and 50 more trials" in text[11]
    assert "58 done, 1 pruned, 1 failed" in text[12] and text[-1].endswith(command)
    assert "Curves" in page and "Seen by the pruner" in page

    empty = found | {"trials": [], "best": None, "importance": {}}
    assert "No trial has ended" in str(study_report.page(empty)) and "none: no trial" in study_report.text(empty)
