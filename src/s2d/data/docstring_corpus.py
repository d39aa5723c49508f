"""Pairs of texts from the docstrings of installed packages: the summary line and the rest.

Source files are read and parsed, never imported. The split of a pair depends on its module's name alone, so no module
is in two splits, whatever the sizes asked for. Texts that repeat an earlier one are dropped across all splits. The same
installed packages give the same pairs in the same order. The pairs are kept in the user's cache folder; any change of a
source file makes them stale.
"""

from __future__ import annotations

import ast
import hashlib
import importlib.util
import itertools
import os
import re
import sys
import sysconfig
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import astuple, dataclass
from pathlib import Path

from s2d.data import corpus_cache
from s2d.data.base import SPLITS, Split
from s2d.errors import InputError, choices
from s2d.models.quiet import no_garbage_collection

STDLIB = "stdlib"
# Packages that every installation with text tasks has, so that results on different machines are comparable.
DEFAULT_PACKAGES = (
    STDLIB,
    "torch",
    "numpy",
    "transformers",
    "huggingface_hub",
    "networkx",
    "sympy",
    "pydantic",
    "rich",
    "typer",
)
# The descriptions of transformers' models are one template filled in hundreds of times.
SKIPPED_MODULES = ("transformers.models.",)
_SKIPPED_FOLDERS = frozenset(
    {
        "test",
        "tests",
        "testing",
        "_vendor",
        "vendor",
        "site-packages",
        "dist-packages",
        "idlelib",
        "lib2to3",
        "ensurepip",
    }
)
# Shares of the modules. Test comes first in the deduplication, so it depends on no other split's size.
_SHARES: tuple[tuple[Split, float], ...] = (("test", 0.17), ("validation", 0.09), ("train", 1.0))
_SUMMARY_WORDS = (4, 40)
_REST_WORDS = (15, 200)
_MOST_PER_MODULE = 12  # so that no single module dominates a split
_SHINGLE, _SHINGLE_WORDS, _MOST_SEEN = 5, 80, 0.5


@dataclass(frozen=True)
class Pair:
    """A summary line and the rest of the same docstring."""

    query: str
    document: str
    module: str


def collect(sizes: Mapping[Split, int], packages: Sequence[str] | None = None) -> dict[Split, list[Pair]]:
    """Pairs of each split, at most as many as asked for.

    Args:
        sizes: Upper limits.
        packages: Import names of packages, ``"stdlib"`` for the standard library. None for `DEFAULT_PACKAGES`, without
            those that are not installed.

    Raises:
        InputError: A named package is not installed or has no Python source, or a split stays empty.
    """
    modules: dict[Split, list[tuple[bytes, str, Path]]] = {split: [] for split in SPLITS}
    for package in packages if packages is not None else DEFAULT_PACKAGES:
        found = list(_source_files(package))
        if not found and packages is not None:
            raise InputError(_not_installed(package))
        for module, path in found:
            mark = hashlib.sha256(module.encode()).digest()
            modules[_split_of(mark)].append((mark, module, path))

    files = [path for split in SPLITS for _, _, path in sorted(modules[split])]
    key = corpus_cache.key_of([*files, Path(__file__)], sys.version_info, [sizes[split] for split in SPLITS])
    stored = corpus_cache.read("docstrings", key)
    if stored is not None:
        return {split: [Pair(*texts) for texts in stored[split]] for split in SPLITS}
    pairs = _gather(sizes, modules)
    for split in SPLITS:
        if sizes[split] and not pairs[split]:
            named = ", ".join(packages if packages is not None else DEFAULT_PACKAGES)
            raise InputError(f"no usable docstrings for the {split} split in {named}; name more packages")
    corpus_cache.write("docstrings", key, {split: [astuple(pair) for pair in pairs[split]] for split in SPLITS})
    return pairs


def _gather(
    sizes: Mapping[Split, int], modules: Mapping[Split, list[tuple[bytes, str, Path]]]
) -> dict[Split, list[Pair]]:
    """Read the modules of each split, in the order of their hashes, until there are enough pairs."""
    seen = _Seen()
    pairs: dict[Split, list[Pair]] = {}
    with no_garbage_collection():  # syntax trees hold no cycles
        for split, _ in _SHARES:
            pairs[split] = []
            for _, module, path in sorted(modules[split]):
                if len(pairs[split]) >= sizes[split]:
                    break
                fresh = (pair for pair in pairs_of(path, module) if not seen.before(pair))
                pairs[split] += itertools.islice(fresh, _MOST_PER_MODULE)
            del pairs[split][sizes[split] :]
    return pairs


