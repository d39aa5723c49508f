"""Models: loading and saving them, and the names of each family's parts."""

from s2d.models.family import (
    ROLES,
    Family,
    families,
    family_of,
    register_family,
    register_loader,
)
from s2d.models.heads import SentenceEncoder, TextClassifier
from s2d.models.loading import Loaded, load
from s2d.models.packages import installed_models
from s2d.models.saved import describe, fingerprint, read_notes, rebuild, register_architecture, save_model

__all__ = [
    "ROLES",
    "Family",
    "Loaded",
    "SentenceEncoder",
    "TextClassifier",
    "describe",
    "families",
    "family_of",
    "fingerprint",
    "installed_models",
    "load",
    "read_notes",
    "rebuild",
    "register_architecture",
    "register_family",
    "register_loader",
    "save_model",
]
