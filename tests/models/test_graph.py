"""The traced graph against structure written down by hand, torch's own counter and perturbed parameters."""

from __future__ import annotations

import copy
import json
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from tests.builders import timm_model, transformers_model
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.utils import parametrizations
from torch.utils.flop_counter import FlopCounterMode

from s2d.errors import InputError
from s2d.models.graph import Graph
from s2d.models.graph_parts import Writer
from s2d.models.tracing import trace

_SMALL = {"vocab_size": 99, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4,
          "intermediate_size": 48, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}  # fmt: skip
_GQA = {**_SMALL, "num_key_value_heads": 2}


def texts(rows: int = 4, length: int = 12) -> dict[str, Tensor]:
    ids = torch.randint(5, 90, (rows, length), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    mask[1, 8:] = 0
    return {"input_ids": ids, "attention_mask": mask}


def images(size: int = 32, rows: int = 2) -> Tensor:
    return torch.randn(rows, 3, size, size, generator=torch.Generator().manual_seed(1))


def wrote(graph: Graph, parameter: str, number: int = 0) -> dict[str, str]:
    """First name -> exactness of what writes the input of a product."""
    calls = [c for c in graph.calls_of(parameter) if c.kind in ("product", "convolution")]
    return {w.call.parameter: w.exactness for w in graph.writers(calls[number]) if w.call.kind != "bias"}


def writer(graph: Graph, parameter: str) -> Writer:
    return next(w for w in graph.writers(graph.calls_of(parameter)[0]) if w.call.kind != "bias")


def names(readers: Any) -> list[str]:
    return [reader.call.parameter if reader.call else reader.op for reader in readers]


class Block(nn.Module):
    """Pre-norm attention and GELU MLP, written plainly."""

    def __init__(self, width: int = 16, heads: int = 4) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.fc1, self.fc2 = nn.Linear(width, 24), nn.Linear(24, width)

    def forward(self, x: Tensor) -> Tensor:
        b, t, d = x.shape
        q, k, v = self.qkv(self.norm1(x)).reshape(b, t, 3, self.heads, d // self.heads).permute(2, 0, 3, 1, 4).unbind(0)
        y = (q @ k.mT / 2).softmax(-1) @ v
        x = x + self.proj(y.transpose(1, 2).reshape(b, t, d))
        return x + self.fc2(F.gelu(self.fc1(self.norm2(x))))


class Tower(nn.Module):
    def __init__(self, blocks: int = 2) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block() for _ in range(blocks))

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return x


# -- structure, written down by hand -----------------------------------------------------------------------------------


def test_bert_by_hand() -> None:
    graph = trace(transformers_model("BertModel", "BertConfig", _SMALL), texts())
    layer = "encoder.layer.0"
    assert wrote(graph, f"{layer}.attention.self.query.weight") == {"embeddings.LayerNorm.weight": "exact"}
    assert wrote(graph, f"{layer}.attention.output.dense.weight") == {f"{layer}.attention.self.value.weight": "exact"}
    assert wrote(graph, f"{layer}.output.dense.weight") == {f"{layer}.intermediate.dense.weight": "near"}
    assert len(graph.attentions) == 2 and {(a.heads, a.head_dim) for a in graph.attentions} == {(4, 8)}
    first = graph.attentions[0]
    assert [w.call.parameter for w in first.q_calls] == [f"{layer}.attention.self.query.weight"]
    assert first.mask_inputs == ("attention_mask",)
    norm = next(n for n in graph.norms if n.gain == ("embeddings.LayerNorm.weight",))
    assert not norm.foldable and "add" in names(norm.readers)  # post-norm: the residual reads it too
    assert [b.containers for b in graph.blocks] == [("encoder.layer",)]
    assert [m.key for m in graph.masks] == ["attention_mask"] and graph.masks[0].padding == 0.0
    assert len(graph.products) == 2 * 6 + 1 and not graph.unused and not graph.unseen and not graph.unknown


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_llama_by_hand(attention: str) -> None:
    model = transformers_model("LlamaForCausalLM", "LlamaConfig", {**_GQA, "attn_implementation": attention})
    graph = trace(model, texts())
    layer = "model.layers.1"
    assert wrote(graph, f"{layer}.self_attn.o_proj.weight") == {f"{layer}.self_attn.v_proj.weight": "exact"}
    assert wrote(graph, f"{layer}.mlp.down_proj.weight") == {
        f"{layer}.mlp.up_proj.weight": "exact", f"{layer}.mlp.gate_proj.weight": "near"}  # fmt: skip
    assert [a.form for a in graph.attentions] == ["math" if attention == "eager" else "fused"] * 2
    assert all(a.heads == 4 and a.head_dim == 8 and a.mask is not None for a in graph.attentions)
    assert len(graph.norms) == 5 and all(n.kind == "rms" and n.foldable and n.applied == "w" for n in graph.norms)
    # Grouped-query attention: each of the 16 rows of v is read by two heads.
    rows = writer(graph, f"{layer}.self_attn.o_proj.weight").rows
    assert rows is not None and rows.span == (0, 16)
    assert [m.key for m in graph.masks] == ["attention_mask"]


def test_gemma_gains_are_one_plus_w_and_its_head_is_tied() -> None:
    graph = trace(transformers_model("GemmaForCausalLM", "GemmaConfig", {**_GQA, "head_dim": 8}), texts())
    assert {norm.applied for norm in graph.norms} == {"1+w"} and len(graph.norms) == 5
    tied = graph.calls_of("lm_head.weight")
    assert [c.kind for c in tied] == ["embedding", "product"]
    assert set(tied[0].parameters) == {"lm_head.weight", "model.embed_tokens.weight"}
    assert graph.calls_of("model.embed_tokens.weight") == tied


@pytest.mark.parametrize("which", ["Gemma2", "Olmo2"])
def test_a_norm_that_the_residual_reads_is_not_foldable(which: str) -> None:
    options = {**_GQA, "head_dim": 8} if which == "Gemma2" else _GQA
    graph = trace(transformers_model(f"{which}ForCausalLM", f"{which}Config", options), texts())
    post = [n for n in graph.norms if "post_attention" in n.gain[0] or "post_feedforward" in n.gain[0]]
    assert len(post) == 4 and not any(norm.foldable for norm in post)
    assert all(names(norm.readers) == ["add"] for norm in post)


def test_albert_shares_its_block_and_writers_differ_per_execution() -> None:
    graph = trace(transformers_model("AlbertModel", "AlbertConfig", {**_SMALL, "embedding_size": 16}), texts())
    query = "encoder.albert_layer_groups.0.albert_layers.0.attention.query.weight"
    assert [c.run for c in graph.calls_of(query)] == [0, 1]
    assert wrote(graph, query, 0) == {"encoder.embedding_hidden_mapping_in.weight": "exact"}
    assert wrote(graph, query, 1) == {
        "encoder.albert_layer_groups.0.albert_layers.0.full_layer_layer_norm.weight": "exact"
    }
    # gelu written out in four operations is still one activation function
    down = "encoder.albert_layer_groups.0.albert_layers.0.ffn_output.weight"
    assert set(wrote(graph, down).values()) == {"near"}
    assert graph.blocks and all(b.shared and len(b.members) == 2 for b in graph.blocks)


def test_mixtral_experts() -> None:
    options = {**_GQA, "num_local_experts": 6, "num_experts_per_tok": 1}
    model = transformers_model("MixtralForCausalLM", "MixtralConfig", options)
    graph = trace(model, {"input_ids": torch.full((2, 2), 7)})  # one token, four times
    calls = [c for c in graph.calls if c.experts]
    routed: set[str] = set()
    for layer in range(2):
        ran = {e for c in calls if f"layers.{layer}." in c.parameter for e in c.experts}
        assert 1 <= len(ran) < 6
        routed |= {f"model.layers.{layer}.mlp.experts.{n}[{e}]" for n in ("gate_up_proj", "down_proj")
                   for e in range(6) if e not in ran}  # fmt: skip
    assert set(graph.unseen) == routed
    # Truth: what did not run may change as it likes.
    before = model(torch.full((2, 2), 7)).logits
    for name in graph.unseen:
        parameter, _, expert = name.partition("[")
        model.get_parameter(parameter).data[int(expert[:-1])] += 1
    assert torch.equal(before, model(torch.full((2, 2), 7)).logits)
    assert all(graph.tokens(c).routed and graph.mask_of(c) is None for c in calls)
    assert not graph.norms[1].foldable  # experts read it by number


def test_t5_masks_are_each_on_their_own_tokens() -> None:
    model = transformers_model("T5Model", "T5Config", {"vocab_size": 99, "d_model": 32, "d_kv": 8, "d_ff": 48,
                               "num_layers": 2, "num_heads": 4})  # fmt: skip
    batch = texts()
    batch["decoder_input_ids"], batch["decoder_attention_mask"] = batch["input_ids"].flip(1), batch["attention_mask"]
    graph = trace(model, batch)  # all sizes are the same on both sides

    def mask(parameter: str) -> str | None:
        found = graph.mask_of(graph.calls_of(parameter)[0], batch)
        return None if found is None else found.key

    cross = "decoder.block.0.layer.1.EncDecAttention"
    assert mask("encoder.block.0.layer.0.SelfAttention.q.weight") == "attention_mask"
    assert mask("decoder.block.0.layer.0.SelfAttention.q.weight") == "decoder_attention_mask"
    assert mask(f"{cross}.q.weight") == "decoder_attention_mask" and mask(f"{cross}.k.weight") == "attention_mask"
    assert mask("decoder.block.0.layer.2.DenseReluDense.wi.weight") == "decoder_attention_mask"
    assert wrote(graph, "encoder.block.0.layer.1.DenseReluDense.wo.weight") == {
        "encoder.block.0.layer.1.DenseReluDense.wi.weight": "exact"  # ReLU
    }


def test_clip_images_have_no_mask() -> None:
    config = {
        "text_config": _SMALL,
        "vision_config": {**_SMALL, "image_size": 32, "patch_size": 16},
        "projection_dim": 16,
    }
    graph = trace(transformers_model("CLIPModel", "CLIPConfig", config), texts() | {"pixel_values": images(rows=4)})
    for call in graph.products:
        mask = graph.mask_of(call)
        if call.parameter.startswith("vision"):
            assert mask is None and set(graph.tokens(call).inputs) <= {"pixel_values"}
        elif "layers" in call.parameter:
            assert mask is not None and mask.key == "attention_mask"


def test_swin_nested_blocks_and_windows() -> None:
    model = timm_model("swin_tiny_patch4_window7_224",
                       {"img_size": 56, "depths": (2, 2), "num_heads": (2, 4), "embed_dim": 16})  # fmt: skip
    graph = trace(model, images(56))
    assert [b.containers for b in graph.blocks] == [("layers.0.blocks",), ("layers.1.blocks",)]
    assert [a.heads for a in graph.attentions] == [2, 2, 4, 4]
    out = "layers.1.blocks.1.attn.proj.weight"
    assert wrote(graph, out) == {"layers.1.blocks.1.attn.qkv.weight": "exact"}
    rows = writer(graph, out).rows
    assert rows is not None and rows.span == (64, 96)  # the values of 3 x 32 channels
    assert graph.calls_of("layers.0.blocks.0.attn.relative_position_bias_table")[0].kind == "lookup"


def test_eva_functional_linears_and_fused_gate() -> None:
    graph = trace(timm_model("eva02_tiny_patch14_224", {"img_size": 28, "depth": 2}), images(28))
    assert [c.kind for c in graph.calls_of("blocks.0.attn.qkv.weight")] == ["product"]
    found = {w.rows.span: w.exactness for w in graph.writers(graph.calls_of("blocks.0.mlp.fc2.weight")[0])
             if w.rows is not None and w.rows.span is not None}  # fmt: skip
    assert sorted(found.values()) == ["exact", "near"] and sorted(found) == [(0, 512), (512, 1024)]


@pytest.mark.parametrize("norm_first", [False, True])
def test_torch_encoder_with_a_padding_mask(norm_first: bool) -> None:
    layer = nn.TransformerEncoderLayer(16, 4, 24, batch_first=True, norm_first=norm_first)
    model = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
    padding = torch.zeros(4, 6, dtype=torch.bool)
    padding[2, 4:] = True
    batch = {"src": torch.randn(4, 6, 16), "src_key_padding_mask": padding}
    graph = trace(model, batch)
    mask = graph.mask_of(graph.calls_of("layers.1.linear1.weight")[0], batch)
    assert mask is not None and mask.key == "src_key_padding_mask" and mask.padding == 1.0
    assert torch.equal(mask.keeps(padding), ~padding)
    rows = writer(graph, "layers.0.self_attn.out_proj.weight").rows
    assert rows is not None and rows.span == (32, 48)
    assert torch.backends.mha.get_fastpath_enabled()


# -- traps -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("model_class", "config"),
    [("BertModel", _SMALL), ("LlamaForCausalLM", _GQA), ("MixtralForCausalLM", {**_GQA, "num_local_experts": 4})],
)
def test_flops_are_those_of_torch(model_class: str, config: dict[str, Any]) -> None:
    kind = model_class.removesuffix("Model").removesuffix("ForCausalLM")
    model = transformers_model(model_class, f"{kind}Config", config).eval()
    model.config.use_cache = False  # pyright: ignore
    batch = texts(2)

    def grouped(a: Any, b: Any, *_: Any, **__: Any) -> int:
        return 2 * a[0] * b[-2] * b[-1]

    with sdpa_kernel(SDPBackend.MATH):
        graph = trace(model, batch)
        with (
            torch.no_grad(),
            FlopCounterMode(display=False, custom_mapping={torch.ops.aten._grouped_mm: grouped}) as counter,
        ):
            model(**batch)
    assert graph.flops == counter.get_total_flops()


