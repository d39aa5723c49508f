"""``s2d quantize``: dry run, JSON file, saved folder and loaded model list the same sites; the quantizers exist."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from tests.tiny_images import CLASSES, make_folders
from tests.tiny_text import make_model, make_texts

import s2d
from s2d.cli import main
from s2d.optional import declare_missing_operators
from s2d.quant.modules.sites import described
from s2d.quant.numerics.quantizer import Quantizer

transformers: Any = pytest.importorskip("transformers")
declare_missing_operators()


def pictures(folder: Path) -> tuple[str, ...]:
    """A ViT with its preparation of images, and pictures of its classes."""
    names = dict(enumerate(CLASSES))
    config = transformers.ViTConfig(
        image_size=16, patch_size=4, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
        id2label=names, label2id={name: number for number, name in names.items()},
    )  # fmt: skip
    transformers.ViTForImageClassification(config).save_pretrained(folder / "model")
    size = {"height": 16, "width": 16}
    transformers.ViTImageProcessorPil(size=size).save_pretrained(folder / "model")
    data = make_folders(folder / "data", {"train": 3, "test": 2})
    return "--task", "image-classification", "--data", str(data)


def experts(folder: Path) -> tuple[str, ...]:
    """A Mixtral, its tokenizer, and lines of words."""
    make_model(folder / "tokens")
    config = transformers.MixtralConfig(
        vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, num_local_experts=4, num_experts_per_tok=2, max_position_embeddings=64,
    )  # fmt: skip
    transformers.MixtralForCausalLM(config).save_pretrained(folder / "model")
    transformers.AutoTokenizer.from_pretrained(folder / "tokens").save_pretrained(folder / "model")
    (folder / "data").mkdir()
    for split in ("train", "validation", "test"):
        make_texts(folder / "data" / f"{split}.txt", 100)
    return "--task", "language-modeling", "--data", str(folder / "data"), "-o", "task.window=16"


@pytest.mark.parametrize(
    ("made", "method", "kept"),
    [
        (pictures, "rotation+gptq", {"vit.embeddings.patch_embeddings.projection", "classifier"}),
        (experts, "repq", {"lm_head", "model.layers.0.mlp.gate", "model.layers.1.mlp.gate"}),
    ],
)
def test_the_plan_is_what_is_executed(tmp_path: Path, made: Any, method: str, kept: set[str]) -> None:
    task = made(tmp_path)
    asked, told, out = tmp_path / "asked.json", tmp_path / "told.json", tmp_path / "out"
    common = ("quantize", str(tmp_path / "model"), "--spec", "w4a8", "--method", method, *task, "-q")
    few = ("-o", "quantize.calibration.samples=4")
    assert main([*common, *few, "--dry-run", "--json", str(asked)]) == 0
    assert main([*common, *few, "--out", str(out), "--json", str(told)]) == 0
    plan = json.loads(asked.read_text())["plan"]
    assert json.loads(told.read_text())["plan"] == plan
    assert json.loads((out / "quantization.json").read_text())["sites"] == plan
    model = s2d.load(str(out)).model
    assert json.loads(json.dumps([described(site) for site in s2d.quant.record(model).sites])) == plan
    quantized = [site for site in plan if site["format"]]
    assert sum(isinstance(module, Quantizer) for module in model.modules()) == len(quantized)
    left = [site for site in plan if not site["format"]]
    assert {site["module"].removeprefix("encoder.") for site in left if site["what"] == "weight"} == kept
    assert all(site["reason"] for site in left)
    routers = [site["reason"] for site in left if site["module"].endswith(".gate")]
    assert all(reason.startswith("a parameter that MixtralTopKRouter multiplies by itself") for reason in routers)
    assert all("products)" in site["reason"] for site in left if site["what"] == "weight")


@pytest.mark.parametrize(
    ("method", "why"),
    [
        ("rotation+gptq", "rotation does not find one norm1, its readers and proj in transformer.h.0"),
        ("svdquant", "svdquant finds no quantized Linear of at least 4 inputs and outputs"),
        ("svdquant+awq", "awq changes weights of which svdquant has taken a part out"),
    ],
)
@pytest.mark.parametrize("data", [True, False], ids=["data", "no data"])
def test_a_dry_run_refuses_what_the_run_refuses(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], method: str, why: str, data: bool
) -> None:
    make_model(tmp_path / "tokens")
    config = transformers.GPT2Config(vocab_size=64, n_embd=32, n_layer=2, n_head=4, n_positions=64)
    transformers.GPT2LMHeadModel(config).save_pretrained(tmp_path / "model")
    transformers.AutoTokenizer.from_pretrained(tmp_path / "tokens").save_pretrained(tmp_path / "model")
    make_texts(tmp_path / "lines.txt", 20)
    given = ("--data", str(tmp_path / "lines.txt")) if data else ()
    lines = []
    for end in (("--dry-run",), ("--out", str(tmp_path / "out"))):
        assert main(["quantize", str(tmp_path / "model"), "--spec", "w4a8", "--method", method, *given, *end]) == 2
        lines.append([line for line in capsys.readouterr().err.splitlines() if line.startswith("s2d:")])
    assert lines[0] == lines[1] and why in lines[0][-1] and not (tmp_path / "out").exists()
