"""Coverage-guided fuzzing of everything that reads what comes from elsewhere (needs atheris).

    python benchmarks/fuzz.py [--seconds 30] [--only NAME ...] [--json FILE]
    python benchmarks/fuzz.py --replay NAME FILE       # one input again, with its traceback

Each reader has a process of its own, starts from a few good inputs, and may raise InputError and nothing else. An input
that takes more than 20 seconds or 3 GB counts as found; so does one that starts a program, opens a connection, or opens
a file to write outside of the scratch folder. Found inputs are kept in the folder that is printed.

Instrumented, so that the fuzzer sees new paths: s2d's own reading modules and PyYAML. The parsers inside torch,
pyarrow, PIL and safetensors are compiled and are not; for them this is fuzzing by mutation alone.
"""

from __future__ import annotations

import argparse
import importlib.util
import io
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.update(OMP_NUM_THREADS="1", TOKENIZERS_PARALLELISM="false", HF_HUB_OFFLINE="1")
READING = (
    "s2d.experiments.recipe",
    "s2d.quant.spec",
    "s2d.quant.modules.storage",
    "s2d.quant.numerics.observers",
    "s2d.io.files",
    "s2d.tasks",
)
READING += ("s2d.report", "s2d.models.saved", "s2d.models.fresh", "s2d.checkpoint", "s2d.errors", "yaml")

Reader = tuple[Callable[[bytes], object], list[bytes]]


