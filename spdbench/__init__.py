"""spdbench: measures speculative decoding methods against a baseline that can be believed."""

import os

__version__ = "0.1.0"

# Behind an operator that they shared, OpenMP's threads look for more work for milliseconds, and take cores from those
# that share the target's products (models/crew.py): EAGLE's rounds took half as long again. Now it is some 30
# microseconds. libgomp reads this when it is loaded, which is when torch is; who has chosen otherwise is not overruled.
if "OMP_WAIT_POLICY" not in os.environ:
    os.environ.setdefault("GOMP_SPINCOUNT", "1000")
