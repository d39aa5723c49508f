"""The same batches in every pass, padding and prefix in no statistics, every row once an epoch, one run a folder."""

from __future__ import annotations

import copy
import itertools
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.builders import transformers_model
from tests.quant.tiny_models import PlainTransformer
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

import s2d
from s2d.data.tokens import row_batches
from s2d.errors import InputError
from s2d.io.folder_lock import locked
from s2d.models.classes import match, places_of
from s2d.quant.calibration import observe
from s2d.quant.calibration.observe import Batches
from s2d.quant.numerics.quantizer import Quantizer
from s2d.targets.padding import real_of
from s2d.training import TrainSettings, training_batches


class Growing(IterableDataset[Tensor]):
    """Every pass gives other rows, as an augmentation does."""

    def __init__(self) -> None:
        self.passes = 0

    def __iter__(self) -> Any:
        self.passes += 1
        return iter(torch.full((4,), float(self.passes)) for _ in range(6))


class Alternating:
    """An iterable of its own that turns round after every pass."""

    def __init__(self) -> None:
        self.step = -1

    def __iter__(self) -> Any:
        self.step = -self.step
        return iter([torch.full((2,), float(n)) for n in range(5)][:: self.step])


@pytest.mark.parametrize(
    "source",
    [
        DataLoader(TensorDataset(torch.arange(32.0)), 4, shuffle=True),
        DataLoader(Growing(), batch_size=2),
        Alternating(),
    ],
    ids=["shuffle", "augment", "turn"],
)
def test_every_pass_sees_the_batches_of_the_first(source: Any) -> None:
    batches = Batches(source)

    def values(batch: Any) -> Tensor:
        return torch.as_tensor(batch[0] if isinstance(batch, list) else batch).flatten()

    begun = values(next(iter(batches)))  # a pass that ends early
    first, second, third = (torch.cat([values(batch) for batch in batches]) for _ in range(3))
    assert torch.equal(first, second) and torch.equal(first, third) and torch.equal(begun, first[: len(begun)])


class Stream(IterableDataset[Tensor]):
    """Rows without a known number, other ones in every pass."""

    def __init__(self) -> None:
        self.passes = 0

    def __iter__(self) -> Any:
        self.passes += 1
        return iter(torch.randn(9, 8, generator=torch.Generator().manual_seed(self.passes)))


@pytest.mark.parametrize("method", ["rtn", "gptq", "smoothquant"])
def test_a_loader_over_a_stream_has_no_length(method: str) -> None:
    plain = nn.Sequential(nn.LayerNorm(8), nn.Linear(8, 8))
    held = s2d.quantize(plain, "w4a8", calibration=list(DataLoader(Stream(), batch_size=3)), method=method)
    streamed = s2d.quantize(plain, "w4a8", calibration=DataLoader(Stream(), batch_size=3), method=method)
    assert all(
        torch.equal(a, b) for a, b in zip(held.state_dict().values(), streamed.state_dict().values(), strict=True)
    )
    assert s2d.audit(plain, DataLoader(Stream(), batch_size=3)).rows


SOURCES = {
    "stream": lambda: DataLoader(Stream(), batch_size=2),
    "shuffle": lambda: DataLoader(TensorDataset(torch.arange(20.0)), 4, shuffle=True),
    "augment": lambda: DataLoader(Growing(), batch_size=2),
    "turn": Alternating,
    "list": lambda: list(torch.arange(12.0).split(3)),
}


@settings(max_examples=40, deadline=None)
@given(st.lists(st.integers(0, 6), max_size=5), st.sampled_from(list(SOURCES)))
def test_passes_that_end_anywhere_see_the_same_batches(stops: list[int], source: str) -> None:
    batches = Batches(SOURCES[source]())
    passes = [list(itertools.islice(batches, stop)) for stop in stops]
    whole = list(batches)
    for seen, stop in zip(passes, stops, strict=True):
        assert len(seen) == min(stop, len(whole))
        assert all(torch.equal(torch.stack([*a]), torch.stack([*b])) for a, b in zip(seen, whole, strict=False))


