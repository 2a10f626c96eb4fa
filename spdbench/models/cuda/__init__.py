"""CUDA graphs: work captured once and replayed."""
