"""Match the classes of a model to those of the data by name; order, case and punctuation do not matter."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Sequence

_SHOWN = 12


def _letters(name: str) -> str:
    return "".join(character for character in name.casefold() if character.isalnum())


# The strictest comparison that finds every name is used. A name that fits two classes matches none: "C" and "C++".
_READINGS: tuple[Callable[[str], str], ...] = (str, lambda name: " ".join(name.casefold().split()), _letters)


def match(wanted: Sequence[str], known: Sequence[str]) -> list[int] | None:
    """The position in ``known`` of each of the ``wanted`` names; None when one of them is not there.

    Args:
        wanted: Classes of the data; they may be fewer than the model's.
        known: Classes of the model, in the order of its scores.
    """
    for reading in _READINGS:
        read = [reading(name) for name in known]
        often = Counter(read)
        places = {name: place for place, name in enumerate(read) if often[name] == 1}
        names = [reading(name) for name in wanted]
        if len(set(names)) == len(names) and all(name in places for name in names):
            return [places[name] for name in names]
    return None


def only_numbered(names: Sequence[str]) -> bool:
    """Whether names carry no meaning: numbers, or WordNet codes, as in ImageNet's folder names."""
    return all(re.fullmatch(r"\d+|n\d{8}", name.strip()) for name in names)


def places_of(wanted: Sequence[str], known: Sequence[str], count: int) -> list[int] | None:
    """As `match`; where one side has no real names and both are equally many, the order is taken as it is.

    Args:
        wanted: Classes of the data.
        known: Names of the model's classes; empty where it has none.
        count: Number of classes of the model.
    """
    found = match(wanted, known) if known else None
    if found is None and len(wanted) == count and (not known or only_numbered(known) or only_numbered(wanted)):
        return list(range(count))
    return found


def both_lists(wanted: Sequence[str], known: Sequence[str], count: int) -> str:
    """Text for messages: the classes of the data and of the model."""
    model = _listed(known) if known else f"{count} without names"
    return f"classes of the data: {_listed(wanted)}; classes of the model: {model}"


def _listed(names: Sequence[str]) -> str:
    more = f", ... ({len(names)})" if len(names) > _SHOWN else ""
    return ", ".join(names[:_SHOWN]) + more
