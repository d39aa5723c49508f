"""The folder for compilers that quantize by themselves: what onnxruntime's own quantizer makes of it, and refusals."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tests import builders
from tests.quant import tiny_families
from torch import Tensor, nn

from s2d.errors import InputError

onnx = pytest.importorskip("onnx", reason='onnx is not installed: pip install "s2d[export]"')
runtime = pytest.importorskip("onnxruntime", reason='onnxruntime is not installed: pip install "s2d[export]"')

import s2d  # noqa: E402  (after the libraries that it needs)
from s2d.export.conditioned import export_conditioned, find_compiler, stack  # noqa: E402
from s2d.export.fixed_shapes import parse_shape  # noqa: E402


@pytest.fixture(scope="module")
def bert() -> nn.Module:
    options = {**tiny_families.SIZE, "vocab_size": 64, "attn_implementation": "sdpa"}
    torch.manual_seed(0)
    return tiny_families.liven(builders.transformers_model("BertForSequenceClassification", "BertConfig", options))


def texts(longest: int = 12) -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(0)
    batches = []
    for length in (longest, longest - 3, longest - 5):
        mask = torch.ones(8, length, dtype=torch.long)
        mask[::2, -3:] = 0
        ids = torch.randint(3, 64, (8, length), generator=generator) * mask
        batches.append({"input_ids": ids, "attention_mask": mask})
    return batches


@pytest.fixture(scope="module")
def written(bert: nn.Module, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("any") / "set"
    export_conditioned(bert, folder, compiler=find_compiler("any"), inputs=texts())
    return folder


def test_masks_are_bounded_and_nodes_stay_whole(written: Path, bert: nn.Module) -> None:
    model = onnx.load(written / "model.onnx")
    onnx.checker.check_model(model)
    kinds = [node.op_type for node in model.graph.node]
    assert kinds.count("LayerNormalization") == 5 and kinds.count("Gelu") == 2 and kinds.count("Softmax") == 2
    assert not model.graph.value_info and not any(node.metadata_props for node in model.graph.node)
    report = json.loads((written / "export.json").read_text())["export"]
    assert report["mask"] == 100.0 and report["outputs_moved"] < 1e-5 and report["rows"] == 24
    held, expected = np.load(written / "calibration.npz"), np.load(written / "expected.npz")
    assert held["input_ids"].shape == (24, 12) and held["attention_mask"][8:16, 9:].max() == 0
    with torch.no_grad():
        wanted = bert(**{name: torch.from_numpy(held[name][:16]) for name in held.files}).logits.numpy()
    np.testing.assert_allclose(expected["logits"], wanted, atol=1e-6)


def test_the_commands_of_the_page_quantize_it_with_onnxruntime(written: Path) -> None:
    commands = (written / "README.md").read_text().split("```bash\n")[1].split("\n```")[0].splitlines()
    assert commands[0].startswith("pip install") and len(commands) == 3
    for command in commands[1:]:
        done = subprocess.run(
            [sys.executable, *command.split()[1:]], cwd=written, capture_output=True, text=True, timeout=300, check=True
        )
    cosine = float(done.stdout.split("least ")[1])
    assert cosine > 0.97  # with the mask as torch writes it: below 0.9


def test_fixed_shapes_and_an_older_opset(bert: nn.Module, tmp_path: Path) -> None:
    report = export_conditioned(
        bert, tmp_path / "set", compiler=find_compiler("qnn"), inputs=texts(), shape={"batch": 1, "tokens": 16}
    )
    model = onnx.load(tmp_path / "set" / "model.onnx")
    assert model.opset_import[0].version == 17 == report.opset and report.shape == {"batch": 1, "tokens": 16}
    sizes = [[size.dim_value for size in each.type.tensor_type.shape.dim] for each in model.graph.input]
    assert sizes == [[1, 16], [1, 16]]
    lines = (tmp_path / "set" / "input_list.txt").read_text().splitlines()
    name, _, path = lines[3].split()[0].partition(":=")
    raw = np.fromfile(tmp_path / "set" / path, np.int32)
    assert len(lines) == 24 and np.array_equal(raw, np.load(tmp_path / "set" / "calibration.npz")[name][3])


def test_images_for_a_compiler_of_channels_last(tmp_path: Path) -> None:
    model = tiny_families.liven(
        builders.transformers_model("ViTForImageClassification", "ViTConfig", tiny_families.IMAGES)
    )
    images = [{"pixel_values": torch.randn(4, 3, 16, 16)}]
    report = export_conditioned(model, tmp_path / "set", compiler=find_compiler("hailo"), inputs=images)
    assert report.mask is None and report.shape == {"batch": 1}
    last = np.load(tmp_path / "set" / "calibration.npy")
    np.testing.assert_array_equal(last.transpose(0, 3, 1, 2), images[0]["pixel_values"].numpy())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"compiler": "qnn"}, r"qnn compiles fixed shapes; add --shape batch=1,tokens=128"),
        ({"shape": {"tokens": 8}}, r"an example has 12 tokens.*say tokens=12"),
        ({"shape": {"batch": 2}}, r"a batch alone fixes no length; add --shape batch=2,tokens=128"),
        ({"shape": {"batch": 90, "tokens": 16}}, r"24 examples are less than a batch of 90"),
        ({"inputs": []}, r"no examples"),
    ],
    ids=["free", "long", "batch", "few", "none"],
)
def test_bad_input_is_told_before_any_work(
    options: dict[str, Any], message: str, bert: nn.Module, tmp_path: Path
) -> None:
    given = {"compiler": "any", "inputs": texts(), **options}
    given["compiler"] = find_compiler(given["compiler"])
    with pytest.raises(InputError, match=message):
        export_conditioned(bert, tmp_path / "set", **given)
    assert list(tmp_path.iterdir()) == []


def test_other_bad_input(bert: nn.Module, tmp_path: Path) -> None:
    quantized = s2d.quantize(bert, "w8a8", calibration=texts())
    with pytest.raises(InputError, match="is quantized, and any quantizes by itself"):
        export_conditioned(quantized, tmp_path / "set", compiler=find_compiler("any"), inputs=texts())
    with pytest.raises(InputError, match=r"unknown runtime 'hailoo'.*hailo"):
        find_compiler("hailoo")
    with pytest.raises(InputError, match=r"gguf takes quantized files.*any, hailo, qnn, vitis"):
        find_compiler("gguf")
    for text in ("tokens", "tokens=0", "length=3", "batch=1;tokens=2"):
        with pytest.raises(InputError, match="as in --shape batch=1,tokens=128"):
            parse_shape(text)
    assert parse_shape("batch=1, tokens=128") == {"batch": 1, "tokens": 128} and parse_shape(None) == {}
    with pytest.raises(InputError, match="have no mask"):
        stack([{"input_ids": torch.ones(2, 3, dtype=torch.long)}], 5, {})
