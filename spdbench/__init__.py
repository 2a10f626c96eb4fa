"""spdbench: measures speculative decoding methods against a baseline that can be believed."""

__version__ = "0.1.0"
