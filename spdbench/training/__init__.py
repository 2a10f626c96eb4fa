"""Data made by the target, and drafters trained on it; what differs by method is a recipe next to its backend."""
