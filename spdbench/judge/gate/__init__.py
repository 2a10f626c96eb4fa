"""Results checked against a baseline, for CI."""