def test_what_would_have_to_be_held_beyond_the_limit_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(observe, "HELD_BYTES", 64)
    with pytest.raises(InputError, match="a loader's have to be held"):
        list(Batches(DataLoader(TensorDataset(torch.arange(32.0)), 4)))
    assert len(list(Batches([torch.arange(32.0)] * 9))) == 9  # a list is there anyway


MASK = torch.tensor([[1, 1, 1, 0], [1, 0, 0, 0]])


@pytest.mark.parametrize(
    "mask",
    [MASK, MASK.bool(), MASK.float(), MASK.half(), (1 - MASK) * -1e4, (1.0 - MASK) * torch.finfo(torch.float32).min]
    + [torch.zeros(2, 4).masked_fill(MASK == 0, -torch.inf)],
    ids=["int", "bool", "float", "half", "added-int-like", "added", "infinite"],
)
def test_masks_of_every_kind(mask: Tensor) -> None:
    import inspect

    def hf(input_ids: Any, attention_mask: Any = None) -> None: ...
    def torchs(src: Any, src_key_padding_mask: Any = None) -> None: ...

    mask = mask.float() if mask.dtype == torch.int64 and bool((mask < 0).any()) else mask
    assert torch.equal(real_of(inspect.signature(hf), (None, mask), {}), MASK.bool())
    hidden = mask if mask.is_floating_point() and bool((mask < 0).any()) else MASK == 0
    assert torch.equal(real_of(inspect.signature(torchs), (None,), {"src_key_padding_mask": hidden}), MASK.bool())


def test_padding_of_torchs_own_encoder_does_not_move_the_decay() -> None:
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(32, 4, 64, batch_first=True, dropout=0.0)
    start = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
    x, pad = torch.randn(4, 10, 32), torch.arange(10).expand(4, 10) >= 6
    found = []
    for scale in (1.0, 1000.0):
        model = copy.deepcopy(start)
        optimizer = torch.optim.SGD(model.parameters(), lr=1e-30)
        decay = s2d.SelectiveSpectralDecay(model, optimizer, metric="weight", outlier_ratio=0.0, threshold=0.0)
        y = x.clone()
        y[:, 6:] *= scale
        model(y, src_key_padding_mask=pad)[:, :6].sum().backward()
        optimizer.step()
        found.append({row["weight"]: row["outlier_max"] for row in decay.history})
    assert found[0].keys() == found[1].keys()
    for name, value in found[0].items():
        assert value == pytest.approx(found[1][name], rel=1e-4), name


SIZES = {"hidden_size": 48, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4}


@pytest.mark.parametrize("method", ["smoothquant", "awq", "gptq", "repq"])
def test_prefix_tokens_are_in_no_statistics(method: str) -> None:
    torch.manual_seed(0)
    model: Any = transformers_model("LlamaForCausalLM", "LlamaConfig", {**SIZES, "vocab_size": 60}).eval()
    ids = torch.randint(2, 60, (4, 12))
    ids[:, 0] = 1
    results = []
    for size in (1.0, 40.0):
        with torch.no_grad():
            model.model.embed_tokens.weight[1] = 0
            model.model.embed_tokens.weight[1, 7] = size
        # Attention lets the prefix reach other tokens; only the first block's input projections see it apart.
        spec = {"base": "w4a8", "prefix": 1, "attention": "keep"}
        q = s2d.quantize(model, spec, calibration=[{"input_ids": ids}], method=method)
        part = q.model.layers[0].self_attn.q_proj
        results.append((part.weight.detach().clone(), part.input_quantizer.scale.clone()))
    assert torch.allclose(results[0][0], results[1][0], atol=1e-6) and torch.allclose(results[0][1], results[1][1])


def test_the_prefix_stays_through_qat() -> None:
    torch.manual_seed(0)
    model = PlainTransformer(dim=48).eval()
    x = torch.randn(2, 6, 48)
    x[:, 0] *= 50
    spec = {"base": "w8a8", "prefix": 1, "attention": "keep"}
    ptq = s2d.quantize(model, spec, calibration=[{"x": x}])
    qat = s2d.prepare_qat(model, spec, calibration=[{"x": x}], observer="minmax")
    prefixes = lambda m: {q.name: q.prefix for q in m.modules() if isinstance(q, Quantizer)}  # noqa: E731
    assert prefixes(qat) == prefixes(ptq) == prefixes(s2d.finish_qat(qat))
    assert torch.allclose(qat(x), ptq(x), atol=1e-5)


