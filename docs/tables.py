"""Write the tables of the pages in docs/results from the data beside them.

    python docs/tables.py            rewrite the pages
    python docs/tables.py --check    only say which pages would change; 1 if any would

A page marks a table, whose lines are the script's, by two comments:

    <!-- table: percentile.json rows=model columns=metric head="what is searched" -->
    <!-- end -->

The file holds what `s2d run --json` and the benchmarks write: an object with a list "records", each with a "value" and
the fields that say of what. `rows` and `columns` name the fields, with commas between, that make the rows and the
columns, in the order of the file. Records of one cell (seeds) are averaged. Further options:

    FIELD=VALUE|VALUE   only records with one of these values
    head="A, B"         titles of the row fields, in place of their names
    names="a: A, b: B"  what to write in place of values
    digits=2            decimals; without it three significant digits, and counts as they are
    gain=yes            a last column with the last value less the first
    spread=yes          the standard deviation of the averaged values behind each (n - 1)
    also="A, B"         further columns, the mean of these fields over all records of a row
    shows=FIELD         another field than "value", numbers or texts; only records that have it

A record whose value is null has a field "failed" with the reason, or is left out; of a failed cell the table says so.

A page with tables that have no data has a line near its top that begins with "No data file:" and says why. Such tables
may have their comments already: they stay as they are until the command that the page names has written the file.
"""

from __future__ import annotations

import argparse
import json
import math
import re
import shlex
import statistics
import sys
from pathlib import Path
from typing import Any

PAGES = Path(__file__).resolve().parent / "results"
TABLE = re.compile(r"^<!-- table: (\S+) (.*?) -->\n(.*?)^<!-- end -->$", re.MULTILINE | re.DOTALL)
WITHOUT = "No data file: "
OPTIONS = ("rows", "columns", "head", "names", "digits", "gain", "spread", "also", "shows")

Records = list[dict[str, Any]]


class PageError(Exception):
    """A page asks for a table that its data do not give; the message is one line."""


def filled(text: str, folder: Path) -> str:
    """A page with its tables made anew from the data in a folder.

    Raises:
        PageError: A file, a field or a record is missing, or the page says so although all are there.
    """
    waits = is_without(text)
    files = [folder / found[1] for found in TABLE.finditer(text)]
    if waits and files and all(file.is_file() for file in files):
        raise PageError(f"its data are there; remove the line that begins with {WITHOUT!r}")

    def table(found: re.Match[str]) -> str:
        file, words, _ = found.groups()
        if waits and not (folder / file).is_file():
            return found[0]
        try:
            records = json.loads((folder / file).read_text(encoding="utf-8"))["records"]
            lines = table_of(records, dict(word.split("=", 1) for word in shlex.split(words)))
        except FileNotFoundError:
            raise PageError(f"there is no data file {file}; write it with the command that the page names") from None
        except (KeyError, ValueError) as error:
            raise PageError(f"{file}: cannot make the table {words}: {error!r}") from error
        return "\n".join([f"<!-- table: {file} {words} -->", *lines, "<!-- end -->"])

    return TABLE.sub(table, text)


def is_without(text: str) -> bool:
    """Whether a page says near its top that tables have no data."""
    return any(line.startswith(WITHOUT) for line in text.splitlines()[:6])


