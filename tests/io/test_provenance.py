"""What tells results apart: code by what it says, not by how it is written down."""

from __future__ import annotations

import ast
import hashlib
from pathlib import Path

from s2d.io import provenance

CODE = '''"""About."""

class A:
    """About A."""

    async def f(self):
        """About f."""
        try:
            def g():
                """About g."""
                return 1
        finally:
            pass
        return g() + VALUE
'''


def meaning(folder: Path, text: str) -> str:
    file = folder / "code.py"
    file.write_text(text)
    provenance._meaning.cache_clear()
    return provenance._meaning(file, 0)


def test_comments_docstrings_and_layout_do_not_count(tmp_path: Path) -> None:
    first = meaning(tmp_path, CODE)
    others = (
        CODE.replace("About", "Something else about"),
        CODE.replace("            pass", "            pass  # nothing to clean up"),
        CODE.replace("return g() + VALUE", "return (\n            g()\n            + VALUE\n        )"),
    )
    assert all(other != CODE and meaning(tmp_path, other) == first for other in others)


def test_everything_else_counts(tmp_path: Path) -> None:
    first = meaning(tmp_path, CODE)
    others = (CODE.replace("return 1", "return 2"), CODE.replace("VALUE", "OTHER"), CODE + "\nx = 'a string'\n")
    assert all(meaning(tmp_path, other) != first for other in others)


def test_the_package_reads_the_same_as_by_a_walk_over_every_node() -> None:
    package = Path(provenance.__file__).parent.parent
    for file in sorted(package.rglob("*.py")):
        tree = ast.parse(file.read_bytes())
        for node in ast.walk(tree):
            documented = isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef)
            if documented and ast.get_docstring(node):
                node.body = node.body[1:]
        expected = hashlib.sha256(ast.dump(tree).encode()).hexdigest()
        assert provenance._meaning(file, file.stat().st_mtime_ns) == expected, file


def test_rooms_are_told_apart_in_any_order() -> None:
    assert provenance.code_digest("errors.py") != provenance.code_digest("registry.py")
    assert provenance.code_digest("errors.py", "quant") == provenance.code_digest("quant", "errors.py")
