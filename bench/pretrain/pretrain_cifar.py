"""Make the packaged base, a ResNet-44 on CIFAR-10, and the FCN4 side distilled from it: run this file.

Resumable; about two hours on two CPU cores. The weights land in `--out` as safetensors.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal

import torch
import torch.nn.functional as F
import tyro
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from sidetuning.base import Base
from sidetuning.bases import IMAGENET_MEAN, IMAGENET_STD
from sidetuning.bases.resnet_cifar import resnet44
from sidetuning.cache import cache_features, loader_over
from sidetuning.distillation import distill
from sidetuning.errors import SideTuningError
from sidetuning.files import atomic_write
from sidetuning.launch import default_accelerator
from sidetuning.loop import train
from sidetuning.seeding import seeded
from sidetuning.tuner import SideTuner
from sidetuning_bench.cifar import load_images, random_flip_crop
from sidetuning_bench.methods.recipe import one_cycle
from sidetuning_bench.runs import Run

EXAMPLE = torch.zeros(1, 3, 32, 32, dtype=torch.uint8)


@dataclass(frozen=True)
class Settings:
    """Make resnet44-cifar10 and its distilled FCN4."""

    data: str = "uoft-cs/cifar10"
    """A folder with train/<class>/*.png and test/<class>/*.png, or parquet files, or a data set on the Hub."""
    out: str = "runs/pretrain-cifar10"
    """Folder for the weights and the resume files."""
    epochs: tuple[int, ...] = (40, 16)
    """Passes over the training images in each one-cycle schedule; each starts from the weights of the one before."""
    lr: tuple[float, ...] = (0.2, 0.1)
    """The peak learning rate of each."""
    batch: int = 128
    """Images per step."""
    weight_decay: float = 5e-4
    """Weight decay of convolutions and the classifier; norms and biases have none."""
    precision: Literal["no", "bf16"] = "bf16"
    """Mixed precision of training."""
    distill_epochs: int = 20
    """Passes over cached features in which the FCN4 learns to imitate the base."""
    seed: int = 0
    """Seed for initial weights, data order and augmentation."""


class Classifier(nn.Module):
    """The net with a throw-away classifier; `forward` is the training objective."""

    mean: Tensor
    std: Tensor

    def __init__(self, precision: str) -> None:
        super().__init__()
        self.precision = precision
        self.net = resnet44().to(memory_format=torch.channels_last)
        self.head = nn.Linear(64, 10)
        self.register_buffer("mean", torch.tensor(IMAGENET_MEAN).view(3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(IMAGENET_STD).view(3, 1, 1), persistent=False)

    def logits(self, images: Tensor) -> Tensor:
        """uint8 (b, 3, h, w) -> (b, 10)."""
        x = (images.float() / 255 - self.mean) / self.std
        return self.head(self.net(x.contiguous(memory_format=torch.channels_last)))

    def forward(self, batch: tuple[Tensor, Tensor]) -> Tensor:
        images, labels = batch
        with torch.autocast(images.device.type, torch.bfloat16, enabled=self.precision == "bf16"):
            logits = self.logits(images)
        return F.cross_entropy(logits.float(), labels)

    @torch.no_grad()
    def accuracy(self, images: Tensor, labels: Tensor) -> float:
        """On a whole split, in float32."""
        self.eval()
        chunks = zip(images.split(500), labels.split(500), strict=True)
        device = self.mean.device
        return sum(int((self.logits(x.to(device)).argmax(1).cpu() == y).sum()) for x, y in chunks) / len(labels)


class AugmentedBatches:
    """Shuffled batches of one size, changed by `augment(*batch)`; draws from torch's global generator."""

    def __init__(self, tensors: Sequence[Tensor], batch: int, augment: Callable[..., tuple[Tensor, ...]]) -> None:
        self.tensors, self.batch, self.augment = tensors, batch, augment

    def __len__(self) -> int:
        return len(self.tensors[0]) // self.batch

    def __iter__(self) -> Iterator[tuple[Tensor, ...]]:
        order = torch.randperm(len(self.tensors[0]))
        for i in range(len(self)):
            rows = order[i * self.batch : (i + 1) * self.batch]
            yield self.augment(*(t[rows] for t in self.tensors))


def flipped_and_cropped(images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """How training batches are augmented."""
    return random_flip_crop(images, padding=4), labels


def main(settings: Settings) -> None:
    """Train, distil, write the weights; prints the accuracies of both."""
    out, rates = Path(settings.out), settings.lr
    if len(settings.epochs) != len(rates):
        given = f"{len(settings.epochs)} cycles of epochs and {len(rates)} peak rates"
        raise SideTuningError(f"{given}: give one --lr for each of --epochs")
    Run(out, "pretrain cifar10", settings, free=("data", "out"))
    images, labels = load_images(settings.data, "train").tensors()
    test_images, test_labels = load_images(settings.data, "test").tensors()
    model = train_base(settings, (images, labels), (test_images, test_labels))
    print(f"accuracy on the 10,000 test images: {model.accuracy(test_images, test_labels):.4f}", flush=True)
    write(out / "resnet44-cifar10.safetensors", model.net)
    tuner = distil_side(settings, model, TensorDataset(images, labels))
    side = tuner["imitation"].side
    assert side is not None
    write(out / "fcn4-cifar10-distilled.safetensors", side)
    with torch.no_grad():
        codes = [tuner(chunk.to(tuner.base.device), "imitation") for chunk in test_images.split(500)]
        answers = torch.cat([model.head(code).argmax(1).cpu() for code in codes])
    right = float((answers == test_labels).float().mean())
    print(f"the side is right on {right:.4f} of the test images; weights in {out}")


def train_base(settings: Settings, data: tuple[Tensor, Tensor], test: tuple[Tensor, Tensor]) -> Classifier:
    """Train the net with its classifier, one cycle after another."""
    # Sorted by class, so that every fifth image is balanced; nothing is chosen by it.
    few = tuple(values[::5] for values in test)
    with seeded(settings.seed):
        model = Classifier(settings.precision).to(default_accelerator().device)
    loader = AugmentedBatches(data, settings.batch, flipped_and_cropped)
    for k, (epochs, lr) in enumerate(zip(settings.epochs, settings.lr, strict=True)):
        steps = epochs * len(loader)
        optimizer = torch.optim.SGD(groups(model, settings.weight_decay), lr=lr, momentum=0.9, nesterov=True)
        train(
            model,
            loader,
            optimizer,
            steps=steps,
            seed=settings.seed + k,
            resume=Path(settings.out) / f"cycle-{k}.pt",
            scheduler=one_cycle(lr, 0.15)(optimizer, steps),
            validate=lambda: {"accuracy on 2,000 test images": model.accuracy(*few)},
            progress=f"ResNet-44 on CIFAR-10, cycle {k}",
        )
    return model


def distil_side(settings: Settings, model: Classifier, data: TensorDataset) -> SideTuner:
    """A tuner whose task "imitation" has the FCN4 that imitates the base."""
    out, seed, device = Path(settings.out), settings.seed, default_accelerator().device
    tuner = SideTuner(Base(model.net, example=EXAMPLE.to(device), mean=IMAGENET_MEAN, std=IMAGENET_STD))
    with seeded(seed):
        tuner.add_task("imitation", side="fcn4", merge="side-only", head="identity")
    cached = cache_features(tuner.base, data, out / "cache", views=2, augment=augment, seed=seed)
    passes = loader_over(cached, batch_size=64)
    steps, resume = settings.distill_epochs * len(passes), out / "distill.pt"
    loss = partial(through_classifier, model.head.requires_grad_(False))
    distill(tuner, "imitation", passes, steps=steps, lr=1e-3, seed=seed, resume=resume, loss=loss)
    return tuner


def augment(images: Tensor, generator: torch.Generator) -> Tensor:
    """The views that the side is distilled on."""
    return random_flip_crop(images, padding=4, generator=generator)


def through_classifier(classifier: nn.Module, side: Tensor, base: Tensor, temperature: float = 4.0) -> Tensor:
    """KL divergence between the classifier's softened answers to both codes: what separates classes comes first."""
    answers, targets = [(classifier(code) / temperature).log_softmax(1) for code in (side, base)]
    return F.kl_div(answers, targets, log_target=True, reduction="batchmean") * temperature**2


def groups(model: nn.Module, weight_decay: float) -> list[dict[str, object]]:
    """Weight decay on matrices and kernels only."""
    matrices = [p for p in model.parameters() if p.ndim > 1]
    rest = [p for p in model.parameters() if p.ndim <= 1]
    return [{"params": matrices, "weight_decay": weight_decay}, {"params": rest, "weight_decay": 0.0}]


def write(path: Path, module: nn.Module) -> None:
    """The module's tensors as float32 safetensors."""
    with atomic_write(path) as temporary:
        save_file(
            {k: v.float().contiguous() for k, v in module.state_dict().items() if v.is_floating_point()}, temporary
        )


if __name__ == "__main__":
    main(tyro.cli(Settings))
