"""Hooks of the documentation site: pages of the repository's root, and links to files outside of docs.

    make docs

Documents link files of the repository by relative paths, which work where the repository is read. On the site such a
link leads to the repository; one to a file that does not exist is a warning, which `make docs` takes for an error.
"""

from __future__ import annotations

import logging
import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File

ROOT = Path(__file__).parents[2]
LOG = logging.getLogger("mkdocs.hooks.pages")
# Files of the root that are pages of the site.
PAGES = {"CONTRIBUTING.md": "contributing.md", "CHANGELOG.md": "changelog.md", "SECURITY.md": "security.md"}
LINK = re.compile(r"(?<=\]\()(?![a-z]+:|#)([^)\s#]+)")


def on_files(files: Any, config: Any) -> Any:
    """Add the pages that stand in the root, their links turned to where their targets are on the site."""
    for source, page in PAGES.items():
        text = (ROOT / source).read_text(encoding="utf-8")
        turned = LINK.sub(lambda link: link[1].removeprefix("docs/") if _is_page(link[1]) else "../" + link[1], text)
        files.append(File.generated(config, page, content=turned))
    return files


def _is_page(link: str) -> bool:
    return link.startswith("docs/") and (ROOT / link).exists()


def on_page_markdown(markdown: str, *, page: Any, config: Any, files: Any) -> str:
    """Turn links to files outside of docs into links to the repository, and to pages of the root into pages."""
    folder = (ROOT / "docs" / page.file.src_uri).parent
    up = "../" * page.file.src_uri.count("/")

    def turn(link: re.Match[str]) -> str:
        target = (folder / link[1]).resolve()
        if target.is_relative_to(ROOT / "docs"):
            return link[1]
        name = target.relative_to(ROOT).as_posix() if target.is_relative_to(ROOT) else link[1]
        if not target.exists():
            LOG.warning("%s links %s, which does not exist", page.file.src_uri, link[1])
        if name in PAGES:
            return up + PAGES[name]
        return f"{config.repo_url.rstrip('/')}/blob/main/{name}"

    parts = re.split(r"(^```.*?^```|`[^`\n]+`)", markdown, flags=re.DOTALL | re.MULTILINE)
    return "".join(part if i % 2 else LINK.sub(turn, part) for i, part in enumerate(parts))
