"""Tasks, caches and resume files of version 0.1.0 are read, and give what that version made of them."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import sidetuning as st
from legacy_cases import ROOT, About, base_of, copied, differing, equal, hashes, input_of, names, read

# Their parts or bases are those of the bench.
BENCH = ("doom-distilled", "policy")


pytestmark = pytest.mark.usefixtures("one_thread")


def own_parts(entry: About) -> dict[str, Any]:
    """The user's own modules, which are given again."""
    return {kind: eval(text, dict(vars(nn))) for kind, text in entry.get("own", {}).items()}


@pytest.mark.parametrize("name", names("tasks"))
def test_tasks(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if name in BENCH:
        pytest.importorskip("sidetuning_bench")
    if name == "copy-slim":
        pytest.importorskip("torch_pruning")
    monkeypatch.chdir(ROOT)
    about, expected = read(ROOT / "tasks" / name)
    model = st.SideTuner(base_of(about["base"]))
    for entry in about["tasks"]:
        model.load_task(ROOT / "tasks" / name / entry["folder"], **own_parts(entry))
    with torch.no_grad():
        outputs = model.forward_all(input_of(expected))
    assert list(outputs) == [entry["task"] for entry in about["tasks"]]
    assert not differing(outputs, expected, "output/")


@pytest.mark.parametrize("name", ["cifar-mlp2", "cifar-distilled"])
def test_a_task_alone_builds_its_base(name: str) -> None:
    about, expected = read(ROOT / "tasks" / name)
    (entry,) = about["tasks"]
    model = st.load(ROOT / "tasks" / name / entry["folder"])
    assert not differing(model.forward_all(input_of(expected)), expected, "output/")


def test_a_task_keeps_labels_and_metrics() -> None:
    model = st.load(ROOT / "tasks/cifar-mlp2")
    assert model["animals"].labels == ["cat", "dog", "Käfer", "fish, flat", "猫"]


# Caches


def noise(x: Tensor, generator: torch.Generator) -> Tensor:
    return x + torch.rand(x.shape, generator=generator)


def mirror(x: Tensor, generator: torch.Generator) -> Tensor:
    return x.flip(-1)


def augmentation(about: About | None) -> Callable[..., Tensor] | None:
    """The function that made the views, under the name that it had: a part of a cache's key."""
    if about is None:
        return None
    function = {"noise": noise, "mirror": mirror}[about["name"]]
    found = functools.wraps(function)(lambda *given: function(*given))
    found.__module__, found.__qualname__ = about["module"], about["name"]
    return found


@pytest.mark.parametrize("name", [name for name in names("caches") if not name.startswith("tokens")])
def test_caches_of_features(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = copied(tmp_path, f"caches/{name}") / "caches" / name
    about, expected = read(folder)
    if "CHUNK" in about:
        monkeypatch.setattr("sidetuning.cache.features.CHUNK", about["CHUNK"])
    before = hashes(folder / about["key"])
    data = TensorDataset(expected["data.x"], expected["data.y"])
    augment = augmentation(about["augment"])
    base = base_of(about["base"])
    cached = st.cache_features(base, data, folder, augment=augment, progress=False, **about["arguments"])
    assert cached.folder == folder / about["key"]
    if "CHUNK" not in about:
        # Found, and not written again.
        assert hashes(folder / about["key"]) == before
    for view in range(cached.views):
        cached.view = view
        x, features, y = cached.__getitems__(about["rows"])
        taps = {f"tap.{tap}": tensor for tap, tensor in features.taps.items()}
        assert not differing({"x": x, "out": features.out, "y": y, **taps}, expected, f"view{view}/")


# Resume files


def batches(expected: dict[str, Tensor]) -> DataLoader[Any]:
    return DataLoader(TensorDataset(expected["x"], expected["y"]), batch_size=5, shuffle=True)


def begun(about: About) -> st.SideTuner:
    """The model as it was before its training began."""
    model = st.SideTuner(base_of(about["base"]))
    with st.seeded(0):
        model.add_task("pets", **about["add_task"])
    return model


def test_fit_resumes(tmp_path: Path) -> None:
    folder = copied(tmp_path, "resume/fit") / "resume/fit"
    about, expected = read(folder)
    model = begun(about)
    held_out = TensorDataset(expected["x"][:6] + 1, expected["y"][:6])
    schedule = functools.partial(torch.optim.lr_scheduler.StepLR, step_size=3, gamma=0.7)
    validate = DataLoader(held_out, batch_size=6)
    options = {**about["arguments"], "scheduler": schedule, "validate": validate, "progress": False}
    result = st.fit(model, "pets", batches(expected), resume=folder / "resume.pt", **options)
    assert not differing(model["pets"].state_dict(), expected, "final/")
    assert equal(torch.tensor(result.losses), torch.tensor(about["losses"]))
    assert [row["step"] for row in result.validation] == [4, 8, 9]
    assert result.validation[-1]["loss"] == pytest.approx(about["validation"][-1]["loss"], abs=1e-4)


def test_distill_resumes(tmp_path: Path) -> None:
    folder = copied(tmp_path, "resume/distill") / "resume/distill"
    about, expected = read(folder)
    model = begun(about)
    options = {**about["arguments"], "progress": False}
    result = st.distill(model, "pets", batches(expected), resume=folder / "resume.pt", **options)
    side = model["pets"].side
    assert side is not None and not differing(side.state_dict(), expected, "final/")
    assert equal(torch.tensor(result.losses), torch.tensor(about["losses"]))
