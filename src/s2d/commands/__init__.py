"""One file per command: what it takes, and which rooms do its work. Nothing is computed here."""
