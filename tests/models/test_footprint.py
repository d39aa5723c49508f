"""What a model will take is known from its files, close to what it does take, and refused before it is loaded."""

from __future__ import annotations

import importlib
import pkgutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.tiny_text import make_data, make_model

from s2d import checkpoint
from s2d.cli import main
from s2d.errors import InputError
from s2d.models import footprint, load, save_model

pytest.importorskip("transformers")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("model") / "bert")


def numbers(shapes: footprint.Shapes | None) -> int:
    assert shapes is not None
    return sum(torch.Size(shape).numel() for shape in shapes.values())


def test_shapes_are_those_of_the_model(folder: Path, tmp_path: Path) -> None:
    loaded = load(folder)
    assert numbers(footprint.shapes_of(folder)) == sum(p.numel() for p in loaded.model.parameters())
    save_model(loaded.model, tmp_path / "saved")
    assert numbers(footprint.shapes_of(tmp_path / "saved")) == numbers(footprint.shapes_of(folder))
    assert (
        footprint.shapes_of("timm:vit_tiny_patch16_224") is None
        and footprint.shapes_of("some/model-on-the-hub") is None
    )


def test_a_model_is_introduced_before_it_is_loaded(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    count = sum(p.numel() for p in load(folder).model.parameters())
    told = footprint.introduction(str(folder))
    assert told == f"{folder}: {footprint.size_text(count)}"
    assert footprint.introduction("timm:vit_tiny_patch16_224") is None
    assert footprint.size_text(22_565_376) == "22.6 million numbers" and footprint.size_text(180) == "180 numbers"
    assert main(["audit", str(folder), "--graph"]) == 0
    assert capsys.readouterr().out.startswith(told)


def test_matrices_of_a_gguf_are_out_by_in(tmp_path: Path) -> None:
    write_gguf(tmp_path / "m.gguf", "llama")
    shapes = footprint.shapes_of(tmp_path / "m.gguf")
    assert shapes is not None and shapes["blk.0.ffn_down.weight"] == (32, 64)
    assert numbers(shapes) == 16 * 32 + 32 + 4 * 32 * 32 + 3 * 64 * 32 + 2 * 32


def test_training_takes_five_copies_and_what_grows_with_the_batch() -> None:
    shapes = {"model.embed_tokens.weight": (50_000, 64), "layers.0.fc1.weight": (256, 64), "norm.weight": (64,)}
    small, large = (footprint.to_train(shapes, tokens) for tokens in (100, 200))
    weights = 4 * (50_000 * 64 + 256 * 64 + 64)
    parts = small.parts
    assert parts["weights"] + parts["gradients"] + parts["optimizer"] + parts["original"] == 5 * weights
    grown = {name for name, size in large.parts.items() if size > parts[name]}
    assert grown == {"activations"} and large.parts["activations"] == 2 * parts["activations"]
    assert parts["refresh"] < weights / 50, "skinny matrices"
    beside = footprint.to_train(shapes, 100, quantized=True)
    assert beside.parts["original"] == 2 * weights and beside.total > small.total + weights


def test_block_by_block_only_the_weights_grow_with_the_depth() -> None:
    shapes = {"embed.weight": (5_000, 64)}
    deep = {f"layers.{i}.{name}.weight": (256, 64) for i in range(40) for name in ("fc1", "fc2")}
    shallow = {name: shape for name, shape in deep.items() if name.startswith("layers.0.")}
    few, many = (footprint.to_train_blocks({**shapes, **each}, 100, 4).parts for each in (shallow, deep))
    assert {name for name, size in many.items() if size != few[name]} == {"weights"}
    assert few["gradients"] + few["optimizer"] == 3 * 2 * 4 * 256 * 64
    assert few["tokens"] == 3 * 4 * 100 * 64 * 4, "three streams of so many tokens"


@pytest.mark.parametrize(
    ("arguments", "doing"),
    [
        (("condition", "--out", "x"), "conditioning"),
        (("evaluate",), "evaluating"),
        (("quantize", "--spec", "w8a8", "--out", "x"), "quantizing"),
        (("quantize", "--steps", "9", "--out", "x"), "training"),
    ],
)
def test_too_little_memory_is_one_line_before_any_load(
    arguments: tuple[str, ...],
    doing: str,
    folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    data = make_data(tmp_path / "data")
    monkeypatch.setattr(footprint, "available", lambda device: 100 * 2**20)

    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("it was loaded")

    for package in ("s2d.commands", "s2d.experiments"):  # a module that is imported while `load` is replaced keeps it
        for module in pkgutil.iter_modules(importlib.import_module(package).__path__, f"{package}."):
            importlib.import_module(module.name)
    original = checkpoint.load
    for module in [each for name, each in sys.modules.items() if name.startswith("s2d.")]:
        if getattr(module, "load", None) is original:
            monkeypatch.setattr(module, "load", refuse)
    command, *rest = arguments
    assert main([command, str(folder), "--task", "text-classification", "--data", str(data), *rest]) == 2
    printed = capsys.readouterr().err.strip().splitlines()
    assert len(printed) == 1 and f"too little memory: {doing} {folder} takes about 0." in printed[0]
    assert "and 0.1 GB are free; use a smaller model or batch" in printed[0]
    assert not (tmp_path / "x").exists()


def test_what_is_free_is_known_here() -> None:
    free = footprint.available()
    assert free is not None and 2**20 < free < 2**50


def write_gguf(path: Path, architecture: str, kind: Any = None) -> None:
    """A one-block decoder; of its blocks' matrices all zeros in a quantized type, if one is given."""
    gguf = pytest.importorskip("gguf")
    writer = gguf.GGUFWriter(path, architecture)
    for add, value in (
        (writer.add_block_count, 1), (writer.add_context_length, 32), (writer.add_embedding_length, 32),
        (writer.add_feed_forward_length, 64), (writer.add_head_count, 2), (writer.add_head_count_kv, 2),
        (writer.add_layer_norm_rms_eps, 1e-5), (writer.add_vocab_size, 16), (writer.add_tokenizer_model, "gpt2"),
        (writer.add_token_list, [f"t{i}" for i in range(16)]), (writer.add_token_types, [1] * 16),
        (writer.add_token_merges, []),
    ):  # fmt: skip
        add(value)
    square, up, vector = (32, 32), (64, 32), (32,)
    block = {f"attn_{name}": square for name in ("q", "k", "v", "output")} | {"ffn_gate": up, "ffn_up": up}
    block |= {"ffn_down": (32, 64), "attn_norm": vector, "ffn_norm": vector}
    tensors = {"token_embd": (16, 32), "output_norm": vector, **{f"blk.0.{name}": size for name, size in block.items()}}
    for name, shape in tensors.items():
        if kind is not None and len(shape) == 2 and name.startswith("blk"):
            size, stored = gguf.GGML_QUANT_SIZES[kind]
            values = torch.zeros(shape[0], shape[1] // size * stored, dtype=torch.uint8).numpy()
            writer.add_tensor(f"{name}.weight", values, raw_dtype=kind)
        else:
            writer.add_tensor(f"{name}.weight", torch.randn(shape).numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def test_a_gguf_of_an_unsupported_type_is_one_line(tmp_path: Path) -> None:
    gguf = pytest.importorskip("gguf")
    (tmp_path / "odd").mkdir()
    write_gguf(tmp_path / "odd" / "m.gguf", "foonet")
    with pytest.raises(InputError, match="architecture foonet is not supported yet. Take the model's original weights"):
        load(tmp_path / "odd" / "m.gguf")
    write_gguf(tmp_path / "m.gguf", "llama", gguf.GGMLQuantizationType.Q8_1)
    with pytest.raises(InputError, match="of the GGUF type Q8_1, which cannot be read; take a file of another type"):
        load(tmp_path / "m.gguf")
    whole = (tmp_path / "m.gguf").read_bytes()
    (tmp_path / "cut.gguf").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(InputError, match="cut.gguf"):
        footprint.shapes_of(tmp_path / "cut.gguf")
