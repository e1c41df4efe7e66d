"""The docstring of a public class says what its fields are."""

from __future__ import annotations

import dataclasses
import pydoc

import pytest

import jaxmp
from jaxmp.field_docs import with_fields

CLASSES = [
    cls for name in jaxmp.__all__ if isinstance(cls := getattr(jaxmp, name), type) and not issubclass(cls, Exception)
]


@pytest.mark.parametrize("cls", CLASSES, ids=lambda cls: cls.__name__)
def test_help_of_a_public_class_has_each_of_its_fields(cls):
    names = (
        [field.name for field in dataclasses.fields(cls)]
        if dataclasses.is_dataclass(cls)
        else cls.__dict__.get("_fields", ())
    )
    public = [name for name in names if not name.startswith("_")]
    text = pydoc.render_doc(cls, renderer=pydoc.plaintext)
    said = text[text.index("Attributes:") :] if public else ""
    inherited = ("param_dtype", "compute_dtype", "output_dtype")  # of jmp.Policy, which documents none
    missing = [name for name in public if f"\n |    {name} (" not in said and name not in inherited]
    assert not missing
    assert all(len(line) <= 120 for line in cls.__doc__.splitlines())


def test_fields_of_bases_come_with_their_annotation_and_default():
    assert "  learning_rate (float = 0.1): Peak learning rate" in jaxmp.SGD.__doc__
    assert jaxmp.CosineDecay.__doc__.endswith(
        "final (float = 0.0): Learning rate at the end of the run, as a fraction of the peak."
    )


def test_a_class_of_others_or_without_fields_keeps_its_docstring():
    class Other:
        """Its own."""

    assert with_fields(Other).__doc__ == "Its own."
    assert with_fields(dict).__doc__ == dict.__doc__
