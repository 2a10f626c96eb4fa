"""Measuring: the only clock, the journal, the environment."""
