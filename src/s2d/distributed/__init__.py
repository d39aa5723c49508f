"""Distributed training: the rank of this process, its part of a tensor, sums over all ranks."""
