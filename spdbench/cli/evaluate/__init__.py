"""The commands `eval` and `lm-eval`: backends answer lm-eval's tasks."""
