"""The pages name what exists: every public name, every method, every command, every link, every copied number."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import typer.main
import yaml

import s2d
from s2d.cli import app

ROOT = Path(__file__).resolve().parent.parent
DOCS = ROOT / "docs"
PAGES = sorted(DOCS.rglob("*.md"))
LINK = re.compile(r"\]\(([^)#\s]+)(?:#[^)]*)?\)")
SHARED_PAGES = {"gptaq": "gptq"}  # methods of one file


def pages_in(nav: object) -> list[str]:
    """The files that a mkdocs nav names."""
    if isinstance(nav, str):
        return [nav]
    entries = list(nav.values()) if isinstance(nav, dict) else nav
    assert isinstance(entries, list)
    return [page for entry in entries for page in pages_in(entry)]


def test_the_api_page_documents_every_public_name():
    documented = re.findall(r"^::: \S+\.(\w+)$", (DOCS / "api.md").read_text(encoding="utf-8"), re.MULTILINE)
    homes = [s2d._HOMES[name][1] for name in s2d.__all__]
    assert sorted(documented) == sorted(homes)


def test_every_method_has_a_page_that_says_when_not_to_use_it():
    index = (DOCS / "methods" / "index.md").read_text(encoding="utf-8")
    for name in s2d.methods():
        page = f"{SHARED_PAGES.get(name, name)}.md"
        text = (DOCS / "methods" / page).read_text(encoding="utf-8")
        assert f"({page})" in index, name
        assert name in text.splitlines()[0]
        for part in ("**Source.**", "**Cost.**", "**When not to use it.**"):
            assert part in text, (name, part)


def test_the_navigation_names_every_page_once():
    nav = yaml.safe_load((ROOT / "mkdocs.yml").read_text(encoding="utf-8"))["nav"]
    assert sorted(pages_in(nav)) == [page.relative_to(DOCS).as_posix() for page in PAGES]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(DOCS).as_posix())
def test_links_are_relative_and_lead_somewhere(page: Path):
    for target in LINK.findall(page.read_text(encoding="utf-8")):
        if not target.startswith(("https://", "http://")):
            assert (page.parent / target).resolve().is_relative_to(DOCS), target
            assert (page.parent / target).exists(), target


def test_commands_and_their_options_exist():
    commands = typer.main.get_command(app).commands
    for page in (page for page in PAGES if page.name != "bad-inputs.md"):  # which shows wrong ones
        text = page.read_text(encoding="utf-8").replace("\\\n", " ")
        for line in re.findall(r"(?:^|`|\.venv/bin/)s2d ([a-z]+[^`\n]*)", text, re.MULTILINE):
            name, _, rest = line.partition(" ")
            assert name in commands, f"{page.name}: s2d {line}"
            command = commands[name]
            if below := getattr(command, "commands", None):  # s2d recipes list
                name, _, rest = rest.partition(" ")
                assert name in below or not name.isalpha(), f"{page.name}: s2d {line}"
                command = below.get(name, command)
            known = {option for one in command.params for option in one.opts + one.secondary_opts}
            for option in re.findall(r"(?<!\S)--?[a-z][a-z-]*", rest.split("#")[0]):
                assert option in known | {"--help"}, f"{page.name}: s2d {line}"


def scores_by_method(page: Path) -> list[tuple[str, list[str]]]:
    """The rows of a page's tables that begin with a method and hold its two scores and their difference."""
    rows = []
    for line in page.read_text(encoding="utf-8").splitlines():
        scores = re.findall(r"[-+]?\d+\.\d\d", re.sub(r"± [\d.]+", "", line))
        if (name := re.match(r"\| \[?([a-z][a-z0-9+-]*)", line)) and len(scores) == 3:
            rows.append((name[1], scores))
    return rows


def test_the_scores_of_the_decision_table_are_those_of_the_results():
    index = DOCS / "methods" / "index.md"
    copied, measured = scores_by_method(index), scores_by_method(DOCS / "results" / "quant.md")
    assert set(re.findall(r"^\| \[([a-z][a-z0-9-]*)", index.read_text(encoding="utf-8"), re.MULTILINE)) >= set(
        s2d.methods()
    )
    assert [row for row in copied if row not in measured] == []


def test_docstrings_are_markdown_as_the_api_page_shows_them():
    for path in sorted((ROOT / "src").rglob("*.py")):
        found = re.search(r":(?:func|class|mod|meth|attr|data|ref):`", path.read_text(encoding="utf-8"))
        assert found is None, f"{path.name}: {found and found[0]} is reStructuredText; write `name`"


def test_the_files_and_functions_that_the_pages_walk_through_exist():
    package = ROOT / "src" / "s2d"
    code = {path.relative_to(package).as_posix(): path.read_text(encoding="utf-8") for path in package.rglob("*.py")}
    for page in ("how-a-model-goes-through.md", "architecture.md"):
        text = (DOCS / page).read_text(encoding="utf-8")
        named = set(re.findall(r"`([\w/]+\.py)`", text))
        assert named and [name for name in named if not any(f"/{path}".endswith(f"/{name}") for path in code)] == []
        pairs = re.findall(r"`(?:\w+\.)?(\w+)`\s+(?:in\s+|\()`([\w/]+\.py)`", text)
        assert [pair for pair in pairs if not re.search(rf"(?:def|class) {pair[0]}\b", code[pair[1]])] == []
    drawn = re.findall(r">([\w/]+\.py)<", (DOCS / "images" / "flow.svg").read_text(encoding="utf-8"))
    assert drawn and [name for name in drawn if not any(f"/{path}".endswith(f"/{name}") for path in code)] == [
        "tasks/NAME.py",
        "ptq/NAME.py",
        "tasks/NAME.py",
    ]
