"""From a run to where it is used: export, and what makes a model smaller."""
