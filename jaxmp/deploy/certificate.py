"""A certificate: how far the outputs of an exported model are from those in float32, and from those of its run."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np

from jaxmp.trees import is_floating


@dataclasses.dataclass
class Deviation:
    """How far a model's outputs are from a reference's, over rows that come in batches.

    The error of a row is the largest difference of its outputs, in units in the last place (ulp) of the row's largest
    reference output, in the dtype of the model's outputs.
    """

    compared: int = 0
    agree: int = 0
    bit_equal: bool = True
    nonfinite: int = 0
    """outputs that differ and are not finite in both: NaN or infinite in one alone, or another of these in each"""
    whole: dict[str, tuple[int, int]] = dataclasses.field(default_factory=dict)
    """of each output of whole numbers or bools, how many numbers were compared, and how many of these differ"""
    errors: dict[str, list[np.ndarray]] = dataclasses.field(default_factory=dict)
    relative: dict[str, list[np.ndarray]] = dataclasses.field(default_factory=dict)
    dtypes: dict[str, str] = dataclasses.field(default_factory=dict)
    divergences: list[np.ndarray] = dataclasses.field(default_factory=list)

    def add(
        self,
        outputs: dict[str, np.ndarray],
        reference: dict[str, np.ndarray],
        decisions: tuple[np.ndarray, np.ndarray, np.ndarray] | None,
        rows: int,
    ) -> None:
        """Counts the first `rows` rows of a batch.

        Args:
          outputs: the model's outputs by name, arrays of shape (n, ...).
          reference: those of the reference, of the same shapes; dtypes may differ.
          decisions: what the task decides by the outputs and by the reference's, whole numbers of shape (n, ...), and
            which of these are compared, bools of the same shape.
          rows: number of rows that are no padding.
        """
        for name, output in outputs.items():
            if not is_floating(output):
                differs = output[:rows] != reference[name][:rows]
                before = self.whole.get(name, (0, 0))
                self.whole[name] = before[0] + differs.size, before[1] + int(np.sum(differs))
                self.bit_equal &= not np.any(differs)
                continue
            self.bit_equal &= output.dtype == reference[name].dtype
            self.bit_equal &= output[:rows].tobytes() == reference[name][:rows].tobytes()
            got, right = (x[:rows].reshape(rows, -1).astype(np.float64) for x in (output, reference[name]))
            finite = np.isfinite(got) & np.isfinite(right)
            same = (got == right) | (np.isnan(got) & np.isnan(right))
            self.nonfinite += int(np.sum(~finite & ~same))
            difference = np.max(np.abs(np.where(finite, got, 0) - np.where(finite, right, 0)), axis=1, initial=0)
            largest = np.max(np.abs(np.where(finite, right, 0)), axis=1, initial=0)
            self.dtypes[name] = output.dtype.name
            self.errors.setdefault(name, []).append(difference / ulp(largest, output.dtype))
            self.relative.setdefault(name, []).append(difference / np.where(largest > 0, largest, 1))
        if decisions is not None:
            mine, right, counts = (np.asarray(each)[:rows] for each in decisions)
            self.compared += int(np.sum(counts))
            self.agree += int(np.sum((mine == right) & counts))
            (logits, other) = (next(iter(each.values()))[:rows] for each in (outputs, reference))
            if len(outputs) == 1 and logits.ndim == mine.ndim + 1 and logits.shape[-1] > 1:
                self.divergences.append(kl_divergence(other, logits)[counts])

    def to_json(self) -> dict[str, Any]:
        """The figures as JSON."""
        outputs = {}
        for name, parts in self.errors.items():
            errors, relative = np.concatenate(parts), np.concatenate(self.relative[name])
            outputs[name] = {
                "ulp_of": self.dtypes[name],
                "largest_ulp": float(np.max(errors)),
                "median_ulp": float(np.median(errors)),
                "largest_relative": float(np.max(relative)),
                "median_relative": float(np.median(relative)),
            }
        found: dict[str, Any] = {"bit_equal": bool(self.bit_equal), "nonfinite": self.nonfinite, "outputs": outputs}
        if self.whole:
            found["whole_numbers"] = {
                name: {"compared": compared, "differing": differing}
                for name, (compared, differing) in self.whole.items()
            }
        if self.compared:
            share = self.agree / self.compared
            found["decisions"] = {"compared": self.compared, "agree": self.agree, "share": share}
        kl = np.concatenate([np.zeros(0), *self.divergences])
        if kl.size:
            found["kl"] = {"mean": float(np.mean(kl)), "largest": float(np.max(kl))}
        return found


def ulp(x: np.ndarray, dtype: Any) -> np.ndarray:
    """The unit in the last place of each of `x`, float64 of magnitude 0 or more, in a float dtype."""
    import ml_dtypes

    info = ml_dtypes.finfo(dtype)
    exponent = np.frexp(np.maximum(x, float(info.smallest_normal)))[1] - 1
    return np.ldexp(1.0, exponent - info.nmant)


def kl_divergence(right: np.ndarray, logits: np.ndarray) -> np.ndarray:
    """KL(softmax(right) || softmax(logits)) over the last axis, in nats and float64; infinite where a logit is NaN."""
    p, q = (_log_softmax(x.astype(np.float64)) for x in (right, logits))
    with np.errstate(invalid="ignore"):
        terms = np.where(p == -np.inf, 0, np.exp(p) * (p - q))
    return np.maximum(np.nan_to_num(np.sum(terms, axis=-1), nan=np.inf, posinf=np.inf), 0)


def _log_softmax(x: np.ndarray) -> np.ndarray:
    with np.errstate(invalid="ignore"):
        shifted = x - np.max(x, axis=-1, keepdims=True)
        return shifted - np.log(np.sum(np.exp(shifted), axis=-1, keepdims=True))
