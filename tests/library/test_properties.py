"""What holds for every base, side, merge, head, problem, type and batch: hypothesis draws them."""

from __future__ import annotations

import copy
import json
import os
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as draw
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

import sidetuning as st
from conftest import BASES, TAPS
from sidetuning.merges import lateral_merges

ROWS = 7
SIDES = ("mlp", "transformer", "ladder", "copy")
# head, its options, problem
VECTORS: list[tuple[int | str, dict[str, Any], str]] = [(3, {}, "classes"), (3, {}, "labels"), (3, {}, "numbers")]
HEADS: dict[str, list[tuple[int | str, dict[str, Any], str]]] = {
    "mlp": [*VECTORS, ("identity", {}, "numbers")],
    "conv": VECTORS,
    "map": [*VECTORS, ("pixels", {"channels": 2, "hidden": 4}, "pixels"), ("identity", {}, "classes")],
    "sequence": [*VECTORS, ("span", {}, "span"), ("identity", {}, "tokens")],
}
DTYPES = ("float32", "float64", "bfloat16")
BATCHES = ("one", "ragged", "ignored")


@dataclass(frozen=True)
class Case:
    """One task, the data that it learns, and how."""

    kind: str
    side: str
    merge: str
    head: int | str
    options: dict[str, Any]
    problem: str
    dtype: str
    batch: str
    prenorm: bool
    seed: int


@draw.composite
def cases(pick: Any) -> Case:
    kind = pick(draw.sampled_from(sorted(BASES)))
    sides = [*SIDES, *(("fcn4", "fusion") if kind in ("conv", "map") else ())]
    head, options, problem = pick(draw.sampled_from(HEADS[kind]))
    return Case(
        kind=kind,
        side=pick(draw.sampled_from(sides)),
        merge=pick(draw.sampled_from(st.MERGES.names())),
        head=head,
        options=options,
        problem=problem,
        dtype=pick(draw.sampled_from(DTYPES)),
        batch=pick(draw.sampled_from(BATCHES)),
        prenorm=pick(draw.booleans()),
        seed=pick(draw.integers(0, 3)),
    )


def drawn(examples: int) -> Any:
    """Examples that are the same in every run; a slow machine is no failure."""
    checks = [HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.filter_too_much]
    return settings(max_examples=examples, derandomize=True, deadline=None, suppress_health_check=checks, database=None)


class Samples(Dataset[Any]):
    """Seven samples with targets of a problem; texts come with their padding."""

    def __init__(self, case: Case, output: Tensor) -> None:
        generator = torch.Generator().manual_seed(case.seed)
        self.x = inputs(case, ROWS)
        shape = (ROWS, *output.shape[1:])
        if case.problem in ("numbers", "pixels"):
            self.y = torch.randn(shape, generator=generator)
        elif case.problem == "labels":
            self.y = torch.rand(shape, generator=generator).round()
        elif case.problem == "span":
            self.y = torch.randint(0, shape[1], (ROWS, 2), generator=generator)
        else:
            classes = shape[2] if case.problem == "tokens" else shape[1]
            places = (ROWS, shape[1]) if case.problem == "tokens" else (ROWS, *shape[2:])
            self.y = torch.randint(0, classes, places, generator=generator)
        if case.batch == "ignored":
            # All of some batches, and a part of others.
            nothing = float("nan") if self.y.is_floating_point() else -100
            self.y[:3] = nothing
            self.y[4].fill_(nothing) if self.y.ndim == 1 else self.y[4][:1].fill_(nothing)

    def __len__(self) -> int:
        return ROWS

    def __getitem__(self, index: int) -> Any:
        if isinstance(self.x, Tensor):
            return self.x[index], self.y[index]
        return {**{name: value[index] for name, value in self.x.items()}, "labels": self.y[index]}


def inputs(case: Case, rows: int) -> Any:
    generator = torch.Generator().manual_seed(10 + case.seed)
    if case.kind == "sequence":
        mask = torch.ones(rows, 6, dtype=torch.long)
        mask[::2, 4:] = 0
        return {"input_ids": torch.randint(0, 50, (rows, 6), generator=generator), "attention_mask": mask}
    return torch.rand((rows, 12) if case.kind == "mlp" else (rows, 3, 32, 32), generator=generator)


def taken(x: Any, rows: Any) -> Any:
    return x[rows] if isinstance(x, Tensor) else {name: value[rows] for name, value in x.items()}


