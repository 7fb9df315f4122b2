"""The public names: all there, imported when first used."""

from __future__ import annotations

import subprocess
import sys

import pytest

import sidetuning as st
from sidetuning import api


def test_every_public_name_is_there() -> None:
    assert sorted(set(st.__all__)) == sorted(st.__all__)
    assert all(getattr(st, name) is not None and name in dir(st) for name in st.__all__)
    assert callable(st.distill) and callable(st.load)


def test_a_name_that_does_not_exist_raises() -> None:
    with pytest.raises(AttributeError, match="'sidetuning' has no attribute 'SideTunr'"):
        st.SideTunr  # type: ignore[attr-defined]  # noqa: B018


def test_what_needs_no_network_does_not_import_torch() -> None:
    code = "import sys, sidetuning.cli, sidetuning.files, sidetuning.registry; from sidetuning import errors"
    subprocess.run([sys.executable, "-c", f"{code}; assert 'torch' not in sys.modules"], check=True)


@pytest.mark.parametrize("module", ["base", "tuner", "merges"])
def test_a_module_can_be_imported_first(module: str) -> None:
    subprocess.run([sys.executable, "-c", f"import sidetuning.{module}"], check=True)


@pytest.mark.parametrize("name", api.__all__)
def test_no_module_hides_a_public_name(name: str) -> None:
    assert getattr(st, name) is getattr(api, name)
