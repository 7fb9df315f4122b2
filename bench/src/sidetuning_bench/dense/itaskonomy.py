"""iTaskonomy (paper, section 4.1): twelve dense tasks, learned one after another from one base that sees curvature."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from functools import cache, partial
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
import tyro
from accelerate.utils import send_to_device
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from sidetuning.base import Base, Features
from sidetuning.cache import CachedFeatures, cache_features, loader_over
from sidetuning.errors import DataError, SideTuningError, UnknownNameError
from sidetuning.loading import load_base
from sidetuning.registry import unknown
from sidetuning_bench.dense.gallery import Gallery
from sidetuning_bench.dense.taskonomy import Taskonomy
from sidetuning_bench.dense.tasks import ORDER, DenseTask, Regression, dense_task
from sidetuning_bench.domains import domain_of, names
from sidetuning_bench.methods import METHODS, Method, Recipe, Task
from sidetuning_bench.methods.method import one_cycle
from sidetuning_bench.report_runs import report
from sidetuning_bench.results import RunResult
from sidetuning_bench.runs import (
    WITH_SIDES,
    Run,
    above_zero,
    at_least_one,
    not_twice,
    read_by_method,
    side_options,
    with_recipe,
)
from sidetuning_bench.sequence import Lesson, Score, costs, learn_in_order

READERS = {  # settings that some methods alone read
    "merge": WITH_SIDES, "side": WITH_SIDES, "side_width": WITH_SIDES, "init": WITH_SIDES, "dense": ("sidetune",), "ewc_coefficient": ("ewc",),
}  # fmt: skip
RATE = 1e-3
RATES = dict.fromkeys(("finetune", "independent", "ewc", "psp"), 3e-4)  # the base's own weights want smaller steps
# The side that came out best on the validation levels of Doom (docs/benchmarks.md).
BEST: dict[str, Any] = {"side": "fusion", "taps": ("layer2", "layer3"), "merge": "mlp2", "init": None}
IN_MEMORY = 2 * 1024**3  # bytes of one domain; some 100,000 labels of 128 pixels
FREE = ("data", "out", "cache", "save_every", "progress")  # settings that may differ when a run goes on


@dataclass(frozen=True)
class Settings:
    """Learn the dense tasks of Taskonomy one after another, on Doom (see render-doom) or on Taskonomy itself."""

    data: str = "runs/doom"
    """A folder in Taskonomy's layout."""
    subset: str | None = None
    """Which buildings train and test: a split file or the name of an official one (tiny, fullplus, …); splits.csv by default."""
    out: str = "runs/itaskonomy"
    """Folder of the run; the same command run again goes on where it stopped."""
    method: str = "sidetune"
    """sidetune, features, finetune, independent, scratch, ewc, psp, pnn, residual-adapter, lora, piggyback or boosting."""
    recipe: Literal["paper", "best"] = "paper"
    """paper: a side that sees the picture. best: one on inner maps of the packaged base; it sets side, taps, merge and init."""
    tasks: tuple[str, ...] = ORDER
    """The tasks, in the order of learning; the paper's by default."""
    order: int | None = None
    """Learn the tasks in a random order drawn from this seed."""
    merge: str = "alpha"
    """How base and side are fused: alpha, mlp2, base-only, side-only, …"""
    side: str = "fcn5"
    """Side network."""
    side_width: float = 0.25
    """Of the sides fcn5 and copy: fraction of the channels."""
    taps: tuple[str, ...] = ()
    """Inner modules of the base whose outputs sides such as fusion read; kept in half precision."""
    init: str | None = "distilled"
    """How the side starts: distilled, xavier, low-energy, zero, or a safetensors file of its weights."""
    dense: bool = False
    """Feed the sides of all earlier tasks into the merge (the paper's dense variant)."""
    ewc_coefficient: float = 1e5
    """Of the penalty, for the method ewc; the balance between forgetting and rigidity."""
    base: str = "resnet-doom-curvature"
    """Base network; its code must be a map."""
    base_weights: str | None = None
    """A safetensors file of the base's weights to use instead of the packaged ones."""
    frames: int | None = None
    """Train on so many frames, drawn evenly over the training buildings; None for all."""
    draw: int = 0
    """Seed of that draw."""
    test_split: Literal["test", "val"] = "test"
    """Frames to test on; val to choose settings by."""
    test_frames: int | None = 300
    """Test on at most so many frames, drawn evenly over the test buildings; None for all."""
    size: int | None = None
    """Resize frames to this width and height; None keeps them."""
    epochs: float = 3.0
    """Passes over the training frames, per task."""
    batch: int = 32
    """Frames per step."""
    lr: float | None = None
    """Learning rate; by default 1e-3, and 3e-4 where the base's own weights are tuned. (The paper has 1e-4 for some hundred times
    as many steps.)"""
    schedule: Literal["constant", "one-cycle"] = "constant"
    """Of the learning rate; one-cycle warms up for a tenth of the steps and ends near 0."""
    weight_decay: float = 2e-6
    """Of kernels and matrices; merges, norms and biases have none."""
    clip: float | None = 1.0
    """Largest norm of the gradient; None for no limit."""
    precision: Literal["no", "bf16"] = "no"
    """Mixed precision of training; fast where the processor knows bfloat16."""
    seed: int = 0
    """Of initial weights and of the order of the frames."""
    pictures: int = 4
    """Test frames whose predictions are kept for the report."""
    cache: str = "~/.cache/sidetuning"
    """Folder of base features, shared by all runs."""
    save_every: Annotated[float, tyro.conf.arg(help="Seconds between two resume files while a task is trained.")] = 10.0
    progress: bool = True
    """Show progress bars."""


