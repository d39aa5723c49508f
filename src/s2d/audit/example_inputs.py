"""Default inputs of an audit: texts or images from a file or folder, docstrings by default."""

from __future__ import annotations

import inspect
import os
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from s2d.data.docstring_corpus import STDLIB, collect
from s2d.data.idx import idx_in, placed_images
from s2d.data.image_rows import IMAGE_SUFFIXES, tables_in
from s2d.data.image_table import opened
from s2d.data.split_files import split_files
from s2d.data.tables import TABLE_SUFFIXES, Table, read_table
from s2d.data.tokens import TokenTable, check_max_length, most_tokens, require_tokenizer, tokenize
from s2d.data.windows import cut_windows
from s2d.errors import InputError, first_line
from s2d.models import Loaded
from s2d.models.preprocessing import upright
from s2d.optional import require

TEXTS, TEXT_LENGTH = 128, 128
WINDOWS, WINDOW_LENGTH = 8, 512
IMAGES = 64
_BATCH = 16
# Order of the splits for an audit. First comes the split that is used neither for training nor for scores.
_SPLITS = ("validation", "train", "test")
# Characters read of a long text per token wanted. Tokens of real text are shorter.
_CHARACTERS_PER_TOKEN = 10
_TEXT_COLUMNS = ("text", "sentence", "question", "query", "utterance", "review", "content", "document", "title")

Batches = list[dict[str, Tensor]] | list[Tensor]


def audit_batches(
    loaded: Loaded,
    data: str | os.PathLike[str] | None = None,
    *,
    texts: Sequence[str] | None = None,
    num: int | None = None,
    length: int | None = None,
) -> Batches:
    """Batches that fit a loaded model, for an audit.

    - Text encoders: one text each, padded, with ``attention_mask``.
    - Causal language models: windows of running text.
    - Models with an image input: images, prepared by the model's own processor; those with both also get texts.

    Args:
        loaded: From `s2d.models.load`; decides what is needed.
        data: Texts: a ``.txt`` file (a text per line; for language models running text), a table (CSV, TSV, JSON
            lines, Parquet), or a folder with such files named train, validation or test. Images: a folder of images,
            or a Parquet file with an image column, or a folder with such files named likewise.
        texts: The texts themselves. Without these and `data`, docstrings of Python's standard library.
        num: How many texts (128), windows (8) or images (64).
        length: Tokens of the longest text (128), or of a window (512).

    Raises:
        InputError: The data cannot be read, hold nothing of use, or are images that nobody named.
    """
    if num is not None and num < 1:
        raise InputError(f"the number of inputs for the audit must be at least 1, not {num}")
    names = set(inspect.signature(loaded.model.forward).parameters)
    # No family knows timm's convolutional networks; they are recognised by their image preprocessing.
    without_family = loaded.tokenizer is None and loaded.processor is not None
    sees = loaded.family.modality in ("vision", "multimodal") or without_family
    if sees and names & {"pixel_values", "image", "x"}:
        return _image_batches(loaded, names, data, texts, num or IMAGES, length)
    if loaded.family.modality == "causal-lm":
        return _windows(loaded, data, texts, num or WINDOWS, length)
    tokens = _token_table(loaded, list(islice(_texts(data, texts, num or TEXTS), num or TEXTS)), length)
    order = tokens.lengths.argsort(stable=True)  # neighbours in length leave little padding
    return [_as_inputs(loaded.model, *tokens.take(rows)) for rows in order.split(_BATCH)]


def random_batch(model: nn.Module, rows: int = 2) -> dict[str, Tensor] | Tensor | None:
    """Random inputs that a model's forward takes, by its configuration: enough to trace it. None if that is not known.

    Tokens, pixels, sound and, for a decoder behind an encoder, its tokens; of the sizes that the configuration names.
    """
    generator = torch.Generator().manual_seed(0)
    config = getattr(model, "config", None)
    sizes = getattr(model, "pretrained_cfg", None) or {}  # timm's
    if config is None:
        channels, *side = sizes.get("input_size", ())[:3] or (0,)
        side = getattr(getattr(model, "patch_embed", None), "img_size", None) or side
        return torch.randn(rows, channels, *side, generator=generator) if channels else None
    parts = [config, *(getattr(config, f"{part}_config", None) for part in ("text", "vision", "audio"))]

    def told(*names: str) -> Any:
        found = [getattr(part, name, None) for name in names for part in parts if part is not None]
        return next((value for value in found if value is not None), None)

    names, batch = inspect.signature(model.forward).parameters, {}
    side, words = told("image_size"), told("vocab_size")
    if "pixel_values" in names and side is not None:
        side = tuple(side) if isinstance(side, (list, tuple)) else (side, side)
        batch["pixel_values"] = torch.randn(rows, told("num_channels") or 3, *side, generator=generator)
    if "input_values" in names:
        batch["input_values"] = torch.randn(rows, 4000, generator=generator)  # a quarter of a second
    if "input_features" in names and told("max_source_positions") is not None:
        frames = told("num_mel_bins"), 2 * told("max_source_positions")
        batch["input_features"] = torch.randn(rows, *frames, generator=generator)
    if words is not None:
        ids = torch.randint(3, words, (rows, 8), generator=generator)
        picture = told("image_token_id", "image_token_index")
        if picture is not None and "pixel_values" in batch:
            ids[ids == picture] = 3
            ids = torch.cat([torch.full((rows, told("image_seq_length") or 1), picture), ids], 1)
        batch |= {"input_ids": ids} if "input_ids" in names else {}
        if getattr(config, "is_encoder_decoder", False) and "decoder_input_ids" in names:
            batch["decoder_input_ids"] = ids[:, -5:]
    return batch or None


