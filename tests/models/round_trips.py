"""Models written to disk with their outputs, and read back by another process.

``python -m tests.models.round_trips FOLDER all`` writes every family in every type, plain, conditioned and quantized
(stopped, it goes on where it was), and lets a fresh process compare; without ``all`` it compares what is there.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from tests.builders import library
from tests.quant.tiny_families import FAMILIES, Family, build, liven, tensors
from torch import Tensor, nn

import s2d
from s2d.checkpoint import load, save

TYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16, "fp64": torch.float64}
KINDS = ("plain", "conditioned", "quantized")
# Those that no library builds by a name have nothing to be described by.
NAMES = tuple(name for name in FAMILIES if name not in ("torch-pre-norm", "torch-post-norm", "plain", "open-clip"))
OPEN_CLIP = {
    "embed_dim": 16,
    "vision_cfg": {"image_size": 32, "patch_size": 16, "width": 64, "layers": 2},
    "text_cfg": {"context_length": 8, "vocab_size": 64, "width": 16, "heads": 2, "layers": 2},
}


def know_tiny_clip(folder: Path) -> None:
    """Let open_clip know a model of two small towers by the name ``s2d-tiny``."""
    library("open_clip", "openclip").add_model_config(write(folder / "s2d-tiny.json", json.dumps(OPEN_CLIP)))


def write(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return path


def tiny_clip(folder: Path, **options: Any) -> nn.Module:
    know_tiny_clip(folder)
    open_clip = library("open_clip", "openclip")
    torch.manual_seed(0)
    model = open_clip.create_model("s2d-tiny", pretrained=None, **options)
    model._s2d_open_clip_name = "s2d-tiny"  # as the loader of open_clip:NAME marks it
    return liven(model)


def tiny_timm(
    name: str = "vit_tiny_patch16_224", change: Callable[[Any], None] | None = None, **options: Any
) -> nn.Module:
    """A timm model made with constructor arguments, changed afterwards."""
    timm = library("timm", "timm")
    torch.manual_seed(0)
    model = timm.create_model(name, pretrained=False, **options)
    if change is not None:
        change(model)
    return liven(model)


def output(model: nn.Module, batch: dict[str, Any]) -> Tensor:
    """Everything the model gives, as one vector."""
    with torch.no_grad():
        return torch.cat([tensor.flatten() for tensor in tensors(model(**batch))])


def cast(batch: dict[str, Any], dtype: torch.dtype) -> dict[str, Any]:
    return {k: v.to(dtype) if isinstance(v, Tensor) and v.is_floating_point() else v for k, v in batch.items()}


def conditioned(model: nn.Module, batch: dict[str, Any]) -> nn.Module:
    """The model after one step with the decay attached, which is taken off again."""
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    decay = s2d.SelectiveSpectralDecay(model, optimizer, strength=0.5, threshold=0.0, outlier_ratio=0.0)
    # Random convolutions end at 1e12: a bounded loss leaves the step to the decay there.
    torch.cat([tensor.flatten() for tensor in tensors(model(**batch))]).tanh().square().mean().backward()
    optimizer.step()
    decay.remove()
    optimizer.zero_grad()
    return model.eval()


def record(model: nn.Module, batch: dict[str, Any], folder: Path) -> None:
    """Save a model, and beside it a batch and what the model makes of it."""
    save(model, folder / "model")
    torch.save({"batch": batch, "output": output(model, batch)}, folder / "expected.pt")


def record_family(name: str, dtype: str, kinds: Iterable[str], folder: Path) -> None:
    for kind in kinds:
        case: Family = build(name)
        model = conditioned(case.model, case.batches[0]) if kind == "conditioned" else case.model
        model, batches = model.to(TYPES[dtype]), [cast(batch, TYPES[dtype]) for batch in case.batches]
        if kind == "quantized":
            model = s2d.quantize(model, {"base": "w4a8", "attention": "keep"}, calibration=batches)
        record(model, batches[0], folder / f"{name}-{dtype}-{kind}")


def check(folder: Path) -> dict[str, str]:
    """Load every model of `record` below a folder: what came out wrong, by name."""
    wrong = {}
    if (folder / "s2d-tiny.json").is_file():
        library("open_clip", "openclip").add_model_config(folder / "s2d-tiny.json")
    for path in sorted(folder.glob("*/expected.pt")):
        expected = torch.load(path, weights_only=True)
        try:
            found = output(load(path.parent / "model").model, expected["batch"])
        except Exception as error:  # whatever it is, it is listed
            wrong[path.parent.name] = f"{type(error).__name__}: {error}"
            continue
        same = found.dtype == expected["output"].dtype and torch.equal(found, expected["output"])
        if not same or not bool(found.isfinite().all()):
            wrong[path.parent.name] = f"{found.dtype}, off by {float((found - expected['output']).abs().max()):.1e}"
    return wrong


def write_all(folder: Path) -> None:
    """Every family in every type, plain, conditioned and quantized; what is there already stays."""
    for name in NAMES:
        for dtype in TYPES:
            for kind in KINDS:
                if not (folder / f"{name}-{dtype}-{kind}" / "expected.pt").is_file():
                    try:
                        record_family(name, dtype, (kind,), folder)
                    except Exception as error:  # a library that does not compute in this type
                        print(f"| {name} | {dtype} | {kind} | {type(error).__name__}: {str(error)[:120]} |", flush=True)


if __name__ == "__main__":
    torch.set_num_threads(1)
    place = Path(sys.argv[1])
    if sys.argv[2:] == ["all"]:
        write_all(place)
        sys.exit(subprocess.call([sys.executable, "-m", "tests.models.round_trips", str(place)]))
    found = check(place)
    print(f"{len(list(place.glob('*/expected.pt')))} models, {len(found)} other than they were: {json.dumps(found)}")
    sys.exit(bool(found))
