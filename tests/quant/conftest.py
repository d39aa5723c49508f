"""Fixtures that hand out the tiny models."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from tests.quant.tiny_models import CASES, Case, plain


@pytest.fixture(params=list(CASES))
def case(request: pytest.FixtureRequest) -> Case:
    """Every kind of attention in turn."""
    torch.manual_seed(0)
    return CASES[request.param]()


@pytest.fixture
def make() -> Callable[[str], Case]:
    """Build one of the cases by name; ``plain-STYLE`` with any style."""

    def build(name: str) -> Case:
        torch.manual_seed(0)
        return CASES[name]() if name in CASES else plain(name.removeprefix("plain-"))

    return build
