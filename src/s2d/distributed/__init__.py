"""Several processes: which one this is, what part of a tensor it holds, sums over all of them."""
