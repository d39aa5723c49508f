"""Saved is what was in memory: the same bits come out of another process, for every family, type and kind of model.

``python -m tests.models.round_trips FOLDER all`` runs every family in every type; here each kind of a family has one.
"""

from __future__ import annotations

import copy
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.builders import library
from tests.models.round_trips import (
    KINDS,
    NAMES,
    TYPES,
    conditioned,
    output,
    record,
    record_family,
    tiny_clip,
    tiny_timm,
)
from torch import nn

import s2d
from s2d.checkpoint import load, save
from s2d.errors import InputError

ROOT = Path(__file__).parents[2]
SMALL = {"img_size": 32, "patch_size": 16, "embed_dim": 48, "num_heads": 3, "num_classes": 5}
IMAGES = {"x": torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))}


def in_another_process(folder: Path) -> dict[str, str]:
    """What `round_trips.check` finds wrong, in a fresh interpreter."""
    code = (
        "from s2d.optional import declare_missing_operators as d; d(); import sys, json; "
        "import torch; torch.set_num_threads(1); from pathlib import Path; "
        "from tests.models.round_trips import check; print(json.dumps(check(Path(sys.argv[1]))))"
    )
    env = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path])}
    command = [sys.executable, "-c", code, str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False, env=env)
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.fixture(autouse=True)
def one_thread() -> Any:
    before = torch.get_num_threads()
    torch.set_num_threads(1)  # as the other process: sums come in the same order
    yield
    torch.set_num_threads(before)


@pytest.mark.timeout(600)
def test_every_family_comes_back_bit_for_bit(tmp_path: Path) -> None:
    library("transformers", "hf")
    library("timm", "timm")
    types = list(TYPES)
    for number, name in enumerate(NAMES):
        for shift, kind in enumerate(KINDS):
            record_family(name, types[(number + shift) % len(types)], (kind,), tmp_path)
    assert len(list(tmp_path.glob("*/expected.pt"))) == len(NAMES) * len(KINDS)
    assert in_another_process(tmp_path) == {}


def no_head(model: Any) -> None:
    model.reset_classifier(0)


def average(model: Any) -> None:
    model.reset_classifier(7, "avg")


def other_head(model: Any) -> None:
    model.head = nn.Sequential(
        nn.LayerNorm(model.num_features), nn.GELU(), nn.Linear(model.num_features, 4, bias=False)
    )


def tied_blocks(model: Any) -> None:
    model.blocks[-1].mlp.fc1.weight = model.blocks[0].mlp.fc1.weight


@st.composite
def vits(draw: Any) -> dict[str, Any]:
    """Arguments of a timm ViT, what is changed afterwards, what is done with it, and its type."""
    heads, pool = draw(st.sampled_from([1, 2, 3])), draw(st.sampled_from(["token", "avg", "map"]))
    options = {
        "img_size": 32,
        "patch_size": draw(st.sampled_from([8, 16])),
        "embed_dim": 16 * heads,
        "num_heads": heads,
        "depth": draw(st.integers(1, 3)),
        "mlp_ratio": draw(st.sampled_from([1.0, 2.5, 4.0])),
        "num_classes": draw(st.sampled_from([0, 1, 5])),
        "qkv_bias": draw(st.booleans()),
        "qk_norm": draw(st.booleans()),
        "init_values": draw(st.sampled_from([None, 0.3])),
        "act_layer": draw(st.sampled_from([None, "silu", "relu"])),
        "norm_layer": draw(st.sampled_from([None, "rmsnorm"])),
        "reg_tokens": draw(st.sampled_from([0, 2])),
        "class_token": pool == "token" or draw(st.booleans()),
        "global_pool": pool,
    }
    changes = [None, no_head, other_head, tied_blocks, *([average] if pool == "avg" else [])]
    return {
        "options": options,
        "change": draw(st.sampled_from(changes)),
        "kind": draw(st.sampled_from(KINDS)),
        "dtype": draw(st.sampled_from(list(TYPES))),
    }


