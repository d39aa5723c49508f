"""The original teaches along: what is compared, and what cannot be."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tests.tiny_text import make_data, make_model

from s2d.anchor import Anchor
from s2d.errors import InputError
from s2d.models import Loaded, load
from s2d.tasks import create

pytest.importorskip("transformers")


@pytest.fixture(scope="module")
def loaded(tmp_path_factory: pytest.TempPathFactory) -> Loaded:
    return load(make_model(tmp_path_factory.mktemp("model") / "bert"))


def test_outputs_alone_are_their_squared_distance_as_a_share_of_their_spread(loaded: Loaded) -> None:
    task = create("docstrings", train=128, validation=12, test=12, packages=["stdlib"], document_length=24)
    model = task.build(loaded)
    with torch.no_grad():
        original = [
            model.eval()(**inputs) for batch in task.batches("train", batch_size=128) for inputs in task.inputs(batch)
        ]
    anchor = Anchor(model, task, 2.0, features=False)
    inputs = task.inputs(next(task.batches("validation", batch_size=12)))[0]
    with torch.no_grad():
        before = model(**inputs)
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(0)))
    now = model.train()(**inputs)
    found = anchor.loss()
    everything = torch.cat(original)
    spread = (everything - everything.mean(0)).square().sum(-1).mean()
    expected = 2.0 * (now - before).square().sum(-1).mean() / spread
    torch.testing.assert_close(found, expected, rtol=0.05, atol=0)
    found.backward()
    anchor.remove()
    assert not any(module._forward_hooks for module in model.modules())


def test_new_outputs_have_no_original(loaded: Loaded, tmp_path: Path) -> None:
    task = create("text-classification", data=make_data(tmp_path / "words"), max_length=24)
    with pytest.raises(InputError, match="no original to compare with; set train.distill_features: true"):
        Anchor(task.build(loaded), task, 1.0, features=False)
