"""Imports point one way only, lazy ones included; the picture of them is drawn from the source."""

from __future__ import annotations

import re

import pytest

import architecture

TABLES = architecture.floors()
GRAPH = architecture.import_graph()


def test_every_module_has_a_floor_and_every_entry_a_module() -> None:
    assert not [module for module in GRAPH if architecture.place(module, TABLES)[0] < 0]
    entries = {name for _, names in TABLES for name in names}
    assert not entries - {architecture.place(module, TABLES)[1] for module in GRAPH}


def test_no_module_imports_in_a_circle() -> None:
    assert architecture.circle(GRAPH) == []
    assert architecture.circle(architecture.collapse(GRAPH, TABLES)) == []


def test_nothing_points_up() -> None:
    def floor(module: str) -> int:
        return architecture.place(module, TABLES)[0]

    assert not [f"{a} imports {b}" for a in GRAPH for b in sorted(GRAPH[a]) if floor(b) > floor(a)]


def test_the_library_never_imports_the_bench() -> None:
    assert not [m for m in GRAPH if m.startswith("sidetuning.") for b in GRAPH[m] if b.startswith("sidetuning_bench")]
    library = [file for module, file in architecture.sources().items() if not module.startswith("sidetuning_bench")]
    assert not [file.name for file in library if "sidetuning_bench" in file.read_text(encoding="utf-8")]


def test_the_picture_is_drawn_from_the_source() -> None:
    drawn = architecture.PICTURE.read_text(encoding="utf-8") == architecture.picture()
    assert drawn, "the imports have changed; run python bench/records/architecture.py"


def test_the_document_names_files_that_exist() -> None:
    text = (architecture.ROOT / "docs/architecture.md").read_text(encoding="utf-8")
    assert "architecture.svg" in text
    names = re.findall(r"`((?:src|bench|tests)/[^`*<]+)`", text)
    assert len(names) >= 15
    assert not [name for name in names if not (architecture.ROOT / name).exists()]


@pytest.mark.parametrize(
    "graph",
    [{"a": {"b"}, "b": {"a"}}, {"a": {"b"}, "b": {"c"}, "c": {"a"}}],
)
def test_circles_are_found(graph: architecture.Graph) -> None:
    assert set(architecture.circle(graph)) == set(graph)