@pytest.mark.timeout(600)
def test_whatever_a_timm_model_is_made_of_comes_back_bit_for_bit(tmp_path: Path) -> None:
    made: list[dict[str, Any]] = []

    @settings(max_examples=25, deadline=None, derandomize=True)
    @given(vits())
    def write_down(case: dict[str, Any]) -> None:
        model, dtype = tiny_timm(change=case["change"], **case["options"]), TYPES[case["dtype"]]
        model = (conditioned(model, IMAGES) if case["kind"] == "conditioned" else model).to(dtype)
        batch = {key: value.to(dtype) for key, value in IMAGES.items()}
        if case["kind"] == "quantized":
            model = s2d.quantize(model, {"base": "w8a8", "attention": "keep"}, calibration=[batch])
        record(model, batch, tmp_path / str(len(made)))
        made.append(case)

    write_down()
    wrong = in_another_process(tmp_path)
    assert not wrong, [(made[int(name)], text) for name, text in wrong.items()]


def shorter(model: Any) -> None:
    model.blocks = model.blocks[:2]


def exchanged(model: Any) -> None:
    """A block of another class with children of the same names; an attention that keeps what it computed."""
    from timm.models import efficientformer, vision_transformer

    model.blocks[0] = vision_transformer.ResPostBlock(48, 3)
    model.blocks[1] = nn.Sequential(efficientformer.Attention(48, key_dim=8, num_heads=3, attn_ratio=2, resolution=2))


ODD: dict[str, Any] = {
    "exchanged": lambda: tiny_timm(change=exchanged, class_token=False, global_pool="avg", depth=2, **SMALL),
    "deeper": lambda: tiny_timm(depth=14, qkv_bias=False, **SMALL),
    "cut": lambda: tiny_timm(change=shorter, **SMALL),
    "swin": lambda: tiny_timm(
        "swin_tiny_patch4_window7_224", img_size=32, window_size=4, embed_dim=24, depths=(1, 1), num_heads=(2, 4)
    ),
    "convolutions": lambda: tiny_timm("resnet18", num_classes=3, act_layer="gelu"),
}


@pytest.mark.timeout(600)
def test_timm_models_of_other_kinds_and_cut_afterwards(tmp_path: Path) -> None:
    for name, make in ODD.items():
        record(make(), IMAGES, tmp_path / f"{name}-plain")
        batch = {key: value.bfloat16() for key, value in IMAGES.items()}
        record(conditioned(make(), IMAGES).bfloat16(), batch, tmp_path / f"{name}-bf16")
        spec = {"*": "w8a8"} if name == "convolutions" else {}  # they are quantized where they are named
        spec = {"base": "w8a8", "attention": "keep", "overrides": spec}
        quantized = s2d.quantize(make(), spec, calibration=[IMAGES])
        record(quantized, IMAGES, tmp_path / f"{name}-quantized")
    assert in_another_process(tmp_path) == {}


@pytest.mark.timeout(600)
def test_open_clip_models_whose_activation_their_name_does_not_say(tmp_path: Path) -> None:
    batch = {"image": IMAGES["x"], "text": torch.randint(1, 60, (2, 8), generator=torch.Generator().manual_seed(0))}
    for quick in (False, True):
        model = tiny_clip(tmp_path, force_quick_gelu=quick)
        record(model, batch, tmp_path / f"plain-{quick}")
        record(
            s2d.quantize(model, {"base": "w8a8", "attention": "keep"}, calibration=[batch]),
            batch,
            tmp_path / f"q-{quick}",
        )
    expected = [torch.load(tmp_path / f"plain-{quick}/expected.pt")["output"] for quick in (False, True)]
    assert not torch.equal(*expected)  # the activation counts
    assert in_another_process(tmp_path) == {}


