"""What the campaign damages: small files of every kind, each with the reader that users call."""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import campaign_foreign as foreign
import sidetuning as st
from sidetuning.cache import CachedFeatures, CachedTokens, cache_features, cache_tokens
from sidetuning_bench.agents.trajectories import Episode, Writer, read_steps
from sidetuning_bench.methods import METHODS, Recipe, Task, load_method
from sidetuning_bench.results import RunResult
from sidetuning_bench.runs import Run, read_result, write_result

METHOD_NAMES = ("sidetune", "ewc", "psp", "pnn", "piggyback")


@dataclass(frozen=True)
class Subject:
    """Files with their reader.

    Attributes:
        make: writes the files to a folder.
        read: reads them, and returns what they say as values that can be compared.
        checked: whether a change of them must be found. Other programs' files have no checksum: of a picture with
            another pixel nobody can tell.
        mends: whether the reader makes damaged files anew, so that its answer is always the right one.
    """

    make: Callable[[Path], None]
    read: Callable[[Path], Any]
    checked: bool = True
    mends: bool = False


def base() -> st.Base:
    """Vectors (b, 6) -> (b, 16)."""
    with st.seeded(1):
        net = nn.Sequential(nn.Linear(6, 12), nn.ReLU(), nn.Linear(12, 16))
    return st.Base(net, example=torch.zeros(1, 6), taps=("0",))


class Embedding(nn.Module):
    """Token ids (b, t) and their mask -> (b, t, 8)."""

    def __init__(self) -> None:
        super().__init__()
        self.embeddings = nn.Embedding(50, 8)
        self.layer = nn.Linear(8, 8)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        return self.layer(self.embeddings(input_ids)) * attention_mask[..., None]


def texts_base() -> st.Base:
    """Token ids -> (b, t, 8)."""
    with st.seeded(1):
        net = Embedding()
    example = {"input_ids": torch.arange(6)[None], "attention_mask": torch.ones(1, 6, dtype=torch.long)}
    return st.Base(net, example=example, taps=("layer",))


class Texts:
    """Texts of 3 to 9 tokens."""

    ids = tuple(torch.arange(3 + k % 7) * (k + 1) % 50 for k in range(24))

    def __len__(self) -> int:
        return len(self.ids)

    def lengths(self) -> np.ndarray[Any, np.dtype[np.int64]]:
        return np.array([len(row) for row in self.ids])

    def fingerprint(self) -> str:
        return "24 texts"

    def batch(self, rows: Any, /) -> dict[str, Tensor]:
        ids = nn.utils.rnn.pad_sequence([self.ids[row] for row in rows], batch_first=True)
        lengths = torch.tensor([len(self.ids[row]) for row in rows])
        return {"input_ids": ids, "attention_mask": (torch.arange(ids.shape[1]) < lengths[:, None]).long()}


def vectors(n: int = 4) -> Tensor:
    return torch.rand(n, 6, generator=torch.Generator().manual_seed(2))


def data(n: int = 20) -> TensorDataset:
    return TensorDataset(vectors(n), torch.arange(n) % 3)


def plain(value: Any) -> Any:
    """Tensors by their bytes, so that NaN equals itself."""
    if isinstance(value, (Tensor, np.ndarray)):
        array = value.detach().numpy() if isinstance(value, Tensor) else value
        return str(array.dtype), array.shape, hashlib.sha256(np.ascontiguousarray(array).tobytes()).hexdigest()
    if isinstance(value, dict):
        return {key: plain(inner) for key, inner in value.items()}
    return [plain(inner) for inner in value] if isinstance(value, (list, tuple)) else value


@torch.no_grad()
def answers(model: st.SideTuner, x: Tensor) -> Any:
    """All that a model says."""
    about = [(name, model[name].labels, type(model[name].problem).__name__, model[name].passes) for name in model]
    return plain([about, model.forward_all(x)])


# ---- tasks and models


def model(of: st.Base) -> st.SideTuner:
    """Two tasks, of which the second reads the first."""
    found = st.SideTuner(of)
    found.add_task("pets", side="mlp", merge="mlp2", head=3, labels=["cat", "dog", "cow"], seed=0)
    found.add_task("cars", side="mlp", merge="sum", head=2, laterals=["pets"], prenorm=True, problem="labels", seed=1)
    return found


