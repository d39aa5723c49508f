"""One file per command: its options, and the functions that it calls. Nothing is computed here."""
