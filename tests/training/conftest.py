"""A tiny text encoder and its task, made once per module."""

from __future__ import annotations

import pytest
from tests.tiny_text import make_model, make_task

from s2d.models import Loaded, load
from s2d.tasks import Task


@pytest.fixture(scope="module")
def loaded(tmp_path_factory: pytest.TempPathFactory) -> Loaded:
    return load(make_model(tmp_path_factory.mktemp("model") / "bert"))


@pytest.fixture(scope="module")
def task(tmp_path_factory: pytest.TempPathFactory, loaded: Loaded) -> Task:
    return make_task(tmp_path_factory.mktemp("data") / "words", loaded)