def make_task(folder: Path) -> None:
    model(base()).save_task("pets", folder)


def read_task(folder: Path) -> Any:
    found = st.SideTuner(base())
    found.load_task(folder)
    return answers(found, vectors())


def make_model(folder: Path) -> None:
    found = model(base())
    for name in found:
        found.save_task(name, folder / "tasks" / name, metrics={"accuracy": 0.5})


def read_model(folder: Path) -> Any:
    found = st.load(folder, base=base())
    # Where a task is gone, this says so.
    with torch.no_grad():
        return plain([[found[name].labels, found(vectors(), name)] for name in ("pets", "cars")])


def make_named(folder: Path) -> None:
    found = st.SideTuner(st.load_base("resnet44-cifar10", taps=["layer2"]))
    found.add_task("pets", side="fcn4", head=3, init="distilled")
    found.save_task("pets", folder)


def read_named(folder: Path) -> Any:
    return answers(st.load(folder), torch.rand(1, 3, 32, 32, generator=torch.Generator().manual_seed(0)))


def make_hub(folder: Path) -> None:
    snapshot = folder / "models--someone--pets" / "snapshots" / ("a" * 40)
    model(base()).save_task("pets", snapshot)
    refs = folder / "models--someone--pets" / "refs"
    refs.mkdir()
    (refs / "main").write_text("a" * 40)


def read_hub(folder: Path) -> Any:
    import huggingface_hub.constants as hub

    # As after `pull` on a machine that is offline since.
    before = hub.HF_HUB_CACHE, hub.HF_HUB_OFFLINE
    hub.HF_HUB_CACHE, hub.HF_HUB_OFFLINE = str(folder), True
    try:
        return read_task(st.pull("someone/pets"))
    finally:
        hub.HF_HUB_CACHE, hub.HF_HUB_OFFLINE = before


# ---- training


def fitted(file: Path) -> Any:
    """Train a task, or finish its training; what was refused must have left the weights alone."""
    found = model(base())
    found.remove_task("cars")
    before = plain(dict(found["pets"].state_dict()))
    loader = DataLoader(data(), batch_size=4, shuffle=True)
    try:
        result = st.fit(found, "pets", loader, steps=12, lr=0.01, resume=file, save_every=0, progress=False)
    except st.SideTuningError:
        if plain(dict(found["pets"].state_dict())) != before:
            raise AssertionError("the weights have moved") from None
        raise
    return plain([dict(found["pets"].state_dict()), result.losses])


class Cut:
    """Batches until the seventh, where somebody presses Ctrl-C."""

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self, rows: Any) -> Any:
        self.calls += 1
        if self.calls == 7:
            raise KeyboardInterrupt
        return torch.utils.data.default_collate(rows)


def make_resume(folder: Path) -> None:
    found = model(base())
    found.remove_task("cars")
    loader = DataLoader(data(), batch_size=4, shuffle=True, collate_fn=Cut())
    with contextlib.suppress(KeyboardInterrupt):
        st.fit(found, "pets", loader, steps=12, lr=0.01, resume=folder / "r.pt", save_every=0, progress=False)


def make_finished(folder: Path) -> None:
    fitted(folder / "r.pt")


def read_resume(folder: Path) -> Any:
    return fitted(folder / "r.pt")


# ---- caches


def make_cache(folder: Path) -> None:
    cache_features(base(), data(), folder, progress=False)


def read_cache(folder: Path) -> Any:
    (found,) = (f for f in folder.iterdir() if f.is_dir())
    x, features, y = CachedFeatures(found).__getitems__(range(20))
    return plain([x, features.out, features.taps, y])


def make_begun(folder: Path) -> None:
    make_cache(folder)
    (folder_of_cache,) = folder.iterdir()
    (folder_of_cache / "meta.json").unlink()


def read_begun(folder: Path) -> Any:
    cached = cache_features(base(), data(), folder, progress=False)
    x, features, y = cached.__getitems__(range(20))
    return plain([x, features.out, features.taps, y])


def make_tokens(folder: Path) -> None:
    cache_tokens(texts_base(), Texts(), torch.arange(24), folder, progress=False)


def read_tokens(folder: Path) -> Any:
    (found,) = (f for f in folder.iterdir() if f.is_dir())
    inputs, features, y = CachedTokens(texts_base(), Texts(), torch.arange(24), found).__getitems__(range(24))
    return plain([inputs, features.out, features.taps, y])


