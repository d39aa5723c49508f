"""The model card, read by the hub's own parser; and conditioned models read by transformers."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
from tests.report import sample
from tests.report.test_hostile import HOSTILE, everywhere

from s2d.report import write_card
from s2d.report.card import card

hub = pytest.importorskip("huggingface_hub")


def made(**more: Any) -> str:
    content = sample.run()
    training = {"steps": 300, "seed": 0, "settings": {"lr": 5e-5}, "decay": {"strength": 5e-4}}
    training["history"] = [
        {"step": step, "outlier_ratio": value, "weight": "w"} for step, value in ((0, 3.0), (0, 214.0), (25, 9.0))
    ]
    settings: dict[str, Any] = {"base": "sentence-transformers/all-MiniLM-L6-v2", "task": "docstrings", "name": "mine"}
    settings |= {"training": training, "run": content["run"], "records": content["records"]}
    return card(**{**settings, **more})


def test_the_front_matter_is_valid_and_holds_every_number() -> None:
    found = hub.ModelCard(made())
    found.data  # noqa: B018  parsed by the property
    assert found.data.base_model == "sentence-transformers/all-MiniLM-L6-v2"
    assert found.data.pipeline_tag == "sentence-similarity" and "selective-spectral-decay" in found.data.tags
    results = found.data.eval_results
    wanted = [r for r in sample.run()["records"] if r["conditioning"] == "s2d"]
    assert len(results) == len(wanted)
    assert sorted(result.metric_value for result in results) == pytest.approx(sorted(r["value"] for r in wanted))
    assert any(result.metric_name == "MRR@10 (W4A4 rtn · mse, simulated, seed 0)" for result in results)


def test_the_text_compares_the_arms_and_says_what_the_decay_saw() -> None:
    text = made()
    rows = {line.split("|")[1].strip(): line for line in text.splitlines() if line.startswith("|")}
    assert "MRR@10, docstrings" in rows and "AdamW" in rows and "AdamW \\+ S2D" in rows
    assert "214× at step 0, 9.00× at step 25" in text
    assert "3 seeds." in text and "simulated" in text and "of its strength" not in text
    moments = [
        {"step": n, "outlier_ratio": 9.0, "weight": "w", "selected": 1, "pace": pace} for n, pace in ((0, 1), (5, 0.2))
    ]
    assert "used 60 % of its strength" in made(training={"decay": {}, "history": moments})


def test_a_rival_is_not_called_spectral_decay() -> None:
    text = made(arm="tweo", training={"steps": 3, "decay": {"baseline": "tweo", "weight": 0.1}})
    assert "with the baseline `tweo`" in text and "**selective spectral decay**" not in text


def test_a_card_without_numbers_is_one_too() -> None:
    found = hub.ModelCard(card(base="./folder", task="my-task"))
    assert found.data.to_dict().get("base_model") is None and found.data.eval_results is None
    assert "Measured" not in found.text


def test_a_trial_has_no_numbers_in_its_index() -> None:
    run = {**sample.run()["run"], "trial": True}
    assert hub.ModelCard(made(run=run)).data.eval_results is None and "its numbers mean nothing" in made(run=run)


def test_hostile_names_are_words() -> None:
    def attack(text: str) -> str:
        return text if text in ("fp32", "w4a4", "adamw", "s2d") else f"{text}{HOSTILE}\n---\nlicense: mit\n| `x`"

    content = everywhere(copy.deepcopy(sample.run()), attack)
    name = attack("mine")
    text = made(records=content["records"], run=content["run"], name=name, base=name, task=name)
    found = hub.ModelCard(text)
    assert found.data.to_dict().get("license") is None and found.data.to_dict().get("base_model") is None
    body = text.split("\n---\n", 1)[1]
    outside = "".join(part for index, part in enumerate(body.replace("```", "").split("`")) if index % 2 == 0)
    assert "<" not in outside


def test_the_card_is_written_beside_the_model(tmp_path: Path) -> None:
    path = write_card(tmp_path / "conditioned", base="owner/name", task="docstrings")
    assert path == tmp_path / "conditioned" / "README.md"
    assert hub.ModelCard.load(path).data.base_model == "owner/name"
