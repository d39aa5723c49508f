"""Models in installed Python packages: a transformers folder or a GGUF file inside the package."""

from __future__ import annotations

import difflib
import importlib.metadata
import importlib.util
import re
from functools import lru_cache
from pathlib import Path, PurePosixPath

from s2d.errors import InputError
from s2d.io.files import parse_json

WEIGHT_SUFFIXES = (".safetensors", ".bin", ".pt", ".pth", ".ckpt")
_DEPTH = 3


def package_folder(name: str) -> Path | None:
    """The folder of an installed package, by the name it is installed under or imported by; it is not imported."""
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", name):
        return None
    try:
        # Only a name without dots: finding a submodule would import its parent.
        spec = importlib.util.find_spec(re.sub(r"[-._]+", "_", name))
    except (ImportError, ValueError):
        spec = None
    if spec is not None and spec.submodule_search_locations:
        return Path(next(iter(spec.submodule_search_locations)))
    try:
        files = importlib.metadata.distribution(name).files or []
    except importlib.metadata.PackageNotFoundError:
        return None
    for file in files:
        if len(file.parts) > 1 and not file.parts[0].endswith((".dist-info", "..")):
            return Path(str(file.locate())).parents[len(file.parts) - 2]
    return None


def find_model(folder: Path) -> Path | None:
    """The transformers folder or GGUF file at or below `folder` (a few levels), the shallowest one.

    Raises:
        InputError: There are several at the same depth.
    """
    level = [folder]
    for _ in range(_DEPTH):
        found = [place for place in level if is_transformers_folder(place)]
        found += [file for place in level if not is_transformers_folder(place) for file in sorted(place.glob("*.gguf"))]
        if len(found) > 1:
            listed = ", ".join(str(place.relative_to(folder)) for place in found[:5])
            raise InputError(f"{folder} holds several models; name one of them: {listed}")
        if found:
            return found[0]
        level = [child for place in level for child in _subfolders(place)]
    return None


def _subfolders(folder: Path) -> list[Path]:
    try:
        return sorted(child for child in folder.iterdir() if child.is_dir() and not child.name.startswith((".", "__")))
    except PermissionError:
        return []


def is_transformers_folder(folder: Path) -> bool:
    """Whether the folder has a ``config.json`` that names a kind of model, and weights beside it."""
    config = folder / "config.json"
    if not config.is_file():
        return False
    try:
        content = parse_json(config.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return True  # the loader will report what is wrong with it
    names_a_model = isinstance(content, dict) and ("model_type" in content or "architectures" in content)
    return names_a_model and any(file.suffix in WEIGHT_SUFFIXES for file in folder.iterdir())


@lru_cache(maxsize=1)
def installed_models() -> tuple[str, ...]:
    """Names of the installed packages that carry a model, as `load` takes them."""
    names: set[str] = set()
    for distribution in importlib.metadata.distributions():
        paths = [PurePosixPath(str(file)) for file in distribution.files or ()]
        with_weights = {path.parent for path in paths if path.name in ("model.safetensors", "pytorch_model.bin")}
        if any(path.suffix == ".gguf" for path in paths) or any(
            path.name == "config.json" and path.parent in with_weights for path in paths
        ):
            names.add(distribution.metadata["Name"])
    return tuple(sorted(names))


def suggestions(name: str) -> str:
    """Half a sentence with the installed models, the closest to `name` first."""
    models = installed_models()
    if not models:
        return "no installed package carries a model"
    close = difflib.get_close_matches(name.lower(), models, n=3, cutoff=0.5)
    return f"did you mean {' or '.join(close)}?" if close else f"installed models: {', '.join(models)}"
