"""Pytrees and the paths of their leaves."""

from __future__ import annotations

import pytest

from jaxmp.errors import InputError
from jaxmp.trees import Pattern

CLASSES = {"": {"Net"}, "head": {"Dense"}, "encoder": {"Encoder"}, "encoder/norm": {"Mine", "LayerNorm"}}


@pytest.mark.parametrize(
    ("pattern", "path", "matches", "covers"),
    [
        ("encoder", "encoder", True, True),
        ("encoder", "encoder/norm", False, True),
        ("encoder/*", "encoder", False, False),
        ("*/norm", "encoder/norm", True, True),
        ("*norm", "encoder/norm", False, False),
        ("**/norm", "encoder/norm", True, True),
        ("**/encoder", "encoder", True, True),
        ("**/kernel", "kernel", True, True),
        ("**/*kernel", "a/b/query_kernel", True, True),
        ("**", "", False, False),
        ("@LayerNorm", "encoder/norm", True, True),
        ("@Encoder", "encoder/norm", False, True),
        ("@Net", "", True, True),
        ("@Net", "head", False, True),
    ],
)
def test_a_pattern_matches_what_it_names_and_covers_all_below(pattern, path, matches, covers):
    assert Pattern(pattern).matches(path, CLASSES) is matches
    assert Pattern(pattern).covers(path, CLASSES) is covers


@pytest.mark.parametrize("text", ["", "/a", "a/", "a//b", "a b", "@", "@a/b"])
def test_a_pattern_that_can_match_nothing_is_refused(text):
    with pytest.raises(InputError, match=r"is no pattern; expected|is not the name of a class"):
        Pattern(text)


@pytest.mark.parametrize(
    ("pattern", "end"),
    [
        ("haed", "there are encoder, encoder/norm, head; did you mean 'head'?"),
        ("**/nrom", "there are encoder, encoder/norm, head; did you mean '**/norm'?"),
        ("@LayerNrom", "there are @Dense, @Encoder, @LayerNorm, @Mine, @Net; did you mean '@LayerNorm'?"),
    ],
)
def test_a_pattern_that_matches_nothing_is_told_what_there_is(pattern, end):
    assert Pattern(pattern).what_there_is(CLASSES) == end
