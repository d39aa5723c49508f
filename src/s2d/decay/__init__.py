"""The decay: during training, shrink the components of a model's weights that make its outliers."""

from s2d.decay.settings import PRESETS, DecaySettings
from s2d.decay.spectral_decay import SelectiveSpectralDecay

__all__ = ["PRESETS", "DecaySettings", "SelectiveSpectralDecay"]
