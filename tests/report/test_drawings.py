"""Scales, ticks, numbers and colours; the drawings as well-formed XML with the marks they should have."""

from __future__ import annotations

import math
from xml.etree import ElementTree

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.report import sample

from s2d.report import formatting, svg
from s2d.report.charts import bits_panels
from s2d.report.histogram_chart import bulk, caption, histogram_drawing, span
from s2d.report.history_chart import history_panels, most_decayed
from s2d.report.layermap import MEASURES, colour, layers
from s2d.report.results import read_results
from s2d.report.summary import groups


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0, "0"),
        (1234.5, "1\u202f234"),
        (214.4, "214"),
        (8.0, "8.00"),
        (0.0277, "0.0277"),
        (0.97, "0.970"),
        (-3.14159, "−3.14"),
        (1e-7, "1.00e-07"),
        (math.nan, "–"),
        (math.inf, "∞"),
        (-math.inf, "−∞"),
    ],
)
def test_three_significant_digits(value: float, text: str) -> None:
    assert formatting.show(value) == text


@pytest.mark.parametrize(
    ("value", "text"), [(7.04, "+7.0"), (-0.31, "−0.3"), (0.04, "0.0"), (-0.04, "0.0"), (math.nan, "–")]
)
def test_differences_carry_their_sign(value: float, text: str) -> None:
    assert formatting.signed(value) == text


@given(st.floats(-1e6, 1e6), st.floats(1e-3, 1e6))
def test_ticks_are_round_inside_and_few(low: float, width: float) -> None:
    found = svg.ticks(low, low + width)
    tolerance = 1e-6 * (abs(low) + width)
    assert 1 <= len(found) <= 7
    assert all(low - tolerance <= tick <= low + width + tolerance for tick in found)


def test_log_scale_clamps_what_is_not_positive() -> None:
    scale = svg.logarithmic((1, 100), (0, 10))
    assert [scale(value) for value in (1, 10, 100, 0, -5)] == pytest.approx([0, 5, 10, 0, 0])


def test_colours_run_dark_to_light_with_readable_ink() -> None:
    assert colour(-1)[0] == colour(0)[0] == "#00224e"
    assert colour(2)[0] == colour(1)[0] == "#fee838"
    assert colour(0)[1] == "#fff" and colour(1)[1] == "#000"
    for step in range(101):
        background, ink = colour(step / 100)
        assert contrast(background, ink) > 4.5  # what WCAG 2 asks of small text


def contrast(first: str, second: str) -> float:
    """The contrast ratio of WCAG 2, from its definition."""

    def luminance(code: str) -> float:
        digits = code[1:] if len(code) == 7 else "".join(2 * digit for digit in code[1:])
        parts = [int(digits[i : i + 2], 16) / 255 for i in (0, 2, 4)]
        red, green, blue = (part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts)
        return 0.2126 * red + 0.7152 * green + 0.0722 * blue

    light, dark = sorted((luminance(first), luminance(second)), reverse=True)
    return (light + 0.05) / (dark + 0.05)


def marks(drawing: str, class_: str) -> int:
    """How many elements of an SVG text carry a class."""
    return sum(class_ in (element.get("class") or "").split() for element in ElementTree.fromstring(drawing).iter())


def test_score_panels_hold_a_mark_per_series_and_width() -> None:
    group = groups(read_results(sample.run()).records)[0]
    panels = bits_panels(group)
    assert [heading for heading, _ in panels] == [
        "Mean of all calibrations",
        "rtn · minmax",
        "rtn · percentile",
        "rtn · mse",
    ]
    assert [marks(panel, "mark") for _, panel in panels] == [8, 8, 8, 8]
    assert all(marks(panel, "band") == 2 for _, panel in panels)
    assert "W4A4" in panels[0][1]


def test_a_single_seed_has_no_band() -> None:
    panels = bits_panels(groups(read_results(sample.run(seeds=1)).records)[0])
    assert all(marks(panel, "band") == 0 for _, panel in panels)


def test_an_exploding_perplexity_is_drawn() -> None:
    records = [
        {
            "task": "lm",
            "conditioning": "none",
            "spec": spec,
            "metric": "perplexity",
            "value": value,
            "higher_is_better": False,
        }
        for spec, value in (("fp32", 30.1), ("w8a8", 46.6), ("w4a4", 5.4e6), ("w2a2", math.inf))
    ]
    ((_, panel),) = bits_panels(groups(read_results({"records": records}).records)[0])
    assert marks(panel, "mark") == 3
    assert "100\u202f000" in panel


def test_histogram_shows_every_level_and_alternates_tints() -> None:
    weight = read_results(sample.audit()).audits[0].weight("encoder.layer.0.output.dense.weight")
    assert weight and weight.histogram
    drawing = histogram_drawing(weight.histogram, span(weight.histogram), "all")
    assert marks(drawing, "level") == 16
    assert marks(drawing, "cell-0") > 0 and marks(drawing, "cell-1") > 0
    close = bulk(weight.histogram)
    assert close is not None and close[1] - close[0] < 0.2 * (span(weight.histogram)[1] - span(weight.histogram)[0])
    assert marks(histogram_drawing(weight.histogram, close, "close"), "level") <= 2
    assert caption(weight.histogram).startswith("99 % of the values share 1 of the 16 levels")


def test_coarse_bins_have_no_close_up() -> None:
    row = {"weight": "w", "histogram": {"edges": list(range(11)), "counts": [1000, *[0] * 8, 1], "grid": [0, 5, 10]}}
    weight = read_results({"kind": "audit", "records": [row]}).audits[0].weights[0]
    assert weight.histogram and bulk(weight.histogram) is None


def test_history_shows_the_most_decayed_first() -> None:
    tracks = most_decayed(read_results(sample.run()).history)
    assert len(tracks) == 5  # layer 3 was never selected
    falls = [track.series("ratio")[0][1] / track.series("ratio")[-1][1] for track in tracks]
    assert falls == sorted(falls, reverse=True)
    panels = history_panels(tracks)
    assert [heading for heading, _ in panels] == ["Leading singular value σ₁", "Largest output / RMS"]
    assert marks(panels[1][1], "series") == 5


def test_history_without_refreshes_draws_nothing() -> None:
    assert history_panels(most_decayed([])) == []


def test_maps_share_one_scale_and_mark_the_selected() -> None:
    found = layers(read_results(sample.run()).audits)
    assert [layer.measure for layer in found] == list(MEASURES)
    ratios = found[2]
    assert [map.label for map in ratios.maps] == ["adamw", "s2d"]
    assert [name for name, _ in ratios.maps[0].rows] == ["0", "1", "2", "3", "4", "5"]
    cells = [dict(zip(map.roles, map.rows[0][1], strict=True)) for map in ratios.maps]
    before, after = cells[0]["fc2"], cells[1]["fc2"]
    assert before and after
    assert (before.value, before.selected, before.background) == ("214×", True, "#fee838")
    assert not after.selected and after.background != before.background
    assert [role for role, _ in ratios.maps[0].outside] == ["embedding"]


def test_two_weights_in_one_place_show_the_worse() -> None:
    rows = [
        {"weight": f"w{index}", "role": "fc1", "depth": 0, "output_ratio": ratio} for index, ratio in enumerate((3, 9))
    ]
    (layer,) = layers(read_results({"kind": "audit", "records": rows}).audits)
    cell = layer.maps[0].rows[0][1][0]
    assert cell and cell.weight == "w1" and "the worst of 2" in cell.tip
