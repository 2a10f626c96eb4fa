"""Judging: results in, metrics and tables of rows out. Imports no torch."""