class Inputs(Dataset[Any]):
    """Frames without labels, as a cache of base features takes them."""

    def __init__(self, frames: Taskonomy) -> None:
        self.frames = frames

    def __len__(self) -> int:
        return len(self.frames)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return self.frames.read(index, "rgb"), index

    def fingerprint(self) -> str:
        """Of the frames' pictures alone."""
        return self.frames.fingerprint()


class Stack:
    """One domain of frames: in memory where that is at most `IN_MEMORY`, else read from the files batch by batch."""

    def __init__(self, frames: Taskonomy, domain: str, progress: bool = False) -> None:
        self.frames, self.domain = frames, domain
        fits = len(frames) * frames.read(0, domain).nbytes <= IN_MEMORY
        self.held = frames.tensors(domain, progress) if fits else None

    def __len__(self) -> int:
        return len(self.frames)

    def __getitem__(self, rows: Sequence[int]) -> Tensor:
        return self.frames.tensors(self.domain, rows=rows) if self.held is None else self.held[list(rows)]


class Labelled(Dataset[Any]):
    """Batches of `(x, features or None, y)` for one task."""

    def __init__(self, inputs: CachedFeatures | Stack, raw: Stack, mask: Stack, task: DenseTask) -> None:
        self.inputs, self.raw, self.mask, self.task = inputs, raw, mask, task

    def __len__(self) -> int:
        return len(self.raw)

    def labels(self, rows: Sequence[int]) -> Tensor:
        """What the task makes of them."""
        return self.task.labels(self.raw[rows], self.mask[rows])

    def __getitems__(self, rows: Sequence[int]) -> tuple[Tensor, Features | None, Tensor]:
        if isinstance(self.inputs, Stack):
            return self.inputs[rows], None, self.labels(rows)
        x, features, _ = self.inputs.__getitems__(rows)
        return x, features, self.labels(rows)


def fingerprint_of(settings: Settings) -> str:
    """Of what is learned and tested."""
    return fingerprint(*frames_of(settings))


def fingerprint(train: Taskonomy, test: Taskonomy) -> str:
    """Of frames with the names of their classes."""
    parts = (train.fingerprint(), test.fingerprint(), *names(train.root, "segment_semantic"))
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()


