"""A pipeline over the ranks of a torchrun job: rank 0 measures, every other rank hosts a stage."""
