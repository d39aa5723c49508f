"""Inputs made to do harm, or damaged, and what reads them; `python -m tests.hostile_inputs` prints the messages."""

from __future__ import annotations

import io
import json
import os
import pickle
import struct
import tempfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save as to_safetensors

from s2d.data.image_folders import read_labelled_images
from s2d.data.tables import read_table
from s2d.data.texts import read_texts
from s2d.errors import InputError
from s2d.experiments.recipe import make_recipe, read_recipe
from s2d.io.files import read_json
from s2d.models import load, save_model
from s2d.models.saved import read_weights
from s2d.quant import QuantSpec
from s2d.report.schema import read_results
from s2d.training.state import read_state

Case = tuple[str, Callable[[Path], object], str]
BASE = {"model": "m", "task": {"name": "t"}}
HEADER = "model: m\ntask: {name: t}\n"


class Attack:
    """A pickle of it makes a folder when it is read."""

    def __init__(self, place: Path) -> None:
        self.place = place

    def __reduce__(self) -> Any:
        return (os.mkdir, (str(self.place / "attacked"),))


def written(place: Path, name: str, content: bytes | str) -> Path:
    path = place / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def recipe(text: str) -> Callable[[Path], object]:
    return lambda place: read_recipe(str(written(place, "recipe.yaml", HEADER + text)))


def override(text: str) -> Callable[[Path], object]:
    return lambda place: make_recipe(BASE, [text])


def table(name: str, content: bytes | str) -> Callable[[Path], object]:
    return lambda place: read_table(written(place, name, content))


def weights(name: str, content: Callable[[Path], bytes]) -> Callable[[Path], object]:
    return lambda place: read_weights(written(place, name, content(place)))


def torch_file(content: object) -> bytes:
    sink = io.BytesIO()
    torch.save(content, sink)
    return sink.getvalue()


def compressed(place: Path) -> bytes:
    """A PyTorch file whose tensor of 64 MB of zeros takes 64 kB."""
    sink = io.BytesIO()
    plain = zipfile.ZipFile(io.BytesIO(torch_file({"w": torch.zeros(1 << 24)})))
    with zipfile.ZipFile(sink, "w", zipfile.ZIP_DEFLATED) as packed:
        for entry in plain.infolist():
            packed.writestr(entry.filename, plain.read(entry))
    return sink.getvalue()


def header(fields: dict[str, Any], length: int | None = None) -> bytes:
    text = json.dumps(fields).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text


def model(change: Callable[[dict[str, Any]], object]) -> Callable[[Path], object]:
    """A saved model with a changed configuration."""

    def read(place: Path) -> object:
        folder = save_model(load("new:vit-tiny").model, place / "model")
        content = json.loads((folder / "s2d_config.json").read_text())
        change(content["model"])
        (folder / "s2d_config.json").write_text(json.dumps(content))
        return load(folder)

    return read


def integers(place: Path) -> object:
    folder = save_model(load("new:vit-tiny").model, place / "model")
    content = {"classifier.weight": torch.ones(4, 4, dtype=torch.int32)}
    (folder / "model.safetensors").write_bytes(to_safetensors(content))
    return load(folder)


def images(cells: list[Any], labels: list[Any]) -> Callable[[Path], object]:
    def read(place: Path) -> object:
        import pyarrow
        import pyarrow.parquet

        pyarrow.parquet.write_table(pyarrow.table({"image": cells, "label": labels}), place / "i.parquet")
        return read_labelled_images(str(place / "i.parquet"))

    return read


def picture(content: Callable[[], bytes]) -> Callable[[Path], object]:
    """An image that cannot be decoded is left out, with its reason; alone in its split, it is an error."""

    def read(place: Path) -> object:
        from s2d.data.image_table import ImageTable

        table = ImageTable([content()], load("new:vit-tiny").processor)
        assert table.first_readable() is None
        raise InputError(f"left out: {table.unreadable[0]}")

    return read