def frames_of(settings: Settings) -> tuple[Taskonomy, Taskonomy]:
    """Those for training and those for testing, with all domains that the tasks need.

    Raises:
        UnknownNameError: a task that is none of the twelve.
        DataError: too few frames, missing files.
    """
    s = settings
    for name in s.tasks:
        if name not in ORDER:
            raise UnknownNameError(unknown("task", name, ORDER, verb="one of the twelve"))
    domains = ("rgb", *(domain_of(t).name for t in s.tasks if t != "rgb"))
    train = Taskonomy(s.data, domains, "train", s.subset, limit=s.frames, size=s.size, seed=s.draw)
    test = Taskonomy(s.data, domains, s.test_split, s.subset, size=s.size)
    if s.test_frames is not None and len(test) > s.test_frames:
        test = Taskonomy(s.data, domains, s.test_split, s.subset, limit=s.test_frames, size=s.size)
    if both := {frame[0] for frame in train.frames} & {frame[0] for frame in test.frames}:
        raise DataError(
            f"the split has {', '.join(sorted(both))} for training and for testing; give another with --subset"
        )
    return train, test


def tell_absent(train: Taskonomy, test: Taskonomy) -> None:
    """Say which buildings of the split have no folder."""
    if absent := train.absent + test.absent:
        some = ", ".join(absent[:5]) + " …" * (len(absent) > 5)
        tqdm.write(f"{len(absent)} buildings of the split have no folder here ({some})")


def check(settings: Settings) -> None:
    """Settings that no data can make right.

    Raises:
        SideTuningError: one of them.
    """
    at_least_one(settings, "batch", "frames", "test_frames", "size")
    above_zero(settings, "epochs", "lr", "clip", "side_width", "ewc_coefficient")
    not_twice(settings, "tasks")
    read_by_method(settings, READERS)
    if settings.weight_decay < 0:
        raise SideTuningError(f"--weight-decay must be 0 or more, not {settings.weight_decay}")


def with_rate(settings: Settings) -> Settings:
    """The settings with the learning rate of their method, where none is given."""
    return settings if settings.lr is not None else replace(settings, lr=RATES.get(settings.method, RATE))


def run(settings: Settings) -> RunResult:
    """Learn the tasks in order, saving after each; evaluates every task after every task."""
    s = with_rate(with_recipe(settings, BEST))
    check(s)
    folder = Run(s.out, "itaskonomy", s, free=FREE)
    train, test = frames_of(s)
    if s.progress:  # else who started it has said so
        tell_absent(train, test)
    classes = names(s.data, "segment_semantic")
    tasks = {name: dense_task(name, train, classes) for name in ordered(s)}
    base = load_base(s.base, weights=s.base_weights, taps=s.taps).with_example(
        torch.zeros(1, *train.shapes["rgb"], dtype=torch.uint8)
    )
    if base.kind != "map":
        raise DataError(
            f"the base {s.base} returns a {base.kind}; dense tasks need a map, such as resnet-doom-curvature's"
        )
    fingerprints = {"data": fingerprint(train, test), "base": base.identity().sha256}
    folder.belongs(**fingerprints)
    method = build_method(s, base)
    method.add(Task("dry-run", "identity"))  # an unknown part is found before the long work

    inputs = {frames: prepare(method, base, frames, s) for frames in (train, test)}
    base_seconds = sum(data.seconds for data in inputs.values() if isinstance(data, CachedFeatures))
    gallery = Gallery(folder.folder / "gallery", test, s.pictures)

    masks = {frames: Stack(frames, "mask") for frames in (train, test)}

    def labelled(frames: Taskonomy, task: DenseTask) -> Labelled:
        return Labelled(inputs[frames], Stack(frames, task.domain), masks[frames], task)

    @cache  # every later task asks again
    def tested(task: DenseTask) -> tuple[Labelled, float]:
        data = labelled(test, task)
        return data, constant(task, train, data) if isinstance(
            task, Regression
        ) else 0.0  # what no score reads is not measured

    def lesson(name: str) -> Lesson:
        task = tasks[name]
        return Lesson(
            Task(name, task.head[0], task.loss, seed=s.seed * 1000 + ORDER.index(name), head_options=task.head[1]),
            lambda: loader_over(labelled(train, task), batch_size=s.batch, drop_last=True),  # batch norms want many
            lambda method: evaluate(method, name, *tested(task)),
        )

    assert s.lr is not None
    steps = max(1, round(s.epochs * len(train) / s.batch))
    return learn_in_order(
        folder, partial(build_method, s, base), [lesson(name) for name in tasks],
        Recipe(
            steps, s.lr, s.weight_decay, s.clip, scheduler=one_cycle(s.lr, 0.1) if s.schedule == "one-cycle" else None, seed=s.seed,
            precision=s.precision,
        ),
        settings={k: v for k, v in asdict(s).items() if k not in FREE} | {"fingerprints": fingerprints}, method_name=s.method, seed=s.seed,
        base_seconds=base_seconds, save_every=s.save_every, progress=s.progress,
        learned=lambda method, name: gallery.add(method, name, tasks), measures={n: t.measure for n, t in tasks.items()},
    )  # fmt: skip


