"""The commands that read results: compare and judge them, draw them, list them, show what was answered."""
