"""The pipeline: which stage works on which token in which cycle."""
