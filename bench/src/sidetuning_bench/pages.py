"""HTML pages that are complete in themselves."""

from __future__ import annotations

from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from sidetuning.files import write_text
from sidetuning_bench.results import number_text


@cache
def _environment() -> Environment:
    """All values are escaped."""
    environment = Environment(loader=PackageLoader("sidetuning_bench"), autoescape=True, undefined=StrictUndefined)
    environment.trim_blocks = environment.lstrip_blocks = True
    environment.filters["number"] = number_text
    return environment


def write_page(template: str, path: str | Path, values: dict[str, Any]) -> Path:
    """Fill a template of this package and write the page atomically."""
    page = _environment().get_template(template).render(version=version("sidetuning"), **values)
    write_text(path, page.lstrip())
    return Path(path)
