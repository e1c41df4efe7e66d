"""The versions of the datasets that jaxmp prepares itself. Needs no TFDS."""

from __future__ import annotations

VERSIONS = {"digits": "1.0.0"}
"""the current version of each dataset, by name"""
