"""`sidetuning parts`: what can be named in `load_base` and `add_task`."""

from __future__ import annotations

from dataclasses import dataclass

from sidetuning.terminal import say, say_json


@dataclass(frozen=True)
class Settings:
    """List the registered bases, sides, merges and heads."""

    json: bool = False
    """Print JSON."""


def main(settings: Settings) -> None:
    """Print one line per kind of part."""
    from sidetuning import BASES, HEADS, MERGES, SIDES

    registries = (BASES, SIDES, MERGES, HEADS)
    if settings.json:
        say_json({registry.kind: registry.names() for registry in registries})
        return
    for registry in registries:
        say(f"{registry.kind}: {', '.join(registry.names())}")
    say("more bases: timm:NAME, hf:NAME_OR_FOLDER, onnx:PATH")
