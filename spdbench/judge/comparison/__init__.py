"""Results compared side by side."""
