"""Where quantizers sit: sites in a model, the modules that hold them, putting in, taking out, saving."""
