"""Training a run, and reading it back."""
