"""From a table of runs to metrics, their intervals, and flags."""