def test_parameters_without_a_call_change_nothing_and_those_with_one_do() -> None:
    torch.manual_seed(0)
    model = transformers_model("Wav2Vec2Model", "Wav2Vec2Config", {
        **_SMALL, "num_conv_pos_embeddings": 8, "num_conv_pos_embedding_groups": 4, "conv_dim": (16, 16),
        "conv_stride": (5, 2), "conv_kernel": (10, 3), "num_feat_extract_layers": 2}).eval()  # fmt: skip
    batch = {"input_values": torch.randn(2, 400)}
    graph = trace(model, batch)
    with torch.no_grad():
        before = model(**batch).last_hidden_state
        for name, parameter in model.named_parameters():
            kept = parameter.clone()
            parameter += torch.randn_like(parameter)
            same = torch.equal(before, model(**batch).last_hidden_state)
            assert same == (not graph.calls_of(name)) or name.endswith("k_proj.bias"), name
            parameter.copy_(kept)
    assert graph.unused == ("masked_spec_embed",)
    computed = "encoder.pos_conv_embed.conv.parametrizations.weight.original1"
    last = graph.calls_of(computed)[-1]
    assert last.kind == "convolution" and not last.plain


def test_nothing_of_the_model_changes() -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Dropout(0.5), nn.Flatten(), nn.LazyLinear(4))
    model(images(8))
    model.register_buffer("count", torch.zeros(1))
    model.train()
    model[1].eval()
    model.register_forward_pre_hook(lambda m, a: m.count.add_(1) and None)
    before, random = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    modes = [m.training for m in model.modules()]
    x = images(8)
    kept = x.clone()
    trace(model, x)
    assert all(torch.equal(a, b) for a, b in zip(before.values(), model.state_dict().values(), strict=True))
    assert modes == [m.training for m in model.modules()] and torch.equal(random, torch.get_rng_state())
    assert torch.equal(x, kept) and not model[1]._forward_hooks
    assert all(p.requires_grad for p in model.parameters())


