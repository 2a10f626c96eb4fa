"""Suites that ship with spdbench, one YAML file each."""
