"""iCIFAR (paper, section 4.1): CIFAR-100 as ten tasks of ten classes, learned one after another from one frozen base."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
import torch.nn.functional as F
import tyro
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from sidetuning.base import Base
from sidetuning.cache import CachedFeatures, cache_features, loader_over
from sidetuning.errors import DataError, SideTuningError
from sidetuning.loading import load_base
from sidetuning_bench.cifar import ImageSet, load_images, random_flip_crop
from sidetuning_bench.methods import METHODS, Method, Recipe, Task
from sidetuning_bench.methods.method import one_cycle
from sidetuning_bench.report_runs import report
from sidetuning_bench.results import RunResult
from sidetuning_bench.runs import WITH_SIDES, Run, above_zero, at_least_one, read_by_method, with_recipe
from sidetuning_bench.sequence import Lesson, Score, costs, learn_in_order

CLASSES_PER_TASK = 10
FREE = ("data", "out", "cache", "save_every", "progress")  # settings that may differ when a run goes on
READERS = {  # settings that some methods alone read
    "merge": WITH_SIDES, "side": WITH_SIDES, "side_width": WITH_SIDES, "side_shift": WITH_SIDES, "init": WITH_SIDES, "dense": ("sidetune",),
    "stages": ("boosting",), "psp_statistics": ("psp",), "ewc_coefficient": ("ewc",), "lora_rank": ("lora",), "prenorm": (*WITH_SIDES, "features"),
}  # fmt: skip
# The most accurate recipe found within the paper's parameters per task and ten minutes on two cores (docs/benchmarks.md).
BEST: dict[str, Any] = {
    "side": "fusion", "side_shift": 2, "taps": ("layer2", "layer3"), "merge": "sum", "init": None, "mirror": True,
    "samples": 28 * 5000, "lr": 6e-3, "optimizer": "adamw", "weight_decay": 0.05, "schedule": "one-cycle", "smoothing": 0.1,
    "clip": None,
}  # fmt: skip


@dataclass(frozen=True)
class Settings:
    """Learn CIFAR-100 as ten tasks of ten classes, one after another; the defaults are the paper's protocol."""

    data: str = "uoft-cs/cifar100"
    """A folder with train*.parquet and test*.parquet in the Hub's layout, or a data set on the Hub."""
    out: str = "runs/icifar"
    """Folder of the run; the same command run again goes on where it stopped."""
    recipe: Literal["paper", "best"] = "paper"
    """The paper's protocol, or the most accurate one for no more parameters per task: a side on inner maps of the base,
    mirrored and shifted, about 27 passes. It sets side, taps, merge, init, mirror, samples, optimiser and schedule."""
    method: str = "sidetune"
    """sidetune, features, finetune, independent, scratch, ewc, psp, pnn, residual-adapter, lora, piggyback or boosting."""
    merge: str = "mlp2"
    """How base and side are fused: mlp2, alpha, base-only, side-only, …"""
    side: str = "fcn4"
    """Side network."""
    side_width: float = 1.0
    """Fraction of the channels of the side fcn4, or of the base's that the side "copy" keeps."""
    side_shift: int = 0
    """Augmentation of the side "fusion": cells of the largest map by which maps are moved at random."""
    taps: tuple[str, ...] = ()
    """Inner modules of the base whose outputs sides such as fusion and ladder read."""
    init: str | None = "distilled"
    """How the side starts: distilled, xavier, low-energy, zero, or a safetensors file of its weights."""
    dense: bool = False
    """Feed the sides of all earlier tasks into the merge (the paper's dense variant)."""
    stages: int = 2
    """Sides per task, for the method boosting."""
    psp_statistics: Literal["batch", "task"] = "batch"
    """Statistics of batch norms in tests of the method psp: those of the batch, or running ones kept for each task."""
    ewc_coefficient: float = 100.0
    """Of the penalty, for the method ewc; the balance between forgetting and rigidity."""
    lora_rank: int = 8
    """Of the updates, for the method lora."""
    base: str = "resnet44-cifar10"
    """Base network."""
    base_weights: str | None = None
    """A safetensors file of the base's weights to use instead of the packaged ones."""
    samples: int = 20_000
    """Training images per task, repetitions included (four passes over 5,000)."""
    share: float = 1.0
    """Part of each task's training images that is used; the number of steps stays."""
    mirror: bool = False
    """Train on mirrored images too, and average the answer over an image and its mirror image. Methods that train a
    network of their own see randomly cropped ones too."""
    batch: int = 128
    """Images per step."""
    lr: float = 1e-3
    """Learning rate, at its peak."""
    optimizer: Literal["adam", "adamw"] = "adam"
    """Adam, or AdamW."""
    schedule: Literal["constant", "one-cycle"] = "constant"
    """Of the learning rate; one-cycle warms up for a quarter of the steps and ends near 0."""
    smoothing: float = 0.0
    """Label smoothing of the training loss."""
    weight_decay: float = 0.0
    """Weight decay of kernels and matrices; merges, norms and biases have none."""
    clip: float | None = 1.0
    """Largest norm of the gradient; None for no limit."""
    prenorm: bool = False
    """Group-normalise the merged code before the head, as the original code does."""
    precision: Literal["no", "bf16"] = "no"
    """Mixed precision of training; fast where the processor knows bfloat16."""
    tasks: int = 10
    """How many of the ten tasks to learn."""
    order: int | None = None
    """Learn the tasks in a random order drawn from this seed, instead of label order."""
    alone: bool = False
    """Learn every task as if it were the first, with a method of its own; what rigidity is measured against."""
    seed: int = 0
    """Of initial weights and of the order of the images."""
    cache: str = "~/.cache/sidetuning"
    """Folder of base features, shared by all runs."""
    save_every: Annotated[float, tyro.conf.arg(help="Seconds between two resume files while a task is trained.")] = 10.0
    progress: bool = True
    """Show progress bars."""


