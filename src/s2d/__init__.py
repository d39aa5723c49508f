"""Selective Spectral Decay: make transformers survive 4 bits."""

from s2d.decay import SelectiveSpectralDecay as SelectiveSpectralDecay
