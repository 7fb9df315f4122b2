"""Both packages stay as small as the table in CONTRIBUTING.md says."""

from __future__ import annotations

import ast
import re
import subprocess
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
# Lines that are equal in two places.
DUPLICATE = 6
PACKAGES = ["src/", "bench/src/"]


def tracked(paths: list[str]) -> list[Path]:
    """The Python files below `paths` that git knows."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard", "--", *paths]
    try:
        names = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout.split("\n")
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("this is no clone of the repository")
    return [ROOT / name for name in names if name.endswith(".py") and (ROOT / name).exists()]


def lines(file: Path) -> list[str]:
    return file.read_text(encoding="utf-8").splitlines()


def budgets() -> dict[str, tuple[list[str], int]]:
    """The table: what, in which files, at most."""
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| ([^|`]+) \| ((?:`[^`]+` ?)+)\| (\d+) \|$", text, re.MULTILINE)
    return {what: (re.findall(r"`([^`]+)`", files), int(most)) for what, files, most in rows}


BUDGETS = budgets()


def functions(file: Path) -> Iterator[tuple[str, int]]:
    """Every function of a file and its number of lines, without those of its docstring."""
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            first = node.body[0]
            docstring = (first.end_lineno or 0) - first.lineno + 1 if ast.get_docstring(node) else 0
            size = (node.end_lineno or 0) - node.lineno + 1 - docstring
            yield f"{file.relative_to(ROOT)}:{node.lineno} {node.name}", size


def code(file: Path) -> list[tuple[int, str]]:
    """The numbered lines of a file that do something: no comments, docstrings, imports or signatures."""
    text = file.read_text(encoding="utf-8")
    hidden: set[int] = set()
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            hidden.update(range(node.lineno, node.body[0].lineno))
        docstring = isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
        if isinstance(node, ast.stmt) and (docstring or isinstance(node, (ast.Import, ast.ImportFrom))):
            hidden.update(range(node.lineno, (node.end_lineno or node.lineno) + 1))
    numbered = [(n, " ".join(line.split())) for n, line in enumerate(text.splitlines(), 1) if n not in hidden]
    return [(n, line) for n, line in numbered if line and not line.startswith("#")]


def test_the_table_is_complete() -> None:
    whole = {"library", "heart", "bench", "both packages"}
    assert set(BUDGETS) == whole | {"one file", "one function, its docstring apart", "columns of a line"}


@pytest.mark.parametrize("what", ["library", "heart", "bench", "both packages"])
def test_packages_keep_their_budget(what: str) -> None:
    paths, most = BUDGETS[what]
    total = sum(len(lines(file)) for file in tracked(paths))
    assert 0 < total <= most


def test_no_file_is_too_long() -> None:
    paths, most = BUDGETS["one file"]
    assert not [f"{f.relative_to(ROOT)}: {len(lines(f))}" for f in tracked(paths) if len(lines(f)) > most]


def test_a_function_fits_on_a_screen() -> None:
    paths, most = BUDGETS["one function, its docstring apart"]
    assert not [f"{name}: {size}" for file in tracked(paths) for name, size in functions(file) if size > most]


def test_no_line_is_too_wide_and_none_hides_it() -> None:
    paths, most = BUDGETS["columns of a line"]
    found = []
    for file in tracked(paths):
        if "legacy" in file.parts or file == Path(__file__):
            continue
        for number, line in enumerate(lines(file), 1):
            if len(line) > most or "fmt: skip" in line or "fmt: off" in line or "noqa: E501" in line:
                found.append(f"{file.relative_to(ROOT)}:{number}")
    assert not found


def test_nothing_is_written_twice() -> None:
    places: dict[tuple[str, ...], list[str]] = defaultdict(list)
    for file in tracked(PACKAGES):
        numbered = code(file)
        for start in range(len(numbered) - DUPLICATE + 1):
            window = numbered[start : start + DUPLICATE]
            places[tuple(line for _, line in window)].append(f"{file.relative_to(ROOT)}:{window[0][0]}")
    assert not [found for found in places.values() if len(found) > 1]