def run(settings: Settings) -> RunResult:
    """Learn the tasks in order, saving after each; evaluates every task after every task."""
    s = with_recipe(settings, BEST)
    at_least_one(s, "batch", "tasks", "samples", "stages", "lora_rank")
    above_zero(s, "ewc_coefficient")
    if not s.lr > 0 or not 0 < s.share <= 1 or not 0 <= s.smoothing <= 1:
        raise SideTuningError(
            f"--lr {s.lr:g} --share {s.share:g} --smoothing {s.smoothing:g}: give lr > 0, 0 < share <= 1, 0 <= smoothing <= 1"
        )
    if (s.clip is not None and not s.clip > 0) or not s.weight_decay >= 0:
        raise SideTuningError(f"--clip {s.clip} --weight-decay {s.weight_decay:g}: give clip > 0, weight decay >= 0")
    read_by_method(s, READERS)
    folder = Run(s.out, "icifar", s, free=FREE)
    base = load_base(s.base, weights=s.base_weights, taps=s.taps)
    method = build_method(s, base)
    method.add(Task("dry-run", CLASSES_PER_TASK))  # an unknown part is found before the long work
    train_set, test_set = load_images(s.data, "train"), load_images(s.data, "test")
    folder.belongs(data=train_set.fingerprint())
    if train_set.names != test_set.names:
        raise DataError(f"{s.data} has other classes to test than to train on; give both splits the same")
    classes = len(train_set.names)
    if classes < s.tasks * CLASSES_PER_TASK:
        raise DataError(f"{s.data} has {classes} classes; {s.tasks} tasks of ten need {s.tasks * CLASSES_PER_TASK}")

    train = prepare(method, base, train_set, s)
    test = views_of(prepare(method, base, test_set, s))
    base_seconds = sum(data.seconds for data in (train, test[0]) if isinstance(data, CachedFeatures))

    def lesson(k: int) -> Lesson:
        labels = train_set.names[CLASSES_PER_TASK * k : CLASSES_PER_TASK * (k + 1)]
        name = f"classes-{10 * k}-{10 * k + 9}"
        loss = partial(F.cross_entropy, label_smoothing=s.smoothing)
        return Lesson(
            Task(name, CLASSES_PER_TASK, loss, labels, seed=s.seed * 1000 + k),
            partial(task_loader, train, k, s.batch, shuffle=True, share=s.share),
            partial(test_accuracy, name=name, views=test, task=k),
        )

    return learn_in_order(
        folder, partial(build_method, s, base), [lesson(k) for k in task_order(s)], recipe_of(s),
        settings={k: v for k, v in asdict(s).items() if k not in FREE}, method_name=s.method, seed=s.seed,
        base_seconds=base_seconds, alone=s.alone, save_every=s.save_every, progress=s.progress,
    )  # fmt: skip


def fingerprint_of(settings: Settings) -> str:
    """Of the training images."""
    return load_images(settings.data, "train").fingerprint()


def build_method(settings: Settings, base: Base) -> Method:
    """The method that the settings name, without tasks."""
    s = settings
    width = {} if s.side_width == 1 else {"width": s.side_width}  # distilled sides ship for the whole width
    side = {
        "side": s.side, "merge": s.merge, "init": s.init, "prenorm": s.prenorm,
        "side_options": {"fcn4": width, "copy": width, "fusion": {"shift": s.side_shift}}.get(s.side, {}),
    }  # fmt: skip
    options: dict[str, dict[str, Any]] = {  # of the other methods: their own defaults
        "sidetune": {**side, "dense": s.dense}, "boosting": {**side, "stages": s.stages},
        "features": {"prenorm": s.prenorm}, "psp": {"seed": s.seed, "statistics": s.psp_statistics},
        "ewc": {"coefficient": s.ewc_coefficient}, "lora": {"rank": s.lora_rank},
    }  # fmt: skip
    return METHODS.build(s.method, base, options=options.get(s.method, {}))


