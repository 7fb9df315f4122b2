"""Draws `docs/architecture.svg`, the import graph of both packages, from the imports in the source.

The floors are the tables of CONTRIBUTING.md, lowest first. A module may import modules of its own floor and of those
below. `python bench/records/architecture.py` draws the picture; tests/library/test_architecture.py checks it.
"""

from __future__ import annotations

import ast
import graphlib
import re
from collections import defaultdict
from html import escape
from pathlib import Path

ROOT = Path(__file__).parents[2]
PACKAGES = {"sidetuning": ROOT / "src/sidetuning", "sidetuning_bench": ROOT / "bench/src/sidetuning_bench"}
PICTURE = ROOT / "docs/architecture.svg"
# Importer to imported.
Graph = dict[str, set[str]]

# Sizes in pixels.
BOX, GAP, ROW, LEFT, WIDTH = 24, 14, 56, 150, 1360
COLOURS = {"sidetuning": "#2563eb", "sidetuning_bench": "#c2410c"}
STYLE = """
  text { font: 12px ui-sans-serif, system-ui, sans-serif; fill: #1f2937; }
  .floor { font-weight: 600; fill: #6b7280; }
  .band { fill: #f3f4f6; }
  rect.box { fill: #ffffff; stroke-width: 1.5; }
  path { fill: none; stroke-opacity: 0.35; stroke-width: 1.2; }
  @media (prefers-color-scheme: dark) {
    text { fill: #e5e7eb; } .floor { fill: #9ca3af; } .band { fill: #1f2937; } rect.box { fill: #111827; }
    svg { background: #0b1120; }
  }
"""


def sources() -> dict[str, Path]:
    """Every module of both packages by its dotted name."""
    found = {}
    for package, folder in PACKAGES.items():
        for file in sorted(folder.rglob("*.py")):
            parts = [package, *file.relative_to(folder).with_suffix("").parts]
            found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = file
    return found


def import_graph() -> Graph:
    """What each module imports of the two packages, at its top, inside functions and for types alike."""
    modules = sources()
    return {name: _imported(file, modules) for name, file in modules.items()}


def _imported(file: Path, modules: dict[str, Path]) -> set[str]:
    names: set[str] = set()
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            for alias in node.names:
                full = f"{node.module}.{alias.name}"
                names.add(full if full in modules else str(node.module))
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith("import_module"):
            names.update(a.value for a in node.args if isinstance(a, ast.Constant) and isinstance(a.value, str))
    return names & modules.keys()


def floors() -> list[tuple[str, list[str]]]:
    """The floors of CONTRIBUTING.md, lowest first: a title, and modules and packages by their dotted names."""
    found = []
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    for package in PACKAGES:
        (table,) = re.findall(rf"\| floor of `{package}` \|.*?\n\|[- |]+\|\n((?:\|.*\n)+)", text)
        for line in table.splitlines():
            title, modules = (cell.strip() for cell in line.strip("|").split("|")[:2])
            names = re.findall(r"`([^`]+)`", modules)
            found.append((title, [package if name == "__init__" else f"{package}.{name}" for name in names]))
    return found


def place(module: str, tables: list[tuple[str, list[str]]]) -> tuple[int, str]:
    """The floor of a module and the entry of the table that names it or the package it is in; -1 where none does."""
    best = (-1, "")
    for floor, (_, names) in enumerate(tables):
        for name in names:
            inside = module == name or (module.startswith(f"{name}.") and name not in PACKAGES)
            if inside and len(name) > len(best[1]):
                best = (floor, name)
    return best


def circle(graph: Graph) -> list[str]:
    """The modules of one import circle; empty where there is none."""
    try:
        graphlib.TopologicalSorter(graph).prepare()
    except graphlib.CycleError as error:
        return list(error.args[1])
    return []


def collapse(graph: Graph, tables: list[tuple[str, list[str]]]) -> Graph:
    """The graph of the tables' entries: a package that has one entry is one node."""
    collapsed: Graph = defaultdict(set)
    for module, imported in graph.items():
        node = place(module, tables)[1]
        collapsed[node] |= {other for m in imported if (other := place(m, tables)[1]) != node}
    return dict(collapsed)


def reduce(graph: Graph) -> Graph:
    """The graph without the edges that a longer way says too."""
    below: Graph = {}
    for node in graphlib.TopologicalSorter(graph).static_order():
        below[node] = graph[node].union(*(below[other] for other in graph[node]))
    return {node: {o for o in to if not any(o in below[other] for other in to)} for node, to in graph.items()}


