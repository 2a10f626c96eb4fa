"""The `distill` command: the target writes training data."""
