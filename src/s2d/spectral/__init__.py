"""Spectra: leading singular triplets, PCDR, statistics of rows and channels; tensors in, tensors out."""