def bomb_png() -> bytes:
    """30000 x 30000 pixels by its header."""
    import zlib

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    size = struct.pack(">IIBBBBB", 30000, 30000, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", size) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


BOMB = "a: &a [x,x,x,x,x,x,x,x,x]\n" + "".join(
    f"{b}: &{b} [*{a},*{a},*{a},*{a},*{a},*{a},*{a},*{a},*{a}]\n" for a, b in zip("abcdefg", "bcdefgh", strict=True)
)
DEEP = "[" * 100_000

CASES: list[Case] = [
    ("recipe: a YAML tag that runs code", recipe("device: !!python/object/apply:os.system ['true']"), "not YAML"),
    ("recipe: aliases of aliases (9^8 values)", recipe(BOMB), "stands for too much data"),
    ("recipe: an alias of itself", recipe("arms: &a {s2d: *a}"), "stands for too much data"),
    ("recipe: 100,000 brackets", recipe("arms: " + DEEP), "nested too deeply"),
    ("recipe: the 99th of a month", recipe("about: 2026-01-99"), "day"),
    ("recipe: a number of 9,999 digits", recipe("seeds: [" + "9" * 9_999 + "]"), "not a recipe"),
    ("recipe: an unknown key", recipe("trian: {}"), "did you mean train"),
    ("recipe: an unknown key further down", recipe("train: {stpes: 3}"), "did you mean steps"),
    ("recipe: an arm named like a path", recipe("arms: {../../x: null}"), "an arm's name holds letters"),
    ("recipe: bytes", lambda place: read_recipe(str(written(place, "r.yaml", b"\xff\xfe\x00"))), "not UTF-8"),
    ("override without a value", override("train.steps"), "write key=value"),
    ("override: brackets without end", override("arms=" + DEEP), "not YAML"),
    ("spec: 5,000 digits", lambda place: QuantSpec.parse("w" + "4" * 5_000 + "a4"), "w4a4"),
    ("spec: a list", lambda place: QuantSpec.parse(json.loads('["w4a4"]')), "a text or a mapping"),
    ("pickle that runs code", weights("w.pt", lambda place: torch_file({"w": Attack(place)})), "would run code"),
    ("old pickle that runs code", weights("w.bin", lambda place: pickle.dumps(Attack(place), 2)), "would run code"),
    ("training state that runs code", lambda p: read_state(written(p, "s.pt", torch_file(Attack(p)))), "damaged"),
    ("zip bomb as a PyTorch file", weights("w.pth", compressed), "compressed archive"),
    ("half a PyTorch file", weights("w.pt", lambda _: torch_file({"w": torch.ones(999)})[:900]), "damaged"),
    (
        "half a safetensors file",
        weights("w.safetensors", lambda _: to_safetensors({"w": torch.ones(99)})[:200]),
        "trunc",
    ),
    ("safetensors: a header of 2^62 bytes", weights("w.safetensors", lambda _: header({}, 1 << 62)), "damaged"),
    (
        "safetensors: tensors beyond the file",
        weights("w.safetensors", lambda _: header({"w": {"dtype": "F32", "shape": [9], "data_offsets": [0, 36]}})),
        "damaged",
    ),
    ("weights that are integers", integers, "no floating-point number"),
    (
        "config: attention code on the hub",
        model(lambda c: c["config"].update(_attn_implementation="a/b")),
        "code on the",
    ),
    ("config: 10^9 layers", model(lambda c: c["config"].update(num_hidden_layers=10**9)), "more than the weights"),
    ("config: a class that is no model", model(lambda c: c.update({"class": "Trainer"})), "no model class"),
    ("JSON: 100,000 brackets", lambda place: read_json(written(place, "a.json", DEEP)), "nested too deeply"),
    ("JSON: a list", lambda place: read_json(written(place, "a.json", "[]")), "should hold a JSON object"),
    ("results: records without values", lambda place: read_results({"records": [{"task": "\x1b[31mt"}]}), "missing"),
    ("CSV: rows of different lengths", table("a.csv", "text,label\na,b\nc\n"), "1 columns where"),
    ("CSV: a cell of 200,000 characters", table("a.csv", "text,label\n" + "a" * 200_000 + ",b\n"), "field larger"),
    ("CSV: not text", table("a.csv", b"text,label\n\xff\xfe,b\n"), "not UTF-8"),
    ("JSON lines: 100,000 brackets", table("a.jsonl", DEEP), "nested too deeply"),
    ("JSON lines: numbers", table("a.jsonl", "1\n2\n"), "one JSON object per line"),
    ("Parquet: noise", table("a.parquet", b"PAR1" + bytes(99) + b"PAR1"), "as Parquet"),
    ("Parquet: images outside of its folder", images(["../../../etc/a.png"] * 4, ["a", "b"] * 2), "outside of the"),
    ("Parquet: an image that is a number", images([1, 2], ["a", "b"]), "the image is a int"),
    ("texts: only blanks", lambda place: read_texts(written(place, "a.txt", " \n\t\n")), "holds no text"),
    ("image: 30000 x 30000 pixels in 80 bytes", picture(bomb_png), "too many|exceeds limit"),
    (
        "image: EPS, which would start a program",
        picture(lambda: b"%!PS-Adobe-3.0 EPSF-3.0\n"),
        "not an image of a known kind",
    ),
    ("image: noise", picture(lambda: b"\xff\xd8\xff" + bytes(50)), "left out"),
]


def main() -> None:
    """The table of the documentation."""
    print("| input | the message |\n|---|---|")
    for name, read, _ in CASES:
        with tempfile.TemporaryDirectory() as place:
            try:
                read(Path(place))
                message = "read without complaint"
            except InputError as error:
                message = " ".join(str(error).split()).replace(f"{place}/", "").replace("|", "\\|")
            print(f"| {name} | {message[:240]} |")


if __name__ == "__main__":
    main()