def _as_inputs(model: nn.Module, ids: Tensor, mask: Tensor) -> dict[str, Tensor]:
    given = {"input_ids": ids, "attention_mask": mask}
    accepted = inspect.signature(model.forward).parameters
    if any(p.kind is inspect.Parameter.VAR_KEYWORD for p in accepted.values()):
        return given
    return {name: value for name, value in given.items() if name in accepted}


# -- texts -------------------------------------------------------------------------------------------------------------


def _token_table(loaded: Loaded, texts: list[str], length: int | None) -> TokenTable:
    tokenizer = require_tokenizer(loaded, "audit")
    return tokenize(tokenizer, texts, _length(loaded, length, TEXT_LENGTH))


def _length(loaded: Loaded, length: int | None, usual: int) -> int:
    if length is not None:
        return check_max_length(loaded, length, "length")
    return min(usual, most_tokens(loaded) or usual)


def _windows(
    loaded: Loaded, data: str | os.PathLike[str] | None, texts: Sequence[str] | None, num: int, length: int | None
) -> list[dict[str, Tensor]]:
    tokenizer = require_tokenizer(loaded, "audit")
    window = _length(loaded, length, WINDOW_LENGTH)
    wanted = num * window
    pieces: list[str] = []
    characters = 0
    for text in _texts(data, texts, wanted // 16):
        pieces.append(text)
        characters += len(text)
        if characters >= _CHARACTERS_PER_TOKEN * wanted:
            break
    ids = tokenizer("\n".join(pieces), add_special_tokens=False, verbose=False)["input_ids"]
    if len(ids) < 2:
        raise InputError(f"the text for the audit makes {len(ids)} tokens; give a longer one")
    rows, masks, _ = cut_windows(torch.tensor(ids), window, window, num)
    return [_as_inputs(loaded.model, row[None], mask[None]) for row, mask in zip(rows, masks, strict=True)]


def _texts(data: str | os.PathLike[str] | None, texts: Sequence[str] | None, num: int) -> Iterator[str]:
    """The texts that are not empty, one after the other; at least one."""
    found = (text.strip() for text in _read_texts(data, texts, num))
    kept = (text for text in found if text)
    first = next(kept, None)
    if first is None:
        raise InputError(f"{data if data is not None else 'texts'}: there is no text in it; give at least one sentence")
    yield first
    yield from kept


def _read_texts(data: str | os.PathLike[str] | None, texts: Sequence[str] | None, num: int) -> Iterator[str]:
    if texts is not None:
        if isinstance(texts, str) or not all(isinstance(text, str) for text in texts):
            raise InputError("texts is a list of sentences; put a single one in a list")
        yield from texts
        return
    if data is None:
        for pair in collect({"train": num, "validation": 0, "test": 0}, (STDLIB,))["train"]:
            yield f"{pair.query} {pair.document}"
        return
    files = split_files(Path(data), (".txt", *TABLE_SUFFIXES))
    file = next(files[split] for split in _SPLITS if split in files)
    if file.suffix.lower() != ".txt":
        yield from _column(read_table(file))
        return
    try:
        with open(file, encoding="utf-8-sig") as lines:
            yield from lines
    except UnicodeDecodeError as error:
        raise InputError(f"{file} is not UTF-8 text (byte {error.start}); convert it or check the file") from error
    except OSError as error:
        raise InputError(f"cannot read {file}: {error.strerror}") from error


def _column(table: Table) -> list[str]:
    """The texts of a table: from the column with a usual name, else from the column with the longest texts."""
    known = [column for name in _TEXT_COLUMNS for column in table.columns if column.lower() == name]

    def size(column: str) -> int:
        return sum(len(cell) for cell in table.column(column)[:200] if isinstance(cell, str))

    name = known[0] if known else max(table.columns, key=size)
    if size(name) == 0:
        raise InputError(f"{table.path} has no column of texts; its columns are {', '.join(table.columns)}")
    return [cell for cell in table.column(name) if isinstance(cell, str)]


# -- images ------------------------------------------------------------------------------------------------------------


def _image_batches(
    loaded: Loaded,
    names: set[str],
    data: str | os.PathLike[str] | None,
    texts: Sequence[str] | None,
    num: int,
    length: int | None,
) -> Batches:
    if data is None:
        raise InputError(f"{loaded.source} looks at images, and none were given; name a folder of them: --data FOLDER")
    if loaded.processor is None:
        raise InputError(f"{loaded.source} comes without an image processor; make batches yourself for s2d.audit")
    pixels = _prepared(loaded, list(islice(_images(Path(data)), num)))
    parts = pixels.split(_BATCH)
    captions: list[str] = []
    if names & {"input_ids", "text"} and loaded.tokenizer is not None:
        captions = list(islice(_texts(None, texts, _BATCH), _BATCH))
    if "pixel_values" not in names:  # timm and open_clip
        if "text" not in names or not captions:
            return list(parts)
        words = loaded.tokenizer(captions)  # pyright: ignore[reportOptionalCall]
        return [{"image": part, "text": words[: len(part)]} for part in parts]
    batches: list[dict[str, Tensor]] = [{"pixel_values": part} for part in parts]
    if "input_ids" in names:
        tokens = _token_table(loaded, captions, length)
        for batch in batches:
            ids, mask = tokens.take(torch.arange(min(len(captions), len(batch["pixel_values"]))))
            batch.update(_as_inputs(loaded.model, ids, mask))
    return batches


def _prepared(loaded: Loaded, images: list[Any]) -> Tensor:
    """Images ``[images, channels, height, width]``, prepared by the model's own processor."""
    processor: Any = loaded.processor
    if isinstance(processor, dict):  # timm's data configuration
        processor = require("timm", "timm").data.create_transform(**processor, is_training=False)
    if hasattr(processor, "image_processor"):
        processor = processor.image_processor
    try:
        if hasattr(processor, "preprocess"):
            return processor(images=images, return_tensors="pt")["pixel_values"]
        return torch.stack([processor(image) for image in images])
    except (TypeError, ValueError, RuntimeError, KeyError) as error:
        raise InputError(f"{loaded.source}: its processor cannot prepare these images: {first_line(error)}") from error


def _images(path: Path) -> Iterator[Any]:
    """Images as RGB pictures of PIL; at least one."""
    if not path.exists():
        raise InputError(f"there is no folder or file {str(path)!r} with images")
    found = False
    for place, source in _image_sources(path):
        try:
            with opened(source) as picture:
                image = upright(picture).convert("RGB")
        except (OSError, ValueError) as error:
            raise InputError(f"{place} is not an image that can be read: {error}") from error
        found = True
        yield image
    if not found:
        raise InputError(f"{path} holds no images ({', '.join(IMAGE_SUFFIXES[:3])}, ...); name a folder that does")


def _image_sources(path: Path) -> Iterator[tuple[str, Path | bytes]]:
    if path.is_dir():
        files = sorted(file for file in path.rglob("*") if file.suffix.lower() in IMAGE_SUFFIXES)
        if not files:
            tables = tables_in(path)
            for table in next((tables[split] for split in _SPLITS if split in tables), []):
                yield from _parquet_images(read_table(table))
            packed = idx_in(path)
            for file, _ in [packed[split] for split in _SPLITS if split in packed][:1]:
                yield from placed_images(file)
        # Files are taken at even distances, so that a folder sorted by class gives more than its first class.
        step = max(1, len(files) // IMAGES)
        yield from ((str(file), file) for start in range(step) for file in files[start::step])
    elif path.suffix.lower() == ".parquet":
        yield from _parquet_images(read_table(path))
    else:
        yield str(path), path


def _parquet_images(table: Table) -> Iterator[tuple[str, bytes]]:
    def encoded(cell: Any) -> bytes | None:
        cell = cell.get("bytes") if isinstance(cell, dict) else cell
        return cell if isinstance(cell, bytes) else None

    named = [column for column in table.columns if table.rows and encoded(table.column(column)[0]) is not None]
    if not named:
        raise InputError(f"{table.path} has no column of encoded images; its columns are {', '.join(table.columns)}")
    for number, cell in enumerate(table.column(named[0]), table.first_line):
        content = encoded(cell)
        if content is not None:
            yield f"{table.path}, row {number}", content
