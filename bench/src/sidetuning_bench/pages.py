"""HTML pages that are complete in themselves."""

from __future__ import annotations

from importlib.metadata import version
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from sidetuning.files import write_text
from sidetuning_bench.results import number_text


def write_page(template: str, path: str | Path, **values: Any) -> Path:
    """Fill a template of this package, escaping all values, and write the page atomically."""
    environment = Environment(
        loader=PackageLoader("sidetuning_bench"), autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )  # fmt: skip
    environment.filters["number"] = number_text
    page = environment.get_template(template).render(version=version("sidetuning"), **values)
    write_text(path, page.lstrip())
    return Path(path)