def readers(place: Path) -> dict[str, Callable[[], Reader]]:
    """Each reader by name: what makes it, and its good inputs, when it is needed."""
    import torch

    from s2d.experiments.recipe import make_recipe, read_recipe
    from s2d.experiments.recipe_files import read_text
    from s2d.models import load, save_model

    def file(name: str, data: bytes) -> Path:
        path = place / name
        path.write_bytes(data)
        return path

    def text(data: bytes) -> str:
        return data.decode("utf-8", "replace")

    def recipe() -> Reader:
        names = ("vit-cifar10", "minilm-banking77", "siglip-imagenet")
        seeds = [read_text(name)[1].encode() for name in names]
        return lambda data: read_recipe(str(file("r.yaml", data))), [
            *seeds,
            b"a: &a [1]\nb: [*a, *a]",
            b"a: 2020-01-01",
        ]

    def override() -> Reader:
        base = {"model": "m", "task": {"name": "t"}}
        return lambda data: make_recipe(base, [text(data)]), [b"train.steps=3", b"arms.s2d.strength=1e-4", b"seeds=[0]"]

    def spec() -> Reader:
        from s2d.quant import QuantSpec

        def read(data: bytes) -> object:
            source: Any = text(data)
            if source.startswith("{"):
                try:
                    source = json.loads(source)
                except (ValueError, RecursionError):
                    return None
            return str(QuantSpec.parse(source).to_dict())

        full = {"base": "w4a4", "weight": {"bits": 4, "granularity": "group-32", "observer": "mse"}, "ends": "w8a8"}
        full |= {"overrides": {"*.fc2": "w4a8", "re:a.*": {"attention": {"bits": 8}}}}
        return read, [b"w4a4", b"nvfp4", b"fp8", b"w16a8", json.dumps(full).encode()]

    def results() -> Reader:
        from s2d.io.files import read_json
        from s2d.report import render_report as render

        record = {"task": "t", "conditioning": "s2d", "spec": "w4a4", "metric": "accuracy", "value": 1.5, "seed": 0}
        audit = {"kind": "audit", "model": "m", "records": [{"weight": "a.b", "shape": [2, 3], "sigma": [3, 2, 1]}]}
        whole = {"run": {}, "records": [record], "audits": {"none": audit}, "history": [{"step": 1, "sigma": [1]}]}
        return lambda data: render(read_json(file("results.json", data))), [json.dumps(whole).encode()]

    def model() -> Any:
        return load("new:vit-tiny")

    def quantized() -> Reader:
        import s2d

        folder, loaded = place / "quantized", model()
        images = [(torch.rand(2, 3, 32, 32),)]
        s2d.save(s2d.quantize(loaded.model, "w4a4", calibration=images, method="repq"), folder)
        config = folder / "quantization.json"
        good = json.dumps(json.loads(config.read_text())).encode()

        def read(data: bytes) -> object:
            config.write_bytes(data)
            return s2d.load(folder)

        return read, [good]

    def architecture() -> Reader:
        folder = save_model(model().model, place / "plain")
        config = folder / "s2d_config.json"
        good = config.read_bytes()

        def read(data: bytes) -> object:
            config.write_bytes(data)
            return load(folder)

        return read, [good]

    def weights(suffix: str) -> Callable[[], Reader]:
        def make() -> Reader:
            from safetensors.torch import save

            from s2d.models.saved import read_weights

            tensors, good = {"a.weight": torch.rand(3, 2), "b": torch.ones(2, dtype=torch.float16)}, io.BytesIO()
            torch.save(tensors, good)
            old = io.BytesIO()
            torch.save(tensors, old, _use_new_zipfile_serialization=False)
            seeds = [save(tensors)] if suffix == ".safetensors" else [good.getvalue(), old.getvalue()]
            return lambda data: read_weights(file(f"w{suffix}", data)), seeds

        return make

    def state() -> Reader:
        from pathlib import Path as Place

        from s2d.training.state import read_state

        good = io.BytesIO()
        torch.save({"version": 2, "key": "a", "model": {"w": torch.rand(2)}}, good)
        return lambda data: read_state(Place(file("state.pt", data))), [good.getvalue()]

    def table(suffix: str, seeds: list[bytes]) -> Callable[[], Reader]:
        def make() -> Reader:
            from s2d.data.tables import find_columns, read_table

            return lambda data: find_columns(read_table(file(f"t{suffix}", data)), None, None), seeds

        return make

    def texts() -> Reader:
        from s2d.data.texts import read_texts

        return lambda data: read_texts(file("t.txt", data)), [b"one\ntwo\r\n\x1b[31mthree", "\u00e4\u200b".encode()]

    def parquet_bytes(columns: dict[str, list[Any]]) -> bytes:
        import pyarrow
        import pyarrow.parquet

        sink = io.BytesIO()
        pyarrow.parquet.write_table(pyarrow.table(columns), sink)
        return sink.getvalue()

    def parquet() -> Reader:
        seeds = [parquet_bytes({"text": ["a", "b"], "label": [0, 1]}), parquet_bytes({"text": ["a"]})]
        return table(".parquet", seeds)()

    def image_parquet() -> Reader:
        from s2d.data.image_folders import read_labelled_images

        cells = [{"bytes": b"x", "path": None}] * 8
        good = parquet_bytes({"image": cells, "label": [0, 1] * 4})
        named = parquet_bytes({"image": ["a.png", "../../b.png"] * 4, "label": ["a", "b"] * 4})
        return lambda data: read_labelled_images(str(file("i.parquet", data))), [good, named]

    def image() -> Reader:
        from PIL import Image

        from s2d.data.image_table import ImageTable
        from s2d.models.preprocessing import preprocessing_of

        shape = preprocessing_of(model().processor, "m")
        seeds = []
        for kind in ("PNG", "JPEG", "GIF", "BMP", "TIFF", "WEBP", "PPM"):
            sink = io.BytesIO()
            Image.new("RGB", (9, 7), (200, 30, 40)).save(sink, kind)
            seeds.append(sink.getvalue())
        return lambda data: ImageTable([data], shape).first_readable(), seeds

    def fresh() -> Reader:
        import importlib.resources

        good = (importlib.resources.files("s2d") / "models/configs/vit-tiny.json").read_bytes()
        from s2d.models.fresh import load_new

        return lambda data: load_new(str(file("new.json", data)), {}), [good]

    return {
        "recipe": recipe,
        "override": override,
        "spec": spec,
        "results": results,
        "quantized-model": quantized,
        "model-config": architecture,
        "new-config": fresh,
        "safetensors": weights(".safetensors"),
        "pickle": weights(".pt"),
        "training-state": state,
        "csv": table(".csv", [b"text,label\na,b\nc,d\n", b'"a ""b""",c\n']),
        "tsv": table(".tsv", [b"a\tb\nc\td\n"]),
        "jsonl": table(".jsonl", [b'{"text": "a", "label": 1}\n{"text": "b"}\n', b'[{"text": "a"}]']),
        "text": texts,
        "parquet": parquet,
        "image-parquet": image_parquet,
        "image": image,
    }


