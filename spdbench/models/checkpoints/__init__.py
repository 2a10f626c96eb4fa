"""Model files: where they lie, what their configs say, their tensors by name."""
