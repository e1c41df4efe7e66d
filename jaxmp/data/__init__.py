"""Datasets, and the pipelines that feed them to a step."""
