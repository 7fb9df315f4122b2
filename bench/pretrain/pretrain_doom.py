"""Make the packaged base of dense tasks, a ResNet that sees curvature in Doom, and its side: run this file.

Resumable. The base of 20,000 frames takes about 28 minutes on one core that knows bfloat16, its side 8. The weights of
the base, of its decoder and of the FCN5 side distilled from it land in `--out` as safetensors. Only frames of training
maps are used.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
import tyro
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from pretrain_cifar import AugmentedBatches, groups, write
from sidetuning.base import Base
from sidetuning.bases import IMAGENET_MEAN, IMAGENET_STD
from sidetuning.cache import cache_features, loader_over
from sidetuning.heads import HEADS
from sidetuning.launch import default_accelerator
from sidetuning.loop import train
from sidetuning.seeding import seeded
from sidetuning.sides.fcn import FCN5
from sidetuning_bench.dense.base import SIDE_OPTIONS
from sidetuning_bench.dense.resnet_map import ResNetMap
from sidetuning_bench.dense.targets import target
from sidetuning_bench.dense.taskonomy import Taskonomy
from sidetuning_bench.methods.recipe import one_cycle
from sidetuning_bench.runs import Run

# Images, raw curvatures and masks.
Frames = tuple[Tensor, Tensor, Tensor]


@dataclass(frozen=True)
class Settings:
    """Make resnet-doom-curvature, its decoder and its distilled FCN5."""

    data: str = "runs/doom-pretrain"
    """A folder written by `sidetuning bench render-doom --frames 27600 --seed 1`, or another in Taskonomy's layout with
    a splits.csv."""
    out: str = "runs/pretrain-doom-curvature"
    """Folder for the weights and the resume files."""
    epochs: int = 12
    """Passes over the training frames."""
    lr: float = 2e-3
    """Peak of the one-cycle learning rate of AdamW."""
    batch: int = 64
    """Frames per step."""
    weight_decay: float = 0.02
    """Weight decay of kernels; norms and biases have none."""
    precision: Literal["no", "bf16"] = "bf16"
    """Mixed precision of training."""
    distill_epochs: int = 20
    """Passes over cached features, of half the frames' size in turn, in which the side learns to imitate the base."""
    seed: int = 0
    """Seed for initial weights, data order and augmentation."""


