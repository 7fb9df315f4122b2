"""Texts under free licences that installed packages ship: English of documentation, and code of three kinds."""

from __future__ import annotations

import ast
import random
import re
import sysconfig
import warnings
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

PACKAGES = Path(sysconfig.get_paths()["purelib"])
STANDARD = Path(sysconfig.get_paths()["stdlib"])
# Where prose is read, with its licence.
PROSE = {
    "numpy": "BSD-3-Clause",
    "scipy": "BSD-3-Clause",
    "sklearn": "BSD-3-Clause",
    "pandas": "BSD-3-Clause",
    "networkx": "BSD-3-Clause",
    "sympy": "BSD-3-Clause",
    "torch": "BSD-3-Clause",
}
# What is learned later: files by folder, their licence. Python is the standard library's (PSF-2.0).
CPP = {"torch/include/torch/csrc": "BSD-3-Clause", "torch/include/c10": "BSD-3-Clause"}
WEB = {"material": "MIT", "mkdocs": "BSD-2-Clause", "werkzeug": "BSD-3-Clause", "torch/utils": "BSD-3-Clause"}
END = "<|endoftext|>"


def trees(root: Path) -> Iterator[ast.Module]:
    """The Python files below a folder, parsed, in one order on every machine; no tests, and nothing installed there."""
    for file in sorted(root.rglob("*.py")):
        if not re.search(r"/(site-packages|test\w*|idlelib|lib2to3)/", file.as_posix().removeprefix(str(root))):
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                try:
                    yield ast.parse(file.read_text(encoding="utf-8"))
                except (SyntaxError, ValueError):
                    continue


DOCUMENTED = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)


def prose() -> list[str]:
    """The long docstrings of the packages, each once."""
    found = [
        ast.get_docstring(n)
        for p in PROSE
        for t in trees(PACKAGES / p)
        for n in ast.walk(t)
        if isinstance(n, DOCUMENTED)
    ]
    return sorted({text for text in found if text and len(text) > 200})


def python() -> list[str]:
    """The standard library's code, without docstrings and comments."""
    texts = []
    for tree in trees(STANDARD):
        for node in ast.walk(tree):
            if isinstance(node, DOCUMENTED) and ast.get_docstring(node) is not None:
                node.body = node.body[1:] or [ast.Pass()]
        texts.append(ast.unparse(tree))
    return texts


def files(folders: Sequence[str], ends: Sequence[str]) -> list[str]:
    """The files below folders of packages with these ends, without comments of C and without what a machine packed."""
    paths = [f for folder in folders for f in sorted((PACKAGES / folder).rglob("*")) if f.suffix in ends]
    texts = [
        re.sub(r"/\*.*?\*/|^\s*//.*$", "", f.read_text(errors="ignore"), flags=re.DOTALL | re.MULTILINE) for f in paths
    ]
    return [text for text in texts if text and max(map(len, text.splitlines())) < 400]


DOMAINS: dict[str, Callable[[], list[str]]] = {
    "Python": python,
    "C++": partial(files, [*CPP], [".h"]),
    "web": partial(files, [*WEB], [".html", ".js", ".css"]),
}


def tokens(tokenizer: Any, texts: Sequence[str], length: int, seed: int) -> Tensor:
    """Texts in random order, one after the other, cut into rows (n, length)."""
    mixed = random.Random(seed).sample(list(texts), len(texts))
    ids = [i for text in mixed for i in tokenizer(text + END).input_ids]
    return torch.tensor(ids[: len(ids) // length * length]).view(-1, length)