def ordered(settings: Settings) -> list[str]:
    """The tasks as given, or shuffled."""
    if settings.order is None:
        return list(settings.tasks)
    generator = torch.Generator().manual_seed(settings.order)
    return [settings.tasks[i] for i in torch.randperm(len(settings.tasks), generator=generator).tolist()]


def build_method(settings: Settings, base: Base) -> Method:
    """The method that the settings name, without tasks."""
    s = settings
    options: dict[str, dict[str, Any]] = {  # of the other methods: their own defaults
        "psp": {"seed": s.seed}, "ewc": {"coefficient": s.ewc_coefficient},
    }  # fmt: skip
    side = {"side": s.side, "merge": s.merge, "init": s.init, "side_options": side_options(s.side, s.side_width)}
    options["sidetune"], options["boosting"] = {**side, "dense": s.dense}, side
    return METHODS.build(s.method, base, options=options.get(s.method, {}))


def prepare(method: Method, base: Base, frames: Taskonomy, settings: Settings) -> CachedFeatures | Stack:
    """Images with cached base features where the method uses them, else the images."""
    if not method.uses_features:
        return Stack(frames, "rgb", settings.progress)
    pictures = frames.only("rgb")
    return cache_features(
        base, Inputs(pictures), Path(settings.cache).expanduser(), dtype="float16" if settings.taps else "float32",
        progress=settings.progress,
    )  # fmt: skip


def constant(task: DenseTask, train: Taskonomy, test: Labelled, count: int = 500) -> float:
    """The value of the best constant guess from `count` training labels, drawn evenly, measured on as many test labels."""
    rows = sorted({k * len(train) // count for k in range(count)})
    guess = task.constant(task.labels(train.tensors(task.domain, rows=rows), train.tensors("mask", rows=rows)))
    labels = test.labels(sorted({k * len(test) // count for k in range(count)}))
    size = labels.shape[-2:] if guess.ndim == 4 else ()
    return task.value(task.tally(guess.expand(len(labels), -1, *size), labels))


@torch.no_grad()
def evaluate(method: Method, name: str, data: Labelled, constant: float) -> Score:
    """How well a method does a task on test frames."""
    loader: DataLoader[Any] = loader_over(data, batch_size=50, shuffle=False)
    tallies = []
    for x, features, y in loader:
        x, features = send_to_device((x, features), method.base.device)
        output = method(x, name, features=features).float().cpu()  # sums are in double precision, which MPS has not
        tallies.append(data.task.tally(output, y))
    return data.task.score(torch.stack(tallies).sum(0), constant)


def main(settings: Settings) -> None:
    """Run, print the table and write the report."""
    show(run(settings), settings)
    print(f"report: {report([settings.out])}")


def show(result: RunResult, settings: Settings) -> None:
    """The table of a run."""
    from rich.console import Console
    from rich.table import Table

    assert result.values is not None and result.measures is not None
    table = Table(title=f"iTaskonomy, {result.method}, seed {result.seed}", caption_justify="left")
    for column in ("task", "measure", "when learned", "at the end", "score", "alpha", "seconds"):
        table.add_column(column, justify="left" if column in ("task", "measure") else "right")
    for i, name in enumerate(result.tasks):
        alpha, last = result.alphas[i], result.values[-1]
        table.add_row(
            name, result.measures[i], f"{result.values[i][i]:.4g}", f"{last[i]:.4g}", f"{100 * result.matrix.final[i]:.1f}",
            "–" if alpha is None else f"{alpha:.3f}", f"{result.seconds[i]:.1f}",
        )  # fmt: skip
    console = Console()
    console.print(table)
    console.print("score: 100 is perfect; for errors, 50 is the best constant guess", highlight=False)
    console.print(costs(result, settings.out), highlight=False)
