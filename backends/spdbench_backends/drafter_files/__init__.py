"""Drafters on disk, whatever their method: read, checked against a target, drawn at random, written."""
