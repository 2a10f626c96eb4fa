"""A comparison as charts: one self-contained page, or single files for papers."""