class Regression(nn.Module):
    """Encoder and decoder; `forward` is the training objective: the paper's masked L2."""

    mean: Tensor
    std: Tensor

    def __init__(self, size: int, precision: str) -> None:
        super().__init__()
        self.precision = precision
        self.net = ResNetMap().to(memory_format=torch.channels_last)
        like_net = base_of(ResNetMap(), size)  # of another net, since a base freezes its own
        self.decoder = HEADS.build("pixels", like_net, options={"channels": 2})
        self.register_buffer("mean", torch.tensor(IMAGENET_MEAN).view(3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(IMAGENET_STD).view(3, 1, 1), persistent=False)

    def predict(self, images: Tensor) -> Tensor:
        """uint8 (b, 3, h, w) -> curvatures in the range of targets, (b, 2, h, w)."""
        x = (images.float() / 255 - self.mean) / self.std
        with torch.autocast(images.device.type, torch.bfloat16, enabled=self.precision == "bf16" and self.training):
            return self.decoder(self.net(x.contiguous(memory_format=torch.channels_last))).float()

    def forward(self, batch: tuple[Tensor, Tensor, Tensor]) -> Tensor:
        images, raw, mask = batch
        return masked_l2(self.predict(images), raw, mask)

    @torch.no_grad()
    def error(self, images: Tensor, raw: Tensor, masks: Tensor) -> float:
        """The loss over a whole split, in float32."""
        was, device = self.training, self.mean.device
        self.eval()
        chunks = zip(images.split(100), raw.split(100), masks.split(100), strict=True)
        total = sum(
            float(masked_l2(self.predict(x.to(device)), y.to(device), m.to(device))) * len(x) for x, y, m in chunks
        )
        self.train(was)
        return total / len(images)


def masked_l2(prediction: Tensor, raw: Tensor, mask: Tensor) -> Tensor:
    """Mean squared error over valid pixels."""
    error = (prediction - target("curvature", raw)).square().mean(1)
    return (error * mask).sum() / mask.sum().clamp(min=1)


def base_of(net: nn.Module, size: int) -> Base:
    """The encoder as a base."""
    return Base(net, example=torch.zeros(1, 3, size, size, dtype=torch.uint8), mean=IMAGENET_MEAN, std=IMAGENET_STD)


def augmented(images: Tensor, raw: Tensor, masks: Tensor) -> tuple[Tensor, ...]:
    """How training batches are changed: mirrored, recoloured, and every other one at half the size, which agents see.

    Principal curvatures of a mirrored surface are those of the surface.
    """
    flip = torch.rand(len(images)) < 0.5
    for t in (images, raw, masks):
        t[flip] = t[flip].flip(-1)
    batch = augment(images), raw, masks
    return halved(*batch) if torch.rand(()) < 0.5 else batch


def halved(images: Tensor, raw: Tensor, masks: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Frames at half the size; valid where all four pixels are. (b, …, h, w) -> (b, …, h / 2, w / 2)"""
    return half(images), half(raw), -F.max_pool2d(-masks[:, None].float(), 2)[:, 0]


def half(images: Tensor) -> Tensor:
    """Means over 2 x 2 pixels, of the same type."""
    return torch.cat([F.avg_pool2d(some.float(), 2).round().to(some.dtype) for some in images.split(1000)])


def augment(images: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """Each image's colours raised to a power and scaled, per channel a little, uint8 (b, 3, h, w) -> the same."""
    b = len(images)
    power = torch.empty(b, 1, 1, 1).uniform_(0.7, 1.4, generator=generator)
    gain = torch.empty(b, 3, 1, 1).uniform_(0.85, 1.15, generator=generator)
    return ((images.float() / 255) ** power * gain * 255).clamp(0, 255).to(torch.uint8)


def load(root: str, split: str) -> Frames:
    """Images, raw curvatures and masks of a split, in memory."""
    frames = Taskonomy(root, ("rgb", "principal_curvature"), split, subset=None)
    return frames.tensors("rgb"), frames.tensors("principal_curvature"), frames.tensors("mask")


def main(settings: Settings) -> None:
    """Train, distil, write the weights; prints the errors of both."""
    out = Path(settings.out)
    Run(out, "pretrain doom-curvature", settings, free=("data", "out"))
    frames, val = load(settings.data, "train"), load(settings.data, "val")
    size = frames[0].shape[-1]
    model = train_base(settings, frames, val)
    tested = {size: val, size // 2: halved(*val)}
    for pixels, (images, raw, masks) in tested.items():
        flat = float(masked_l2(torch.full(raw.shape, -1 / 255), raw, masks))
        told = f"error on {len(images)} frames of validation maps, {pixels} pixels"
        print(f"{told}: {model.error(images, raw, masks):.5f}, of a flat guess: {flat:.5f}", flush=True)
    write(out / "resnet-doom-curvature.safetensors", model.net)
    write(out / "resnet-doom-curvature-decoder.safetensors", model.decoder)
    base = base_of(model.net.eval(), size).to(default_accelerator().device)
    imitation = imitate(settings, base, frames[0])
    write(out / "fcn5-doom-curvature-distilled.safetensors", imitation.side)
    for pixels, found in tested.items():
        error, missed = distance(imitation, model, base, found)
        print(
            f"the side at {pixels} pixels: {error:.5f} through the decoder, {missed:.2f} of the code's variance missed"
        )
    print(f"weights in {out}")


def train_base(settings: Settings, frames: Frames, val: Frames) -> Regression:
    """Train encoder and decoder."""
    # Nothing is chosen by these.
    few = [values[::4] for values in val]
    with seeded(settings.seed):
        model = Regression(frames[0].shape[-1], settings.precision).to(default_accelerator().device)
    loader = AugmentedBatches(frames, settings.batch, augmented)
    steps = settings.epochs * len(loader)
    optimizer = torch.optim.AdamW(groups(model, settings.weight_decay), lr=settings.lr)
    train(
        model,
        loader,
        optimizer,
        steps=steps,
        seed=settings.seed,
        resume=Path(settings.out) / "train.pt",
        clip=1.0,
        scheduler=one_cycle(settings.lr, 0.15)(optimizer, steps),
        validate=lambda: {"error on frames of validation maps": model.error(*few)},
        progress="ResNet on Doom's curvature",
    )
    return model


@torch.no_grad()
def distance(imitation: Imitation, model: Regression, base: Base, frames: Frames) -> tuple[float, float]:
    """Error of the side's code through the decoder, and the share of the base's code's variance that it misses."""
    errors, codes, wanted = 0.0, [], []
    for x, y, mask in zip(*(values.split(100) for values in frames), strict=True):
        images = x.to(base.device)
        codes.append(imitation.code(images))
        wanted.append(base(images).out)
        errors += float(masked_l2(model.decoder(codes[-1]).cpu(), y, mask)) * len(x)
    whole = torch.cat(wanted)
    missed = (torch.cat(codes) - whole).square().mean() / whole.var((0, 2, 3)).mean()
    return errors / len(frames[0]), float(missed)


def imitate(settings: Settings, base: Base, images: Tensor) -> Imitation:
    """Distil the packaged side from the base, on pictures of the frames' size and of half of it."""
    out, seed = Path(settings.out), settings.seed
    options: dict[str, Any] = SIDE_OPTIONS
    with seeded(seed):
        side = FCN5(base, **options).to(base.device)
    passes = []
    for pictures, name in ((images, "cache"), (half(images), "cache-half")):
        data = TensorDataset(pictures, torch.zeros(len(pictures)))
        of_size = base.with_example(pictures[:1])
        cached = cache_features(of_size, data, out / name, views=2, augment=mirrored, seed=seed)
        passes.append(loader_over(cached, batch_size=64))
    imitation = Imitation(base, side)
    steps = settings.distill_epochs * len(passes[0])
    optimizer = torch.optim.Adam(side.parameters(), lr=1e-3)
    train(
        imitation,
        InTurn(passes),
        optimizer,
        steps=steps,
        seed=seed,
        resume=out / "distill.pt",
        clip=1.0,
        scheduler=torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps),
        progress="distilling the side",
    )
    return imitation


class Imitation(nn.Module):
    """The mean squared distance between a side and the base in the space of the code, for pictures of any size."""

    def __init__(self, base: Base, side: FCN5) -> None:
        super().__init__()
        self.side = side
        self._base = (base,)  # a tuple: no part of what is trained

    def code(self, images: Tensor) -> Tensor:
        """What the side makes of pictures, not brought to one size."""
        inputs = self._base[0].prepare(images)
        assert isinstance(inputs, Tensor)
        return self.side.body(inputs)

    def forward(self, batch: Any) -> Tensor:
        images, features, _ = batch
        return F.mse_loss(self.code(images), features.out)


class InTurn:
    """Batches of several loaders in turn, as long as the shortest of them lasts."""

    def __init__(self, loaders: Sequence[Iterable[Any]]) -> None:
        self.loaders = loaders

    def __iter__(self) -> Iterator[Any]:
        for batches in zip(*self.loaders, strict=False):
            yield from batches


def mirrored(images: Tensor, generator: torch.Generator) -> Tensor:
    """The views that the side is distilled on."""
    flip = torch.rand(len(images), generator=generator) < 0.5
    return augment(torch.where(flip.view(-1, 1, 1, 1), images.flip(-1), images), generator)


if __name__ == "__main__":
    main(tyro.cli(Settings))
