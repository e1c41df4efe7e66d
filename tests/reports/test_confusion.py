"""The confusion matrix in the terminal."""

from __future__ import annotations

import numpy as np
import pytest

from jaxmp.reports.confusion import confusion


def test_rows_are_labels_and_columns_predictions():
    matrix, scores = confusion({"prediction": np.array([0, 2, 2, 0]), "y": np.array([0, 0, 2, 2])}, "y")
    assert [line.split() for line in matrix.splitlines()] == [["label,", "predicted:", "0", "2"], ["0", "1", "1"],
                                                              ["2", "1", "1"]]  # fmt: skip
    assert "0.5000" in scores


def test_many_classes_have_scores_and_no_matrix():
    labels = np.arange(31)
    (scores,) = confusion({"prediction": labels, "y": labels}, "y")
    assert "1.0000" in scores


@pytest.mark.parametrize(
    ("predicted", "target"),
    [
        ({"output": np.zeros(3)}, "y"),
        ({"prediction": np.zeros(3, int)}, None),
        ({"prediction": np.zeros(3, int)}, "y"),
        ({"prediction": np.zeros(3, int), "y": np.zeros(3)}, "y"),
        ({"prediction": np.zeros(3, int), "y": np.zeros((3, 2), int)}, "y"),
    ],
)
def test_without_classes_and_labels_there_is_nothing_to_show(predicted, target):
    assert confusion(predicted, target) == []


def test_padding_is_no_class():
    predicted = {"prediction": np.array([[0, 1, 1], [1, 0, 0]]), "tag": np.array([[0, 1, -1], [1, -1, -1]])}
    matrix, scores = confusion(predicted, "tag", -1)
    assert [line.split() for line in matrix.splitlines()[1:]] == [["0", "1", "0"], ["1", "0", "2"]]
    assert "-1" not in scores and "1.0000" in scores
    assert confusion(predicted | {"tag": np.full((2, 3), -1)}, "tag", -1) == []
