"""Prompts: suites in YAML, their sources, and the chat template that turns them into token ids."""