class Texts:
    ragged = True

    def __init__(self, lengths: list[int]) -> None:
        self.lengths = torch.tensor(lengths)

    def batches(self, split: str, *, batch_size: int, seed: int = 0, shuffle: bool = False) -> Any:
        for rows in row_batches(len(self.lengths), batch_size, seed=seed, shuffle=shuffle):
            width = int(self.lengths[rows].max())
            mask = (torch.arange(width) < self.lengths[rows][:, None]).long()
            yield {"input_ids": rows[:, None].expand(-1, width), "attention_mask": mask}


@settings(max_examples=40, deadline=None)
@given(st.lists(st.integers(1, 20), min_size=1, max_size=90), st.integers(1, 16), st.integers(0, 3))
def test_grouping_by_length_shows_every_row_once_an_epoch(lengths: list[int], batch_size: int, seed: int) -> None:
    seen = torch.zeros(len(lengths), dtype=torch.long)
    for batch in training_batches(Texts(lengths), TrainSettings(batch_size=batch_size), seed):  # type: ignore[arg-type]
        seen[batch["input_ids"][:, 0]] += 1
        if int(seen.sum()) == 3 * len(lengths):
            break
    assert (seen == 3).all()


NAMES = st.lists(st.from_regex(r"[a-z]{2,6}", fullmatch=True), min_size=2, max_size=8, unique=True)


@given(NAMES, st.randoms(use_true_random=False))
def test_classes_are_found_by_name_whatever_order_and_case(known: list[str], random: Any) -> None:
    order = random.sample(range(len(known)), random.randint(1, len(known)))
    wanted = [random.choice([str.upper, str.title, str, lambda name: f" {name}-"])(known[place]) for place in order]
    found = match(wanted, known)
    assert found == order or (found is not None and [known[p] for p in found] == [known[p] for p in order])
    assert match([*wanted, "not there"], known) is None


def test_names_that_could_be_two_classes_are_none() -> None:
    assert match(["C", "C++"], ["C++", "C"]) == [1, 0]
    assert match(["c"], ["C++", "C"]) == [1]
    assert match(["c#"], ["C++", "C!"]) is None
    assert places_of(["0", "1"], ["cat", "dog"], 2) == [0, 1] and places_of(["a", "b"], ["cat", "dog"], 2) is None
    assert places_of(["a", "b"], [], 2) == [0, 1] and places_of(["a"], [], 2) is None


def test_one_run_a_folder(tmp_path: Path) -> None:
    code = "import sys; from pathlib import Path; from s2d.io.folder_lock import locked\n"
    code += "with locked(Path(sys.argv[1])): pass"
    other = [sys.executable, "-c", code, str(tmp_path / "run")]
    with locked(tmp_path / "run"):
        done = subprocess.run(other, capture_output=True, text=True, check=False, timeout=100)
        assert "another s2d run is working in" in done.stderr
    assert subprocess.run(other, check=False, timeout=100).returncode == 0
    assert len(list(itertools.islice((tmp_path / "run").iterdir(), 5))) == 1


@pytest.mark.parametrize("turn", [3, 6, 8])
def test_images_are_read_as_they_were_taken(turn: int) -> None:
    image = pytest.importorskip("PIL.Image")
    from PIL import ImageOps

    from s2d.models.preprocessing import Preprocessing

    stored = image.fromarray(
        torch.randint(0, 255, (8, 8, 3), generator=torch.Generator().manual_seed(0)).byte().numpy()
    )
    stored.getexif()[0x0112] = turn
    read = Preprocessing(8, 8, None, (0.5,) * 3, (0.5,) * 3, 0)
    upright = torch.from_numpy(np.array(stored)).rot90({3: 2, 6: -1, 8: 1}[turn], (0, 1))
    assert torch.equal(read.pixels(stored), upright.permute(2, 0, 1))
    assert torch.equal(read.pixels(ImageOps.exif_transpose(stored)), upright.permute(2, 0, 1))
