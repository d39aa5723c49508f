"""Numbers formatted for reading."""

from __future__ import annotations

import math

MISSING = "–"


def show(value: float, digits: int = 3) -> str:
    """``value`` to three significant digits, with a real minus sign and thin spaces between thousands."""
    if math.isnan(value):
        return MISSING
    if math.isinf(value):
        return "∞" if value > 0 else "−∞"
    size = abs(value)
    if size >= 10 ** (digits - 1):
        text = f"{size:,.0f}".replace(",", "\u202f")
    elif size < 10 ** -(digits + 1) and size > 0:
        text = f"{size:.{digits - 1}e}"
    else:
        decimals = digits - 1 - (math.floor(math.log10(size)) if size > 0 else digits - 1)
        text = f"{size:.{max(decimals, 0)}f}"
    return ("−" if value < 0 and any(digit in text for digit in "123456789") else "") + text


def points(value: float) -> str:
    """A score: one decimal below 1000, where a third digit after the point would be noise."""
    if not math.isfinite(value):
        return show(value)
    if abs(value) >= 1000:
        return show(value)
    text = f"{value:.1f}"
    return "0.0" if text == "-0.0" else text.replace("-", "−")


def signed(value: float) -> str:
    """A difference of scores, always with its sign (zero has none)."""
    text = points(value)
    return text if text.startswith("−") or text in ("0.0", MISSING) else "+" + text


def two_decimals(value: float) -> str:
    """A share that may exceed one, such as 0.98."""
    return f"{value:.2f}".replace("-", "−") if math.isfinite(value) else show(value)


def ratio(value: float) -> str:
    """A factor, such as 214×."""
    return MISSING if math.isnan(value) else show(value) + "×"


def percent(value: float) -> str:
    """A share, such as 38 %; the space does not break."""
    return MISSING if math.isnan(value) else f"{100 * value:.0f}\u00a0%".replace("-", "−")