def test_a_replaced_buffer_and_random_numbers_are_put_back() -> None:
    class Counts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("seen", torch.zeros(3))
            self.linear = nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            self.seen = self.seen + 1
            x.mul_(2)
            return self.linear(x + torch.rand_like(x))

    model, x = Counts(), torch.ones(4, 4)
    random = torch.get_rng_state()
    trace(model, x)
    assert torch.equal(model.seen, torch.zeros(3)) and torch.equal(random, torch.get_rng_state())
    assert torch.equal(x, torch.ones(4, 4))


def test_caches_and_checkpointing_are_off_and_restored() -> None:
    model = transformers_model("LlamaForCausalLM", "LlamaConfig", _GQA)
    model.gradient_checkpointing_enable()  # pyright: ignore
    model.config.use_cache = True  # pyright: ignore
    graph = trace(model.train(), texts())
    assert model.config.use_cache and model.is_gradient_checkpointing and model.training  # pyright: ignore
    assert [c.run for c in graph.calls_of("model.layers.0.mlp.up_proj.weight")] == [0]


def test_equal_sizes_do_not_confuse() -> None:
    graph = trace(Tower(), torch.randn(4, 4, 16))
    assert all(a.heads == 4 and a.head_dim == 4 for a in graph.attentions)
    spans = [[w.rows.span for w in ws if w.rows] for a in graph.attentions for ws in (a.q_calls, a.k_calls, a.v_calls)]
    assert spans == [[(0, 16)], [(16, 32)], [(32, 48)]] * 2
    square = trace(Tower(), torch.randn(2, 16, 16))  # as many tokens as channels
    call = square.calls_of("blocks.0.qkv.weight")[0]
    assert square.tokens(call).dims == (0,) and square.tokens(call).inputs == ("0",)


