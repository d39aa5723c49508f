"""What `s2d doctor MODEL.onnx` finds in torch's own exports of encoders that are reported to collapse on NPUs.

    python benchmarks/onnx_causes.py [--json FILE]

Tiny random configurations of the same classes (no checkpoint can be downloaded here), with a padded batch of two. Each
is exported by torch.onnx.export, examined with that batch, and quantized to 8 bits by onnxruntime's quantizer at
its defaults, from torch's file and from the one that `s2d doctor --fix` writes: the distance of the outputs to full
precision on the same batch, in percent. Batch norms get the statistics of the batch, and MobileViT weights of a size
that keeps its signals alive: at the library's own its outputs are 0 in full precision too. Weights of trained models
have causes of their own (single large channels), which random ones cannot show.
"""

from __future__ import annotations

import argparse
import math
import tempfile
from pathlib import Path
from typing import Any

import torch
from peers.by_onnxruntime import by_onnxruntime

from s2d.errors import first_line
from s2d.export import onnx_doctor
from s2d.export.onnx import OnnxModel, tensors_of, write_onnx
from s2d.io.files import write_json
from s2d.io.provenance import run_metadata
from s2d.optional import require

_TEXT = {
    "vocab_size": 99, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48,
    "max_position_embeddings": 66, "pad_token_id": 0,
}  # fmt: skip
_RESNET = {"model_type": "rt_detr_resnet", "embedding_size": 8, "hidden_sizes": [8, 16, 24, 32], "depths": [1, 1, 1, 1],
           "out_features": ["stage2", "stage3", "stage4"]}  # fmt: skip
_RT_DETR = {
    "d_model": 32, "encoder_hidden_dim": 32, "decoder_ffn_dim": 48, "encoder_ffn_dim": 48, "num_queries": 10,
    "decoder_layers": 2, "decoder_attention_heads": 4, "encoder_attention_heads": 4,
    "decoder_in_channels": [32, 32, 32], "encoder_in_channels": [16, 24, 32], "num_labels": 4, "eval_size": None,
}  # fmt: skip
KINDS = ("mask", "stream", "activation", "channels", "shared", "opset")
MODELS: list[tuple[str, str, int, dict[str, Any]]] = [
    ("RobertaForSequenceClassification", "RobertaConfig", 0, _TEXT),
    ("DistilBertForSequenceClassification", "DistilBertConfig", 0,
     {"vocab_size": 99, "dim": 32, "n_layers": 2, "n_heads": 4, "hidden_dim": 48}),
    ("ViTForImageClassification", "ViTConfig", 32, {**_TEXT, "image_size": 32, "patch_size": 8}),
    ("MobileViTForImageClassification", "MobileViTConfig", 64,
     {"image_size": 64, "hidden_sizes": [16, 24, 32], "neck_hidden_sizes": [8, 8, 16, 16, 16, 16, 32],
      "num_attention_heads": 4, "initializer_range": 0.1}),
    ("RTDetrForObjectDetection", "RTDetrConfig", 64, _RT_DETR),
]  # fmt: skip


def build(
    model: str, config: str, side: int, options: dict[str, Any]
) -> tuple[torch.nn.Module, dict[str, torch.Tensor]]:
    """A tiny model, and a batch of two."""
    library = require("transformers", "hf")
    torch.manual_seed(0)
    if config == "RTDetrConfig":
        backbone = library.AutoConfig.for_model(**_RESNET)
        options = {**options, "backbone_config": backbone}
    made = getattr(library, model)(getattr(library, config)(**options)).eval()
    if side:
        pixels = torch.randn(2, 3, side, side)
        for module in made.modules():
            if isinstance(module, torch.nn.modules.batchnorm._BatchNorm):
                module.momentum = 1.0
        with torch.no_grad():
            made.train()(pixel_values=pixels)
        return made.eval(), {"pixel_values": pixels}
    mask = torch.ones(2, 12, dtype=torch.long)
    mask[1, 8:] = 0
    return made, {"input_ids": torch.randint(3, 99, (2, 12)) * mask, "attention_mask": mask}


def distance(found: Any, expected: Any) -> float:
    """How far the main outputs are apart, in percent of the expected ones' length."""
    a, b = (next(iter(tensors_of(each).values())).float() for each in (found, expected))
    return float(100.0 * (a - b).norm() / b.norm())


def record(model: str, what: str, metric: str, value: float) -> dict[str, Any]:
    """One cell of the table, in the report's schema."""
    where = {"task": "one random batch", "model": model, "conditioning": "none", "spec": "w8a8", "metric": metric}
    return {**where, "what": what, "value": value}


def main() -> None:
    """Export, examine, quantize, print a table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--json", type=Path)
    target = parser.parse_args().json
    records: list[dict[str, Any]] = []
    failed: list[str] = []
    with tempfile.TemporaryDirectory() as scratch:
        for name, config, side, options in MODELS:
            path = Path(scratch) / f"{name}.onnx"
            try:
                model, batch = build(name, config, side, options)
                write_onnx(model, batch, path, fixed=side > 0)
                feed = {name: value.numpy() for name, value in batch.items()}
                found = onnx_doctor.examine(onnx_doctor.open_file(path), feed, path)
                kinds = {kind: sum(each.kind == kind for each in found) for kind in KINDS}
                records += [record(name, f"{kind} found", "places", count) for kind, count in kinds.items()]
                whole = OnnxModel(path)(**batch)
                mended = path.with_suffix(".fixed.onnx")
                onnx_doctor.fix(path, mended, feed)
                for what, source in (("torch's file", path), ("fixed", mended)):
                    by_onnxruntime(source, path.with_suffix(".int8.onnx"), [feed])
                    value = distance(OnnxModel(path.with_suffix(".int8.onnx"))(**batch), whole)
                    if not math.isfinite(value):
                        raise ValueError(f"{what}: outputs that are not finite")
                    records.append(record(name, what, "distance", round(value, 2)))
            except Exception as error:  # exporters and quantizers have classes of their own
                failed.append(f"{name}: {type(error).__name__}: {first_line(error)}")
                print(failed[-1], flush=True)
            print(name, [(each["what"], each["value"]) for each in records if each["model"] == name], flush=True)
            if target:
                write_json(target, {"run": run_metadata(failed=failed), "records": records})


if __name__ == "__main__":
    main()