def recipe_of(settings: Settings) -> Recipe:
    """How every task is trained."""
    s = settings
    steps = -(-s.samples // s.batch)

    return Recipe(
        steps, s.lr, s.weight_decay, s.clip, optimizer=torch.optim.AdamW if s.optimizer == "adamw" else torch.optim.Adam,
        scheduler=one_cycle(s.lr, 0.25) if s.schedule == "one-cycle" else None, seed=s.seed, precision=s.precision,
    )  # fmt: skip


def task_order(settings: Settings) -> list[int]:
    """Positions of the tasks in label order, or shuffled."""
    if settings.order is None:
        return list(range(settings.tasks))
    return torch.randperm(settings.tasks, generator=torch.Generator().manual_seed(settings.order)).tolist()


class Images(Dataset[Any]):
    """Batches of images without features, for methods that run a network of their own.

    Attributes:
        view: 0 gives images as they are, 1 mirrored, None at random and cropped after padding by 4.
    """

    def __init__(self, images: Tensor, labels: Tensor, view: int | None) -> None:
        self.images, self.labels, self.view = images, labels, view

    def __len__(self) -> int:
        return len(self.labels)

    def __getitems__(self, rows: Sequence[int]) -> tuple[Tensor, None, Tensor]:
        x = self.images[list(rows)]
        if self.view is None:
            x = random_flip_crop(x, padding=4)
        return x.flip(-1) if self.view == 1 else x, None, self.labels[list(rows)]


def prepare(method: Method, base: Base, images: ImageSet, settings: Settings) -> CachedFeatures | Images:
    """Images, to be augmented where the settings say so, with cached base features where the method uses them."""
    s = settings
    if not method.uses_features:
        return Images(*images.tensors(), view=None if s.mirror else 0)
    return cache_features(
        base, images, Path(s.cache).expanduser(), views=2 if s.mirror else 1, augment=mirror if s.mirror else None,
        dtype="float16" if s.taps else "float32", progress=s.progress,
    )  # fmt: skip


def mirror(images: Tensor, generator: torch.Generator) -> Tensor:
    """The second view of every image."""
    return images.flip(-1)


def views_of(data: CachedFeatures | Images) -> list[CachedFeatures | Images]:
    """A data set per view, instead of one that gives a random view."""
    if isinstance(data, Images):
        return [data] if data.view == 0 else [Images(data.images, data.labels, view) for view in (0, 1)]
    views = [CachedFeatures(data.folder) for _ in range(data.views)]
    for i, view in enumerate(views):
        view.view = i
    return list(views)


@torch.no_grad()
def test_accuracy(method: Method, name: str, views: Sequence[CachedFeatures | Images], task: int) -> Score:
    """The share of a task's test images whose mean answer over the views is right."""
    from accelerate.utils import send_to_device

    right = total = 0
    device = method.base.device
    for batches in zip(*(task_loader(view, task, 500, shuffle=False) for view in views), strict=True):
        batches = send_to_device(batches, device)
        answers = [method(x, name, features=features).softmax(1) for x, features, _ in batches]
        y = batches[0][2]
        right += int((sum(answers[1:], answers[0]).argmax(1) == y).sum())
        total += len(y)
    return Score(right / total, right / total)


def task_loader(
    data: CachedFeatures | Images, task: int, batch: int, *, shuffle: bool, share: float = 1.0
) -> DataLoader[Any]:
    """The images of one task's ten classes, with labels 0 … 9; a `share` below 1 takes the first ones of each class."""
    first = CLASSES_PER_TASK * task
    labels = data.labels
    chosen = [(labels == first + c).nonzero().flatten() for c in range(CLASSES_PER_TASK)]
    indices = torch.cat([rows[: max(1, round(share * len(rows)))] for rows in chosen]).sort().values
    return loader_over(data, batch_size=batch, shuffle=shuffle, indices=indices, relabel=lambda y: y - first)  # type: ignore[return-value]


def main(settings: Settings) -> None:
    """Run, print the table and write the report."""
    show(run(settings), with_recipe(settings, BEST))
    print(f"report: {report([settings.out])}")


def show(result: RunResult, settings: Settings) -> None:
    """The table of a run."""
    from rich.console import Console
    from rich.table import Table

    matrix = result.matrix
    what = settings.merge if settings.method == "sidetune" else settings.method
    table = Table(title=f"iCIFAR, {what}, seed {settings.seed}: accuracy in %", caption_justify="left")
    for column in ("task", "when learned", "at the end", "forgotten", "alpha", "seconds"):
        table.add_column(column, justify="left" if column == "task" else "right")
    for i, name in enumerate(matrix.tasks):
        alpha = result.alphas[i]
        table.add_row(
            name, f"{100 * matrix.learned[i]:.1f}", f"{100 * matrix.final[i]:.1f}", f"{100 * matrix.forgetting[i]:.1f}",
            "–" if alpha is None else f"{alpha:.3f}", f"{result.seconds[i]:.1f}",
        )  # fmt: skip
    average = [*(sum(v) / len(v) for v in (matrix.learned, matrix.final)), 0.0 - matrix.backward_transfer]
    table.add_section()
    table.add_row("average", *(f"{100 * v:.1f}" for v in average), "", f"{sum(result.seconds):.1f} in all")
    console = Console()
    console.print(table)
    console.print(costs(result, settings.out), highlight=False)
