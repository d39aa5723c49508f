"""One file per command: its options and the calls of library functions. Nothing is computed here."""
