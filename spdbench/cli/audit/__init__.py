"""The `audit` command: checks that backends give the target's own outputs."""
