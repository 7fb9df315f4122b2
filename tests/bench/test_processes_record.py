"""Two hosts, made of network namespaces, learn and cache what one process does."""

from __future__ import annotations

import pytest

import processes


@pytest.mark.slow
def test_two_hosts_learn_what_one_process_does() -> None:
    pytest.importorskip("timm")
    if (missing := processes.cannot_join()) is not None:
        pytest.skip(missing)
    given = processes.Settings(images=12, batch=4, steps=2)
    alone = processes.one(given, 1)
    with processes.two_hosts() as hosts:
        both = processes.one(given, 2, hosts=hosts)
    assert (alone["processes"], both["processes"]) == (1, 2)
    for what in ("features", "weights", "loss"):
        assert both[what] == pytest.approx(alone[what], rel=1e-6)
