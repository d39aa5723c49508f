"""Files: written atomically, and where results come from."""
