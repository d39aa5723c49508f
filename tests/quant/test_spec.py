from __future__ import annotations

import json
from typing import Any

import pytest

from s2d.errors import InputError
from s2d.quant.spec import QuantSpec


@pytest.mark.parametrize(
    ("text", "weight", "activation"),
    [
        ("w4a4", 4, 4),
        ("w4a8", 4, 8),
        ("W8A8", 8, 8),
        (" w6a6 ", 6, 6),
        ("w3a4", 3, 4),
        ("w4a16", 4, None),
        ("w16a4", None, 4),
    ],
)
def test_short_texts(text: str, weight: int | None, activation: int | None) -> None:
    spec = QuantSpec.parse(text)
    assert (spec.weight.format.bits if spec.weight else None) == weight
    for group in (spec.activation, spec.attention):
        assert (group.format.bits if group else None) == activation
    if spec.weight:
        assert spec.weight.format.symmetric and spec.weight.granularity == "channel"
    if spec.activation:
        assert not spec.activation.format.symmetric and spec.activation.granularity == "tensor"
    assert str(spec) == text.strip().lower()


@pytest.mark.parametrize(
    ("text", "format", "weight", "activation"),
    [
        ("fp8", "fp8_e4m3", "channel", "tensor"),
        ("mxfp8", "mxfp8", "block", "block"),
        ("MXFP4", "mxfp4", "block", "block"),
        ("nvfp4", "nvfp4", "block", "block"),
    ],
)
def test_named_formats(text: str, format: str, weight: str, activation: str) -> None:
    spec = QuantSpec.parse(text)
    assert spec.weight and spec.activation and spec.attention == spec.activation
    assert spec.weight.format.name == spec.activation.format.name == format
    assert (spec.weight.granularity, spec.activation.granularity) == (weight, activation)
    assert str(spec) == text.lower()
    if weight == "block":
        assert spec.with_observer("mse") == spec


def test_formats_can_be_mixed() -> None:
    spec = QuantSpec.parse(
        {"base": "w4a8", "weight": {"format": "nvfp4"}, "overrides": {"*.fc2": {"weight": {"bits": 8}}}}
    )
    assert spec.weight and spec.weight.granularity == "block" and spec.activation
    (_, fc2), *_ = spec.overrides
    assert fc2.weight and (fc2.weight.format.name, fc2.weight.granularity) == ("int8", "channel")
    shifted = {"weight": {"format": "int8-pow2"}, "activation": {"format": "int8-pow2"}}
    assert str(QuantSpec.parse(shifted)) == "w8a8-pow2" and str(QuantSpec.parse("w8a8")) == "w8a8"


@pytest.mark.parametrize("text", ["", "w4", "a4w4", "w4a4g128", "int4", "4/4", "w4 a4"])
def test_unknown_texts_come_with_examples(text: str) -> None:
    with pytest.raises(InputError, match="unknown quantization spec.*w4a4.*w8a8"):
        QuantSpec.parse(text)


@pytest.mark.parametrize("text", ["w8aint16", "w4auint16"])
def test_sixteen_bits_are_integers_where_they_are_named(text: str) -> None:
    spec = QuantSpec.parse(text)
    assert spec.activation and spec.activation == spec.attention and spec.activation.format.name == text[3:]
    assert spec.weight and spec.weight.format.name == f"int{text[1]}"
    assert str(spec) == text and QuantSpec.parse(spec.to_dict()) == spec
    assert QuantSpec.parse("w8a16").activation is None
    with pytest.raises(InputError, match="weight: int16 is for activations; weights have 2 to 8 bits"):
        QuantSpec.parse({"base": text, "weight": {"format": "int16"}})


@pytest.mark.parametrize("text", ["w1a4", "w9a8", "w4a32", "w4a0"])
def test_impossible_widths(text: str) -> None:
    with pytest.raises(InputError, match="bits is not possible; use 2 to 8"):
        QuantSpec.parse(text)