def added(case: Case, name: str = "old", model: st.SideTuner | None = None) -> st.SideTuner:
    """A model with the case's task."""
    if model is None:
        model = st.SideTuner(BASES[case.kind](TAPS[case.kind]))
    parts: dict[str, Any] = {"side": case.side, "merge": case.merge, "head": case.head, "prenorm": case.prenorm}
    model.add_task(name, **parts, head_options=case.options, problem=case.problem, seed=case.seed)
    return model.to(getattr(torch, case.dtype))


def loader(case: Case, model: st.SideTuner, shuffle: bool = True) -> DataLoader[Any]:
    with torch.no_grad():
        output = model(inputs(case, 1), model.tasks[0])
    size = 1 if case.batch == "one" else 3
    return DataLoader(Samples(case, output), batch_size=size, shuffle=shuffle)


def learn(case: Case, model: st.SideTuner, task: str = "old") -> None:
    st.fit(model, task, loader(case, model), steps=2, lr=0.01, seed=case.seed, progress=False)


def same(a: Tensor, b: Tensor) -> bool:
    """Bitwise, NaN included."""
    return (
        a.dtype == b.dtype
        and a.shape == b.shape
        and torch.equal(a.contiguous().view(torch.uint8), b.contiguous().view(torch.uint8))
    )


@torch.no_grad()
def answer(case: Case, model: st.SideTuner, task: str = "old") -> Tensor:
    return model(inputs(case, ROWS), task)


@torch.no_grad()
def check_isolation(case: Case) -> None:
    """An old task's output does not move by a bit whatever is added, trained, frozen, removed or served beside it."""
    model = added(case)
    with torch.enable_grad():
        learn(case, model)
    before, one = answer(case, model), model(taken(inputs(case, ROWS), slice(0, 1)), "old")
    added(case, "new", model)
    assert same(answer(case, model), before)
    with torch.enable_grad():
        learn(case, model, "new")
    assert same(answer(case, model), before)
    if case.merge in lateral_merges():
        model.add_task("reads", side=case.side, merge=case.merge, head=2, laterals=["old", "new"], seed=5)
        model.to(getattr(torch, case.dtype))
        assert same(answer(case, model), before)
    outputs = model.forward_all(inputs(case, ROWS))
    assert same(outputs["old"], before)
    # As in a loop of somebody's own, where what is frozen stays.
    model.freeze_task("old")
    model.train()
    model.forward_all(inputs(case, ROWS))
    model.eval()
    assert same(answer(case, copy.deepcopy(model)), before)
    if "reads" in model:
        model.remove_task("reads")
    model.remove_task("new")
    assert same(answer(case, model), before)
    assert same(model(taken(inputs(case, ROWS), slice(0, 1)), "old"), one)


def check_saved(case: Case) -> None:
    """What is saved and loaded says what it said, and saves as the same bytes."""
    model = added(case)
    learn(case, model)
    with tempfile.TemporaryDirectory() as folder:
        model.save_task("old", Path(folder) / "a")
        fresh = st.SideTuner(BASES[case.kind](TAPS[case.kind])).to(getattr(torch, case.dtype))
        fresh.load_task(Path(folder) / "a")
        fresh.to(getattr(torch, case.dtype))
        assert same(answer(case, fresh), answer(case, model))
        fresh.save_task("old", Path(folder) / "b")
        first, second = ((Path(folder) / name / "side.safetensors").read_bytes() for name in "ab")
        assert first == second


def check_cached(case: Case) -> None:
    """Training and answering from a cache is training and answering with the base."""
    assume(case.kind != "sequence" and case.dtype == "float32")
    live, cached = added(case), added(case)
    samples = loader(case, live).dataset
    with tempfile.TemporaryDirectory() as folder:
        data = st.cache_features(live.base, samples, folder, identity=repr(case), batch_size=3, progress=False)
        x, features, _ = data.__getitems__(range(ROWS))
        with torch.no_grad():
            assert torch.allclose(live(x, "old", features=features), live(x, "old"), atol=1e-5, rtol=1e-4)
        size = 1 if case.batch == "one" else 3
        batches = st.loader_over(data, batch_size=size, shuffle=False)
        how: dict[str, Any] = {"steps": 3, "lr": 1e-3, "optimizer": torch.optim.SGD, "progress": False}
        from_cache = st.fit(cached, "old", batches, **how)
        from_base = st.fit(live, "old", loader(case, live, shuffle=False), **how)
    assert from_cache.losses == pytest.approx(from_base.losses, rel=1e-3, abs=1e-4)
    assert torch.allclose(answer(case, cached), answer(case, live), rtol=1e-2, atol=1e-3)


