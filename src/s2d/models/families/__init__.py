"""One file per model family: the names of its blocks, norms and projections."""
