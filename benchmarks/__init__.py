"""Scripts that measure spdbench against others and against its own targets: `python -m benchmarks.NAME --help`."""

import spdbench  # noqa: F401 - before torch, as the command line does
