"""Numbers, colours, and the data that the charts are drawn from."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.report import sample

from s2d.report import formatting
from s2d.report.close_up import weight_figures
from s2d.report.histograms import bulk, caption, histogram_figure, pieces, span
from s2d.report.histories import history_figure, most_decayed, tracks
from s2d.report.layermap import MEASURES, colour, layers
from s2d.report.schema import Histogram, read_results
from s2d.report.scores import score_figure, style
from s2d.report.summary import groups
from s2d.report.trend import trend_figure


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


def test_score_panels_hold_a_series_per_conditioning_and_a_value_per_width() -> None:
    figure = score_figure(groups(read_results(sample.run()).records)[0])
    assert figure is not None and not figure["logarithmic"]
    headings = ["mean of all calibrations", "rtn · minmax", "rtn · percentile", "rtn · mse"]
    assert [panel["heading"] for panel in figure["panels"]] == headings
    for panel in figure["panels"]:
        assert [series["name"] for series in panel["series"]] == ["AdamW", "AdamW + S2D"]
        for series in panel["series"]:
            assert series["seeds"] == [3, 3, 3, 3]
            for low, mean, high in zip(series["low"], series["mean"], series["high"], strict=True):
                assert low < mean < high
    assert "W4A4" in figure["panels"][0]["said"]


def test_an_exploding_perplexity_is_drawn_on_a_logarithmic_scale() -> None:
    values = (("fp32", 30.1), ("w8a8", 46.6), ("w4a4", 5.4e6), ("w2a2", math.inf))
    common = {"task": "lm", "conditioning": "none", "metric": "perplexity", "higher_is_better": False}
    records = [{**common, "spec": spec, "value": value} for spec, value in values]
    figure = score_figure(groups(read_results({"records": records}).records)[0])
    assert figure is not None and figure["logarithmic"]
    assert figure["panels"][0]["series"][0]["mean"] == [30.1, 46.6, 5.4e6, None]


def test_no_two_series_look_alike() -> None:
    names = ["none", "adamw", "s2d", "a", "b", "c"]
    looks = [style(name, names) for name in names]
    for key in ("colour", "dash", "symbol"):
        assert len({look[key] for look in looks}) == len(names)


def worst() -> Histogram:
    weight = read_results(sample.audit()).audits[0].weight("encoder.layer.0.output.dense.weight")
    assert weight and weight.histogram
    return weight.histogram


def test_the_picture_holds_every_level_and_every_value() -> None:
    figure = histogram_figure(worst(), span(worst()), "all")
    assert len(figure["grid"]) == len(figure["shares"]) == 16
    assert sum(figure["shares"]) == pytest.approx(1, abs=1e-4)
    close = bulk(worst())
    assert close is not None and close[1] - close[0] < 0.2 * (span(worst())[1] - span(worst())[0])
    assert sum(close[0] <= level <= close[1] for level in figure["grid"]) <= 2
    assert caption(worst()).startswith("99 % of the values share 1 of the 16 levels")


@given(st.lists(st.integers(0, 1000), min_size=1, max_size=30).filter(any), st.integers(2, 16), st.floats(0.1, 9))
def test_pieces_are_the_bins_cut_at_the_middles_between_levels(counts: list[int], levels: int, width: float) -> None:
    edges = [width * index for index in range(len(counts) + 1)]
    grid = [edges[-1] * level / (levels - 1) for level in range(levels)]
    found = pieces(Histogram(tuple(edges), tuple(counts), tuple(grid), "input"))
    assert sum(density * (b - a) for a, b, density, _ in found) == pytest.approx(sum(counts))
    for a, b, _, level in found:
        middle = (a + b) / 2
        assert abs(grid[level] - middle) <= min(abs(other - middle) for other in grid) + 1e-9 * edges[-1]


def test_coarse_bins_have_no_close_up() -> None:
    row = {"weight": "w", "histogram": {"edges": list(range(11)), "counts": [1000, *[0] * 8, 1], "grid": [0, 5, 10]}}
    weight = read_results({"kind": "audit", "records": [row]}).audits[0].weights[0]
    assert weight.histogram and bulk(weight.histogram) is None


def test_history_shows_the_most_decayed_first() -> None:
    found = most_decayed(tracks(read_results(sample.run()).history))
    assert len(found) == 5  # layer 3 was never selected
    falls = [track.fall() for track in found]
    assert falls == sorted(falls, reverse=True) and falls[0] == pytest.approx(214 / (214 * 0.82**12))
    panels = history_figure(found)
    assert [panel["measure"] for panel in panels] == ["ratio", "sigma"]
    assert all(len(panel["weights"]) == 5 for panel in panels)


def test_history_without_refreshes_draws_nothing() -> None:
    assert history_figure(most_decayed(tracks([]))) == []


def test_a_weight_s_pictures_hold_its_spectra_shares_and_history() -> None:
    results = read_results(sample.run())
    figures = weight_figures(results.audits, tracks(results.history))
    found = figures["encoder.layer.0.output.dense.weight"]
    assert [curve["name"] for curve in found["spectra"]] == ["adamw", "s2d"]
    assert all(len(curve["rank"]) == len(curve["sigma"]) for curve in found["spectra"])
    assert all(len(row["weight"]) == len(row["data"]) == 3 for row in found["pcdr"])
    assert len(found["histograms"]) == 2 and found["history"]["step"][-1] == 300
    assert figures["embeddings.word_embeddings.weight"]["pcdr"] == []


def test_a_trend_has_scores_outliers_and_the_worst_weights() -> None:
    results = read_results(sample.trend())
    assert results.trend
    figure = trend_figure(results.audits, results.records)
    assert figure is not None and figure["labels"] == ["step 10", "step 20", "step 30", "step 40"]
    headings = [panel["heading"] for panel in figure["panels"]]
    assert headings[0] == "accuracy, digits" and headings[-1] == "the worst outputs, max / RMS"
    scores = {series["name"]: series["values"] for series in figure["panels"][0]["series"]}
    assert scores == {"FP32": [70, 71, 72, 73], "W4A4": [60, 50, 40, 30]}
    outliers = figure["panels"][1]["series"][0]["values"]
    assert outliers == sorted(outliers) and outliers[-1] == pytest.approx(214)
    assert trend_figure(results.audits[:1], ()) is None


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
