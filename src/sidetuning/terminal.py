"""What is printed: texts of users reach the terminal without anything that it would obey."""

from __future__ import annotations

import csv
import io
import json
import re
import shutil
import sys
from collections.abc import Collection, Iterable, Sequence
from typing import Any

# Escape sequences, other control characters, and marks that turn the direction of writing.
OBEYED = re.compile(
    r"\x1b\][^\x07\x1b]*(?:\x07|\x1b\\)?|(?:\x1b\[|\x9b)[0-?]*[ -/]*[@-~]?|"
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\u200e\u200f\u202a-\u202e\u2066-\u2069]"
)


def plain(text: object) -> str:
    """A text without what a terminal obeys, and without halves of characters, which cannot be encoded."""
    return OBEYED.sub("", str(text)).encode("utf-8", "replace").decode()


def say(text: object, error: bool = False) -> None:
    """Print a text as it is; `error` chooses standard error."""
    print(plain(text), file=sys.stderr if error else sys.stdout, flush=True)


def say_markdown(text: str, columns: int = 0) -> None:
    """Print Markdown, such as a table, at least this many columns wide."""
    from rich.console import Console
    from rich.markdown import Markdown

    # A link's text must not hide its address.
    Console(width=max(columns, shutil.get_terminal_size().columns)).print(Markdown(plain(text), hyperlinks=False))


def size_text(count: int) -> str:
    """A number of bytes, for people."""
    return f"{count / 1e6:.2f} MB" if count >= 1e5 else f"{count / 1e3:.1f} kB"


def say_json(content: Any, indent: int | None = 2) -> None:
    """Print JSON for other programs: in ASCII, which every terminal and pipe takes; on one line without `indent`."""
    print(json.dumps(content, indent=indent), flush=True)


def say_csv(rows: Iterable[Sequence[str]]) -> None:
    """Print CSV: to programs in UTF-8 and as it is, names of files that are none included; to terminals plain."""
    shown = sys.stdout.isatty()
    if isinstance(sys.stdout, io.TextIOWrapper) and not shown:
        sys.stdout.reconfigure(encoding="utf-8", errors="surrogateescape")
    csv.writer(sys.stdout, lineterminator="\n").writerows(map(plain, row) if shown else row for row in rows)
    sys.stdout.flush()


def say_table(columns: Sequence[str], rows: Iterable[Sequence[str] | None], right: Collection[str] = ()) -> None:
    """Print a table; the columns in `right` are numbers, and a row that is None is a line between sections."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table()
    for column in columns:
        table.add_column(column, justify="right" if column in right else "left", overflow="fold")
    for row in rows:
        if row is None:
            table.add_section()
        else:
            # Text, in which rich looks for no markup.
            table.add_row(*(Text(plain(cell)) for cell in row))
    # A file or a pipe takes lines of any length.
    Console(width=None if sys.stdout.isatty() else 10**5).print(table)