def guarded(place: Path) -> Callable[[str, tuple[Any, ...]], None]:
    """An audit hook for what no reader may do."""

    class Harm(BaseException):
        pass

    def hook(event: str, args: tuple[Any, ...]) -> None:
        if event in ("os.system", "subprocess.Popen", "os.exec", "os.posix_spawn", "os.fork", "socket.connect"):
            raise Harm(f"{event} {args}")
        if event == "open" and isinstance(args[0], str) and isinstance(args[2], int) and args[2] & 3:
            path = os.path.abspath(args[0])
            if not path.startswith((str(place), "/dev/")):
                raise Harm(f"wrote {path}")

    return hook


def fuzz(name: str, place: Path, flags: list[str], replay: Path | None) -> None:
    """In a process of its own: atheris ends it."""
    sys.setrecursionlimit(1000)
    if replay is None:
        import atheris

        with atheris.instrument_imports(include=list(READING)):
            import s2d.experiments.recipe  # noqa: F401
            import s2d.report  # noqa: F401
            from s2d.errors import InputError

            read, seeds = readers(place)[name]()
    else:
        from s2d.errors import InputError

        read, seeds = readers(place)[name]()

    def one(data: bytes) -> None:
        try:
            read(data)
        except InputError as error:
            str(error)

    for seed in seeds:
        one(seed)  # lazily imported libraries come in here, before the hook
    if replay is not None:
        return one(replay.read_bytes())
    corpus = place / "corpus"
    corpus.mkdir(exist_ok=True)
    for number, seed in enumerate(seeds):
        (corpus / str(number)).write_bytes(seed)
    sys.addaudithook(guarded(place))
    atheris.Setup([sys.argv[0], *flags, str(corpus)], one)
    atheris.Fuzz()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--seconds", type=int, default=30, help="for each reader")
    parser.add_argument("--only", nargs="*")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--child", help=argparse.SUPPRESS)
    parser.add_argument("--place", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--replay", nargs=2, metavar=("NAME", "FILE"))
    arguments = parser.parse_args()
    flags = ["-timeout=20", "-rss_limit_mb=3000", f"-max_total_time={arguments.seconds}", "-max_len=8192", "-seed=1"]
    if arguments.replay:
        with tempfile.TemporaryDirectory() as scratch:
            fuzz(arguments.replay[0], Path(scratch), [], Path(arguments.replay[1]))
        return 0
    if arguments.child:
        fuzz(arguments.child, arguments.place, [*flags, f"-artifact_prefix={arguments.place}/found-"], None)
        return 0
    if importlib.util.find_spec("atheris") is None:
        print("nothing was fuzzed: pip install atheris")
        return 0
    base = Path(tempfile.mkdtemp(prefix="s2d-fuzz-"))
    rows, failed = [], 0
    for name in arguments.only or readers(base):
        place = base / name
        place.mkdir()
        command = [sys.executable, __file__, "--child", name, "--place", str(place)]
        done = subprocess.run(
            [*command, "--seconds", str(arguments.seconds)], capture_output=True, text=True, errors="replace"
        )
        runs = re.findall(r"Done (\d+) runs|^#(\d+)\s", done.stderr + done.stdout, flags=re.MULTILINE)
        count = max((int(a or b) for a, b in runs), default=0)
        found = sorted(place.glob("found-*"))
        failed += bool(found) or done.returncode != 0
        rows.append({"reader": name, "executions": count, "found": len(found)})
        print(f"{name}: {count} executions, {len(found)} found {', '.join(map(str, found))}", flush=True)
        if found or done.returncode != 0:
            print("\n".join((done.stdout + done.stderr).splitlines()[-25:]))
    if arguments.json is not None:
        arguments.json.write_text(json.dumps({"seconds": arguments.seconds, "readers": rows}, indent=1))
    if not failed:
        shutil.rmtree(base)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