def rows(graph: Graph, tables: list[tuple[str, list[str]]]) -> list[list[tuple[str, list[str]]]]:
    """Per floor its rows of nodes, lowest first: a node stands above everything that it imports on its own floor."""
    height: dict[str, int] = {}
    for node in graphlib.TopologicalSorter(graph).static_order():
        floor = place(node, tables)[0]
        height[node] = max((height[o] + 1 for o in graph[node] if place(o, tables)[0] == floor), default=0)
    found = []
    for title, names in tables:
        present = [name for name in names if name in height]
        levels = range(max((height[name] for name in present), default=-1) + 1)
        found.append([(title, [name for name in present if height[name] == level]) for level in levels])
    return found


def _positions(graph: Graph, floor_rows: list[list[tuple[str, list[str]]]]) -> dict[str, tuple[float, float, float]]:
    """Left edge, top and width of every box. A box stands near the middle of what it imports."""
    placed: dict[str, tuple[float, float, float]] = {}
    y = sum(ROW * len(levels) + GAP for levels in floor_rows)
    for levels in floor_rows:
        for _, names in levels:
            y -= ROW
            middle = {n: _mean([placed[o][0] + placed[o][2] / 2 for o in graph[n] if o in placed]) for n in names}
            ordered = sorted(names, key=lambda name: (middle[name], names.index(name)))
            widths = [7.2 * len(_label(name)) + 18 for name in ordered]
            free = (WIDTH - LEFT - sum(widths)) / (len(widths) + 1)
            x = LEFT + free
            for name, width in zip(ordered, widths, strict=True):
                placed[name] = (x, y + (ROW - BOX) / 2, width)
                x += width + free
        y -= GAP
    return placed


def _mean(values: list[float]) -> float:
    return sum(values) / len(values) if values else (LEFT + WIDTH) / 2


def _label(name: str) -> str:
    package, _, rest = name.partition(".")
    folder = (PACKAGES[package] / rest.replace(".", "/")).is_dir()
    return f"{rest}/" if rest and folder else rest or package


def picture() -> str:
    """The import graph as SVG: floors as bands, modules as boxes, and imports as lines that run down."""
    tables = floors()
    full = collapse(import_graph(), tables)
    graph, floor_rows = reduce(full), rows(full, tables)
    placed = _positions(graph, floor_rows)
    bands, lines, boxes = [], [], []
    y = height = sum(ROW * len(levels) + GAP for levels in floor_rows)
    for levels in floor_rows:
        if not levels:
            continue
        y -= ROW * len(levels) + GAP
        bands.append(f'<rect class="band" x="0" y="{y}" width="{WIDTH}" height="{ROW * len(levels)}" rx="6"/>')
        middle = f'x="12" y="{y + ROW * len(levels) / 2 + 4:.0f}"'
        bands.append(f'<text class="floor" {middle}>{escape(levels[0][0])}</text>')
    for name, (x, top, width) in sorted(placed.items()):
        colour = COLOURS[name.partition(".")[0]]
        for other in sorted(graph[name]):
            to_x, to_y = placed[other][0] + placed[other][2] / 2, placed[other][1]
            from_x, from_y, bend = x + width / 2, top + BOX, (to_y - top - BOX) / 2
            curve = f"{from_x:.1f} {from_y + bend:.1f}, {to_x:.1f} {to_y - bend:.1f}, {to_x:.1f} {to_y:.1f}"
            lines.append(f'<path stroke="{colour}" d="M {from_x:.1f} {from_y:.1f} C {curve}"/>')
        box = f'x="{x:.1f}" y="{top:.1f}" width="{width:.1f}" height="{BOX}" rx="5"'
        boxes.append(f'<rect class="box" stroke="{colour}" {box}/>')
        text = f'x="{x + width / 2:.1f}" y="{top + 16:.1f}" text-anchor="middle"'
        boxes.append(f"<text {text}>{escape(_label(name))}</text>")
    title = "<title>Imports of sidetuning (blue) and sidetuning_bench (orange): every line runs down</title>"
    size = f'viewBox="0 0 {WIDTH} {height}" width="{WIDTH}" height="{height}"'
    parts = [title, f"<style>{STYLE}</style>", *bands, *lines, *boxes]
    return f'<svg xmlns="http://www.w3.org/2000/svg" {size} role="img">\n' + "\n".join(parts) + "\n</svg>\n"


if __name__ == "__main__":
    PICTURE.write_text(picture(), encoding="utf-8")
    print(PICTURE.relative_to(ROOT))