def table_of(records: Records, options: dict[str, str]) -> list[str]:
    """The lines of a Markdown table.

    Raises:
        KeyError: An option is missing, or a record has no such field.
        ValueError: An option is malformed, or nothing is left.
    """
    wanted = {field: values.split("|") for field, values in options.items() if field not in OPTIONS}
    records = [r for r in records if all(str(r[field]) in values for field, values in wanted.items())]
    if shows := options.get("shows"):
        records = [{**r, "value": r[shows]} for r in records if shows in r]
    if not records:
        raise ValueError("no record is left")
    names = dict(part.split(": ", 1) for part in options["names"].split(", ")) if "names" in options else {}
    row_fields, column_fields = options["rows"].split(","), options["columns"].split(",")
    cells: dict[tuple[str, ...], dict[str, list[Any]]] = {}
    also = [part.strip() for part in options.get("also", "").split(",") if part]
    further: dict[tuple[str, ...], list[list[Any]]] = {}
    columns: dict[str, None] = {}
    for record in records:
        row = tuple(called(record[field], names) for field in row_fields)
        column = " ".join(filter(None, (called(record[field], names) for field in column_fields)))
        columns[column] = None
        if record["value"] is not None:
            cells.setdefault(row, {}).setdefault(column, []).append(record["value"])
        elif record.get("failed"):
            cells.setdefault(row, {}).setdefault(column, [])
        for field, found in zip(also, further.setdefault(row, [[] for _ in also]), strict=True):
            found += [record[field]] if field in record else []
    head = [part.strip() for part in options["head"].split(",")] if "head" in options else row_fields
    gain = options.get("gain") == "yes"
    titles = [*head, *columns, *(["gain"] if gain else []), *(called(field, names) for field in also)]
    lines = [lined(titles), "|---" * len(titles) + "|"]
    for row, values in cells.items():
        shown = [cell(values[column], options) or "failed" if column in values else "" for column in columns]
        if gain:
            first, last = (values.get(column) or [math.nan] for column in (list(columns)[0], list(columns)[-1]))
            shown.append(number(statistics.fmean(last) - statistics.fmean(first), options, "+"))
        shown += [number(statistics.fmean(each), {}) if each else "" for each in further[row]]
        lines.append(lined([*row, *shown]))
    return lines


def called(value: Any, names: dict[str, str]) -> str:
    """What a field's value is called in the table; a bar would end the cell."""
    text = "" if value is None else str(value)
    return names.get(text, text).replace("|", "\\|")


def lined(cells: list[str]) -> str:
    """A line of a table."""
    return "| " + " | ".join(cells) + " |"


def cell(values: list[Any], options: dict[str, str]) -> str:
    """The mean of what was measured, and how far seeds are apart where that is asked for."""
    if not values:
        return ""
    if isinstance(values[0], str):
        return "; ".join(called(text, {}) for text in dict.fromkeys(values))
    if len(values) == 1 and isinstance(values[0], int) and "digits" not in options:
        return f"{values[0]:,}"
    spread = options.get("spread") == "yes" and len(values) > 1
    return number(statistics.fmean(values), options) + (
        f" ± {number(statistics.stdev(values), options)}" if spread else ""
    )


def number(value: float, options: dict[str, str], sign: str = "") -> str:
    """As many decimals as asked for, or three significant digits; thousands apart; nothing where nothing is known."""
    if math.isnan(value):
        return ""
    if "digits" in options:
        return f"{value:{sign},.{int(options['digits'])}f}"
    if value == 0 or abs(value) >= 1e-2:
        size = math.floor(math.log10(abs(value))) if value else 0
        return f"{value:{sign},.{max(0, 2 - size)}f}"
    return f"{value:{sign}.0e}"


def main() -> int:
    """Write or check all pages."""
    parser = argparse.ArgumentParser(description="Write the tables of docs/results from the data beside the pages.")
    parser.add_argument("--check", action="store_true", help="change nothing; fail where a page differs")
    check = parser.parse_args().check
    changed = []
    for page in sorted(PAGES.glob("*.md")):
        text = page.read_text(encoding="utf-8")
        try:
            new = filled(text, PAGES)
        except PageError as error:
            print(f"{page.name}: {error}", file=sys.stderr)
            return 1
        if new != text:
            changed.append(page.name)
            if not check:
                page.write_text(new, encoding="utf-8")
    print(f"{'differ' if check else 'written'}: {', '.join(changed) or 'none'}")
    return int(check and bool(changed))


if __name__ == "__main__":
    sys.exit(main())
