"""`confusion`: how predicted classes and labels agree, as text."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from jaxmp.text_table import table

MOST_CLASSES = 30
"""number of classes up to which the confusion matrix is shown; more do not fit a terminal"""


def confusion(predicted: Mapping[str, np.ndarray], target: str | None, padding: int | None = None) -> list[str]:
    """The confusion matrix and the precision, recall and F1 of each class, as blocks of text; none without labels.

    Args:
      predicted: `prediction`, int (rows, ...), and under the name `target` the labels, of the same shape.
      target: name of the labels.
      padding: the label of places that do not count; None if all do.
    """
    classes, labels = predicted.get("prediction"), predicted.get(target or "")
    if classes is None or labels is None or classes.shape != labels.shape or labels.dtype.kind not in "iu":
        return []
    from sklearn.metrics import classification_report, confusion_matrix

    counts = np.full(labels.shape, True) if padding is None else labels != padding
    labels, classes = labels[counts], classes[counts]
    if not labels.size:
        return []
    names = sorted({*labels.tolist(), *classes.tolist()})
    blocks: list[str] = []
    if len(names) <= MOST_CLASSES:
        counts = confusion_matrix(labels, classes, labels=names)
        rows = [[str(name), *map(str, row)] for name, row in zip(names, counts.tolist(), strict=True)]
        header = ["label, predicted:", *map(str, names)]
        blocks.append(table(rows, header=header, right=range(1, len(header))))
    blocks.append(classification_report(labels, classes, labels=names, digits=4, zero_division=0).rstrip())
    return blocks
