"""Two processes learn and score what one does, whatever the batches, losses and parts."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from accelerate.data_loader import (
    BatchSamplerShard,
    DataLoaderDispatcher,
    IterableDatasetShard,
    prepare_data_loader,
)
from torch.utils.data import BatchSampler, DataLoader, DistributedSampler

import sidetuning as st
from conftest import inputs, mlp_base
from sidetuning.processes import Shares

SCRIPT = """
import json, os, sys
sys.path.insert(0, sys.argv[1])
import torch, torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
import sidetuning as st
from accelerate import PartialState
from conftest import conv_base, inputs, mlp_base, sequence_base

def data(n, ignored=0):
    y = torch.arange(n) % 3
    y[:ignored] = -100
    return TensorDataset(inputs("mlp", n), y)

def images(n):
    return TensorDataset(inputs("conv", n), torch.arange(n) % 3)

def texts(n):
    x = inputs("sequence", n)
    return [{**{k: v[i] for k, v in x.items()}, "labels": torch.tensor(i % 3)} for i in range(n)]

# What asks first how many processes there are.
cached = st.cache_features(mlp_base(), data(10), sys.argv[2] + os.environ.get("WORLD_SIZE", "1"), progress=False)
def numbers(n):
    y = torch.stack([torch.arange(n) * 0.01 - 0.97, torch.arange(n) * 1000.0], 1)
    y[0, 1] = torch.nan
    return TensorDataset(inputs("mlp", n), torch.cat([y, y[:, :1] ** 2], 1))

weights = nn.CrossEntropyLoss(weight=torch.tensor([1.0, 10.0, 100.0]))
mlp = dict(side="mlp")
cases = {
    "short": (mlp_base(), mlp, data(10), {}),
    "one left": (mlp_base(), mlp, data(9), {}),
    "weights": (mlp_base(), mlp, data(10), {"loss": weights}),
    "ignored": (mlp_base(), mlp, data(10, ignored=4), {}),
    "all of a share ignored": (mlp_base(), mlp, data(6, ignored=5), {}),
    "own loss": (mlp_base(), mlp, data(10), {"loss": lambda o, y: F.cross_entropy(2 * o, y.clamp(min=0))}),
    "batch norms": (conv_base(("2", "4")), dict(side="fusion"), images(9), {}),
    "merge norms": (conv_base(), dict(side="mlp", merge="mlp2"), images(9), {}),
    "unused gate": (mlp_base(), dict(side="ladder", taps=("0",)), data(10), {}),
    "copy": (sequence_base(), dict(side="copy"), texts(9), {}),
    "cached": (mlp_base(), mlp, st.loader_over(cached, batch_size=4), {}),
    "numbers": (mlp_base(), dict(side="mlp", problem="numbers"), numbers(9), {}),
    "a list of batches": (conv_base(("2", "4")), dict(side="fusion"), [images(5)[:], images(4)[:]], {}),
}
found = {}
for name, (base, parts, rows, how) in cases.items():
    model = st.SideTuner(base)
    model.add_task("t", head=3, seed=0, **parts)
    loader = rows if name in ("a list of batches", "cached") else DataLoader(rows, batch_size=4, shuffle=True)
    # Adam would make whole steps of rounding errors, where a gradient is 0: of a bias before a batch norm, say.
    optimizer = torch.optim.AdamW if name == "short" else torch.optim.SGD
    result = st.fit(model, "t", loader, steps=7, lr=1e-2, optimizer=optimizer, progress=False, **how)
    state = [float(v.double().sum()) for v in model["t"].state_dict().values()]
    scores = st.evaluate(model, "t", loader, loss=how.get("loss"))
    found[name] = {"losses": result.losses, "weights": state, "scores": list(scores.values())}
x = inputs("mlp", 9)
for problem, rows in (("classes", data(9, ignored=2)), ("numbers", TensorDataset(x, x[:, :3] * 50 + 7))):
    model = st.SideTuner(mlp_base())
    model.add_task("t", side=None, merge="base-only", head=3, problem=problem, seed=0)
    loader = DataLoader(rows, batch_size=4)
    solved = st.solve(model, "t", loader, progress=False)
    state = [float(v.double().abs().sum()) for v in model["t"].state_dict().values()]
    scores = list(st.evaluate(model, "t", loader).values())
    found[f"solved {problem}"] = {"losses": [solved.error, solved.rows], "weights": state, "scores": scores}
if PartialState().is_main_process:
    print("RESULT" + json.dumps([PartialState().num_processes, found]))
"""


STOP = """
import itertools, os, signal, sys
sys.path.insert(0, sys.argv[1])
import torch, torch.nn.functional as F
from torch.utils.data import DataLoader, TensorDataset
import sidetuning as st
from accelerate import PartialState
from conftest import inputs, mlp_base

class Endless:
    def __iter__(self):
        return ([i % 7, (i + 1) % 7, (i + 2) % 7] for i in itertools.count())

def loss(output, target):
    loss.calls += 1
    if loss.calls == 70 and PartialState().process_index == 1:
        os.kill(os.getpid(), signal.SIGTERM)
    return F.cross_entropy(output, target)

