"""The `train` command: trains a drafter on conversations."""