def test_in_place_operations_make_new_values() -> None:
    class InPlace(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm, self.a, self.b, self.c = nn.LayerNorm(8), nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8)

        def forward(self, x: Tensor) -> Tensor:
            x = self.norm(x)
            view = x.view(-1, 8)
            y = self.a(x)
            x += y  # what b reads is no longer the norm's output, through the view either
            return self.b(view).view_as(y) + self.c(y.relu_())

    graph = trace(InPlace(), torch.randn(2, 3, 8))
    assert wrote(graph, "a.weight") == {"norm.weight": "exact"}
    assert wrote(graph, "b.weight") == {"norm.weight": "none", "a.weight": "none"}
    assert wrote(graph, "c.weight") == {"a.weight": "exact"}
    assert names(graph.norms[0].readers) == ["a.weight", "add_"] and not graph.norms[0].foldable


def test_writes_into_a_part_are_read_with_what_was_there() -> None:
    class Part(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c = nn.Linear(8, 8), nn.Linear(8, 4), nn.Linear(8, 8)

        def forward(self, x: Tensor) -> Tensor:
            y = self.a(x)
            y[..., :4] = self.b(x)
            return self.c(y)

    assert set(wrote(trace(Part(), torch.randn(2, 8)), "c.weight")) == {"a.weight", "b.weight"}


def test_parameters_in_one_storage_stay_apart() -> None:
    class Flat(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            memory = torch.randn(2, 8, 8)
            self.a, self.b = nn.Parameter(memory[0]), nn.Parameter(memory[1])

        def forward(self, x: Tensor) -> Tensor:
            return F.linear(F.linear(x, self.b), self.a[2:6])

    graph = trace(Flat(), torch.randn(2, 8))
    assert [(c.parameter, c.rows) for c in graph.calls] == [("b", None), ("a", (2, 6))]


def test_serial_numbers_outlive_reused_memory() -> None:
    class Many(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList(nn.Linear(64, 64) for _ in range(30))

        def forward(self, x: Tensor) -> Tensor:
            for layer in self.layers:
                x = layer(x)  # the memory of two before is free, and is given out again
            return x

    graph = trace(Many(), torch.randn(2, 64))
    for i in range(1, 30):
        assert wrote(graph, f"layers.{i}.weight") == {f"layers.{i - 1}.weight": "exact"}


def test_functional_call_and_parametrizations() -> None:
    class Functional(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Linear(8, 8)
            self.normed = parametrizations.weight_norm(nn.Linear(8, 8))

        def forward(self, x: Tensor) -> Tensor:
            other = {name: value.detach() * 2 for name, value in self.inner.named_parameters()}
            return self.normed(torch.func.functional_call(self.inner, other, (x,)))

    graph = trace(Functional(), torch.randn(2, 8))
    inner = [c for c in graph.calls_of("inner.weight") if c.kind == "product"]
    normed = [c for c in graph.calls_of("normed.parametrizations.weight.original1") if c.kind == "product"]
    assert len(inner) == len(normed) == 1 and not normed[0].plain
    assert graph.calls_of("normed.parametrizations.weight.original0")[-1].kind == "product"


def test_functional_call_of_the_traced_module_names_what_it_replaced() -> None:
    model = nn.Linear(8, 8)

    class Swapped(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = model

        def forward(self, x: Tensor) -> Tensor:
            return torch.func.functional_call(self.inner, {"weight": torch.eye(8)}, (x,))

    graph = trace(Swapped(), torch.randn(2, 8))
    assert [c.kind for c in graph.calls_of("inner.weight")] == ["product"]


def test_lora_and_einsum_and_casts() -> None:
    class Lora(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.W, self.A, self.B = (nn.Parameter(torch.randn(*s)) for s in ((8, 8), (2, 8), (8, 2)))
            self.E = nn.Parameter(torch.randn(8, 4, 2))

        def forward(self, x: Tensor) -> Tensor:
            y = F.linear(x, self.W + self.B @ self.A)
            return torch.einsum("btd,dhk->bthk", y, self.E)

    with torch.autocast("cpu", dtype=torch.bfloat16):
        graph = trace(Lora(), torch.randn(2, 3, 8))
    for name in "WAB":
        last = graph.calls_of(name)[-1]
        assert last.kind == "product" and not last.plain
    assert [c.kind for c in graph.calls_of("E")] == ["product"]


def test_a_learned_query_goes_through_a_layers_weight() -> None:
    class Pool(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.probe = nn.Parameter(torch.randn(1, 1, 16))
            self.attention = nn.MultiheadAttention(16, 4, batch_first=True)

        def forward(self, x: Tensor) -> Tensor:
            return self.attention(self.probe.expand(len(x), -1, -1), x, x, need_weights=False)[0]

    graph = trace(Pool(), torch.randn(2, 5, 16))
    spans = [c.rows for c in graph.calls_of("attention.in_proj_weight") if c.kind == "product"]
    assert sorted(s for s in spans if s) == [(0, 16), (16, 48)] and graph.calls_of("probe")


def test_compiled_and_data_parallel_wrappers_are_looked_through() -> None:
    plain = trace(Tower(), torch.randn(2, 4, 16))
    model = torch.compile(Tower(), backend="eager")
    parallel = nn.DataParallel(Tower())
    inner = Tower()
    inner.blocks[0].compile(backend="eager")
    for other in (model, parallel, inner):
        assert trace(other, torch.randn(2, 4, 16)).fingerprint() == plain.fingerprint()


def test_wrapper_subclasses_are_matched_by_object() -> None:
    from torch.testing._internal.two_tensor import TwoTensor

    model = nn.Sequential(nn.Linear(8, 8, bias=False), nn.Linear(8, 8, bias=False))
    for layer in model:
        layer.weight = nn.Parameter(TwoTensor(layer.weight.data, layer.weight.data.clone()))
    graph = trace(model, torch.randn(2, 8))
    assert [c.parameter for c in graph.products] == ["0.weight", "1.weight"]
    assert wrote(graph, "1.weight") == {"0.weight": "exact"}


def test_higher_order_and_foreign_operations_are_unknown_and_end_the_walk() -> None:
    @torch.library.custom_op("s2d_tests::opaque", mutates_args=())
    def opaque(x: Tensor) -> Tensor:
        return x * 2

    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8)

        def forward(self, x: Tensor) -> Tensor:
            y = self.b(opaque(self.a(x)))
            return self.c(torch.from_numpy(y.detach().numpy() + 1))

    graph = trace(Odd(), torch.randn(2, 8))
    assert wrote(graph, "b.weight") == {} and wrote(graph, "c.weight") == {}
    assert {op for op, _ in graph.unknown} == {"s2d_tests::opaque", "data from outside torch"}

    class Cond(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(8, 8), nn.Linear(8, 8)

        def forward(self, x: Tensor) -> Tensor:
            return self.b(torch.cond(x.sum() > 0, torch.sin, torch.cos, (self.a(x),)))

    graph = trace(Cond(), torch.randn(2, 8))
    assert wrote(graph, "b.weight") == {} and [op for op, _ in graph.unknown] == ["cond"]


def test_our_own_quantizers_are_off_while_tracing() -> None:
    from s2d.quant import quantize

    model = Tower().eval()
    plain = trace(model, torch.randn(2, 4, 16))
    quantized = quantize(model, "w4a4", calibration=[torch.randn(2, 4, 16)])
    x = torch.randn(2, 4, 16)
    before = quantized(x)
    graph = trace(quantized, x)
    assert torch.equal(before, quantized(x))
    assert [c.parameter for c in graph.products] == [c.parameter for c in plain.products]


def test_what_did_not_run_is_listed() -> None:
    class Drops(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList(Block() for _ in range(3))
            self.other = nn.Linear(4, 4)
            self.table = nn.Parameter(torch.zeros(4, 4))

        def forward(self, x: Tensor) -> Tensor:
            return self.layers[2](self.layers[0](x))

    graph = trace(Drops(), torch.randn(2, 4, 16))
    assert graph.unseen == ("layers.1", "other") and graph.unused == ("table",)
    assert [path for path, _ in graph.blocks[0].members] == ["layers.0", "layers.2"]


def test_interleaved_lists_are_one_sequence() -> None:
    class Turns(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.left = nn.ModuleList(Tower(1) for _ in range(2))
            self.right = nn.ModuleList(nn.Sequential(nn.Linear(16, 16)) for _ in range(2))

        def forward(self, x: Tensor) -> Tensor:
            for left, right in zip(self.left, self.right, strict=True):
                x = right(left(x))
            return x

    blocks = trace(Turns(), torch.randn(2, 4, 16)).blocks[0]
    assert set(blocks.containers) == {"left", "right"}
    assert [path for path, _ in blocks.members] == ["left.0", "right.0", "left.1", "right.1"]


class Mixer(nn.Module):
    """A block of another class."""

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.norm, self.mix = nn.LayerNorm(width), nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.mix(self.norm(x))


class Widening(nn.Module):
    """The first block of a stage: one class with the others, other sizes."""

    def __init__(self, inputs: int, width: int) -> None:
        super().__init__()
        self.short, self.first, self.second = (
            nn.Linear(inputs, width),
            nn.Linear(inputs, width),
            nn.Linear(width, width),
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.short(x) + self.second(torch.relu(self.first(x)))


class Plain(nn.Module):
    """A block without a residual sum, as the first one of EfficientNet."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(16, 24), nn.Linear(24, 16)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(torch.relu(self.first(x)))


class Layer(nn.Module):
    """A product and an activation."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.act = nn.Linear(32, 8), nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.conv(x))


class Beside(nn.Module):
    """Blocks that no list holds."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Linear(16, 16), nn.ReLU())
        self.b1, self.b2 = Widening(16, 24), Widening(24, 24)

    def forward(self, x: Tensor) -> Tensor:
        return self.b2(self.b1(self.stem(x)))


@pytest.mark.parametrize(
    ("model", "containers", "members"),
    [
        (nn.Sequential(Block(), Mixer()), [("",)], ["0", "1"]),  # no two of a class
        (nn.Sequential(Mixer(), Block(), Mixer()), [("",)], ["0", "1", "2"]),
        (
            nn.ModuleDict({"stages": nn.Sequential(nn.Sequential(Widening(16, 24), Widening(24, 24)),
                                                   nn.Sequential(Widening(24, 32)))})["stages"],
            [("0",), ("1",)], ["0.0", "0.1", "1.0"],
        ),
        (  # a stage of one block of another class is a stage, a last layer is none
            nn.ModuleDict({"stages": nn.Sequential(
                nn.Sequential(Plain()), nn.Sequential(Widening(16, 24), Widening(24, 24)),
                nn.Sequential(Widening(24, 32), Widening(32, 32)), nn.Sequential(Layer()))})["stages"],
            [("0",), ("1",), ("2",)], ["0.0", "1.0", "1.1", "2.0", "2.1"],
        ),
        (Beside(), [("",)], ["b1", "b2"]),
        (nn.Sequential(nn.Linear(16, 16), nn.Sequential(nn.Linear(16, 8), nn.GELU()), nn.Linear(8, 4)), [], []),
    ],
)  # fmt: skip
def test_blocks_of_several_classes_sizes_and_owners(
    model: nn.Module, containers: list[Any], members: list[str]
) -> None:
    found = trace(model.eval(), torch.randn(2, 5, 16)).blocks
    assert [blocks.containers for blocks in found] == containers
    assert [path for blocks in found for path, _ in blocks.members] == members


PICKS: dict[str, Any] = {
    "last, by a slice": lambda y: y[:, :, -1:].expand(-1, -1, 3, -1)[:, :, 0],
    "last, by number": lambda y: y[:, :, [-1]][:, :, 0],
    "a range, by numbers": lambda y: y[:, :, torch.arange(2, 4)].flatten(2),
    "every second": lambda y: y[:, :, ::2].flatten(2),
    "turned round": lambda y: y[:, :, [3, 2]].flatten(2),
    "pairs": lambda y: y[:, :, [0, 1], [2, 3]],
    "a sum over heads": lambda y: y.sum(2),
    "the middle of what was selected": lambda y: y[:, :, 2][..., 1:3],
    "narrowed twice": lambda y: y.narrow(2, 1, 3).narrow(2, 2, 1)[:, :, 0, 2:],
    "by a number of the data": lambda y: y[:, :, (y.abs().sum() > 0).long()],
    "halves swapped": lambda y: torch.cat([y[..., 2:], y[..., :2]], -1).flatten(2),
}


@pytest.mark.parametrize("pick", PICKS)
def test_the_rows_that_write_what_is_picked_are_those_whose_change_shows(pick: str) -> None:
    """Where channels cannot be followed the graph says nothing; it never names other rows."""

    class Picked(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.made, self.read = nn.Linear(8, 16, bias=False), nn.LazyLinear(2)

        def forward(self, x: Tensor) -> Tensor:
            return self.read(PICKS[pick](self.made(x).unflatten(-1, (4, 4))))

    model, x = Picked(), torch.randn(2, 5, 8)
    seen: list[Tensor] = []
    model(x)
    model.read.register_forward_pre_hook(lambda m, a: seen.append(a[0].detach()))
    model(x)
    truth: list[list[int]] = [[] for _ in range(seen[0].shape[-1])]
    for row in range(16):
        with torch.no_grad():
            model.made.weight[row] *= 2
        model(x)
        with torch.no_grad():
            model.made.weight[row] /= 2
        for channel in (seen[-1] != seen[0]).flatten(0, 1).any(0).nonzero().flatten().tolist():
            truth[channel].append(row)
    graph = trace(model, x)
    told = [w.rows for w in graph.writers(graph.calls_of("read.weight")[0]) if w.rows is not None]
    if len(told) == 1:
        assert [[row] for row in told[0].indices()] == truth
    else:  # a part of the channels each, or nothing where they cannot be followed
        assert all({row} in map(set, truth) for rows in told for row in rows.indices())
        assert pick in ("turned round", "pairs", "a sum over heads", "by a number of the data", "halves swapped")


def test_the_batch_is_cut_to_two_rows_and_stays() -> None:
    batch = texts(4) | {"position_ids": torch.arange(12)[None]}
    graph = trace(transformers_model("BertModel", "BertConfig", _SMALL), batch)
    assert graph.inputs["input_ids"] == (2, 12) and batch["input_ids"].shape == (4, 12)
    one = trace(Tower(), torch.randn(1, 4, 16))
    assert one.inputs == {"0": (2, 4, 16)}  # a single row is doubled


def test_errors_name_the_module_and_the_input() -> None:
    model = transformers_model("BertModel", "BertConfig", _SMALL)
    with pytest.raises(InputError, match=r"BertModel .*pixels \[3, 4\].*at the model itself"):
        trace(model, {"pixels": torch.zeros(3, 4)})
    with pytest.raises(InputError, match=r"input_ids \[2, 4\].*word_embeddings.*Embedding"):
        trace(model, {"input_ids": torch.full((2, 4), 5000)})
    with pytest.raises(InputError, match="blocks.0.norm1"):
        trace(Tower(), torch.zeros(2, 4, 17))
    with pytest.raises(InputError, match="not a str"):
        trace(Tower(), "text")
    with pytest.raises(InputError, match="no parameter 'nothing'"):
        trace(Tower(), torch.zeros(2, 4, 16)).calls_of("nothing")


# -- as data -----------------------------------------------------------------------------------------------------------


def test_saved_printed_and_compared() -> None:
    batch = texts()
    model = transformers_model("MixtralForCausalLM", "MixtralConfig", {**_GQA, "num_local_experts": 4})
    graph = trace(model, batch)
    again = Graph.from_json(json.loads(json.dumps(graph.to_json())))
    assert again == graph and again.fingerprint() == graph.fingerprint()
    assert again.calls == graph.calls and again.attentions == graph.attentions and again.norms == graph.norms
    assert str(again) == str(graph) and "experts" in str(graph) and "attention_mask" in str(graph)
    with pytest.raises(InputError, match="no saved graph"):
        Graph.from_json({"nodes": []})


def test_the_fingerprint_is_of_the_structure() -> None:
    graph = trace(Tower(), torch.randn(2, 4, 16))
    assert trace(Tower(), torch.randn(3, 7, 16)).fingerprint() == graph.fingerprint()
    tied = Tower()
    tied.blocks[1].fc1.weight = tied.blocks[0].fc1.weight
    assert trace(tied, torch.randn(2, 4, 16)).fingerprint() != graph.fingerprint()
    assert trace(Tower(3), torch.randn(2, 4, 16)).fingerprint() != graph.fingerprint()


class AmongChannels(nn.Module):
    """Attention whose tokens are channels, as in XCiT: each channel of the result mixes those of v."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.proj = nn.Linear(16, 48), nn.Linear(16, 16)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, 4, 4)).permute(2, 0, 3, 4, 1)  # [B, heads, channels, tokens]
        mixed = (q @ k.mT).softmax(-1) @ v
        return self.proj(mixed.permute(0, 3, 1, 2).flatten(2))


def test_values_whose_channels_are_mixed_take_no_scale() -> None:
    graph = trace(AmongChannels().eval(), torch.randn(2, 9, 16))
    assert "exact" not in wrote(graph, "proj.weight").values()


def test_exact_moves_leave_the_output() -> None:
    torch.manual_seed(0)
    model, x = Tower().double(), torch.randn(2, 4, 16, dtype=torch.float64)
    graph = trace(model, x)
    before = model(x)
    with torch.no_grad():
        for call in graph.products:
            writers = graph.writers(call)
            weights = [w for w in writers if w.call.kind != "bias"]
            if len(weights) != 1 or weights[0].exactness != "exact":
                continue
            found = weights[0]
            scale = torch.rand(call.input_shape[-1], dtype=torch.float64) + 0.5
            weight = model.get_parameter(found.call.parameter)
            bias = model.get_parameter(found.call.parameter.replace("weight", "bias"))
            assert found.rows is not None
            rows = found.rows.indices()
            weight[rows] *= scale.view(-1, *[1] * (weight.ndim - 1))
            bias[rows] *= scale
            model.get_parameter(call.parameter).div_(scale)
    torch.testing.assert_close(model(x), before, rtol=1e-10, atol=1e-10)


class Normalised(nn.Module):
    """Values over their own length, as in YOSO and cosine attention; the length is expanded to all channels."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(16, 16), nn.Linear(16, 16)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(nn.functional.normalize(self.first(x), dim=-1))


def test_no_scale_moves_through_a_division_by_the_own_length() -> None:
    graph = trace(Normalised().eval(), torch.randn(2, 5, 16))
    assert wrote(graph, "second.weight") == {"first.weight": "none"}
