"""The `run` command: measures backends on a suite and compares them."""
