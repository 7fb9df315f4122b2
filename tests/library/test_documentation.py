"""Every public name says what it is, and every argument what it means."""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import sidetuning as st
from sidetuning import api

# Methods that every `nn.Module` has.
MODULE = ("extra_repr", "train", "to", "apply")


def public() -> Iterator[tuple[str, Any]]:
    """Functions and classes of the public API, the classes' own methods and properties, and all registered parts."""
    for name in api.__all__:
        thing = getattr(st, name)
        if inspect.isclass(thing) or inspect.isfunction(thing):
            yield name, thing
        for member, value in vars(thing).items() if inspect.isclass(thing) else ():
            function = getattr(value, "__func__", getattr(value, "fget", value))
            if inspect.isfunction(function) and not member.startswith("_") and member not in MODULE:
                yield f"{name}.{member}", function
    for registry in (st.BASES, st.SIDES, st.MERGES, st.HEADS):
        for name in registry.names():
            if registry[name].__module__.startswith("sidetuning."):
                yield f"{registry.kind} {name}", registry[name]


PUBLIC = dict(public())


def arguments(name: str) -> list[str]:
    """What a caller gives; a registered part gets the base, or kind, width and laterals, from the library."""
    given = {"self", "args", "kwargs"} | ({"base", "kind", "width", "laterals"} if " " in name else set())
    return [argument for argument in inspect.signature(PUBLIC[name]).parameters if argument not in given]


def test_the_api_is_found() -> None:
    assert len(PUBLIC) > 80 and {"fit", "SideTuner.add_task", "merge alpha", "side fcn4"} <= set(PUBLIC)


@pytest.mark.parametrize("name", PUBLIC)
def test_every_public_name_is_documented(name: str) -> None:
    text = inspect.cleandoc(PUBLIC[name].__doc__ or "")
    first = text.partition("\n\n")[0]
    # A sentence, or a phrase with its noun; not the signature that a dataclass has where it has no docstring.
    assert re.match(r"[A-Z0-9`\"][^\n]", first) and first.endswith((".", ":")), f"{name}: {first!r}"
    assert not re.match(r"(Of|As|For|That|Which|And|By|In) ", first), f"{name}: {first!r} is a fragment"


@pytest.mark.parametrize("name", [name for name in PUBLIC if not name.endswith("Error")])
def test_every_argument_is_documented(name: str) -> None:
    text = inspect.cleandoc(PUBLIC[name].__doc__ or "")
    sections = "\n".join(re.findall(r"^(?:Args|Attributes):\n((?:[ ]+.*\n?|\n)+)", text, re.MULTILINE))
    explained = {
        n.strip() for names in re.findall(r"^ {4}([\w, ]+):", sections, re.MULTILINE) for n in names.split(",")
    }
    explained |= set(re.findall(r"`(\w+)[`:=]", text))
    wanted = arguments(name)
    if len(wanted) <= 2:
        # A short function may say it in its sentences; one argument is named by its own name.
        explained |= set(re.findall(r"\w+", text)) | set(wanted if len(wanted) == 1 else [])
    assert not [argument for argument in wanted if argument not in explained]


def test_every_public_name_has_one_place_in_the_api_reference() -> None:
    pages = [page.read_text(encoding="utf-8") for page in (Path(__file__).parents[2] / "docs/reference").glob("*.md")]
    entries = [entry.rpartition(".")[2] for page in pages for entry in re.findall(r"^::: (\S+)$", page, re.MULTILINE)]
    # Registries and type aliases have a sentence there instead.
    told = {"BASES", "HEADS", "MERGES", "SIDES", "Input"}
    assert sorted(name for name in entries if name in api.__all__) == sorted(set(api.__all__) - told)
    assert all(any(f"`st.{name}`" in page for page in pages) for name in told)
    for registry in (st.SIDES, st.MERGES, st.HEADS):
        own = [name for name in registry.names() if registry[name].__module__.startswith("sidetuning.")]
        listed = re.findall(rf"heading: '{registry.kind}=\"([\w-]+)\"'", "\n".join(pages))
        assert sorted(listed) == own, registry.kind
