"""Massive-activation tokens: the tokens of a language model with the largest inputs of its weights.

Decoders store a few enormous values in the first token of a text, or in the first delimiter, whatever the text says
(Massive Activations, arXiv 2402.17762). Attention heads that find nothing relevant attend to this token. One range for
all tokens is then set by these tokens alone.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from s2d.io.files import JSON

if TYPE_CHECKING:
    from s2d.audit.findings import AuditRow

# How many of the rows with the largest values are reported.
TOP = 5
# An outlier belongs to the first tokens when the largest value without them is at most this share of the largest.
OWN = 0.5


@dataclass
class _Sums:
    squares: float = 0.0
    entries: int = 0
    peak: float = 0.0
    top: list[tuple[float, int, int]] = field(default_factory=list)

    def add(self, x_NI: Tensor, peaks_N: Tensor) -> None:
        self.squares += torch.linalg.vector_norm(x_NI).item() ** 2
        self.entries += x_NI.numel()
        self.peak = max(self.peak, peaks_N.max().item()) if len(peaks_N) else self.peak

    @property
    def ratio(self) -> float | None:
        rms = math.sqrt(self.squares / self.entries) if self.entries else 0.0
        return self.peak / rms if rms > 0 else None


class MassiveTokens:
    """Records the largest inputs of weights, with the token of every row."""

    def __init__(self) -> None:
        self._rest: dict[str, _Sums] = {}  # all but the first tokens of texts
        self._top: dict[str, list[tuple[float, int, int]]] = {}
        self._positions: Tensor | None = None
        self._ids: Tensor | None = None

    def noting(self, batches: Iterable[Any]) -> Iterator[Any]:
        """The unchanged batches; the tokens of the latest one are stored."""
        for batch in batches:
            self._positions = self._ids = None
            ids = batch.get("input_ids") if isinstance(batch, Mapping) else None
            if isinstance(ids, Tensor) and ids.ndim == 2:
                mask = batch.get("attention_mask")
                real = torch.ones_like(ids, dtype=torch.bool) if mask is None else mask.bool().to(ids.device)
                self._positions, self._ids = (real.long().cumsum(1) - 1)[real].cpu(), ids[real].cpu()
            yield batch

    def add(self, weight: str, x_NI: Tensor) -> None:
        """Add the inputs of a weight, one row per token. Other inputs are left out (experts see some of the tokens)."""
        if self._positions is None or self._ids is None or len(self._positions) != len(x_NI):
            return
        peaks = x_NI.abs().amax(1).cpu()
        later = self._positions > 0
        self._rest.setdefault(weight, _Sums()).add(x_NI[later.to(x_NI.device)], peaks[later])
        rows = peaks.topk(min(TOP, len(peaks))).indices
        found = zip(peaks[rows].tolist(), self._positions[rows].tolist(), self._ids[rows].tolist(), strict=True)
        self._top[weight] = sorted([*self._top.get(weight, ()), *found], reverse=True)[:TOP]

    def record(self, weight: str) -> JSON | None:
        """The records of a weight.

        ``top`` holds the rows with the largest values: ``value``, ``position`` in the text and ``token`` id.
        ``max_without_first`` is the largest value without the first tokens, ``ratio_without_first`` that over the RMS.
        """
        if weight not in self._top:
            return None
        top = [{"value": value, "position": place, "token": token} for value, place, token in self._top[weight]]
        rest = self._rest[weight]
        return {"top": top, "max_without_first": rest.peak, "ratio_without_first": rest.ratio}


def is_first_token_s(row: AuditRow) -> bool:
    """Whether a weight's largest input belongs to first tokens, and most of the outlier vanishes without them."""
    if row.carriers is None:
        return False
    largest = row.carriers["top"][0]
    return largest["position"] == 0 and row.carriers["max_without_first"] <= OWN * largest["value"]


def summary(rows: Sequence[AuditRow], decode: Callable[[int], str] | None = None, most: int = 3) -> list[str]:
    """Lines of text about the largest inputs and the tokens that carry them; none where tokens are not known.

    Args:
        rows: Rows of an audit.
        decode: A token's text by its id.
        most: How many weights are named.
    """
    known = [row for row in rows if row.carriers is not None and row.input_ratio is not None]
    if not known:
        return []
    lines = []
    for row in sorted(known, key=lambda row: -(row.input_ratio or 0.0))[:most]:
        assert row.carriers is not None and row.input_ratio is not None
        top = row.carriers["top"]
        places = ", ".join(str(each["position"]) for each in top)
        tokens = ", ".join(dict.fromkeys(repr(decode(t["token"])) if decode else str(t["token"]) for t in top))
        name, rest = row.weight.removesuffix(".weight"), row.carriers["ratio_without_first"]
        without = "" if rest is None else f"; without first tokens {rest:.0f}"
        lines.append(f"input of {name}: {row.input_ratio:.0f} times the RMS, at positions {places} ({tokens}){without}")
    own = sum(map(is_first_token_s, known))
    if own:
        lines.append(
            f"{own} of {len(known)} inputs are stretched by the first token of a text alone; keep it out of the "
            "others' ranges: s2d quantize --spec w4a4-token, or --prefix 1"
        )
    return lines
