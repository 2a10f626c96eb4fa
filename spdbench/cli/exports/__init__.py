"""The `import` command: exports of other load generators become results."""
