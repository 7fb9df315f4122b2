"""Which task is this, or none: from what each task kept of its own data, in any order, and beside all answers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import sidetuning as st
from conftest import conv_base, inputs, mlp_base, sequence_base
from sidetuning.beside import Beside

CENTRES = 1.5 * torch.randn(3, 12, generator=torch.Generator().manual_seed(1))
NAMES = ("a", "b", "c")


def data(task: int, n: int = 200, seed: int = 0, spread: float = 1.0) -> tuple[Tensor, Tensor]:
    """Inputs of a task around its centre, of two classes."""
    generator = torch.Generator().manual_seed(100 * seed + task)
    labels = torch.arange(n) % 2
    x = CENTRES[task] + spread * torch.randn(n, 12, generator=generator)
    x[:, 0] += 3.0 * labels
    return x, labels


def model_with(names: Any = NAMES, **options: Any) -> st.SideTuner:
    model = st.SideTuner(mlp_base(("0", "1")))
    for name in names:
        model.add_task(name, side=None, merge="base-only", head=2, seed=0, problem="classes")
        learn(model, name, **options)
    return model


def learn(model: st.SideTuner, name: str, **options: Any) -> int:
    x, y = data(NAMES.index(name))
    batches = [(x[i : i + 50], y[i : i + 50]) for i in range(0, len(x), 50)]
    return st.learn_routes(model, name, batches, progress=False, **{"width": 60, **options})


def test_tasks_are_told_apart_and_probabilities_sum_to_one() -> None:
    model = model_with()
    right = 0
    for i, name in enumerate(NAMES):
        routes = model.route(data(i, seed=1)[0])
        torch.testing.assert_close(routes.probabilities.sum(1) + routes.none, torch.ones(200))
        right += sum(best == name for best in routes.best())
    assert routes.tasks == list(NAMES) and right / 600 > 0.9


def test_probabilities_are_about_what_they_say() -> None:
    model = model_with()
    sure, hits = [], []
    for i in range(3):
        routes = model.route(data(i, n=600, seed=2, spread=1.0)[0])
        sure.append(routes.probabilities.max(1).values)
        hits.append((routes.probabilities.argmax(1) == i).float())
    assert abs(float(torch.cat(sure).mean() - torch.cat(hits).mean())) < 0.06


def test_what_is_far_from_all_tasks_is_of_none() -> None:
    model = model_with()
    known = torch.cat([model.route(data(i, seed=1)[0]).none for i in range(3)])
    far = model.route(-4.0 * CENTRES.mean(0) + 3.0 * torch.randn(200, 12, generator=torch.Generator().manual_seed(5)))
    assert float(known.mean()) < 0.1
    assert float((far.none.unsqueeze(1) > known).float().mean()) > 0.95
    assert far.best().count(None) > 100


def test_the_order_of_learning_does_not_matter_bit_for_bit(tmp_path: Path) -> None:
    x = data(1, seed=3)[0]
    expected = model_with().route(x)
    other = model_with(("c", "a", "b"))
    found = other.route(x)
    assert torch.equal(found.probabilities, expected.probabilities) and torch.equal(found.none, expected.none)
    other.save(tmp_path)
    loaded = st.load(tmp_path, base=mlp_base())
    assert torch.equal(loaded.route(x).probabilities, expected.probabilities)
    few = st.load(tmp_path, base=mlp_base(), max_tasks_in_memory=1)
    assert torch.equal(few.route(x).probabilities, expected.probabilities)


def test_a_task_that_is_removed_leaves_nothing(tmp_path: Path) -> None:
    x = data(1, seed=3)[0]
    model, never = model_with(), model_with(("a", "b"))
    model.save(tmp_path)
    model.remove_task("c")
    assert torch.equal(model.route(x).probabilities, never.route(x).probabilities)
    model.save(tmp_path)
    assert sorted(folder.name for folder in (tmp_path / "tasks").iterdir()) == ["a", "b"]


def test_no_output_moves_and_no_task_is_run() -> None:
    model = model_with(("a", "b"))
    x = data(2, seed=3)[0]
    before = model.forward_all(x)
    model.add_task("c", side="mlp", head=2, seed=1)
    before["c"] = model(x, "c")
    learn(model, "c")
    model.route(x)
    after = model.forward_all(x)
    assert all(torch.equal(after[name], before[name]) for name in NAMES)


def test_a_task_that_is_learned_again_replaces_what_was_known() -> None:
    model = model_with()
    x = data(1, seed=3)[0]
    before = model.route(x)
    assert learn(model, "b") == 200
    assert torch.equal(model.route(x).probabilities, before.probabilities)
    wrong = data(0)
    st.learn_routes(model, "b", [wrong], width=60, progress=False)
    assert not torch.equal(model.route(x).probabilities, before.probabilities)


def test_forgotten_samples_are_in_no_route() -> None:
    model = st.SideTuner(mlp_base(("0", "1")))
    model.add_task("a", side=None, merge="base-only", head=2, seed=0, problem="classes")
    x, y = data(0)
    st.solve(model, "a", [(x, y)], keep_statistics=True, progress=False)
    learn(model, "a")
    st.forget(model, "a", [(x[:5], y[:5])], progress=False)
    assert "route" not in model["a"].beside


def test_one_task_and_tasks_of_other_problems_are_routed() -> None:
    model = model_with(("a",))
    routes = model.route(data(0, seed=1)[0])
    torch.testing.assert_close(routes.probabilities[:, 0] + routes.none, torch.ones(200))
    model.add_task("b", side=None, merge="base-only", head=1, problem="numbers", seed=0)
    x = data(1)[0]
    st.learn_routes(model, "b", [(x, x[:, 0])], width=60, progress=False)
    assert model.route(data(1, seed=1)[0]).best().count("b") > 150


def test_maps_and_texts_are_routed() -> None:
    for base, kind in ((conv_base(("2", "4")), "conv"), (sequence_base(("layer",)), "sequence")):
        model = st.SideTuner(base)
        x: Any = inputs(kind, 40)
        model.add_task("t", side=None, merge="base-only", head=2, problem="classes", seed=0)
        batch = (x, torch.arange(40) % 2) if isinstance(x, Tensor) else {**x, "labels": torch.arange(40) % 2}
        st.learn_routes(model, "t", [batch], width=20, progress=False)
        assert bool(model.route(x).probabilities.isfinite().all())


def test_later_taps_do_not_matter_and_missing_ones_are_refused() -> None:
    model = st.SideTuner(mlp_base(("1",)))
    for name in ("a", "b"):
        parts: dict[str, Any] = {"side": None, "merge": "base-only"}
        if name == "b":
            parts = {"side": "ladder", "taps": ("0", "1")}
        model.add_task(name, **parts, head=2, seed=0, problem="classes")
        learn(model, name)
    x = data(1, seed=1)[0]
    whole = model.route(x).probabilities
    assert torch.equal(model.route(x, features=model.base(x)).probabilities, whole)
    with pytest.raises(st.ShapeError, match="routes read the tap '1'"):
        model.route(x, features=model.base(x).out)


def test_mistakes_are_sentences(tmp_path: Path) -> None:
    model = model_with(())
    x, y = data(0)
    with pytest.raises(st.TaskError, match="no task has a route"):
        model.route(x)
    for name in ("a", "b"):
        model.add_task(name, side=None, merge="base-only", head=2, seed=0)
    with pytest.raises(st.DataError, match="20 rows or more"):
        st.learn_routes(model, "a", [(x[:9], y[:9])], width=60, progress=False)
    with pytest.raises(st.TrainingError, match="not finite"):
        st.learn_routes(model, "a", [(x * float("inf"), y)], width=60, progress=False)
    learn(model, "a")
    with pytest.raises(st.TaskError, match="the route of task 'a' is in the features"):
        learn(model, "b", width=50)
    model.save(tmp_path)
    file = tmp_path / "tasks" / "a" / "route.safetensors"
    file.write_bytes(file.read_bytes()[:-3])
    with pytest.raises(st.ArtifactError, match=r"route\.safetensors"):
        st.load(tmp_path, base=mlp_base()).route(x)


def test_views_are_averaged() -> None:
    model = model_with()
    x = data(1, seed=3)[0]
    twice = model.route(torch.cat([x, x]), views=2)
    torch.testing.assert_close(twice.probabilities, model.route(x).probabilities)
    with pytest.raises(st.ShapeError, match="is not 3 views"):
        model.route(x, views=3)


def test_a_route_is_not_learned_from_features_that_are_no_numbers() -> None:
    model, (x, y) = model_with(), data(0)
    for row in (3, 9):
        bad = x.clone()
        bad[row] = float("nan")
        with pytest.raises(st.TrainingError, match="are not finite"):
            st.learn_routes(model, "a", [(bad, y)], width=60, progress=False)
    assert model.route(x).tasks == list(NAMES)


def test_targets_and_views_are_those_that_solve_takes() -> None:
    model = model_with(())
    model.add_task("a", side=None, merge="base-only", head=2, seed=0, problem="classes")
    x, y = data(0)
    expected = st.learn_routes(model, "a", [(x, y)], width=60, progress=False), model.route(x).probabilities
    found = st.learn_routes(model, "a", [(x, y.unsqueeze(1))], width=60, progress=False), model.route(x).probabilities
    assert expected[0] == found[0] and torch.equal(expected[1], found[1])
    kept = model["a"].beside["route"]
    assert isinstance(kept, Beside) and len(kept.tensors["means"]) == 2
    twice = torch.cat([x, x.flip(0)]), torch.cat([y, 1 - y])
    for batch, views, told in (
        (twice, 2, "different targets"),
        ((x, y + 9), 1, "out of range"),
        ((x, y), 3, "3 views"),
    ):
        with pytest.raises(st.DataError, match=told):
            st.learn_routes(model, "a", [batch], width=60, views=views, progress=False)
    with pytest.raises(st.TaskError, match="views must be"):
        st.learn_routes(model, "a", [(x, y)], views=0, progress=False)


def test_a_route_that_another_process_learned_anew_is_read_again(tmp_path: Path) -> None:
    model_with().save(tmp_path)
    model, x = st.load(tmp_path, base=mlp_base()), data(1, seed=3)[0]
    before = model.route(x).probabilities
    other = st.load(tmp_path, base=mlp_base())
    labels = torch.arange(200) % 2
    st.learn_routes(other, "b", [(CENTRES[0] + torch.randn(200, 12), labels)], width=60, progress=False)
    other.save(tmp_path)
    assert not torch.equal(model.route(x).probabilities, before)
    assert torch.equal(model.route(x).probabilities, other.route(x).probabilities)


def test_what_was_kept_on_a_base_that_prepares_otherwise_is_refused(tmp_path: Path) -> None:
    base, other = (
        st.Base(conv_base().net, example=torch.zeros(1, 3, 32, 32), mean=[m] * 3, std=[0.2] * 3) for m in (0.5, 0.4)
    )
    model, x = st.SideTuner(base), torch.rand(40, 3, 32, 32)
    model.add_task("t", side=None, merge="base-only", head=2, problem="classes")
    batches = [(x, torch.arange(40) % 2)]
    st.solve(model, "t", batches, keep_statistics=True, progress=False)
    st.learn_routes(model, "t", batches, width=60, progress=False)
    model.save_task("t", tmp_path)
    moved = st.SideTuner(other)
    moved.load_task(tmp_path, any_base=True)
    with pytest.raises(st.TaskError, match="statistics are of other features"):
        st.update(moved, "t", batches, progress=False)
    with pytest.raises(st.TaskError, match="another base"):
        moved.route(x)
