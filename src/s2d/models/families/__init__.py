"""One file per model family: what its blocks, norms and projections are called."""
