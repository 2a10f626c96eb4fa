"""The `sweep` command: many runs from one file, one after the other or on a cluster."""
