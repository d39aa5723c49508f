"""Small pieces of SVG: scales, ticks, marks. Colours are CSS classes, so one drawing serves light, dark and paper."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from html import escape

Scale = Callable[[float], float]


def linear(domain: tuple[float, float], target: tuple[float, float]) -> Scale:
    """A straight map from data to drawing; a domain of one point maps to the middle."""
    (low, high), (start, end) = domain, target
    if high == low:
        return lambda value: (start + end) / 2
    return lambda value: start + (value - low) / (high - low) * (end - start)


def logarithmic(domain: tuple[float, float], target: tuple[float, float]) -> Scale:
    """A logarithmic map; values at or below zero sit where the smallest value of the domain does."""
    low = domain[0]
    straight = linear((math.log10(low), math.log10(domain[1])), target)
    return lambda value: straight(math.log10(max(value, low)))


def ticks(low: float, high: float, count: int = 5) -> list[float]:
    """Round values (1, 2 or 5 times a power of ten apart) inside [low, high], about ``count`` of them."""
    if not high > low:
        return [low]
    raw = (high - low) / max(count, 1)
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(power * factor for factor in (1, 2, 5, 10) if raw <= power * factor)
    first = math.ceil(low / step - 1e-9)
    last = math.floor(high / step + 1e-9)
    return [round(number * step, 12) for number in range(first, last + 1)]


def decades(low: float, high: float, count: int = 5) -> list[float]:
    """Powers of ten inside [low, high], thinned to about ``count``."""
    first, last = math.ceil(math.log10(low) - 1e-9), math.floor(math.log10(high) + 1e-9)
    step = max(1, math.ceil((last - first + 1) / count))
    return [10.0**power for power in range(first, last + 1, step)]


def tick_label(value: float) -> str:
    """A round value on an axis, without needless digits."""
    size = abs(value)
    text = f"{size:,.0f}".replace(",", "\u202f") if size >= 1000 and size == round(size) else f"{size:.6g}"
    return "−" + text if value < 0 else text


def number(value: float) -> str:
    """A coordinate with as many digits as can be seen."""
    text = f"{value:.2f}".rstrip("0").rstrip(".")
    return "0" if text in ("-0", "") else text


def points_path(points: Sequence[tuple[float, float]]) -> str:
    """The path data through the points."""
    return "M" + "L".join(f"{number(x)} {number(y)}" for x, y in points)


def element(name: str, content: str = "", **attributes: object) -> str:
    """One element. ``class_`` and ``a_b`` become ``class`` and ``a-b``; values are escaped, ``content`` is not."""
    shown = "".join(
        f' {key.rstrip("_").replace("_", "-")}="{escape(number(value) if isinstance(value, float) else str(value))}"'
        for key, value in attributes.items()
        if value is not None
    )
    return f"<{name}{shown}>{content}</{name}>" if content else f"<{name}{shown}/>"


def text(x: float, y: float, words: object, class_: str = "", anchor: str = "start", **attributes: object) -> str:
    """A label; the words are escaped."""
    return element(
        "text", escape(str(words)), x=float(x), y=float(y), class_=class_ or None, text_anchor=anchor, **attributes
    )


def line(x1: float, y1: float, x2: float, y2: float, class_: str) -> str:
    """A straight line."""
    return element("line", x1=float(x1), y1=float(y1), x2=float(x2), y2=float(y2), class_=class_)


def title(words: object) -> str:
    """The words a pointer resting on the parent shows."""
    return element("title", escape(str(words)) or " ")


def drawing(width: float, height: float, content: Sequence[str], label: str, class_: str = "chart") -> str:
    """The whole drawing, which scales with the width it is given. ``label`` is what a screen reader says."""
    return element(
        "svg",
        "".join(content),
        viewBox=f"0 0 {number(width)} {number(height)}",
        role="img",
        aria_label=label,
        class_=class_,
        preserveAspectRatio="xMidYMid meet",
    )


MARKS = ("circle", "square", "triangle", "diamond")


def mark(kind: str, x: float, y: float, class_: str, tip: str = "", size: float = 4.0) -> str:
    """A point whose shape tells what its colour tells, for print and for eyes that mix colours up."""
    inside = title(tip) if tip else ""
    if kind == "square":
        return element("rect", inside, x=x - size, y=y - size, width=2 * size, height=2 * size, class_=class_)
    if kind == "triangle":
        path = (
            points_path([(x, y - 1.25 * size), (x + 1.15 * size, y + 0.9 * size), (x - 1.15 * size, y + 0.9 * size)])
            + "Z"
        )
        return element("path", inside, d=path, class_=class_)
    if kind == "diamond":
        path = points_path([(x, y - 1.3 * size), (x + 1.3 * size, y), (x, y + 1.3 * size), (x - 1.3 * size, y)]) + "Z"
        return element("path", inside, d=path, class_=class_)
    return element("circle", inside, cx=float(x), cy=float(y), r=size, class_=class_)