def llama(tied: bool) -> nn.Module:
    transformers = library("transformers", "hf")
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = transformers.LlamaConfig(**sizes, vocab_size=50, tie_word_embeddings=tied)
    return transformers.LlamaForCausalLM(config).eval()


@pytest.mark.parametrize("quantized", [False, True])
@pytest.mark.parametrize("tied", [False, True])
def test_heads_tied_and_untied_against_their_configuration(tied: bool, quantized: bool, tmp_path: Path) -> None:
    model: Any = llama(tied)
    if tied:
        model.lm_head.weight = nn.Parameter(model.lm_head.weight.detach() * 2)
    else:
        model.lm_head.weight = model.model.embed_tokens.weight
    batch = {"input_ids": torch.randint(0, 50, (2, 6), generator=torch.Generator().manual_seed(0)), "use_cache": False}
    if quantized:
        model = s2d.quantize(model, {"base": "w8a8", "attention": "keep"}, calibration=[batch])
    save(model, tmp_path / "m")
    back: Any = load(tmp_path / "m").model
    assert torch.equal(output(back, batch), output(model, batch))
    assert (back.lm_head.weight is back.model.embed_tokens.weight) == (not tied)


def test_the_attention_that_was_chosen_comes_back(tmp_path: Path) -> None:
    for kind in ("eager", "sdpa"):
        model: Any = llama(False)
        model.set_attn_implementation(kind)
        save(model, tmp_path / kind)
        assert load(tmp_path / kind).model.config._attn_implementation == kind


def test_a_type_that_is_asked_for_converts(tmp_path: Path) -> None:
    save(llama(False).bfloat16(), tmp_path / "m")
    assert load(tmp_path / "m").model.dtype == torch.bfloat16
    assert load(tmp_path / "m", dtype=torch.float32).model.dtype == torch.float32


def test_what_cannot_be_written_down_is_refused_by_name(tmp_path: Path) -> None:
    class Mine(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x

    for change, message in (
        (lambda model: setattr(model, "head", Mine()), "head is a Mine"),
        (lambda model: setattr(model.blocks[0], "hint", object()), "blocks.0.hint is a object"),
    ):
        with pytest.raises(InputError, match=message):
            save(tiny_timm(change=change, **SMALL), tmp_path / "m")
    assert not (tmp_path / "m").exists()


def test_a_description_names_layers_only(tmp_path: Path) -> None:
    save(tiny_timm(act_layer="silu", **SMALL), tmp_path / "m")
    path = tmp_path / "m" / "s2d_config.json"
    content = json.loads(path.read_text())
    for name in (
        "os:system",
        "builtins:eval",
        "timm.models:create_model",
        "torch.nn.modules.module:os",
        "torch.hub:load",
    ):
        bad = copy.deepcopy(content)
        bad["model"]["changes"]["blocks.0.mlp.act"]["class"] = name
        path.write_text(json.dumps(bad))
        with pytest.raises(InputError, match="which is no layer"):
            load(tmp_path / "m")


def test_an_infinity_in_the_configuration_comes_back(tmp_path: Path) -> None:
    transformers = library("transformers", "hf")
    config = transformers.Mamba2Config(
        vocab_size=60, hidden_size=16, num_hidden_layers=1, state_size=8, num_heads=4, head_dim=8, n_groups=2,
        chunk_size=4,
    )  # fmt: skip
    torch.manual_seed(0)
    model, batch = transformers.Mamba2ForCausalLM(config).eval(), {"input_ids": torch.arange(16).reshape(2, 8)}
    quantized = s2d.quantize(model, "w8a8", calibration=[batch])
    save(quantized, tmp_path / "q")
    loaded: Any = load(tmp_path / "q").model
    assert tuple(loaded.config.time_step_limit) == (0.0, float("inf"))
    with torch.no_grad():
        assert torch.equal(loaded(**batch).logits, quantized(**batch).logits)
