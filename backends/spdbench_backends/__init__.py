"""Backends that ship with spdbench. Nothing here is imported by `spdbench` except through entry points."""
