"""From a promise to a file: the smallest or fastest file for a runtime that loses at most so many points."""
