"""Files: atomic writes, and provenance of results."""
