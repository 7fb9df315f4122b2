"""The server keeps what its own OpenAPI description promises, whatever it is asked."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import sidetuning as st
from conftest import conv_base

pytest.importorskip("fastapi")
schemathesis = pytest.importorskip("schemathesis")

from hypothesis import HealthCheck, given, settings  # noqa: E402

from sidetuning.serving.app import Service  # noqa: E402
from sidetuning.serving.served import Served  # noqa: E402


def statuses(operation: Any) -> set[int]:
    """Ask one operation many things; each answer must be one that the description has. Returns their statuses."""
    seen = set()
    # An arbitrary text is no image, so that a question of the right shape may be refused (422).
    acceptance = schemathesis.checks.positive_data_acceptance

    @given(case=operation.as_strategy())
    @settings(max_examples=60, deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck))
    def ask(case: Any) -> None:
        seen.add(case.call_and_validate(excluded_checks=[acceptance]).status_code)

    ask()
    return seen


@pytest.mark.slow
@pytest.mark.filterwarnings("default")
def test_every_answer_is_one_that_the_description_has(tmp_path: Path) -> None:
    model = st.SideTuner(conv_base())
    model.add_task("kind", side="fcn4", head=2, labels=["cat", "dog"], seed=0)
    model.save(tmp_path)
    service = Service(Served(tmp_path, base=conv_base()), watch=0, quiet=True)
    schema = schemathesis.openapi.from_asgi("/openapi.json", service.app)
    found = {operation.path: statuses(operation) for operation in (each.ok() for each in schema.get_all_operations())}
    assert {path for path, seen in found.items() if seen == {200}} == {"/tasks", "/readyz", "/healthz", "/metrics"}
    assert 422 in found["/predict"] and 422 in found["/predict/files"]
