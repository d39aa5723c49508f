"""Models with random weights: ``new:NAME`` builds one from a packaged configuration, ``new:FILE`` from one's own.

They serve for training from scratch, and for an offline test of a recipe with a tiny model of the same architecture. A
configuration is a JSON file: ``config`` is transformers' own (with ``model_type`` and ``architectures``), ``image`` the
preprocessing (a transformers image processor's settings), and ``bytes: true`` asks for a tokenizer whose tokens are the
bytes of the text. ``new:NAME?seed=1`` draws other weights; ``new:NAME?tower=FOLDER`` takes the weights of the image
tower from a saved model of the same shape, which starts a model of images and words from a trained image encoder.
``new:timm:NAME`` and ``new:open_clip:NAME`` are the architectures of those libraries.
"""

from __future__ import annotations

import importlib.resources
from pathlib import Path
from typing import Any

import torch
from torch import nn

from s2d.errors import InputError, choices
from s2d.io.files import parse_json
from s2d.models.family import makers, register_loader
from s2d.models.image_heads import image_encoder
from s2d.models.preprocessing import Preprocessing
from s2d.models.saved import CONFIG_NAME, load_saved, refuse_foreign_code
from s2d.optional import require

_SPECIAL = ("<pad>", "<bos>", "<unk>", "<eos>")  # CLIP reads an end token of number 2 as "the largest"


def configurations() -> list[str]:
    """Names of the packaged configurations."""
    return sorted(f.name.removesuffix(".json") for f in _shelf().iterdir() if f.name.endswith(".json"))


@register_loader("new")
def load_new(name: str, options: dict[str, Any]) -> tuple[nn.Module, Any, Any]:
    """A model with random weights, and its tokenizer and preprocessing where its configuration asks for them."""
    name, _, query = name.partition("?")
    options_given = _query(query, name)
    seed = int(options_given.get("seed", 0))
    library, _, rest = name.partition(":")
    if (maker := makers().get(library)) is not None:
        if "tower" in options_given:
            raise InputError(f"new:{name}: tower= fills models of transformers only; leave it out")
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            return maker(rest)
    content = _read(name)
    transformers = require("transformers", "hf")
    try:
        config = transformers.AutoConfig.for_model(**content["config"])
        refuse_foreign_code(config, f"new:{name}")
        architecture = content["config"]["architectures"][0]
        kind = getattr(transformers, architecture)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            model = kind(config)
    except InputError:
        raise
    except (KeyError, TypeError, ValueError, AttributeError, IndexError) as error:
        raise InputError(f"new:{name}: transformers cannot build this configuration: {error}") from error
    if "tower" in options_given:
        _fill_tower(model, options_given["tower"], f"new:{name}")
    image = content.get("image")
    try:
        preprocessing = None if image is None else Preprocessing(**{k: _plain(v) for k, v in image.items()})
    except TypeError as error:
        raise InputError(f"new:{name}: the settings under image are wrong: {error}") from error
    return model, byte_tokenizer() if content.get("bytes") else None, preprocessing


def byte_tokenizer(max_length: int = 2048) -> Any:
    """A fast transformers tokenizer of 256 bytes and four special tokens; it ends every text with ``<eos>``.

    Ids: ``<pad>`` 0, ``<bos>`` 1, ``<unk>`` 2, ``<eos>`` 3, then the bytes.
    """
    tokenizers = require("tokenizers", "hf")
    transformers = require("transformers", "hf")
    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: number for number, token in enumerate([*_SPECIAL, *alphabet])}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE(vocab=vocabulary, merges=[], unk_token="<unk>"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    tokenizer.post_processor = tokenizers.processors.TemplateProcessing(
        single="$A <eos>", special_tokens=[("<eos>", 3)]
    )
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        bos_token="<bos>",
        eos_token="<eos>",
        unk_token="<unk>",
        model_max_length=max_length,
        padding_side="right",
    )


def _query(query: str, name: str) -> dict[str, str]:
    found: dict[str, str] = {}
    for part in query.split("&") if query else ():
        key, _, value = part.partition("=")
        if key not in ("seed", "tower") or not value or (key == "seed" and not value.isdecimal()):
            raise InputError(f"new:{name}?{part}: give seed=NUMBER or tower=FOLDER, as in new:{name}?seed=1")
        found[key] = value
    return found


def _fill_tower(model: nn.Module, folder: str, shown: str) -> None:
    """Copy the weights of a saved image encoder into a model's image tower.

    Raises:
        InputError: There is no image tower, or it is of another shape.
    """
    towers = {name.rpartition(".")[2]: module for name, module in model.named_modules()}
    tower = towers.get("vision_tower", towers.get("vision_model"))
    if tower is None:
        raise InputError(f"{shown} has no image tower to fill; leave out tower=")
    if not (Path(folder) / CONFIG_NAME).is_file():
        raise InputError(f"{shown}: tower={folder} is not a folder saved by s2d")
    given = image_encoder(load_saved(Path(folder))).state_dict()
    own = tower.state_dict()
    common = {name: tensor for name, tensor in given.items() if name in own and own[name].shape == tensor.shape}
    missing = [name for name in own if name not in common and not name.startswith("pooler")]
    if missing:
        raise InputError(f"{shown}: {folder} is no image tower of this shape; it lacks a fitting {missing[0]}")
    tower.load_state_dict(common, strict=False)


def _shelf() -> Any:
    return importlib.resources.files("s2d") / "models" / "configs"


def _read(name: str) -> dict[str, Any]:
    path = Path(name).expanduser()
    if path.suffix == ".json" or path.is_file():
        if not path.is_file():
            raise InputError(
                f"there is no configuration file {name!r}; check the path, or take {', '.join(configurations())}"
            )
        text = path.read_text(encoding="utf-8", errors="replace")
    elif name in configurations():
        text = (_shelf() / f"{name}.json").read_text(encoding="utf-8")
    else:
        raise InputError(
            f"there is no configuration new:{name}; {choices(name, configurations())} (or name a .json file)"
        )
    try:
        content = parse_json(text)
    except ValueError as error:
        raise InputError(f"new:{name} is not JSON: {error}") from None
    if not isinstance(content, dict) or not isinstance(content.get("config"), dict):
        raise InputError(f'new:{name} should hold an object with transformers\' configuration under "config"')
    return content


def _plain(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value