def check_threads(case: Case) -> None:
    """Each thread gets its own answers, while another one adds and removes a task."""
    model = added(case)
    x = inputs(case, ROWS)
    with torch.no_grad():
        right = [model(taken(x, slice(i, i + 1)), "old") for i in range(ROWS)]

    def ask(i: int) -> bool:
        if i == 4:
            added(case, "other", model).remove_task("other")
        # Gradients are switched off by thread.
        with torch.no_grad():
            return same(model(taken(x, slice(i % ROWS, i % ROWS + 1)), "old"), right[i % ROWS])

    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(ask, range(2 * ROWS)))


CHECKS = [check_isolation, check_saved, check_cached, check_threads]


@pytest.mark.slow
@pytest.mark.parametrize("check", CHECKS)
def test_it_holds(check: Any) -> None:
    drawn(15)(given(cases())(check))()


@pytest.mark.slow
@pytest.mark.parametrize("check", CHECKS)
def test_it_holds_for_many(check: Any) -> None:
    drawn(60)(given(cases())(check))()


# Loads tasks that were saved, or trains in one process or in two together, and prints what came out.
SCRIPT = """
import json, sys
sys.path[:0] = sys.argv[2:4]
import torch
from accelerate import PartialState
from hypothesis import given
from hypothesis import strategies as draw
import sidetuning as st
from test_properties import Case, added, answer, cases, drawn, loader

found = []

def check(case):
    model = added(case)
    how = {"steps": 3, "lr": 1e-2, "optimizer": torch.optim.SGD, "progress": False}
    result = st.fit(model, "old", loader(case, model), seed=case.seed, **how)
    scores = st.evaluate(model, "old", loader(case, model, shuffle=False))
    weights = [float(p.double().sum()) for p in model["old"].state_dict().values()]
    found.append([result.losses, weights, list(scores.values())])

def load(number, case):
    model = added(case)
    model.remove_task("old")
    model.load_task(f"{sys.argv[4]}/{number}")
    found.append(answer(case, model).float().flatten().tolist())

if sys.argv[1] == "load":
    with open(f"{sys.argv[4]}/cases.json") as file:
        for number, case in enumerate(json.load(file)):
            load(number, Case(**case))
else:
    drawn(8)(given(cases().filter(lambda case: case.dtype != "bfloat16"))(check))()
if PartialState().is_main_process:
    print("RESULT" + json.dumps(found))
"""
LAUNCH = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2")


def started(folder: Path, what: str, *launch: str) -> list[Any]:
    (folder / "script.py").write_text(SCRIPT)
    here = Path(__file__).parent
    done = subprocess.run(
        [sys.executable, *launch, folder / "script.py", what, here, here.parent, folder],
        capture_output=True,
        text=True,
        timeout=600,
        env={**os.environ, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"},
        check=False,
    )
    lines = [line for line in done.stdout.splitlines() if line.startswith("RESULT")]
    assert done.returncode == 0 and len(lines) == 1, done.stderr[-3000:]
    found: list[Any] = json.loads(lines[0].removeprefix("RESULT"))
    return found


@pytest.mark.slow
def test_a_fresh_process_says_the_same(tmp_path: Path) -> None:
    expected: list[Any] = []
    chosen: list[Case] = []

    def save(case: Case) -> None:
        model = added(case)
        learn(case, model)
        model.save_task("old", tmp_path / str(len(expected)))
        expected.append(answer(case, model).float().flatten().tolist())
        chosen.append(case)

    drawn(5)(given(cases())(save))()
    (tmp_path / "cases.json").write_text(json.dumps([asdict(case) for case in chosen]))
    assert started(tmp_path, "load") == expected


@pytest.mark.slow
def test_two_processes_are_one(tmp_path: Path) -> None:
    one, two = started(tmp_path, "fit"), started(tmp_path, "fit", *LAUNCH)
    assert len(one) == len(two)
    for a, b in zip(one, two, strict=True):
        for first, second in zip(a, b, strict=True):
            assert second == pytest.approx(first, rel=1e-4, abs=1e-5, nan_ok=True)
