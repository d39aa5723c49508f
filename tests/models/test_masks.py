"""Each mask on its own tokens: two towers, encoder and decoder, masks of any name; against batches without padding."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tests.quant.tiny_models import PlainTransformer
from torch import Tensor, nn

from s2d.models.masks import token_mask
from s2d.models.tracing import trace
from s2d.quant import planned, quantize, record
from s2d.quant.modules.sites import quantizers_of
from s2d.quant.spec import QuantSpec

transformers = pytest.importorskip("transformers")
SIZE = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 4}
TOKENS = 5  # as many as the image tower has: equal sizes tell nothing


def scales(model: nn.Module, batches: list[dict[str, Tensor]], part: str) -> dict[str, Tensor]:
    quantized = quantize(model, "w8a8", calibration=batches)
    return {q.name: q.scale for q in quantizers_of(quantized) if part in q.name and not q.name.endswith("weight")}


def padded(lengths: list[int], width: int) -> Tensor:
    draw = torch.Generator().manual_seed(3)
    ids = torch.randint(5, 90, (len(lengths), width), generator=draw)
    ids[:, 0] = 2  # also where CLIP looks for the end
    for row, length in zip(ids, lengths, strict=True):
        row[length:] = 0
    return ids


def clip() -> tuple[nn.Module, list[dict[str, Tensor]], list[dict[str, Tensor]]]:
    text = {**SIZE, "vocab_size": 100, "max_position_embeddings": 32, "eos_token_id": 2, "pad_token_id": 0}
    vision = {**SIZE, "image_size": 16, "patch_size": 8}
    config = transformers.CLIPConfig(text_config=text, vision_config=vision, projection_dim=16)
    lengths = [2, 3, TOKENS, 2]
    ids, pixels = (
        padded(lengths, TOKENS),
        torch.randn(4, 3, 16, 16) * torch.tensor([1.0, 9.0, 2.0, 5.0])[:, None, None, None],
    )
    whole = {"input_ids": ids, "attention_mask": (ids != 0).long(), "pixel_values": pixels}
    alone = [
        {"input_ids": ids[i : i + 1, :n], "attention_mask": torch.ones(1, n).long(), "pixel_values": pixels[i : i + 1]}
        for i, n in enumerate(lengths)
    ]
    return transformers.CLIPModel(config).eval(), [whole], alone


def t5() -> tuple[nn.Module, list[dict[str, Tensor]], list[dict[str, Tensor]]]:
    config = transformers.T5Config(vocab_size=100, d_model=32, d_kv=8, d_ff=64, num_layers=1, num_heads=4)
    lengths = [2, TOKENS, 3]
    ids, decoded = padded(lengths, TOKENS), torch.randint(5, 90, (3, TOKENS))
    whole = {"input_ids": ids, "attention_mask": (ids != 0).long(), "decoder_input_ids": decoded}
    alone = [{"input_ids": ids[i : i + 1, :n], "decoder_input_ids": decoded[i : i + 1]} for i, n in enumerate(lengths)]
    return transformers.T5Model(config).eval(), [whole], alone


@pytest.mark.parametrize(("make", "part"), [(clip, "vision_model"), (clip, "text_model"), (t5, "decoder."), (t5, "")])
def test_ranges_are_those_of_the_rows_without_padding(make: Any, part: str) -> None:
    torch.manual_seed(0)
    model, whole, alone = make()
    found, wanted = scales(model, whole, part), scales(model, alone, part)
    assert found.keys() == wanted.keys() and len(found) >= 10
    for name, scale in found.items():
        # float32 sums differ with the number of rows, by far less than padding would change a range
        torch.testing.assert_close(scale, wanted[name], rtol=1e-4, atol=0, msg=name)


def test_cross_attention_reads_the_tokens_of_the_other_side() -> None:
    model, (batch,), _ = t5()
    with token_mask(model, trace(model, batch)) as mask, torch.no_grad():
        model(**batch)
    cross, own = "decoder.block.0.layer.1.EncDecAttention", "decoder.block.0.layer.0.SelfAttention"
    real = batch["attention_mask"].bool()
    for where in ("k", "v"):
        found = mask(cross, where)  # type: ignore[arg-type]
        assert found is not None and torch.equal(found, real)
    assert mask(cross, "q") is None and mask(own, "k") is None and mask(f"{own}.q") is None


class Hidden(nn.Module):
    """A mask that is called by no usual name, True at padding."""

    def __init__(self) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 1, enable_nested_tensor=False)

    def forward(self, x: Tensor, left_out: Tensor) -> Tensor:
        return self.encoder(x, src_key_padding_mask=left_out)


@pytest.mark.parametrize("any_padding", [True, False])
def test_a_mask_is_known_by_what_it_does(any_padding: bool) -> None:
    model, left_out = Hidden().eval(), torch.zeros(3, 6, dtype=torch.bool)
    if any_padding:
        left_out[:, 4:] = True
    x = torch.randn(3, 6, 16)
    with token_mask(model, trace(model, (x, left_out))) as mask, torch.no_grad():
        model(x, left_out)
    found = mask("encoder.layers.0.linear1")
    assert torch.equal(found, ~left_out) if any_padding and found is not None else found is None


class Counted(PlainTransformer):
    forwards = 0

    def forward(self, x: Tensor) -> Tensor:
        type(self).forwards += 1
        return super().forward(x)


def test_one_forward_tells_all_that_a_quantize_asks() -> None:
    model, x = Counted().eval(), torch.randn(2, 7, 16)
    Counted.forwards = 0
    quantized = quantize(model, "w4a4", calibration=[x])
    assert Counted.forwards == 2  # the trace, and the calibration on one batch
    assert list(record(quantized).sites) == planned(model, QuantSpec.parse("w4a4"), [x])
