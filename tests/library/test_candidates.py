"""Candidates side by side end as each does alone, on one read of the cached features."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import TensorDataset

import sidetuning as st
from conftest import mlp_base
from sidetuning.candidates import kin
from sidetuning.content import content_sha256
from sidetuning.data import Rows
from sidetuning.encoding import encode

generator = torch.Generator().manual_seed(0)
X = torch.randn(300, 12, generator=generator)
Y = (X @ torch.randn(12, 3, generator=generator)).argmax(1)
LINEAR: dict[str, Any] = {"side": None, "merge": "base-only", "head": 3}
SIDE: dict[str, Any] = {"side": "mlp", "merge": "alpha", "head": 3}


@pytest.fixture
def data(tmp_path: Path) -> tuple[st.Base, st.CachedFeatures, st.CachedFeatures]:
    base = mlp_base()
    halves = [TensorDataset(X[rows], Y[rows]) for rows in (slice(200), slice(200, 300))]
    augment = add_noise
    first = st.cache_features(base, halves[0], tmp_path / "cache", views=3, augment=augment, progress=False)
    return base, first, st.cache_features(base, halves[1], tmp_path / "cache", progress=False)


def add_noise(x: Tensor, generator: torch.Generator) -> Tensor:
    return x + 0.1 * torch.randn(x.shape, generator=generator)


class Dropping(nn.Module):
    """A side that draws from the generators, and another number of times than others."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.layer = nn.Linear(12, width)

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.dropout(self.layer(x), 0.5, self.training)


class Writing(Dropping):
    """A side that writes into its input."""

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x.mul_(1.01))


def dropping(width: int) -> nn.Module:
    torch.manual_seed(7)
    return Dropping(width)


def writing(width: int) -> nn.Module:
    torch.manual_seed(7)
    return Writing(width)


def candidates(width: int) -> list[st.Candidate]:
    fit: dict[str, Any] = {"lr": 1e-2, "epochs": 2}
    return [
        st.Candidate("slow", SIDE, {**fit, "lr": 1e-4}),
        st.Candidate("written", {**SIDE, "side": writing(width)}, fit),
        st.Candidate("fast", SIDE, fit),
        st.Candidate("dropped", {**SIDE, "side": dropping(width)}, fit),
        st.Candidate("other", SIDE, fit, seed=3),
        st.Candidate("solved", LINEAR, solve=True),
        st.Candidate("weak", LINEAR, solve=True, strength=1e-4),
        st.Candidate("strong", LINEAR, solve=True, strength=10.0),
        st.Candidate("both", LINEAR, {**fit, "steps": 3, "epochs": None}, solve=True, strength=0.1),
        st.Candidate("customer", LINEAR, fit, indices=range(0, 200, 3), relabel=turned),
    ]


def turned(y: Tensor) -> Tensor:
    return 2 - y


def alone(base: st.Base, cached: st.CachedFeatures, candidate: st.Candidate) -> dict[str, Tensor]:
    model = st.SideTuner(base)
    model.add_task("t", seed=candidate.seed, **candidate.task)
    loader = st.loader_over(cached, indices=candidate.indices, relabel=candidate.relabel, batch_size=32)
    with st.seeded(candidate.seed):
        if candidate.solve:
            st.solve(model, "t", loader, strength=candidate.strength, progress=False)
        if candidate.fit is not None:
            st.fit(model, "t", loader, seed=candidate.seed, progress=False, **candidate.fit)
    return model["t"].state_dict()


