"""Samples join and leave a task that was solved: it is then what solving anew gives."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import sidetuning as st
from conftest import conv_base, mlp_base
from sidetuning.changing import kept_sums

generator = torch.Generator().manual_seed(0)
X = torch.randn(300, 12, generator=generator)
SCORES = X @ torch.randn(12, 5, generator=generator) + torch.randn(300, 5, generator=generator)
CLASSES = SCORES[:, :3].argmax(1)
TARGETS: dict[str, Tensor] = {
    "classes": CLASSES,
    "labels": (SCORES[:, :3] > 1).float(),
    "numbers": SCORES[:, :3] * 50 + 7,
}


def model_with(problem: str = "classes", head: Any = 3, **parts: Any) -> st.SideTuner:
    model = st.SideTuner(mlp_base(("0", "1")))
    parts = {"side": None, "merge": "base-only", "head": head, "problem": problem, "seed": 0, **parts}
    model.add_task("t", **parts)
    return model


def batches(target: Tensor, start: int, stop: int, size: int = 50) -> list[Any]:
    return [(X[i : i + size], target[i : i + size]) for i in range(start, stop, size)]


def solve(model: st.SideTuner, loader: Any, **options: Any) -> Any:
    return st.solve(model, "t", loader, keep_statistics=True, progress=False, **options)


def weights(model: st.SideTuner) -> Tensor:
    return torch.cat([tensor.flatten() for tensor in model["t"].state_dict().values()])


def assert_same_sums(a: st.SideTuner, b: st.SideTuner) -> None:
    pairs = zip(*(kept_sums(model, "t", model["t"])[0].tensors() for model in (a, b)), strict=True)
    for one, other in pairs:
        assert float((one - other).norm()) <= 1e-10 * float(other.norm())


@pytest.mark.parametrize("exact", [1024, 4])
@pytest.mark.parametrize("problem", TARGETS)
def test_update_is_solving_anew_with_both_bit_for_bit(
    problem: str, exact: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sidetuning.closed_form.EXACT", exact)
    monkeypatch.setattr("sidetuning.sums.EXACT", exact)
    model, anew = model_with(problem), model_with(problem)
    target = TARGETS[problem]
    first = solve(model, batches(target, 0, 200))
    if problem == "numbers":
        # Units are measured once.
        solve(anew, batches(target, 0, 200))
    result = st.update(model, "t", batches(target, 200, 300), progress=False)
    expected = solve(anew, batches(target, 0, 300))
    assert (first.rows, result.rows, expected.rows) == (200, 300, 300)
    assert torch.equal(weights(model), weights(anew)) and result.strength == expected.strength


@pytest.mark.parametrize("problem", TARGETS)
def test_forget_is_solving_anew_without_them(problem: str) -> None:
    model, anew = model_with(problem), model_with(problem)
    target = TARGETS[problem]
    solve(model, batches(target, 0, 300))
    if problem == "numbers":
        solve(anew, batches(target, 0, 300))
    result = st.forget(model, "t", [(X[150:220], target[150:220])], progress=False)
    expected = solve(anew, batches(target, 0, 150) + batches(target, 220, 300, 40))
    assert result.rows == expected.rows == 230
    assert_same_sums(model, anew)
    torch.testing.assert_close(weights(model), weights(anew), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("head", [2, "random"])
def test_new_classes_join_without_the_old_data(head: Any, tmp_path: Path) -> None:
    def build(outputs: int, labels: list[str]) -> st.SideTuner:
        options = {} if head != "random" else {"head_options": {"outputs": outputs, "width": 30}}
        return model_with("classes", outputs if head != "random" else head, labels=labels, **options)

    model, anew = build(2, ["cat", "dog"]), build(3, ["cat", "dog", "fox"])
    old, new = CLASSES < 2, CLASSES == 2
    solve(model, [(X[old], CLASSES[old])])
    model.add_task("other", side=None, merge="base-only", head=2, seed=3)
    before = model(X, "other").detach()
    st.update(model, "t", [(X[new], CLASSES[new])], new_labels=["fox"], progress=False)
    solve(anew, [(X[old], CLASSES[old]), (X[new], CLASSES[new])])
    assert torch.equal(model(X, "t"), anew(X, "t")) and model["t"].labels == ["cat", "dog", "fox"]
    assert torch.equal(model(X, "other"), before)
    model.save(tmp_path)
    loaded = st.load(tmp_path, base=mlp_base(("0", "1")))
    assert torch.equal(loaded(X, "t"), model(X, "t"))
    st.forget(loaded, "t", [(X[new][:9], CLASSES[new][:9])], progress=False)
    assert loaded(X, "t").shape == (300, 3)


def test_statistics_are_saved_read_when_asked_for_and_removed(tmp_path: Path) -> None:
    model = model_with()
    solve(model, batches(CLASSES, 0, 200))
    model.save(tmp_path)
    file = tmp_path / "tasks" / "t" / "statistics.safetensors"
    stamp = file.stat().st_mtime_ns
    model.save(tmp_path)
    assert file.stat().st_mtime_ns == stamp
    loaded = st.load(tmp_path, base=mlp_base(("0", "1")))
    for other in (model, loaded):
        st.update(other, "t", batches(CLASSES, 200, 300), progress=False)
    assert torch.equal(weights(model), weights(loaded))
    loaded.save(tmp_path)
    again = st.load(tmp_path, base=mlp_base(("0", "1")))
    assert st.forget(again, "t", batches(CLASSES, 0, 50), progress=False).rows == 250
    st.solve(again, "t", batches(CLASSES, 0, 50), progress=False)
    again.save(tmp_path)
    assert not file.exists() and (file.parent / "side.json").exists()
    again.remove_task("t")
    again.save(tmp_path)
    assert not list(tmp_path.glob("**/*.*"))


def test_damaged_statistics_are_refused(tmp_path: Path) -> None:
    model = model_with()
    solve(model, batches(CLASSES, 0, 200))
    model.save(tmp_path)
    file = tmp_path / "tasks" / "t" / "statistics.safetensors"
    whole = file.read_bytes()
    for damaged in (whole[:-9], whole[:-1] + bytes([whole[-1] ^ 1])):
        file.write_bytes(damaged)
        loaded = st.load(tmp_path, base=mlp_base(("0", "1")))
        before = weights(loaded)
        with pytest.raises(st.ArtifactError, match=r"statistics\.safetensors"):
            st.update(loaded, "t", batches(CLASSES, 200, 300), progress=False)
        assert torch.equal(weights(loaded), before)


def test_mistakes_are_sentences_and_change_nothing() -> None:
    model = model_with()
    with pytest.raises(st.TaskError, match="no statistics of task 't' were kept"):
        st.update(model, "t", batches(CLASSES, 0, 50), progress=False)
    solve(model, batches(CLASSES, 0, 200))
    before = weights(model)
    zeros = torch.zeros(200, dtype=torch.long)
    mistakes: list[tuple[Any, type[Exception], str]] = [
        (batches(CLASSES, 0, 200), st.DataError, "all are to be forgotten"),
        ([(X[:150], zeros[:150])], st.DataError, "were not learned by task 't'"),
        ([], st.DataError, "gave no rows"),
        ([(X[:5], CLASSES[:5] + 2)], st.DataError, "out of range"),
    ]
    for samples, error, sentence in mistakes:
        with pytest.raises(error, match=sentence):
            st.forget(model, "t", samples, progress=False)
    named: list[tuple[Any, str]] = [(["fox"], "has no names"), (-1, "join")]
    for new, sentence in named:
        with pytest.raises(st.TaskError, match=sentence):
            st.update(model, "t", batches(CLASSES, 0, 50), new_labels=new, progress=False)
    assert torch.equal(weights(model), before)
    st.fit(model, "t", batches(CLASSES, 0, 50), steps=1, progress=False)
    with pytest.raises(st.TaskError, match="changed since it was solved"):
        st.update(model, "t", batches(CLASSES, 0, 50), progress=False)


def test_views_are_averaged() -> None:
    model, plain = model_with(), model_with()
    pairs = [(torch.cat([X[:100], -X[:100]]), CLASSES[:100].repeat(2))]
    assert solve(model, pairs, views=2).rows == 100
    layer: Any = plain["t"].head
    code = (plain.base(X[:100]).out + plain.base(-X[:100]).out) / 2
    solve(plain, [(X[:100], st.Features(code, plain.base(X[:100]).taps), CLASSES[:100])])
    found: Any = model["t"].head
    torch.testing.assert_close(found.linear.weight, layer.linear.weight)
    with pytest.raises(st.DataError, match="different targets"):
        solve(model, [(X[:100], CLASSES[:100])], views=2)
    with pytest.raises(st.DataError, match="not 3 views"):
        solve(model, [(X[:100], CLASSES[:100])], views=3)


@pytest.mark.parametrize("change", [st.update, st.forget])
@pytest.mark.parametrize("size", [32, 48])
def test_images_of_another_size_than_the_task_was_solved_on_are_refused(size: int, change: Any) -> None:
    model = st.SideTuner(conv_base())
    model.add_task("t", side=None, merge="base-only", head=2)
    y = torch.arange(8) % 2

    def images(edge: int) -> Tensor:
        return torch.randint(0, 256, (8, 3, edge, edge), dtype=torch.uint8, generator=generator)

    learned = images(size), y
    solve(model, [learned, (images(size), y)])
    before = weights(model)
    for others in ([(images(40), y)], [(images(40), y), learned]):
        with pytest.raises(st.DataError, match="solved on images of another size; resize these"):
            change(model, "t", others, progress=False)
    assert torch.equal(weights(model), before)
    assert change(model, "t", [learned], progress=False).rows == (24 if change is st.update else 8)


def test_samples_with_other_numbers_than_were_learned_are_not_forgotten() -> None:
    model = model_with("numbers")
    solve(model, batches(TARGETS["numbers"], 0, 300))
    before = weights(model)
    with pytest.raises(st.DataError, match="were not learned by task 't' with these targets"):
        st.forget(model, "t", [(X[:50], 100 * TARGETS["numbers"][:50])], progress=False)
    assert torch.equal(weights(model), before)


def test_one_name_of_a_class_is_no_list_of_letters() -> None:
    model = model_with(labels=["a", "b", "c"])
    solve(model, batches(CLASSES, 0, 300))
    with pytest.raises(st.TaskError, match=r"a list of names, such as \['cat'\]"):
        st.update(model, "t", batches(CLASSES, 0, 50), new_labels="cat", progress=False)


class Meanwhile:
    """A loader that does something between its batch and its end, as another thread may."""

    def __init__(self, do: Any) -> None:
        self.do = do

    def __iter__(self) -> Any:
        yield from batches(CLASSES, 100, 150)
        self.do()


def renewed(model: st.SideTuner) -> None:
    model.remove_task("t")
    model.add_task("t", side=None, merge="base-only", head=4)


@pytest.mark.parametrize(
    "do",
    [
        lambda model: st.update(model, "t", batches(CLASSES, 150, 200), progress=False),
        lambda model: solve(model, batches(CLASSES, 0, 50)),
        lambda model: model.remove_task("t"),
        renewed,
    ],
)
def test_a_task_that_is_changed_or_removed_meanwhile_is_left(do: Any) -> None:
    model = model_with()
    solve(model, batches(CLASSES, 0, 100))
    with pytest.raises(st.TaskError, match="changed or removed meanwhile"):
        st.update(model, "t", Meanwhile(lambda: do(model)), progress=False)
    expected = model_with()
    solve(expected, batches(CLASSES, 0, 100))
    do(expected)
    assert model.tasks == expected.tasks
    if do is not renewed and model.tasks:
        assert_same_sums(model, expected)


def test_a_task_that_left_memory_meanwhile_is_updated(tmp_path: Path) -> None:
    model = model_with()
    solve(model, batches(CLASSES, 0, 100))
    model.add_task("other", side=None, merge="base-only", head=2)
    model.save(tmp_path)
    model = st.load(tmp_path, base=mlp_base(("0", "1")), max_tasks_in_memory=1)
    st.update(model, "t", Meanwhile(lambda: model(X[:2], "other")), progress=False)
    assert float(kept_sums(model, "t", model["t"])[0].count) == 150