loss.calls = 0
model = st.SideTuner(mlp_base())
model.add_task("t", side="mlp", head=3, seed=0)
loader = DataLoader(TensorDataset(inputs("mlp", 7), torch.arange(7) % 3), batch_sampler=Endless())
try:
    st.fit(model, "t", loader, steps=1000, loss=loss, resume=sys.argv[2], progress=False)
except KeyboardInterrupt as stopped:
    sys.stdout.write(f"STOPPED {loss.calls} {stopped.code}\\n")
"""


LAUNCH = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2")


def started(folder: Path, text: str, *launch: str) -> subprocess.CompletedProcess[str]:
    (folder / "script.py").write_text(text)
    return subprocess.run(
        [sys.executable, *launch, str(folder / "script.py"), str(Path(__file__).parents[1]), str(folder / "resume.pt")],
        capture_output=True,
        text=True,
        timeout=300,
        env={**os.environ, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"},
        check=False,
    )


def run(folder: Path, *launch: str) -> tuple[int, dict[str, Any]]:
    done = started(folder, SCRIPT, *launch)
    lines = [line for line in done.stdout.splitlines() if line.startswith("RESULT")]
    assert done.returncode == 0 and len(lines) == 1, done.stderr[-3000:]
    processes, found = json.loads(lines[0].removeprefix("RESULT"))
    return processes, found


class Two:
    """Stands for accelerate in the first of two processes."""

    process_index, num_processes = 0, 2


class Reversed(DataLoader[Any]):
    def __iter__(self) -> Any:
        return iter([batch.flip(0) for batch in super().__iter__()])


def test_only_plain_loaders_are_shared_by_rows() -> None:
    rows: Any = torch.arange(8)
    plain = Shares(DataLoader(rows, 4, num_workers=1, prefetch_factor=3, timeout=9), Two())  # type: ignore[arg-type]
    assert isinstance(plain.loader, DataLoader) and plain.loader.batch_sampler is plain
    assert (plain.loader.prefetch_factor, plain.loader.timeout) == (3, 9)
    for loader in (Reversed(rows, 4), DataLoader(rows.split(4), batch_size=None), [rows]):
        assert Shares(loader, Two()).loader is loader  # type: ignore[arg-type]


def test_a_loader_that_is_split_already_is_refused() -> None:
    rows: Any = torch.arange(8)
    sampler: Any = DistributedSampler(rows, num_replicas=2, rank=0)
    loaders = [
        DataLoader(rows, 4, sampler=sampler),
        DataLoader(rows, batch_sampler=BatchSampler(sampler, 4, False)),
        DataLoader(rows, batch_sampler=BatchSamplerShard(BatchSampler(range(8), 4, False), 2, 0)),
        DataLoader(IterableDatasetShard(rows, num_processes=2)),
        prepare_data_loader(DataLoader(rows, 4), num_processes=2, process_index=0),
        DataLoaderDispatcher(rows),
    ]
    for loader in loaders:
        with pytest.raises(st.DataError, match="give a loader that is not split by a"):
            Shares(loader, Two())  # type: ignore[arg-type]
    Shares(prepare_data_loader(DataLoader(rows, 4)), SimpleNamespace(process_index=0, num_processes=1))  # type: ignore


def test_a_stream_that_each_process_reads_in_parts_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    def gather(hashes: list[str], own: str) -> None:
        hashes[:] = [own, other or own]

    monkeypatch.setattr("torch.distributed.all_gather_object", gather)
    batches, other = [torch.arange(3), torch.arange(2)], ""
    found = list(Shares(batches, Two()).read())  # type: ignore[arg-type]
    assert [len(batch) for batch, counts in found if counts] == [3, 2]
    other = "another batch"
    with pytest.raises(st.DataError, match="the processes read other batches"):
        list(Shares(batches, Two()).read())  # type: ignore[arg-type]


class Noisy(torch.utils.data.Dataset[Any]):
    def __getitem__(self, i: int) -> Any:
        return inputs("mlp", 8)[i] + torch.rand(12), i % 3  # type: ignore[index]

    def __len__(self) -> int:
        return 8


def test_workers_that_stay_hear_the_seed() -> None:
    ends, loader = [], DataLoader(Noisy(), 4, num_workers=1, persistent_workers=True)
    for _ in range(2):
        model = st.SideTuner(mlp_base())
        model.add_task("t", side="mlp", head=3, seed=0)
        ends.append(st.fit(model, "t", loader, epochs=2, progress=False).losses)
    assert ends[0] == ends[1]


@pytest.mark.slow
def test_two_processes_are_one(tmp_path: Path) -> None:
    one, expected = run(tmp_path)
    two, found = run(tmp_path, *LAUNCH)
    assert (one, two) == (1, 2)
    for name, numbers in expected.items():
        for what, values in numbers.items():
            assert found[name][what] == pytest.approx(values, rel=1e-4, abs=2e-6), (name, what)


@pytest.mark.slow
def test_a_signal_to_one_process_stops_both_at_the_same_step(tmp_path: Path) -> None:
    done = started(tmp_path, STOP, *LAUNCH)
    lines = sorted(line for line in done.stdout.splitlines() if line.startswith("STOPPED"))
    assert lines == [f"STOPPED 70 {128 + signal.SIGTERM}"] * 2, done.stdout + done.stderr[-3000:]
    assert (tmp_path / "resume.pt").exists()
