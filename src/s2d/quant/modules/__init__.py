"""Quantizers in a model: their sites, the modules that hold them, insertion, removal and storage."""
