"""spdbench: measures speculative decoding methods against a baseline that can be believed."""

import os

__version__ = "0.1.0"

# After an operator that they shared, OpenMP's threads look for more work for milliseconds, and take cores from the
# threads that share the target's matrix multiplications (models/cpu/worker_pool.py): EAGLE's rounds took half as long
# again. With this count it is some 30 microseconds. libgomp reads it when torch is loaded; a user's own choice is not
# overruled.
if "OMP_WAIT_POLICY" not in os.environ:
    os.environ.setdefault("GOMP_SPINCOUNT", "1000")