def test_each_ends_as_it_does_alone(data: Any) -> None:
    base, cached, held = data
    wanted, before = candidates(base.width), torch.get_rng_state()
    result = st.sweep(base, cached, wanted, validation=held, batch_size=32, progress=False)
    assert torch.equal(before, torch.get_rng_state())
    assert all(trial.error is None for trial in result.trials)
    for candidate in candidates(base.width):
        expected = alone(base, cached, candidate)
        found = result.model[candidate.name].state_dict()
        assert expected.keys() == found.keys()
        assert all(torch.equal(expected[key], found[key]) for key in expected), candidate.name
    losses = [trial.scores["loss"] for trial in result.trials]
    assert losses == sorted(losses) and result.best is result.trials[0]
    assert "customer" in str(result) and "accuracy" in str(result)


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Rows of each batch that was read from a cache."""
    found: list[int] = []
    read = st.CachedFeatures.__getitems__

    def counted(self: st.CachedFeatures, indices: Any) -> Any:
        found.append(len(indices))
        return read(self, indices)

    monkeypatch.setattr(st.CachedFeatures, "__getitems__", counted)
    return found


def test_what_is_drawn_alike_is_read_once(data: Any, reads: list[int]) -> None:
    base, cached, held = data
    many = [st.Candidate(f"c{i}", LINEAR, {"lr": 10.0**-i, "epochs": 2}) for i in range(5)]
    for wanted in (many[:1], many):
        reads.clear()
        st.sweep(base, cached, wanted, validation=held, batch_size=50, progress=False)
        # Two passes of four batches, and one over the validation data.
        assert reads == [50] * 10


def test_a_folder_resumes_where_the_budget_ended(data: Any, tmp_path: Path) -> None:
    base, cached, held = data
    wanted = [c for c in candidates(base.width) if c.name in ("slow", "fast", "other")]
    whole = st.sweep(base, cached, wanted, validation=held, batch_size=32, progress=False)
    given: dict[str, Any] = {"validation": held, "batch_size": 32, "out": tmp_path / "sweep", "progress": False}
    cut = st.sweep(base, cached, wanted, budget=0.0, **given)
    assert all(trial.error for trial in cut.trials) and not len(cut.model)
    with pytest.raises(st.TaskError, match="give more budget="):
        cut.best  # noqa: B018
    st.sweep(base, cached, wanted[:1], **given)
    again = st.sweep(base, cached, wanted, **given)
    assert [trial.scores for trial in again.trials] == [trial.scores for trial in whole.trials]
    for name in ("slow", "fast", "other"):
        expected, found = (result.model[name].state_dict() for result in (whole, again))
        assert all(torch.equal(expected[key], found[key]) for key in expected)
    # Nothing is learned again.
    assert [t.seconds for t in st.sweep(base, cached, wanted, **given).trials] == [t.seconds for t in again.trials]


def test_an_unfinished_candidate_is_not_gone_on_with_as_another(data: Any, tmp_path: Path) -> None:
    base, cached, held = data
    first, other = (st.Candidate("c", {**SIDE, "seed": seed}, {"lr": 0.1, "epochs": 40}) for seed in (5, 6))
    first = replace(first, fit={"lr": 0.1, "epochs": 100_000, "save_every": 0.0})
    given: dict[str, Any] = {"validation": held, "batch_size": 32, "progress": False}
    # A busy machine makes no step in a second.
    while not list((tmp_path / "sweep").rglob("resume-*")):
        assert not st.sweep(base, cached, [first], out=tmp_path / "sweep", budget=1.0, **given).trials[0].scores
    found = st.sweep(base, cached, [other], out=tmp_path / "sweep", **given)
    assert found.best.scores == st.sweep(base, cached, [other], **given).best.scores


def test_a_folder_is_not_believed_about_another_candidate(data: Any, tmp_path: Path) -> None:
    base, cached, held = data
    given: dict[str, Any] = {"validation": held, "out": tmp_path / "sweep", "progress": False}
    st.sweep(base, cached, [st.Candidate("c", LINEAR, {"lr": 0.1})], **given)
    others = [
        st.Candidate("c", LINEAR, {"lr": 0.2}),
        st.Candidate("c", LINEAR, {"lr": 0.1}, seed=1),
        st.Candidate("c", {**LINEAR, "prenorm": True}, {"lr": 0.1}),
        st.Candidate("c", LINEAR, {"lr": 0.1}, relabel=turned),
    ]
    for other in others:
        with pytest.raises(st.TaskError, match="holds another candidate called 'c'"):
            st.sweep(base, cached, [other], **given)
    own = [st.Candidate("own", {**SIDE, "side": Dropping(width)}, {"lr": 0.1}) for width in (16, 16)]
    st.sweep(base, cached, own[:1], **given)
    with pytest.raises(st.TaskError, match="holds another candidate called 'own'"):
        st.sweep(base, cached, own[1:], **given)
    with pytest.raises(st.TaskError, match="on other data"):
        st.sweep(base, held, [st.Candidate("c", LINEAR, {"lr": 0.1})], **given)


def test_a_candidate_that_fails_is_said_and_the_others_go_on(data: Any) -> None:
    base, cached, held = data
    wanted = [
        st.Candidate("wild", LINEAR, {"loss": lambda output, target: output.sum() * torch.nan}),
        st.Candidate("calm", LINEAR, {"lr": 1e-2}),
    ]
    result = st.sweep(base, cached, wanted, validation=held, progress=False)
    assert result.best.name == "calm" and result.model.tasks == ["calm"]
    assert "Lower the learning rate" in str(result.trials[1].error)


def test_mistakes(data: Any) -> None:
    base, cached, held = data
    one = st.Candidate("c", LINEAR, {"lr": 0.1})
    with pytest.raises(st.TaskError, match="two candidates are called 'c'"):
        st.sweep(base, cached, [one, one], validation=held)
    with pytest.raises(st.TaskError, match="there is no candidate"):
        st.sweep(base, cached, [], validation=held)
    with pytest.raises(st.TaskError, match="no score 'f1'; give best_by= one of accuracy, loss"):
        st.sweep(base, cached, [one], validation=held, best_by="f1", progress=False)
    with pytest.raises(st.UnknownNameError):
        st.sweep(base, cached, [st.Candidate("c", {**LINEAR, "merge": "alpa"}, solve=True)], validation=held)
    with pytest.raises(st.TaskError, match="neither fit= nor solve="):
        st.sweep(base, cached, [st.Candidate("c", LINEAR)], validation=held)


def test_solutions_of_many_strengths_read_the_data_once(data: Any, reads: list[int]) -> None:
    base, cached, held = data
    many = [st.Candidate(f"c{i}", LINEAR, solve=True, strength=10.0**-i) for i in range(6)]
    result = st.sweep(base, cached, many, validation=held, batch_size=50, progress=False)
    assert reads[:4] == [50] * 4 and len({trial.scores["loss"] for trial in result.trials}) == 6
    # The first candidate is a batch ahead of the others on the validation data.
    assert len(reads) <= 8
    kinds = [st.Candidate(f"k{i}", {**LINEAR, "prenorm": bool(i)}, solve=True) for i in range(2)]
    found = st.sweep(base, cached, kinds, validation=held, batch_size=50, progress=False)
    assert len({trial.scores["loss"] for trial in found.trials}) == 2


def test_cached_texts_are_swept_too(text_base: st.Base, tmp_path: Path) -> None:
    texts = [f"one {word} three" for word in ("two", "four") * 12]
    rows = Rows(texts, torch.arange(24) % 2, texts)
    cached = encode(text_base, rows, tmp_path, progress=False).cached
    wanted = [
        st.Candidate("solved", {"side": None, "merge": "base-only", "head": 2}, solve=True),
        st.Candidate("side", {"side": "transformer", "merge": "sum", "head": 2}, {"lr": 1e-3}),
    ]
    result = st.sweep(text_base, cached, wanted, validation=cached, batch_size=8, progress=False)
    assert all(trial.error is None for trial in result.trials) and result.best.scores["samples"] == 24


def test_customers_with_rows_of_their_own_are_solved_from_these(data: Any) -> None:
    base, cached, held = data
    wanted = [
        st.Candidate("first", LINEAR, solve=True, indices=range(100)),
        st.Candidate("second", LINEAR, solve=True, indices=range(100, 200)),
        st.Candidate("turned", LINEAR, solve=True, indices=range(100), relabel=partial(torch.sub, 2)),
        st.Candidate("listed", LINEAR, solve=True, indices=torch.arange(100, 200).numpy()),  # type: ignore[arg-type]
    ]
    result = st.sweep(base, cached, wanted, validation=held, batch_size=32, progress=False)
    for candidate in wanted:
        expected = alone(base, cached, candidate)
        found = result.model[candidate.name].state_dict()
        assert all(torch.equal(found[name], value) for name, value in expected.items()), candidate.name


def test_solutions_that_share_sums_know_the_size_of_their_images(tmp_path: Path) -> None:
    base = st.load_base("resnet44-cifar10")
    images = TensorDataset(torch.randint(0, 256, (20, 3, 40, 40), dtype=torch.uint8), torch.arange(20) % 3)
    cached = st.cache_features(base, images, tmp_path, progress=False)
    wanted = [st.Candidate(f"s{k}", LINEAR, solve=True, strength=10.0**k) for k in range(3)]
    model = st.sweep(base, cached, wanted, validation=cached, progress=False).model
    for task in model.tasks:
        transform: Any = model[task].transform
        assert transform.size == (40, 40)


class Drawn:
    """Its hash does not tell from which seed it draws."""

    def __init__(self, seed: int) -> None:
        self.generator = np.random.default_rng(seed)

    def __call__(self, y: Tensor) -> Tensor:
        return (y + torch.from_numpy(self.generator.permutation(3))[y]) % 3


def test_candidates_share_sums_where_their_objects_are_the_same() -> None:
    one, other = Drawn(0), Drawn(1)
    assert content_sha256(one) == content_sha256(other)
    first = st.Candidate("a", LINEAR, solve=True, relabel=one, indices=[1, 2])
    assert kin(first) == kin(replace(first, name="b", strength=1.0, task=dict(LINEAR), indices=[1, 2]))
    for change in ({"relabel": other}, {"indices": [1, 3]}, {"task": {**LINEAR, "head": 3.0}}, {"seed": True}):
        assert kin(first) != kin(replace(first, **change))


def test_texts_with_other_labels_are_other_candidates(text_base: st.Base, tmp_path: Path) -> None:
    texts = [f"one {word} three" for word in ("two", "four") * 4]
    wanted = [st.Candidate("a", {"side": None, "merge": "base-only", "head": 2}, solve=True)]
    for turn in (0, 1):
        rows = Rows(texts, (torch.arange(8) + turn) % 2, texts)
        cached = encode(text_base, rows, tmp_path, progress=False).cached
        sweep = partial(st.sweep, text_base, cached, wanted, validation=cached, out=tmp_path / "out", progress=False)
        if not turn:
            assert [sweep().trials[0].name for _ in range(2)] == ["a", "a"]
    with pytest.raises(st.TaskError, match="one on other data"):
        sweep()


def test_another_view_is_other_data(data: Any, tmp_path: Path) -> None:
    base, cached, held = data
    wanted = [st.Candidate("a", LINEAR, solve=True)]
    sweep = partial(st.sweep, base, cached, wanted, validation=held, out=tmp_path / "out", progress=False)
    sweep()
    cached.view = 1
    with pytest.raises(st.TaskError, match="one on other data"):
        sweep()


@pytest.mark.parametrize("indices", [[], [0, 200], torch.ones(200, dtype=torch.bool)])
def test_rows_that_are_none_fail_alone(data: Any, indices: Any) -> None:
    base, cached, held = data
    wanted = [st.Candidate("bad", LINEAR, solve=True, indices=indices), st.Candidate("good", LINEAR, solve=True)]
    good, bad = st.sweep(base, cached, wanted, validation=held, progress=False).trials
    assert good.scores and "indices= are numbers" in str(bad.error)
