"""Expert weights: parameters with three dimensions, quantized matrix by matrix, against loops over their experts."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import s2d
from s2d.errors import InputError
from s2d.optional import declare_missing_operators
from s2d.quant import QuantSpec, planned, record, remove

_TEXT = {
    "vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
    "intermediate_size": 48, "max_position_embeddings": 64, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
    "num_local_experts": 5, "num_experts": 5, "num_experts_per_tok": 2, "moe_intermediate_size": 24,
}  # fmt: skip
_HEADS = {"head_dim": 8}
_LATENT = {
    "q_lora_rank": 16, "kv_lora_rank": 8, "qk_rope_head_dim": 4, "qk_nope_head_dim": 4, "v_head_dim": 8,
    "n_routed_experts": 4, "n_group": 2, "topk_group": 1, "first_k_dense_replace": 1, "n_shared_experts": 1,
}  # fmt: skip
# The last is in no family's file. Whether the weights are [E, in, out].
MODELS: dict[str, tuple[dict[str, Any], bool]] = {
    "Mixtral": ({}, False),
    "Qwen3Moe": (_HEADS, False),
    "Olmoe": ({}, False),
    "GptOss": (_HEADS, True),
    "DeepseekV3": (_LATENT, False),
    "GraniteMoe": ({}, False),
}
TOKENS = {"input_ids": (torch.arange(40).reshape(2, 20) * 7) % 60 + 3}
ONLY_EXPERTS = {"base": "w4a8", "overrides": {"*": "keep", "*.experts.*_proj": "w4a8"}}


def language_model(name: str, experts: str = "grouped_mm") -> nn.Module:
    transformers = pytest.importorskip("transformers")
    declare_missing_operators()
    torch.manual_seed(0)
    config = getattr(transformers, f"{name}Config")(**{**_TEXT, **MODELS[name][0]})
    config._experts_implementation = experts
    return getattr(transformers, f"{name}ForCausalLM")(config).eval()


def output(model: nn.Module, batch: Any = TOKENS) -> Tensor:
    with torch.no_grad():
        made = model(**batch) if isinstance(batch, dict) else model(batch)
    return made if isinstance(made, Tensor) else made.logits


def quantized(model: nn.Module, spec: Any, batch: Any = TOKENS, **options: Any) -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return s2d.quantize(model, spec, calibration=[batch], **options)


def owners(model: nn.Module) -> Iterator[tuple[str, Any]]:
    yield from (
        (name, module)
        for name, module in model.named_modules()
        if hasattr(module, "down_proj_bias")
        or (hasattr(module, "down_proj") and isinstance(module.down_proj, nn.Parameter))
    )


def rounded(weight: Tensor, transposed: bool, bits: int = 4) -> Tensor:
    """Expert by expert and output by output, to the nearest of the codes."""
    made = weight.detach().clone()
    for expert in made:
        for row in expert.unbind(1) if transposed else expert:
            scale = row.abs().max() / (2 ** (bits - 1) - 1)
            row.copy_((row * (1.0 / scale)).round().clamp(-(2 ** (bits - 1)), 2 ** (bits - 1) - 1) * scale)
    return made


class Loop(nn.Module):
    """Experts token by token: with rounded weights, and inputs rounded to the ranges that it has seen."""

    def __init__(self, plain: Any, transposed: bool) -> None:
        super().__init__()
        self.plain, self.transposed = plain, transposed
        self.ranges: dict[str, list[float]] = {"gate_up_proj": [0.0, 0.0], "down_proj": [0.0, 0.0]}
        self.weights: dict[str, Tensor] | None = None
        self.noted: dict[tuple[str, int], list[Any]] = {}

    def product(self, name: str, x: Tensor, expert: int) -> Tensor:
        lo, hi = self.ranges[name]
        weight = getattr(self.plain, name)[expert]
        if self.weights is None:
            self.ranges[name] = [min(lo, float(x.min())), max(hi, float(x.max()))]
        else:
            weight = self.weights[name][expert]
            scale = (hi - lo) / 255
            zero = round(-lo / scale)
            x = ((x / scale).round() + zero).clamp(0, 255).sub(zero) * scale
        made = weight.T @ x if self.transposed else weight @ x
        bias = getattr(self.plain, f"{name}_bias", None)
        return made if bias is None else made + bias[expert]

    def forward(self, hidden: Tensor, chosen: Tensor, shares: Tensor) -> Tensor:
        made = torch.zeros_like(hidden)
        for token, x in enumerate(hidden):
            for expert, share in zip(chosen[token].tolist(), shares[token], strict=True):
                inner = self.plain._apply_gate(self.product("gate_up_proj", x, expert))
                made[token] += share * self.product("down_proj", inner, expert)
        return made


@pytest.mark.parametrize("name", MODELS)
def test_experts_are_rounded_each_by_its_outputs_and_so_is_what_they_read(name: str) -> None:
    model, transposed = language_model(name), MODELS[name][1]
    expected = copy.deepcopy(model)
    loops = [Loop(module, transposed) for _, module in owners(expected)]
    for (path, _), loop in zip(list(owners(expected)), loops, strict=True):
        expected.set_submodule(path, loop)
    assert loops and torch.allclose(output(expected), output(model), atol=1e-5)  # and sees the ranges
    for loop in loops:
        loop.weights = {each: rounded(getattr(loop.plain, each), transposed) for each in loop.ranges}
    made = quantized(model, ONLY_EXPERTS)
    wanted, plain = output(expected), output(model)
    assert float((output(made) - wanted).norm()) < 1e-3 * float((wanted - plain).norm())
    sites = {site.name: site for site in record(made).sites if "experts" in site.name}
    for path, _ in owners(model):
        for each in ("gate_up_proj", "down_proj"):
            assert sites[f"{path}.{each}.weight"].format and sites[f"{path}.{each}.input"].format
    remove(made)
    assert torch.equal(output(made), plain)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("experts", ["eager", "grouped_mm", "batched_mm"])
def test_rounded_weights_give_the_outputs_of_a_model_that_holds_them_and_come_back(
    name: str, experts: str, tmp_path: Path
) -> None:
    model, transposed = language_model(name, experts), MODELS[name][1]
    made = quantized(model, {"base": "w4a16", "overrides": {"*": "keep", "*.experts.*_proj": "w4a16"}})
    held = copy.deepcopy(model)
    for _, module in owners(held):
        for each in ("gate_up_proj", "down_proj"):
            getattr(module, each).data.copy_(rounded(getattr(module, each), transposed))
    assert torch.equal(output(made), output(held))
    s2d.save(made, tmp_path / "q")
    loaded = s2d.load(tmp_path / "q").model
    assert list(record(loaded).sites) == list(record(made).sites) and torch.equal(output(loaded), output(made))


class Stacks(nn.Module):
    """Experts in the forms that no library of ours uses: einsum, bmm of all at once, and one stack read twice."""

    def __init__(self, form: str) -> None:
        super().__init__()
        self.form = form
        self.up = nn.Parameter(torch.randn(3, 8, 16))
        self.down = nn.Parameter(torch.randn(3, 8, 16) if form == "twice" else torch.randn(3, 16, 8))

    def forward(self, x: Tensor) -> Tensor:
        if self.form == "einsum":
            inner = torch.einsum("nd,edf->nef", x, self.up).relu()
            return torch.einsum("efd,nef->nd", self.down, inner)
        if self.form == "bmm":
            return torch.bmm(torch.bmm(x.expand(3, -1, -1), self.up).relu(), self.down).sum(0)
        twice = F.layer_norm(sum((F.linear(x @ self.up[e], self.down[e]) for e in range(3)), torch.zeros(())), (8,))
        return sum((F.linear((twice @ self.up[e]).relu(), self.down[e]) for e in range(3)), torch.zeros(()))


class Layers(nn.Module):
    def __init__(self, form: str) -> None:
        super().__init__()
        self.layers = nn.ModuleList([Stacks(form)])

    def forward(self, x: Tensor) -> Tensor:
        return self.layers[0](x)


@pytest.mark.parametrize("form", ["einsum", "bmm", "twice"])
@pytest.mark.parametrize("spec", ["w4a16", "w4a8"])
def test_stacks_are_followed_into_any_product(form: str, spec: str) -> None:
    torch.manual_seed(0)
    model, x = Layers(form).eval(), torch.randn(20, 8)
    held = copy.deepcopy(model)
    stacks: Any = held.layers[0]
    for name, transposed in (("up", True), ("down", form != "twice")):
        getattr(stacks, name).data.copy_(rounded(getattr(stacks, name), transposed))
    made, wanted, plain = output(quantized(model, spec, x), x), output(held, x), output(model, x)
    assert torch.equal(made, wanted) if spec == "w4a16" else 0 < (made - wanted).norm() < 0.3 * (wanted - plain).norm()


@pytest.mark.parametrize(
    "part", [{"bits": 4, "granularity": "group-8"}, {"bits": 8, "granularity": "tensor"}, {"format": "mxfp4"}]
)
@pytest.mark.parametrize("name", ["Mixtral", "GptOss"])
def test_groups_one_range_a_matrix_and_blocks(name: str, part: dict[str, Any], tmp_path: Path) -> None:
    model = language_model(name)
    made = quantized(model, {"base": "w8a8", "weight": part, "activation": {"bits": 8, "granularity": "token"}})
    path, owner = next(iter(owners(made)))
    stack = owner.gate_up_proj.detach()
    found = owner.gate_up_proj_quantizer.weight(stack)
    matrices = [
        (m.T if MODELS[name][1] else m, f.T if MODELS[name][1] else f) for m, f in zip(stack, found, strict=True)
    ]
    for matrix, codes in matrices:
        if part.get("granularity") == "group-8":
            groups, steps = matrix.unflatten(1, (-1, 8)), matrix.unflatten(1, (-1, 8)).abs().amax(-1, keepdim=True) / 7
            assert torch.allclose(codes.unflatten(1, (-1, 8)), (groups / steps).round() * steps, atol=1e-6)
        elif "bits" in part:
            step = matrix.abs().max() / 127
            assert torch.allclose(codes, (matrix / step).round() * step, atol=1e-6)
        else:  # 32 inputs a block: a power of two, and 4 bits
            assert all(len(row.abs().unique()) <= 8 for row in codes)
    s2d.save(made, tmp_path / "q")
    assert torch.equal(output(s2d.load(tmp_path / "q").model), output(made))


def test_padding_is_no_part_of_the_ranges() -> None:
    model = language_model("Mixtral")
    short = {"input_ids": TOKENS["input_ids"][:, :12], "attention_mask": torch.ones(2, 12, dtype=torch.long)}
    ids = F.pad(short["input_ids"], (0, 6), value=0)
    padded = {"input_ids": ids, "attention_mask": F.pad(short["attention_mask"], (0, 6))}
    found = [quantized(model, "w8a8", batch).state_dict() for batch in (short, padded)]
    scales = [key for key in found[0] if "proj_quantizer.input.scale" in key]
    assert scales and all(torch.allclose(found[0][key], found[1][key], rtol=1e-4) for key in scales)
    whole = quantized(model, "w8a8", {"input_ids": ids}).state_dict()
    assert any(not torch.allclose(found[0][key], whole[key], rtol=1e-3) for key in scales)


def test_experts_without_tokens_are_rounded_like_the_others() -> None:
    model = language_model("Mixtral")
    for name, parameter in model.named_parameters():
        if name.endswith("gate.weight"):
            parameter.data[2:] = 0.0  # two of five get every token
            parameter.data[:2] = 1e-3 * parameter.data[:2].abs() + 1.0
    made = quantized(model, "w4a8")
    for (_, module), (_, plain) in zip(owners(made), owners(model), strict=True):
        assert torch.equal(
            module.down_proj_quantizer.weight(module.down_proj.detach()), rounded(plain.down_proj, False)
        )


def test_the_plan_keeps_what_an_override_names_and_a_prefix_leaves_the_inputs() -> None:
    model = language_model("Mixtral")
    spec = {"base": "w4a8", "overrides": {"*.experts.down_proj": "keep", "*.experts.gate_up_proj.input": "keep"}}
    kept = {
        s.name: s.format for s in planned(model, QuantSpec.parse(spec), [TOKENS]) if "layers.0.mlp.experts" in s.name
    }
    assert {name.removeprefix("model.layers.0.mlp.experts.") for name, format in kept.items() if format} == {
        "gate_up_proj.weight"
    }
    prefix = planned(model, QuantSpec.parse({"base": "w4a8", "prefix": 2}), [TOKENS])
    input = next(site for site in prefix if site.name.endswith("experts.down_proj.input"))
    assert input.format is None and "cannot be kept" in input.reason
    with pytest.raises(InputError, match=r"groups of 5 do not divide its 32 inputs"):
        planned(
            model,
            QuantSpec.parse(
                {
                    "base": "w4a8",
                    "weight": {"bits": 4, "granularity": "group-5"},
                    "overrides": {"*": "keep", "*.experts.*_proj": {"weight": {"bits": 4, "granularity": "group-5"}}},
                }
            ),
            [TOKENS],
        )


@pytest.mark.parametrize("method", ["gptq", "repq", "awq"])
def test_other_methods_round_experts_to_nearest_and_say_so(method: str) -> None:
    model = language_model("GptOss")
    with pytest.warns(UserWarning, match=r"experts.gate_up_proj and 3 more .* rounded to nearest") as told:
        made = s2d.quantize(model, "w8a8", calibration=[TOKENS], method=method)
    assert any("s2d" in Path(each.filename).parts for each in told if "experts" in str(each.message))  # shown by s2d
    plain = output(model)
    assert float((output(made) - plain).norm() / plain.norm()) < 0.1


def test_files_of_runtimes_refuse_rounded_experts_in_one_line(tmp_path: Path) -> None:
    made = quantized(language_model("Mixtral"), "w8a8")
    for suffix in (".onnx", ".gguf", ".pte", ".encodings", ""):
        with pytest.raises(InputError, match="several experts in one parameter"):
            s2d.export(made, tmp_path / f"model{suffix}", example=TOKENS)
    assert not list(tmp_path.iterdir())


def test_trained_through_rounded_experts() -> None:
    model = language_model("Mixtral")
    made = s2d.prepare_qat(model, "w4a8", calibration=[TOKENS])
    before = {name: parameter.detach().clone() for name, parameter in made.named_parameters()}
    made.train()
    optimizer = torch.optim.AdamW(s2d.qat_parameters(made, lr=1e-2))
    losses = []
    for _ in range(5):
        loss = made(**TOKENS, labels=TOKENS["input_ids"]).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    moved = [name for name, parameter in made.named_parameters() if not torch.equal(parameter, before[name])]
    assert losses[-1] < losses[0] and any(name.endswith("experts.down_proj") for name in moved)
    s2d.finish_qat(made)
    assert output(made.eval()).isfinite().all()