# ---- methods and runs


def make_method(name: str, folder: Path) -> None:
    method = METHODS.build(name, base(), options={"side": "mlp", "merge": "sum"} if name == "sidetune" else {})
    for k, task in enumerate(("pets", "cars")):
        loader = DataLoader(data(), batch_size=5)
        method.learn(Task(task, 3, labels=["cat", "dog", "cow"], seed=k), loader, Recipe(steps=2), progress=False)
    method.save(folder)


@torch.no_grad()
def read_method(folder: Path) -> Any:
    method = load_method(folder, base())
    return plain([[(t.name, t.labels) for t in method.tasks.values()], [method(vectors(), t) for t in method.tasks]])


@dataclass(frozen=True)
class RunSettings:
    """Of a run."""

    rate: float = 0.1
    out: str = ""


def result() -> RunResult:
    numbers: dict[str, Any] = {"parameters": [3, 3], "shared_parameters": 9, "seconds": [1.0, 2.0], "base_seconds": 0.5}
    accuracy: dict[str, Any] = {"accuracy": [[0.5], [0.25, 0.75]], "alone": None, "alphas": [0.5, None]}
    named: dict[str, Any] = {"method": "sidetune", "variant": "", "seed": 0, "tasks": ["pets", "cars"]}
    return RunResult(**named, **accuracy, **numbers, peak_memory_mb=None, settings={"rate": 0.1})


def make_run(folder: Path) -> None:
    run = Run(folder, "campaign", RunSettings())
    run.belongs(data="abc")
    for k in range(4):
        run.append({"task": f"task-{k}", "accuracy": k / 8})
    result().save(folder / "result.json")
    write_result(folder / "other.json", RunSettings())


def read_run(folder: Path) -> Any:
    run = Run(folder, "campaign", RunSettings())
    run.belongs(data="abc")
    rows = run.metrics()
    # A last line that was cut is that of a kill, and is learned again.
    short = rows == [{"task": f"task-{k}", "accuracy": k / 8} for k in range(len(rows))]
    found = RunResult.load(folder / "result.json"), read_result(RunSettings, folder / "other.json")
    return short or rows, repr(found)


def append_walks(folder: Path, count: int) -> None:
    """Append the episodes that are not there yet."""
    from gymnasium import spaces

    space = spaces.Dict({"rgb": spaces.Box(0, 255, (8, 8, 3), np.uint8)})
    writer = Writer(folder / "walks-v0", space, spaces.Discrete(4), {})
    for k in range(len(writer), count):
        rng = np.random.default_rng(k)
        pictures = {"rgb": rng.integers(0, 256, (6, 8, 8, 3), dtype=np.uint8)}
        actions = rng.integers(0, 4, 5)
        writer.append(Episode(k, pictures, actions, actions, np.ones(5), True), k + 1)


def make_trajectories(folder: Path) -> None:
    append_walks(folder, 2)


def read_trajectories(folder: Path) -> Any:
    steps = read_steps(folder / "walks-v0")
    return steps.fingerprint(), plain(steps.starts)


SUBJECTS: dict[str, Subject] = {
    "task": Subject(make_task, read_task),
    "model": Subject(make_model, read_model),
    "named base": Subject(make_named, read_named),
    "hub": Subject(make_hub, read_hub),
    "resume": Subject(make_resume, read_resume),
    "finished": Subject(make_finished, read_resume),
    "cache": Subject(make_cache, read_cache),
    "cache begun": Subject(make_begun, read_begun, mends=True),
    "tokens": Subject(make_tokens, read_tokens),
    **{f"method {name}": Subject(partial(make_method, name), read_method) for name in METHOD_NAMES},
    "run": Subject(make_run, read_run),
    "trajectories": Subject(make_trajectories, read_trajectories),
    "images": Subject(foreign.make_images, foreign.read_images, checked=False),
    "parquet": Subject(foreign.make_parquet, foreign.read_parquet, checked=False),
    "questions": Subject(foreign.make_questions, foreign.read_squad, checked=False),
    "frames": Subject(foreign.make_frames, foreign.read_frames, checked=False),
    "weights": Subject(foreign.make_weights, foreign.read_weights, checked=False),
}
