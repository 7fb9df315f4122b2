"""`sidetuning predict` shows each task's answer as its problem has it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from PIL import Image

import sidetuning as st
from sidetuning.commands.predict import Settings, answered


def test_labels_have_a_probability_each_numbers_their_value_and_classes_the_first(tmp_path: Path) -> None:
    x = torch.randint(0, 256, (12, 3, 32, 32), dtype=torch.uint8)
    Image.fromarray(x[0].permute(1, 2, 0).numpy()).save(tmp_path / "1.png")
    model = st.SideTuner(st.load_base("resnet44-cifar10"))
    model.add_task("tags", side="fcn4", head=3, labels=["cat", "indoor", "night"], problem="labels", seed=0)
    model.add_task("age", side="fcn4", head=1, labels=["years"], problem="numbers", seed=0)
    model.add_task("kind", side="fcn4", head=2, labels=["cat", "dog"], seed=0)
    st.fit(model, "tags", [(x, torch.ones(12, 3))], steps=30, lr=1e-2, progress=False)
    for task in model.tasks:
        model.save_task(task, tmp_path / "model" / task)
    (found,) = answered(Settings(str(tmp_path / "model"), (str(tmp_path / "1.png"),)))
    answers = {task: {a.label: a.value for a in found if a.task == task} for task in model.tasks}
    expected = model.forward_all(x[:1].float() / 255)
    assert answers["tags"] == pytest.approx(
        dict(zip(["cat", "indoor", "night"], expected["tags"][0].sigmoid().tolist())), abs=1e-4
    )
    assert min(value or 0.0 for value in answers["tags"].values()) > 0.8
    assert answers["age"] == pytest.approx({"years": float(expected["age"].detach())}, abs=1e-4)
    best = int(expected["kind"].argmax())
    assert answers["kind"] == pytest.approx(
        {["cat", "dog"][best]: float(expected["kind"].softmax(1).max().detach())}, abs=1e-4
    )
