"""Scripts that measure spdbench against others and against its own targets: `python -m benchmarks.NAME --help`."""