def test_full_form() -> None:
    spec = QuantSpec.parse(
        {
            "weight": {"bits": 3, "observer": "mse"},
            "activation": {"bits": 8, "granularity": "token"},
            "attention": {"bits": 6, "granularity": "tensor", "observer": "percentile:99.99"},
            "overrides": {"*.fc2": "w8a8", "head": {"weight": {"bits": 8}}, "re:layer\\.0\\.": "keep"},
        }
    )
    assert spec.weight and spec.activation and spec.attention
    assert (spec.weight.format.name, spec.weight.observer, spec.weight.granularity) == ("int3", "mse", "channel")
    assert (spec.activation.format.name, spec.activation.granularity) == ("uint8", "token")
    assert (spec.attention.format.name, spec.attention.observer) == ("uint6", "percentile:99.99")
    fc2, head, first = (override for _, override in spec.overrides)
    assert fc2 == QuantSpec.parse("w8a8")
    assert head.weight and head.weight.format.name == "int8" and head.weight.observer == "mse"
    assert head.activation == spec.activation
    assert first == QuantSpec()


@pytest.mark.parametrize(
    "form",
    [
        "w4a8",
        {"base": "w4a4", "attention": False},
        {"base": "w4a4", "overrides": {"*.fc2": "w8a8", "*.q": "keep"}},
        {
            "base": "w4a8",
            "activation": {"granularity": "token"},
            "weight": {"format": "uint4", "granularity": "tensor"},
        },
    ],
)
def test_round_trip_through_json(form: Any) -> None:
    spec = QuantSpec.parse(form)
    assert QuantSpec.parse(json.loads(json.dumps(spec.to_dict()))) == spec
    assert QuantSpec.parse(spec) is spec


def test_the_full_form_as_a_text() -> None:
    plain = QuantSpec.parse({"base": "w4a4-token", "attention": False})
    assert plain.attention is None and plain.activation is not None
    assert QuantSpec.parse("{base: w4a4-token, attention: false}") == plain
    assert QuantSpec.parse(' {"base": "w4a4-token", "attention": false}') == plain
    for wrong in ("{base: w4a4", "{" * 5000, "{}}"):
        with pytest.raises(InputError, match="is no mapping in braces; for example"):
            QuantSpec.parse(wrong)
    with pytest.raises(InputError, match="unknown"):
        QuantSpec.parse("{bse: w4a4}")


def test_attention_follows_the_activations_unless_told_otherwise() -> None:
    for form in (
        {"base": "w4a4", "activation": {"granularity": "token"}},
        {"activation": {"bits": 4, "granularity": "token"}},
    ):
        spec = QuantSpec.parse(form)
        assert spec.attention == spec.activation and spec.attention
    assert QuantSpec.parse({"base": {"base": "w4a4", "attention": False}, "activation": {"bits": 8}}).attention is None
    assert QuantSpec.parse({"base": "w4a4", "attention": "keep"}).attention is None
    spec = QuantSpec.parse({"base": {"base": "w4a4", "attention": False}, "attention": True})
    assert spec.attention == spec.activation