def pairs_of(path: Path, module: str) -> Iterator[Pair]:
    """The usable docstrings of one source file: module, classes, their methods, and functions."""
    try:
        source = path.read_bytes()
        if source.count(b'"""') + source.count(b"'''") < 2:
            return
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # other people's escape sequences
            tree = ast.parse(source)
    except (OSError, SyntaxError, ValueError, RecursionError):
        return
    pending: list[ast.AST] = [tree]
    while pending:
        node = pending.pop()
        if isinstance(node, ast.Module | ast.ClassDef):
            pending += [
                child
                for child in reversed(node.body)
                if isinstance(child, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef)
            ]
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            texts = split_docstring(ast.get_docstring(node) or "")
            if texts is not None:
                yield Pair(*texts, module)


def split_docstring(docstring: str) -> tuple[str, str] | None:
    """Summary and rest of a cleaned docstring, None when either is too short or too long."""
    paragraphs = re.split(r"\n\s*\n", docstring.strip())
    if re.match(r"[\w.]+\(.*\)", paragraphs[0], flags=re.DOTALL):  # the signature, as C extensions write it
        del paragraphs[0]
    if len(paragraphs) < 2:
        return None
    summary = paragraphs[0].split()
    rest = " ".join(paragraphs[1:]).split()
    if not _SUMMARY_WORDS[0] <= len(summary) <= _SUMMARY_WORDS[1] or len(rest) < _REST_WORDS[0]:
        return None
    if sum(word.strip(".,:;()`'\"").isalpha() for word in summary) < _SUMMARY_WORDS[0] - 1:
        return None
    return " ".join(summary), " ".join(rest[: _REST_WORDS[1]])


class _Seen:
    """Stores texts. A document counts as a repetition when most of its runs of five words were seen before."""

    def __init__(self) -> None:
        self.queries: set[str] = set()
        self.shingles: set[bytes] = set()

    def before(self, pair: Pair) -> bool:
        query = " ".join(_words(pair.query))
        words = _words(pair.document)[:_SHINGLE_WORDS]
        runs = {" ".join(words[i : i + _SHINGLE]) for i in range(max(1, len(words) - _SHINGLE + 1))}
        marks = {hashlib.blake2b(run.encode(), digest_size=8).digest() for run in runs}
        if query in self.queries or len(marks & self.shingles) > _MOST_SEEN * len(marks):
            return True
        self.queries.add(query)
        self.shingles |= marks
        return False


def _words(text: str) -> list[str]:
    return re.findall(r"[a-z0-9]+", text.lower())


def _split_of(mark: bytes) -> Split:
    position = int.from_bytes(mark[-8:], "big") / 2**64
    for split, share in _SHARES:
        if position < share:
            return split
        position -= share
    raise AssertionError("shares end with 1")


def _source_files(package: str) -> Iterator[tuple[str, Path]]:
    """(module name, file) of a package's source files, without tests and vendored code."""
    root, prefix = _root(package)
    if root is None:
        return
    if root.is_file():
        yield package, root
        return
    for folder, folders, files in os.walk(root):
        folders[:] = sorted(name for name in folders if name not in _SKIPPED_FOLDERS and name.isidentifier())
        parts = (*prefix, *Path(folder).relative_to(root).parts)
        for file in sorted(files):
            module = ".".join((*parts, file.removesuffix(".py")))
            if file.endswith(".py") and not f"{module}.".startswith(SKIPPED_MODULES):
                yield module, Path(folder, file)


def _root(package: str) -> tuple[Path | None, tuple[str, ...]]:
    if package == STDLIB:
        return Path(sysconfig.get_paths()["stdlib"]), ()
    if not package.isidentifier():
        return None, ()
    try:
        spec = importlib.util.find_spec(package)  # finds a top-level package without importing it
    except (ImportError, ValueError):
        return None, ()
    if spec is None:
        return None, ()
    if spec.submodule_search_locations:
        return Path(next(iter(spec.submodule_search_locations))), (package,)
    return (Path(spec.origin), ()) if spec.origin and spec.origin.endswith(".py") else (None, ())


def _not_installed(package: str) -> str:
    # Names that are importable already, plus the defaults: enough for a hint, without listing a whole site-packages.
    known = sorted({*DEFAULT_PACKAGES, *(name for name in sys.modules if "." not in name and not name.startswith("_"))})
    hint = choices(package, known, f'use import names of installed packages, or "{STDLIB}"')
    return f"no Python source found for package {package!r}; {hint}"
