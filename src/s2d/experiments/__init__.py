"""Experiments: recipes as data, the runner that keeps every stage on disk, and the smoke test of a recipe."""
