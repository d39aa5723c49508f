"""What `s2d evaluate` wrote one by one, of the published, conditioned and quantized model, becomes one comparison."""

from __future__ import annotations

from typing import Any

from s2d.report.schema import read_results
from s2d.report.scores import style
from s2d.report.summary import groups, label, run_verdict


def evaluation(conditioning: str, spec: str, value: float) -> dict[str, Any]:
    record = {"task": "docstrings", "model": "minilm", "conditioning": conditioning, "seed": 0, "spec": spec}
    return {"run": {}, "records": [{**record, "metric": "mrr@10", "value": value, "split": "test"}]}


def test_a_conditioned_checkpoint_is_compared_with_the_published_model() -> None:
    made = "s2d (runs/conditioned)"
    files = [evaluation("none", "w4a4", 40.0), evaluation(made, "w4a4", 52.0), evaluation(made, "fp32", 60.0)]
    found = groups(read_results(files).records)
    assert len(found) == 1 and found[0].specs == ["fp32", "w4a4"]
    verdict = run_verdict(found)
    assert verdict.headline == "S2D helps at W4A4, on one seed" and verdict.tiles[0][0] == "+12.0"
    assert label(made) == "S2D (runs/conditioned)" and label("s2d") == "AdamW + S2D"


def test_two_conditioned_checkpoints_are_not_averaged_and_look_different() -> None:
    names = ["s2d (runs/a)", "s2d (runs/b)"]
    files = [evaluation(names[0], "w4a4", 50.0), evaluation(names[1], "w4a4", 60.0)]
    group = groups(read_results(files).records)[0]
    assert [group.values(name, "w4a4") for name in names] == [[50.0], [60.0]]
    assert style(names[0], names) != style(names[1], names)
    assert style(names[0], names[:1]) == style("s2d", ["s2d"])
