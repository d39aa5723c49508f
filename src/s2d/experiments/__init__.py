"""Experiments: a recipe as data, the runner that keeps every stage, and a recipe in small."""