@pytest.mark.parametrize(
    ("form", "message"),
    [
        ({"wieght": {"bits": 4}}, "unknown keys in the quantization spec: wieght; known: base, weight"),
        ({"weight": {"bit": 4}}, "unknown keys in weight: bit; known: bits"),
        ({"weight": {"bits": 9}}, "no 9-bit integer format"),
        ({"weight": {"bits": "4"}}, "bits is a whole number"),
        ({"weight": {"bits": 4, "format": "int4"}}, "bits or format, not both"),
        ({"weight": {"format": "int12"}}, "unknown number format 'int12'"),
        ({"weight": {}}, "weight: give bits or format"),
        ({"weight": 4}, "weight: expected"),
        (
            {"weight": {"bits": 4, "granularity": "token"}},
            "granularity 'token' is not one of channel, tensor, group-128, block",
        ),
        ({"activation": {"bits": 4, "granularity": "channel"}}, "is not one of tensor, token, block"),
        ({"activation": {"bits": 4, "granularity": "block"}}, "blocks belong to mxfp8, mxfp4 and nvfp4; uint4"),
        ({"weight": {"format": "mxfp4", "granularity": "channel"}}, "mxfp4 cannot be per channel"),
        ({"weight": {"format": "mxfp4", "observer": "mse"}}, "a range per block is its own"),
        ({"activation": {"bits": 4, "granularity": "token", "observer": "mse"}}, "a range per token is its own"),
        ({"activation": {"bits": 4, "observer": "median"}}, "unknown observer 'median'"),
        ({"base": "w4a16", "attention": True}, "as the activations"),
        ({"base": "w4a4", "overrides": ["*.fc2"]}, "mapping from pattern"),
        ({"base": "w4a4", "overrides": {"re:(": "keep"}}, "not a regular expression"),
        ({"base": "w4a4", "overrides": {"*": {"overrides": {}}}}, "side by side"),
        (4, "text or a mapping, not int"),
    ],
)
def test_mistakes_in_the_full_form(form: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        QuantSpec.parse(form)


def test_the_last_matching_override_wins() -> None:
    spec = QuantSpec.parse({"base": "w4a4", "overrides": {"*.fc2": "w8a8", "*.fc2.input": "keep"}})
    assert spec.override_for("blocks.0.fc1", "weight") is None
    assert spec.override_for("blocks.0.fc2", "weight") == ("*.fc2", QuantSpec.parse("w8a8"))
    assert spec.override_for("blocks.0.fc2", "input") == ("*.fc2.input", QuantSpec())


def test_with_observer() -> None:
    spec = QuantSpec.parse({"base": "w4a4", "overrides": {"*.fc2": "w8a8"}})
    percentile, mse = spec.with_observer("percentile"), spec.with_observer("mse")
    for changed, weights, activations in ((percentile, "minmax", "percentile"), (mse, "mse", "mse")):
        for part in (changed, changed.overrides[0][1]):
            assert part.weight and part.activation and part.attention
            assert part.weight.observer == weights
            assert part.activation.observer == part.attention.observer == activations
    token = QuantSpec.parse({"base": "w4a4", "activation": {"granularity": "token"}}).with_observer("mse")
    assert token.activation and token.activation.observer == "minmax"
    assert token.weight and token.weight.observer == "mse"
    with pytest.raises(InputError, match="unknown observer"):
        spec.with_observer("best")


def test_groups_and_heads() -> None:
    spec = QuantSpec.parse(
        {
            "base": "w4a8",
            "weight": {"granularity": "group-128"},
            "attention": {"granularity": "head", "observer": "mse"},
        }
    )
    assert spec.weight and (spec.weight.granularity, spec.weight.group, spec.weight.format.bits) == ("group", 128, 4)
    assert spec.attention and spec.attention.granularity == "head"
    assert QuantSpec.parse(json.loads(json.dumps(spec.to_dict()))) == spec
    assert spec.to_dict()["weight"]["granularity"] == "group-128"
    coarser = QuantSpec.parse({"base": spec, "weight": {"bits": 3}})
    assert coarser.weight and (coarser.weight.format.bits, coarser.weight.group) == (3, 128)
    per_row = QuantSpec.parse({"base": spec, "weight": {"granularity": "channel"}})
    assert per_row.weight and (per_row.weight.granularity, per_row.weight.group) == ("channel", 0)


@pytest.mark.parametrize(
    ("form", "message"),
    [
        ({"weight": {"granularity": "group"}}, "weight: granularity 'group' is not one of channel, tensor, group-128"),
        ({"weight": {"granularity": "group-0"}}, "granularity 'group-0' is not one of"),
        ({"weight": {"granularity": "head"}}, "granularity 'head' is not one of"),
        ({"activation": {"granularity": "group-32"}}, "activation: granularity 'group-32' is not one of tensor, token"),
        ({"weight": {"format": "mxfp4", "granularity": "group-32"}}, "blocks belong to mxfp8"),
        ({"ends": {"base": "w8a8", "overrides": {"*": "keep"}}}, "ends holds overrides of its own"),
        ({"overrides": {"*": {"ends": "w8a8"}}}, "override '\\*' holds ends of its own"),
        ({"ends": "w9a9"}, "9 bits is not possible"),
    ],
)
def test_impossible_groups_heads_and_ends(form: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        QuantSpec.parse({"base": "w4a4", **form})


def test_the_ends_have_a_spec_of_their_own() -> None:
    spec = QuantSpec.parse({"base": "w4a4", "ends": {"activation": {"bits": 8}}})
    assert spec.ends and spec.ends.weight == spec.weight
    assert spec.ends.activation and spec.ends.activation.format.bits == 8
    assert QuantSpec.parse(spec.to_dict()) == spec
    assert QuantSpec.parse({"base": spec, "ends": "keep"}).ends is None
    assert QuantSpec.parse({"base": spec, "weight": {"bits": 3}}).ends == spec.ends
    observed = spec.with_observer("mse")
    assert observed.ends and observed.ends.activation and observed.ends.activation.observer == "mse"
