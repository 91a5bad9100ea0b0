"""Tables as CSV and Markdown."""

import csv
import io
import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from undo.config.files import write_atomically


def write_csv(rows: Iterable[dict[str, Any]], columns: Sequence[str], path: Path) -> None:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(columns)
    writer.writerows([row[column] for column in columns] for row in rows)
    write_atomically(path, text.getvalue())


def as_text(rows: Sequence[dict[str, Any]]) -> list[list[str]]:
    """The table's cells as they are printed."""

    def cell(column: str, value: Any) -> str:
        if value is None:
            return "-"
        if isinstance(value, float) and math.isnan(value):
            return "diverged"
        if column == "flops":
            return f"{value:.2e}"
        return f"{value:.3f}" if isinstance(value, float) else str(value)

    return [[cell(column, value) for column, value in row.items()] for row in rows]


def markdown(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [list(map(escaped, header)), ["---"] * len(header), *(map(escaped, row) for row in rows)]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def escaped(text: str) -> str:
    """Text of anybody's making as Markdown that shows it: no cell, tag, link or line ends or begins in it."""
    for mark, shown in (("&", "&amp;"), ("<", "&lt;"), (">", "&gt;"), ("|", "\\|"), ("](", "\\]("), ("\n", " ")):
        text = text.replace(mark, shown)
    return text
